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
    check_prepared,
    has_no_train,
    identity_folders,
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
    for split in splits:
        renumber(folders[split], data_dir / f"{split}_new", index)
    write_json(data_dir / INDEX_FILE, index)
    print(f"{data_dir / INDEX_FILE}: {len(index)} classes")


def class_index(identities):
    """Return {identity: class}, classes counted from 0 in the numerical order of identities."""
    return {identity: number for number, identity in enumerate(sorted(identities, key=int))}


def renumber(folders, target, index):
    """Link identity folders into the new folder `target`, each named after its class.

    Raises UserError where `target` is there and holds other images, by names or sizes; generated
    ones don't count.
    """
    sources = {
        Path(f"{index[folder.name]:04d}", path.name): path
        for folder in folders
        for path in list_images(folder)
    }
    if target.exists() and any(target.iterdir()):
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
        if present != sources.keys() or any(
            size_of(target / relative) != size_of(source) for relative, source in sources.items()
        ):
            raise UserError(f"{target}: holds something else; delete it and run this again")
        print(f"{target}: already there and complete")
        return
    with new_folder(target) as temporary:
        for relative, source in sources.items():
            (temporary / relative.parent).mkdir(exist_ok=True)
            put = symlink if source.is_symlink() else link
            put(source, temporary / relative)
    print(f"{target}: {len(sources)} images of {len(folders)} classes")


if __name__ == "__main__":
    run(main)
