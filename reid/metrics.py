"""How retrieval is scored: junk rules, CMC and average precision, in one place.

For a query of identity q taken by camera c, the gallery splits into
  junk: boxes of identity -1, and identity q in camera c itself; removed from the ranking;
  good: identity q in another camera;
  wrong: everything else, distractors (identity 0) included.
(Zheng et al., "Scalable Person Re-identification: A Benchmark", ICCV 2015.)
"""

from dataclasses import dataclass

import numpy as np

JUNK_IDENTITY = -1
QUERY_BLOCK = 256  # queries scored at a time, to bound memory


@dataclass
class Scores:
    """What each query scored. Queries without a good image have rank -1 and AP 0.

    first_good: int [Nq], rank of the first good image, from 0, junk removed.
    ap: float [Nq], average precision as Market-1501's own code computes it (trapezoid).
    ap_standard: float [Nq], mean of the precision at each good image.
    junk: mean number of gallery images removed for a query.
    """

    first_good: np.ndarray
    ap: np.ndarray
    ap_standard: np.ndarray
    junk: float

    @property
    def valid(self):
        """Which queries have a good image: bool [Nq]."""
        return self.first_good >= 0

    def rank(self, k, valid_only=False):
        """Rank@k: the share of queries with a good image among their first k."""
        hits = (self.valid & (self.first_good < k)).sum()
        return float(hits / self._queries(valid_only))

    def mean_ap(self, standard=False, valid_only=False):
        """mAP, trapezoid unless `standard`.

        Queries without a good image count as 0, as in the original, unless `valid_only`.
        """
        ap = self.ap_standard if standard else self.ap
        return float(ap.sum() / self._queries(valid_only))

    def _queries(self, valid_only):
        # With no valid query at all, every sum is 0, and so is every score.
        return max(int(self.valid.sum()), 1) if valid_only else len(self.ap)


def evaluate(blocks, query, gallery):
    """Score rankings: `blocks` yields similarities [b, Ng], in the order of the queries.

    query, gallery: FeatureSets, of which only identities and cameras are used here.
    """
    first_good, ap, ap_standard, junk_count = [], [], [], 0
    number = 0
    for block in blocks:
        for similarity in block:
            same = gallery.identities == query.identities[number]
            same_camera = gallery.cameras == query.cameras[number]
            junk = (gallery.identities == JUNK_IDENTITY) | (same & same_camera)
            ranks = good_ranks(similarity, same & ~junk, junk)
            first_good.append(ranks[0] if len(ranks) else -1)
            ap.append(average_precision(ranks))
            ap_standard.append(average_precision_standard(ranks))
            junk_count += junk.sum()
            number += 1
    return Scores(
        np.array(first_good), np.array(ap), np.array(ap_standard), float(junk_count / number)
    )


def similarity_blocks(query, gallery):
    """Dot products of features, QUERY_BLOCK queries at a time: arrays [b, Ng]."""
    for start in range(0, len(query.features), QUERY_BLOCK):
        yield query.features[start : start + QUERY_BLOCK] @ gallery.features.T


def good_ranks(similarity, good, junk):
    """Ranks, from 0 and with junk removed, of the good images: all arguments [Ng]."""
    order = np.argsort(-similarity, kind="stable")
    order = order[~junk[order]]
    return np.flatnonzero(good[order])


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
