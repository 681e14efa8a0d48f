"""The layouts of raw datasets: how to recognise each, how to list its images, its published size.

`LAYOUTS`, at the end, has an entry for each. Its function lists the images of each split,
`{split: [RawImage, ...]}`: train, query, gallery and, for Market-1501, multi-query, each sorted by
name. CUHK03-NP and own photos have theirs in cuhk03.py and own_photos.py.
"""

import os
import re
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from reid.dataset import CAMERA_THIRD, is_prepared, list_images, parse_name, walk_images
from reid.errors import UserError
from reid.files import read_text
from reid.images import is_hidden, is_image

MARKET_FOLDERS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
VERI_FOLDERS = {"train": "image_train", "query": "image_query", "gallery": "image_test"}
# The names in MSMT17's first and second version.
MSMT17_FOLDERS = {"train": ("train", "mask_train_v2"), "test": ("test", "mask_test_v2")}

DEPTH = 3  # levels of folders below the named one in which a dataset is looked for
SAMPLE = 100  # images whose names are read to tell a dataset from own photos


class RawImage(NamedTuple):
    """An image of a raw dataset, and its names in the prepared one.

    source: its path, or an object whose `save(path)` writes it.
    identity: the name of its folder, digits. name: its file name, as parse_name reads it.
    """

    source: object
    identity: str
    name: str


class Counts(NamedTuple):
    """The size of a split; None where a number is not known."""

    ids: int | None
    images: int | None
    cameras: int | None

    def __str__(self):
        ids, images, cameras = ("?" if number is None else number for number in self)
        return f"{ids} ids, {images} images, {cameras} cameras"


class Layout(NamedTuple):
    """A raw dataset.

    signs: files and folders, any of which tells the dataset. names: regular expression that matches
    the names of its images. splits: function of its folder that lists the images; None for
    CUHK03-NP. published: {split: Counts}. zero_is_person: whether 0 is an identity like others, and
    not the label of distractors.
    """

    signs: tuple[str, ...]
    names: str
    splits: Callable[[Path], dict[str, list[RawImage]]] | None
    published: dict[str, Counts]
    zero_is_person: bool = False


def find(source: Path, dataset: str | None = None) -> tuple[str, Path]:
    """Return the name of a dataset and its folder: `source` itself, or one up to DEPTH below it.

    dataset: its name where it is known. Raises UserError where there is none, or more than one.
    """
    name = guess(source, dataset)  # a dataset that is named may look like another
    if name:
        return name, source
    folders = folders_in(source)
    for _ in range(DEPTH):
        guesses = [(guess(folder), folder) for folder in folders]
        datasets = [(name, path) for name, path in guesses if name and dataset in (None, name)]
        if len(datasets) > 1:
            names = " and ".join(f"{path.relative_to(source)} ({name})" for name, path in datasets)
            raise UserError(f"{source}: holds {names}; name one of these with --download_path")
        if datasets:
            return datasets[0]
        folders = [below for folder in folders for below in folders_in(folder)]
    if dataset:
        return dataset, source  # listing its images tells the user what is missing
    paths = islice(walk_images(source, [], skip=is_prepared), SAMPLE)
    names = [os.path.basename(path) for path in paths]
    if names:
        check_own(source, names)
        return "folder", source
    owners = {}
    for name, layout in LAYOUTS.items():
        for sign in layout.signs:
            owners.setdefault(sign, []).append(name)
    signs = ", ".join(f"{sign} ({', '.join(names)})" for sign, names in owners.items())
    raise UserError(
        f"{source / 'bounding_box_train'}: no such folder, and no other dataset here. Looked for "
        f"{signs}, <id>/<photos> (folder); check --download_path"
    )


def folders_in(folder):
    """Return the folders in `folder` that may hold a dataset, by name; identities' may not."""
    try:
        folders = sorted(f for f in folder.iterdir() if f.is_dir() and not is_hidden(f.name))
    except OSError:  # it can't be listed
        return []
    return [f for f in folders if not re.fullmatch(r"-?\d+", f.name)]


def check_own(source, names):
    """Raise UserError where most of the file names are like those of a dataset, not own photos'."""
    for dataset, layout in LAYOUTS.items():
        if 2 * sum(bool(re.match(layout.names, name)) for name in names) > len(names):
            signs = " or ".join(layout.signs[:2])
            raise UserError(
                f"{source}: images called as {dataset}'s ({names[0]}), but no {signs}; put it "
                "there, or if these are your own photos pass --dataset folder"
            )


def guess(folder, dataset=None):
    """Return the name of the dataset directly in `folder`, or None; where given, only `dataset`."""
    if dataset == "folder":
        return dataset
    names = [
        name
        for name in ([dataset] if dataset else LAYOUTS)
        if any((folder / sign).exists() for sign in LAYOUTS[name].signs)
    ]
    if len(names) > 1:  # datasets with Market-1501's folders: their images' names differ
        paths = (path for split in MARKET_FOLDERS.values() for path in (folder / split).glob("*"))
        images = sorted(path.name for path in paths if is_image(path))
        fitting = [n for n in names if images and re.match(LAYOUTS[n].names, images[0])]
        names = fitting or names
    return names[0] if names else None


def market_splits(root: Path) -> dict[str, list[RawImage]]:
    """Return the images of Market-1501, or of another dataset with its folders and names."""
    splits = folder_splits(root, MARKET_FOLDERS)
    if (root / "gt_bbox").is_dir():
        queried = {image.identity for image in splits["query"]}
        boxes = images_in(root / "gt_bbox")
        splits["multi-query"] = [image for image in boxes if image.identity in queried]
    return splits


