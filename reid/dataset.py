"""Prepared datasets on disk: the splits' folders, their images, identity and camera in a file name.

A prepared dataset is the `pytorch` folder of prepare.py: `<split>/<id>/<image>`. For training,
changeIndex.py adds `train_new`, `train_all_new` and `val_new`, with folders named after classes.

Imports no torch, so that prepare.py and changeIndex.py start at once.
"""

import hashlib
import os
import random
import re
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from reid.errors import UserError
from reid.files import sha256
from reid.images import is_hidden, is_image

GENERATED_FOLDER = "gen_0000"
# The label of generated images, which have no identity. In batches they are numbered -1, -2, ...;
# no loss may take such a number for a class.
GENERATED_LABEL = -1

# Market-1501 0002_c1s1_000451_03.jpg, DukeMTMC-reID 0001_c2_f0046182.jpg, CUHK03-NP 0001_c1_1.png,
# VeRi 0001_c001_00016450_0.jpg, whose identities are also written v0001
CAMERA_AFTER_C = re.compile(r"v?(?P<id>-?\d+)_c(?P<camera>\d+)", re.ASCII)
# MSMT17 0000_000_01_0303morning_0015_0.jpg: id, number of the image, camera, date, time of day
CAMERA_THIRD = re.compile(
    r"(?P<id>-?\d+)_\d+_(?P<camera>\d+)_\d{4}(morning|noon|afternoon)_", re.ASCII
)
EXAMPLES = {
    CAMERA_AFTER_C: "0002_c1s1_000451_03.jpg (id 2, camera 1)",
    CAMERA_THIRD: "0000_000_01_0303morning_0015_0.jpg (id 0, camera 1)",
}
LARGEST_LABEL = 2**53  # MATLAB's numbers can't tell larger identities and cameras apart
STAND_IN = "synthetic_market.json"  # written last into a rendered set, whose size is any
IDENTITIES_FILE = "identities.json"  # the names and numbers of people in prepared own photos
NO_IMAGE, BROKEN_LINK = "is no image, by its name", "is a broken link"
NO_IMAGES = "no images in it, of any format that Pillow reads; name another folder"
FEW_CAMERAS = 8  # a number of cameras that is credible in a dataset of any size


class Sample(NamedTuple):
    """A training image: its path, its class, and 1 if a GAN made it, else 0.

    dataset: which of several datasets it is from, counted from 0.
    """

    path: Path
    label: int
    generated: int = 0
    dataset: int = 0


class EvalImage(NamedTuple):
    """A query or gallery image: its path, the person on it, the camera that took it."""

    path: Path
    identity: int
    camera: int


class Splits(NamedTuple):
    """The images of a training: Samples to train on and to validate on, EvalImages of people.

    `people` are held out with all their images; only they tell how well new people are found.
    """

    train: list[Sample]
    validation: list[Sample]
    people: list[EvalImage]


def parse_name(
    path: str | Path, patterns: Sequence[re.Pattern] = (CAMERA_AFTER_C, CAMERA_THIRD)
) -> tuple[int, int]:
    """Return the identity and the camera in an image's name; `-1` is junk, `0` a distractor.

        parse_name("query/0002_c1s1_000451_03.jpg")  # (2, 1)

    Knows the names of Market-1501, DukeMTMC-reID, CUHK03-NP, MSMT17 and VeRi; no name fits both
    patterns. `/` and `\\` both separate paths. Raises UserError for other names.
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


def list_images(folder: str | Path) -> list[Path]:
    """Return the images directly in `folder`, sorted by name. Raises UserError without any."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; check the path")
    images = sorted(p for p in folder.iterdir() if is_image(p))
    if not images:
        raise UserError(f"{folder}: {NO_IMAGES}")
    return images


