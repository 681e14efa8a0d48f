"""One's own photos as a dataset: `<id>/<photos>`, whatever the folders and files are called.

Identities get numbers, cameras are found in the paths, and where there are no folders train, query
and gallery, a share of the identities is for testing.
"""

import itertools
import random
import re
from collections import defaultdict
from typing import NamedTuple

from reid.dataset import is_image
from reid.errors import UserError
from reid.layouts import Planned

SPLITS = ("train", "query", "gallery")
DIGITS = re.compile("[0-9]{1,9}")  # a name that is a number; longer ones are names
NAME_BYTES = 100  # of a photo's own name that are kept: 255 is the most for a file's whole name
# Without cameras nothing is junk, since queries and gallery seem to be from two; likewise the first
# training photo of an identity, which goes to val, and the others.
QUERY_CAMERA, GALLERY_CAMERA = 1, 2


class Photo(NamedTuple):
    """path: its file; identity: its folder's name; below: its path in there; camera: its name."""

    path: object
    identity: str
    below: str
    camera: str | None


def plan(root, camera_regex, no_camera, test_share, seed):
    """({split: [Planned, ...]}, {"identities": {name: number}, "cameras": {name: number}}).

    camera_regex: finds the camera in the path below the identity's folder: in its group
    `camera`, else its first. None with no_camera: the second dict is empty then.
    """
    find_camera = camera_finder(camera_regex, no_camera)
    if has_splits(root):
        splits = {split: find_photos(root / split, find_camera) for split in SPLITS}
    else:
        splits = divide(find_photos(root, find_camera), test_share, seed)
    photos = list(itertools.chain(*splits.values()))
    identities = number_names({photo.identity for photo in photos})
    check_different(root, identities)
    cameras = {} if no_camera else number_names({photo.camera for photo in photos})
    planned = {}
    for split, photos in splits.items():
        counter = defaultdict(itertools.count)
        planned[split] = []
        for photo in photos:
            number = identities[photo.identity]
            shot = next(counter[number]) + 1
            if no_camera:
                asks = split == "query" or (split == "train" and shot == 1)
                camera = QUERY_CAMERA if asks else GALLERY_CAMERA
            else:
                camera = cameras[photo.camera]
            name = f"{number:04d}_c{camera}_{shot:04d}{short_name(photo.path)}"
            planned[split].append(Planned(photo.path, f"{number:04d}", name))
        planned[split].sort(key=lambda image: image.name)
    return planned, {"identities": identities, "cameras": cameras}


def camera_finder(camera_regex, no_camera):
    """A function (file, its path below the identity's folder) -> camera's name, or None."""
    if no_camera:
        return lambda path, below: None
    if camera_regex is None:
        raise UserError(
            "--dataset folder: give --camera_regex, which finds the camera in the photos' paths, "
            "e.g. 'cam(\\d+)', or --no_camera"
        )
    try:
        pattern = re.compile(camera_regex)
    except re.error as error:
        raise UserError(f"--camera_regex {camera_regex}: no regular expression ({error})") from None
    if not pattern.groups:
        raise UserError(
            f"--camera_regex {camera_regex}: has no group; put the camera in brackets, "
            "e.g. 'cam(\\d+)'"
        )
    group = "camera" if "camera" in pattern.groupindex else 1

    def find(path, below):
        match = pattern.search(below)
        if not match or not match[group]:
            raise UserError(f"{path}: --camera_regex {camera_regex} finds no camera in {below}")
        name = match[group]
        return str(int(name)) if DIGITS.fullmatch(name) else name  # 01 and 1 are one

    return find


def has_splits(root):
    """Whether there are train, query and gallery. Raises UserError where some are missing."""
    there = [split for split in SPLITS if (root / split).is_dir()]
    if there and len(there) < len(SPLITS):
        missing = next(split for split in SPLITS if split not in there)
        raise UserError(f"{root / missing}: no such folder, though there is {root / there[0]}")
    return bool(there)


def find_photos(folder, find_camera):
    """The photos in the folders `<id>`, sorted by folder, then by path in it."""
    photos = []
    for home in sorted(folder.iterdir()):
        if home.is_dir() and not home.name.startswith(".") and not is_prepared(home):
            photos += photos_of(home, find_camera)
    if not photos:
        raise UserError(f"{folder}: no folders <id> with images in them; check --download_path")
    return photos


def is_prepared(folder):
    """Whether a folder is what prepare.py made, or holds it: it may lie beside the identities."""
    return any(path.is_dir() for path in (folder / "train_all", *folder.glob("*/train_all")))


def photos_of(home, find_camera):
    """The photos of one identity, in its folder or deeper, but not in hidden folders."""
    photos = []
    for path in home.rglob("*"):
        below = path.relative_to(home)
        if is_image(path) and path.is_file() and not any(p.startswith(".") for p in below.parts):
            camera = find_camera(path, below.as_posix())
            photos.append(Photo(path, home.name, below.as_posix(), camera))
    if not photos:
        raise UserError(f"{home}: no images in it; take it out")
    return sorted(photos, key=lambda photo: photo.below)


def divide(photos, test_share, seed):
    """Train, query and gallery: a share of the identities, chosen by the seed, is for testing."""
    by_identity = defaultdict(list)
    for photo in photos:
        by_identity[photo.identity].append(photo)
    names = sorted(by_identity)
    if len(names) < 2:
        raise UserError(f"{names[0]}: the only identity; training and testing take one each")
    number = min(max(round(test_share * len(names)), 1), len(names) - 1)
    tested = set(random.Random(seed).sample(names, number))
    splits = {split: [] for split in SPLITS}
    for name in names:
        if name in tested:
            queries = choose_queries(by_identity[name])
            splits["query"] += queries
            splits["gallery"] += [photo for photo in by_identity[name] if photo not in queries]
        else:
            splits["train"] += by_identity[name]
    if not splits["query"]:
        raise UserError(
            "no identity for testing has photos from two cameras (with --no_camera: two photos); "
            "take another --seed, or a greater --test_share"
        )
    return splits


def choose_queries(photos):
    """The first photo of each camera, as far as every query keeps a good one in the gallery."""
    firsts = {}
    for photo in photos:
        firsts.setdefault(photo.camera, photo)
    queries = []
    for _, first in sorted(firsts.items(), key=lambda item: item[0] or ""):
        chosen = [*queries, first]
        gallery = [photo for photo in photos if photo not in chosen]
        if all(any(is_good(query, photo) for photo in gallery) for query in chosen):
            queries = chosen
    return queries


def is_good(query, photo):
    """Whether finding this photo of the same identity counts: another camera, where known."""
    return query.camera is None or query.camera != photo.camera


def number_names(names):
    """{name: number}. Digits keep theirs; other names get free ones from 1, in sorted order."""
    numbers = {name: int(name) for name in names if DIGITS.fullmatch(name)}
    taken = set(numbers.values())
    free = (number for number in itertools.count(1) if number not in taken)
    numbers |= {name: next(free) for name in sorted(names - numbers.keys())}
    return {name: numbers[name] for name in sorted(names)}


def check_different(root, identities):
    """Raise UserError where two folders are named by the same number, such as 7 and 007."""
    first = {}
    for name, number in identities.items():
        if number in first:
            raise UserError(f"{root}: identities {first[number]} and {name} are one; merge them")
        first[number] = name


def short_name(path):
    """A photo's own name, with `_` before it: cut short, and without what shells stumble over."""
    stem = re.sub(r"[^\w.-]+", "_", path.stem).encode()[:NAME_BYTES].decode(errors="ignore")
    return f"_{stem}{path.suffix}"
