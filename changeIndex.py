"""Number the training identities 0..K-1, as a classifier needs them.

    python changeIndex.py --data_dir data/Market-1501-v15.09.15/pytorch

From train, train_all and val makes train_new, train_all_new and val_new, whose folders are class
numbers, and class_index.json ({"0002": 0, ...}). All come from one sorted list of identities, so
that a number means the same person everywhere.

Images are linked as prepare.py does it: hard links, copies where the file system has none, and
symbolic links of symbolic links.
"""

from pathlib import Path

from reid.dataset import GENERATED_FOLDER, identity_folders, list_images
from reid.errors import UserError, run
from reid.files import link, new_folder, symlink, write_json
from reid.images import is_hidden, is_image
from reid.options import Parser

DATA_DIR = "data/Market-1501-v15.09.15/pytorch"  # what prepare.py made
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
    if not data_dir.is_dir():
        raise UserError(f"{data_dir}: no such folder; name the prepared dataset with --data_dir")
    folders = {split: identity_folders(data_dir / split) for split in SPLITS}
    if int(folders["train_all"][0].name) < 0:
        raise UserError(f"{folders['train_all'][0]}: junk among the training images; take it out")
    index = class_index(folder.name for folder in folders["train_all"])
    for split in SPLITS:
        unknown = [folder for folder in folders[split] if folder.name not in index]
        if unknown:
            raise UserError(f"{unknown[0]}: identity not in train_all; run prepare.py again")
    for split in SPLITS:
        renumber(folders[split], data_dir / f"{split}_new", index)
    write_json(data_dir / INDEX_FILE, index)
    print(f"{data_dir / INDEX_FILE}: {len(index)} classes")


def class_index(identities):
    """{identity: class}, classes counted from 0 in the numerical order of the identities."""
    ordered = sorted(identities, key=lambda name: (int(name), name))
    return {identity: number for number, identity in enumerate(ordered)}


def class_folder(number):
    """Name of a class's folder, padded so that names sort as numbers do."""
    return f"{number:04d}"


def renumber(folders, target, index):
    """Link identity folders into the new folder `target`, each named after its class."""
    copies = {
        Path(class_folder(index[folder.name]), path.name): path
        for folder in folders
        for path in list_images(folder)
    }
    if target.exists():
        there = {path.relative_to(target) for path in target.glob("*/*") if is_image(path)}
        others = {path for path in there if is_hidden(path.parts[0])}  # of resizeImage.py at work
        there -= others | {path for path in there if path.parts[0] == GENERATED_FOLDER}
        if there != set(copies):
            raise UserError(f"{target}: holds something else; delete it and run this again")
        print(f"{target}: already there and complete")
        return
    with new_folder(target) as temporary:
        for relative, source in copies.items():
            (temporary / relative.parent).mkdir(exist_ok=True)
            place = symlink if source.is_symlink() else link
            place(source, temporary / relative)
    print(f"{target}: {len(copies)} images of {len(folders)} classes")


if __name__ == "__main__":
    run(main)
