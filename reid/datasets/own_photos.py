"""Own photos as a dataset: `<id>/<photos>`, whatever the folders and files are called.

Identities get numbers, and cameras are read from the paths. Where there are no folders query and
gallery, a fraction of the identities is for testing.
"""

import itertools
import random
import re
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

from reid.dataset import (
    check_spelling,
    content_hash,
    copies,
    is_prepared,
    size_of,
    walk_images,
)
from reid.datasets.layouts import RawImage, hold_out_first
from reid.errors import UserError, printable, say
from reid.images import is_hidden

SPLITS = ("train", "query", "gallery")
# Names of a dataset's parts, which can't be a person's folder.
NO_PERSONS = {*SPLITS, "test", "val", "valid", "validation", "probe", "training", "testing"}
DIGITS = re.compile("[0-9]{1,9}")  # a name that is a number; longer ones are mere names
NAME_BYTES = 100  # how much of a photo's own name is kept: a whole file name has 255 at most
TEST_FRACTION, SEED = 0.5, 0  # of identities for testing; that draws them
# Photos without cameras get these: queries one, the gallery another, so that nothing is junk; and
# likewise the first training photo of each identity, which goes to val, and the others. A query and
# its copies in the gallery get one that only they have, so that they are junk for one another.
QUERY_CAMERA, GALLERY_CAMERA, FIRST_OF_COPIES = 1, 2, 3


class Photo(NamedTuple):
    """A photo: its path, identity and camera by name, and the part of its path with the camera."""

    path: Path
    identity: str
    below: str
    camera: str | None


class PathPatterns(NamedTuple):
    """The expressions that find identity and camera in a photo's path.

    identity: None where the first folder's name is the identity. camera: None without cameras.
    """

    identity: re.Pattern | None
    camera: re.Pattern | None


def splits_of(
    root: Path, patterns: PathPatterns, test_fraction: float | None, seed: int | None
) -> tuple[dict[str, list[RawImage]], dict[str, dict], list[str]]:
    """Return the images, names and left-out files of the photos under a folder.

    These are {split: [RawImage, ...]}, {"identities": {name: number}, "cameras": {name: number}}
    (no cameras with --no_camera), and a line for each file or folder that is left out.
    test_fraction, seed: None where the flags are not given. Raises UserError where they are, and
    there is nothing to draw.
    """
    left_out = []
    if has_splits(root, patterns):
        for name, value in (("test_fraction", test_fraction), ("seed", seed)):
            if value is not None:
                raise UserError(
                    f"--{name}: {root} has query and gallery, so no identities for testing are "
                    "drawn; leave it out"
                )
        splits = {
            split: find_photos(root / split, patterns, left_out)
            for split in SPLITS
            if (root / split).is_dir()
        }
        left_out += [
            f"{folder}: is not train, query or gallery"
            for folder in sorted(root.iterdir())
            if folder.is_dir() and folder.name not in SPLITS
            if not is_hidden(folder.name) and not is_prepared(folder)
        ]
    else:
        test_fraction = TEST_FRACTION if test_fraction is None else test_fraction
        seed = SEED if seed is None else seed
        splits = divide(find_photos(root, patterns, left_out), test_fraction, seed, left_out)
    photos = list(itertools.chain(*splits.values()))
    warn_of_two_people(photos)
    identities = number_names({photo.identity for photo in photos})
    check_spelling(root, [name for name in identities if DIGITS.fullmatch(name)])
    if patterns.camera:
        pairs = copies(splits["query"], splits["gallery"])
        pairs = [(query, photo) for query, photo in pairs if query.identity == photo.identity]
        splits["gallery"] = without_copies(splits["gallery"], pairs, left_out)
        if not splits["gallery"]:
            raise UserError(
                f"{root}: every photo in gallery is a copy of one in query; put others there"
            )
        numbers = number_names({photo.camera for photo in photos})
        cameras = {photo.path: numbers[photo.camera] for photo in photos}
    else:
        numbers = {}
        if "train" in splits:
            splits["train"] = without_repeats(splits["train"], left_out)
        cameras = made_up_cameras(*hold_out_first(splits.get("train", [])))
        cameras |= made_up_cameras(splits["query"], splits["gallery"])
    renamed = {split: named(photos, identities, cameras) for split, photos in splits.items()}
    return renamed, {"identities": identities, "cameras": numbers}, left_out


