"""What is on disk: file names to identity and camera, the folders of a split, their images.

A prepared dataset is the `pytorch` folder of prepare.py: `<split>/<id>/<image>`. For training,
changeIndex.py adds `train_new`, `train_all_new` and `val_new`, whose folders are class numbers.

Imports no torch, so that prepare.py and changeIndex.py start at once.
"""

import hashlib
import os
import random
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from reid.errors import UserError
from reid.files import sha256
from reid.images import is_hidden, is_image
from reid.images import read_image as read_image  # other programs have it from here

GENERATED_FOLDER = "gen_0000"
GENERATED_LABEL = -1  # a marker: a generated image has no identity, and no loss may read this one

# Market-1501 0002_c1s1_000451_03.jpg, DukeMTMC-reID 0001_c2_f0046182.jpg, CUHK03-NP 0001_c1_1.png,
# VeRi 0001_c001_00016450_0.jpg, whose identities are also written v0001
CAMERA_AFTER_C = re.compile(r"v?(?P<id>-?\d+)_c(?P<camera>\d+)")
# MSMT17 0000_000_01_0303morning_0015_0.jpg: id, number of the image, camera, date, time of day
CAMERA_THIRD = re.compile(r"(?P<id>-?\d+)_\d+_(?P<camera>\d+)_\d{4}(morning|noon|afternoon)_")
LARGEST_LABEL = 2**53  # identities and cameras above it are not exact in MATLAB's numbers
IDENTITIES_FILE = "identities.json"  # of one's own photos, prepared: names and numbers
NO_IMAGE = "is no image, by its name"
FEW_CAMERAS = 8  # that many are credible in a dataset of any size


class Sample(NamedTuple):
    """A training image: where it is, its class, and whether a GAN made it (1) or not (0)."""

    path: Path
    label: int
    generated: int = 0


class EvalImage(NamedTuple):
    """A query or gallery image: where it is, who is on it, which camera took it."""

    path: Path
    identity: int
    camera: int


def parse_name(path, patterns=(CAMERA_AFTER_C, CAMERA_THIRD)):
    """Identity and camera in an image's name; `-1` is a junk box, `0` a distractor.

        parse_name("query/0002_c1s1_000451_03.jpg")  # (2, 1)

    Knows the patterns of Market-1501, DukeMTMC-reID, CUHK03-NP, MSMT17 and VeRi, of which no name
    fits two; `/` and `\\` both separate paths. Raises UserError for other names.
    """
    name = re.split(r"[/\\]", str(path))[-1]
    match = next(filter(None, (pattern.match(name) for pattern in patterns)), None)
    if not match:
        raise UserError(
            f"{path}: no identity and camera in this name; expected one like "
            f"{EXAMPLES[patterns[0]]}; for other names see prepare.py --dataset folder"
        )
    identity, camera = int(match["id"]), int(match["camera"])
    if max(abs(identity), camera) > LARGEST_LABEL:
        raise UserError(f"{path}: identity or camera above 2^53 in this name; rename it")
    return identity, camera


EXAMPLES = {
    CAMERA_AFTER_C: "0002_c1s1_000451_03.jpg (id 2, camera 1)",
    CAMERA_THIRD: "0000_000_01_0303morning_0015_0.jpg (id 0, camera 1)",
}


def list_images(folder):
    """The images directly in `folder`, sorted by name. Raises UserError where there are none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    images = sorted(p for p in folder.iterdir() if is_image(p))
    if not images:
        raise UserError(f"{folder}: no images in it, of any format that Pillow reads")
    return images


def walk_images(root, left_out, skip=None):
    """Yield the path of each image under a folder, as text; adds what is passed over to `left_out`.

    That is files that are no images, broken links, and folders that are links or can't be listed;
    hidden ones don't count. skip: tells of a folder's path whether to pass it over without a word.
    """

    def unlisted(error):
        left_out.append(f"{error.filename}: can't be listed ({error.strerror})")

    for folder, folders, files in os.walk(root, onerror=unlisted):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        if skip:
            folders[:] = [name for name in folders if not skip(os.path.join(folder, name))]
        for name in folders:
            if os.path.islink(os.path.join(folder, name)):
                left_out.append(f"{os.path.join(folder, name)}: is a linked folder")
        for name in sorted(files):
            path = os.path.join(folder, name)
            if is_hidden(name):
                continue
            if not is_image(name):
                left_out.append(f"{path}: {NO_IMAGE}")
            elif not os.path.exists(path):
                left_out.append(f"{path}: is a broken link")
            elif not os.path.isfile(path):  # reading a pipe would wait for ever
                left_out.append(f"{path}: is no regular file")
            else:
                yield path


def is_prepared(folder):
    """Whether a folder is what prepare.py made, of training images or of one's own photos."""
    return any(os.path.exists(os.path.join(folder, n)) for n in ("train_all", IDENTITIES_FILE))


