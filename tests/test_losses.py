"""Losses over logits, each against its formula written out as loops over images and classes."""

import math

import numpy as np
import pytest
import torch

from reid import losses
from reid.losses import FixedTargets, label_rule

K = 7
# Generated images 2, 0, 1 and 2 again, in no order, among real ones.
LABELS = torch.tensor([4, -3, -1, 0, -2, 5, -3, 2])
GENERATED = (LABELS < 0).int()
# What a finished run says of them: ranks of each class, and who is in the image's cluster.
TABLES = {
    "mprl_static": [[3, 1, 7, 2, 4, 6, 5], [1, 2, 3, 4, 5, 6, 7], [7, 5, 6, 1, 3, 2, 4]],
    "sls": [[1, 0, 0, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1]],
    # Its probabilities, and the classes 5, 0, 3 that the images were generated for.
    "teacher": [[0.1, 0.2, 0.3, 0, 0, 0.4, 0], [1, 0, 0, 0, 0, 0, 0], [0.5, 0, 0, 0, 0, 0, 0.5]],
    "own": [[0.9 * (k == label) + 0.1 / K for k in range(K)] for label in (5, 0, 3)],
}
# What the mean network says of the batch at hand; of real images nobody asks.
MEAN = np.random.default_rng(1).normal(size=(len(LABELS), K))


def rule_of(name, *weight_and_start, rows=slice(None)):
    """The rule with its targets. rows: which of LABELS are in the batch."""
    rule = label_rule(name, *weight_and_start)
    if name == "own":
        rule.target.weights = losses.own_class(torch.tensor([5, 0, 3]), K).double()
        np.testing.assert_allclose(rule.target.weights, TABLES[name], atol=1e-7)
        rule.target.weights = torch.tensor(TABLES[name], dtype=torch.float64)
    elif name in TABLES:
        kind = torch.float64 if name == "teacher" else torch.uint8
        rule.target.weights = torch.tensor(TABLES[name], dtype=kind)
    elif name == "consistency":
        rule.target.logits = torch.from_numpy(MEAN)[rows]
    return rule


def some_logits():
    return torch.from_numpy(np.random.default_rng(0).normal(scale=2, size=(len(LABELS), K)))


def target_by_hand(name, x, marker, row):
    """What a generated image with logits x (a list), in a row of the batch, is taught: a list."""
    if name == "consistency":
        weights = [math.exp(value) for value in row]
        return [w / sum(weights) for w in weights]
    if name == "lsro":
        return [1 / K] * K
    if name == "all_in_one":
        return [0.0] * (K - 1) + [1.0]
    if name == "pseudo":
        return [float(k == x.index(max(x))) for k in range(K)]
    if name == "mprl_dynamic":
        weights = [sum((x[j], j) <= (x[k], k) for j in range(K)) for k in range(K)]
    else:
        weights = TABLES[name][-marker - 1]
    return [w / sum(weights) for w in weights]


def by_hand(name, logits, labels, generated, weight=1.0, smoothing=0.0, rows=slice(None)):
    total, lists = 0.0, (logits.tolist(), labels.tolist(), generated.tolist(), MEAN[rows].tolist())
    for x, label, made, row in zip(*lists, strict=True):
        log_p = [value - math.log(sum(math.exp(other) for other in x)) for value in x]
        identities = K - (name == "all_in_one")
        if made:
            target = target_by_hand(name, x, label, row)
            total -= weight * sum(q * lp for q, lp in zip(target, log_p, strict=True))
        else:
            total -= (1 - smoothing) * log_p[label]
            total -= smoothing * sum(log_p[:identities]) / identities
    return total / len(logits)


@pytest.mark.parametrize("name", losses.RULES)
@pytest.mark.parametrize("weight, smoothing", [(1.0, 0.0), (0.3, 0.1)])
def test_each_rule_by_hand(name, weight, smoothing):
    logits = some_logits()
    found = rule_of(name, weight)(logits, LABELS, GENERATED, smoothing)
    expected = by_hand(name, logits, LABELS, GENERATED, weight, smoothing)
    assert found.item() == pytest.approx(expected, abs=1e-12)
    order = torch.tensor([6, 2, 7, 0, 5, 4, 1, 3])  # the same images in another order
    rule = rule_of(name, weight, rows=order)
    again = rule(logits[order], LABELS[order], GENERATED[order], smoothing)
    assert again.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", losses.RULES)