def walk_images(
    root: str | Path, left_out: list[str], skip: Callable[[str], bool] | None = None
) -> Iterator[str]:
    """Yield the path of each image under a folder, as text.

    left_out: a list that gets a line for each file that is no image, each broken link, and each
    folder that is a link or can't be listed; hidden files and folders get none.
    skip: a function of a folder's path, true where the folder is to be left out without a line.
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
                left_out.append(f"{path}: {BROKEN_LINK}")
            elif not os.path.isfile(path):  # reading a pipe would wait for ever
                left_out.append(f"{path}: is no regular file")
            else:
                yield path


def is_prepared(folder: str | Path) -> bool:
    """Tell whether prepare.py made a folder, from a dataset or from own photos."""
    signs = ["train_all", IDENTITIES_FILE]
    if os.path.basename(folder) == "pytorch":  # elsewhere "gallery" may be anybody's
        signs.append("gallery")
    return any(os.path.exists(os.path.join(folder, sign)) for sign in signs)


def identity_folders(split: str | Path) -> list[Path]:
    """Return the folders `<id>` of a split, sorted by identity, but not that of generated images.

    Raises UserError where the split is missing or empty, or has a folder that is not named after an
    identity, or two that are named after the same one.
    """
    split = Path(split)
    if not split.is_dir():
        raise UserError(f"{split}: no such folder; make it with {maker(split)}")
    folders = [
        folder
        for folder in split.iterdir()
        if folder.is_dir() and folder.name != GENERATED_FOLDER and not is_hidden(folder.name)
    ]
    for folder in folders:
        if not re.fullmatch(r"-?[0-9]+", folder.name) or len(folder.name) > len(str(LARGEST_LABEL)):
            raise UserError(f"{folder}: not named after an identity; take it out of {split}")
    if not folders:
        raise UserError(f"{split}: empty; make it again with {maker(split)}")
    check_spelling(split, [folder.name for folder in folders])
    return sorted(folders, key=lambda folder: int(folder.name))


def check_spelling(where: object, names: Iterable[str]) -> None:
    """Raise UserError where two names are the same number, such as 7 and 0007."""
    spelled = {}
    for name in names:
        if spelled.setdefault(int(name), name) != name:
            raise UserError(
                f"{where}: identities {spelled[int(name)]} and {name} are one number; if they are "
                "one person, name them alike, else give one another number"
            )


def maker(split):
    """Return the name of the script that makes a split."""
    return "changeIndex.py" if split.name.endswith("_new") else "prepare.py"


def labelled_images(split: str | Path) -> list[Sample]:
    """Return the Samples of `train_new`, `train_all_new` or `val_new`: folders name the classes."""
    return [
        Sample(path, int(folder.name))
        for folder in identity_folders(split)
        for path in list_images(folder)
    ]


def eval_images(split: str | Path) -> list[EvalImage]:
    """Return the EvalImages of `query`, `gallery` or `multi-query`, from the files' names.

    Raises UserError where a name and the folder disagree on who that is.
    """
    images = []
    for folder in identity_folders(split):
        for path in list_images(folder):
            images.append(EvalImage(path, *parse_name(path)))
            check_filed(path, images[-1].identity)
    return images


def check_filed(path: Path, identity: int | None) -> None:
    """Raise UserError where an image lies in another identity's folder; None is unknown."""
    if identity not in (None, int(path.parent.name)):
        raise UserError(
            f"{path}: its name says identity {identity}; rename it like others of its folder, or "
            "move it back"
        )


def identity_in_name(path: Path) -> int | None:
    """Return the identity in an image's name; None in a name of no known kind."""
    try:
        return parse_name(path)[0]
    except UserError:
        return None


def has_no_train(data_dir: str | Path) -> bool:
    """Tell whether prepare.py made no `train`, since each identity has one image, in `val`."""
    data_dir = Path(data_dir)
    if (data_dir / "train").exists():
        return False
    train_all, val = (
        [path.name for folder in identity_folders(data_dir / split) for path in list_images(folder)]
        for split in ("train_all", "val")
    )
    return train_all == val


def check_cameras(where: object, images: list[EvalImage]) -> None:
    """Raise UserError where EvalImages have so many cameras that these must be something else.

    Numbers of frames, read as cameras, would switch off the rule that makes gallery images of the
    query's identity and camera junk.
    """
    cameras = {image.camera for image in images}
    if too_many_cameras(len(cameras), len(images)):
        some = "; ".join(
            f"{image.path.name}: id {image.identity}, camera {image.camera}" for image in images[:2]
        )
        raise UserError(
            f"{where}: {len(cameras)} cameras in {len(images)} images; what was read as the camera "
            f"must be something else ({some}); rename the files, or see prepare.py --camera_regex"
        )