def identity_folders(split):
    """The folders `<id>` of a split, sorted by identity, then by name; generated images left out.

    Raises UserError where the split is missing, empty, or has a folder not named after an id, or
    two that are named after one.
    """
    split = Path(split)
    if not split.is_dir():
        raise UserError(f"{split}: no such folder; make it with {maker(split)}")
    folders = [f for f in split.iterdir() if f.is_dir() and f.name != GENERATED_FOLDER]
    folders = [f for f in folders if not is_hidden(f.name)]
    for folder in folders:
        if not re.fullmatch(r"-?[0-9]+", folder.name) or len(folder.name) > len(str(LARGEST_LABEL)):
            raise UserError(f"{folder}: not named after an identity; take it out of {split}")
    if not folders:
        raise UserError(f"{split}: empty; make it again with {maker(split)}")
    check_spelling(split, [folder.name for folder in folders])
    return sorted(folders, key=lambda f: (int(f.name), f.name))


def check_spelling(where, names):
    """Raise UserError where two names are the same number, such as 7 and 0007."""
    spelled = {}
    for name in names:
        if spelled.setdefault(int(name), name) != name:
            raise UserError(
                f"{where}: identities {spelled[int(name)]} and {name} are one number; if they are "
                "one person, name them alike, else give one another number"
            )


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


def eval_images(split):
    """EvalImages of `query`, `gallery` or `multi-query`, read from the files' names."""
    return [
        EvalImage(path, *parse_name(path))
        for folder in identity_folders(split)
        for path in list_images(folder)
    ]


def check_cameras(where, images):
    """Raise UserError where there are so many cameras that these must be something else.

    images: EvalImages. Numbers of frames, taken for cameras, would switch the junk rule off.
    """
    cameras = {image.camera for image in images}
    if len(cameras) > max(FEW_CAMERAS, len(images) / 2):
        some = "; ".join(
            f"{image.path.name}: id {image.identity}, camera {image.camera}" for image in images[:2]
        )
        raise UserError(
            f"{where}: {len(cameras)} cameras in {len(images)} images; what was read as the camera "
            f"must be something else ({some}); rename the files, or see prepare.py --camera_regex"
        )


def check_copies(queries, gallery):
    """Raise UserError where a gallery image is a copy of a query that the junk rule would keep.

    queries, gallery: EvalImages. Finding itself says nothing about a network.
    """
    twins = copies([image.path for image in queries], [image.path for image in gallery])
    for number, other in twins:
        query, image = queries[number], gallery[other]
        if image.identity != -1 and query[1:] != image[1:]:
            raise UserError(
                f"{query.path} (id {query.identity}, camera {query.camera}) and {image.path} (id "
                f"{image.identity}, camera {image.camera}) are the same picture; delete one"
            )


def copies(paths, others):
    """Pairs of numbers of files that have the same content, (of `paths`, of `others`)."""
    sizes = {path.stat().st_size for path in paths} & {path.stat().st_size for path in others}
    found = defaultdict(list)
    for number, path in enumerate(paths):
        if path.stat().st_size in sizes:
            found[sha256(path)].append(number)
    for other, path in enumerate(others):
        if path.stat().st_size in sizes:
            for number in found.get(sha256(path), ()):
                yield number, other


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
    if min(labels) < 0:
        folder = next(sample.path.parent for sample in samples if sample.label < 0)
        raise UserError(f"{folder}: {min(labels)} is no class; delete it, run changeIndex.py again")
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
        "sha256": hashlib.sha256(os.fsencode("\n".join(lines))).hexdigest(),
    }


def classes_hash(samples):
    """A hash of which class is which identity, by the names of the real images."""
    pairs = {(s.label, s.path.name.split("_")[0]) for s in samples if not s.generated}
    return hashlib.sha256(os.fsencode(str(sorted(pairs)))).hexdigest()


def manifest(samples):
    """Fingerprint of the manifest.json beside the generated images; None where there is none."""
    folder = next((sample.path.parent for sample in samples if sample.generated), None)
    path = folder and folder / "manifest.json"
    if not path or not path.exists():
        return None
    return {"path": str(path), "sha256": sha256(path)}
