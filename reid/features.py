"""Features of images: extraction with a trained network, and the `.mat` files they travel in."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.io import loadmat, savemat
from tqdm import tqdm

from reid.device import autocast, to_device
from reid.errors import UserError
from reid.files import replacing


class FeatureSet(NamedTuple):
    """Features float32 [N, D], identities int [N], cameras int [N]: a query set or a gallery."""

    features: np.ndarray
    identities: np.ndarray
    cameras: np.ndarray


@torch.inference_mode()
def extract(net, loader, device, dtype, label):
    """L2-normalised features of a loader's images, float32 [N, D], in the loader's order.

    The features of an image and of its mirror image are added before normalising. `label` names
    the progress bar; `dtype` is autocast's, see `reid.device.arithmetic`.
    """
    net.eval()
    features = []
    with tqdm(total=len(loader.dataset), desc=label, unit="image", disable=None) as bar:
        for images, *_ in loader:
            images = to_device(images, device)
            with autocast(device, dtype):
                both = [net(view, return_features=True) for view in (images, images.flip(3))]
            both = both[0].float() + both[1].float()
            features.append(F.normalize(both).cpu())
            bar.update(len(images))
    return torch.cat(features).numpy()


def feature_set(features, entries):
    """The features of `entries` (`reid.dataset.TestImage`) with their identities and cameras."""
    return FeatureSet(
        features,
        np.array([entry.identity for entry in entries]),
        np.array([entry.camera for entry in entries]),
    )


def save_mat(path, **sets):
    """Write FeatureSets as `<name>_f`, `<name>_label`, `<name>_cam`: `save_mat(p, query=q, ...)`.

    MATLAB v5; features [N, D], labels and cameras [1, N], as the field's codes write and read it.
    """
    content = {}
    for name, feature_set in sets.items():
        content[f"{name}_f"] = feature_set.features
        content[f"{name}_label"] = feature_set.identities[None]
        content[f"{name}_cam"] = feature_set.cameras[None]
    with replacing(path) as temporary, open(temporary, "wb") as file:
        savemat(file, content)


def load_mat(path):
    """Query set and gallery of a `pytorch_result.mat`, ours or another code's.

    Raises UserError for a file that is missing, damaged, lacks a key, or does not add up.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; test.py writes it")
    try:
        content = loadmat(path)
    except Exception as error:  # SciPy raises many kinds for damaged files
        raise UserError(f"{path}: can't be read as a MATLAB v5 file; run test.py again") from error
    query, gallery = (_feature_set(content, name, path) for name in ("query", "gallery"))
    if query.features.shape[1] != gallery.features.shape[1]:
        raise UserError(
            f"{path}: query_f has {query.features.shape[1]} columns, "
            f"gallery_f {gallery.features.shape[1]}; run test.py again"
        )
    return query, gallery


def _feature_set(content, name, path):
    keys = [f"{name}_f", f"{name}_label", f"{name}_cam"]
    for key in keys:
        if key not in content:
            raise UserError(f"{path}: has no {key}; write the file with test.py")
    features, identities, cameras = (content[key] for key in keys)
    identities, cameras = identities.reshape(-1), cameras.reshape(-1)
    rows = len(features)
    if features.ndim != 2 or rows == 0 or len(identities) != rows or len(cameras) != rows:
        raise UserError(
            f"{path}: {keys[0]} is {' x '.join(map(str, features.shape))}, but there are "
            f"{len(identities)} labels and {len(cameras)} cameras; expected one a row"
        )
    return FeatureSet(
        features.astype(np.float32), identities.astype(np.int64), cameras.astype(np.int64)
    )