def too_many_cameras(cameras: int, images: int) -> bool:
    """Tell whether a number of cameras is too large for that many images to be one of cameras."""
    return cameras > max(FEW_CAMERAS, images / 2)


def check_copies(queries: list[EvalImage], gallery: list[EvalImage]) -> None:
    """Raise UserError where a gallery image is a copy of a query, and not junk for it.

    queries, gallery: EvalImages. A query that finds itself says nothing about a network.
    """
    for query, image in copies(queries, gallery):
        if image.identity != -1 and query[1:] != image[1:]:
            raise UserError(
                f"{query.path} (id {query.identity}, camera {query.camera}) and {image.path} (id "
                f"{image.identity}, camera {image.camera}) are the same picture; delete one"
            )


def copies(images: list, others: list) -> Iterator[tuple]:
    """Yield pairs of one of `images` and one of `others` whose files have the same content.

    All have a `path`. Only files whose size occurs on both sides are read.
    """
    sizes = [size_of(image.path) for image in images]
    sizes_of_others = [size_of(other.path) for other in others]
    shared = {*sizes} & {*sizes_of_others}
    by_hash = defaultdict(list)
    for image, size in zip(images, sizes, strict=True):
        if size in shared:
            by_hash[content_hash(image.path)].append(image)
    for other, size in zip(others, sizes_of_others, strict=True):
        if size in shared:
            for image in by_hash.get(content_hash(other.path), ()):
                yield image, other


def size_of(path):
    """Return a file's size in bytes. Raises UserError where it can't be read, as a broken link."""
    try:
        return path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); replace it") from None


def content_hash(path):
    """Return a hash of a file's content, computed once for each path, size and time of change."""
    return hash_of(path, size_of(path), path.stat().st_mtime_ns)


@cache
def hash_of(path, size, changed):
    """Return the SHA-256 of a file of that size, changed at that time."""
    return sha256(path)


