"""Types of flags, and reading and writing of images, for the scripts in this folder.

This folder shares no code with the scripts one folder up: neither imports the other, and only files
pass between them. So either can be taken alone, and neither needs the packages of the other. This
is why errors.py, files.py and images.py repeat parts of reid/ on purpose; images.py is a copy.

This module imports no TensorFlow, so that `resizeImage.py`, `--help` and wrong flags answer at
once. Images are numpy arrays `[N, H, W, 3]`, uint8 (0..255) outside the networks and float32 in
[-1, 1] inside them.
"""

import argparse
import fnmatch
import io
import math
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NoReturn

import numpy as np
from errors import UserError
from files import replacing
from images import is_hidden, is_image, read_image
from PIL import Image
from tqdm import tqdm

MEMORY_LIMIT = 2 * 1024**3  # bytes; a larger set of decoded images goes to a file on disk
MANIFEST = "manifest.json"  # the file beside single images that says where they come from
THREADS = min(8, os.cpu_count() or 1)


# ---- arguments ---------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An argparse parser without abbreviations, which raises UserError for wrong flags."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")

    def print_help(self, file=None) -> None:
        # Not by argparse, which hides the error of a full disk.
        print(self.format_help(), end="", flush=True)


def boolean(text: str) -> bool:
    """Convert `True` or `False` after a flag, as TensorFlow 1's flags took them, for argparse."""
    if text.lower() in ("true", "t", "1", "yes"):
        return True
    if text.lower() in ("false", "f", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"True or False, not {text!r}")


def whole(low: int, bits: int = 31) -> Callable[[str], int]:
    """Return an argparse type: an integer of `low` or more, but under 2^`bits`."""

    def integer(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"must be {low} or more, not {value}")
        if value >= 2**bits:
            raise argparse.ArgumentTypeError(f"{value} is not under 2^{bits}")
        return value

    return integer


def finite(text: str) -> float:
    """Convert text to a number, neither NaN nor infinite, for argparse."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, not {value}")
    return value


def nonempty(text: str) -> str:
    """Take a path or a name for argparse; an empty one would mean the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


@contextmanager
def silence() -> Iterator[None]:
    """Drop the notes that C++ libraries write to standard error.

    No setting of TensorFlow turns off all that it writes when it starts.
    """
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
    """Return the command that is running, as one would type it."""
    join = subprocess.list2cmdline if os.name == "nt" else shlex.join
    return join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])


def computes_bf16(device: str) -> bool:
    """Tell whether the device, "CPU" or "GPU", has fast bf16 arithmetic."""
    if device == "GPU":
        if os.environ["KERAS_BACKEND"] == "torch":
            import torch

            return torch.cuda.get_device_capability() >= (8, 0)
        import tensorflow as tf

        gpu = tf.config.list_physical_devices("GPU")[0]
        details = tf.config.experimental.get_device_details(gpu)
        return details.get("compute_capability", (0, 0)) >= (8, 0)
    cpu = Path("/proc/cpuinfo")  # systems other than Linux have no such file: taken for a no
    return cpu.exists() and any(word in cpu.read_bytes() for word in (b"avx512_bf16", b"amx_bf16"))


# ---- images in ---------------------------------------------------------------------------------


def list_images(folder: Path, generated: bool = False) -> list[Path]:
    """Return the images in `folder` and one level of folders below it, sorted by path.

    Folders called `gen_*` hold generated images (gen_0000) and are left out unless `generated`: a
    GAN must not train on its own output.
    """
    below = [d for d in folder.iterdir() if d.is_dir() and not is_hidden(d.name)]
    folders = [folder, *(d for d in below if generated or not d.name.startswith("gen_"))]
    files = (file for each in folders for file in each.iterdir())
    return sorted(file for file in files if is_image(file) and not file.is_dir())


def find_images(folder: Path, flag: str, generated: bool = False) -> list[Path]:
    """Return the images as `list_images`; raises UserError, naming `flag`, if there are none."""
    if not folder.is_dir():
        raise UserError(f"{flag}: there is no folder {folder}")
    images = list_images(folder, generated)
    if not images:
        raise UserError(f"{flag}: no image in {folder} or one level below it")
    return images


