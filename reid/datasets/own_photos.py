"""One's own photos as a dataset: `<id>/<photos>`, whatever the folders and files are called.

Identities get numbers, cameras are found in the paths, and where there are no folders query and
gallery, a fraction of the identities is for testing.
"""

import itertools
import random
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

from reid.dataset import check_spelling, copies, is_prepared, walk_images
from reid.datasets.layouts import RawImage
from reid.errors import UserError, printable
from reid.files import sha256
from reid.images import is_hidden

SPLITS = ("train", "query", "gallery")
# Folders of datasets, which are nobody.
NO_PERSONS = {*SPLITS, "test", "val", "valid", "validation", "probe", "training", "testing"}
DIGITS = re.compile("[0-9]{1,9}")  # a name that is a number; longer ones are names
NAME_BYTES = 100  # of a photo's own name that are kept: 255 is the most for a file's whole name
# Without cameras nothing is junk, since queries and gallery seem to be from two; likewise the first
# training photo of an identity, which goes to val, and the others. Only copies of a photo share its
# camera, which is one of their own.
QUERY_CAMERA, GALLERY_CAMERA, FIRST_OF_COPIES = 1, 2, 3


class Photo(NamedTuple):
    """path: its file; identity, camera: their names; below: the path that these are found in."""

    path: Path
    identity: str
    below: str
    camera: str | None


class Finder(NamedTuple):
    """How identity and camera are found in a photo's path: compiled expressions, or None.

    identity: None takes the name of the first folder. camera: None where photos have none.
    """

    identity: re.Pattern | None
    camera: re.Pattern | None


def splits_of(root, finder, test_fraction, seed):
    """What to prepare of the photos under a folder.

    Returns {split: [RawImage, ...]}, {"identities": {name: number}, "cameras": {name: number}}, and
    a list of what is left out, in words. Without cameras the second of the numbers is empty.
    """
    left_out = []
    if has_splits(root, finder):
        splits = {
            split: find_photos(root / split, finder, left_out)
            for split in SPLITS
            if (root / split).is_dir()
        }
        others = [f for f in sorted(root.iterdir()) if f.is_dir() and f.name not in SPLITS]
        others = [f for f in others if not is_hidden(f.name) and not is_prepared(f)]
        left_out += [f"{folder}: is not train, query or gallery" for folder in others]
    else:
        splits = divide(find_photos(root, finder, left_out), test_fraction, seed, left_out)
    photos = list(itertools.chain(*splits.values()))
    warn_of_two_people(photos)
    identities = number_names({photo.identity for photo in photos})
    check_spelling(root, [name for name in identities if DIGITS.fullmatch(name)])
    if finder.camera:  # without, made_up_cameras() does it
        splits["gallery"] = without_copies(splits["query"], splits["gallery"], left_out)
    names = number_names({photo.camera for photo in photos} - {None})
    cameras = {photo.path: names.get(photo.camera) for photo in photos}
    if not names:
        first, others = split_by_shot(splits.get("train", []))
        cameras |= made_up_cameras(first, others)
        cameras |= made_up_cameras(splits["query"], splits["gallery"])
    renamed = {}
    for split, photos in splits.items():
        counter = defaultdict(itertools.count)
        renamed[split] = []
        for photo in photos:
            number = identities[photo.identity]
            shot = next(counter[number]) + 1
            name = f"{number:04d}_c{cameras[photo.path]}_{shot:04d}{short_name(photo.path)}"
            renamed[split].append(RawImage(photo.path, f"{number:04d}", name))
        renamed[split].sort(key=lambda image: image.name)
    return renamed, {"identities": identities, "cameras": names}, left_out


def make_finder(id_regex, camera_regex, no_camera):
    """The Finder that the flags ask for."""
    if camera_regex is None and not no_camera:
        raise UserError(
            "--dataset folder: give --camera_regex, which finds the camera in the photos' paths, "
            "e.g. 'cam(\\d+)', or --no_camera"
        )
    return Finder(
        id_regex and expression("--id_regex", id_regex),
        camera_regex and expression("--camera_regex", camera_regex),
    )


