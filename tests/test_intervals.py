"""Error bars are what they claim: coverage, false alarms and power, by simulation."""

import numpy as np
import pytest
from scipy import stats

from reid import intervals


def hits(rng, identities, mean, queries=4):
    """Hits [Nq, 1] of people of different difficulty: Rank@1 is `mean` over all people."""
    chance = rng.beta(3 * mean, 3 * (1 - mean), identities)
    person = np.repeat(np.arange(identities), queries)
    return (rng.random(len(person)) < chance[person])[:, None].astype(float), person


SIMULATED = [(50, 0.97), (50, 0.6), (150, 0.92)]


@pytest.mark.parametrize(
    ("identities", "mean"),
    [(15, 0.8), *(pytest.param(*case, marks=pytest.mark.slow) for case in SIMULATED)],
)
def test_the_interval_covers_the_truth_95_times_in_100(identities, mean):
    rng = np.random.default_rng(1)
    covered = clustered = 0
    trials = 400
    for _ in range(trials):
        values, person = hits(rng, identities, mean)
        low, high = intervals.interval(values, person)
        covered += low[0] <= mean <= high[0]
        # As if queries of one person were independent: too narrow.
        low, high = intervals.interval(values, np.arange(len(person)))
        clustered += low[0] <= mean <= high[0]
    assert 0.92 <= covered / trials <= 0.99
    assert clustered < covered - 0.02 * trials


def test_bca_by_hand():
    """Efron 1987, with Student's t; of draws whose quantile q is q."""
    draws = (np.arange(2000)[:, None] + 0.5) / 2000
    left_out = np.array([0.0] * 30 + [4.0])[:, None]  # one person matters most
    ends = intervals.bca(draws, np.array([0.6]), left_out)
    influence = left_out.mean() - left_out
    skew = (influence**3).sum() / (6 * (influence**2).sum() ** 1.5)
    bias, reach = stats.norm.ppf(0.6), stats.t.ppf(0.975, 30) * np.sqrt(31 / 30)
    for end, z in zip(ends, (bias - reach, bias + reach), strict=True):
        assert end[0] == pytest.approx(stats.norm.cdf(bias + z / (1 - skew * z)), abs=1e-3)


def test_a_score_that_all_have_is_certain_however_many_queries_each_has():
    person = np.repeat(np.arange(12), np.arange(1, 13))
    low, high = intervals.interval(np.full((len(person), 1), 0.5), person)
    assert [low[0], high[0]] == pytest.approx([0.5, 0.5])


def test_the_interval_holds_the_score_and_is_the_same_again():
    values, person = hits(np.random.default_rng(0), 80, 0.7)
    low, high = intervals.interval(values, person)
    assert low[0] < values.mean() < high[0]
    assert intervals.interval(values, person) == (low, high)


def test_columns_are_independent_of_each_other():
    values, person = hits(np.random.default_rng(0), 30, 0.7)
    low, high = intervals.interval(np.hstack([values, 1 - values]), person)
    one = intervals.interval(values, person)
    assert [low[0], high[0]] == pytest.approx([one[0][0], one[1][0]])
    assert low[1] == pytest.approx(1 - high[0], abs=0.01)


def test_one_identity_has_no_interval():
    low, high = intervals.interval(np.ones((5, 2)), np.full(5, 7))
    assert np.isnan([*low, *high]).all()


def test_perfect_scores_of_few_people_prove_little():
    low, high = intervals.interval(np.ones((60, 1)), np.repeat(np.arange(30), 2))
    assert (low[0], high[0]) == (0.9, 1)
    low, high = intervals.interval(np.zeros((60, 1)), np.repeat(np.arange(30), 2))
    assert (low[0], high[0]) == (0, 0.1)
    same = intervals.interval(np.zeros((60, 1)), np.repeat(np.arange(30), 2), fractions=False)
    assert same[0][0] == same[1][0] == 0  # of two models that agree on all


def pair(rng, better, identities=100):
    """AP differences [Nq, 1] of two models, the first better by `better` on average."""
    person = np.repeat(np.arange(identities), 3)
    own = rng.normal(scale=0.1, size=identities)
    return (better + own[person] + rng.normal(scale=0.1, size=len(person)))[:, None], person


def test_without_a_difference_few_false_alarms():
    rng = np.random.default_rng(2)
    p = np.array([intervals.p_value(*pair(rng, 0.0))[0] for _ in range(300)])
    assert 0.02 <= (p < 0.05).mean() <= 0.08
    assert 0.4 <= p.mean() <= 0.6


def test_a_known_difference_is_found():
    rng = np.random.default_rng(3)
    found = [intervals.p_value(*pair(rng, 0.05))[0] < 0.05 for _ in range(50)]
    assert np.mean(found) > 0.95
    values, person = pair(rng, 0.05)
    low, high = intervals.interval(values, person, fractions=False)
    assert 0 < low[0] < 0.05 < high[0]


def test_the_same_model_twice():
    assert intervals.p_value(np.zeros((12, 2)), np.repeat([1, 2, 3], 4)).tolist() == [1, 1]


def test_p_of_few_identities_is_every_sign_counted():
    # Three identities that agree: of eight signs two are as extreme.
    p = intervals.p_value(np.ones((3, 1)), np.arange(3))
    assert p[0] == pytest.approx(0.25, abs=0.02)
