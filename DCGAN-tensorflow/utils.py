"""Flags, images in and out for the DCGAN scripts, grids and GIFs.

This folder shares no code with the scripts one folder up: it imports none of theirs, and they
import none of its. Either can be taken alone, only files pass between them, and neither needs what
the other has installed. What both need (images.py, errors.py, files.py) is here a second time.

Imports no TensorFlow, so that `resizeImage.py`, `--help` and argument errors are quick.
Images are numpy arrays `[N, H, W, 3]`, uint8 (0..255) outside the networks and float32 in
[-1, 1] inside them.
"""

import argparse
import fnmatch
import io
import math
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import numpy as np
from errors import UserError
from files import replacing
from images import is_hidden, is_image, read_image
from PIL import Image
from tqdm import tqdm

MEMORY_LIMIT = 2 * 1024**3  # bytes of decoded images; more go to a file on disk
MANIFEST = "manifest.json"  # beside single images: where they come from
THREADS = min(8, os.cpu_count() or 1)


# ---- arguments ---------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, whose errors are one line like all others."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")

    def print_help(self, file=None) -> None:
        print(
            self.format_help(), end="", flush=True
        )  # argparse would drop the error of a full disk


def boolean(text: str) -> bool:
    """`--flag True` and `--flag False`, as TensorFlow 1's flags took them."""
    if text.lower() in ("true", "t", "1", "yes"):
        return True
    if text.lower() in ("false", "f", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"True or False, not {text!r}")


def whole(low: int, bits: int = 31):
    """An argparse type: an integer of `low` or more, but under 2^`bits`."""

    def integer(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"must be {low} or more, not {value}")
        if value >= 2**bits:
            raise argparse.ArgumentTypeError(f"{value} is not under 2^{bits}")
        return value

    return integer


def finite(text: str) -> float:
    """An argparse type: a number that is no NaN and not infinite."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, not {value}")
    return value


def path(text: str) -> str:
    """An argparse type: a path or a name, not empty (which would be the current folder)."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


@contextmanager
def silence() -> Iterator[None]:
    """Drop what C++ libraries write to stderr (TensorFlow's start-up notes heed no setting)."""
    sys.stderr.flush()
    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)


def command_line() -> str:
    """The command that is running, as one would type it."""
    return shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])


def computes_bf16(device: str) -> bool:
    """Whether "CPU" or "GPU" has fast bf16 arithmetic."""
    if device == "GPU":
        if os.environ["KERAS_BACKEND"] == "torch":
            import torch

            return torch.cuda.get_device_capability() >= (8, 0)
        import tensorflow as tf

        gpu = tf.config.list_physical_devices("GPU")[0]
        details = tf.config.experimental.get_device_details(gpu)
        return details.get("compute_capability", (0, 0)) >= (8, 0)
    cpu = Path("/proc/cpuinfo")  # elsewhere than on Linux it can't be told: no
    return cpu.exists() and any(word in cpu.read_bytes() for word in (b"avx512_bf16", b"amx_bf16"))


# ---- images in ---------------------------------------------------------------------------------


def list_images(folder: Path) -> list[Path]:
    """Sorted images in `folder` and one level of folders below it.

    Folders called `gen_*` hold generated images (gen_0000) and are passed over: a GAN must not
    train on its own output.
    """
    below = [d for d in folder.iterdir() if d.is_dir() and not d.name.startswith("gen_")]
    places = [folder, *(d for d in below if not is_hidden(d.name))]
    files = (file for place in places for file in place.iterdir())
    return sorted(file for file in files if is_image(file) and not file.is_dir())


def find_images(folder: Path, flag: str) -> list[Path]:
    """As `list_images`. Raises UserError, which names `flag`, where there are none."""
    if not folder.is_dir():
        raise UserError(f"{flag}: there is no folder {folder}")
    images = list_images(folder)
    if not images:
        raise UserError(f"{flag}: no image in {folder} or one level below it")
    return images


def matching(images: list[Path], pattern: str) -> list[Path]:
    """Those of the images whose file name is like `pattern`, whatever their case."""
    return [path for path in images if fnmatch.fnmatch(path.name.lower(), pattern.lower())]


