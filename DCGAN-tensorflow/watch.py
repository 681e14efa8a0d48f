"""The collapse watch: do the samples still differ from one another as real images do?

A generator that has collapsed draws a few figures over and over. So each sample is compared with
the nearest other one, which also shows when there are several such figures.
"""

import numpy as np

IMAGES = 256  # compared at a time
CELL = 8  # pixels: squares are averaged, so that neither noise nor a small shift counts
COLLAPSED = 0.35  # of the real images' diversity; see README.md for what trainings have


def diversity(images: np.ndarray) -> float:
    """Mean distance from an image to the most similar other, for uint8 `[N, H, W, 3]`, N > 1.

    Root mean square over cells and channels, as a share of white minus black.
    """
    n, height, width, _ = images.shape
    cells = images.reshape(n, height // CELL, CELL, width // CELL, CELL, 3).mean(axis=(2, 4)) / 255
    vectors = cells.reshape(n, -1)
    squares = (vectors**2).sum(axis=1)
    distances = squares[:, None] + squares - 2 * vectors @ vectors.T
    np.fill_diagonal(distances, np.inf)
    return float(np.sqrt(distances.min(axis=1).clip(0) / vectors.shape[1]).mean())
