"""Outputs that are whole or not there: written under a temporary name, then renamed."""

import glob
import hashlib
import json
import os
import shutil
import signal
import tempfile
import threading
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

    If the block fails, nothing is left; what a killed process left is removed by the next that
    makes the same folder (not on Windows). Raises UserError where `path` can't be made.
    """
    path = Path(path).absolute()
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    missing = []
    try:
        missing = [parent for parent in path.parents if not parent.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        temporary.mkdir()
        yield temporary
        if path.is_dir():
            path.rmdir()  # an empty one; Windows can't rename onto it
        temporary.rename(path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in missing:
            with suppress(OSError):  # not empty: the new folder is in it
                parent.rmdir()


def remove_leftovers(path):
    """Delete what killed processes had begun of the new folder `path`."""
    for folder in path.parent.glob(f".[0-9]*.{glob.escape(path.name)}"):
        number = folder.name[1:].split(".")[0]
        if number.isdecimal() and not lives(int(number)):
            shutil.rmtree(folder, ignore_errors=True)


def lives(number):
    """Whether another process of this machine has the number `number`."""
    if number == os.getpid():
        return False
    if os.name == "nt":
        return True  # can't be asked: the call below would end it
    try:
        os.kill(number, 0)  # sends nothing
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's
        return True
    return True


@contextmanager
def sigterm_as_ctrl_c():
    """SIGTERM inside ends the process as Ctrl-C does: after tidying up."""

    def stop(number, frame):
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # no other may say what happens
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def link(path, name):
    """Give a file another name: a hard link, or a copy where the file system has none."""
    try:
        os.link(os.path.realpath(path), name)  # else of a symbolic link, the link itself
    except OSError:
        shutil.copyfile(path, name)


def symlink(path, name):
    """Make `name` a symbolic link to the file that `path` leads to."""
    os.symlink(os.path.realpath(path), name)


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
