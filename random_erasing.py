"""Random Erasing (Zhong et al., "Random Erasing Data Augmentation", AAAI 2020).

A rectangle of a training image is painted over, so that the network cannot lean on any one part
of a body. Works on one image and, in one go, on a batch that is already on the training device:

    erase = RandomErasing(probability=0.8)
    image = erase(image)     # [3, H, W]
    images = erase(images)   # [B, 3, H, W], each image its own rectangle
"""

import torch

ATTEMPTS = 100  # rectangles drawn for an image before it is left whole


class RandomErasing:
    """Erase a random rectangle of each image with a given probability.

    probability: chance that an image is erased.
    sl, sh: the rectangle's smallest and largest share of the image's area.
    r1: its smallest height / width; the largest is 1 / r1.
    mean: the fill, one value for each channel. The pipeline erases after normalising, as the
        2018 code did, so the fill is in normalised units there.
    """

    def __init__(self, probability=0.8, sl=0.02, sh=0.4, r1=0.3, mean=(0.4914, 0.4822, 0.4465)):
        self.probability = probability
        self.sl, self.sh, self.r1 = sl, sh, r1
        self.mean = mean

    def __call__(self, images):
        """Return a copy of `images` ([3, H, W] or [B, 3, H, W]) with rectangles erased."""
        if images.dim() == 3:
            return self(images[None])[0]
        fill = images.new_tensor(self.mean)[None, :, None, None]
        return torch.where(self.masks(images)[:, None], fill, images)

    def masks(self, images):
        """What to erase of `images` [B, 3, H, W]: bool [B, H, W]."""
        batch, _, height, width = images.shape
        top, left, tall, wide = self.rectangles(batch, height, width, images.device)
        rows = torch.arange(height, device=images.device)
        columns = torch.arange(width, device=images.device)
        in_rows = (rows >= top[:, None]) & (rows < (top + tall)[:, None])
        in_columns = (columns >= left[:, None]) & (columns < (left + wide)[:, None])
        return in_rows[:, :, None] & in_columns[:, None, :]

    def rectangles(self, batch, height, width, device=None):
        """Top, left, height and width in pixels, each int [batch]; zeros where nothing is erased.

        Area and aspect are drawn uniformly until a rectangle fits into the image. All attempts
        are drawn at once, and the first that fits is taken: the same distribution, no loop.
        """

        def uniform(low, high):
            return torch.empty(batch, ATTEMPTS, device=device).uniform_(low, high)

        area = uniform(self.sl, self.sh) * height * width
        aspect = uniform(self.r1, 1 / self.r1)
        tall, wide = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
        fits = (tall < height) & (wide < width)
        first = fits.int().argmax(dim=1, keepdim=True)
        erase = fits.any(dim=1) & (torch.rand(batch, device=device) < self.probability)
        tall, wide = (x.gather(1, first)[:, 0] * erase for x in (tall, wide))
        top = (torch.rand(batch, device=device) * (height - tall + 1)).floor()
        left = (torch.rand(batch, device=device) * (width - wide + 1)).floor()
        return top.int(), left.int(), tall.int(), wide.int()

    def __repr__(self):
        shape = f"area {self.sl}..{self.sh}, aspect {self.r1}..{1 / self.r1:.2f}"
        return f"RandomErasing(p {self.probability}, {shape})"
