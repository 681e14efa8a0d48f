"""Random Erasing (Zhong et al., "Random Erasing Data Augmentation", AAAI 2020).

A rectangle of a training image is painted over, so that the network cannot lean on any one part
of a body. Works on one image and, in one go, on a batch that is already on the training device:

    erase = RandomErasing(probability=0.8)
    image = erase(image)     # [3, H, W]
    images = erase(images)   # [B, 3, H, W], each image its own rectangle
"""

import numpy as np
import torch
from torch import Tensor

ATTEMPTS = 100  # rectangles drawn for an image before it is left whole


class RandomErasing:
    """Erase a random rectangle of each image with a given probability.

    probability: chance that an image is erased.
    sl, sh: the rectangle's smallest and largest fraction of the image's area.
    r1: its smallest height / width; the largest is 1 / r1.
    mean: the fill, one value for each channel. The pipeline erases after normalising, as the
        2018 code did, so the fill is in normalised units there.
    """

    def __init__(
        self,
        probability: float = 0.8,
        sl: float = 0.02,
        sh: float = 0.4,
        r1: float = 0.3,
        mean: tuple = (0.4914, 0.4822, 0.4465),
    ):
        self.probability = probability
        self.sl, self.sh, self.r1 = sl, sh, r1
        self.mean = mean

    def __call__(self, images: Tensor) -> Tensor:
        """Return a copy of `images` ([3, H, W] or [B, 3, H, W]) with rectangles erased."""
        if images.dim() == 3:
            return self(images[None])[0]
        return self.erase(images.clone(), self.rectangles(len(images), *images.shape[2:]))

    def rectangles(
        self, batch: int, height: int, width: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw top, left, height, width in pixels: int [batch, 4] on the CPU; zeros erase nothing.

        Area and aspect are drawn uniformly until a rectangle fits into the image. All attempts
        are drawn at once, and the first that fits is taken: the same distribution, no loop.
        """

        def uniform(*size):
            return torch.rand(batch, *size, generator=generator)

        area = (self.sl + (self.sh - self.sl) * uniform(ATTEMPTS)) * height * width
        aspect = self.r1 + (1 / self.r1 - self.r1) * uniform(ATTEMPTS)
        tall, wide = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
        fits = (tall < height) & (wide < width)
        first = fits.int().argmax(dim=1, keepdim=True)
        erase = fits.any(dim=1) & (uniform() < self.probability)
        tall, wide = (x.gather(1, first)[:, 0] * erase for x in (tall, wide))
        top = (uniform() * (height - tall + 1)).floor() * erase
        left = (uniform() * (width - wide + 1)).floor() * erase
        return torch.stack([top, left, tall, wide], dim=1).int()

    def erase(self, images: Tensor, rectangles: Tensor) -> Tensor:
        """Fill the rectangles of `images` [B, 3, H, W], on any device; returns the images.

        On a CPU, where they are channels_last, they are filled in place.
        """
        if images.device.type == "cpu":
            # Views of the images row by row, where the fill is one long run of numbers: channel
            # by channel it would take ten times as long.
            pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
            rows = pixels.reshape(*pixels.shape[:2], -1)
            fill = np.tile(np.float32(self.mean), pixels.shape[2])
            for image, (top, left, tall, wide) in zip(rows, rectangles.tolist(), strict=True):
                image[top : top + tall, 3 * left : 3 * (left + wide)] = fill[: 3 * wide]
            return torch.from_numpy(pixels).permute(0, 3, 1, 2)
        mask = self.masks(rectangles.to(images.device), *images.shape[2:])
        fill = torch.tensor(self.mean)[:, None, None]
        if images.device.type == "cuda":  # it is not waited for
            fill = fill.pin_memory().to(images.device, non_blocking=True)
        return torch.where(mask[:, None], fill.to(images.device), images)

    @staticmethod
    def masks(rectangles, height, width):
        """Return the pixels that the rectangles [B, 4] cover: bool [B, height, width]."""
        top, left, tall, wide = rectangles[:, :, None].unbind(1)
        rows = torch.arange(height, device=rectangles.device)
        columns = torch.arange(width, device=rectangles.device)
        in_rows = (rows >= top) & (rows < top + tall)
        in_columns = (columns >= left) & (columns < left + wide)
        return in_rows[:, :, None] & in_columns[:, None, :]
