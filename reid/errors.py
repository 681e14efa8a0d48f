"""Errors and signals that end a script: one line that says why and what to do, no traceback."""

import gc
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress


class UserError(Exception):
    """Something the user can mend. The message names the file or flag and says what to do.

    agreed: whether all processes of a torchrun end with this error: the first alone says it.
    """

    def __init__(self, message: object, agreed: bool = False):
        # A loader's process hands its error over as the text of a traceback that ends in this.
        message = str(message).rpartition(f"{__name__}.UserError: ")[2]
        super().__init__(printable(message.strip()))
        self.agreed = agreed


def first_line(error: Exception) -> str:
    """Return an exception's message, cut to its first line."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def missing_package(who: object, *names) -> UserError:
    """Return the UserError of a flag or script that needs packages which are not installed."""
    return UserError(f"{who}: needs {' and '.join(names)}; pip install {' '.join(names)}")


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, with what the user should know."""


def run(main: Callable[[], None], torchrun: bool = False) -> None:
    """Run a script's `main` as a process.

    torchrun: whether it can be one of several processes that share the work.
    Exit code 2 for a UserError and for what the system refuses, 130 for Ctrl-C and SIGTERM.
    """
    prepare_streams()
    end_by_signals()
    try:
        several = by_torchrun() and os.environ.get("WORLD_SIZE") != "1"
        if several and not torchrun:
            raise UserError("torchrun: this script is one process; start it with python", True)
        main()
        sys.stdout.flush()
        if "triton" not in sys.modules:  # it would take this for a leak, and say so at length
            gc.freeze()  # else Python looks through torch's 200,000 objects again: half a second
    except UserError as error:
        code = fail(error)
    except KeyboardInterrupt as stop:
        if is_first():
            say(stop if isinstance(stop, Interrupted) else "interrupted")
        code = 130
    except BrokenPipeError:  # `| head` has seen enough; nowhere is left to say so
        code = 1
    except Exception as error:
        message = explanation(error)
        if message is None:  # ours: to be seen with its traceback
            raise
        code = fail(UserError(message))
    else:
        return
    drop_unwritten()
    sys.exit(code)


def explanation(error: Exception) -> str | None:
    """Return the line for an exception that the system or a package raised; None for our own."""
    lines = str(error).splitlines() or [""]
    text = lines[-1] if lines[0].startswith("Caught ") else lines[0]  # by a loader's process
    kind = f"{type(error).__module__}.{type(error).__name__}"
    if isinstance(error, OSError):
        where, why = error.filename or "input or output", error.strerror or text
        return f"{where}: {why}; check the path, its permissions and the free space"
    full = "MPS backend out of memory", "CUDA error: out of memory", "_ALLOC_FAILED"
    if "OutOfMemoryError" in kind or any(words in text for words in full):
        return "the GPU's memory is full; lower --batchsize, or end what else uses it"
    if isinstance(error, MemoryError) or "not enough memory" in text or "allocate memory" in text:
        return f"the memory is full ({text}); ask for less, or close other programs"
    if "for the MPS device" in text:
        return f"Apple's GPU can't do this ({text}); take the CPU: --gpu_ids -1"
    if "DataLoader worker (pid" in text:
        return (
            f"a process that reads images has ended ({text}); is the memory full? lower --workers"
        )
    if kind.startswith(("torch._dynamo", "torch._inductor")):
        return f"--compile: {text}; leave it out"
    if kind.startswith("torch.distributed") or "Connection closed by peer" in text:
        return f"another process has ended, and its own line says why; or else: {text}"
    return None


def fail(error):
    """Print the one line on standard error; returns the exit code."""
    if is_first():
        say(f"error: {error}")
    elif not error.agreed:
        say(f"error (in another process): {error}")
    return 2


def say(text: str) -> None:
    """Print on standard error, as far as anything can be written there."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def is_first() -> bool:
    """Tell whether this is the only process, or the first of those that torchrun started."""
    return not by_torchrun() or os.environ["RANK"] == "0"


def by_torchrun() -> bool:
    """Tell whether torchrun started this process. (Other launchers may set RANK, too.)"""
    return "TORCHELASTIC_RUN_ID" in os.environ


def printable(text: object) -> str:
    """Escape in a text what would confuse a terminal: line breaks, undecodable bytes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def prepare_streams():
    """Have standard output and error take any text, whatever their encoding, also where closed.

    A closed one is opened anew on nothing: the next file to be opened would get its number, and
    with it what C libraries print.
    """
    for name, mode in ("stdin", "r"), ("stdout", "w"), ("stderr", "w"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    for stream in sys.stdout, sys.stderr:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def end_by_signals():
    """Have Ctrl-C, SIGTERM and a closed terminal end the script: once, so that it can tidy up."""
    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    numbers = [getattr(signal, name) for name in names]
    # What is ignored, as in the background or under nohup, stays so.
    numbers = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]

    received = []

    def stop(number, frame):
        received.append(number)
        if len(received) > 1:
            return
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():  # no other may say what happens
        for number in numbers:
            signal.signal(number, stop)


def drop_unwritten():
    """Keep Python from failing once more, at its end, on output that can't be written."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
