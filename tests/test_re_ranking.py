"""Re-ranking against the formula written down set by set."""

import numpy as np
import pytest

from re_ranking import re_ranking


def by_the_formula(queries, gallery, k1, k2, lambda_value):
    """The formula with Python sets and loops, nothing shared with the implementation."""
    f = np.concatenate([queries, gallery]).astype(np.float64)
    n, nq = len(f), len(queries)
    d = 2 - 2 * f @ f.T
    d /= d.max(axis=1, keepdims=True)
    order = np.argsort(d, axis=1, kind="stable")

    def nearest(i, k):
        return set(order[i, : k + 1].tolist())

    def reciprocal(i, k):
        return {j for j in nearest(i, k) if i in nearest(j, k)}

    v = np.zeros((n, n))
    for i in range(n):
        base = reciprocal(i, k1)
        expanded = set(base)
        for c in base:
            candidate = reciprocal(c, round(k1 / 2))
            if len(candidate & base) > 2 / 3 * len(candidate):
                expanded |= candidate
        total = sum(np.exp(-d[i, j]) for j in expanded)
        for j in expanded:
            v[i, j] = np.exp(-d[i, j]) / total
    if k2 != 1:
        v = np.array([v[order[i, :k2]].mean(axis=0) for i in range(n)])
    final = np.zeros((nq, n - nq))
    for q in range(nq):
        for g in range(n - nq):
            m = np.minimum(v[q], v[nq + g]).sum()
            final[q, g] = (1 - lambda_value) * (1 - m / (2 - m)) + lambda_value * d[q, nq + g]
    return final


@pytest.mark.parametrize(
    ("k1", "k2", "lambda_value", "queries", "gallery"),
    [
        (20, 6, 0.3, 10, 60),
        (5, 3, 0.5, 8, 30),  # k1 / 2 = 2.5 rounds to 2
        (7, 1, 0.0, 8, 30),  # k1 / 2 = 3.5 rounds to 4; no averaging
        (20, 6, 0.3, 1, 5),  # fewer images than k1
        (6, 2, 0.3, 4, 1),
    ],
)
def test_against_the_formula(k1, k2, lambda_value, queries, gallery):
    rng = np.random.default_rng(k1)
    centres = rng.normal(size=(6, 16))
    f = centres[rng.integers(0, 6, queries + gallery)] + rng.normal(
        scale=0.8, size=(queries + gallery, 16)
    )
    f /= np.linalg.norm(f, axis=1, keepdims=True)
    q, g = f[:queries], f[queries:]
    found = re_ranking(q @ g.T, q @ q.T, g @ g.T, k1, k2, lambda_value)
    np.testing.assert_allclose(found, by_the_formula(q, g, k1, k2, lambda_value), atol=1e-5)
