"""The transforms of images in training and in testing, in one place so they can't drift apart.

`height` and `width` are what the network is trained on (256 x 128). Training crops out of an
image an eighth larger (288 x 144). The two classic networks are tested on the whole of that, others
on its middle, see `transform_for_testing`.

Training is the classic chain: bicubic resize, random crop, flip, normalise, erase. Here it is
split in two, so that nothing is done twice and the training device does what it can for a whole
batch at once:

    reading, on the CPU    decode the file, resize it with Pillow (`read`)
    a batch                crop and flip (`crop`), then colours, normalise, erase (`finish`) on the
                           training device

What is random is drawn beforehand, for a whole epoch at once (`draw`): the same on every device and
for any number of processes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from random_erasing import RandomErasing
from reid.device import layout, send
from reid.errors import UserError
from reid.images import read_image
from reid.options import SMALLEST

CPU = torch.device("cpu")
JITTER = {"brightness": 0.2, "contrast": 0.15, "saturation": 0.2}


class Augmentation(NamedTuple):
    """The random choices for each of N images."""

    top: Tensor  # int [N], of the crop
    left: Tensor
    flip: Tensor  # bool [N]
    erased: Tensor  # int [N, 4], see RandomErasing.rectangles
    seed: Tensor  # int64 [N], of the random colours

    def part(self, part: slice | Tensor) -> "Augmentation":
        """Return the choices for some of the images."""
        return Augmentation(*(choices[part] for choices in self))


class TrainTransform:
    """The transform of training images: files to float32 [B, 3, height, width].

    normalisation: mean and deviation, see `normalise`. erasing_p: chance of random erasing.
    color_jitter: whether brightness, contrast and saturation vary. auto_augment: whether
    torchvision's AutoAugment (Cubuk et al. 2019) is applied.
    """

    def __init__(
        self,
        height: int,
        width: int,
        normalisation: tuple,
        erasing_p: float,
        color_jitter: bool = False,
        auto_augment: bool = False,
    ):
        self.height, self.width, self.normalisation = height, width, normalisation
        self.full_height, self.full_width = enlarged(height, width)
        self.erasing = RandomErasing(erasing_p)
        colours = [v2.ColorJitter(**JITTER)] if color_jitter else []
        colours += [v2.AutoAugment()] if auto_augment else []
        self.colours = v2.Compose(colours) if colours else None

    def draw(self, number: int, generator: torch.Generator) -> Augmentation:
        """Draw the `Augmentation` of `number` images."""

        def integers(high, **kind):
            return torch.randint(high, (number,), generator=generator, **kind)

        return Augmentation(
            top=integers(self.full_height - self.height + 1),
            left=integers(self.full_width - self.width + 1),
            flip=integers(2, dtype=torch.bool),
            erased=self.erasing.rectangles(number, self.height, self.width, generator),
            seed=integers(2**31),
        )

    def read(self, path: str | Path) -> np.ndarray:
        """Decode and resize an image: uint8 [9/8 height, 9/8 width, 3]."""
        size = self.full_width, self.full_height
        return np.array(read_image(path).resize(size, Image.Resampling.BICUBIC))

    def crop(
        self, images: list[np.ndarray], augmentation: Augmentation, device: torch.device = CPU
    ) -> Tensor:
        """Crop and flip what `read` returned: uint8 [B, height, width, 3] on the device."""
        batch = np.empty((len(images), self.height, self.width, 3), np.uint8)
        corners = zip(augmentation.top.tolist(), augmentation.left.tolist(), strict=True)
        for cropped, image, (top, left) in zip(batch, images, corners, strict=True):
            cropped[:] = image[top : top + self.height, left : left + self.width]
        batch = torch.from_numpy(batch)
        for number in augmentation.flip.nonzero()[:, 0].tolist():
            batch[number] = batch[number].flip(1)
        return send(batch, device)

    def finish(self, images: Tensor, augmentation: Augmentation) -> Tensor:
        """Make cropped images on the device the network's input: float32 [B, 3, height, width]."""
        if self.colours:
            images = torch.stack(
                [
                    self.recolour(i, s)
                    for i, s in zip(images, augmentation.seed.tolist(), strict=True)
                ]
            )
        erased = send(augmentation.erased, images.device)
        return self.erasing.erase(normalise(images, *self.normalisation), erased)

    def recolour(self, image, seed):
        """Return an image, uint8 [H, W, 3], with the random colours that belong to the seed."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self.colours(image.permute(2, 0, 1)).permute(1, 2, 0)


class EvalTransform:
    """The transform of images to validate or test on: nothing is random.

    size: height and width of what the network gets. full: of the resized image whose middle that
    is; None: the same, and nothing is cut.
    """

    def __init__(self, size: tuple[int, int], full: tuple[int, int] | None = None):
        self.size, self.full = size, full or size

    def __str__(self):
        """Say the sizes so that `transform_for_testing` reads them: 128x64, 128x64 of 144x72."""
        sizes = dict.fromkeys([self.size, self.full])
        return " of ".join(f"{height}x{width}" for height, width in sizes)

    def scaled(self, scale: float) -> "EvalTransform":
        """Return the transform to `scale` times the size. Raises UserError where that is tiny."""
        size, full = (tuple(round(scale * side) for side in s) for s in (self.size, self.full))
        if min(size) < SMALLEST:
            raise UserError(
                f"--ms {scale:g}: makes images of {size[0]}x{size[1]}; the networks take "
                f"{SMALLEST} pixels or more"
            )
        return EvalTransform(size, full)

    def read(self, path: str | Path) -> np.ndarray:
        """Decode, resize and cut an image: uint8 [height, width, 3]."""
        return self.resize(read_image(path))

    def resize(self, image: Image.Image) -> np.ndarray:
        """Resize and cut a PIL image: uint8 [height, width, 3]."""
        pixels = np.array(image.resize(self.full[::-1], Image.Resampling.BICUBIC))
        return pixels[self.middle()]

    def middle(self) -> tuple[slice, slice]:
        """Return the rows and columns of a resized image that the network gets.

        The same as of torchvision's CenterCrop.
        """
        starts = [round((full - side) / 2) for side, full in zip(self.size, self.full, strict=True)]
        return tuple(slice(n, n + side) for n, side in zip(starts, self.size, strict=True))


def enlarged(height: int, width: int) -> tuple[int, int]:
    """Return the size that training crops from: 256 x 128 gives 288 x 144."""
    return height * 9 // 8, width * 9 // 8


def transform_for_testing(kind: str, height: int, width: int) -> EvalTransform:
    """Return the transform of images to test on.

    kind: "enlarged", to 9/8 of the training size; "center", the middle of that, in which people are
    as large as in training; "same", to the training size; or in pixels, "256x128" or, to cut out
    the middle, "256x128 of 288x144". height, width: of images to train on.
    """
    size, full = (height, width), enlarged(height, width)
    kinds = {"enlarged": [full], "center": [size, full], "same": [size]}
    if kind in kinds:
        return EvalTransform(*kinds[kind])
    return EvalTransform(*(tuple(map(int, text.split("x"))) for text in kind.split(" of ")))


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalise uint8 [B, H, W, 3]: (value / 255 - mean) / std, three numbers each.

    Networks have theirs in `normalisation`. Returns float32 [B, 3, H, W] in the device's layout.
    """
    batch, height, width, _ = images.shape
    mean, std = (send(torch.tensor([*three]), images.device) for three in (mean, std))
    # As rows of width * 3 numbers: three channels alone are too few to compute on at once.
    rows = images.reshape(batch, height, width * 3).float()
    rows.mul_((1 / (255 * std)).repeat(width)).sub_((mean / std).repeat(width))
    maps = rows.view(batch, height, width, 3).permute(0, 3, 1, 2)  # channels_last
    return maps.contiguous(memory_format=layout(images.device))