def read_resized(path: Path, height: int, width: int, crop: tuple[int, int] | None = None):
    """One RGB Pillow image of `width` x `height`, from any image file.

    `crop` = (height, width) takes that much of the middle first (at most the whole image).
    Bicubic with antialiasing; brightness and contrast stay what they are.
    """
    image = read_image(path)
    if crop:
        tall, wide = min(crop[0], image.height), min(crop[1], image.width)
        left, top = (image.width - wide) // 2, (image.height - tall) // 2
        image = image.crop((left, top, left + wide, top + tall))
    return image.resize((width, height), Image.Resampling.BICUBIC)


def in_threads(work, items, label: str) -> None:
    """`work(item)` for every item in a few threads, with a progress bar; the first error ends it.

    Pillow decodes, scales and encodes outside Python's lock, so threads do help.
    """
    pool = ThreadPoolExecutor(THREADS)
    try:
        done = pool.map(work, items)
        for _ in tqdm(done, total=len(items), desc=label, unit="image", disable=None):
            pass
    finally:
        pool.shutdown(cancel_futures=True)  # an error or Ctrl-C doesn't wait for all the others


def load_images(paths: list[Path], height: int, width: int, crop=None) -> np.ndarray:
    """Decode every image once: uint8 `[N, height, width, 3]`.

    Up to MEMORY_LIMIT bytes stay in memory; a larger set goes to an unnamed temporary file
    (in $TMPDIR), which the system pages in and out and deletes when the process ends.
    """
    shape = (len(paths), height, width, 3)
    size = math.prod(shape)
    if size <= MEMORY_LIMIT:
        images = np.empty(shape, np.uint8)
    else:
        with tempfile.TemporaryFile() as file:
            reserve(file, size)
            images = np.memmap(file, np.uint8, "w+", shape=shape)

    def read(i: int) -> None:
        images[i] = read_resized(paths[i], height, width, crop)

    in_threads(read, range(len(paths)), "reading")
    return images


def reserve(file, size: int) -> None:
    """Take the place on disk now: where it is full, writing to memory would kill the process."""
    try:
        if hasattr(os, "posix_fallocate"):  # not on macOS and Windows
            os.posix_fallocate(file.fileno(), 0, size)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"{tempfile.gettempdir()}: no room for {size:,} bytes of decoded images ({error}); set "
            "TMPDIR to another folder, or take smaller or fewer images"
        ) from error


def to_signed(images):
    """Floats 0..255 -> -1..1, the same line for every image (no contrast stretching)."""
    return images / 127.5 - 1


def to_uint8(images: np.ndarray) -> np.ndarray:
    """float -1..1 -> uint8 0..255, the inverse of `to_signed`."""
    return np.clip(np.rint((images + 1) * 127.5), 0, 255).astype(np.uint8)


# ---- images out --------------------------------------------------------------------------------


def grid(images: np.ndarray, columns: int, gap: int = 2) -> np.ndarray:
    """uint8 `[N, H, W, 3]` -> one picture, row by row, white gaps of `gap` pixels."""
    n, height, width, _ = images.shape
    rows = -(-n // columns)
    picture = np.full(
        (rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8
    )
    for i, image in enumerate(images):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        picture[top : top + height, left : left + width] = image
    return picture


def write_image(path: Path, image: Image.Image, kind: str, **options) -> None:
    """Write a Pillow image.

    Not by Pillow itself, which takes a file that the full disk has cut off for a whole one.
    """
    content = io.BytesIO()
    image.save(content, kind, **options)
    path.write_bytes(content.getvalue())


def save_png(path: Path, image: np.ndarray) -> None:
    """Write one uint8 `[H, W, 3]` image, whole or not at all, in a folder that may be new."""
    with replacing(path) as temporary:
        write_image(temporary, Image.fromarray(image), "PNG")


def save_gif(path: Path, frames: list[np.ndarray], milliseconds: int = 120) -> None:
    """Write an endless GIF that plays the uint8 `[H, W, 3]` frames forth and back, likewise."""
    first, *rest = [Image.fromarray(frame) for frame in [*frames, *frames[-2:0:-1]]]
    options = {"save_all": True, "append_images": rest, "duration": milliseconds, "loop": 0}
    with replacing(path) as temporary:
        write_image(temporary, first, "GIF", **options)
