"""Write and read features in `.mat` files (MATLAB v5, reads also v7.3), as is usual for re-ID.

For each of `query` and `gallery`, and `mquery` where there are multi-query images:
    <set>_f [N, D] float32, rows L2-normalised; <set>_label [1, N]; <set>_cam [1, N]
Only our files have <set>_files, each image's path under the folder named in `data_dir`, and
`source`, what made the features, as JSON.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.io import loadmat, savemat

from reid.dataset import LARGEST_LABEL, EvalImage
from reid.errors import UserError, missing_package, say
from reid.files import parse_json, replacing
from reid.metrics import FeatureSet

MATLAB_73 = b"MATLAB 7.3"
NUMPY_STARTS = (b"PK\x03\x04", b"\x93NUMPY")  # first bytes of .npz and .npy
# Keys of a source that say of which images the features are, where things are, and how they were
# computed; the others say what made the features.
CONTEXT = ("run", "run_from_mat", "data_from_mat", "split", "images", "arithmetic")
LIMIT = 1 << 32  # bytes that a variable of MATLAB v5 can have
UNIT = 1e-5  # how far from 1 the length of a normalised row may be


class EvalSets(NamedTuple):
    """A file's content; `multi` is None without multi-query images, `data_dir` without paths.

    source: a dict of what made the features and of CONTEXT; None where another program wrote the
    file.
    """

    query: FeatureSet
    gallery: FeatureSet
    multi: FeatureSet | None = None
    data_dir: Path | None = None
    source: dict | None = None

    @property
    def made_by(self) -> dict | None:
        """Return what made the features, as `reid.features.made_by` says it."""
        if self.source is None:
            return None
        return {name: value for name, value in self.source.items() if name not in CONTEXT}


def feature_set(features: np.ndarray, entries: list[EvalImage], data_dir: Path) -> FeatureSet:
    """Return the FeatureSet of `entries` (`reid.dataset.EvalImage`s of the folder `data_dir`)."""
    return FeatureSet(
        features,
        np.array([entry.identity for entry in entries]),
        np.array([entry.camera for entry in entries]),
        np.array([entry.path.relative_to(data_dir).as_posix() for entry in entries]),
    )


def check_storable(
    path: str | Path, data_dir: Path, splits: dict[str, list[EvalImage]], dim: int
) -> None:
    """Raise UserError where a MATLAB file can't hold the features of images.

    splits: dict from name to `reid.dataset.EvalImage`s; dim: numbers in a feature.
    """
    for name, entries in splits.items():
        if 4 * dim * len(entries) >= LIMIT:
            raise UserError(
                f"{path}: a MATLAB v5 file holds 4 GB in a variable at most; the "
                f"{len(entries)} features of {name} are more"
            )
        for file in [data_dir, *(entry.path for entry in entries)]:
            try:
                str(file).encode()
            except UnicodeEncodeError:
                raise UserError(
                    f"{file}: a name that is not UTF-8, which a MATLAB file can't hold; rename it"
                ) from None


def save_mat(path: str | Path, sets: EvalSets) -> None:
    """Write EvalSets into a file."""
    content = {} if sets.data_dir is None else {"data_dir": str(sets.data_dir)}
    content |= {} if sets.source is None else {"source": json.dumps(sets.source)}
    for name, part in [("query", sets.query), ("gallery", sets.gallery), ("mquery", sets.multi)]:
        if part is None:
            continue
        content[f"{name}_f"] = part.features
        content[f"{name}_label"] = part.identities[None]
        content[f"{name}_cam"] = part.cameras[None]
        if part.files is not None:
            content[f"{name}_files"] = part.files
    with replacing(path) as temporary, open(temporary, "wb") as file:
        savemat(file, content)


def load_mat(path: str | Path) -> EvalSets:
    """Return the EvalSets of a `pytorch_result.mat`, ours or another program's.

    Raises UserError for a file that is missing or damaged, lacks a key, or contradicts itself.
    """
    content = read(path)
    query = take_set(content, "query", path)
    gallery = take_set(content, "gallery", path, query.identities)
    same_length(path, query=query, gallery=gallery)
    multi = None
    if "mquery_f" in content:
        multi = take_set(content, "mquery", path)
        same_length(path, mquery=multi, gallery=gallery)
    data_dir, source = text(content, "data_dir"), parse_source(text(content, "source"))
    if data_dir:
        data_dir = images_folder(path, data_dir, source)
    return EvalSets(query, gallery, multi, data_dir or None, source)


def images_folder(path, data_dir, source):
    """Return the folder of a file's images: relative to the file where that exists, else data_dir.

    The whole project may have been moved or copied.
    """
    relative = Path(path).resolve().parent / (source or {}).get("data_from_mat", data_dir)
    return relative if relative.is_dir() else Path(data_dir)


def load_multi(path: str | Path, gallery: FeatureSet) -> FeatureSet:
    """Return the multi-query FeatureSet of a file (`multi_query.mat`) for a gallery.

    Raises UserError as `load_mat` does, and where the features are of another length.
    """
    multi = take_set(read(path), "mquery", path)
    same_length(path, mquery=multi, gallery=gallery)
    return multi


def read(path):
    """Return the variables of a file, MATLAB v5 or v7.3: a dict of arrays."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; test.py writes it")
    with open(path, "rb") as file:
        start = file.read(len(MATLAB_73))
    if start == MATLAB_73:
        return read_hdf5(path)
    if start.startswith(NUMPY_STARTS):
        raise UserError(
            f'{path}: a NumPy file; convert it: python -c "import numpy, scipy.io; '
            "scipy.io.savemat('new.mat', dict(numpy.load('old.npz')))\", or with .npy files "
            "scipy.io.savemat('new.mat', {'query_f': numpy.load('q.npy'), ...})"
        )
    try:
        return loadmat(path)
    except Exception as error:  # SciPy raises many kinds for damaged files
        raise UserError(f"{path}: can't be read as a MATLAB file; run test.py again") from error


