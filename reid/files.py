"""Outputs that are whole or not there: written under a temporary name, then renamed."""

import hashlib
import json
import os
import shutil
import tempfile
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
    path = Path(path).absolute()
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # or a power cut could leave the new name on nothing
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
    path = Path(path).absolute()
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if path.is_dir():
            path.rmdir()  # an empty one; Windows can't rename onto it
        temporary.rename(path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_writable(path):
    """Raise UserError where the file `path` can't be written: better now than after the work."""
    path = Path(path).absolute()
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path, error):
    """The UserError for an OSError met while writing `path`."""
    return UserError(f"{path}: can't be written ({error.strerror or error}); name another place")


def sha256(path):
    """Of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path, content):
    """Write indented JSON, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def read_results(path):
    """The sections of a results.json; none where there is no such file yet."""
    try:
        results = json.loads(Path(path).read_text()) if Path(path).exists() else {}
        return dict(results)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not a results file ({error}); name another") from error


def update_results(path, section, values):
    """Set one section of a results.json (a dict a script), keeping the others."""
    write_json(path, read_results(path) | {section: values})
