"""Files: text and JSON read and checked, outputs that are whole or not there.

Text is UTF-8 whatever the computer's language. Outputs are written under a temporary name, then
renamed: while `x` is written, `.x.partial` beside it holds what is done so far, and `.x.lock` is
locked. A killed process may leave both; the next that makes the same thing clears them away.
"""

import codecs
import errno
import hashlib
import io
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None

from reid.errors import UserError

CAN_LOCK = fcntl is not None
TRIES = 50 if os.name == "nt" else 1  # to rename, a tenth of a second apart
PATIENCE = 60  # seconds that a process waits for another that writes the same file
BUSY = {errno.EACCES, errno.EAGAIN}
BOMS = {  # of other encodings than UTF-8; UTF-32's begins with UTF-16's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
TYPE_NAMES = {dict: "an object", list: "a list", str: "text", int: "a whole number"}
TYPE_NAMES |= {float: "a number", bool: "true or false"}


# --- outputs, whole or not at all ---------------------------------------------------------------


@contextmanager
def replacing(path: str | Path, advice: str = "name another place") -> Iterator[Path]:
    """Give a temporary name beside the file `path`; at the end of the block it becomes `path`.

        with replacing("log.json") as temporary:
            Path(temporary).write_text("{}")

    If the block fails, nothing is left. Another process that writes the same file waits meanwhile.
    Where `path` is a symbolic link, the file that it leads to is written. Raises UserError, which
    ends in `advice`, where `path` can't be written.
    """
    path = Path(os.path.realpath(path))
    temporary = partial_name(path)
    try:
        check_regular(path)
        with locked(path, PATIENCE):
            try:
                temporary.unlink(missing_ok=True)
                yield temporary
                with open(temporary, "rb+") as file:
                    os.fsync(file.fileno())  # or a power cut could leave the new name on nothing
                rename(temporary, path)
            finally:
                with suppress(OSError):
                    temporary.unlink()
    except OSError as error:
        raise cannot_write(path, error, advice) from error


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Give an empty temporary folder; at the end of the block it becomes the new folder `path`.

    If the block fails, nothing is left. Raises UserError where `path` can't be made, or another
    process is making it.
    """
    path = Path(os.path.realpath(path))  # a link to an empty folder stays
    temporary = partial_name(path)
    try:
        with parents_of(path), locked(path):
            try:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir()
                yield temporary
                if path.is_dir():
                    path.rmdir()  # an empty one; Windows can't rename onto it
                rename(temporary, path)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise cannot_write(path, error) from error


@contextmanager
def parents_of(path: Path) -> Iterator[None]:
    """Make the folders that `path` lies in; those that are empty at the end go again.

    Raises UserError where they can't be made.
    """
    missing = []
    try:
        try:
            missing = [parent for parent in path.parents if not parent.exists()]
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(path, error) from error
        yield
    finally:
        for parent in missing:
            with suppress(OSError):  # not empty
                parent.rmdir()


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
    return path.with_name(f".{path.name}.partial")


@contextmanager
def locked(path: str | Path, patience: float = 0) -> Iterator[None]:
    """Keep other processes that ask for the same from `path` until the block ends.

    The lock ends with its process, too, however that ends; over NFS where the server has locks. A
    process that holds it already must not ask again.
    Raises UserError where another still has it after so many seconds.
    """
    if fcntl is None:
        yield
        return
    lock = Path(path).with_name(f".{Path(path).name}.lock")
    try:
        descriptor = take_lock(lock, patience)
    except OSError as error:
        of_another = isinstance(error, PermissionError) and lock.exists()
        raise cannot_write(lock if of_another else path, error) from error
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


def take_lock(lock, patience):
    """Return the descriptor of the locked file; None where another process has it."""
    deadline = time.monotonic() + patience
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            # A loader's process, which is a fork, would inherit a lock of flock(), and outlive us.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in BUSY:
                return descriptor  # a file system without locks
            os.close(descriptor)
            if time.monotonic() > deadline:
                return None
            time.sleep(0.02)
            continue
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return descriptor
        os.close(descriptor)  # who had it has deleted it: lock the file that is there now


def holder(lock):
    """Read from a lock file which process has locked it."""
    try:
        return lock.read_text(errors="replace") or "unknown"
    except OSError:
        return "unknown"


def link(path: str | Path, name: str | Path) -> None:
    """Give a file another name: a hard link, or a copy where the file system has none.

    Raises UserError where the file is gone or can't be read.
    """
    with suppress(OSError):
        os.link(os.path.realpath(path), name)  # else of a symbolic link, the link itself
        return
    copy(path, name)


def copy(path: str | Path, name: str | Path) -> None:
    """Copy a file. Raises UserError where it is gone or can't be read."""
    try:
        source = open(path, "rb")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); replace it") from error
    with source, open(name, "wb") as target:
        shutil.copyfileobj(source, target)


