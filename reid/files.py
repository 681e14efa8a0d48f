"""Outputs that are whole or not there: written under a temporary name, then renamed."""

import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path

from reid.errors import UserError


@contextmanager
def replacing(path):
    """Give a temporary name beside the file `path`; at the end of the block it becomes `path`.

        with replacing("log.json") as temporary:
            Path(temporary).write_text("{}")

    If the block fails, nothing is left. Raises UserError where `path` can't be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def new_folder(path):
    """Give an empty temporary folder; at the end of the block it becomes the new folder `path`.

    If the block fails, nothing is left. Raises UserError where `path` can't be made.
    """
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def cannot_write(path, error):
    """The UserError for an OSError met while writing `path`."""
    return UserError(f"{path}: can't be written ({error.strerror or error}); name another place")
