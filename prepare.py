"""Sort a raw dataset by identity, for training and testing.

    python prepare.py --download_path data/Market-1501-v15.09.15
    python prepare.py --download_path data --dataset msmt17
    python prepare.py --download_path photos --dataset folder --camera_regex 'cam(\\d+)'
    python prepare.py --download_path VIPeR --dataset folder --id_regex '/(\\d+)_' \
        --camera_regex 'cam_(.)'

Makes <download_path>/pytorch/ with a folder for each identity in
    train_all     all training images
    train, val    the same, but the first image of each identity is held out in val
    query, gallery
    multi-query   where Market-1501's gt_bbox is there: all images of the queries' identities

Takes Market-1501, DukeMTMC-reID, CUHK03-NP, MSMT17, VeRi-776, and your own photos in folders
<id>/<photos>, for which identities.json says which number is who. Without training images, only
query and gallery are made, to test on.

The table at the end counts as ids only people: of Market-1501 neither junk (-1) nor distractors
(0). Where a split is not as large as published, a warning says so.

Images are hard links: the same files under another name, so they take no room, and who edits one
edits the original. Where the file system has none they are copied; see --copy and --symlink.
"""

import shutil
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from reid.dataset import (
    IDENTITIES_FILE,
    EvalImage,
    check_cameras,
    check_copies,
    check_spelling,
    parse_name,
)
from reid.datasets import cuhk03, layouts, own_photos
from reid.datasets.layouts import PUBLISHED, STAND_IN
from reid.errors import UserError, printable, run
from reid.files import dumps, link, new_folder, read_json, symlink, write_text
from reid.images import is_image, read_image
from reid.options import Parser, rate, seed

DOWNLOAD_PATH = "data/Market-1501-v15.09.15"  # the unpacked dataset
SAVE_PATH = None  # None: <download_path>/pytorch
DATASETS = (*layouts.SIGNS, "folder")
NAMED = 3  # photos left out that are named
PUBLISHED_AS = {"train_all": "train", "query": "query", "gallery": "gallery"}


def get_parser():
    parser = Parser("Sort a raw dataset by identity.")
    parser.add_argument(
        "--download_path",
        default=DOWNLOAD_PATH,
        help="the unpacked dataset, e.g. the folder that holds bounding_box_train, or the folder "
        "above it",
    )
    parser.add_argument(
        "--save_path",
        default=SAVE_PATH,
        help="folder to make (default: <download_path>/pytorch)",
    )
    parser.add_argument(
        "--dataset",
        choices=DATASETS,
        help="which one; folder: your own photos, <id>/<photos> (default: seen from what lies "
        "there)",
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--copy",
        action="store_true",
        help="copy the images; a hard link, as made otherwise, is the same file: editing it edits "
        "the original",
    )
    how.add_argument("--symlink", action="store_true", help="make symbolic links to the images")
    parser.add_argument(
        "--variant",
        choices=cuhk03.VARIANTS,
        default="detected",
        help="of cuhk03-np: boxes of a detector, or drawn by hand; a --download_path that ends in "
        "one of these words goes before",
    )

    own = parser.add_argument_group("your own photos (--dataset folder)")
    own.add_argument(
        "--id_regex",
        help="regular expression, searched in a photo's path below --download_path (below train, "
        "query or gallery where these are there); its first group, or the group called id, is the "
        "identity (default: the first folder of the path is)",
    )
    cameras = own.add_mutually_exclusive_group()
    cameras.add_argument(
        "--camera_regex",
        help="the same for the camera: digits, or any text; searched in the path below the <id> "
        "folder, with --id_regex in the same as that; the group may be called camera (default: "
        "none, then --no_camera must be given)",
    )
    cameras.add_argument(
        "--no_camera",
        action="store_true",
        help="the photos have no cameras: queries count as camera 1 and the gallery as camera 2, "
        "so that every gallery photo of a query's identity is a right answer, but for copies of "
        "the query",
    )
    own.add_argument(
        "--test_fraction",
        type=rate,
        default=0.5,
        help="fraction of the identities for testing, where there are no folders train, query and "
        "gallery",
    )
    own.add_argument("--seed", type=seed, default=0, help="which identities these are")
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    source = Path(args.download_path)
    target = Path(args.save_path) if args.save_path else source / "pytorch"
    if not source.is_dir():
        raise UserError(f"{source}: no such folder; name the dataset with --download_path")
    dataset, root = layouts.find(source, args.dataset)
    if not args.dataset:
        print(f"{root}: {dataset} (guessed; name another with --dataset)")
    check_flags(dataset, args)
    splits, identities, left_out = find_images(dataset, root, args)
    if dataset == "folder":
        some = splits["query"][0]
        print(f"for example, {some.source} is {some.name}: number of the person, c and the camera")
    check(root, splits)
    if target.exists() and not is_empty(target):
        check_complete(target, splits, identities)
        print(f"{target}: already there and complete")
        if args.copy or args.symlink:
            flag = "--copy" if args.copy else "--symlink"
            print(f"{flag}: changes nothing of it; delete it first", file=sys.stderr)
    else:
        place = shutil.copyfile if args.copy else symlink if args.symlink else link
        make(target, splits, identities, place)
        print(f"{target}: made")
    name = published_name(dataset, root, args)
    zero_is_someone = dataset in ("msmt17", "folder")
    summarise(splits, name, zero_is_someone)
    if dataset != "msmt17":  # which counts training and testing people each from 0
        warn_of_known_people(splits, zero_is_someone)
    warn_of_single_images(splits)
    say_left_out(left_out)


