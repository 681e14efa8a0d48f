"""Sort a raw Market-1501 folder by identity, for training and testing.

    python prepare.py --download_path data/Market-1501-v15.09.15

Makes <download_path>/pytorch/ with a folder for each identity in
    train_all     all training images
    train, val    the same, but the first image of each identity is held out in val
    query, gallery
    multi-query   where gt_bbox is there: all images of the queries' identities

Also takes DukeMTMC-reID, whose folders have the same names.
"""

import shutil
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from reid.dataset import is_image, list_images, parse_name, read_image
from reid.errors import UserError, run
from reid.files import new_folder
from reid.options import Parser

DOWNLOAD_PATH = "data/Market-1501-v15.09.15"  # the unpacked dataset
SAVE_PATH = None  # None: <download_path>/pytorch


def get_parser():
    parser = Parser("Sort a raw Market-1501 folder by identity.")
    parser.add_argument(
        "--download_path",
        default=DOWNLOAD_PATH,
        help="the unpacked dataset: the folder that holds bounding_box_train",
    )
    parser.add_argument(
        "--save_path",
        default=SAVE_PATH,
        help="folder to make (default: <download_path>/pytorch)",
    )
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    source = Path(args.download_path)
    target = Path(args.save_path) if args.save_path else source / "pytorch"
    if not source.is_dir():
        raise UserError(f"{source}: no such folder; name the dataset with --download_path")
    splits = plan(source)
    copies = {
        Path(name, identity_name(path), path.name): path
        for name, paths in splits.items()
        for path in paths
    }
    if target.exists():
        check_complete(target, copies, splits)
        print(f"{target}: already there and complete")
    else:
        copy_checked(copies, target)
    for name, paths in splits.items():
        identities = {identity_name(path) for path in paths}
        print(f"{name:12} {len(paths):6} images of {len(identities):4} identities")


def plan(source):
    """Which raw images go into which split: {split: [path, ...]}, each sorted by name."""
    train = list_images(source / "bounding_box_train")
    validation = first_of_each_identity(train)
    held_out = set(validation)
    splits = {
        "train_all": train,
        "train": [path for path in train if path not in held_out],
        "val": validation,
        "query": list_images(source / "query"),
        "gallery": list_images(source / "bounding_box_test"),
    }
    if (source / "gt_bbox").is_dir():
        asked = {identity_name(path) for path in splits["query"]}
        boxes = list_images(source / "gt_bbox")
        splits["multi-query"] = [path for path in boxes if identity_name(path) in asked]
    return splits


def identity_name(path):
    """The identity as the file's name writes it, leading zeros kept: "0002"."""
    parse_name(path)
    return path.name.split("_")[0]


def first_of_each_identity(paths):
    """The first path, in the given order, of each identity."""
    first = {}
    for path in paths:
        first.setdefault(identity_name(path), path)
    return list(first.values())


def check_complete(target, copies, splits):
    """Raise UserError unless `target` holds exactly the planned files."""
    there = {
        path.relative_to(target)
        for name in splits
        for path in target.glob(f"{name}/*/*")
        if is_image(path)
    }
    if there != set(copies):
        raise UserError(f"{target}: holds something else; delete it or name another --save_path")


def copy_checked(copies, target):
    """Copy {relative target: source} into the new folder `target`, each image decoded once."""

    targets = defaultdict(list)  # a training image goes to two places, but is decoded once
    for relative, source in copies.items():
        targets[source].append(relative)

    def copy(folder, source):
        read_image(source)
        for relative in targets[source]:
            shutil.copyfile(source, folder / relative)

    with new_folder(target) as folder:
        for parent in {relative.parent for relative in copies}:
            (folder / parent).mkdir(parents=True)
        with ThreadPoolExecutor() as pool:
            jobs = [pool.submit(copy, folder, source) for source in targets]
            try:
                for job in tqdm(jobs, desc="prepare", unit="image", disable=None):
                    job.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


if __name__ == "__main__":
    run(main)