def folder_splits(root: Path, folders: dict[str, str]) -> dict[str, list[RawImage]]:
    """Return the images of a dataset with a folder for each split: `folders` is {split: name}.

    Only train may be missing, for testing alone. Raises UserError where another folder is.
    """
    splits = [split for split, folder in folders.items() if (root / folder).is_dir()]
    if splits != ["query", "gallery"]:
        splits = folders  # listing them tells the user which folder is missing
    return {split: images_in(root / folders[split]) for split in splits}


def images_in(folder):
    """Return the images directly in a folder; they keep their names."""
    return [RawImage(path, identity_name(path), path.name) for path in list_images(folder)]


def identity_name(path):
    """Return the identity as the file's name spells it, with leading zeros: "0002"."""
    parse_name(path)  # raises UserError for other names
    return path.name.split("_")[0].removeprefix("v")


def msmt17_splits(root: Path) -> dict[str, list[RawImage]]:
    """Return the images in MSMT17's lists, version 1 or 2; those of list_val train as well."""
    lists = {"train": ("train", "val"), "query": ("query",), "gallery": ("gallery",)}
    return {
        split: sorted(
            (
                image
                for name in names
                for image in read_list(root / f"list_{name}.txt", msmt17_folder(root, split))
            ),
            key=lambda image: image.name,
        )
        for split, names in lists.items()
    }


def msmt17_folder(root, split):
    """Return the folder of a split's images."""
    names = MSMT17_FOLDERS["train" if split == "train" else "test"]
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise UserError(f"{root / names[0]}: no such folder, nor {names[1]}; unpack MSMT17 there")


def read_list(path, folder):
    """Return the images of a list with a line "path id" for each, paths relative to `folder`.

    Raises UserError with the line's number where a file is missing, or its name has another id.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; it comes with MSMT17")
    images = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            name, identity = line.rsplit(maxsplit=1)
            identity = int(identity)
        except ValueError:
            raise UserError(f"{path} line {number}: not a path and an id: {line}") from None
        image = folder / name.strip().replace("\\", "/")
        if not image.is_file():
            raise UserError(f"{path} line {number}: {image}: no such file; unpack MSMT17 again")
        if parse_name(image, [CAMERA_THIRD])[0] != identity:
            raise UserError(f"{path} line {number}: id {identity}, but the file is {image.name}")
        images.append(RawImage(image, identity_name(image), image.name))
    if not images:
        raise UserError(f"{path}: empty; unpack MSMT17 again")
    return images


def count(images: list[RawImage], zero_is_person: bool) -> Counts:
    """Return the Counts of a split. Junk (-1) is no identity; 0 is one only if `zero_is_person`."""
    parsed = [parse_name(image.name) for image in images]
    identities = {identity for identity, _ in parsed} - ({-1} if zero_is_person else {-1, 0})
    return Counts(len(identities), len(images), len({camera for _, camera in parsed}))


def hold_out_first(images: list) -> tuple[list, list]:
    """Return the first image of each identity, and the others; both keep their order."""
    firsts = {}
    for image in images:
        firsts.setdefault(image.identity, image)
    return list(firsts.values()), [i for i in images if firsts[i.identity] is not i]


# Published identities are people or vehicles, without the labels -1 and 0 in Market-1501's gallery.
# Zheng et al. 2015 (Market-1501), Zheng et al. 2017 (Duke), Wei et al. 2018 (MSMT17), Liu et al.
# 2016 and the release's own readme (VeRi-776); CUHK03-NP's are in cuhk03.py.
LAYOUTS = {
    "market1501": Layout(
        signs=("bounding_box_train", "bounding_box_test"),
        names=r"-?\d+_c\d+s\d+_",
        splits=market_splits,
        published={
            "train": Counts(751, 12936, 6),
            "query": Counts(750, 3368, 6),
            "gallery": Counts(750, 19732, 6),
        },
    ),
    "duke": Layout(
        signs=("bounding_box_train", "bounding_box_test"),
        names=r"\d+_c\d+_f\d+",
        splits=market_splits,
        published={
            "train": Counts(702, 16522, 8),
            "query": Counts(702, 2228, 8),
            "gallery": Counts(1110, 17661, 8),
        },
    ),
    "cuhk03-np": Layout(
        signs=(
            "detected/bounding_box_train",
            "labeled/bounding_box_train",
            "bounding_box_train",
            "bounding_box_test",
            "cuhk03_new_protocol_config_detected.mat",
            "cuhk03_new_protocol_config_labeled.mat",
        ),
        names=r"\d+_c\d_\d+(_\d+)*\.png$",
        splits=None,
        published={},
    ),
    "msmt17": Layout(
        signs=("list_train.txt", "list_query.txt", "list_gallery.txt", "mask_train_v2"),
        names=CAMERA_THIRD.pattern,
        splits=msmt17_splits,
        published={
            "train": Counts(1041, 32621, 15),
            "query": Counts(3060, 11659, 15),
            "gallery": Counts(3060, 82161, 15),
        },
        zero_is_person=True,
    ),
    "veri": Layout(
        signs=("image_train", "image_test"),
        names=r"v?\d+_c\d{3}_\d{8}_\d",
        splits=lambda root: folder_splits(root, VERI_FOLDERS),
        published={
            "train": Counts(576, 37778, 20),
            "query": Counts(200, 1678, 19),
            "gallery": Counts(200, 11579, None),
        },
    ),
}
