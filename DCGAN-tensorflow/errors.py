"""Errors and signals that end a script with one line that says why and what to do."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

OUT_OF_MEMORY = ("out of memory", "not enough memory", "allocate memory")  # as PyTorch says it


class UserError(Exception):
    """A mistake that the user can mend. The message names the file or flag and says what to do."""

    def __init__(self, message: object):
        super().__init__(printable(message))


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM. The message tells the user what was saved."""


def run(main: Callable[[], None]) -> None:
    """Run a script's `main` and end the process.

    The exit code is 2 after a UserError or an error of the operating system, 130 after Ctrl-C or
    SIGTERM. Either prints one line and no traceback.
    """
    prepare_streams()
    end_by_signals()
    try:
        main()
        sys.stdout.flush()
        return
    except UserError as error:
        code = fail(error)
    except KeyboardInterrupt as stop:
        say(stop if isinstance(stop, Interrupted) else "stopped")
        code = 130
    except BrokenPipeError:  # the reader, `head` for one, has ended: nobody is left to tell
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
    """Print an error in one line on standard error; returns the exit code."""
    say(f"error: {printable(message)}")
    return 2


def say(text: object) -> None:
    """Print a line on standard error; where that is closed or full, print nothing."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def printable(text: object) -> str:
    """Return the text in one line, with line breaks and undecodable bytes as escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether Python, numpy, TensorFlow or PyTorch raised this for lack of memory."""
    # TensorFlow and PyTorch are not imported for their classes: that would take seconds.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "ResourceExhaustedError"
        or (isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY))
    )


def prepare_streams() -> None:
    """Make standard output and error accept any text, whatever their encoding.

    A stream that is closed is opened on the null device. Otherwise the next file that is opened
    would get its number, and whatever C libraries print would be written into that file.
    """
    for name, mode in ("stdin", "r"), ("stdout", "w"), ("stderr", "w"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    for stream in sys.stdout, sys.stderr:
        if hasattr(stream, "reconfigure"):  # a notebook's have no such method
            stream.reconfigure(errors="backslashreplace")


def ending_signals() -> list[int]:
    """Return Ctrl-C, SIGTERM and a closed terminal, but for those that are ignored.

    In the background and under nohup some are, and stay so.
    """
    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    numbers = [getattr(signal, name) for name in names]
    return [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]


def end_by_signals() -> None:
    """Have these signals end the script as Ctrl-C does: once, so that it can tidy up."""
    received = []

    def stop(number, frame):
        received.append(number)
        if len(received) == 1:
            raise KeyboardInterrupt

    for number in ending_signals():
        signal.signal(number, stop)


@contextmanager
def postponed_interrupts() -> Iterator[list[int]]:
    """Collect these signals in a list, for a loop that ends between two steps."""
    caught = []
    signals = ending_signals()
    before = [signal.signal(s, lambda number, frame: caught.append(number)) for s in signals]
    try:
        yield caught
    finally:
        for s, handler in zip(signals, before, strict=True):
            signal.signal(s, handler)


def drop_unwritten() -> None:
    """Drop output that can't be written, on which Python would fail once more when it exits."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
