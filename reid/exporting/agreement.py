"""The comparison of an exported file with PyTorch: the same features, the same rankings, scores."""

from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from reid.checkpoint import Trained
from reid.dataset import EvalImage
from reid.exporting.network import network_input, transform_of
from reid.features import ImageModel, view_features
from reid.mat import feature_set
from reid.metrics import evaluate, similarity_blocks

# Similarities closer than this have no order. Pixels that differ by 1 of 255, since another resize
# rounds otherwise, move similarities by a few 1e-5.
TIES = {"outside": 1e-5, "inside": 1e-4}
LEAST_COSINE = 0.9999  # of a file in fp32 with PyTorch


class Eager(ImageModel):
    """The network as it was trained, in fp32, not folded: the reference for a file.

    trained: `reid.checkpoint.Trained`.
    """

    def __init__(self, trained: Trained):
        self.net, self.layer = trained.net.eval(), trained.layer
        self.dim = trained.net.dim(trained.layer)
        self.to_input = trained.transform.resize

    @torch.inference_mode()
    def of_batch(self, batch: list[np.ndarray]) -> np.ndarray:
        """Return the features float32 [B, D] of resized images, a list of uint8 [H, W, 3]."""
        images = torch.from_numpy(np.stack(batch))
        return view_features(self.net, images, None, self.layer).numpy()


class File(ImageModel):
    """An exported network as other programs use it.

    compute: function of an input array [N, ...] to features [N, D]; facts: the file's `metadata`.
    """

    def __init__(self, compute: Callable, facts: dict):
        self.compute, self.facts, self.dim = compute, facts, int(facts["dim"])
        self.inside = facts["preprocess"] == "inside"
        self.resize = transform_of(facts).resize

    def to_input(self, image: Image.Image) -> np.ndarray:
        """Convert a PIL image to uint8 [h, w, 3]; resized, unless the network does that."""
        return np.array(image) if self.inside else self.resize(image)

    def of_batch(self, batch: list[np.ndarray]) -> np.ndarray:
        """Return the features float32 [B, D] of a list of inputs."""
        if self.inside:  # images of one size at a time
            groups = (np.stack(list(some)) for _, some in groupby(batch, key=np.shape))
            return np.concatenate([self.compute(images) for images in groups])
        return self.compute(network_input(batch, self.facts))


def spread_out(entries: list, count: int) -> list:
    """Return `count` items of a list, evenly spaced; all where there are not more."""
    count = min(count, len(entries))
    return [entries[n * len(entries) // count] for n in range(count)]


def agreement(expected: np.ndarray, exported: np.ndarray, queries: int, tie: float) -> dict:
    """Measure how far features [N, D] agree with the expected ones; returns a dict.

    The first `queries` rows are queries, which rank the others. A pair of gallery images counts as
    swapped where a query's expected similarities to both differ by more than `tie` and those of
    the exported features are the other way round.
    """
    cosines = (expected * exported).sum(axis=1)
    both = [features[:queries] @ features[queries:].T for features in (expected, exported)]
    pairs = swapped = same_first = 0
    for before, after in zip(*both, strict=True):
        ordered = before[:, None] - before > tie
        pairs += int(ordered.sum())
        swapped += int((ordered & (after[:, None] < after)).sum())
        same_first += int(before[after.argmax()] >= before.max() - tie)
    return {
        "images": len(expected),
        "cosine_min": float(cosines.min()),
        "cosine_median": float(np.median(cosines)),
        "queries": queries,
        "gallery": len(expected) - queries,
        "tie": tie,
        "pairs": pairs,
        "swapped_pairs": swapped,
        "same_first": same_first,
    }


def agrees(measured: dict) -> bool:
    """Tell whether an `agreement` is what fp32 must reach. False where a feature is no number."""
    return measured["cosine_min"] > LEAST_COSINE and measured["swapped_pairs"] == 0


def accuracy(
    model: ImageModel, query: list[EvalImage], gallery: list[EvalImage], data_dir: Path, label: str
) -> dict:
    """Return Rank@1 and mAP of a model on lists of `reid.dataset.EvalImage`, as a dict."""
    sets = []
    for name, entries in (("query", query), ("gallery", gallery)):
        features = model([entry.path for entry in entries], f"{label}, {name}")
        sets.append(feature_set(features, entries, data_dir))
    scores = evaluate(similarity_blocks(*sets), *sets)
    return {"rank1": scores.rank(1), "mAP": scores.mean_ap()}