def check_flags(dataset, args):
    """Raise UserError for flags that another dataset has."""
    for name in ("id_regex", "camera_regex", "no_camera"):
        if dataset != "folder" and getattr(args, name):
            raise UserError(
                f"--{name}: only for --dataset folder, and this is {dataset}; leave it out"
            )


def find_images(dataset, root, args):
    """Return the images to prepare, {split: [RawImage, ...]}, and what is left out, in words.

    Between them, for one's own photos, the numbers of identities and cameras; else None.
    """
    identities, left_out = None, []
    if dataset == "folder":
        finder = own_photos.make_finder(args.id_regex, args.camera_regex, args.no_camera)
        raw, identities, left_out = own_photos.splits_of(
            root, finder, args.test_fraction, args.seed
        )
    elif dataset == "cuhk03-np":
        raw = cuhk03.splits_of(root, cuhk03.choose_variant(root, args.variant))
    elif dataset == "msmt17":
        raw = layouts.msmt17_splits(root)
    elif dataset == "veri":
        raw = layouts.folder_splits(root, layouts.VERI_FOLDERS)
    else:
        raw = layouts.market_splits(root)
    splits = {}
    if train := raw.pop("train", None):
        validation = first_of_each_identity(train)
        held_out = {image.name for image in validation}
        splits["train_all"] = train
        splits["train"] = [image for image in train if image.name not in held_out]
        splits["val"] = validation
    return splits | raw, identities, left_out


def first_of_each_identity(images):
    """The first image, in the given order, of each identity."""
    first = {}
    for image in images:
        first.setdefault(image.identity, image)
    return list(first.values())


def relative(split, image):
    """Where in the prepared folder an image goes."""
    return Path(split, image.identity, image.name)


def check(root, splits):
    """Raise UserError where the images can't be what they are called."""
    for split, images in splits.items():
        check_spelling(f"{root}: {split}", {image.identity for image in images})
        seen = set()
        for image in images:
            if image.name in seen:
                raise UserError(f"{image.name}: twice in {split}; mend the dataset's lists")
            seen.add(image.name)
            if split in ("train_all", "query") and int(image.identity) < 0:
                raise UserError(f"{image.source}: junk in {split}; take it out")
    entries = {
        split: [
            EvalImage(image.source, *parse_name(image.name))
            for image in images
            if isinstance(image.source, Path)  # those in a larger file are the publisher's own
        ]
        for split, images in splits.items()
    }
    check_cameras(root, [image for images in entries.values() for image in images])
    check_copies(entries["query"], entries["gallery"])


def say_left_out(messages):
    """Say on standard error how many photos are left out, and which ones first."""
    if messages:
        named = "; ".join(map(printable, messages[:NAMED]))
        more = f"; and {len(messages) - NAMED} more" if len(messages) > NAMED else ""
        print(f"warning: {len(messages)} left out: {named}{more}", file=sys.stderr)