def test_gradients_take_the_target_for_a_constant(name):
    """Of -sum q log p it is p - q, also where q follows from p itself."""
    logits = some_logits().requires_grad_()
    rule_of(name, 0.3)(logits, LABELS, GENERATED).backward()
    lists = logits.tolist(), LABELS.tolist(), logits.grad, MEAN.tolist()
    for x, label, gradient, row in zip(*lists, strict=True):
        p = [math.exp(value) / sum(map(math.exp, x)) for value in x]
        real = [float(k == label) for k in range(K)]
        q = real if label >= 0 else target_by_hand(name, x, label, row)
        share = (1.0 if label >= 0 else 0.3) / len(LABELS)
        expected = [share * (a - b) for a, b in zip(p, q, strict=True)]
        np.testing.assert_allclose(gradient, expected, atol=1e-12)


@pytest.mark.parametrize("name", losses.RULES)
def test_batches_of_one_kind(name):
    for some in (GENERATED == 1, GENERATED == 0):
        batch = some_logits()[some], LABELS[some], GENERATED[some]
        found = rule_of(name, rows=some)(*batch).item()
        assert found == pytest.approx(by_hand(name, *batch, rows=some), abs=1e-12)
    if name != "all_in_one":
        found = rule_of(name, rows=some)(*batch, 0.1)
        assert torch.allclose(found, losses.cross_entropy(*batch, 0.1))


@pytest.mark.parametrize("name", losses.RULES)
def test_bf16_logits_are_left_alone_and_computed_in_fp32(name):
    logits = some_logits().bfloat16()
    before = logits.clone()
    loss = rule_of(name)(logits, LABELS, GENERATED)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, rule_of(name)(logits.float(), LABELS, GENERATED))
    assert loss.item() == pytest.approx(by_hand(name, logits, LABELS, GENERATED), abs=1e-5)
    assert torch.equal(logits, before)
    real = GENERATED == 0
    baseline = losses.cross_entropy(logits[real], LABELS[real], GENERATED[real])
    assert baseline.dtype == torch.float32


def test_weight_counts_after_the_start():
    logits = some_logits()
    batch = logits, LABELS, GENERATED
    none, full = by_hand("pseudo", *batch, 0.0), by_hand("pseudo", *batch, 0.1)
    rule = rule_of("pseudo", 0.1, 20)
    for epoch, expected in [(1, none), (20, none), (21, full), (130, full)]:
        assert rule(*batch, epoch=epoch).item() == pytest.approx(expected, abs=1e-12)
    assert none != pytest.approx(full)


def test_equal_probabilities_are_ranked_by_class():
    logits = torch.tensor([[2.0, 1.0, 2.0, 1.0, 1.0]])
    assert losses.ranks(logits).tolist() == [[4, 1, 5, 2, 3]]
    assert losses.ranks(torch.zeros(3, 5)).tolist() == [[1, 2, 3, 4, 5]] * 3


def test_lsro_is_least_at_the_uniform_distribution():
    generated, marker = torch.ones(4, dtype=torch.long), torch.full((4,), -1)
    even = losses.label_rule("lsro")(torch.zeros(4, 10), marker, generated)
    assert even.item() == pytest.approx(math.log(10), abs=1e-6)
    assert losses.label_rule("lsro")(torch.randn(4, 10), marker, generated) > even


def test_a_table_of_ranks_of_many_classes_keeps_its_digits():
    weights = torch.stack([torch.randperm(4000) + 1 for _ in range(3)]).int()
    table = FixedTargets()
    table.weights = weights
    rows = table(torch.zeros(2, 4000), torch.tensor([-3, -1]))
    expected = weights[[2, 0]].double() / (4000 * 4001 / 2)
    assert torch.allclose(rows.double(), expected, rtol=1e-6)
