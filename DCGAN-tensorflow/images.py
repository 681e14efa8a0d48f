"""Read an image file as an upright RGB image, or say in one line why it can't be read.

A copy of the root's reid/images.py, so that either program works without the other;
a test compares the two.
"""

import os
import stat
import warnings
from functools import cache
from pathlib import Path

from PIL import ExifTags, Image, UnidentifiedImageError

from errors import UserError  # isort: skip

# Formats that Pillow opens but that hold no picture, or need another program to draw it.
NO_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
BOMB_FILTER = ("error", None, Image.DecompressionBombWarning, None, 0)
# The operation that makes an image upright, by its EXIF orientation.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# The first bytes of Matroska and WebM, MPEG (program and elementary stream), Flash, Windows Media,
# and Ogg.
VIDEO_STARTS = (b"\x1aE\xdf\xa3", b"\0\0\1\xba", b"\0\0\1\xb3", b"FLV\1", b"0&\xb2u", b"OggS")
STILL_BRANDS = {b"heic", b"heix", b"mif1", b"msf1", b"avif", b"avis", b"crx "}
VIDEO_SUFFIXES = set(".mp4 .m4v .mov .avi .mkv .webm .mpg .mpeg .wmv .flv .ts .mts .3gp".split())


def is_image(path: str | Path) -> bool:
    """Tell whether a file's name is that of an image, and not hidden."""
    return Path(path).suffix.lower() in readable_suffixes() and not is_hidden(Path(path).name)


def is_hidden(name: str) -> bool:
    """Tell whether a file or folder is hidden, or the one that macOS adds to ZIP files."""
    return name.startswith(".") or name == "__MACOSX"


@cache
def readable_suffixes() -> set[str]:
    """Return the suffixes, in lower case, of all formats that Pillow decodes by itself."""
    Image.init()
    formats = {*Image.OPEN, "MPO"} - NO_PICTURES  # Pillow opens MPO as JPEG
    return {suffix for suffix, name in Image.registered_extensions().items() if name in formats}


def read_image(path: str | Path) -> Image.Image:
    """Return the decoded RGB image of a file, turned upright by its EXIF orientation.

    More than 8 bits are scaled to 8, transparency is dropped, and the first of several frames is
    taken. Raises UserError where the file is missing, damaged or no image, or has more pixels than
    Pillow's limit (then without decoding it).
    """
    refuse_bombs()
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # reading a pipe would wait for ever
            raise ValueError
        with Image.open(path) as image:
            if image.format in NO_PICTURES:
                raise ValueError(f"{image.format} files are not read")
            picture = to_rgb(image)
            turn = TURNS.get(orientation(image))
        return picture if turn is None else picture.transpose(turn)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise UserError(f"{path}: {why_unreadable(path, error)}") from error


def refuse_bombs():
    """Make Pillow's warning of too many pixels an error.

    This holds for the whole process from then on: threads share their warning filters, and
    `warnings.catch_warnings` in one thread may undo what another has set.
    """
    if BOMB_FILTER not in warnings.filters:
        warnings.simplefilter("error", Image.DecompressionBombWarning)


def to_rgb(image):
    """Convert a Pillow image of any mode to RGB."""
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        image.load()
        return to_8_bits(image).convert("RGB")
    if "transparency" in image.info and image.mode == "P":
        return image.convert("RGBA").convert("RGB")  # else Pillow warns, and advises this
    return image.convert("RGB")


def to_8_bits(image):
    """Scale a grey image of more than 8 bits to 8 bits, from the range that holds its values.

    The range is 0 to 65535 for integers, and the first of 0 to 1, 255 or 65535 that holds them all
    for floats. Values in none of these are stretched: the highest becomes 255, and 0 or the lowest
    below it becomes 0. Raises ValueError where they aren't finite.
    """
    tops = (1, 255, 65535) if image.mode == "F" else (65535,)
    image = image.convert("F")
    low, high = image.getextrema()
    if not -float("inf") < low <= high < float("inf"):
        raise ValueError("its values are not finite")
    low = min(low, 0)
    scale = 255 / next((top - low for top in tops if low == 0 and high <= top), (high - low) or 1)
    return image.point(lambda value: value * scale + (0.5 - low * scale)).convert("L")


def orientation(image):
    """Return the EXIF orientation of a loaded image, 1 to 8; 1 also where it can't be read."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # the image itself may be whole though its EXIF data are damaged
        return 1


def why_unreadable(path, error):
    """Return why a file can't be read, and what to do: `error` was raised while reading it."""
    if os.path.isdir(path):
        return "is a folder; name an image"
    if os.path.exists(path) and not os.path.isfile(path):
        return "can't be read as an image (it is no regular file); take it out"
    if is_video(path):
        return "can't be read as an image (it is a video); extract frames from it, as ffmpeg does"
    if isinstance(error, Image.DecompressionBombWarning | Image.DecompressionBombError):
        limit = f"{Image.MAX_IMAGE_PIXELS:,} pixels"
        return f"can't be read as an image (it has more than {limit}); make it smaller"
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    if isinstance(error, OSError) and error.strerror:
        reason = error.strerror
    if isinstance(error, UnidentifiedImageError):
        reason = "of no format that Pillow knows" if os.path.getsize(path) else "the file is empty"
    return f"can't be read as an image ({reason}); replace it"


def is_video(path):
    """Tell whether a file that is no image has the first bytes or the suffix of a video."""
    try:
        with open(path, "rb") as file:
            start = file.read(377)
    except OSError:
        return False
    if start[4:8] == b"ftyp":  # MP4, MOV, 3GP; but also HEIC, AVIF and a camera's CR3
        return start[8:12] not in STILL_BRANDS
    return (
        start.startswith(VIDEO_STARTS)
        or start[4:8] in (b"moov", b"mdat", b"wide")  # old QuickTime
        or (start[:4] == b"RIFF" and start[8:12] == b"AVI ")
        or (start[:1] == start[188:189] == start[376:377] == b"G")  # an MPEG transport stream
        or Path(path).suffix.lower() in VIDEO_SUFFIXES
    )
