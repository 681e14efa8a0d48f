"""The layouts of raw datasets, and their published sizes.

Each layout has a function that lists the images of each split, `{split: [RawImage, ...]}`: train,
query, gallery and, for Market-1501, multi-query, each sorted by name. prepare.py makes the folders.
CUHK03-NP and one's own photos have files of their own, cuhk03.py and own_photos.py.
"""

import os
import re
from itertools import islice
from typing import NamedTuple

from reid.dataset import CAMERA_THIRD, is_prepared, list_images, parse_name, walk_images
from reid.errors import UserError
from reid.files import read_text
from reid.images import is_hidden, is_image

MARKET_FOLDERS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
VERI_FOLDERS = {"train": "image_train", "query": "image_query", "gallery": "image_test"}
# MSMT17's first and second version.
MSMT17_FOLDERS = {"train": ("train", "mask_train_v2"), "test": ("test", "mask_test_v2")}

# Any of these tells a dataset.
SIGNS = {
    "market1501": ("bounding_box_train", "bounding_box_test"),
    "duke": ("bounding_box_train", "bounding_box_test"),
    "cuhk03-np": (
        "bounding_box_train",
        "detected/bounding_box_train",
        "labeled/bounding_box_train",
        "cuhk03_new_protocol_config_detected.mat",
        "cuhk03_new_protocol_config_labeled.mat",
    ),
    "msmt17": ("list_train.txt", "list_query.txt", "list_gallery.txt", "mask_train_v2"),
    "veri": ("image_train", "image_test"),
}
# Three have the same folders; these are their images' names.
MARKET_NAMES = {
    "market1501": r"-?\d+_c\d+s\d+_",
    "duke": r"\d+_c\d+_f\d+",
    "cuhk03-np": r"\d+_c\d_\d+(_\d+)*\.png$",
}
DEPTH = 3  # floors below the named folder that are searched for a dataset
SAMPLE = 100  # images whose names are read to tell whose they are
STAND_IN = "synthetic_market.json"  # in a rendered set, which is as large as one likes


class RawImage(NamedTuple):
    """An image of a prepared dataset.

    source: its file, or an object whose `save(path)` writes it.
    identity, name: the folder and the file name that it gets; digits, and a name for parse_name.
    """

    source: object
    identity: str
    name: str


class Counts(NamedTuple):
    """How large a split is; None: not known."""

    ids: int | None
    images: int | None
    cameras: int | None


# Identities are people (or vehicles): Market-1501's gallery has the labels -1 and 0 besides.
# Zheng et al. 2015 (Market-1501), Zheng et al. 2017 (Duke), Zhong et al. 2017 (CUHK03-NP),
# Wei et al. 2018 (MSMT17), Liu et al. 2016 and the release's own readme (VeRi-776).
PUBLISHED = {
    "market1501": {
        "train": Counts(751, 12936, 6),
        "query": Counts(750, 3368, 6),
        "gallery": Counts(750, 19732, 6),
    },
    "duke": {
        "train": Counts(702, 16522, 8),
        "query": Counts(702, 2228, 8),
        "gallery": Counts(1110, 17661, 8),
    },
    "cuhk03-np detected": {
        "train": Counts(767, 7365, 2),
        "query": Counts(700, 1400, 2),
        "gallery": Counts(700, 5332, 2),
    },
    "cuhk03-np labeled": {
        "train": Counts(767, 7368, 2),
        "query": Counts(700, 1400, 2),
        "gallery": Counts(700, 5328, 2),
    },
    "msmt17": {
        "train": Counts(1041, 32621, 15),
        "query": Counts(3060, 11659, 15),
        "gallery": Counts(3060, 82161, 15),
    },
    "veri": {
        "train": Counts(576, 37778, 20),
        "query": Counts(200, 1678, 19),
        "gallery": Counts(200, 11579, None),
    },
}


