"""Heat maps of what makes two images alike, which add up to their similarity exactly.

A pooled feature is a mean over positions x of the last feature maps a(x). So the similarity of an
image with feature f, to another with feature g, is a sum over positions:

    cos(f, g) = sum over x of <a(x), g> / (N |f| |g|)        N: number of positions

A cell of the map is one term of it: above 0 it adds to the similarity, below 0 it takes from it.
As in testing, f is the sum of the features of the image and of its mirror image; the mirror's maps
are turned back. A batch norm neck, f = s * mean + t, scales the terms by s; what t adds,
2 <t, g> / (|f| |g|), belongs to no position and is a constant beside the map. No gradients are
taken, and no network is trained.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model import ReIDNet
from reid.device import autocast
from reid.transforms import normalise


class Explanation(NamedTuple):
    """Why two images are alike: their similarity, and for each of them where it comes from.

    similarity: the cosine of their features. maps: float32 [2, h, w], the first image's and the
    second's, h and w a 32nd of the image's pixels or more. constants: float32 [2], what belongs to
    no position. For either image, map.sum() + constant is the similarity. share: the network got
    only the middle of the images, this fraction of their height and width, and the maps are of that
    (1, 1: all).
    """

    similarity: float
    maps: np.ndarray
    constants: np.ndarray
    share: tuple[float, float] = (1.0, 1.0)


@torch.inference_mode()
def explain(
    net: ReIDNet, images: Tensor, dtype: torch.dtype | None = None, layer: str = "pool"
) -> Explanation:
    """Return the `Explanation` of the similarity of two images, uint8 [2, H, W, 3].

    dtype, layer: as for `reid.features.view_features`. Raises ValueError where the features are no
    sums over positions.
    """
    views = torch.cat([images, images.flip(2)])
    with autocast(images.device, dtype):
        positions = net.positions(normalise(views, *net.normalisation))
    scale, shift = neck_scale_and_shift(net, layer)
    here, mirrored = (positions * scale[:, None, None]).chunk(2)
    positions = here + mirrored.flip(3)
    features = positions.mean(dim=(2, 3)) + 2 * shift
    lengths = features.norm(dim=1).clamp(min=1e-12)
    directions = features / lengths[:, None]
    others = directions.flip(0)
    maps = torch.einsum("bdhw,bd->bhw", positions, others) / lengths[:, None, None]
    return Explanation(
        (directions[0] @ directions[1]).item(),
        (maps / maps[0].numel()).cpu().numpy(),
        (2 * (others @ shift) / lengths).cpu().numpy(),
    )


def neck_scale_and_shift(net, layer):
    """Return scale and shift, [D] each, that take the pooled feature to a layer's.

    Raises ValueError where that is no such step.
    """
    if layer == "pool":
        one = next(net.parameters()).new_ones(net.feature_dim, dtype=torch.float32)
        return one, torch.zeros_like(one)
    if not net.bnneck:
        raise ValueError(f"{net.backbone}: its bottleneck layer is no mean over positions")
    norm = net.model.fc[0]
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return scale, norm.bias - scale * norm.running_mean
