"""How sure a score is: bootstrap intervals, and a paired test of two models on the same queries.

A person's queries succeed or fail together, so identities are resampled, not queries (a cluster
bootstrap; Davison & Hinkley, "Bootstrap Methods and their Application", 1997, section 3.8).
What is asked is how the scores would vary over other people, with the trained model as it is.
"""

import numpy as np

DRAWS = 2000
LEVEL = 95  # percent
FLIPS = 10000
BLOCK = 500  # draws made at a time, to bound memory
SEED = 0  # the same file gives the same interval


def interval(values, identities):
    """95 % interval of the mean of `values` over queries: arrays (low, high) [M], for [Nq, M].

    identities: [Nq], whose query each is.
    Percentiles of the means of resampled identities. (NaN, NaN) with fewer than two of them.
    """
    people = per_identity(np.column_stack([values, np.ones(len(values))]), identities)
    if len(people) < 2:
        return (np.full(values.shape[1], np.nan),) * 2
    rng = np.random.default_rng(SEED)
    means = []
    for _ in range(0, DRAWS, BLOCK):
        drawn = rng.integers(len(people), size=(BLOCK, len(people)))
        drawn += np.arange(BLOCK)[:, None] * len(people)
        times = np.bincount(drawn.ravel(), minlength=BLOCK * len(people)).reshape(BLOCK, -1)
        sums = times @ people
        means.append(sums[:, :-1] / sums[:, -1:])
    tail = (100 - LEVEL) / 2
    return tuple(np.percentile(np.concatenate(means), [tail, 100 - tail], axis=0))


def p_value(differences, identities):
    """Two-sided p-values of the mean of paired `differences` [Nq, M] being 0: [M].

    A permutation test: if the two models were alike, each identity's differences could as well
    have the other sign. The share of random signs whose mean is as far from 0.
    """
    people = per_identity(differences, identities)
    observed = np.abs(people.sum(axis=0))
    rng = np.random.default_rng(SEED)
    extreme = np.ones(differences.shape[1])  # what was seen is one of the possible signs
    for _ in range(0, FLIPS, BLOCK):
        signs = rng.integers(2, size=(BLOCK, len(people))) * 2.0 - 1
        # Sums in another order differ in their last digits: those count as equal.
        extreme += (np.abs(signs @ people) >= observed * (1 - 1e-9)).sum(axis=0)
    return extreme / (FLIPS + 1)


def per_identity(values, identities):
    """Sums of `values` [Nq, M] over the queries of each identity: [identities, M]."""
    _, person = np.unique(identities, return_inverse=True)
    sums = np.zeros((person.max() + 1, values.shape[1]))
    np.add.at(sums, person, values)
    return sums
