"""Compute intervals of scores, of two kinds that must not be confused.

Over other people (`mean_intervals`, `interval`, `p_value`): how a score would vary over other
people to test on, with the trained network and the gallery as they are. A person's queries succeed
or fail together, so identities are resampled, not queries (a cluster bootstrap; Davison & Hinkley,
"Bootstrap Methods and their Application", 1997, section 3.8).

Over training seeds (`mean_interval`, `paired_p`, `seeds_needed`): how a score varies from one
training to the next, on the same people to test on.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from scipy.special import chdtri, ndtr, ndtri, stdtr, stdtrit

DRAWS = 2000  # bootstrap samples of the identities
LEVEL = 0.95
POWER = 0.8  # chance that a study finds the difference it plans for
SAME_SPREAD = 1e-12  # up to which differences of scores differ by rounding alone
MOST_SEEDS = 1000  # beyond which nobody plans a study
FLIPS = 10000  # random signs of a permutation test
BLOCK = 500  # draws or flips made at a time, to bound memory
SEED = 0  # the same file gives the same interval
FEW = 10  # identities: intervals of fewer are too narrow


class Interval(NamedTuple):
    """A mean over queries and its 95 % interval; low and high are NaN where there can be none."""

    value: float
    low: float
    high: float

    def __str__(self):
        ends = f"{100 * self.low:.2f} to {100 * self.high:.2f}" if self.known else ""
        return f"{100 * self.value:.2f} % ({ends or 'one identity: no interval'})"

    @property
    def known(self) -> bool:
        """Whether there is an interval."""
        return not np.isnan(self.low)

    def ends(self) -> list[float] | None:
        """Return low and high, as JSON can hold them; None where there are none."""
        return [float(self.low), float(self.high)] if self.known else None


def mean_intervals(
    values: np.ndarray, identities: np.ndarray, fractions: bool = True
) -> list[Interval]:
    """Return the `Interval` of each column of `values`; the arguments are those of `interval`."""
    low, high = interval(values, identities, fractions)
    return [Interval(*map(float, row)) for row in zip(values.mean(axis=0), low, high, strict=True)]


def interval(
    values: np.ndarray, identities: np.ndarray, fractions: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Return the 95 % intervals, arrays (low, high) [M], of the means of `values` [Nq, M].

    identities: [Nq], of each query. fractions: whether the values lie in 0..1.
    BCa: percentiles of the means of resampled identities, corrected for bias and skewness (Efron,
    "Better Bootstrap Confidence Intervals", JASA 1987), with Student's t for the normal where
    identities are few. Within half of 3 / identities of 0 or 1 the rule of three, too: that
    fraction of other people may be such as none of these is. (NaN, NaN) with one identity only;
    intervals of fewer than FEW are too narrow.
    """
    people = per_identity(np.column_stack([values, np.ones(len(values))]), identities)
    count = len(people)
    if count < 2:
        return (np.full(values.shape[1], np.nan),) * 2
    mean = values.mean(axis=0)
    others = people.sum(axis=0) - people
    low, high = bca(resampled_means(people), mean, others[:, :-1] / others[:, -1:])
    if fractions:
        unseen = min(1, 3 / count)
        low = np.where(mean > 1 - unseen / 2, np.minimum(low, mean * (1 - unseen)), low)
        high = np.where(mean < unseen / 2, np.maximum(high, mean + (1 - mean) * unseen), high)
    return low, high


