"""Images in and out for the DCGAN scripts, grids, GIFs, and one way to report an error.

Imports no TensorFlow, so that `resizeImage.py`, `--help` and argument errors are quick.
Images are numpy arrays `[N, H, W, 3]`, uint8 (0..255) outside the networks and float32 in
[-1, 1] inside them.
"""

import argparse
import fnmatch
import os
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import numpy as np
from PIL import Image
from tqdm import tqdm

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp"}
MEMORY_LIMIT = 2 * 1024**3  # bytes of decoded images; more go to a file on disk
MANIFEST = "manifest.json"  # beside single images: where they come from
THREADS = min(8, os.cpu_count() or 1)


# ---- arguments and errors ----------------------------------------------------------------------


def fail(message: object) -> NoReturn:
    """Print `error: <message>` as one line on stderr and exit with code 2."""
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(2)


class BadImage(Exception):
    """A file that can't be decoded; the message names it."""


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, whose errors are one line like all others."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        fail(f"{message} (see --help)")


def boolean(text: str) -> bool:
    """`--flag True` and `--flag False`, as TensorFlow 1's flags took them."""
    if text.lower() in ("true", "t", "1", "yes"):
        return True
    if text.lower() in ("false", "f", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"True or False, not {text!r}")


def at_least(low: int):
    """An argparse type: an integer of `low` or more."""

    def integer(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"must be {low} or more, not {value}")
        return value

    return integer


@contextmanager
def postponed_interrupts() -> Iterator[list]:
    """Ctrl-C and a cluster's SIGTERM only fill the list: the loop inside ends between two steps."""
    caught = []
    signals = signal.SIGINT, signal.SIGTERM
    before = [signal.signal(s, lambda number, frame: caught.append(number)) for s in signals]
    try:
        yield caught
    finally:
        for s, handler in zip(signals, before, strict=True):
            signal.signal(s, handler)


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
    return cpu.exists() and any(word in cpu.read_text() for word in ("avx512_bf16", "amx_bf16"))


# ---- images in ---------------------------------------------------------------------------------


def find_images(folder: Path, pattern: str = "*", flag: str = "--dataset") -> list[Path]:
    """Sorted images in `folder` and one level of folders below it.

    `pattern` is matched against file names, whatever their case. Folders called `gen_*` hold
    generated images (gen_0000) and are passed over: a GAN must not train on its own output.
    `flag` is the flag that the error message names.
    """
    if not folder.is_dir():
        fail(f"{flag}: there is no folder {folder}")
    below = [d for d in folder.iterdir() if d.is_dir() and not d.name.startswith(("gen_", "."))]
    files = (file for place in [folder, *below] for file in place.iterdir())
    images = [file for file in files if file.suffix.lower() in SUFFIXES]
    if not images:
        fail(f"{flag}: no jpg, jpeg, png or bmp image in {folder} or one level below it")
    matching = [file for file in images if fnmatch.fnmatch(file.name.lower(), pattern.lower())]
    if not matching:
        fail(
            f"--input_fname_pattern: none of the {len(images)} images in {folder} has a name "
            f"like {pattern!r}"
        )
    return sorted(matching)


def read_image(path: Path, height: int, width: int, crop: tuple[int, int] | None = None):
    """One RGB Pillow image of `width` x `height`, from any readable file.

    `crop` = (height, width) takes that much of the middle first (at most the whole image).
    Bicubic with antialiasing; brightness and contrast stay what they are. A file that cannot
    be decoded to its end raises BadImage.
    """
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except Exception as problem:  # what Pillow raises on damaged files depends on the format
        raise BadImage(f"cannot read the image {path}: {problem}; replace or delete it") from None
    if crop:
        tall, wide = min(crop[0], image.height), min(crop[1], image.width)
        left, top = (image.width - wide) // 2, (image.height - tall) // 2
        image = image.crop((left, top, left + wide, top + tall))
    return image.resize((width, height), Image.Resampling.BICUBIC)


def in_threads(work, items, label: str) -> None:
    """`work(item)` for every item in a few threads, with a progress bar; the first error ends it.

    Pillow decodes, scales and encodes outside Python's lock, so threads do help.
    """
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            done = pool.map(work, items)
            for _ in tqdm(done, total=len(items), desc=label, unit="image", disable=None):
                pass
    except BadImage as problem:  # here, not in the threads: each bad image would print its line
        fail(problem)


def load_images(paths: list[Path], height: int, width: int, crop=None) -> np.ndarray:
    """Decode every image once: uint8 `[N, height, width, 3]`.

    Up to MEMORY_LIMIT bytes stay in memory; a larger set goes to an unnamed temporary file
    (in $TMPDIR), which the system pages in and out and deletes when the process ends.
    """
    shape = (len(paths), height, width, 3)
    if np.prod(shape, dtype=np.int64) <= MEMORY_LIMIT:
        images = np.empty(shape, np.uint8)
    else:
        images = np.memmap(tempfile.TemporaryFile(), np.uint8, "w+", shape=shape)  # noqa: SIM115

    def read(i: int) -> None:
        images[i] = read_image(paths[i], height, width, crop)

    in_threads(read, range(len(paths)), "reading")
    return images


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


def write_whole(path: Path, write) -> None:
    """`write(temporary path)`, then give it its name: nobody ever sees half a file."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save_png(path: Path, image: np.ndarray) -> None:
    """Write one uint8 `[H, W, 3]` image, whole or not at all."""
    write_whole(path, lambda temporary: Image.fromarray(image).save(temporary, "PNG"))


def save_gif(path: Path, frames: list[np.ndarray], milliseconds: int = 120) -> None:
    """Write an endless GIF that plays the uint8 `[H, W, 3]` frames forth and back."""
    first, *rest = [Image.fromarray(frame) for frame in [*frames, *frames[-2:0:-1]]]
    options = {"save_all": True, "append_images": rest, "duration": milliseconds, "loop": 0}
    write_whole(path, lambda temporary: first.save(temporary, "GIF", **options))


def check_writable(folder: Path, flag: str, new: bool = False) -> None:
    """End with one line if `folder` cannot be written (or, if `new`, holds anything already).

    Asked before the work starts; makes nothing.
    """
    if new and folder.is_dir() and any(folder.iterdir()):
        fail(f"{flag}: {folder} already holds files; delete them or name another folder")
    place = folder.absolute()
    while not place.exists() and not place.is_symlink():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        fail(f"{flag}: cannot write to {folder}; name a folder that can be written")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary sibling to fill; it takes the place of the empty or missing `folder` at the end.

    If anything goes wrong (Ctrl-C too) it is deleted: either all the files are there or none.
    """
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    temporary.mkdir()
    try:
        yield temporary
        if folder.is_dir():
            folder.rmdir()  # refuses if it holds files by now
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
