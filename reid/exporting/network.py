"""A trained network as one file that runs without this code.

Here: the network that a file holds, the facts that it states about itself, torch.export's format.
`onnx_format.py` has the ONNX format, `int8.py` its quantisation (both need packages that nothing
else here does), `agreement.py` the comparison with PyTorch.
"""

import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reid.checkpoint import Trained
from reid.features import fold_for_inference
from reid.files import sha256
from reid.provenance import provenance, version
from reid.transforms import EvalTransform, normalise
from reid.weights import without_logging

INPUT, OUTPUT = "images", "features"  # their names in a file
METADATA = "metadata.json"  # in a .pt2 file
ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
# Whether Pillow here starts with the height where that is less work; older ones never do.
CHEAPER_FIRST = int(PIL.__version__.split(".")[0]) >= 13


class FeatureExtractor(nn.Module):
    """The network that an exported file holds: images to the features that test.py stores.

    net: a trained network; it is made ready for inference in place. layer: see
    `model.ReIDNet.forward`. half: whether to compute in fp16, up to the pooling. transform: of the
    images, to take in bytes of any size; None: they come resized, cut and normalised.
    """

    def __init__(
        self,
        net: nn.Module,
        layer: str,
        half: bool = False,
        transform: EvalTransform | None = None,
    ):
        super().__init__()
        self.net, self.layer = fold_for_inference(without_the_rest(net, layer)), layer
        inside = Preprocessing(transform, net.normalisation) if transform else nn.Identity()
        self.preprocessing = inside
        self.dtype = torch.float16 if half else torch.float32
        if half:
            halve(self.net)
        self.eval()

    def forward(self, images):
        """Take float32 [N, 3, H, W], or uint8 [N, h, w, 3], to L2-normalised float32 [N, D]."""
        images = self.preprocessing(images)
        views = torch.cat([images, images.flip(3)]).to(self.dtype)
        features = self.net(views, return_features=True, layer=self.layer).float()
        number = images.shape[0]
        return F.normalize(features[:number] + features[number:])


class Preprocessing(nn.Module):
    """Resizing as Pillow does it, cutting the middle out, and normalising.

    Takes uint8 [N, h, w, 3] to float32 [N, 3, H, W].
    """

    def __init__(self, transform: EvalTransform, normalisation: tuple):
        super().__init__()
        self.transform, self.normalisation = transform, normalisation

    def forward(self, images):
        images = resized(images, *self.transform.full)[:, *self.transform.middle()]
        return normalise(images, *self.normalisation)


def resized(images: Tensor, height: int, width: int) -> Tensor:
    """Resize uint8 [N, h, w, 3] to [N, height, width, 3], within 1/255 of Pillow's result.

    In Pillow's order: the width first, and rounded in between; from its version 13 on the height
    first where images get lower and that is less work. An `if` would tie the file to one order.
    """
    if not CHEAPER_FIRST:
        return bicubic(bicubic(images, images.shape[1], width), height, width)
    from_height, from_width = images.shape[1:3]
    height_first = one_if_positive(from_height * width - from_width * height)
    height_first *= one_if_positive(from_height - height)
    half_height = from_height + height_first * (height - from_height)
    half_width = width + height_first * (from_width - width)
    return bicubic(bicubic(images, half_height, half_width), height, width)


def one_if_positive(number):
    """Return 1 or 0 for a size that is not known yet."""
    return torch.sym_min(torch.sym_max(number, 0), 1)


def bicubic(images, height, width):
    """Resize bytes in floats, which every device can do, and round them: uint8 [N, h, w, 3]."""
    maps = images.permute(0, 3, 1, 2).float()
    maps = F.interpolate(maps, (height, width), mode="bicubic", antialias=True)
    return (maps + 0.5).floor().clamp(0, 255).byte().permute(0, 2, 3, 1)


def halve(net):
    """Have a network compute in fp16 up to its pooling, from there on in fp32, in place.

    timm's networks have weights after their pooling, and so pool in fp16.
    """
    net.half()
    if net.classic:
        net.pooling = nn.Sequential(ToFloat(), net.pooling)
    net.pooling.float()
    net.model.fc = nn.Sequential(ToFloat(), net.model.fc.float())