def read_hdf5(path):
    """Return the arrays of a MATLAB v7.3 file, where they lie transposed."""
    try:
        import h5py
    except ImportError as error:
        raise missing_package(f"{path} (MATLAB v7.3)", "h5py") from error
    try:
        with h5py.File(path) as file:
            return {name: file[name][()].T for name in file if isinstance(file[name], h5py.Dataset)}
    except Exception as error:  # h5py raises many kinds for damaged files
        raise UserError(f"{path}: can't be read as a MATLAB v7.3 file; write it again") from error


def take_set(content, name, path, people=None):
    """Take the FeatureSet `name` out of a file's variables.

    people: the queries' identities, which are no junk; None for the queries themselves.
    """
    keys = [f"{name}_f", f"{name}_label", f"{name}_cam"]
    for key in keys:
        if key not in content:
            raise UserError(f"{path}: has no {key}; write the file with test.py")
    features, identities, cameras = (content.pop(key) for key in keys)
    files = content.get(f"{name}_files")
    if not (isinstance(files, np.ndarray) and files.dtype.kind == "U"):
        files = None  # another program's, not a list of names
    for key, array in zip(keys, (features, identities, cameras), strict=True):
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
            raise UserError(f"{path}: {key} is not numbers; run test.py again")
    if people is not None:
        identities = unwrapped(identities, people, f"{path}: {keys[1]}")
    identities = whole_numbers(identities, f"{path}: {keys[1]}")
    cameras = whole_numbers(cameras, f"{path}: {keys[2]}")
    rows = len(features)
    if features.ndim != 2 or rows == 0 or len(identities) != rows or len(cameras) != rows:
        raise UserError(
            f"{path}: {keys[0]} is {' x '.join(map(str, features.shape))}, but there are "
            f"{len(identities)} labels and {len(cameras)} cameras; expected one a row"
        )
    if files is not None:
        if len(files) != rows:
            raise UserError(f"{path}: {rows} rows in {keys[0]}, but {len(files)} {name}_files")
        files = np.char.rstrip(files)  # MATLAB pads names to one length
    return FeatureSet(unit_length(features, f"{path}: {keys[0]}"), identities, cameras, files)


def unwrapped(identities, people, what):
    """Return identities with junk as -1, also where an unsigned type turned -1 into its largest.

    people: numbers that are persons'. Raises UserError where the largest may be a person's, too.
    """
    if identities.dtype.kind != "u" or not identities.size:
        return identities
    largest = np.iinfo(identities.dtype).max
    junk = identities == largest
    if not junk.any() or largest in people:
        return identities
    if identities[~junk].max(initial=0) > largest // 2:
        raise UserError(
            f"{what} has {largest}: that is -1 kept as {identities.dtype}, or a person's number; "
            "store the labels as int32"
        )
    say(f"{what}: {largest} in {identities.dtype} is read as -1, junk")
    return np.where(junk, -1, identities.astype(np.int64))


def whole_numbers(array, what):
    """Return labels [1, N] or [N, 1] of any number type as int64 [N].

    Raises UserError where they are not whole numbers up to 2^53.
    """
    if not np.isfinite(array).all() or not np.array_equal(array, np.round(array)):
        raise UserError(f"{what} has values that are not whole numbers; number the labels anew")
    if array.size and max(-float(array.min()), float(array.max())) > LARGEST_LABEL:
        raise UserError(f"{what} has values beyond 2^53; number the labels anew")
    return array.reshape(-1).astype(np.int64)


def text(content, key):
    """Return the text of a variable; "" where it is missing or no text."""
    value = content.get(key)
    has_text = isinstance(value, np.ndarray) and value.dtype.kind == "U" and value.size
    return str(value[0]) if has_text else ""


def parse_source(value):
    """Return the dict that `save_mat` wrote as source; None where it is another program's."""
    try:
        source = parse_json(value, "source", "", **dict.fromkeys(CONTEXT, str))
    except UserError:
        return None
    return source if {"run", "weights_sha256"} & source.keys() else None


def unit_length(features, what):
    """Return features [N, D] of any number type as float32 rows of length 1.

    Prints a line where they had another length. Raises UserError that names the first row without
    a direction: zeros, NaN or infinite values.
    """
    with np.errstate(over="ignore"):  # becomes infinite, which is said below
        features = np.ascontiguousarray(features, dtype=np.float32)
    length = np.sqrt(np.einsum("nd,nd->n", features, features, dtype=np.float64))
    wrong = ~np.isfinite(length) | (length == 0)
    if wrong.any():
        row = int(wrong.argmax())
        holds = "is all zeros" if length[row] == 0 else "has NaN or infinite values"
        raise UserError(
            f"{what}: row {row} (counted from 0) {holds}; {int(wrong.sum())} such rows: "
            "extract the features again"
        )
    if np.abs(length - 1).max() > UNIT:
        print(f"{what}: rows are {length.min():.4g} to {length.max():.4g} long, not 1: normalised")
        features /= length[:, None].astype(np.float32)
    return features


def same_length(path, **sets):
    """Raise UserError unless two sets' features have the same number of columns."""
    (one, a), (other, b) = sets.items()
    if a.features.shape[1] != b.features.shape[1]:
        raise UserError(
            f"{path}: {one}_f has {a.features.shape[1]} columns, "
            f"{other}_f {b.features.shape[1]}; run test.py again"
        )