def training_splits(
    data_dir: str | Path | list[str],
    train_all: bool,
    val_ids: int = 0,
    num_ids: int | None = None,
    seed: int = 0,
) -> Splits:
    """Return the real images of a training, from one prepared folder or several.

    People and cameras of several are different ones, whatever their numbers. The first image of
    each identity is held out for validation (`val_new`); with `train_all` none is. val_ids: number
    of identities to hold out whole, evenly spaced. num_ids: number of the others to train on, drawn
    by the seed (None: all); their classes are numbered anew. Raises UserError where there are too
    few identities.
    """
    train, validation, count = [], [], 0
    for dataset, folder in enumerate(prepared_folders(data_dir)):
        parts = labelled_splits(folder, train_all)
        for images, more in zip((train, validation), parts, strict=True):
            images += [s._replace(label=s.label + count, dataset=dataset) for s in more]
        count += count_classes(parts[0] + parts[1])
    if count < 2:
        raise UserError(f"{data_dir}: has one identity to train on; a network needs two or more")
    if not val_ids and num_ids is None:
        return Splits(train, validation, [])
    labels = range(count_classes(train + validation))
    if val_ids > len(labels) - 2:
        raise UserError(f"--val_ids {val_ids}: of {len(labels)} identities; leave two to train on")
    held_out = {labels[n * len(labels) // val_ids] for n in range(val_ids)}
    left = [label for label in labels if label not in held_out]
    if num_ids is not None:
        if num_ids > len(left):
            raise UserError(f"--num_ids {num_ids}: only {len(left)} identities to draw from")
        left = sorted(random.Random(seed).sample(left, num_ids))
    numbers = {label: n for n, label in enumerate(left)}
    people = [s for s in train + validation if s.label in held_out]
    return Splits(renumbered(train, numbers), renumbered(validation, numbers), as_people(people))


def as_people(samples):
    """Return Samples as EvalImages; their numbers tell people and cameras of all datasets apart."""
    people = []
    for sample in samples:
        apart = sample.dataset * (LARGEST_LABEL + 1)
        identity, camera = parse_name(sample.path)
        people.append(EvalImage(sample.path, identity + apart, camera + apart))
    return people


def prepared_folders(data_dir: str | Path | list[str]) -> list[Path]:
    """Return the folders that a training's --data_dir names: one, or a list of several."""
    return [Path(folder) for folder in (data_dir if isinstance(data_dir, list) else [data_dir])]


def labelled_splits(data_dir, train_all):
    """Return the Samples to train and to validate on of one prepared folder."""
    check_prepared(data_dir)
    if train_all:
        splits = labelled_images(data_dir / "train_all_new"), []
    else:
        if not (data_dir / "train_new").exists() and has_no_train(data_dir):
            raise UserError(f"{data_dir}: has one image of each identity; add --train_all")
        splits = labelled_images(data_dir / "train_new"), labelled_images(data_dir / "val_new")
    check_classes([*splits[0], *splits[1]])
    return splits


def check_classes(samples):
    """Raise UserError where a class has images of two identities, by the images' names."""
    firsts = {}
    for sample in samples:
        identity = identity_in_name(sample.path)
        first, path = firsts.setdefault(sample.label, (identity, sample.path))
        if identity != first:
            raise UserError(
                f"{path} and {sample.path}: class {sample.label} has images of two identities, by "
                "their names; delete the folders *_new and run changeIndex.py again"
            )


def renumbered(samples, classes):
    """Return the Samples whose labels are keys of `classes`, with the labels that these give."""
    return [s._replace(label=classes[s.label]) for s in samples if s.label in classes]


def count_classes(samples: list[Sample]) -> int:
    """Return the number of classes K. Raises UserError where the labels are not 0..K-1."""
    labels = {sample.label for sample in samples}
    if min(labels) < 0:
        folder = next(sample.path.parent for sample in samples if sample.label < 0)
        raise UserError(f"{folder}: {min(labels)} is no class; delete it, run changeIndex.py again")
    for label in range(max(labels) + 1):
        if label not in labels:
            folder = samples[0].path.parent.parent
            raise UserError(f"{folder}: class {label} is missing; run changeIndex.py again")
    return len(labels)


def generated_folder(args: Namespace) -> Path:
    """Return the folder of generated images: --gen_dir, else its usual place in --data_dir."""
    if args.gen_dir:
        return Path(args.gen_dir)
    folder, *others = prepared_folders(args.data_dir)
    if others:
        raise UserError("--gen_dir: with several --data_dir, name the folder of generated images")
    return folder / "train_new" / GENERATED_FOLDER


def check_prepared(data_dir: str | Path) -> None:
    """Raise UserError where --data_dir names no folder, or the one above a prepared one."""
    if not Path(data_dir).is_dir():
        raise UserError(f"{data_dir}: no such folder; name the prepared dataset with --data_dir")
    if (Path(data_dir) / "pytorch").is_dir():
        raise UserError(f"{data_dir}: not prepared itself; name {Path(data_dir) / 'pytorch'}")


def generated_images(
    gen_dir: str | Path,
    number: int | str | None = None,
    seed: int = 0,
    splits: Splits | None = None,
) -> list[Sample]:
    """Return Samples of `number` images in and below `gen_dir`, see `draw_generated`.

    Images of any origin will do: copies of those in `splits` are left out.
    """
    if number == 0:
        return []
    return draw_generated(gen_dir, unlabelled_images(gen_dir, splits), number, seed, splits)


def draw_generated(
    gen_dir: str | Path,
    images: list[Path],
    number: int | str | None,
    seed: int,
    splits: Splits | None,
) -> list[Sample]:
    """Return Samples of `number` of the images in `gen_dir`, drawn by the seed (None: all).

    "3x" are three times as many as `splits` has to train on.
    """
    if number is not None:
        count = number
        if isinstance(number, str):
            count = round(float(number[:-1]) * len(splits.train))
            if count == 0:
                raise UserError(f"--num_generated {number}: that is not one image; ask for more")
        if count > len(images):
            raise UserError(
                f"--num_generated {number}: only {len(images)} images in {gen_dir}; generate more"
            )
        images = sorted(random.Random(seed).sample(images, count))
    return [Sample(path, GENERATED_LABEL, generated=1) for path in images]


def unlabelled_images(gen_dir: str | Path, splits: Splits | None = None) -> list[Path]:
    """List the images in and below a folder, sorted, without copies of those in `splits`.

    Hidden folders are left out, and the usual one of generated images below another folder.
    """
    gen_dir = Path(gen_dir)
    if not gen_dir.is_dir():
        raise UserError(
            f"{gen_dir}: no such folder; generate images with DCGAN-tensorflow, or name --gen_dir"
        )
    whole = gen_dir.resolve()
    tested = all((whole.parent / name).is_dir() for name in ("query", "gallery"))
    if is_prepared(whole) or (tested and whole.name in ("query", "gallery", "multi-query")):
        raise UserError(f"{gen_dir}: has images to test on; name a folder such as train_all_new")
    left_out = []
    found = walk_images(gen_dir, left_out, lambda path: Path(path).name == GENERATED_FOLDER)
    images = sorted(map(Path, found))
    for line in left_out:
        if not line.endswith(NO_IMAGE):
            raise UserError(f"{line}; replace it, or take it away")
    if not images:
        raise UserError(f"{gen_dir}: {NO_IMAGES}")
    if splits is None:
        return images
    labelled = [*splits.train, *splits.validation, *splits.people]
    unlabelled = [Sample(path, GENERATED_LABEL) for path in images]
    known = {copy.path for _, copy in copies(labelled, unlabelled)}
    if len(known) == len(images):
        raise UserError(f"{gen_dir}: all its images are trained on with their identity")
    return [path for path in images if path not in known]


def fingerprint(samples: list[Sample]) -> dict:
    """Return the number of Samples and a hash of their files' names and sizes, and their labels."""
    lines = sorted(f"{s.label} {s.path.name} {size_of(s.path)}" for s in samples)
    return {
        "images": len(samples),
        "sha256": hashlib.sha256(os.fsencode("\n".join(lines))).hexdigest(),
    }


def datasets_read(data_dirs: list[Path], samples: list[Sample]) -> list[dict]:
    """Return what each of several datasets adds to real Samples: a dict each."""
    rows = []
    for dataset, data_dir in enumerate(data_dirs):
        own = [s for s in samples if s.dataset == dataset and not s.generated]
        rows.append(
            {
                "data_dir": str(data_dir),
                "identities": len({s.label for s in own}),
                "cameras": len({parse_name(s.path)[1] for s in own}),
                **fingerprint(own),
            }
        )
    return rows


def prepared_hash(data_dir: str | Path) -> str | None:
    """Return a hash of a prepared folder's training images, by class, name and size.

    None where there are none, as in a dataset to test on.
    """
    split = Path(data_dir) / "train_all_new"
    return fingerprint(labelled_images(split))["sha256"] if split.is_dir() else None


def eval_fingerprint(splits: dict[str, list[EvalImage]]) -> str:
    """Return a hash of EvalImages by their split: the files' names and sizes, who is on them."""
    digest = hashlib.sha256()
    for name, images in splits.items():
        found = fingerprint([Sample(image.path, image.identity) for image in images])
        digest.update(f"{name} {found['sha256']}\n".encode())
    return digest.hexdigest()


def classes_hash(samples: list[Sample]) -> str:
    """Return a hash of the pairs of class and identity, as the names of the real images say."""
    pairs = {(s.label, s.path.name.split("_")[0]) for s in samples if not s.generated}
    return hashlib.sha256(os.fsencode(str(sorted(pairs)))).hexdigest()


def manifest(samples: list[Sample]) -> dict | None:
    """Return path and hash of the manifest.json beside the generated images; None without one."""
    folder = next((sample.path.parent for sample in samples if sample.generated), None)
    path = folder and folder / "manifest.json"
    if not path or not path.exists():
        return None
    return {"path": str(path), "sha256": sha256(path)}