class ToFloat(nn.Module):
    """A layer that converts numbers of any precision to fp32."""

    def forward(self, numbers):
        return numbers.float()


def without_the_rest(net, layer):
    """Remove the weights that a network's features don't need, in place; returns the network."""
    net.classifier = nn.Identity()
    if layer == "pool":
        net.model.fc = nn.Identity()
    if hasattr(net.model, "classifier"):  # DenseNet's own, never used
        net.model.classifier = nn.Identity()
    return net


def metadata(trained: Trained, run: str, precision: str, preprocess: str) -> dict[str, str]:
    """Return the facts that a file states about itself: a dict of strings, lists as JSON.

    trained: `reid.checkpoint.Trained`; run: the run's name.
    """
    height, width = trained.transform.size
    mean, std = trained.net.normalisation
    inside = preprocess == "inside"
    made = provenance()
    versions = made["versions"] | {name: version(name) for name in ONNX_PACKAGES}
    return {
        "run": run,
        "weights": trained.weights.name,
        "weights_sha256": sha256(trained.weights),
        "network": type(trained.net).__name__,
        "backbone": trained.net.backbone,
        "layer": trained.layer,
        "dim": str(trained.net.dim(trained.layer)),
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
        "mean": json.dumps(mean),
        "std": json.dumps(std),
        "resize": "bicubic, antialiased (Pillow's)",
        "resize_height": str(trained.transform.full[0]),
        "resize_width": str(trained.transform.full[1]),
        "crop": "center",
        "output": OUTPUT,
        "features": "of image and mirror image, added, L2-normalised",
        "git": json.dumps(made["git"]),
        "versions": json.dumps(versions),
    }


def feature_extractor(trained: Trained, facts: dict) -> FeatureExtractor:
    """Build the FeatureExtractor that `metadata` describes, of a `reid.checkpoint.Trained`."""
    transform = transform_of(facts) if facts["preprocess"] == "inside" else None
    return FeatureExtractor(trained.net, facts["layer"], facts["precision"] == "fp16", transform)


def transform_of(facts: dict) -> EvalTransform:
    """Return the transform of a file's images that its `metadata` states."""
    size, full = (
        (int(facts[prefix + "height"]), int(facts[prefix + "width"])) for prefix in ("", "resize_")
    )
    return EvalTransform(size, full)


def example(facts: dict) -> tuple[Tensor, dict]:
    """Return two images to trace a network with, and the dimensions that may vary."""
    batch = torch.export.Dim("batch")
    if facts["preprocess"] == "inside":
        height, width = (torch.export.Dim(name, min=2) for name in ("height", "width"))
        return torch.zeros(2, 128, 64, 3, dtype=torch.uint8), {0: batch, 1: height, 2: width}
    return torch.zeros(2, 3, *transform_of(facts).size), {0: batch}


def torch_file(trained: Trained, facts: dict) -> bytes:
    """Return the bytes of a .pt2 file (torch.export).

    trained: `reid.checkpoint.Trained`, whose network is changed; facts: its `metadata`.
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
def quiet() -> Iterator[None]:
    """Silence what exporters log about their own workings."""
    with without_logging(logging.WARNING), warnings.catch_warnings(action="ignore"):
        yield


def network_input(arrays: list[np.ndarray], facts: dict) -> np.ndarray:
    """Stack resized images uint8 [H, W, 3] and normalise them: float32 [B, 3, H, W].

    facts: the file's `metadata`.
    """
    images = torch.from_numpy(np.stack(arrays))
    return normalise(images, *normalisation(facts)).contiguous().numpy()


def normalisation(facts: dict) -> tuple[list[float], list[float]]:
    """Return the mean and deviation of pixels that a file's `metadata` states."""
    return json.loads(facts["mean"]), json.loads(facts["std"])


def torch_compute(path: str | Path) -> tuple[Callable[[np.ndarray], np.ndarray], dict]:
    """Load a .pt2 file: returns its network as a function of arrays, and its facts."""
    extra = {METADATA: ""}
    with quiet(), open(path, "rb") as file:
        program = torch.export.load(file, extra_files=extra).module()

    @torch.inference_mode()
    def compute(images):
        return program(torch.from_numpy(images)).numpy()

    return compute, json.loads(extra[METADATA])
