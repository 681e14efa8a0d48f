"""The collapse watch measures whether samples differ from one another as real images do.

A generator that has collapsed draws a few figures over and over. Therefore each sample is compared
with the most similar other one: a mean over all pairs would not show that there are several such
figures.
"""

import numpy as np

IMAGES = 256  # images that are compared with one another
BLOCK = 8  # pixels: blocks of 8x8 are averaged, so that neither noise nor a small shift counts
COLLAPSED = 0.35  # a fraction of the real images' diversity; trainings that go well have 0.7 to 1


def diversity(images: np.ndarray) -> float:
    """Return the mean distance from an image to the most similar other one.

    The images are uint8 `[N, H, W, 3]`, N > 1. The distance of two images is the root mean square
    of the differences between their block averages; from black to white it is 1.
    """
    n, height, width, _ = images.shape
    blocks = images.reshape(n, height // BLOCK, BLOCK, width // BLOCK, BLOCK, 3)
    vectors = (blocks.mean(axis=(2, 4)) / 255).reshape(n, -1)
    squares = (vectors**2).sum(axis=1)
    distances = squares[:, None] + squares - 2 * vectors @ vectors.T
    np.fill_diagonal(distances, np.inf)
    return float(np.sqrt(distances.min(axis=1).clip(0) / vectors.shape[1]).mean())
