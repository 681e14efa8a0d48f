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
    multi-query   only with Market-1501's gt_bbox: all its images of the queries' identities

Reads Market-1501, DukeMTMC-reID, CUHK03-NP, MSMT17, VeRi-776, and your own photos in folders
<id>/<photos>, whose numbers identities.json lists. Without training images, only query and gallery
are made, for testing.

The table at the end counts only people as ids: neither junk (-1) nor distractors (0) of
Market-1501. A warning names the splits that are not as large as published.

Images are hard links: the same files under another name, so they take no space, and editing one
edits the original. Where the file system has no links they are copied; see --copy and --symlink.
"""

from argparse import Namespace
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from reid.dataset import (
    GENERATED_FOLDER,
    IDENTITIES_FILE,
    STAND_IN,
    EvalImage,
    check_cameras,
    check_copies,
    check_spelling,
    parse_name,
    size_of,
)
from reid.datasets import cuhk03, layouts, own_photos
from reid.datasets.layouts import LAYOUTS, RawImage
from reid.errors import UserError, printable, run, say
from reid.files import copy, link, new_folder, read_json, symlink, write_json
from reid.images import is_image, read_image
from reid.options import Parser, rate, seed

DOWNLOAD_PATH = "data/Market-1501-v15.09.15"  # the unpacked dataset
SAVE_PATH = None  # None: <download_path>/pytorch
DATASETS = (*LAYOUTS, "folder")
NAMED = 3  # number of files left out that are named
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
        help="the dataset; folder: your own photos, <id>/<photos> (default: recognised by its "
        "files)",
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--copy",
        action="store_true",
        help="copy the images, so that editing one leaves the original alone; else they are hard "
        "links, which are the same files",
    )
    how.add_argument("--symlink", action="store_true", help="make symbolic links to the images")
    parser.add_argument(
        "--variant",
        choices=cuhk03.VARIANTS,
        help="cuhk03-np's boxes: found by a detector, or drawn by hand; a --download_path that "
        f"ends in one of these words decides instead (default: {cuhk03.VARIANTS[0]})",
    )

    own = parser.add_argument_group("your own photos (--dataset folder)")
    own.add_argument(
        "--id_regex",
        help="regular expression that finds the identity in a photo's path below --download_path "
        "(or below its train, query or gallery): the group called id, else the first group "
        "(default: the first folder of the path is the identity)",
    )
    cameras = own.add_mutually_exclusive_group()
    cameras.add_argument(
        "--camera_regex",
        help="the same for the camera, digits or any text: the group called camera, else the "
        "first group, in the path below the <id> folder, or with --id_regex in the path that it "
        "sees (default: none; then give --no_camera)",
    )
    cameras.add_argument(
        "--no_camera",
        action="store_true",
        help="the photos have no cameras: queries get camera 1 and the gallery camera 2, so that "
        "every gallery photo of a query's identity is a right answer, except copies of the query",
    )
    own.add_argument(
        "--test_fraction",
        type=rate,
        help="fraction of the identities for testing, where there are no folders query and gallery "
        f"(default: {own_photos.TEST_FRACTION})",
    )
    own.add_argument(
        "--seed",
        type=seed,
        help=f"seed that draws these identities (default: {own_photos.SEED})",
    )
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
        one = splits["query"][0]
        print(f"for example, {one.source} is {one.name}: number of the person, c and the camera")
    check(root, splits, args.no_camera)
    is_empty = target.is_dir() and not any(target.iterdir())
    if target.exists() and not is_empty:
        check_complete(target, splits, identities)
        print(f"{target}: already there and complete")
        if args.copy or args.symlink:
            flag = "--copy" if args.copy else "--symlink"
            say(f"{flag}: changes nothing of it; delete it first")
    else:
        put = copy if args.copy else symlink if args.symlink else link
        make(target, splits, identities, put)
        print(f"{target}: made")
    zero_is_person = dataset == "folder" or LAYOUTS[dataset].zero_is_person
    summarise(splits, *published_counts(dataset, root, args), zero_is_person)
    if dataset != "msmt17":  # it numbers the people of training and of testing each from 0
        warn_of_known_people(splits, zero_is_person)
    warn_of_single_images(splits)
    warn_of_lost_queries(splits)
    say_left_out(left_out)


def check_flags(dataset, args):
    """Raise UserError for flags that only another dataset has."""
    owners = dict.fromkeys("id_regex camera_regex no_camera test_fraction seed".split(), "folder")
    for name, owner in (owners | {"variant": "cuhk03-np"}).items():
        value = getattr(args, name)
        if dataset != owner and value is not None and value is not False:
            raise UserError(
                f"--{name}: only for --dataset {owner}, and this is {dataset}; leave it out"
            )


def find_images(
    dataset: str, root: Path, args: Namespace
) -> tuple[dict[str, list[RawImage]], dict | None, list[str]]:
    """Return the images to prepare, {split: [RawImage, ...]}, identities, and files left out.

    identities: the content of identities.json for own photos, else None. The files left out are a
    line of text each, also of own photos only.
    """
    identities, left_out = None, []
    if dataset == "folder":
        patterns = own_photos.make_patterns(args.id_regex, args.camera_regex, args.no_camera)
        raw, identities, left_out = own_photos.splits_of(
            root, patterns, args.test_fraction, args.seed
        )
    elif dataset == "cuhk03-np":
        raw = cuhk03.splits_of(root, cuhk03.choose_variant(root, args.variant))
    else:
        raw = LAYOUTS[dataset].splits(root)
    splits = {}
    if train := raw.pop("train", None):
        firsts, others = layouts.hold_out_first(train)
        splits = {"train_all": train, "train": others, "val": firsts}
    return splits | raw, identities, left_out


def prepared_path(split, image):
    """Return the path of an image in the prepared folder."""
    return Path(split, image.identity, image.name)


def check(root, splits, no_camera):
    """Raise UserError where the images and their names can't be right.

    no_camera: whether the cameras in the names are made up.
    """
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
            if isinstance(image.source, Path)  # images within cuhk-03.mat have no path
        ]
        for split, images in splits.items()
    }
    if not no_camera:
        check_cameras(root, [image for images in entries.values() for image in images])
    check_copies(entries["query"], entries["gallery"])


def say_left_out(messages):
    """Say on standard error how many files are left out, and name the first."""
    if messages:
        named = "; ".join(map(printable, messages[:NAMED]))
        more = f"; and {len(messages) - NAMED} more" if len(messages) > NAMED else ""
        say(f"warning: {len(messages)} left out: {named}{more}")


def check_complete(target, splits, identities):
    """Raise UserError unless `target` holds exactly the files to prepare, as large as these are."""
    wanted = {
        prepared_path(split, image): image.source
        for split, images in splits.items()
        for image in images
    }
    present = {
        path.relative_to(target)
        for split in splits
        for path in target.glob(f"{split}/*/*")
        if is_image(path)
    }
    generated = target / "train_new" / GENERATED_FOLDER
    kept = f"move {generated} out of it and " if generated.exists() else ""
    advice = f"{kept}delete {target}, or name another --save_path"
    path = target / IDENTITIES_FILE
    stored = read_json(path, advice) if path.exists() else None
    if present != wanted.keys() or stored != identities:
        raise UserError(
            f"{target}: holds something else, or was made of other images or with other flags; "
            f"{advice}"
        )
    for path, source in wanted.items():
        # A hard link shows the picture from before the raw file was replaced by another.
        if isinstance(source, Path) and size_of(target / path) != size_of(source):
            raise UserError(f"{target / path}: is another picture than {source} is now; {advice}")


def make(target, splits, identities, put):
    """Make the new folder `target`; each image is decoded once, to see that it can be.

    put: a function that links or copies the file of its first argument to its second.
    """
    targets = defaultdict(list)  # a training image goes to two splits
    for split, images in splits.items():
        for image in images:
            targets[image.source].append(prepared_path(split, image))

    with new_folder(target) as folder:
        for parent in {path.parent for paths in targets.values() for path in paths}:
            (folder / parent).mkdir(parents=True)
        if identities is not None:
            write_json(folder / IDENTITIES_FILE, identities)
        with ThreadPoolExecutor() as pool:
            try:
                jobs = [
                    pool.submit(put_checked, source, [folder / path for path in paths], put)
                    for source, paths in targets.items()
                ]
                for job in tqdm(jobs, desc="prepare", unit="image", disable=None):
                    job.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def put_checked(source, targets, put):
    """Put an image at all its targets. Raises UserError where it can't be read."""
    if isinstance(source, Path):
        read_image(source)
        for target in targets:
            put(source, target)
    else:  # stored within a larger file
        source.save(targets[0])
        for target in targets[1:]:
            link(targets[0], target)


