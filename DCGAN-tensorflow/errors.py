"""What ends a script before its end: one line that says why and what to do, no traceback."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class UserError(Exception):
    """Something the user can mend. The message names the file or flag and says what to do."""

    def __init__(self, message: object):
        super().__init__(printable(message))


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, with what the user should know."""


def run(main) -> None:
    """Run a script's `main` as a process.

    Exit code 2 for a UserError and for what the system refuses, 130 for Ctrl-C and SIGTERM.
    """
    prepare_streams()
    signal.signal(signal.SIGTERM, interrupt)
    try:
        main()
        sys.stdout.flush()
        return
    except UserError as error:
        code = fail(error)
    except KeyboardInterrupt as stop:
        say(stop if isinstance(stop, Interrupted) else "stopped")
        code = 130
    except BrokenPipeError:  # `| head` has seen enough; nowhere is left to say so
        code = 1
    except OSError as error:
        code = fail(f"{error.filename or 'input or output'}: {error.strerror or error}")
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or ["no more to be had"])[0]
        code = fail(f"the memory is full ({reason}); smaller sizes and numbers need less")
    drop_unwritten()
    sys.exit(code)


def fail(message: object) -> int:
    """Print the one line on standard error; returns the exit code."""
    say(f"error: {printable(message)}")
    return 2


def say(text: object) -> None:
    """Print on standard error, as far as anything can be written there."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def printable(text: object) -> str:
    """Text in one line, without what would confuse a terminal: line breaks, undecodable bytes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def is_out_of_memory(error: Exception) -> bool:
    """Whether Python, numpy, TensorFlow or PyTorch has found no memory."""
    # Their classes are not imported: that would take seconds.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "ResourceExhaustedError"
        or (isinstance(error, RuntimeError) and "memory" in str(error))
    )


def prepare_streams() -> None:
    """Have standard output and error take any text, whatever their encoding, also where closed.

    A closed one is opened anew on nothing: the next file to be opened would get its number, and
    with it what C libraries print.
    """
    for name, mode in ("stdin", "r"), ("stdout", "w"), ("stderr", "w"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    for stream in sys.stdout, sys.stderr:
        stream.reconfigure(errors="backslashreplace")


def interrupt(number, frame):
    """Have SIGTERM, which schedulers and `kill` send, end a script as Ctrl-C does: tidied up."""
    raise KeyboardInterrupt


@contextmanager
def postponed_interrupts() -> Iterator[list]:
    """Ctrl-C and a cluster's SIGTERM only fill the list: the loop inside ends between two steps."""
    caught = []
    signals = signal.SIGINT, signal.SIGTERM
    before = [signal.signal(s, lambda number, frame: caught.append(number)) for s in signals]
    try:
        yield caught
    finally:
        for s, handler in zip(signals, before, strict=True):
            signal.signal(s, handler)


def drop_unwritten() -> None:
    """Keep Python from failing once more, at its end, on output that can't be written."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