def matching(images: list[Path], pattern: str) -> list[Path]:
    """Return the images whose file name matches `pattern`, in upper or lower case."""
    return [path for path in images if fnmatch.fnmatch(path.name.lower(), pattern.lower())]


def read_resized(
    path: Path, height: int, width: int, crop: tuple[int, int] | None = None
) -> Image.Image:
    """Read an image file and scale it to an RGB image of `width` x `height`.

    `crop` = (height, width) cuts out that much of the middle first (at most the whole image).
    Scaling is bicubic with antialiasing; brightness and contrast stay as they are.
    """
    image = read_image(path)
    if crop:
        tall, wide = min(crop[0], image.height), min(crop[1], image.width)
        left, top = (image.width - wide) // 2, (image.height - tall) // 2
        image = image.crop((left, top, left + wide, top + tall))
    return image.resize((width, height), Image.Resampling.BICUBIC)


def in_threads(work: Callable, items: Sequence, label: str) -> None:
    """Call `work(item)` for each item in a few threads, with a progress bar.

    The first error ends it. Threads help, because Pillow decodes, scales and encodes outside
    Python's lock.
    """
    pool = ThreadPoolExecutor(THREADS)
    try:
        done = pool.map(work, items)
        for _ in tqdm(done, total=len(items), desc=label, unit="image", disable=None):
            pass
    finally:
        pool.shutdown(cancel_futures=True)  # an error or Ctrl-C doesn't wait for the rest


def load_images(
    paths: list[Path], height: int, width: int, crop: tuple[int, int] | None = None
) -> np.ndarray:
    """Decode and scale all images: uint8 `[N, height, width, 3]`.

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


def reserve(file: IO, size: int) -> None:
    """Reserve `size` bytes on disk.

    On a full disk this is an error. Without it, writing to the mapped memory would kill the
    process.
    """
    try:
        if hasattr(os, "posix_fallocate"):  # not on macOS and Windows
            os.posix_fallocate(file.fileno(), 0, size)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"{tempfile.gettempdir()}: no room for {size:,} bytes of decoded images ({error}); set "
            "TMPDIR to another folder, or take smaller or fewer images"
        ) from error


def to_signed(images):
    """Map floats 0..255 to -1..1, in the same way for all images (no contrast stretching)."""
    return images / 127.5 - 1


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Map floats -1..1 to uint8 0..255, the inverse of `to_signed`."""
    return np.clip(np.rint((images + 1) * 127.5), 0, 255).astype(np.uint8)


# ---- images out --------------------------------------------------------------------------------


def grid(images: np.ndarray, columns: int, gap: int = 2) -> np.ndarray:
    """Arrange uint8 `[N, H, W, 3]` row by row in one picture, with white gaps of `gap` pixels."""
    n, height, width, _ = images.shape
    rows = -(-n // columns)
    picture = np.full(
        (rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8
    )
    for i, image in enumerate(images):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        picture[top : top + height, left : left + width] = image
    return picture


def write_image(path: Path, image: Image.Image, file_format: str, **options) -> None:
    """Write a Pillow image.

    Pillow itself writes to memory only: on a full disk it may cut off a file without an error.
    """
    content = io.BytesIO()
    image.save(content, file_format, **options)
    path.write_bytes(content.getvalue())


def save_png(path: Path, image: np.ndarray) -> None:
    """Write a uint8 `[H, W, 3]` image, whole or not at all; makes the folder if it is missing."""
    with replacing(path) as temporary:
        write_image(temporary, Image.fromarray(image), "PNG")


def save_gif(path: Path, frames: list[np.ndarray], milliseconds: int = 120) -> None:
    """Write an endless GIF that plays the uint8 `[H, W, 3]` frames forth and back.

    Like `save_png` it writes the file whole or not at all, and makes the folder.
    """
    first, *rest = [Image.fromarray(frame) for frame in [*frames, *frames[-2:0:-1]]]
    options = {"save_all": True, "append_images": rest, "duration": milliseconds, "loop": 0}
    with replacing(path) as temporary:
        write_image(temporary, first, "GIF", **options)