def symlink(path: str | Path, name: str | Path) -> None:
    """Make `name` a symbolic link to the file that `path` leads to."""
    os.symlink(os.path.realpath(path), name)


def check_writable(path: str | Path) -> None:
    """Raise UserError where the file `path` can't be written: better now than after the work."""
    path = Path(os.path.realpath(path))
    try:
        if path.is_dir():
            raise UserError(f"{path}: is a folder; name a file")
        check_regular(path)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        with suppress(FileNotFoundError):
            os.lstat(partial_name(path))  # raises where the name is too long
    except OSError as error:
        raise cannot_write(path, error) from error


def check_regular(path):
    """Raise UserError where `path` is a device or a pipe: a file would take its place.

    Folders pass: the system lets no file take theirs.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"{path}: is no regular file; name another")


def cannot_write(path: str | Path, error: OSError, advice: str = "name another place") -> UserError:
    """Return the UserError for an OSError met while writing `path`."""
    return UserError(f"{path}: can't be written ({error.strerror or error}); {advice}")


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal. Raises UserError where it can't be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); replace it") from error


def write_picture(path: str | Path, save: Callable) -> None:
    """Write a picture, whole or not at all. save: as for `encoded`."""
    content = encoded(save)
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def encoded(save: Callable) -> bytes:
    """Return the bytes of the picture that `save(file)` writes.

    In memory: Pillow may leave half a picture on a full disk without an error.
    """
    file = io.BytesIO()
    save(file)
    return file.getvalue()


# --- text and JSON ------------------------------------------------------------------------------


def read_text(path: str | Path, advice: str = "check the path") -> str:
    """Read a text file in UTF-8, or in UTF-16 or UTF-32 where it begins with their mark.

    Raises UserError, which ends in `advice`, where there is no such file, or one of no text.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; {advice}")
    content = Path(path).read_bytes()
    encoding = next((name for bom, name in BOMS.items() if content.startswith(bom)), "utf-8-sig")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError:
        raise UserError(f"{path}: not text in UTF-8; save it as UTF-8") from None


def write_text(path: str | Path, text: str) -> None:
    """Write a file in UTF-8, whole or not at all; bytes of a path that are no text are escaped."""
    with replacing(path) as temporary:
        temporary.write_bytes(text.encode(errors="backslashreplace"))


def read_json(path: str | Path, advice: str, **types) -> dict:
    """Read the object in a JSON file, as a dict.

    types: what the values under these names must be, where they are there. Raises UserError, which
    ends in `advice`, where the file is not such an object.
    """
    return parse_json(read_text(path, advice), path, advice, **types)


def parse_json(text: str, source: object, advice: str, **types) -> dict:
    """Parse JSON text that comes from `source`, as `read_json` does."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: not valid JSON ({error}); {advice}") from error
    check_types({"content": content}, source, advice, content=dict)
    check_types(content, source, advice, **types)
    return content


def check_types(content, source, advice, /, **types) -> None:
    """Raise UserError where a value of the dict `content` is not of the type of its name."""
    for name, kind in types.items():
        if name in content and not is_a(content[name], kind):
            raise UserError(f"{source}: its {name} is not {TYPE_NAMES[kind]}; {advice}")


def demand(content, source, advice, /, **types) -> None:
    """Check types as `check_types` does; a missing value is an error, too."""
    for name in types:
        if name not in content:
            raise UserError(f"{source}: has no {name}; {advice}")
    check_types(content, source, advice, **types)


def is_a(value: object, kind: type) -> bool:
    """Tell whether a JSON value is of a type; whole numbers count as float, true as bool alone."""
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, int | float) and abs(value) < float("inf")
    return isinstance(value, kind)


def dumps(content: object) -> str:
    """Return indented JSON text."""
    return json.dumps(content, indent=2) + "\n"


def write_json(path: str | Path, content: object) -> None:
    """Write indented JSON, whole or not at all."""
    write_text(path, dumps(content))


def read_results(path: str | Path) -> dict[str, dict]:
    """Read the sections of a results.json, dicts; none where there is no such file yet."""
    if not Path(path).exists():
        return {}
    results = read_json(path, "name another results file")
    for name, section in results.items():
        if not isinstance(section, dict):
            raise UserError(f"{path}: not a results file ({name} is no section); name another")
    return results


def check_results(path: str | Path | None) -> None:
    """Raise UserError where `update_results` could not write; None is no file."""
    if path:
        check_writable(path)
        read_results(path)


def update_results(path: str | Path, section: str, values: dict | None) -> None:
    """Set one section of a results.json (a dict a script), or remove it; the others stay."""
    with replacing(path) as temporary:  # no other process writes between reading and writing
        results = read_results(path) | {section: values}
        if values is None:
            del results[section]
        temporary.write_bytes(dumps(results).encode())
