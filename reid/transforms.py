"""Every image pipeline: training, validation and testing, from one place so they can't drift.

`height` and `width` are what the network is trained on (256 x 128). Training crops out of an
image an eighth larger (288 x 144); testing takes that larger size whole.
"""

import torch
from torchvision.transforms import InterpolationMode, v2

from random_erasing import RandomErasing

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def train_transform(height, width, erasing_p):
    """Resize, random crop, flip, normalise, erase: a PIL image to float32 [3, height, width]."""
    return v2.Compose(
        [
            resize(*enlarged(height, width)),
            v2.RandomCrop((height, width)),
            v2.RandomHorizontalFlip(),
            *to_normalised(),
            RandomErasing(erasing_p),
        ]
    )


def val_transform(height, width):
    """A PIL image to float32 [3, height, width], nothing random."""
    return v2.Compose([resize(height, width), *to_normalised()])


def test_transform(height, width):
    """A PIL image to float32 [3, 9/8 height, 9/8 width], nothing random."""
    return v2.Compose([resize(*enlarged(height, width)), *to_normalised()])


test_transform.__test__ = False  # no test, for all its name


def enlarged(height, width):
    """The size that training crops from: 256 x 128 gives 288 x 144."""
    return height * 9 // 8, width * 9 // 8


def resize(height, width):
    """Bicubic resize to exactly this size."""
    return v2.Resize((height, width), interpolation=InterpolationMode.BICUBIC)


def to_normalised():
    """Steps from a PIL image to a tensor with ImageNet's mean and deviation taken out."""
    return [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.ToPureTensor(),
        v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
    ]