def is_empty(folder):
    """Whether this is a folder with nothing in it."""
    return folder.is_dir() and not any(folder.iterdir())


def check_complete(target, splits, identities):
    """Raise UserError unless `target` holds exactly the files to prepare."""
    wanted = {relative(split, image) for split, images in splits.items() for image in images}
    there = {
        path.relative_to(target)
        for split in splits
        for path in target.glob(f"{split}/*/*")
        if is_image(path)
    }
    if there != wanted or read_identities(target) != identities:
        raise UserError(
            f"{target}: holds something else, or was made of other images or with other flags; "
            "delete it or name another --save_path"
        )


def read_identities(target):
    """The contents of identities.json; None where there is none."""
    path = target / IDENTITIES_FILE
    return read_json(path, f"delete {target}") if path.exists() else None


def make(target, splits, identities, place):
    """Make the new folder `target`; each image is decoded once.

    place: gives an image file (first argument) its place (second).
    """
    targets = defaultdict(list)  # a training image goes to two places
    for split, images in splits.items():
        for image in images:
            targets[image.source].append(relative(split, image))

    with new_folder(target) as folder:
        for parent in {path.parent for paths in targets.values() for path in paths}:
            (folder / parent).mkdir(parents=True)
        if identities is not None:
            write_text(folder / IDENTITIES_FILE, dumps(identities))
        with ThreadPoolExecutor() as pool:
            try:
                jobs = [
                    pool.submit(place_checked, source, [folder / path for path in paths], place)
                    for source, paths in targets.items()
                ]
                for job in tqdm(jobs, desc="prepare", unit="image", disable=None):
                    job.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def place_checked(source, targets, place):
    """Put an image in its places. Raises UserError where it can't be read."""
    if isinstance(source, Path):
        read_image(source)
        for target in targets:
            place(source, target)
    else:  # within a larger file
        source.save(targets[0])
        for target in targets[1:]:
            link(targets[0], target)


def published_name(dataset, root, args):
    """What the published counts are filed under; None for a rendered set."""
    if (root / STAND_IN).exists():
        return None
    if dataset == "cuhk03-np":
        return f"{dataset} {cuhk03.choose_variant(root, args.variant)}"
    return dataset


def summarise(splits, name, zero_is_someone):
    """Print how large the splits are, beside the published counts of the dataset `name`.

    Where they differ a line on standard error says so.
    """
    published = PUBLISHED.get(name, {})
    print(f"{'split':11} {'ids':>6} {'images':>7} {'cameras':>7}")
    different = []
    for split, images in splits.items():
        counts = layouts.count(images, zero_is_someone)
        line = f"{split:11} {counts.ids:6} {counts.images:7} {counts.cameras:7}"
        expected = published.get(PUBLISHED_AS.get(split))
        if expected:
            line += f"  published: {written(expected)}"
            if any(e not in (None, c) for e, c in zip(expected, counts, strict=True)):
                different.append(split)
        print(line)
    if different:
        print(
            f"warning: {', '.join(different)}: not as large as {name} is published; "
            "is it whole, and the right one?",
            file=sys.stderr,
        )


def warn_of_known_people(splits, zero_is_someone):
    """Say on standard error which people are in training and in testing."""
    trained = {int(image.identity) for image in splits.get("train_all", [])}
    tested = {int(image.identity) for image in [*splits["query"], *splits["gallery"]]}
    both = sorted((trained & tested) - (set() if zero_is_someone else {0}))
    if both:
        print(
            f"warning: {len(both)} identities are in training and in testing, {both[0]} the first: "
            "the scores will be those of people that the network knows",
            file=sys.stderr,
        )


def warn_of_single_images(splits):
    """Say on standard error where val has the only image of an identity."""
    if "train" not in splits:
        print("warning: no training images: for testing only", file=sys.stderr)
        return
    known = {image.identity for image in splits["train"]}
    alone = sum(image.identity not in known for image in splits["val"])
    if alone:
        print(
            f"warning: {alone} training identities have one image, which is in val and not in "
            "train; train with --train_all",
            file=sys.stderr,
        )


def written(counts):
    """Published counts in words; "?": not known."""
    ids, images, cameras = ("?" if number is None else number for number in counts)
    return f"{ids} ids, {images} images, {cameras} cameras"


if __name__ == "__main__":
    run(main)
