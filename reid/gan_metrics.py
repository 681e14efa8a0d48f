"""How far generated images are from real ones: measures between sets of features.

Features are float32 [N, D], L2-normalised, so distances lie between 0 and 2.
"""

import io
from contextlib import redirect_stdout

import numpy as np
from tqdm import tqdm

from reid.errors import missing_package

try:
    from prdc import compute_prdc
    from sklearn.neighbors import NearestNeighbors
except ImportError as error:
    raise missing_package("evaluate_gan.py", "prdc", "scikit-learn") from error

CLOSEST = 0.01  # share of a yardstick's images that set its limit


def smallest_set(nearest_k):
    """The fewest images that `measures` takes on either side."""
    return nearest_k + 2  # prdc's; itself and one neighbour more than are counted


def compare(real, generated, nearest_k, seed):
    """Three comparisons, a list of dicts: what was compared, how many images, the `measures`.

    All generated with all real images; as many of each as half of the real ones are, or fewer
    where there aren't that many generated ones; and real with other real images, in that number.
    The seed chooses the halves.
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
    """Frechet distance, precision, recall, density and coverage of `generated`: a dict of floats.

    The last four by prdc (Kynkaanniemi et al. 2019, "Improved Precision and Recall Metric for
    Assessing Generative Models"; Naeem et al. 2020, "Reliable Fidelity and Diversity Metrics for
    Generative Models"). All five depend on the numbers of images; memory grows with their square.
    """
    with redirect_stdout(io.StringIO()):  # prdc prints the counts
        shares = compute_prdc(real, generated, nearest_k)
    found = {"frechet": frechet_distance(real, generated), **shares}
    return {name: float(value) for name, value in found.items()}


def frechet_distance(a, b):
    """Squared Frechet distance of the Gaussians with the means and covariances of two sets.

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
    """Mean [D], trace of the covariance C, and a root R of it, C = R'R: [min(N, D), D]."""
    features = features.astype(np.float64)
    mean = features.mean(axis=0)
    features -= mean
    features /= np.sqrt(len(features) - 1)
    return mean, (features**2).sum(), np.linalg.qr(features, mode="r")


def nearest(real, images=None, count=1):
    """The `count` nearest real ones of each image, nearest first: distances, indices [N, count].

    images: features, or None for the real ones themselves, each without itself.
    scikit-learn computes the distances block by block.
    """
    search = NearestNeighbors(algorithm="brute").fit(real)
    return search.kneighbors(images, count)


def copying(generated, held_out, real):
    """Whether generated images are copies, by distances to the nearest real image [N]: a dict.

    held_out, real: the yardsticks, those of real images that nobody can have copied and those of
    the real images to another one. Of each: median, what the closest 1 % keep within, and, of the
    yardsticks, which share of the generated images is within that.
    """
    found = {}
    for name, far in (("generated", generated), ("held_out", held_out), ("real", real)):
        closest = np.quantile(far, CLOSEST)
        found[name] = {"median": float(np.median(far)), "closest": float(closest)}
        if name != "generated":
            found[name]["generated_within"] = float((generated <= closest).mean())
    return found
