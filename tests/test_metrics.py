"""Junk rules, CMC and AP on cases small enough to work out by hand."""

import numpy as np
import pytest

from reid import metrics
from reid.features import FeatureSet

# ranked best first: id, camera
GALLERY = [(-1, 2), (7, 1), (0, 2), (7, 2), (5, 3), (7, 3)]


def score(queries, gallery=GALLERY):
    similarity = np.tile(-np.arange(len(gallery), dtype=np.float32), (len(queries), 1))
    sets = [
        FeatureSet(None, *np.array(entries, dtype=np.int64).T) for entries in (queries, gallery)
    ]
    return metrics.evaluate([similarity], *sets)


def test_junk_goes_and_distractors_stay():
    scores = score([(7, 1)])
    # Left after the junk box and 7 in camera 1: 0, [7], 5, [7]: good ranks 1 and 3.
    assert scores.first_good.tolist() == [1]
    assert scores.junk == 2
    assert [scores.rank(k) for k in (1, 2, 5)] == [0, 1, 1]
    assert scores.ap_standard[0] == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert scores.ap[0] == pytest.approx(((1 / 2 + 0 / 1) / 2 + (2 / 4 + 1 / 3) / 2) / 2)


def test_first_place_scores_one():
    scores = score([(7, 1)], gallery=[(7, 2), (3, 2)])
    assert (scores.rank(1), scores.mean_ap(), scores.mean_ap(standard=True)) == (1, 1, 1)


def test_queries_without_good_image_count_as_zero_or_not_at_all():
    scores = score([(7, 1), (5, 3), (9, 1)], gallery=[(7, 2), (5, 3)])
    assert scores.valid.tolist() == [True, False, False]
    assert scores.rank(1) == pytest.approx(1 / 3)
    assert scores.mean_ap() == pytest.approx(1 / 3)
    assert scores.rank(1, valid_only=True) == 1
    assert scores.mean_ap(valid_only=True) == 1


def test_no_valid_query_scores_zero():
    scores = score([(9, 1)], gallery=[(-1, 2), (0, 1)])
    assert scores.rank(10) == scores.mean_ap(valid_only=True) == 0


def test_blocks_keep_the_order_of_queries(monkeypatch):
    rng = np.random.default_rng(0)
    sets = [
        FeatureSet(rng.normal(size=(n, 8)), rng.integers(0, 5, n), rng.integers(1, 4, n))
        for n in (23, 60)
    ]
    whole = metrics.evaluate(metrics.similarity_blocks(*sets), *sets)
    monkeypatch.setattr(metrics, "QUERY_BLOCK", 4)
    blocks = metrics.evaluate(metrics.similarity_blocks(*sets), *sets)
    assert np.array_equal(whole.ap, blocks.ap)
    assert np.array_equal(whole.first_good, blocks.first_good)