def bca(
    draws: np.ndarray, values: np.ndarray, left_out: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ends (low, high) [M] of BCa intervals of M values.

    draws: [DRAWS, M], of resampled identities; values: [M], of all; left_out: [identities, M], with
    each identity left out (the jackknife).
    """
    count = len(left_out)
    below = ((draws < values).mean(axis=0) + (draws <= values).mean(axis=0)) / 2
    bias = ndtri(below.clip(1 / DRAWS, 1 - 1 / DRAWS))
    influence = left_out.mean(axis=0) - left_out
    spread = (influence**2).sum(axis=0).clip(1e-30) ** 1.5
    skew = (influence**3).sum(axis=0) / (6 * spread)
    reach = stdtrit(count - 1, (1 + LEVEL) / 2) * np.sqrt(count / (count - 1))
    bounds = []
    for z in (bias - reach, bias + reach):
        quantile = ndtr(bias + z / (1 - skew * z).clip(0.1))
        bounds.append([np.quantile(column, q) for column, q in zip(draws.T, quantile, strict=True)])
    return tuple(np.array(bounds))


def resampled_means(people):
    """Return means [DRAWS, M] over identities drawn with replacement.

    people: [identities, M + 1], an identity's sums of M values, then its number of queries.
    """
    count = len(people)
    rng = np.random.default_rng(SEED)
    means = []
    for _ in range(0, DRAWS, BLOCK):
        drawn = rng.integers(count, size=(BLOCK, count)) + np.arange(BLOCK)[:, None] * count
        times = np.bincount(drawn.ravel(), minlength=BLOCK * count).reshape(BLOCK, count)
        sums = times @ people
        means.append(sums[:, :-1] / sums[:, -1:])
    return np.concatenate(means)


def p_value(differences: np.ndarray, identities: np.ndarray) -> np.ndarray:
    """Return two-sided p-values [M] of the means of paired `differences` [Nq, M] being 0.

    A permutation test: if the two models were alike, each identity's differences could as well
    have the other sign. The p-value is the fraction of random signs whose mean is as far from 0.
    """
    people = per_identity(differences, identities)
    observed = np.abs(people.sum(axis=0))
    rounding = 1e-9 * np.abs(people).sum(axis=0)
    rng = np.random.default_rng(SEED)
    extreme = np.ones(differences.shape[1])  # what was seen is one of the possible signs
    for _ in range(0, FLIPS, BLOCK):
        signs = rng.integers(2, size=(BLOCK, len(people))) * 2.0 - 1
        # Sums in another order differ in their last digits: those count as equal.
        extreme += (np.abs(signs @ people) >= observed - rounding).sum(axis=0)
    return extreme / (FLIPS + 1)


def per_identity(values, identities):
    """Sum `values` [Nq, M] over the queries of each identity: [identities, M]."""
    _, person = np.unique(identities, return_inverse=True)
    sums = np.zeros((person.max() + 1, values.shape[1]))
    np.add.at(sums, person, values)
    return sums


def mean_interval(values: Iterable[float]) -> tuple[float, list[float] | None]:
    """Return the mean of `values`, one a seed, and its 95 % interval [low, high] by Student's t.

    The interval is None with one seed: a single training says nothing of how others would end.
    """
    values = np.array([*values], float)
    mean, count = float(values.mean()), len(values)
    if count == 1:
        return mean, None
    reach = stdtrit(count - 1, (1 + LEVEL) / 2) * values.std(ddof=1) / np.sqrt(count)
    return mean, [float(mean - reach), float(mean + reach)]


def paired_p(differences: Iterable[float]) -> float | None:
    """Return the two-sided p-value of the mean of paired `differences` being 0, by Student's t.

    None with one seed, or where all differences are the same.
    """
    values = np.array([*differences], float)
    spread = values.std(ddof=1) if len(values) > 1 else 0.0
    if spread < SAME_SPREAD:
        return None
    t = values.mean() / (spread / np.sqrt(len(values)))
    return float(2 * stdtr(len(values) - 1, -abs(t)))


def adjusted(p_values: list[float | None]) -> list[float | None]:
    """Return p-values adjusted for their number, in their order; None stays None, but counts.

    Holm, "A Simple Sequentially Rejective Multiple Test Procedure", Scandinavian Journal of
    Statistics 1979: if nothing differs, one of them is below 0.05 in at most 5 % of such lists,
    however long.
    """
    result, smallest = list(p_values), 0.0
    known = [n for n, value in enumerate(p_values) if value is not None]
    for rank, n in enumerate(sorted(known, key=p_values.__getitem__)):
        smallest = max(smallest, min(1.0, (len(p_values) - rank) * p_values[n]))
        result[n] = smallest
    return result


def seeds_needed(spread: float, difference: float) -> int | None:
    """Return how many seeds a paired t-test needs to find a true difference in 80 % of studies.

    spread: standard deviation of the differences of one seed. None where 1,000 are too few.
    """
    for seeds in range(2, MOST_SEEDS + 1):
        if power(spread, difference, seeds) >= POWER:
            return seeds
    return None


def power(spread: float, difference: float, seeds: int) -> float:
    """Return the chance that a two-sided paired t-test of so many seeds finds a difference."""
    if spread < SAME_SPREAD:
        return 1.0
    shift = difference / spread * np.sqrt(seeds)
    # The mean over what the pairs' own deviation may come out as: the noncentral t distribution,
    # which SciPy has as nctdtr, but that is NaN for some of these numbers.
    level = (np.arange(2000) + 0.5) / 2000
    limit = stdtrit(seeds - 1, (1 + LEVEL) / 2) * np.sqrt(chdtri(seeds - 1, level) / (seeds - 1))
    return float((ndtr(shift - limit) + ndtr(-shift - limit)).mean())


def spread_interval(spread: float, seeds: int) -> tuple[float, float]:
    """Return the 95 % interval of a standard deviation that was measured on so many seeds."""
    ends = chdtri(seeds - 1, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    low, high = spread * np.sqrt((seeds - 1) / ends)
    return float(low), float(high)
