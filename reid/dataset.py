"""What is on disk: file names to identity and camera, the folders of a split, single images.

A prepared dataset is the `pytorch` folder of prepare.py: `<split>/<id>/<image>`. For training,
changeIndex.py adds `train_new`, `train_all_new` and `val_new`, whose folders are class numbers.

Imports no torch, so that prepare.py and changeIndex.py start at once.
"""

import hashlib
import os
import random
import re
import warnings
from pathlib import Path
from typing import NamedTuple

from PIL import ExifTags, Image, UnidentifiedImageError

from reid.errors import UserError
from reid.files import sha256

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp"}
# Formats of Pillow's that hold no picture, or need another program to make one.
NO_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
BOMB_FILTER = ("error", None, Image.DecompressionBombWarning, None, 0)
# What makes an image upright, by its EXIF orientation.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# How Matroska and WebM, MPEG (program and elementary stream), Flash, Windows Media, Ogg begin.
VIDEO_STARTS = (b"\x1aE\xdf\xa3", b"\0\0\1\xba", b"\0\0\1\xb3", b"FLV\1", b"0&\xb2u", b"OggS")
STILL_BRANDS = {b"heic", b"heix", b"mif1", b"msf1", b"avif", b"avis", b"crx "}
VIDEO_SUFFIXES = set(".mp4 .m4v .mov .avi .mkv .webm .mpg .mpeg .wmv .flv .ts .mts .3gp".split())
GENERATED_FOLDER = "gen_0000"
GENERATED_LABEL = -1  # a marker: a generated image has no identity, and no loss may read this one

# Market-1501 0002_c1s1_000451_03.jpg, DukeMTMC-reID 0001_c2_f0046182.jpg, CUHK03-NP 0001_c1_1.png,
# VeRi 0001_c001_00016450_0.jpg, whose identities are also written v0001
CAMERA_AFTER_C = re.compile(r"v?(?P<id>-?\d+)_c(?P<camera>\d+)")
# MSMT17 0000_000_01_0303morning_0015_0.jpg: id, number of the image, camera
CAMERA_THIRD = re.compile(r"(?P<id>-?\d+)_\d+_(?P<camera>\d+)_")


class Sample(NamedTuple):
    """A training image: where it is, its class, and whether a GAN made it (1) or not (0)."""

    path: Path
    label: int
    generated: int = 0


class TestImage(NamedTuple):
    """A query or gallery image: where it is, who is on it, which camera took it."""

    path: Path
    identity: int
    camera: int

    __test__ = False  # no pytest class, for all its name


def parse_name(path):
    """Identity and camera in an image's name; `-1` is a junk box, `0` a distractor.

        parse_name("query/0002_c1s1_000451_03.jpg")  # (2, 1)

    Knows the patterns of Market-1501, DukeMTMC-reID, CUHK03-NP, MSMT17 and VeRi; `/` and `\\` both
    separate paths. Raises UserError for other names.
    """
    name = re.split(r"[/\\]", str(path))[-1]
    match = CAMERA_AFTER_C.match(name) or CAMERA_THIRD.match(name)
    if not match:
        raise UserError(
            f"{path}: no identity and camera in this name; "
            "expected one like 0002_c1s1_000451_03.jpg (id 2, camera 1)"
        )
    return int(match["id"]), int(match["camera"])


def list_images(folder):
    """The images directly in `folder`, sorted by name. Raises UserError where there are none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    images = sorted(p for p in folder.iterdir() if is_image(p))
    if not images:
        raise UserError(f"{folder}: no images in it (jpg, jpeg, png, bmp)")
    return images


def is_image(path):
    """Whether `path` is called an image, and is not one of the hidden files some systems add."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def identity_folders(split):
    """The folders `<id>` of a split, sorted by identity, then by name; generated images left out.

    Raises UserError where the split is missing, empty, or has a folder not named after an id.
    """
    split = Path(split)
    if not split.is_dir():
        raise UserError(f"{split}: no such folder; make it with {maker(split)}")
    folders = [f for f in split.iterdir() if f.is_dir() and f.name != GENERATED_FOLDER]
    folders = [f for f in folders if not f.name.startswith(".")]
    for folder in folders:
        if not re.fullmatch(r"-?\d+", folder.name):
            raise UserError(f"{folder}: not named after an identity; take it out of {split}")
    if not folders:
        raise UserError(f"{split}: empty; make it again with {maker(split)}")
    return sorted(folders, key=lambda f: (int(f.name), f.name))


def maker(split):
    """The script that makes a split."""
    return "changeIndex.py" if split.name.endswith("_new") else "prepare.py"