def published_counts(dataset, root, args):
    """Return a dataset's published {split: Counts} and full name.

    There are none for own photos and for a rendered set.
    """
    if dataset == "folder" or (root / STAND_IN).exists():
        return {}, dataset
    if dataset == "cuhk03-np":
        variant = cuhk03.choose_variant(root, args.variant)
        return cuhk03.PUBLISHED[variant], f"{dataset} {variant}"
    return LAYOUTS[dataset].published, dataset


def summarise(splits, published, name, zero_is_person):
    """Print the sizes of the splits, beside the published ones.

    A line on standard error names the splits where they differ.
    """
    print(f"{'split':11} {'ids':>6} {'images':>7} {'cameras':>7}")
    different = []
    for split, images in splits.items():
        counts = layouts.count(images, zero_is_person)
        line = f"{split:11} {counts.ids:6} {counts.images:7} {counts.cameras:7}"
        expected = published.get(PUBLISHED_AS.get(split))
        if expected:
            line += f"  published: {expected}"
            if any(e not in (None, c) for e, c in zip(expected, counts, strict=True)):
                different.append(split)
        print(line)
    if different:
        say(
            f"warning: {', '.join(different)}: not as large as {name} is published; "
            "is it whole, and the right one?"
        )


def warn_of_known_people(splits, zero_is_person):
    """Say on standard error how many people are in training and in testing, and name the first."""
    trained = {int(image.identity) for image in splits.get("train_all", [])}
    tested = {int(image.identity) for image in [*splits["query"], *splits["gallery"]]}
    both = sorted((trained & tested) - (set() if zero_is_person else {0}))
    if both:
        say(
            f"warning: {len(both)} identities are in training and in testing, {both[0]} the first: "
            "the scores will be those of people that the network knows"
        )


def warn_of_single_images(splits):
    """Say on standard error how many identities have their only image in val."""
    if "train" not in splits:
        say("warning: no training images: for testing only")
        return
    known = {image.identity for image in splits["train"]}
    alone = sum(image.identity not in known for image in splits["val"])
    if alone:
        say(
            f"warning: {alone} training identities have one image, which is in val and not in "
            "train; train with --train_all"
        )


def warn_of_lost_queries(splits):
    """Say on standard error how many queries have no right answer in the gallery."""
    cameras = defaultdict(set)
    for image in splits["gallery"]:
        identity, camera = parse_name(image.name)
        cameras[identity].add(camera)
    queries = [parse_name(image.name) for image in splits["query"]]
    lost = sum(not cameras[identity] - {camera} for identity, camera in queries)
    if lost:
        say(
            f"warning: {lost} of {len(queries)} queries have no image of another camera in the "
            "gallery, or none but a copy: they can't be found"
        )


if __name__ == "__main__":
    run(main)
