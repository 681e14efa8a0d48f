"""A map of features, on which one sees whether a network groups people or cameras.

t-SNE (van der Maaten and Hinton 2008) puts images whose features are alike near each other; its
distances between groups, and the groups' sizes, mean nothing.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from reid.curves import draw_map
from reid.errors import UserError, missing_package
from reid.mat import EvalSets
from reid.metrics import FeatureSet

try:
    from sklearn.manifold import TSNE
except ImportError as error:
    raise missing_package("--map", "scikit-learn") from error

PERPLEXITY = 15  # about how many images count as neighbours: those of a person in the field's sets


class Neighbours(NamedTuple):
    """Fractions of images whose nearest other image is of their person, and of their camera.

    by_chance: the latter for a random other image.
    """

    same_person: float
    same_camera: float
    by_chance: float


def map_features(sets: EvalSets, number: int, path: str | Path) -> Neighbours:
    """Draw the images of `number` identities as a map into a JPEG, and return their `Neighbours`.

    The identities are drawn (always the same) of those that two cameras or more have seen, of query
    and gallery together; `check_map` tells whether there are so many.
    """
    images = join(sets.query, sets.gallery)
    chosen = np.random.default_rng(0).permutation(seen_by_several(sets))[:number]
    rows = np.flatnonzero(np.isin(images.identities, chosen))
    identities, cameras = images.identities[rows], images.cameras[rows]
    features = images.features[rows]
    found = neighbours(features, identities, cameras)
    draw_map(positions(features), identities, cameras, caption(found), path)
    return found


def check_map(sets: EvalSets, number: int) -> None:
    """Raise UserError where fewer identities can be drawn."""
    several = len(seen_by_several(sets))
    if several < number:
        advice = "lower it" if several > 1 else "leave it out"
        raise UserError(
            f"--map {number}: only {several} identities are in two cameras or more; {advice}"
        )


def join(query, gallery):
    """Return the FeatureSet of query and gallery together, without names of files."""
    parts = [(one.features, one.identities, one.cameras) for one in (query, gallery)]
    return FeatureSet(*map(np.concatenate, zip(*parts, strict=True)))


def seen_by_several(sets):
    """Return the identities, sorted, of persons that two cameras or more have seen.

    Junk (-1) is none; 0 is one where there are queries of it, and not the distractors.
    """
    facts = [(one.identities, one.cameras) for one in (sets.query, sets.gallery)]
    pairs = np.unique(np.concatenate(facts, axis=1), axis=1)
    identities, counts = np.unique(pairs[0], return_counts=True)
    least = 0 if 0 in sets.query.identities else 1
    return identities[(counts > 1) & (identities >= least)]


def neighbours(features, identities, cameras):
    """Return the `Neighbours` of images."""
    similarity = features @ features.T
    np.fill_diagonal(similarity, -np.inf)
    nearest = similarity.argmax(axis=1)
    _, counts = np.unique(cameras, return_counts=True)
    total = len(cameras)
    return Neighbours(
        float((identities[nearest] == identities).mean()),
        float((cameras[nearest] == cameras).mean()),
        float((counts * (counts - 1)).sum() / (total * (total - 1))),
    )


def caption(found):
    """Return the line that says what `Neighbours` are."""
    return (
        f"the nearest other image shows the same person for {found.same_person:.0%}, is from the "
        f"same camera for {found.same_camera:.0%} (by chance {found.by_chance:.0%})"
    )


def positions(features):
    """Return the places [N, 2] of L2-normalised features [N, D] by t-SNE."""
    perplexity = min(PERPLEXITY, (len(features) - 1) / 3)
    return TSNE(init="pca", perplexity=perplexity, random_state=0).fit_transform(features)