def find(source, dataset=None):
    """Which dataset, and where it lies: `source` itself, or a folder in it: (name, folder).

    dataset: its name where it is known. Raises UserError where none is there, or several.
    """
    here = guess(source, dataset)  # what the user says goes, where it can be
    if here:
        return here, source
    floor = folders_in(source)
    for _ in range(DEPTH):
        there = [(guess(folder), folder) for folder in floor]
        there = [(name, folder) for name, folder in there if name and dataset in (None, name)]
        if len(there) > 1:
            several = " and ".join(f"{path.relative_to(source)} ({name})" for name, path in there)
            raise UserError(f"{source}: holds {several}; name one of these with --download_path")
        if there:
            return there[0]
        floor = [below for folder in floor for below in folders_in(folder)]
    if dataset:
        return dataset, source  # listing its images will say what is missing
    paths = islice(walk_images(source, [], skip=is_prepared), SAMPLE)
    names = [os.path.basename(path) for path in paths]
    if names:
        check_nobodys(source, names)
        return "folder", source
    raise UserError(
        f"{source / 'bounding_box_train'}: no such folder, and no other dataset here. Looked for "
        "bounding_box_train (market1501, duke, cuhk03-np), detected or labeled or "
        "cuhk03_new_protocol_config_*.mat (cuhk03-np), list_train.txt (msmt17), "
        "image_train (veri), <id>/<photos> (folder); check --download_path"
    )


def folders_in(folder):
    """The folders that may hold a dataset, by name; not those with a folder for each identity."""
    try:
        found = sorted(f for f in folder.iterdir() if f.is_dir() and not is_hidden(f.name))
    except OSError:  # may not be listed
        return []
    return [f for f in found if not re.fullmatch(r"-?\d+", f.name)]


def check_nobodys(source, names):
    """Raise UserError where most of the images are called as a dataset's are."""
    patterns = {**MARKET_NAMES, "msmt17": CAMERA_THIRD.pattern, "veri": r"v?\d+_c\d{3}_\d{8}_\d"}
    for dataset, pattern in patterns.items():
        if 2 * sum(bool(re.match(pattern, name)) for name in names) > len(names):
            signs = " or ".join(SIGNS[dataset][:2])
            raise UserError(
                f"{source}: images called as {dataset}'s ({names[0]}), but no {signs}; put it "
                "there, or if these are your own photos pass --dataset folder"
            )


def guess(folder, dataset=None):
    """Which dataset lies directly in `folder`, None where none does; only `dataset` if given."""
    if dataset == "folder":
        return dataset
    fitting = [
        name
        for name in ([dataset] if dataset else SIGNS)
        if any((folder / sign).exists() for sign in SIGNS[name])
    ]
    if len(fitting) > 1:
        return by_names(folder / MARKET_FOLDERS["train"])
    return fitting[0] if fitting else None


def by_names(folder):
    """Which of the datasets with Market-1501's folders, by the name of its first image."""
    images = sorted(path for path in folder.glob("*") if is_image(path))
    for dataset, pattern in MARKET_NAMES.items():
        if images and re.match(pattern, images[0].name):
            return dataset
    return "market1501"


def market_splits(root):
    """The images of Market-1501, or of another dataset with its folders and names."""
    splits = folder_splits(root, MARKET_FOLDERS)
    if (root / "gt_bbox").is_dir():
        asked = {image.identity for image in splits["query"]}
        boxes = images_in(root / "gt_bbox")
        splits["multi-query"] = [image for image in boxes if image.identity in asked]
    return splits


def folder_splits(root, folders):
    """The images of a dataset with a folder for each split: `folders` is {split: name}.

    With no folder but query and gallery it is for testing alone.
    """
    there = {split for split, folder in folders.items() if (root / folder).is_dir()}
    wanted = there if there == {"query", "gallery"} else folders.keys()
    return {split: images_in(root / folders[split]) for split in folders if split in wanted}


def images_in(folder):
    """The images directly in a folder; they keep their names."""
    return [RawImage(path, identity_name(path), path.name) for path in list_images(folder)]


def identity_name(path):
    """The identity as the file's name writes it, leading zeros kept: "0002"."""
    parse_name(path)
    return path.name.split("_")[0].removeprefix("v")


def msmt17_splits(root):
    """The images of MSMT17, version 1 or 2, as its lists say; list_train and list_val train."""
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
    """Where the images of a split lie."""
    names = MSMT17_FOLDERS["train" if split == "train" else "test"]
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise UserError(f"{root / names[0]}: no such folder, nor {names[1]}; unpack MSMT17 there")


def read_list(path, folder):
    """The images of a list with a line "path id" for each, paths relative to `folder`.

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


def count(images, zero_is_someone):
    """Counts of a split. Junk (-1) is nobody, and so are distractors (0), but in MSMT17."""
    parsed = [parse_name(image.name) for image in images]
    nobody = {-1} if zero_is_someone else {-1, 0}
    return Counts(
        len({identity for identity, _ in parsed} - nobody),
        len(images),
        len({camera for _, camera in parsed}),
    )
