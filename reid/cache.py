"""Decoded images in files beside the dataset: every process maps them, the next run finds them.

    <data_dir>/cache/<key>.npy    NumPy's format, uint8 [N, h, w, 3], and behind it a checksum

The key is a hash of all that the pixels depend on: names, sizes and times of the files, what is
done to them, Pillow's version. So a file of other images or sizes is never taken; nor is one whose
checksum is wrong. The operating system keeps one copy in memory, whatever the number of processes.
"""

import hashlib
import io
import json
import math
import os
import shutil
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from itertools import chain
from os import PathLike
from pathlib import Path

import numpy as np
import PIL
from tqdm import tqdm

from reid.errors import UserError
from reid.files import CAN_LOCK, locked, replacing

VERSION = 2  # raise it when images are decoded otherwise, so that older files are not taken
BUDGET = 8 * 1024**3  # bytes of all files in one folder; what was used longest ago makes room
AHEAD = 256  # images that are decoded before their pixels are written
CHECKSUM = 4  # bytes


def shared_images(
    paths: list[Path], read: Callable, about: object, folder: Path, threads: int, label: str
) -> np.ndarray:
    """Return images, uint8 [N, h, w, 3], as a view of the file in `folder` that has them.

    The file is made where there is none; other processes wait for it meanwhile. read: decodes an
    image to [h, w, 3], the same for all; about: what `read` does, as JSON can hold it. Raises
    UserError for an image that can't be read, or where the file can't be written.
    """
    file = cache_file(paths, about, folder)
    images = stored_images(file)
    if images is not None:
        with suppress(OSError):  # of a folder that may not be written
            os.utime(file)  # `make_room` takes others first
    else:
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{folder}: can't be made ({error.strerror}); take --cache ram"
            ) from None
        with locked(file.with_suffix(""), patience=math.inf):
            images = stored_images(file)  # another process may have made it
            if images is None:
                store(file, len(paths), decoded(paths, read, threads, label))
                make_room(file)
                images = stored_images(file)
            if images is None:
                raise UserError(f"{file}: can't be read again once written; take --cache ram")
    return images


def is_stored(paths: list[Path], about: object, folder: Path) -> bool:
    """Tell whether there is a file of these images, be it damaged or not."""
    return cache_file(paths, about, folder).exists()


def cache_file(paths, about, folder):
    """Return the path of the file for these images, named by a hash."""
    digest = hashlib.sha256(json.dumps([VERSION, about, PIL.__version__]).encode())
    for path in paths:
        facts = os.stat(path)
        digest.update(os.fsencode(f"\n{name_of(path, folder)}"))
        digest.update(f" {facts.st_size} {facts.st_mtime_ns}".encode())
    return folder / f"{digest.hexdigest()[:24]}.npy"


def name_of(path, folder):
    """Return a file's name as seen from a folder, so that both may move together."""
    try:
        return os.path.relpath(path, folder)
    except ValueError:  # on Windows there is none to another drive
        return os.path.abspath(path)


def stored_images(file):
    """Return the images of a file as an array; None where it is missing or damaged."""
    try:
        content = np.memmap(file, np.uint8, "r").view(np.ndarray)
        if zlib.crc32(content[:-CHECKSUM]) != int.from_bytes(content[-CHECKSUM:], "little"):
            return None
        return np.load(file, mmap_mode="r").view(np.ndarray)
    except (OSError, ValueError):
        return None


def store(file, number, images):
    """Write that many arrays [h, w, 3] into a file, whole or not at all."""
    images = iter(images)
    first = next(images)
    header, about = io.BytesIO(), np.lib.format.header_data_from_array_1_0(first)
    np.lib.format.write_array_header_1_0(header, about | {"shape": (number, *first.shape)})
    crc32 = 0
    with replacing(file, "take --cache ram") as temporary, open(temporary, "wb") as output:
        for part in chain([header.getbuffer(), first.data], (image.data for image in images)):
            output.write(part)
            crc32 = zlib.crc32(part, crc32)
        output.write(crc32.to_bytes(CHECKSUM, "little"))


def decoded(paths: list[Path], read: Callable, threads: int, label: str) -> Iterator[np.ndarray]:
    """Yield the array that `read` makes of each file; threads decode some ahead, with a bar."""
    with (
        closing(read_ahead(paths, read, threads, AHEAD)) as images,
        tqdm(total=len(paths), desc=label, unit="image", disable=None, leave=False) as bar,
    ):
        for _, image in images:
            if isinstance(image, UserError):
                raise image
            yield image
            bar.update()


def read_ahead(
    paths: Iterable[str | PathLike], read: Callable, threads: int, ahead: int
) -> Iterator[tuple[str | PathLike, object]]:
    """Yield (path, `read(path)` or the UserError that it raised), in order.

    `ahead` files are read by threads while the caller is busy with earlier ones; decoding lets
    other threads run.
    """

    def attempt(path):
        try:
            return read(path)
        except UserError as error:
            return error

    pool, waiting = ThreadPoolExecutor(max(threads, 1)), deque()
    try:
        for path in paths:
            waiting.append((path, pool.submit(attempt, path)))
            if len(waiting) > ahead:
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def make_room(newest):
    """Delete the files that were used longest ago while all of a folder are over the BUDGET.

    Also what killed processes have left half-written; who still writes holds its lock.
    """
    for part in newest.parent.glob(".*.npy.partial"):
        key = part.name[1:].removesuffix(".npy.partial")
        if CAN_LOCK and key != newest.stem:
            with suppress(UserError, OSError), locked(newest.with_name(key)):
                part.unlink()
    files = []
    for file in newest.parent.glob("*.npy"):
        with suppress(OSError):  # another process makes room, too
            files.append((file.stat().st_mtime_ns, file.stat().st_size, file))
    total = 0
    for _, size, file in sorted(files, reverse=True):
        total += size
        if total > BUDGET and file != newest:
            with suppress(OSError):
                file.unlink()


def has_room(folder: Path, size: float) -> bool:
    """Tell whether a file of so many bytes fits into the BUDGET and half of the disk's free room.

    Processes that ask while another writes may get another answer: their images are the same.
    """
    if not CAN_LOCK:
        return False
    parent = folder if folder.is_dir() else folder.parent
    try:
        free = shutil.disk_usage(parent).free
    except OSError:
        return False
    return size <= BUDGET and 2 * size <= free and os.access(parent, os.W_OK)