def named(photos, identities, cameras):
    """Return the photos of a split as RawImages, sorted by their new names.

    identities: numbers by name. cameras: numbers by path.
    """
    counters, images = defaultdict(lambda: itertools.count(1)), []
    for photo in photos:
        identity = f"{identities[photo.identity]:04d}"
        shot = next(counters[identity])
        name = f"{identity}_c{cameras[photo.path]}_{shot:04d}{short_name(photo.path)}"
        images.append(RawImage(photo.path, identity, name))
    return sorted(images, key=lambda image: image.name)


def make_patterns(id_regex: str | None, camera_regex: str | None, no_camera: bool) -> PathPatterns:
    """Return the PathPatterns of the flags. Raises UserError where they name no camera."""
    if camera_regex is None and not no_camera:
        raise UserError(
            "--dataset folder: give --camera_regex, which finds the camera in the photos' paths, "
            "e.g. 'cam(\\d+)', or --no_camera"
        )
    return PathPatterns(
        id_regex and expression("--id_regex", id_regex),
        camera_regex and expression("--camera_regex", camera_regex),
    )


def expression(flag, text):
    """Compile a flag's regular expression. Raises UserError for one without a group."""
    try:
        pattern = re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(f"{flag} {text}: no regular expression ({error})") from None
    if not pattern.groups:
        raise UserError(
            f"{flag} {text}: has no group; put what it finds in brackets, e.g. 'cam(\\d+)'"
        )
    return pattern


def match_name(pattern, group, below):
    """Return what an expression's group of this name, else its first, finds in a path; or None."""
    match = pattern.search(below)
    name = match and plain(match[group if group in pattern.groupindex else 1] or "")
    return str(int(name)) if name and DIGITS.fullmatch(name) else name  # 01 and 1 are one


def has_splits(root, patterns):
    """Tell whether there are query and gallery. Raises UserError where one of them is missing.

    With --id_regex a single folder of these names may mean something else, as GRID's gallery does.
    """
    present = [split for split in SPLITS if (root / split).is_dir()]
    missing = [split for split in ("query", "gallery") if split not in present]
    if len(present) > (1 if patterns.identity else 0) and missing:
        raise UserError(f"{root / missing[0]}: no such folder, though there is {root / present[0]}")
    return not missing


def find_photos(folder, patterns, left_out):
    """Return the photos under a folder, sorted by identity, then by path.

    Adds a line to `left_out` for each other file. Raises UserError where there are none.
    """
    paths = map(Path, walk_images(folder, left_out, skip=is_prepared))
    photos = [read_photo(path, path.relative_to(folder), patterns, left_out) for path in paths]
    photos = [photo for photo in photos if photo]
    if not photos and patterns.identity:
        raise UserError(
            f"{folder}: --id_regex {patterns.identity.pattern} finds no identity in any image's "
            "path"
        )
    if not patterns.identity:
        check_homes(folder, {photo.identity for photo in photos})
    if not photos:
        raise UserError(
            f"{folder}: no folders <id> with images in them; check --download_path, or find the "
            "identities with --id_regex"
        )
    return sorted(photos, key=lambda photo: (photo.identity, photo.below))


def check_homes(folder, identities):
    """Raise UserError where a folder in `folder` has no images, or no person's name."""
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


def read_photo(path, below, patterns, left_out):
    """Return the Photo of a file; None, and a line in `left_out`, where it has no identity.

    below: the file's path relative to the folder of photos. Raises UserError without a camera.
    """
    if patterns.identity:
        below = below.as_posix()
        identity = match_name(patterns.identity, "id", below)
        if not identity:
            left_out.append(f"{path}: --id_regex finds no identity in {below}")
            return None
    elif len(below.parts) == 1:
        left_out.append(f"{path}: is in no folder <id>")
        return None
    else:
        identity, below = plain(below.parts[0]), Path(*below.parts[1:]).as_posix()
    if not patterns.camera:
        return Photo(path, identity, below, None)
    camera = match_name(patterns.camera, "camera", below)
    if not camera:
        raise UserError(
            f"{path}: --camera_regex {patterns.camera.pattern} finds no camera in {below}"
        )
    return Photo(path, identity, below, camera)


