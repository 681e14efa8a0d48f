"""A trained network as one file that runs without this code, and whether it computes the same.

Here: what a file computes, what it says of itself, torch.export's format, the comparison with
PyTorch. `reid.onnx_export` has the ONNX format, `reid.quantisation` its int8 (both need packages
that nothing else here does).
"""

import io
import json
import logging
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from reid.features import view_features
from reid.files import sha256
from reid.images import read_image
from reid.inference import frozen
from reid.mat import feature_set
from reid.metrics import evaluate, similarity_blocks
from reid.provenance import provenance, version
from reid.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    EvalTransform,
    enlarged,
    normalise,
    test_transform,
    to_array,
)

BATCH = 32  # images that are compared at a time
# Similarities closer than this have no order. Pixels that differ by 1 of 255, since another resize
# rounds otherwise, move similarities by a few 1e-5.
TIES = {"outside": 1e-5, "inside": 1e-4}
LEAST_COSINE = 0.9999  # of a file in fp32 with PyTorch
INPUT, OUTPUT = "images", "features"  # what a file calls them
METADATA = "metadata.json"  # in a .pt2 file
READERS = 4  # threads that decode images
ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")


class FeatureExtractor(nn.Module):
    """Images to the features that test.py stores: what an exported file computes.

    net: a trained network; it is made ready for inference in place. layer: see
    `model.ReIDNet.forward`. half: whether to compute in fp16, up to the pooling. size: height and
    width of the images in the network, to take in bytes of any size; None: they come resized and
    normalised.
    """

    def __init__(self, net, layer, half=False, size=None):
        super().__init__()
        self.net, self.layer, self.size = frozen(without_the_rest(net, layer)), layer, size
        self.dtype = torch.float16 if half else torch.float32
        if half:
            halve(self.net)
        self.eval()

    def forward(self, images):
        """float32 [N, 3, H, W], or uint8 [N, h, w, 3], to L2-normalised float32 [N, D]."""
        if self.size:
            images = normalise(resized(images, *self.size))
        views = torch.cat([images, images.flip(3)]).to(self.dtype)
        features = self.net(views, return_features=True, layer=self.layer)
        number = images.shape[0]
        return F.normalize(features[:number] + features[number:])


def halve(net):
    """Have a network compute in fp16 up to its pooling, from there on in fp32, in place."""
    net.half()
    net.model.fc.float()
    net.pooling = nn.Sequential(ToFloat(), net.pooling.float())


class ToFloat(nn.Module):
    """Numbers of any precision as fp32."""

    def forward(self, numbers):
        return numbers.float()


def without_the_rest(net, layer):
    """A network without the weights that its features don't need, in place."""
    net.classifier = nn.Identity()
    if net.test_layer(layer) == "pool":
        net.model.fc = nn.Identity()
    if hasattr(net.model, "classifier"):  # DenseNet's own, never used
        net.model.classifier = nn.Identity()
    return net


def resized(images, height, width):
    """uint8 [N, h, w, 3] to [N, height, width, 3], within 1/255 of Pillow's.

    Pillow resizes the width first, or the height where that is less to do and images get lower,
    and rounds in between. An `if` would tie the exported file to one of the two.
    """
    from_height, from_width = images.shape[1:3]
    height_first = one_if_positive(from_height * width - from_width * height)
    height_first *= one_if_positive(from_height - height)
    half_height = from_height + height_first * (height - from_height)
    half_width = width + height_first * (from_width - width)
    return bicubic(bicubic(images, half_height, half_width), height, width)


def one_if_positive(number):
    """1 or 0, of a size that is not known yet."""
    return torch.sym_min(torch.sym_max(number, 0), 1)


def bicubic(images, height, width):
    """Bytes resized in floats, which every device can do, and rounded: uint8 [N, h, w, 3]."""
    maps = images.permute(0, 3, 1, 2).float()
    maps = F.interpolate(maps, (height, width), mode="bicubic", antialias=True)
    return (maps + 0.5).floor().clamp(0, 255).byte().permute(0, 2, 3, 1)


def metadata(trained, run, layer, precision, preprocess):
    """What a file says of itself, a dict of strings; JSON where that is not one word.

    trained: `reid.checkpoint.Trained`; run: the run's name.
    """
    height, width = enlarged(trained.height, trained.width)
    inside = preprocess == "inside"
    made = provenance()
    versions = made["versions"] | {name: version(name) for name in ONNX_PACKAGES}
    return {
        "run": run,
        "weights": trained.weights.name,
        "weights_sha256": sha256(trained.weights),
        "network": type(trained.net).__name__,
        "layer": trained.net.test_layer(layer),
        "dim": str(trained.net.dim(layer)),
        "height": str(height),
        "width": str(width),
        "trained_height": str(trained.height),
        "trained_width": str(trained.width),
        "precision": precision,
        "preprocess": preprocess,
        "input": INPUT,
        "input_shape": "uint8 [N, h, w, 3]" if inside else f"float32 [N, 3, {height}, {width}]",
        "layout": "NHWC" if inside else "NCHW",
        "values": "0 to 255" if inside else "(value / 255 - mean) / std",
        "colour_order": "RGB",
        "mean": json.dumps(IMAGENET_MEAN),
        "std": json.dumps(IMAGENET_STD),
        "resize": "bicubic, antialiased (Pillow's)",
        "output": OUTPUT,
        "features": "of image and mirror image, added, L2-normalised",
        "git": json.dumps(made["git"]),
        "versions": json.dumps(versions),
    }


