"""CUHK03 with its new protocol (CUHK03-NP; Zhong et al. 2017), in any of its forms.

    {detected,labeled}/{bounding_box_train,bounding_box_test,query}    as Market-1501
    cuhk03_new_protocol_config_{detected,labeled}.mat                  the protocol, with either
        images_{detected,labeled}/1_001_1_01.png                       a folder of images
        cuhk-03.mat                                                    or the release itself

An image's name has the camera pair, the person in it, the view (1 or 2), and the image's number of
the person's ten. As usual in this protocol, the view is the camera: there are two.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from reid.datasets.layouts import MARKET_FOLDERS, Counts, RawImage, folder_splits
from reid.errors import UserError, missing_package
from reid.files import encoded

VARIANTS = ("detected", "labeled")  # boxes of a detector, as is usual, or drawn by hand
NAME = re.compile(r"\d+_\d+_(?P<view>[12])_\d+\.png")
PUBLISHED = {  # Zhong et al. 2017
    "detected": {
        "train": Counts(767, 7365, 2),
        "query": Counts(700, 1400, 2),
        "gallery": Counts(700, 5332, 2),
    },
    "labeled": {
        "train": Counts(767, 7368, 2),
        "query": Counts(700, 1400, 2),
        "gallery": Counts(700, 5328, 2),
    },
}
SPLITS = {"train": "train_idx", "query": "query_idx", "gallery": "gallery_idx"}


@dataclass(eq=False)
class StoredImage:
    """An image in cuhk-03.mat: an h5py.File and a reference to a uint8 array [3, W, H] in it."""

    file: object
    reference: object
    name: str

    def save(self, path: Path) -> None:
        """Write the image as a PNG. Raises UserError where it is no image."""
        try:
            # MATLAB stores columns first, so h5py gives the axes in reverse order.
            image = Image.fromarray(np.ascontiguousarray(self.file[self.reference][()].T))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{self.file.filename}: {self.name} is no image ({error})") from error
        path.write_bytes(encoded(lambda file: image.save(file, "PNG")))


def choose_variant(root: Path, variant: str | None) -> str:
    """Return the variant that the folder `root` is named after, else `variant`, else the usual."""
    name = root.resolve().name
    return name if name in VARIANTS and has_folders(root) else variant or VARIANTS[0]


def has_folders(root):
    """Tell whether `root` holds the form with Market-1501's folders, or some of them."""
    return any((root / folder).is_dir() for folder in MARKET_FOLDERS.values())


def splits_of(root: Path, variant: str) -> dict[str, list[RawImage]]:
    """Return the images of a variant, {split: [RawImage, ...]}, sorted by name."""
    if has_folders(root):
        return folder_splits(root, MARKET_FOLDERS)
    config = root / f"cuhk03_new_protocol_config_{variant}.mat"
    if has_folders(root / variant):
        return folder_splits(root / variant, MARKET_FOLDERS)
    if not config.is_file():
        raise UserError(
            f"{root / variant / MARKET_FOLDERS['train']}: no such folder, nor {config.name} above; "
            "check --download_path and --variant"
        )
    images = find_images(root, variant)
    splits = {split: [] for split in SPLITS}
    for split, name, label in read_protocol(config):
        if name not in images:
            raise UserError(f"{config}: lists {name}, which is not among the {variant} images")
        view = NAME.fullmatch(name)["view"]
        prepared_name = f"{label:04d}_c{view}_{name}"
        splits[split].append(RawImage(images[name], f"{label:04d}", prepared_name))
    return {split: sorted(images, key=lambda image: image.name) for split, images in splits.items()}


def read_protocol(path):
    """Return (split, name, label) of each image that the protocol uses.

    Raises UserError where the file is no such protocol.
    """
    from scipy.io import loadmat

    try:
        content = loadmat(path)
        names = [str(np.squeeze(name)) for name in content["filelist"].ravel()]
        labels = content["labels"].ravel().astype(int).tolist()
        members = {split: content[key].ravel().astype(int) for split, key in SPLITS.items()}
    except Exception as error:  # scipy raises many kinds for damaged files
        raise UserError(f"{path}: can't be read as CUHK03's protocol ({error})") from error
    wrong = next((name for name in names if not NAME.fullmatch(name)), None)
    if wrong:
        raise UserError(f"{path}: filelist has {wrong}; expected names like 1_001_1_01.png")
    if len(labels) != len(names):
        raise UserError(f"{path}: {len(names)} names, but {len(labels)} labels")
    for split, numbers in members.items():
        if not numbers.size or numbers.min() < 1 or numbers.max() > len(names):
            raise UserError(f"{path}: {SPLITS[split]} is not within 1 to {len(names)}")
    return [
        (split, names[number - 1], labels[number - 1])  # MATLAB counts from 1
        for split, numbers in members.items()
        for number in numbers
    ]


def find_images(root: Path, variant: str) -> dict:
    """Return {name: path or StoredImage} of a variant, from a folder or from cuhk-03.mat."""
    folders = [root, root / variant, root / "cuhk03_release"]
    for folder in folders:
        images = folder / f"images_{variant}"
        if images.is_dir():
            return {path.name: path for path in images.glob("*.png")}
    for folder in folders:
        if (folder / "cuhk-03.mat").is_file():
            return read_release(folder / "cuhk-03.mat", variant)
    raise UserError(
        f"{root}: no images_{variant} and no cuhk-03.mat; put one there, beside the protocol"
    )


def read_release(path, variant):
    """Return {name: StoredImage} of cuhk-03.mat, a file of MATLAB v7.3, which is HDF5.

    `detected` and `labeled` hold five camera pairs, each an array [persons, 10] of images: the
    first five of view 1, the others of view 2. Missing images are empty, but count in the names:
    1_001_2_06.png is the first of view 2. Raises UserError where the file is no such release.
    """
    try:
        import h5py
    except ImportError as error:
        raise missing_package(path, "h5py") from error
    images = {}
    try:
        file = h5py.File(path)
        for pair, persons in enumerate(file[variant][()].ravel(), 1):
            for person, shots in enumerate(file[persons][()].T, 1):
                for number, shot in enumerate(shots, 1):
                    if file[shot].ndim == 3:
                        view = 1 if number <= 5 else 2
                        name = f"{pair}_{person:03d}_{view}_{number:02d}.png"
                        images[name] = StoredImage(file, shot, name)
    except Exception as error:  # h5py raises many kinds for damaged files
        raise UserError(f"{path}: can't be read as CUHK03's release ({error})") from error
    return images