def plain(name):
    """Return a name in Unicode's usual form: macOS writes letters and their accents apart."""
    return unicodedata.normalize("NFC", name)


def holds_prepared(folder):
    """Tell whether prepare.py made a folder or one in it: it may lie beside the identities."""
    return is_prepared(folder) or any(is_prepared(below) for below in folder.glob("*/"))


def warn_of_two_people(photos):
    """Say on standard error how many pictures are of two identities, and name the first."""
    pairs = [(first, photo) for first, photo in repeats(photos) if first.identity != photo.identity]
    if pairs:
        first, photo = pairs[0]
        say(
            f"warning: {len(pairs)} pictures are of two identities: {printable(first.path)} and "
            f"{printable(photo.path)} are the same; merge these, or delete one"
        )


def repeats(photos):
    """Yield pairs of a photo and a later one with the same content, always the first such photo."""
    sizes = Counter(size_of(photo.path) for photo in photos)
    firsts = {}
    for photo in photos:
        if sizes[size_of(photo.path)] > 1:
            first = firsts.setdefault(content_hash(photo.path), photo)
            if first is not photo:
                yield first, photo


def made_up_cameras(queries, gallery):
    """Return {path: camera} for photos without cameras: QUERY_CAMERA or GALLERY_CAMERA.

    But a photo and its copies, of one identity, get a camera that only they have, which makes them
    junk for one another: finding a copy is no achievement.
    """
    cameras = {photo.path: QUERY_CAMERA for photo in queries}
    cameras |= {photo.path: GALLERY_CAMERA for photo in gallery}
    free = defaultdict(lambda: itertools.count(FIRST_OF_COPIES))
    for photo, copy in copies(queries, gallery):
        if photo.identity == copy.identity:
            own = max(cameras[photo.path], cameras[copy.path])
            if own < FIRST_OF_COPIES:
                own = next(free[photo.identity])
            cameras[photo.path] = cameras[copy.path] = own
    return cameras


def without_copies(photos, pairs, left_out):
    """Return the photos that are not the copy in a pair (photo, copy), and list those left out."""
    originals = {copy.path: photo.path for photo, copy in pairs}
    left_out += [f"{copy}: is the same picture as {path}" for copy, path in originals.items()]
    return [photo for photo in photos if photo.path not in originals]


def without_repeats(photos, left_out):
    """Return the photos without second copies of one of the same identity; list those left out.

    photos: sorted by identity.
    """
    different = []
    for _, own in itertools.groupby(photos, lambda photo: photo.identity):
        own = list(own)
        different += without_copies(own, repeats(own), left_out)
    return different


def divide(photos, test_fraction, seed, left_out):
    """Divide photos into train, query and gallery: {split: [Photo, ...]}.

    A fraction of the identities, drawn by the seed, is for testing. Raises UserError where there
    are too few identities, or none of these gives a query.
    """
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
            different = without_repeats(by_identity[name], left_out)
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
    """Choose queries among an identity's photos: the first photo of each camera.

    It is left in the gallery where a query would lose its last right answer there, that is a photo
    of another camera, or any photo where there are no cameras.
    """
    firsts = {}
    for photo in photos:
        firsts.setdefault(photo.camera, photo)
    queries = []
    for _, first in sorted(firsts.items(), key=lambda item: item[0] or ""):
        chosen = [*queries, first]
        gallery = [photo for photo in photos if photo not in chosen]
        if all(
            any(query.camera is None or query.camera != photo.camera for photo in gallery)
            for query in chosen
        ):
            queries = chosen
    return queries


def number_names(names):
    """Return {name: number}: digits keep theirs, other names get free ones from 1, in order."""
    numbers = {name: int(name) for name in names if DIGITS.fullmatch(name)}
    taken = set(numbers.values())
    free = (number for number in itertools.count(1) if number not in taken)
    numbers |= {name: next(free) for name in sorted(names - numbers.keys())}
    return {name: numbers[name] for name in sorted(names)}


def short_name(path):
    """Return `_` and a photo's own name, cut short and without characters special to shells."""
    stem = re.sub(r"[^\w.-]+", "_", path.stem).encode()[:NAME_BYTES].decode(errors="ignore")
    return f"_{stem}{path.suffix}"
