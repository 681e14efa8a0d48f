"""What is on disk: file names to identity and camera, the folders of a split, single images.

A prepared dataset is the `pytorch` folder of prepare.py: `<split>/<id>/<image>`. For training,
changeIndex.py adds `train_new`, `train_all_new` and `val_new`, whose folders are class numbers.

Imports no torch, so that prepare.py and changeIndex.py start at once.
"""

import hashlib
import random
import re
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from reid.errors import UserError
from reid.files import sha256

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp"}
GENERATED_FOLDER = "gen_0000"
GENERATED_LABEL = -1  # a marker: a generated image has no identity, and no loss may read this one

# Market-1501 0002_c1s1_000451_03.jpg, DukeMTMC-reID 0001_c2_f0046182.jpg, CUHK03-NP 0001_c1_1.png
CAMERA_AFTER_C = re.compile(r"(?P<id>-?\d+)_c(?P<camera>\d+)")
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

    Knows the patterns of Market-1501, DukeMTMC-reID, CUHK03-NP and MSMT17; `/` and `\\` both
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


def read_image(path):
    """A decoded RGB image. Raises UserError naming a file that is damaged or no image."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise UserError(f"{path}: can't be read as an image ({error}); replace it") from error