def expression(flag, text):
    """A regular expression with a group. Raises UserError for others."""
    try:
        pattern = re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(f"{flag} {text}: no regular expression ({error})") from None
    if not pattern.groups:
        raise UserError(
            f"{flag} {text}: has no group; put what it finds in brackets, e.g. 'cam(\\d+)'"
        )
    return pattern


def found_name(pattern, group, below):
    """What an expression finds in a path: its group of that name, else its first; or None."""
    match = pattern.search(below)
    name = match and plain(match[group if group in pattern.groupindex else 1] or "")
    return str(int(name)) if name and DIGITS.fullmatch(name) else name  # 01 and 1 are one


def has_splits(root, finder):
    """Whether there are query and gallery. Raises UserError where one of them is missing.

    With --id_regex one folder may be called so and mean something else, as GRID's gallery does.
    """
    there = [split for split in SPLITS if (root / split).is_dir()]
    missing = [split for split in ("query", "gallery") if split not in there]
    if len(there) > bool(finder.identity) and missing:
        raise UserError(f"{root / missing[0]}: no such folder, though there is {root / there[0]}")
    return not missing


def find_photos(folder, finder, left_out):
    """The photos under a folder, sorted by identity, then by path; adds others to `left_out`."""
    paths = map(Path, walk_images(folder, left_out, skip=is_prepared))
    found = [photo_at(path, path.relative_to(folder), finder, left_out) for path in paths]
    photos = [photo for photo in found if photo]
    if not photos and finder.identity:
        raise UserError(
            f"{folder}: --id_regex {finder.identity.pattern} finds no identity in any image's path"
        )
    if not finder.identity:
        check_homes(folder, {photo.identity for photo in photos})
    if not photos:
        raise UserError(
            f"{folder}: no folders <id> with images in them; check --download_path, or find the "
            "identities with --id_regex"
        )
    return sorted(photos, key=lambda photo: (photo.identity, photo.below))


def check_homes(folder, identities):
    """Raise UserError where a folder in `folder` is empty, or can't be called after a person."""
    for home in sorted(home for home in folder.iterdir() if home.is_dir()):
        name = plain(home.name)
        if is_hidden(home.name) or home.is_symlink() or holds_prepared(home):
            continue
        if name.lower() in NO_PERSONS or name.startswith("bounding_box"):
            raise UserError(
                f"{home}: is a part of a dataset by its name, and no person; name one with folders "
                "<id> with --download_path, or call the parts train, query and gallery"
            )
        if re.fullmatch(r"-\d+", name):
            raise UserError(f"{home}: junk by its name, and no person; take it out")
        if name not in identities:
            raise UserError(f"{home}: no images in it; take it out")


def photo_at(path, below, finder, left_out):
    """The Photo of a file, `below` its path under the folder; None where it has no identity."""
    if finder.identity:
        identity, below = found_name(finder.identity, "id", below.as_posix()), below.as_posix()
        if not identity:
            left_out.append(f"{path}: --id_regex finds no identity in {below}")
            return None
    elif len(below.parts) == 1:
        left_out.append(f"{path}: is in no folder <id>")
        return None
    else:
        identity, below = plain(below.parts[0]), Path(*below.parts[1:]).as_posix()
    if not finder.camera:
        return Photo(path, identity, below, None)
    camera = found_name(finder.camera, "camera", below)
    if not camera:
        raise UserError(
            f"{path}: --camera_regex {finder.camera.pattern} finds no camera in {below}"
        )
    return Photo(path, identity, below, camera)


def plain(name):
    """A name in Unicode's usual form: macOS writes letters and their accents apart."""
    return unicodedata.normalize("NFC", name)


def holds_prepared(folder):
    """Whether a folder is what prepare.py made, or holds it: it may lie beside the identities."""
    return is_prepared(folder) or any(is_prepared(below) for below in folder.glob("*/"))


