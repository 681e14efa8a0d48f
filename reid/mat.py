"""Features in `.mat` files (MATLAB v5, read also v7.3), as the field's codes write and read them.

For each of `query` and `gallery`, and `mquery` where there are multi-query images:
    <set>_f [N, D] float32, rows L2-normalised; <set>_label [1, N]; <set>_cam [1, N]
and, of our own, <set>_files: each image's path under the folder named in `data_dir`; `source`, what
made the features, as JSON.
"""

import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.io import loadmat, savemat

from reid.dataset import LARGEST_LABEL
from reid.errors import UserError, missing_package
from reid.files import parse_json, replacing

MATLAB_73 = b"MATLAB 7.3"
NUMPY_STARTS = (b"PK\x03\x04", b"\x93NUMPY")  # of .npz and .npy
LOCATIONS = (
    "run",
    "run_from_mat",
    "data_from_mat",
    "split",
)  # of a source: hints, not what made it
LIMIT = 1 << 32  # bytes that a variable of MATLAB v5 can have
UNIT = 1e-5  # how far from 1 the length of a normalised row may be


class FeatureSet(NamedTuple):
    """Features float32 [N, D], identities int [N], cameras int [N], paths [N] or None."""

    features: np.ndarray
    identities: np.ndarray
    cameras: np.ndarray
    files: np.ndarray | None = None

    def take(self, rows):
        """The FeatureSet of some rows: an index array."""
        return FeatureSet(*(None if field is None else field[rows] for field in self))


class EvalSets(NamedTuple):
    """What a file holds; `multi` is None without multi-query images, `data_dir` without paths.

    source: a dict of what made the features (`reid.features.made_by`) and the path of its `run`;
    None in other codes' files.
    """

    query: FeatureSet
    gallery: FeatureSet
    multi: FeatureSet | None = None
    data_dir: Path | None = None
    source: dict | None = None


def feature_set(features, entries, data_dir):
    """The features of `entries` (`reid.dataset.EvalImage`s of the folder `data_dir`)."""
    return FeatureSet(
        features,
        np.array([entry.identity for entry in entries]),
        np.array([entry.camera for entry in entries]),
        np.array([entry.path.relative_to(data_dir).as_posix() for entry in entries]),
    )


def check_storable(path, data_dir, splits, dim):
    """Raise UserError where a MATLAB file can't hold the features of images.

    splits: {name: `reid.dataset.EvalImage`s}; dim: numbers in a feature.
    """
    for name, entries in splits.items():
        if 4 * dim * len(entries) >= LIMIT:
            raise UserError(
                f"{path}: a MATLAB v5 file holds 4 GB in a variable at most; the "
                f"{len(entries)} features of {name} are more"
            )
        for place in [data_dir, *(entry.path for entry in entries)]:
            try:
                str(place).encode()
            except UnicodeEncodeError:
                raise UserError(
                    f"{place}: a name that is not UTF-8, which a MATLAB file can't hold; rename it"
                ) from None


def save_mat(path, sets):
    """Write EvalSets."""
    content = {} if sets.data_dir is None else {"data_dir": str(sets.data_dir)}
    content |= {} if sets.source is None else {"source": json.dumps(sets.source)}
    for name, found in [("query", sets.query), ("gallery", sets.gallery), ("mquery", sets.multi)]:
        if found is None:
            continue
        content[f"{name}_f"] = found.features
        content[f"{name}_label"] = found.identities[None]
        content[f"{name}_cam"] = found.cameras[None]
        if found.files is not None:
            content[f"{name}_files"] = found.files
    with replacing(path) as temporary, open(temporary, "wb") as file:
        savemat(file, content)


def load_mat(path):
    """EvalSets of a `pytorch_result.mat`, ours or another code's.

    Raises UserError for a file that is missing, damaged, lacks a key, or does not add up.
    """
    content = read(path)
    query = take_set(content, "query", path)
    gallery = take_set(content, "gallery", path, query.identities)
    same_length(path, query=query, gallery=gallery)
    multi = None
    if "mquery_f" in content:
        multi = take_set(content, "mquery", path)
        same_length(path, mquery=multi, gallery=gallery)
    data_dir, source = text(content, "data_dir"), text(content, "source")
    source = source and made_from(source)
    return EvalSets(
        query, gallery, multi, data_dir and images_place(path, data_dir, source), source
    )


def images_place(path, data_dir, source):
    """The folder of a file's images: as seen from the file, where that is there, else `data_dir`.

    The whole project may have been moved or copied.
    """
    beside = Path(path).resolve().parent / (source or {}).get("data_from_mat", data_dir)
    return beside if beside.is_dir() else Path(data_dir)


def load_multi(path, gallery):
    """The multi-query images of a file (`multi_query.mat`) that fit a gallery's features."""
    multi = take_set(read(path), "mquery", path)
    same_length(path, mquery=multi, gallery=gallery)
    return multi


def read(path):
    """The variables of a file, MATLAB v5 or v7.3."""
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
    """The variables of a MATLAB v7.3 file that are numbers; these lie there transposed."""
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
    """The FeatureSet `name` out of a file's variables.

    people: the queries' identities, among which junk is none; None for queries.
    """
    keys = [f"{name}_f", f"{name}_label", f"{name}_cam"]
    for key in keys:
        if key not in content:
            raise UserError(f"{path}: has no {key}; write the file with test.py")
    features, identities, cameras = (content.pop(key) for key in keys)
    files = content.get(f"{name}_files")
    if not (isinstance(files, np.ndarray) and files.dtype.kind == "U"):
        files = None  # another code's, not a list of names
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
    return FeatureSet(
        unit_length(features, f"{path}: {keys[0]}"),
        identities,
        cameras,
        files,
    )


def unwrapped(identities, people, what):
    """Identities in which junk, -1, is -1 again where an unsigned type has made its largest of it.

    people: numbers that are persons'. Raises UserError where that may as well be one.
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
    print(f"{what}: {largest} in {identities.dtype} is read as -1, junk", file=sys.stderr)
    return np.where(junk, -1, identities.astype(np.int64))


def whole_numbers(array, what):
    """Labels [1, N] or [N, 1] of any number type as int64 [N]. Raises UserError for others."""
    if not np.isfinite(array).all() or not np.array_equal(array, np.round(array)):
        raise UserError(f"{what} has values that are not whole numbers")
    if array.size and max(-float(array.min()), float(array.max())) > LARGEST_LABEL:
        raise UserError(f"{what} has values beyond 2^53; number the labels anew")
    return array.reshape(-1).astype(np.int64)


def text(content, key):
    """A variable that is a string, or None where there is none of that kind."""
    value = content.get(key)
    has_text = isinstance(value, np.ndarray) and value.dtype.kind == "U" and value.size
    return str(value[0]) if has_text else None


def made_from(source):
    """What `save_mat` wrote as source; None where another code means something else by it."""
    try:
        found = parse_json(source, "source", "", **dict.fromkeys(LOCATIONS, str))
    except UserError:
        return None
    return found if "run" in found else None


def unit_length(features, what):
    """Features [N, D] of any float type as float32 rows of length 1; says so where they were not.

    Raises UserError that names the first row without a direction: zeros, NaN or infinite values.
    """
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