def labelled_images(split):
    """Samples of `train_new`, `train_all_new` or `val_new`: the folder's name is the class."""
    return [
        Sample(path, int(folder.name))
        for folder in identity_folders(split)
        for path in list_images(folder)
    ]


def test_images(split):
    """TestImages of `query`, `gallery` or `multi-query`, read from the files' names."""
    return [
        TestImage(path, *parse_name(path))
        for folder in identity_folders(split)
        for path in list_images(folder)
    ]


test_images.__test__ = False


def training_splits(data_dir, train_all):
    """Real images to train on and to validate on: two lists of Samples, the second maybe empty.

    By default the first image of each identity is held out (`val_new`); with `train_all` none is.
    """
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise UserError(f"{data_dir}: no such folder; name the prepared dataset with --data_dir")
    if train_all:
        return labelled_images(data_dir / "train_all_new"), []
    return labelled_images(data_dir / "train_new"), labelled_images(data_dir / "val_new")


def count_classes(samples):
    """Number of classes K. Raises UserError where the labels are not 0..K-1, naming the gap."""
    labels = {sample.label for sample in samples}
    for label in range(max(labels) + 1):
        if label not in labels:
            folder = samples[0].path.parent.parent
            raise UserError(f"{folder}: class {label} is missing; run changeIndex.py again")
    return len(labels)


def generated_images(gen_dir, number=None, seed=0):
    """Samples of `number` generated images in `gen_dir`, chosen by the seed (None: all of them)."""
    if number == 0:
        return []
    images = list_images(gen_dir)
    if number is not None and number > len(images):
        raise UserError(
            f"--num_generated {number}: only {len(images)} images in {gen_dir}; generate more"
        )
    if number is not None:
        images = sorted(random.Random(seed).sample(images, number))
    return [Sample(path, GENERATED_LABEL, generated=1) for path in images]


def fingerprint(samples):
    """What a run was trained on: number of images and a hash of their names, sizes and labels."""
    try:
        lines = sorted(f"{s.label} {s.path.name} {s.path.stat().st_size}" for s in samples)
    except OSError as error:  # a broken link
        raise UserError(f"{error.filename}: can't be read ({error.strerror}); replace it") from None
    return {
        "images": len(samples),
        "sha256": hashlib.sha256("\n".join(lines).encode()).hexdigest(),
    }


def manifest(samples):
    """Fingerprint of the manifest.json beside the generated images; None where there is none."""
    folder = next((sample.path.parent for sample in samples if sample.generated), None)
    path = folder and folder / "manifest.json"
    if not path or not path.exists():
        return None
    return {"path": str(path), "sha256": sha256(path)}


def readable_suffixes():
    """The suffixes, in lower case, of all formats that Pillow decodes by itself."""
    Image.init()
    formats = {*Image.OPEN, "MPO"} - NO_PICTURES  # Pillow opens MPO as JPEG
    return {suffix for suffix, name in Image.registered_extensions().items() if name in formats}


def read_image(path):
    """A decoded RGB image, turned upright where its EXIF data say how.

    Of pictures of more than 8 bits the whole range is kept, transparency is left out, of several
    frames the first is taken. Raises UserError naming a file that is damaged, no image, or of more
    pixels than Pillow's limit (then without decoding it).
    """
    refuse_bombs()
    try:
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

    For the whole process, and for good: warning filters are no thread's own, and
    `warnings.catch_warnings` in one thread may undo what another has set.
    """
    if BOMB_FILTER not in warnings.filters:
        warnings.simplefilter("error", Image.DecompressionBombWarning)


def to_rgb(image):
    """A Pillow image of any mode as RGB."""
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        image.load()
        return to_8_bits(image).convert("RGB")
    if "transparency" in image.info and image.mode == "P":
        return image.convert("RGBA").convert("RGB")  # Pillow would advise so, on standard error
    return image.convert("RGB")


def to_8_bits(image):
    """A grey image of more than 8 bits as one of 8, by the range that its values are in.

    That is 0 to 65535 for integers; 0 to 1, 255 or 65535, the first that holds all, for floats.
    Other values are stretched to all of 0 to 255. Raises ValueError where they aren't finite.
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
    """The EXIF orientation of a loaded image, 1 to 8; 1 also where it can't be read."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged data about an image are no damaged image
        return 1


def why_unreadable(path, error):
    """What to say of a file at whose reading Pillow raised `error`."""
    if os.path.isdir(path):
        return "is a folder; name an image"
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
    """Whether a file that isn't an image begins like a video, or is called one."""
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
