"""Outputs that are whole or not there, and text files that are checked when they are read.

While `x` is written, `.x.new.partial` beside it holds what is done so far, and `.x.lock` is locked.
A killed process may leave both; the next that makes the same thing clears them away. Text is
UTF-8, whatever the computer's language.
"""

import codecs
import errno
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from errors import UserError

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None

BUSY = {errno.EACCES, errno.EAGAIN}
BOMS = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
TYPE_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
TYPE_NAMES |= {int | None: "a whole number or null"}


# ---- outputs -----------------------------------------------------------------------------------


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name beside the file `path`; at the end of the block it becomes `path`.

    If the block fails, nothing is left. Another process that writes the same file waits meanwhile.
    """
    temporary = partial_name(path)
    with writing(path), locked(path, wait=True):
        try:
            temporary.unlink(missing_ok=True)
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())  # or a power cut could leave the new name on nothing
            temporary.replace(path)
        finally:
            with suppress(OSError):
                temporary.unlink()


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give an empty temporary folder; at the end it takes the place of the empty or missing `path`.

    If the block fails (Ctrl-C too), nothing is left: either all the files are there or none.
    """
    path = path.resolve()  # of a link to an empty folder, the folder
    temporary = partial_name(path)
    with writing(path), locked(path):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            yield temporary
            if path.is_dir():
                path.rmdir()  # refuses if it holds files by now
            temporary.rename(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Have what the system refuses while `path` is written name `path`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: can't be written ({reason}); name another place") from error


def partial_name(path: Path) -> Path:
    """What `path` is called while it is written."""
    return path.parent / f".{path.name}.new.partial"


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Keep other processes that ask for the same from `path` until the block ends.

    The lock ends with its process, too, however that ends. Makes the folders above `path`; those
    that hold nothing at the end go again. Raises UserError where another has it, unless `wait`.
    """
    path = path.absolute()
    lock = path.parent / f".{path.name}.lock"
    missing = [parent for parent in path.parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if fcntl is None:
            yield
            return
        descriptor = take_lock(lock, wait)
        if descriptor is None:
            raise UserError(
                f"{path}: another process is writing it ({holder(lock)}); wait for it, or name "
                "another place"
            )
        try:
            yield
        finally:
            with suppress(OSError):
                lock.unlink()
            os.close(descriptor)
    finally:
        for parent in missing:
            with suppress(OSError):
                parent.rmdir()


def take_lock(lock: Path, wait: bool) -> int | None:
    """The descriptor of the locked file; None where another process has it."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno in BUSY:
                os.close(descriptor)
                return None
            return descriptor  # a file system without locks
        except BaseException:  # Ctrl-C while waiting
            os.close(descriptor)
            raise
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return descriptor
        os.close(descriptor)  # who had it has deleted it: lock the file that is there now


def holder(lock: Path) -> str:
    """Who has locked a file, as it says itself."""
    try:
        return lock.read_text(encoding="utf-8", errors="replace") or "unknown"
    except OSError:
        return "unknown"


def check_writable(folder: Path, flag: str, new: bool = False) -> None:
    """Raise UserError if `folder` can't be written (or, if `new`, holds anything already).

    Asked before the work starts; makes nothing.
    """
    if new and folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{flag}: {folder} already holds files; delete them or name another folder")
    place = folder.absolute()
    while not place.exists() and not place.is_symlink():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{flag}: cannot write to {folder}; name a folder that can be written")
    with suppress(FileNotFoundError):
        os.lstat(partial_name(folder.absolute()))  # raises where the name is too long


# ---- text --------------------------------------------------------------------------------------


def read_text(path: Path, advice: str) -> str:
    """The text of a file in UTF-8, or in UTF-16 where it begins with its mark.

    Raises UserError, which ends in `advice`, where there is no such file, or none of text.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; {advice}")
    content = path.read_bytes()
    try:
        return content.decode(BOMS.get(content[:2], "utf-8-sig"))
    except UnicodeDecodeError:
        raise UserError(f"{path}: not text in UTF-8; {advice}") from None


def write_json(path: Path, content: dict) -> None:
    """Write indented JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8", newline="\n")


def read_json(path: Path, advice: str, **types) -> dict:
    """The object in a JSON file.

    types: what it must hold under these names. Raises UserError, which ends in `advice`, where the
    file is not such an object.
    """
    return parse_json(read_text(path, advice), path, advice, **types)


def parse_json(text: str, source: object, advice: str, **types) -> dict:
    """As `read_json`, of text that comes from `source`."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: not valid JSON ({error}); {advice}") from error
    if not isinstance(content, dict):
        raise UserError(f"{source}: not a JSON object; {advice}")
    for name, kind in types.items():
        if name not in content or not is_a(content[name], kind):
            raise UserError(f"{source}: its {name} is not {TYPE_NAMES[kind]}; {advice}")
    return content


def is_a(value: object, kind) -> bool:
    """Whether a JSON value is of a type; whole numbers count as float, true and false as bool."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)
