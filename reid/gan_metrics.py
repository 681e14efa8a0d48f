"""Measure how far generated images are from real ones, by their features.

Features are float32 [N, D], L2-normalised, so distances lie between 0 and 2.
"""

import io
import math
from contextlib import redirect_stdout

import numpy as np
from tqdm import tqdm

from reid.errors import missing_package

try:
    from prdc import compute_prdc
    from sklearn.neighbors import NearestNeighbors
except ImportError as error:
    raise missing_package("evaluate_gan.py", "prdc", "scikit-learn") from error

CLOSEST = 0.01  # fraction of a yardstick's images that set its limit


def smallest_set(nearest_k: int) -> int:
    """Return the smallest number of images that `measures` takes on either side."""
    return nearest_k + 2  # prdc's limit: an image itself and one more neighbour than are counted


def compare(real: np.ndarray, generated: np.ndarray, nearest_k: int, seed: int) -> list[dict]:
    """Compare real and generated images three times: dicts of what, how many, and the `measures`.

    All generated with all real images; half as many of each as there are real ones, or fewer where
    generated ones are fewer; and real with other real images, in that number. The seed chooses.
    """
    rng = np.random.default_rng(seed)
    real, generated = rng.permutation(real), rng.permutation(generated)
    half = len(real) // 2
    count = min(half, len(generated))
    pairs = [
        ("generated", real, generated),
        ("generated", real[:count], generated[:count]),
        ("other real", real[:count], real[half : half + count]),
    ]
    return [
        {"compared": name, "images": len(images), "real": len(some)}
        | measures(some, images, nearest_k)
        for name, some, images in tqdm(pairs, "comparing", disable=None, leave=False)
    ]


def measures(real, generated, nearest_k):
    """Return Frechet distance, precision, recall, density and coverage of `generated`: a dict.

    The last four by prdc (Kynkaanniemi et al. 2019, "Improved Precision and Recall Metric for
    Assessing Generative Models"; Naeem et al. 2020, "Reliable Fidelity and Diversity Metrics for
    Generative Models"). All five depend on the numbers of images; memory grows with their square.
    """
    values = {"frechet": frechet_distance(real, generated)}
    with redirect_stdout(io.StringIO()):  # prdc prints the counts
        values |= compute_prdc(real, generated, nearest_k)
    return {name: float(value) for name, value in values.items()}


def frechet_distance(a, b):
    """Return the squared Frechet distance of two Gaussians, fitted to two sets of features.

    |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))
    (Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule", there with Inception's
    features, which have another scale.) With C = R'R, the last trace is the sum of the singular
    values of R_a R_b': no matrix square root, which without full rank may be complex.
    """
    mean_a, spread_a, root_a = gaussian(a)
    mean_b, spread_b, root_b = gaussian(b)
    shared = np.linalg.norm(root_a @ root_b.T, "nuc")
    distance = ((mean_a - mean_b) ** 2).sum() + spread_a + spread_b - 2 * shared
    return float(max(distance, 0))  # rounding may take it below


def gaussian(features):
    """Return the mean [D], the trace of the covariance C, and a root R [min(N, D), D], C = R'R."""
    features = features.astype(np.float64)
    mean = features.mean(axis=0)
    features -= mean
    features /= np.sqrt(len(features) - 1)
    return mean, (features**2).sum(), np.linalg.qr(features, mode="r")


def nearest(
    real: np.ndarray, images: np.ndarray | None = None, count: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Return distances and indices [N, count] of each image's nearest real ones, nearest first.

    images: features, or None for the real ones themselves, each without itself.
    scikit-learn computes the distances block by block.
    """
    return NearestNeighbors(algorithm="brute").fit(real).kneighbors(images, count)


def pick(generated: np.ndarray, to_nearest: np.ndarray, number: int) -> np.ndarray:
    """Pick generated images near a real one and far from each other: sorted indices [number].

    After Jiang et al. 2021, "Exploring the Quality of GAN Generated Images for Person
    Re-Identification", who keep images that are both like the real one they were made from and
    diverse. Here images are made from noise: to_nearest [N] are their distances to any real one.
    Each of the two steps leaves out the same fraction: the farthest from all real ones, then the
    nearest to those picked before.
    """
    near = np.argsort(to_nearest, kind="stable")
    near = near[: round(math.sqrt(number * len(generated)))]
    return np.sort(near[farthest_first(generated[near], number)])


def farthest_first(features, number):
    """Choose rows, each the farthest from all chosen before it (Gonzalez 1985): indices, from 0."""
    chosen, gaps = [0], np.full(len(features), np.inf)
    for _ in tqdm(range(1, number), "picking", disable=None, leave=False):
        gaps = np.minimum(gaps, 2 - 2 * features @ features[chosen[-1]])
        gaps[chosen[-1]] = -np.inf  # not again, even where a file is there twice
        chosen.append(int(gaps.argmax()))
    return chosen


def copying(generated: np.ndarray, held_out: np.ndarray, real: np.ndarray) -> dict:
    """Compare distances to the nearest real image, to tell whether generated images are copies.

    generated, held_out, real: the distances [N] of each kind of images. Two are yardsticks: those
    of held-out people, which nobody can have copied, and those of real images to another real one.
    Returns a dict of dicts: median, and the distance that the closest 1 % keep within; of the
    yardsticks also the fraction of generated images within that.
    """
    rows = {}
    for name, far in (("generated", generated), ("held_out", held_out), ("real", real)):
        closest = np.quantile(far, CLOSEST)
        rows[name] = {"median": float(np.median(far)), "closest": float(closest)}
        if name != "generated":
            rows[name]["generated_within"] = float((generated <= closest).mean())
    return rows
