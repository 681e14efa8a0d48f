"""Features of images, by a trained network that is made ready for inference.

`Embedder` has the features of arrays and of files, for other programs and for search.py:

    from reid.features import Embedder
    embed = Embedder("model/ft_ResNet50")
    features = embed(crops)  # RGB arrays of any size, or paths -> L2-normalised float32 [N, D]

`extract` has those of a whole list of files, shared among the processes of torchrun, for test.py
and what measures as it does. (`reid.mat` has the files that features are stored in.)
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, pairwise
from os import PathLike
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from tqdm import tqdm

from reid.cache import read_ahead
from reid.checkpoint import Trained, load_trained, unwrap
from reid.device import (
    autocast,
    choose_device,
    dtype_for,
    faster_dtype,
    send,
    to_device,
)
from reid.distributed import World
from reid.errors import UserError
from reid.explain import Explanation, explain
from reid.files import sha256
from reid.images import read_image
from reid.loading import EvalBatches
from reid.transforms import EvalTransform, normalise

READERS = 4  # threads that decode images
FOLDING_ERROR = 1e-4  # how far, of the largest number in a feature, rounding may move one
FUSIONS = {
    (nn.Conv2d, nn.BatchNorm2d): fuse_conv_bn_eval,
    (nn.Linear, nn.BatchNorm1d): fuse_linear_bn_eval,
}


# --- features of arrays and files ---------------------------------------------------------------


class ImageModel:
    """A model that is called with images and returns their features.

    Subclasses define `dim`, the numbers in a feature, `to_input`, which makes a PIL image one input
    of the network, and `of_batch`, which takes a list of such inputs to float32 [B, dim].
    """

    batchsize = 32  # images that go through the network at once

    def __call__(self, images: Sequence | np.ndarray, label: str | None = None) -> np.ndarray:
        """Return the features of images, L2-normalised float32 [N, dim], in their order.

        images: a list of uint8 RGB arrays [H, W, 3] of any sizes, or of paths; or one array
        [N, H, W, 3]. label: name of a progress bar, None for no bar.
        Raises ValueError for anything else, UserError for a file that can't be read, and for an
        image whose feature is not finite.
        """
        single = isinstance(images, str | PathLike)
        paths = set() if single else {isinstance(image, str | PathLike) for image in images}
        if single or len(paths) > 1:
            raise ValueError("expected a list of arrays or a list of paths")
        stream = self.of_files(images) if True in paths else self.of_arrays(images)
        quiet = True if label is None else None
        features = []
        for _, feature in tqdm(
            stream, label, len(images), leave=False, unit="image", disable=quiet
        ):
            if isinstance(feature, UserError):
                raise feature
            features.append(feature)
        return np.stack(features) if features else np.empty((0, self.dim), np.float32)

    def of_arrays(self, images):
        """Yield (number, its feature) for each of a list of uint8 RGB arrays [H, W, 3]."""
        for start in range(0, len(images), self.batchsize):
            batch = list(enumerate(images[start : start + self.batchsize], start))
            features = self.of_batch([self.to_input(as_picture(*item)) for item in batch])
            for (number, _), feature in zip(batch, features, strict=True):
                yield number, checked(f"image {number}", feature)

    def of_files(
        self, paths: Iterable[str | PathLike], threads: int = READERS
    ) -> Iterator[tuple[str | PathLike, np.ndarray | UserError]]:
        """Yield (path, its feature) for each path, in order.

        In place of a feature comes the UserError of a file that can't be read, or whose feature is
        not finite. The next files are decoded while a batch is in the network; `paths` may be a
        generator of millions.
        """
        inputs = read_ahead(paths, self.read, threads, self.batchsize)
        while batch := list(islice(inputs, self.batchsize)):
            readable = [image for _, image in batch if not isinstance(image, UserError)]
            features = iter(self.of_batch(readable) if readable else ())
            for path, image in batch:
                unread = isinstance(image, UserError)
                yield path, image if unread else checked(path, next(features))

    def read(self, path: str | PathLike) -> object:
        """Read an image file as one input of the network. Raises UserError where it is damaged."""
        return self.to_input(read_image(path))


class Embedder(ImageModel):
    """L2-normalised features of images, by the network of a run folder.

        embed = Embedder("model/ft_ResNet50")
        features = embed([crop_a, crop_b])  # float32 [2, D]
        similarity = features @ features.T  # cosine

    The same features as test.py's. One object may be called from several threads at once; a call
    changes nothing outside of it. OpenCV's images are BGR: pass `crop[..., ::-1]`.

    run: folder `model/<name>`, or a network that is loaded already (`reid.checkpoint.Trained`),
    which is changed in place. which_epoch: "last", "best" or an epoch's number.
    device: "cpu", "cuda:1", ...; None: a GPU where there is one. precision: "auto", "fp32", "bf16".
    layer: "pool" or "bottleneck"; None: the layer that test.py takes. scales: of the images, e.g.
    (1, 0.9). batchsize: images that go through the network at once. test_size: as test.py's flag
    takes it, e.g. "center" or "256x128"; None: the size that test.py takes.
    Raises `reid.errors.UserError` where the run can't be loaded, ValueError for other arguments.
    """

    def __init__(
        self,
        run: str | Path | Trained,
        which_epoch: str = "last",
        device: str | torch.device | None = None,
        precision: str = "auto",
        layer: str | None = None,
        scales: tuple[float, ...] = (1.0,),
        batchsize: int = 64,
        test_size: str | None = None,
    ):
        if batchsize < 1 or not scales or not all(0.1 <= scale <= 10 for scale in scales):
            raise ValueError(f"batchsize {batchsize} is under 1, or scales {scales} not 0.1 to 10")
        self.device = choose_device()[0] if device is None else torch.device(device)
        trained = run
        if isinstance(run, Trained):
            if which_epoch != "last" or layer or test_size:
                raise ValueError("which_epoch, layer and test_size are those of the loaded network")
        else:
            trained = load_trained(run, which_epoch, layer=layer, test_size=test_size)
        self.dtype = inference_dtype(trained, self.device, precision, batchsize)
        self.dim, self.layer = trained.net.dim(trained.layer), trained.layer
        self.weights, self.batchsize = trained.weights, batchsize
        self.transforms = eval_transforms(trained, scales)
        self.made_by = made_by(trained, scales)
        net = fold_for_inference(trained.net, self.dtype)
        self.net = to_device(net, self.device)

    def to_input(self, image: Image.Image) -> list[np.ndarray]:
        """Resize a PIL image to each scale: list of uint8 [h, w, 3]."""
        return [transform.resize(image) for transform in self.transforms]

    def explain(self, a: np.ndarray | str | Path, b: np.ndarray | str | Path) -> Explanation:
        """Return why two images are alike, see `reid.explain`: arrays as above, or paths.

        Raises UserError where the network's features are no sums over positions.
        """
        inputs = [
            self.read(image)
            if isinstance(image, str | PathLike)
            else self.to_input(as_picture(n, image))
            for n, image in enumerate((a, b))
        ]
        return self.explain_inputs(*inputs)

    def explain_inputs(self, a: list[np.ndarray], b: list[np.ndarray]) -> Explanation:
        """Return why two inputs, as `read` gives them, are alike; raises as `explain` does."""
        if len(self.transforms) > 1:
            raise UserError("--ms: heat maps are of one scale; leave it out")
        images = send(torch.from_numpy(np.stack(a + b)), self.device)
        try:
            why = explain(self.net, images, self.dtype, self.layer)
        except ValueError as error:
            raise UserError(f"{error}; so no map adds up to a similarity") from error
        transform = self.transforms[0]
        return why._replace(share=tuple(np.divide(transform.size, transform.full)))

    @torch.inference_mode()
    def of_batch(self, batch: list) -> np.ndarray:
        """Return the features float32 [B, D] of a list of inputs."""
        scales = []
        for arrays in zip(*batch, strict=True):
            images = send(torch.from_numpy(np.stack(arrays)), self.device)
            scales.append(view_features(self.net, images, self.dtype, self.layer).cpu().numpy())
        return mean_direction(scales)


def checked(image: object, feature: np.ndarray) -> np.ndarray | UserError:
    """Return the feature [D] of an image; in its place a UserError where it is not finite."""
    if np.isfinite(feature).all():
        return feature
    return UserError(
        f"{image}: its features are infinite or NaN; take a higher --precision, or other weights"
    )


def as_picture(number, image):
    """Convert image number `number`, a uint8 RGB array [H, W, 3], to a PIL image.

    Raises ValueError for anything else.
    """
    shape, dtype = getattr(image, "shape", ""), getattr(image, "dtype", type(image).__name__)
    right = isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3
    if not right or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(
            f"image {number}: expected uint8 [H, W, 3] in RGB, got {dtype} {shape}".rstrip()
        )
    return Image.fromarray(image)


# --- features of many files, by many processes --------------------------------------------------


def extract(
    net: nn.Module,
    paths: list[Path],
    transforms: list[EvalTransform],
    world: World,
    *,
    dtype: torch.dtype | None,
    batchsize: int,
    workers: int,
    label: str,
    layer: str = "pool",
) -> np.ndarray | None:
    """Return the features of image files, L2-normalised float32 [N, D], in their order.

    The processes of `world` (`reid.distributed.World`) share the files; the first one gets the
    features, the others None.
    transforms: `EvalTransform`s, one for each scale of the images. dtype: autocast's, see
    `reid.device.dtype_for`. workers: processes that read images. label: name of the progress bar.
    layer: see `model.ReIDNet.forward`. Raises UserError for a file that can't be read, or whose
    feature is not finite.
    """
    scales, own_paths = [], world.shard(paths)
    for transform in transforms:
        size = f", {transform}" if len(transforms) > 1 else ""
        batches = EvalBatches(own_paths, transform, batchsize, workers, world.device)
        with world.together():
            bar = label + size if world.first else None
            own = extract_batches(net, batches, dtype, bar, layer)
        scales.append(own)
    own = mean_direction(scales)
    with world.together():
        if not np.isfinite(own).all():
            row = np.isfinite(own).all(axis=1).argmin()
            raise checked(own_paths[row], own[row])
    parts = world.collect(own)
    return np.concatenate(parts) if world.first else None


@torch.inference_mode()
def extract_batches(
    net: nn.Module,
    batches: EvalBatches,
    dtype: torch.dtype | None,
    label: str | None,
    layer: str = "pool",
) -> np.ndarray:
    """Return the features of `reid.loading.EvalBatches`, float32 [N, D], in this process.

    label: name of the progress bar, None for no bar.
    """
    net.eval()
    features = []
    quiet = True if label is None else None
    with tqdm(total=len(batches.paths), desc=label, unit="image", disable=quiet) as bar:
        for images in batches:
            features.append(view_features(net, images, dtype, layer).cpu())
            bar.update(len(images))
    if not features:  # more processes than images
        return np.empty((0, unwrap(net).dim(layer)), np.float32)
    return torch.cat(features).numpy()


# --- the network --------------------------------------------------------------------------------


def view_features(
    net: nn.Module, images: Tensor, dtype: torch.dtype | None, layer: str = "pool"
) -> Tensor:
    """Return the features [B, D] of images uint8 [B, H, W, 3].

    The features of an image and of its mirror image are added, then L2-normalised.
    """
    views = torch.cat([images, images.flip(2)])
    with autocast(images.device, dtype):
        images = normalise(views, *unwrap(net).normalisation)
        both = net(images, return_features=True, layer=layer).float().chunk(2)
    return F.normalize(both[0] + both[1])


def mean_direction(scales: list[np.ndarray]) -> np.ndarray:
    """Return the mean direction of the features of several scales, arrays [N, D] of unit length."""
    if len(scales) == 1:
        return scales[0]
    return F.normalize(sum(map(torch.from_numpy, scales))).numpy()


def eval_transforms(trained: Trained, scales: tuple[float, ...] = (1.0,)) -> list[EvalTransform]:
    """Return the `EvalTransform`s that test a network (`Trained`) at each scale of the images."""
    if not trained.net.any_size and any(scale != 1 for scale in scales):
        raise UserError(f"--ms: {trained.net.backbone} takes images of one size; leave it out")
    return [trained.transform.scaled(scale) for scale in scales]


def inference_dtype(
    trained: Trained,
    device: torch.device,
    precision: str,
    batchsize: int,
    gpus: Sequence[int] = (),
) -> torch.dtype | None:
    """Return the dtype to extract features in, see `reid.device`; "auto" takes the faster one."""
    dtype = dtype_for(device, precision, gpus)
    if precision == "auto" and dtype:
        dtype = faster_dtype(trained.net, device, trained.transform.size, batchsize)
    return dtype


def agreed_dtype(
    trained: Trained, world: World, precision: str, batchsize: int
) -> torch.dtype | None:
    """Return `inference_dtype` as the first process finds it; others would disturb its trial."""
    dtype = None
    with world.together():
        if world.first:
            dtype = inference_dtype(trained, world.device, precision, batchsize, world.gpus)
    return world.of_first(dtype)


def made_by(trained: Trained, scales: tuple[float, ...]) -> dict:
    """Return a dict of what features depend on; those that differ in it can't be compared."""
    mean, std = trained.net.normalisation
    return {
        "weights_sha256": sha256(trained.weights),
        "backbone": trained.net.backbone,
        "last_stride": trained.net.last_stride,
        "size": str(trained.transform),
        "mean": list(mean),
        "std": list(std),
        "layer": trained.layer,
        "scales": sorted(scales, reverse=True),
    }