def warn_of_two_people(photos):
    """Say on standard error how many pictures are photos of two identities, and the first."""
    sizes = Counter(photo.path.stat().st_size for photo in photos)
    first, pairs = {}, []
    for photo in photos:
        if sizes[photo.path.stat().st_size] > 1:
            other = first.setdefault(sha256(photo.path), photo)
            if other.identity != photo.identity:
                pairs.append(f"{printable(other.path)} and {printable(photo.path)}")
    if pairs:
        print(
            f"warning: {len(pairs)} pictures are of two identities: {pairs[0]} are the same; merge "
            "these, or delete one",
            file=sys.stderr,
        )


def split_by_shot(photos):
    """The first photo of each identity, and the others."""
    first = {}
    for photo in photos:
        first.setdefault(photo.identity, photo)
    paths = {photo.path for photo in first.values()}
    return list(first.values()), [photo for photo in photos if photo.path not in paths]


def made_up_cameras(asking, others):
    """{path: camera} for photos without: QUERY_CAMERA for those asking, GALLERY_CAMERA for others.

    But a photo and its copies, of one identity, get a camera of their own: they are junk for one
    another, for who finds a copy has found nothing.
    """
    cameras = {photo.path: QUERY_CAMERA for photo in asking}
    cameras |= {photo.path: GALLERY_CAMERA for photo in others}
    free = defaultdict(lambda: itertools.count(FIRST_OF_COPIES))
    for number, other in copies([photo.path for photo in asking], [p.path for p in others]):
        photo, copy = asking[number], others[other]
        if photo.identity == copy.identity:
            own = max(cameras[photo.path], cameras[copy.path])
            if own < FIRST_OF_COPIES:
                own = next(free[photo.identity])
            cameras[photo.path] = cameras[copy.path] = own
    return cameras


def without_copies(queries, photos, left_out):
    """The photos that are no copies of a query of their identity, which would find itself."""
    twins = {}
    for number, other in copies([query.path for query in queries], [p.path for p in photos]):
        if queries[number].identity == photos[other].identity:
            twins[other] = queries[number].path
    left_out += [f"{photos[n].path}: is the same picture as {twin}" for n, twin in twins.items()]
    return [photo for number, photo in enumerate(photos) if number not in twins]


def distinct(photos, left_out):
    """The photos without copies of others: these show the person no second time."""
    sizes = Counter(photo.path.stat().st_size for photo in photos)
    first = {}
    for photo in photos:
        alone = sizes[photo.path.stat().st_size] == 1
        content = photo.path if alone else sha256(photo.path)
        if first.setdefault(content, photo) is not photo:
            left_out.append(f"{photo.path}: is the same picture as {first[content].path}")
    return list(first.values())


def divide(photos, test_fraction, seed, left_out):
    """Train, query and gallery: a fraction of the identities, chosen by the seed, for testing."""
    by_identity = defaultdict(list)
    for photo in photos:
        by_identity[photo.identity].append(photo)
    names = sorted(by_identity)
    if len(names) < 2:
        raise UserError(f"{names[0]}: the only identity; training and testing take one each")
    number = min(max(round(test_fraction * len(names)), 1), len(names) - 1)
    tested = set(random.Random(seed).sample(names, number))
    splits = {split: [] for split in SPLITS}
    for name in names:
        if name in tested:
            different = distinct(by_identity[name], left_out)
            queries = choose_queries(different)
            splits["query"] += queries
            splits["gallery"] += [photo for photo in different if photo not in queries]
        else:
            splits["train"] += by_identity[name]
    if not splits["query"]:
        raise UserError(
            "no identity for testing has photos from two cameras (with --no_camera: two photos); "
            "take another --seed, or a greater --test_fraction"
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


def short_name(path):
    """A photo's own name, with `_` before it: cut short, and without what shells stumble over."""
    stem = re.sub(r"[^\w.-]+", "_", path.stem).encode()[:NAME_BYTES].decode(errors="ignore")
    return f"_{stem}{path.suffix}"
