"""A user's mistakes: one line that says what to do, exit code 2, no traceback."""

import gc
import os
import sys


class UserError(Exception):
    """Something the user can mend. The message names the file or flag and says what to do."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, with what the user should know."""


def run(main):
    """Run a script's `main` as a process: exit code 2 for a UserError, 130 for Ctrl-C."""
    try:
        main()
        sys.stdout.flush()
        if "triton" not in sys.modules:  # it would take this for a leak, and say so at length
            gc.freeze()  # else Python looks through torch's 200,000 objects again: half a second
    except UserError as error:
        sys.exit(fail(str(error)))
    except KeyboardInterrupt as stop:
        if is_first():
            print(stop if isinstance(stop, Interrupted) else "interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `| head` has seen enough; nowhere is left to say so
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def fail(message):
    """Print the one line on standard error; returns the exit code."""
    # A loader's worker process hands its error over as the text of a traceback; the last line
    # is the message.
    line = message.strip().splitlines()[-1].removeprefix(f"{__name__}.UserError: ")
    print(
        f"error: {line}" if is_first() else f"error (in another process): {line}", file=sys.stderr
    )
    return 2


def is_first():
    """Whether this is the only process, or the first of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"
