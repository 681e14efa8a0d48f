"""Features of images, extracted with a trained network. (`reid.mat` has the files they go to.)

For use in other programs, such as trackers:

    from reid.features import Embedder
    embed = Embedder("model/ft_ResNet50")
    features = embed(crops)  # RGB arrays of any size -> L2-normalised float32 [N, D]
"""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from reid.checkpoint import load_trained, unwrap
from reid.device import arithmetic, autocast, choose_device, send
from reid.files import sha256
from reid.images import read_image
from reid.inference import frozen
from reid.transforms import normalise, test_transform


class Embedder:
    """L2-normalised features of images in memory, by the network of a run folder.

        embed = Embedder("model/ft_ResNet50")
        features = embed([crop_a, crop_b])  # float32 [2, D]
        similarity = features @ features.T  # cosine

    The same features as test.py's. One object may be called from several threads at once; a call
    changes nothing outside of it. OpenCV's images are BGR: pass `crop[..., ::-1]`.

    run: folder `model/<name>`; which_epoch: "last", "best" or an epoch's number.
    device: "cpu", "cuda:1", ...; None: a GPU where there is one. precision: "auto", "fp32", "bf16".
    layer: "pool" or "bottleneck"; None: what test.py takes. scales: of the images, e.g. (1, 0.9).
    batchsize: images that go through the network at once.
    Raises `reid.errors.UserError` where the run can't be loaded, ValueError for other arguments.
    """

    def __init__(
        self,
        run,
        which_epoch="last",
        device=None,
        precision="auto",
        layer=None,
        scales=(1.0,),
        batchsize=64,
    ):
        if batchsize < 1 or not scales or not all(0.1 <= scale <= 10 for scale in scales):
            raise ValueError(f"batchsize {batchsize} is under 1, or scales {scales} not 0.1 to 10")
        self.device = choose_device()[0] if device is None else torch.device(device)
        self.dtype = arithmetic(self.device, precision)
        trained = load_trained(run, which_epoch)
        self.dim = trained.net.dim(layer)
        self.weights, self.batchsize = trained.weights, batchsize
        self.transforms = [test_transform(trained.height, trained.width, s) for s in scales]
        self.made_by = made_by(trained, layer, scales)
        net = frozen(trained.net, self.dtype)
        self.net = net.to(self.device, memory_format=torch.channels_last)
        self.layer = layer

    def __call__(self, images):
        """uint8 RGB images, each [H, W, 3] of any size, to float32 [N, D] in their order.

        images: a list of arrays, or one array [N, H, W, 3]. Raises ValueError for anything else.
        """
        parts = [np.empty((0, self.dim), np.float32)]
        for start in range(0, len(images), self.batchsize):
            batch = enumerate(images[start : start + self.batchsize], start)
            parts.append(self.of_prepared([self.prepare(as_picture(*item)) for item in batch]))
        return np.concatenate(parts)

    def read(self, path):
        """What `of_prepared` takes of an image file. Raises UserError for one that is damaged."""
        return self.prepare(read_image(path))

    def prepare(self, image):
        """A PIL image, resized to each scale: list of uint8 [h, w, 3]."""
        return [transform.resize(image) for transform in self.transforms]

    @torch.inference_mode()
    def of_prepared(self, prepared):
        """Features float32 [B, D] of one batch of images that `read` or `prepare` made."""
        scales = []
        for arrays in zip(*prepared, strict=True):
            images = send(torch.from_numpy(np.stack(arrays)), self.device)
            scales.append(view_features(self.net, images, self.dtype, self.layer).cpu().numpy())
        return combined(scales)


@torch.inference_mode()
def extract(net, batches, dtype, label, layer=None):
    """L2-normalised features of the images in `batches`, float32 [N, D], in their order.

    batches: `reid.loading.EvalBatches`. `label` names the progress bar, None: no bar; `dtype` is
    autocast's, see `reid.device.arithmetic`; layer: see `model.ReIDNet.forward`.
    """
    net.eval()
    features = []
    quiet = label is None or None
    with tqdm(total=len(batches.paths), desc=label, unit="image", disable=quiet) as bar:
        for images in batches:
            features.append(view_features(net, images, dtype, layer).cpu())
            bar.update(len(images))
    if not features:  # more processes than images
        return np.empty((0, unwrap(net).dim(layer)), np.float32)
    return torch.cat(features).numpy()


def view_features(net, images, dtype, layer=None):
    """Images uint8 [B, H, W, 3] to features [B, D]: those of an image and of its mirror image are
    added, then L2-normalised.
    """
    views = torch.cat([images, images.flip(2)])
    with autocast(images.device, dtype):
        both = net(normalise(views), return_features=True, layer=layer).float().chunk(2)
    return F.normalize(both[0] + both[1])


def combined(scales):
    """Features of several scales, arrays [N, D] of unit length, as one: their mean's direction."""
    if len(scales) == 1:
        return scales[0]
    return F.normalize(sum(map(torch.from_numpy, scales))).numpy()


def made_by(trained, layer, scales):
    """What features depend on but the images, as a dict: features of another one don't compare."""
    return {
        "weights_sha256": sha256(trained.weights),
        "height": trained.height,
        "width": trained.width,
        "layer": trained.net.test_layer(layer),
        "scales": sorted(scales, reverse=True),
    }


def as_picture(number, image):
    """Image number `number`, a uint8 RGB array [H, W, 3], as a PIL image; else ValueError."""
    shape, dtype = getattr(image, "shape", ""), getattr(image, "dtype", type(image).__name__)
    right = isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3
    if not right or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(
            f"image {number}: expected uint8 [H, W, 3] in RGB, got {dtype} {shape}".rstrip()
        )
    return Image.fromarray(image)
