"""The original's own numbers: evaluation, re-ranking, LSRO, parameter names and shapes."""

import json

import numpy as np
import pytest
import torch
from conftest import FIXTURES

from model import ft_net, ft_net_dense
from re_ranking import re_ranking
from reid import losses, metrics
from reid.mat import load_mat

EXPECTED = json.loads((FIXTURES / "retrieval_expected.json").read_text())
LSRO_CASES = json.loads((FIXTURES / "lsro_expected.json").read_text())


@pytest.fixture(scope="module")
def sets():
    return load_mat(FIXTURES / "retrieval.mat")[:2]


@pytest.fixture(scope="module")
def reranked(sets):
    q, g = (s.features for s in sets)
    return re_ranking(q @ g.T, q @ q.T, g @ g.T)


def check(scores, expected):
    for k in (1, 5, 10):
        assert scores.rank(k) == pytest.approx(expected[f"top{k}"], abs=1e-6)
    assert scores.mean_ap() == pytest.approx(expected["mAP"], abs=1e-6)


def test_evaluation(sets):
    scores = metrics.evaluate(metrics.similarity_blocks(*sets), *sets)
    check(scores, EXPECTED["original"])
    np.testing.assert_allclose(scores.ap, EXPECTED["ap_trapezoid_per_query"], atol=1e-6)
    assert scores.first_good.tolist() == EXPECTED["first_good_rank_per_query"]
    assert (~scores.valid).sum() == EXPECTED["queries_without_good"]
    assert scores.mean_ap(valid_only=True) == pytest.approx(
        EXPECTED["map_trapezoid_over_valid_queries"], abs=1e-6
    )
    assert scores.mean_ap(standard=True, valid_only=True) == pytest.approx(
        EXPECTED["map_standard_over_valid_queries"], abs=1e-6
    )


def test_reranked_distance(reranked):
    expected = np.load(FIXTURES / "rerank_distance.npz")["distance"]
    assert reranked.dtype == np.float32
    assert np.abs(reranked - expected).max() < 1e-5


def test_reranked_evaluation(sets, reranked):
    check(metrics.evaluate([-reranked], *sets), EXPECTED["original_reranked"])


@pytest.mark.parametrize("case", LSRO_CASES, ids=["5 classes", "751 classes", "no generated"])
def test_lsro(case):
    arrays = case if "logits" in case else np.load(FIXTURES / case["logits_and_grad"])
    logits = torch.tensor(np.array(arrays["logits"]), dtype=torch.float64, requires_grad=True)
    flags = torch.tensor(case["flags"])
    # The marker of a generated image must not be read: any value gives the same loss.
    labels = torch.tensor(case["labels"]).masked_fill(flags == 1, -1)
    loss = losses.label_rule("lsro")(logits, labels, flags)
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], abs=1e-6)
    np.testing.assert_allclose(logits.grad, np.array(arrays["grad"]), atol=1e-6)


@pytest.mark.parametrize("network", [ft_net, ft_net_dense])
def test_parameter_names_and_shapes(network):
    expected = json.loads((FIXTURES / "state_dict_keys.json").read_text())[network.__name__]
    found = {name: list(value.shape) for name, value in network(751).state_dict().items()}
    assert found == expected
