"""Write outputs whole or not at all; read text and JSON files and check what they hold.

While `x` is written, `.x.new.partial` beside it holds the part that is done, and `.x.lock` is
locked. A killed process may leave both; the next one that writes `x` deletes them. Text is written
in UTF-8, whatever the computer's language.
"""

import codecs
import errno
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import UnionType

from errors import UserError

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None

TRIES = 50 if os.name == "nt" else 1  # to rename, a tenth of a second apart
BUSY = {errno.EACCES, errno.EAGAIN}
BOMS = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
TYPE_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
TYPE_NAMES |= {int | None: "a whole number or null"}


# ---- outputs -----------------------------------------------------------------------------------


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside the file `path`; at the end of the block it becomes `path`.

    If the block fails, nothing is left. Another process that writes the same file waits meanwhile.
    Where `path` is a symbolic link, the file that it leads to is written.
    """
    path = path.resolve()
    temporary = partial_name(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"{path}: is no regular file; name another")  # but a device or a pipe
    with writing(path), locked(path, wait=True):
        try:
            temporary.unlink(missing_ok=True)
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())  # a power cut could leave an empty file under the name
            rename(temporary, path)
        finally:
            with suppress(OSError):
                temporary.unlink()


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder; at the end of the block it becomes `path`.

    `path` is a new or empty folder. If the block fails (or on Ctrl-C) nothing is left: either all
    files are there or none.
    """
    path = path.resolve()  # a link to an empty folder stays; the folder is replaced
    temporary = partial_name(path)
    with writing(path), locked(path):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            yield temporary
            if path.is_dir():
                path.rmdir()  # fails if it holds files by now
            rename(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an error of the system while `path` is written into a UserError that names `path`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: can't be written ({reason}); name another place") from error


def rename(path: Path, name: Path) -> None:
    """Give a file or folder another name, which a file may have already.

    On Windows, whoever has it open keeps that from happening, be it a virus scanner for a moment.
    """
    for left in reversed(range(TRIES)):
        try:
            os.replace(path, name)
            return
        except PermissionError:
            if not left:
                raise
            time.sleep(0.1)


def partial_name(path: Path) -> Path:
    """Return the name that `path` has while it is written."""
    return path.parent / f".{path.name}.new.partial"


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Lock `path` against other processes that call this function, until the block ends.

    The system frees the lock when the process ends, however it ends. Missing folders above `path`
    are made, and deleted again where they are still empty at the end. Where another process has
    the lock, this waits for it if `wait`, else raises UserError.
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
    """Lock a file and return its descriptor, or None where another process has the lock."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno in BUSY:
                os.close(descriptor)
                return None
            return descriptor  # the file system has no locks: go on without
        except BaseException:  # Ctrl-C while waiting
            os.close(descriptor)
            raise
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return descriptor
        os.close(descriptor)  # the process before has deleted this file: lock the one there now


def holder(lock: Path) -> str:
    """Return the process that has locked a file, as it wrote itself into the file."""
    try:
        return lock.read_text(encoding="utf-8", errors="replace") or "unknown"
    except OSError:
        return "unknown"


def check_writable(folder: Path, flag: str, new: bool = False) -> None:
    """Raise UserError if `folder` can't be written (or, if `new`, holds anything already).

    It is called before the work starts, and makes nothing.
    """
    if new and folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{flag}: {folder} already holds files; delete them or name another folder")
    existing = folder.absolute()
    while not existing.exists() and not existing.is_symlink():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{flag}: cannot write to {folder}; name a folder that can be written")
    with suppress(FileNotFoundError):
        os.lstat(partial_name(folder.absolute()))  # raises OSError where the name is too long


# ---- text --------------------------------------------------------------------------------------


def read_text(path: Path, advice: str) -> str:
    """Read a text file in UTF-8, or in UTF-16 where it begins with a byte order mark.

    Raises UserError, whose message ends in `advice`, where the file is missing or holds no text.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; {advice}")
    content = path.read_bytes()
    try:
        return content.decode(BOMS.get(content[:2], "utf-8-sig"))
    except UnicodeDecodeError:
        raise UserError(f"{path}: not text in UTF-8; {advice}") from None


def write_json(path: Path, content: dict) -> None:
    """Write `content` as indented JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8", newline="\n")


def read_json(path: Path, advice: str, **types: type | UnionType) -> dict:
    """Read the object in a JSON file.

    types: the names that the object must have, with the types of their values. Raises UserError,
    whose message ends in `advice`, where the file is not such an object.
    """
    return parse_json(read_text(path, advice), path, advice, **types)


def parse_json(text: str, source: object, advice: str, **types: type | UnionType) -> dict:
    """Parse text as `read_json` does; errors name its `source`."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: not valid JSON ({error}); {advice}") from error
    if not isinstance(content, dict):
        raise UserError(f"{source}: not a JSON object; {advice}")
    for name, expected in types.items():
        if name not in content or not is_a(content[name], expected):
            raise UserError(f"{source}: its {name} is not {TYPE_NAMES[expected]}; {advice}")
    return content


def is_a(value: object, expected: type | UnionType) -> bool:
    """Tell whether a JSON value is of a type; whole numbers are floats too, booleans no numbers."""
    if isinstance(value, bool):
        return expected is bool
    return isinstance(value, (int, float) if expected is float else expected)
