"""Features in `.mat` files (MATLAB v5), as the field's codes write and read them.

For each of `query` and `gallery`, and `mquery` where there are multi-query images:
    <set>_f [N, D] float32, rows L2-normalised; <set>_label [1, N]; <set>_cam [1, N]
and, of our own, <set>_files: each image's path under the folder named in `data_dir`; `source`, what
made the features, as JSON.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.io import loadmat, savemat

from reid.errors import UserError
from reid.files import replacing

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


class TestSets(NamedTuple):
    """What a file holds; `multi` is None without multi-query images, `data_dir` without paths.

    source: a dict of what made the features (`reid.features.made_by`) and the path of its `run`;
    None in other codes' files.
    """

    query: FeatureSet
    gallery: FeatureSet
    multi: FeatureSet | None = None
    data_dir: Path | None = None
    source: dict | None = None

    __test__ = False  # no pytest class, for all its name


def feature_set(features, entries, data_dir):
    """The features of `entries` (`reid.dataset.TestImage`s of the folder `data_dir`)."""
    return FeatureSet(
        features,
        np.array([entry.identity for entry in entries]),
        np.array([entry.camera for entry in entries]),
        np.array([entry.path.relative_to(data_dir).as_posix() for entry in entries]),
    )


def save_mat(path, sets):
    """Write TestSets."""
    content = {} if sets.data_dir is None else {"data_dir": str(sets.data_dir)}
    content |= {} if sets.source is None else {"source": json.dumps(sets.source)}
    for name, found in [("query", sets.query), ("gallery", sets.gallery), ("mquery", sets.multi)]:
        if found is None:
            continue
        if found.features.nbytes >= LIMIT:
            raise UserError(
                f"{path}: a MATLAB v5 file holds 4 GB in a variable at most; the "
                f"{len(found.features)} features of {name} are more"
            )
        content[f"{name}_f"] = found.features
        content[f"{name}_label"] = found.identities[None]
        content[f"{name}_cam"] = found.cameras[None]
        if found.files is not None:
            content[f"{name}_files"] = found.files
    with replacing(path) as temporary, open(temporary, "wb") as file:
        savemat(file, content)


def load_mat(path):
    """TestSets of a `pytorch_result.mat`, ours or another code's.

    Raises UserError for a file that is missing, damaged, lacks a key, or does not add up.
    """
    content = read(path)
    query, gallery = (take_set(content, name, path) for name in ("query", "gallery"))
    same_length(path, query=query, gallery=gallery)
    multi = None
    if "mquery_f" in content:
        multi = take_set(content, "mquery", path)
        same_length(path, mquery=multi, gallery=gallery)
    data_dir, source = text(content, "data_dir"), text(content, "source")
    return TestSets(
        query, gallery, multi, data_dir and Path(data_dir), source and made_from(source)
    )


def load_multi(path, gallery):
    """The multi-query images of a file (`multi_query.mat`) that fit a gallery's features."""
    multi = take_set(read(path), "mquery", path)
    same_length(path, mquery=multi, gallery=gallery)
    return multi


def read(path):
    """The variables of a file."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; test.py writes it")
    try:
        return loadmat(path)
    except Exception as error:  # SciPy raises many kinds for damaged files
        raise UserError(f"{path}: can't be read as a MATLAB v5 file; run test.py again") from error


def take_set(content, name, path):
    """The FeatureSet `name` out of a file's variables."""
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
    for key, array in zip(keys[1:], (identities, cameras), strict=True):
        if not np.array_equal(array, np.round(array)):  # NaN is not even equal to itself
            raise UserError(f"{path}: {key} has values that are not whole numbers")
    identities, cameras = identities.reshape(-1), cameras.reshape(-1)
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
        identities.astype(np.int64),
        cameras.astype(np.int64),
        files,
    )


def text(content, key):
    """A variable that is a string, or None where there is none of that kind."""
    value = content.get(key)
    has_text = isinstance(value, np.ndarray) and value.dtype.kind == "U" and value.size
    return str(value[0]) if has_text else None


def made_from(source):
    """What `save_mat` wrote as source; None where another code means something else by it."""
    try:
        found = json.loads(source)
    except ValueError:
        return None
    return found if isinstance(found, dict) and "run" in found else None


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
