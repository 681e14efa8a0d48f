"""Number the training identities 0..K-1, as a classifier needs them.

    python changeIndex.py --data_dir data/Market-1501-v15.09.15/pytorch

Makes train_new, train_all_new and val_new from train, train_all and val, with folders named after
classes, and class_index.json ({"0002": 0, ...}). All come from one sorted list of identities, so
that a number means the same person everywhere.

Images become hard links, or copies where the file system has none; symbolic links stay such links.
"""

from pathlib import Path

from reid.dataset import (
    GENERATED_FOLDER,
    check_filed,
    check_prepared,
    has_no_train,
    identity_folders,
    identity_in_name,
    list_images,
    size_of,
)
from reid.errors import UserError, run, say
from reid.files import link, new_folder, symlink, write_json
from reid.images import is_hidden, is_image
from reid.options import Parser

DATA_DIR = "data/Market-1501-v15.09.15/pytorch"  # made by prepare.py
SPLITS = ("train", "train_all", "val")
INDEX_FILE = "class_index.json"


def get_parser():
    parser = Parser("Number the training identities 0..K-1.")
    parser.add_argument(
        "--data_dir", default=DATA_DIR, help="the `pytorch` folder that prepare.py made"
    )
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    data_dir = Path(args.data_dir)
    check_prepared(data_dir)
    splits = SPLITS
    if has_no_train(data_dir):
        splits = ("train_all", "val")
        say("warning: no train, since each identity has one image, in val; train with --train_all")
    folders = {split: identity_folders(data_dir / split) for split in splits}
    if int(folders["train_all"][0].name) < 0:
        raise UserError(f"{folders['train_all'][0]}: junk among the training images; take it out")
    index = class_index(folder.name for folder in folders["train_all"])
    for split in splits:
        unknown = [folder for folder in folders[split] if folder.name not in index]
        if unknown:
            raise UserError(f"{unknown[0]}: identity not in train_all; run prepare.py again")
    wanted = {data_dir / f"{split}_new": linked(folders[split], index) for split in splits}
    there = {target: is_complete(target, images) for target, images in wanted.items()}
    for target, images in wanted.items():
        if there[target]:
            print(f"{target}: already there and complete")
        else:
            make(target, images)
    write_json(data_dir / INDEX_FILE, index)
    print(f"{data_dir / INDEX_FILE}: {len(index)} classes")


def class_index(identities):
    """Return {identity: class}, classes counted from 0 in the numerical order of identities."""
    return {identity: number for number, identity in enumerate(sorted(identities, key=int))}


def linked(folders, index):
    """Return {path below a new folder, which is named after the class: image} of identity folders.

    Raises UserError where an image lies in another identity's folder.
    """
    images = {}
    for folder in folders:
        for path in list_images(folder):
            check_filed(path, identity_in_name(path))
            images[Path(f"{index[folder.name]:04d}", path.name)] = path
    return images


def is_complete(target, images):
    """Tell whether a folder is there with these images, by names and sizes; False where it is not.

    Raises UserError where it holds others; generated ones don't count.
    """
    if not target.exists() or not any(target.iterdir()):
        return False
    present = {
        path.relative_to(target)
        for path in target.glob("*/*")
        if is_image(path)
        and path.parent.name != GENERATED_FOLDER
        and not is_hidden(path.parent.name)  # resizeImage.py may be writing there
    }
    generated = target / GENERATED_FOLDER
    if not present and generated.exists():  # generated before the classes were numbered
        raise UserError(f"{generated}: move it away, run this again, and move it back")
    if present != images.keys() or any(
        size_of(target / relative) != size_of(source) for relative, source in images.items()
    ):
        kept = f"move {generated} out of it, " if generated.exists() else ""
        raise UserError(f"{target}: holds something else; {kept}delete it and run this again")
    return True


def make(target, images):
    """Link images into a new folder: {path below it: image}."""
    with new_folder(target) as temporary:
        for relative, source in images.items():
            (temporary / relative.parent).mkdir(exist_ok=True)
            put = symlink if source.is_symlink() else link
            put(source, temporary / relative)
    classes = {relative.parent for relative in images}
    print(f"{target}: {len(images)} images of {len(classes)} classes")


if __name__ == "__main__":
    run(main)
