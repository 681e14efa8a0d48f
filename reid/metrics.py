"""How retrieval is scored: junk rules, CMC, average precision and mINP, in one place.

For a query of identity q taken by camera c, the gallery splits into
  junk: boxes of identity -1, and identity q in camera c itself; removed from the ranking;
  good: identity q in another camera;
  wrong: everything else, distractors (identity 0) included.
(Zheng et al., "Scalable Person Re-identification: A Benchmark", ICCV 2015.)

Rankings are never made: a good image's rank is how many images are more similar than it.
"""

from dataclasses import dataclass

import numpy as np

JUNK_IDENTITY = -1
SAME = 1e-6  # how far from 1 the similarity of one picture with itself may be, for rounding
QUERY_BLOCK = 256  # queries scored at a time, to bound memory


@dataclass
class Scores:
    """What each query scored. Queries without a good image have rank -1, AP 0 and INP 0.

    first_good: int [Nq], rank of the first good image, from 0, junk removed.
    ap: float [Nq], average precision as Market-1501's own code computes it (trapezoid).
    ap_standard: float [Nq], mean of the precision at each good image.
    inp: float [Nq], precision at the last good image (inverse negative penalty; Ye et al., "Deep
        Learning for Person Re-identification: A Survey and Outlook", TPAMI 2021).
    junk: mean number of gallery images removed for a query.
    copies: number of queries that have a good image of similarity 1.
    top: int [Nq, n], the most similar gallery images, junk among them, where asked for.
    """

    first_good: np.ndarray
    ap: np.ndarray
    ap_standard: np.ndarray
    inp: np.ndarray
    junk: float
    copies: int = 0
    top: np.ndarray | None = None

    @property
    def valid(self):
        """Which queries have a good image: bool [Nq]."""
        return self.first_good >= 0

    def hits(self, k):
        """Which queries have a good image among their first k: bool [Nq]."""
        return self.valid & (self.first_good < k)

    def rank(self, k, valid_only=False):
        """Rank@k: the share of queries with a good image among their first k."""
        return self.mean(self.hits(k), valid_only)

    def mean_ap(self, standard=False, valid_only=False):
        """mAP, trapezoid unless `standard`."""
        return self.mean(self.ap_standard if standard else self.ap, valid_only)

    def mean_inp(self, valid_only=False):
        """mINP: how soon the last good image is found."""
        return self.mean(self.inp, valid_only)

    def mean(self, values, valid_only):
        """Mean of a value for each query.

        Queries without a good image count as 0, as in the original, unless `valid_only`.
        """
        # With no valid query at all, every sum is 0, and so is every score.
        return float(values.sum() / (max(self.valid.sum(), 1) if valid_only else len(values)))


def evaluate(blocks, query, gallery, top=0):
    """Score rankings: `blocks` yields similarities float32 [b, Ng], in the order of the queries.

    query, gallery: FeatureSets, of which only identities and cameras are used here.
    top: how many of each query's most similar images to keep in the Scores.
    The blocks are changed: junk is overwritten.
    """
    relevance = Relevance(gallery)
    ranks, nearest, junk_count, copies, number = [], [], 0, 0, 0
    for block in blocks:
        if top:
            nearest.append(most_similar(block, top))
        for row in block:
            good, junk = relevance.of(query.identities[number], query.cameras[number])
            row[junk] = row[relevance.always_junk] = -np.inf
            ranks.append(good_ranks(row, good))
            copies += bool(len(good)) and bool(row[good].max() > 1 - SAME)
            junk_count += len(junk) + len(relevance.always_junk)
            number += 1
    return Scores(
        first_good=np.array([r[0] if len(r) else -1 for r in ranks]),
        ap=np.array([average_precision(r) for r in ranks]),
        ap_standard=np.array([average_precision_standard(r) for r in ranks]),
        inp=np.array([len(r) / (r[-1] + 1) if len(r) else 0.0 for r in ranks]),
        junk=junk_count / number,
        copies=copies,
        top=np.concatenate(nearest) if top else None,
    )


class Relevance:
    """Which gallery images are good for a query and which are junk."""

    def __init__(self, gallery):
        self.cameras = gallery.cameras
        self.always_junk = np.flatnonzero(gallery.identities == JUNK_IDENTITY)
        self.order = np.argsort(gallery.identities, kind="stable")
        self.sorted = gallery.identities[self.order]

    def of(self, identity, camera):
        """Indices of the good images, ascending, and of the junk besides `always_junk`."""
        if identity == JUNK_IDENTITY:
            return self.always_junk[:0], self.always_junk[:0]
        first, last = np.searchsorted(self.sorted, [identity, identity + 1])
        same = self.order[first:last]
        same_camera = self.cameras[same] == camera
        return same[~same_camera], same[same_camera]


def similarity_blocks(query, gallery):
    """Dot products of features, QUERY_BLOCK queries at a time: arrays [b, Ng]."""
    for start in range(0, len(query.features), QUERY_BLOCK):
        yield query.features[start : start + QUERY_BLOCK] @ gallery.features.T


def most_similar(block, count):
    """Indices of each row's highest values, highest first: [b, min(count, Ng)]."""
    count = min(count, block.shape[1])
    found = np.sort(np.argpartition(-block, count - 1, axis=1)[:, :count], axis=1)
    order = np.argsort(-np.take_along_axis(block, found, axis=1), axis=1, kind="stable")
    return np.take_along_axis(found, order, axis=1)


def good_ranks(similarity, good):
    """Ranks, from 0, ascending, of the good images: int [n].

    similarity: [Ng], -inf at junk. good: ascending indices. Equal similarities rank by index.
    """
    if len(good) == 0:
        return good
    found = similarity[good]
    ahead = np.sort(similarity[similarity >= found.min()])
    end = np.searchsorted(ahead, found, side="right")
    ranks = len(ahead) - end  # those that are strictly more similar
    for i in np.flatnonzero(end - np.searchsorted(ahead, found, side="left") > 1):
        ranks[i] += np.count_nonzero(similarity[: good[i]] == found[i])
    return np.sort(ranks)


def average_precision(ranks):
    """Area under the precision-recall curve by trapezoids; `ranks` of the good images, sorted."""
    if len(ranks) == 0:
        return 0.0
    found = np.arange(len(ranks))
    after = (found + 1) / (ranks + 1)
    before = np.where(ranks > 0, found / np.maximum(ranks, 1), 1.0)
    return float(((after + before) / 2).mean())


def average_precision_standard(ranks):
    """Mean precision at the good images; `ranks` as for `average_precision`."""
    if len(ranks) == 0:
        return 0.0
    return float(((np.arange(len(ranks)) + 1) / (ranks + 1)).mean())