def feature_extractor(trained, facts):
    """The FeatureExtractor that `metadata` describes, of a `reid.checkpoint.Trained`."""
    size = input_size(facts) if facts["preprocess"] == "inside" else None
    return FeatureExtractor(trained.net, facts["layer"], facts["precision"] == "fp16", size)


def input_size(facts):
    """Height and width of the images in the network."""
    return int(facts["height"]), int(facts["width"])


def example(facts):
    """Two images to trace a network with, and which of their dimensions may vary."""
    batch = torch.export.Dim("batch")
    if facts["preprocess"] == "inside":
        height, width = (torch.export.Dim(name, min=2) for name in ("height", "width"))
        return torch.zeros(2, 128, 64, 3, dtype=torch.uint8), {0: batch, 1: height, 2: width}
    return torch.zeros(2, 3, *input_size(facts)), {0: batch}


def torch_file(trained, facts):
    """The bytes of a .pt2 file (torch.export). trained: `reid.checkpoint.Trained`, whose network
    is changed; facts: its `metadata`, which says how.
    """
    extractor = feature_extractor(trained, facts)
    images, varying = example(facts)
    extractor.net.to(memory_format=torch.channels_last)
    with quiet(), torch.no_grad():
        program = torch.export.export(extractor, (images,), dynamic_shapes=(varying,))
        file = io.BytesIO()
        torch.export.save(program, file, extra_files={METADATA: json.dumps(facts, indent=2)})
    return file.getvalue()


@contextmanager
def quiet():
    """Keep to ourselves what exporters say of their own workings."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


class Eager:
    """The network as it was trained, in fp32, not folded: what a file must agree with."""

    def __init__(self, trained, layer):
        self.net, self.layer = trained.net.eval(), layer
        self.read = test_transform(trained.height, trained.width).read

    @torch.inference_mode()
    def of_prepared(self, arrays):
        """Features float32 [B, D] of what `read` made."""
        images = torch.from_numpy(np.stack(arrays))
        return view_features(self.net, images, None, self.layer).numpy()


class File:
    """An exported network as one uses it. Called like `Eager`.

    compute: input array [N, ...] to features [N, D]; facts: the file's `metadata`.
    """

    def __init__(self, compute, facts):
        self.compute = compute
        self.inside = facts["preprocess"] == "inside"
        self.resize = EvalTransform(*input_size(facts)).resize

    def read(self, path):
        """An image of a file as uint8 [h, w, 3]; resized, unless the network does that."""
        image = read_image(path)
        return to_array(image) if self.inside else self.resize(image)

    def of_prepared(self, arrays):
        """Features float32 [B, D] of what `read` made."""
        if self.inside:  # images of one size at a time
            groups = (np.stack(list(some)) for _, some in groupby(arrays, key=np.shape))
            return np.concatenate([self.compute(images) for images in groups])
        return self.compute(network_input(arrays))


def network_input(arrays):
    """Resized images uint8 [H, W, 3] as float32 [B, 3, H, W], normalised."""
    return normalise(torch.from_numpy(np.stack(arrays))).contiguous().numpy()


def torch_compute(path):
    """A .pt2 file's network, NumPy to NumPy, and the facts in it."""
    extra = {METADATA: ""}
    with quiet(), open(path, "rb") as file:
        program = torch.export.load(file, extra_files=extra).module()

    @torch.inference_mode()
    def compute(images):
        return program(torch.from_numpy(images)).numpy()

    return compute, json.loads(extra[METADATA])


def features_of(model, paths, label):
    """Features float32 [N, D] of image files, by an `Eager`, a `File` or an `Embedder`."""
    features = []
    bar = tqdm(total=len(paths), desc=label, unit="image", disable=None, leave=False)
    with ThreadPoolExecutor(READERS) as pool, bar:
        for start in range(0, len(paths), BATCH):
            batch = paths[start : start + BATCH]
            features.append(model.of_prepared(list(pool.map(model.read, batch))))
            bar.update(len(batch))
    return np.concatenate(features)


def spread_out(entries, count):
    """`count` of a list, evenly spaced; all where there are not more."""
    count = min(count, len(entries))
    return [entries[n * len(entries) // count] for n in range(count)]


def agreement(expected, found, queries, tie):
    """How far features [N, D] agree with the expected ones, as a dict.

    The first `queries` rows are queries, which rank the others. A pair of gallery images counts as
    swapped where a query's expected similarities to both differ by more than `tie` and the found
    ones are the other way round.
    """
    cosines = (expected * found).sum(axis=1)
    both = [features[:queries] @ features[queries:].T for features in (expected, found)]
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


def agrees(found):
    """Whether an `agreement` is what fp32 must reach. False where a feature is no number."""
    return found["cosine_min"] > LEAST_COSINE and found["swapped_pairs"] == 0


def accuracy(model, query, gallery, data_dir, label):
    """Rank@1 and mAP of a model on lists of `reid.dataset.TestImage`, as a dict."""
    sets = []
    for name, entries in (("query", query), ("gallery", gallery)):
        features = features_of(model, [e.path for e in entries], f"{label}, {name}")
        sets.append(feature_set(features, entries, data_dir))
    scores = evaluate(similarity_blocks(*sets), *sets)
    return {"rank1": scores.rank(1), "mAP": scores.mean_ap()}
