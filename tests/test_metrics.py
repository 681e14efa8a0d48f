"""Junk rules, CMC, AP and INP: cases to work out by hand, and the plain code as the truth."""

import tracemalloc

import numpy as np
import pytest

from benchmarks import dense
from reid import metrics
from reid.mat import FeatureSet

# ranked best first: id, camera
GALLERY = [(-1, 2), (7, 1), (0, 2), (7, 2), (5, 3), (7, 3)]


def sets(queries, gallery):
    return [
        FeatureSet(None, *np.array(entries, dtype=np.int64).T) for entries in (queries, gallery)
    ]


def score(queries, gallery=GALLERY):
    similarity = np.tile(-np.arange(len(gallery), dtype=np.float32), (len(queries), 1))
    return metrics.evaluate([similarity], *sets(queries, gallery))


def test_junk_goes_and_distractors_stay():
    scores = score([(7, 1)])
    # Left after the junk box and 7 in camera 1: 0, [7], 5, [7]: good ranks 1 and 3.
    assert scores.first_good.tolist() == [1]
    assert scores.junk == 2
    assert [scores.rank(k) for k in (1, 2, 5)] == [0, 1, 1]
    assert scores.ap_standard[0] == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert scores.ap[0] == pytest.approx(((1 / 2 + 0 / 1) / 2 + (2 / 4 + 1 / 3) / 2) / 2)
    assert scores.inp[0] == pytest.approx(2 / 4)


def test_first_place_scores_one():
    scores = score([(7, 1)], gallery=[(7, 2), (3, 2)])
    assert scores.rank(1) == scores.mean_ap() == scores.mean_ap(standard=True) == 1
    assert scores.mean_inp() == 1


def test_queries_without_good_image_count_as_zero_or_not_at_all():
    scores = score([(7, 1), (5, 3), (9, 1)], gallery=[(7, 2), (5, 3)])
    assert scores.valid.tolist() == [True, False, False]
    assert scores.rank(1) == scores.mean_ap() == scores.mean_inp() == pytest.approx(1 / 3)
    assert scores.rank(1, valid_only=True) == scores.mean_inp(valid_only=True) == 1
    assert scores.mean_ap(valid_only=True) == 1


def test_no_valid_query_scores_zero():
    scores = score([(9, 1), (-1, 1)], gallery=[(-1, 2), (0, 1)])
    assert scores.rank(10) == scores.mean_ap(valid_only=True) == scores.mean_inp() == 0


def test_equal_similarities_rank_by_index():
    query, gallery = sets([(7, 1)], [(7, 2), (5, 2), (7, 3), (5, 3), (7, 1), (6, 1)])
    scores = metrics.evaluate([np.full((1, 6), 0.5, np.float32)], query, gallery)
    assert scores.ap_standard[0] == pytest.approx((1 + 2 / 3) / 2)


@pytest.mark.parametrize("seed", range(40))
def test_against_the_plain_code(seed):
    rng = np.random.default_rng(seed)
    nq, ng = (int(n) for n in rng.integers(1, (40, 300)))
    identities, cameras = int(rng.integers(1, 30)), int(rng.integers(1, 5))
    query, gallery = (
        FeatureSet(None, rng.integers(-1, identities, n), rng.integers(1, cameras + 1, n))
        for n in (nq, ng)
    )
    if seed % 5 == 0:  # identities that one camera alone has seen
        gallery = gallery._replace(cameras=gallery.identities % cameras + 1)
    if seed % 11 == 0:  # nothing but junk
        gallery = gallery._replace(identities=np.full(ng, -1))
    similarity = rng.normal(size=(nq, ng)).astype(np.float32)
    if seed % 2:
        similarity = np.round(similarity * rng.choice([1, 3]))  # many ties
    cmc, ap, ap_standard, inp = dense.evaluate(
        lambda number: similarity[number], (query[1], query[2]), (gallery[1], gallery[2])
    )
    blocks = np.split(similarity.copy(), range(7, nq, 7))
    scores = metrics.evaluate(blocks, query, gallery)
    found = [scores.rank(k) for k in range(1, ng + 1)]
    np.testing.assert_allclose(found, cmc, atol=1e-12)
    np.testing.assert_allclose(scores.ap, ap, atol=1e-12)
    np.testing.assert_allclose(scores.ap_standard, ap_standard, atol=1e-12)
    np.testing.assert_allclose(scores.inp, inp, atol=1e-12)


def test_the_most_similar_are_kept_for_pictures():
    rng = np.random.default_rng(0)
    query, gallery = sets([(7, 1)] * 5, GALLERY)
    similarity = rng.integers(0, 4, (5, 6)).astype(np.float32)
    expected = np.argsort(-similarity, axis=1, kind="stable")
    assert metrics.evaluate([similarity.copy()], query, gallery).top is None
    for count in (1, 6, 10):
        scores = metrics.evaluate([similarity.copy()], query, gallery, top=count)
        np.testing.assert_array_equal(
            np.take_along_axis(similarity, scores.top, 1),
            np.take_along_axis(similarity, expected[:, :count], 1),
        )


def test_pictures_take_the_memory_of_one_ranking():
    """Not of a block of queries: of 520,000 gallery images that is 1.6 GB."""
    number = 20_000
    gallery = FeatureSet(None, np.arange(number), np.ones(number, int))
    query = FeatureSet(None, np.arange(64), np.zeros(64, int))
    block = np.random.default_rng(0).random((64, number), dtype=np.float32)
    tracemalloc.start()
    metrics.evaluate([block], query, gallery, top=10)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < block.nbytes / 2


def test_blocks_keep_the_order_of_queries(monkeypatch):
    rng = np.random.default_rng(0)
    both = [
        FeatureSet(
            rng.normal(size=(n, 8)).astype(np.float32),
            rng.integers(0, 5, n),
            rng.integers(1, 4, n),
        )
        for n in (23, 60)
    ]
    whole = metrics.evaluate(metrics.similarity_blocks(*both), *both)
    monkeypatch.setattr(metrics, "QUERY_BLOCK", 4)
    blocks = metrics.evaluate(metrics.similarity_blocks(*both), *both)
    assert np.array_equal(whole.ap, blocks.ap)
    assert np.array_equal(whole.first_good, blocks.first_good)