def ready(net: nn.Module, dtype: torch.dtype | None, world: World) -> nn.Module:
    """Return a network for `extract`: folded, on its device or devices."""
    net = to_device(fold_for_inference(net, dtype), world.device)
    return nn.DataParallel(net, world.gpus) if world.gpus else net


def fold_for_inference(net: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Make a network ready for inference, in place: the same outputs, but for rounding.

    Batch norm is folded into the layer before it. dtype: autocast's (`reid.device.dtype_for`);
    weights that autocast would cast for each batch are cast once. Returns the network.
    """
    net.eval().requires_grad_(False)
    if net.classic:
        fold_batch_norms(net)
    else:
        net.model = folded_if_exact(net)
    if dtype is not None:
        for module in net.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.to(dtype)
    return net


def fold_batch_norms(net):
    """Multiply each batch norm into the layer before it, in place.

    In torchvision's ResNet and DenseNet, and in our heads, a norm that is registered right after
    a layer also takes its input from there. DenseNet's norms that stand before a ReLU and its
    convolution can't be folded, and stay.
    """
    for parent in list(net.modules()):
        for (name, layer), (norm_name, norm) in pairwise(list(parent.named_children())):
            fuse = next((f for kinds, f in FUSIONS.items() if fits(layer, norm, kinds)), None)
            if fuse:
                setattr(parent, name, fuse(layer, norm))
                setattr(parent, norm_name, what_follows(norm))


def fits(layer, norm, kinds):
    """Tell whether a layer and the norm after it are of some kinds, and of each other's size."""
    channels = getattr(layer, "out_channels", getattr(layer, "out_features", None))
    return (
        isinstance(layer, kinds[0])
        and isinstance(norm, kinds[1])
        and (norm.num_features == channels and norm.running_mean is not None)
    )


def what_follows(norm):
    """Return what a batch norm does beside normalising: timm's have their activation inside."""
    after = [part for part in norm.children() if not isinstance(part, nn.Identity)]
    return nn.Sequential(*after) if after else nn.Identity()


def folded_if_exact(net):
    """Return the backbone of a timm network, its batch norms folded if that changes no feature.

    Not every model of timm feeds a norm from the layer that is registered before it.
    """
    plain, folded = net.model, copy.deepcopy(net.model)
    fold_batch_norms(folded)
    noise = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, *net.tried, generator=noise)
    images = images.to(next(net.parameters()).device)
    expected = net(images, return_features=True, layer="pool")
    net.model = folded
    try:
        found = net(images, return_features=True, layer="pool")
    except RuntimeError:  # channels that don't fit
        return plain
    finally:
        net.model = plain
    scale = expected.abs().max()
    return folded if (found - expected).abs().max() <= FOLDING_ERROR * scale else plain
