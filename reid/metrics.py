"""Score rankings: junk rules, CMC, average precision and mINP.

For a query of identity q taken by camera c, the gallery splits into
  junk: boxes of identity -1, and identity q in camera c itself; removed from the ranking;
  good: identity q in another camera;
  wrong: everything else, distractors (identity 0) included.
(Zheng et al., "Scalable Person Re-identification: A Benchmark", ICCV 2015.)

Rankings are never sorted: a good image's rank is the number of images that are more similar.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

JUNK_IDENTITY = -1
QUERY_BLOCK = 256  # queries scored at a time, to bound memory


class FeatureSet(NamedTuple):
    """Images' features float32 [N, D], identities int [N], cameras int [N], paths [N] or None."""

    features: np.ndarray
    identities: np.ndarray
    cameras: np.ndarray
    files: np.ndarray | None = None


@dataclass
class Scores:
    """The scores of each query; without a good image it has rank -1, AP 0 and INP 0.

    first_good: int [Nq], rank of the first good image, from 0, junk removed.
    ap: float [Nq], average precision as Market-1501's own code computes it (trapezoid).
    ap_standard: float [Nq], mean of the precision at each good image.
    inp: float [Nq], precision at the last good image (inverse negative penalty; Ye et al., "Deep
        Learning for Person Re-identification: A Survey and Outlook", TPAMI 2021).
    junk: mean number of gallery images removed for a query.
    top: int [Nq, n], the most similar gallery images, junk included; None unless asked for.
    """

    first_good: np.ndarray
    ap: np.ndarray
    ap_standard: np.ndarray
    inp: np.ndarray
    junk: float
    top: np.ndarray | None = None

    @property
    def valid(self) -> np.ndarray:
        """Tell which queries have a good image: bool [Nq]."""
        return self.first_good >= 0

    def hits(self, k: int) -> np.ndarray:
        """Tell which queries have a good image among their first k: bool [Nq]."""
        return self.valid & (self.first_good < k)

    def rank(self, k: int, valid_only: bool = False) -> float:
        """Return Rank@k: the fraction of queries with a good image among their first k."""
        return self.mean(self.hits(k), valid_only)

    def mean_ap(self, standard: bool = False, valid_only: bool = False) -> float:
        """Return mAP, by trapezoids unless `standard`."""
        return self.mean(self.ap_standard if standard else self.ap, valid_only)

    def mean_inp(self, valid_only: bool = False) -> float:
        """Return mINP, the mean precision at each query's last good image."""
        return self.mean(self.inp, valid_only)

    def mean(self, values, valid_only):
        """Return the mean of `values` [Nq] over all queries, as the original does.

        Queries without a good image have 0; valid_only: leave them out.
        """
        # Without any valid query the sum is 0, and so is the score.
        return float(values.sum() / (max(self.valid.sum(), 1) if valid_only else len(values)))


def evaluate(
    blocks: Iterable[np.ndarray], query: FeatureSet, gallery: FeatureSet, top: int = 0
) -> Scores:
    """Return the Scores of rankings.

    blocks: yields similarities float32 [b, Ng] in the order of the queries; junk in them is
    overwritten. query, gallery: FeatureSets, of which only identities and cameras are used.
    top: how many of each query's most similar images to keep in the Scores.
    """
    relevance = Relevance(gallery)
    ranks, nearest, junk_count, number = [], [], 0, 0
    for block in blocks:
        for row in block:
            if top:
                nearest.append(most_similar(row, top))
            good, junk = relevance.of(query.identities[number], query.cameras[number])
            row[junk] = row[relevance.always_junk] = -np.inf
            ranks.append(good_ranks(row, good))
            junk_count += len(junk) + len(relevance.always_junk)
            number += 1
    return Scores(
        first_good=np.array([r[0] if len(r) else -1 for r in ranks]),
        ap=np.array([average_precision(r) for r in ranks]),
        ap_standard=np.array([average_precision_standard(r) for r in ranks]),
        inp=np.array([len(r) / (r[-1] + 1) if len(r) else 0.0 for r in ranks]),
        junk=junk_count / number,
        top=np.stack(nearest) if top else None,
    )


class Relevance:
    """A gallery, which tells the good and the junk images for a query."""

    def __init__(self, gallery: FeatureSet):
        self.cameras = gallery.cameras
        self.always_junk = np.flatnonzero(gallery.identities == JUNK_IDENTITY)
        self.order = np.argsort(gallery.identities, kind="stable")
        self.sorted = gallery.identities[self.order]

    def of(self, identity: int, camera: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the indices of the good images, ascending, and of junk besides `always_junk`."""
        if identity == JUNK_IDENTITY:
            return self.always_junk[:0], self.always_junk[:0]
        first, last = np.searchsorted(self.sorted, [identity, identity + 1])
        same = self.order[first:last]
        same_camera = self.cameras[same] == camera
        return same[~same_camera], same[same_camera]


def similarity_blocks(query: FeatureSet, gallery: FeatureSet) -> Iterator[np.ndarray]:
    """Yield dot products of features, QUERY_BLOCK queries at a time: arrays [b, Ng]."""
    for start in range(0, len(query.features), QUERY_BLOCK):
        yield query.features[start : start + QUERY_BLOCK] @ gallery.features.T


def most_similar(similarity, count):
    """Return the indices of the highest of similarities [Ng], highest first: [min(count, Ng)]."""
    count = min(count, len(similarity))
    top = np.sort(np.argpartition(-similarity, count - 1)[:count])
    return top[np.argsort(-similarity[top], kind="stable")]


def good_ranks(similarity, good):
    """Return the ranks of the good images, from 0, ascending: int [n].

    similarity: [Ng], -inf at junk. good: ascending indices. Equal similarities rank by index.
    """
    if len(good) == 0:
        return good
    values = similarity[good]
    ahead = np.sort(similarity[similarity >= values.min()])
    end = np.searchsorted(ahead, values, side="right")
    ranks = len(ahead) - end  # number of strictly more similar images
    for i in np.flatnonzero(end - np.searchsorted(ahead, values, side="left") > 1):  # ties
        ranks[i] += np.count_nonzero(similarity[: good[i]] == values[i])
    return np.sort(ranks)


def average_precision(ranks):
    """Return the area under the precision-recall curve by trapezoids; ranks: of `good_ranks`."""
    if len(ranks) == 0:
        return 0.0
    earlier = np.arange(len(ranks))  # good images ranked before each
    after = (earlier + 1) / (ranks + 1)
    before = np.where(ranks > 0, earlier / np.maximum(ranks, 1), 1.0)
    return float(((after + before) / 2).mean())


def average_precision_standard(ranks):
    """Return the mean of the precision at each good image; ranks: of `good_ranks`."""
    if len(ranks) == 0:
        return 0.0
    return float(((np.arange(len(ranks)) + 1) / (ranks + 1)).mean())
