"""Re-ranking: the plain code against the formula set by set, ours against the plain code."""

import io
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from conftest import ROOT

import re_ranking as ours
from benchmarks import dense
from re_ranking import Features, neighbours, re_ranking, rerank


def by_the_formula(queries, gallery, k1, k2, lambda_value):
    """The formula with Python sets and loops, nothing shared with the implementations."""
    f = np.concatenate([queries, gallery]).astype(np.float64)
    n, nq = len(f), len(queries)
    d = 2 - 2 * f @ f.T
    d /= d.max(axis=1, keepdims=True)
    order = np.argsort(np.where(np.eye(n, dtype=bool), -1, d), axis=1, kind="stable")

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


def people(rng, queries, gallery, dim=16, identities=6, noise=0.8):
    """Unit features float32 of noisy identities: queries and gallery."""
    centres = rng.normal(size=(identities, dim))
    f = centres[rng.integers(0, identities, queries + gallery)]
    f = f + rng.normal(scale=noise, size=f.shape)
    f = (f / np.linalg.norm(f, axis=1, keepdims=True)).astype(np.float32)
    return f[:queries], f[queries:]


def exact(a, b):
    """Similarities as re_ranking.py defines them: float64, rounded to float32."""
    return (a.astype(np.float64) @ b.astype(np.float64).T).astype(np.float32)


def plainly(q, g, *settings):
    return dense.re_ranking(exact(q, g), exact(q, q), exact(g, g), *settings)


def at_once(q, g, *settings, block=1024, keep=False):
    plan = ours.Plan(block, keep, 0)
    return np.concatenate(list(rerank(q, g, *settings, plan)))


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
def test_the_plain_code_against_the_formula(k1, k2, lambda_value, queries, gallery):
    q, g = people(np.random.default_rng(k1), queries, gallery)
    found = plainly(q, g, k1, k2, lambda_value)
    np.testing.assert_allclose(found, by_the_formula(q, g, k1, k2, lambda_value), atol=1e-5)


SLOW_SEEDS = {2, 13, *range(20, 60)}
SEEDS = [
    pytest.param(seed, marks=pytest.mark.slow if seed in SLOW_SEEDS else ()) for seed in range(60)
]


@pytest.mark.parametrize("seed", SEEDS)
def test_against_the_plain_code(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    # Blocks and chunks of every size, down to one image; the smallest take long for many images.
    work, pairs = int(2 ** rng.integers(4, 22)), int(2 ** rng.integers(1, 12))
    monkeypatch.setattr(ours, "WORK", work)
    monkeypatch.setattr(ours, "PAIRS", pairs)
    most = (60, 200) if work >= 1024 and pairs >= 16 else (15, 60)
    queries, gallery = (int(n) for n in rng.integers(1, most))
    if seed % 10 == 0:
        queries = 1
    if seed % 10 == 1:
        gallery = 1
    q, g = people(rng, queries, gallery, dim=int(rng.integers(2, 40)), noise=rng.uniform(0.1, 1.5))
    k1, k2 = int(rng.integers(1, 30)), int(rng.integers(1, 10)) if seed % 3 else 1
    settings = k1, k2, rng.uniform(0, 1)
    expected = plainly(q, g, *settings)
    for block in (1, 7, 32, 1024):
        found = at_once(q, g, *settings, block=block, keep=block % 2 == 1)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=1e-5)
    matrices = re_ranking(exact(q, g), exact(q, q), exact(g, g), *settings)
    np.testing.assert_allclose(matrices, expected, atol=1e-5)


@pytest.mark.parametrize("seed", range(20))
def test_duplicates_and_exact_ties(seed):
    rng = np.random.default_rng(seed)
    few = people(rng, 0, 12, dim=3)[1]  # each image comes many times
    q, g = few[rng.integers(0, 12, 15)], few[rng.integers(0, 12, 90)]
    settings = int(rng.integers(1, 25)), int(rng.integers(1, 8)), 0.3
    expected = plainly(q, g, *settings)
    for block in (4, 64):
        np.testing.assert_allclose(at_once(q, g, *settings, block=block), expected, atol=1e-5)
    matrices = re_ranking(exact(q, g), exact(q, q), exact(g, g), *settings)
    np.testing.assert_allclose(matrices, expected, atol=1e-5)


@pytest.mark.parametrize("seed", range(10))
def test_ties_among_hardly_more_images_than_neighbours(seed):
    rng = np.random.default_rng(seed)
    few = people(rng, 0, 4, dim=3)[1]
    q, g = few[rng.integers(0, 4, 4)], few[rng.integers(0, 4, 20)]
    for k1, k2 in ((20, 6), (8, 20), (22, 3)):  # 24 images, all of them candidates
        found = at_once(q, g, k1, k2, 0.3)
        np.testing.assert_allclose(found, plainly(q, g, k1, k2, 0.3), atol=1e-5)


@pytest.mark.parametrize("block", [16, 1024])
def test_neighbours_closer_than_float32_can_tell(block):
    rng = np.random.default_rng(3)
    f = np.repeat(people(rng, 0, 40, dim=64)[1], 8, axis=0)
    f = f + rng.normal(scale=2e-7, size=f.shape)  # eight near copies of each
    f = f[rng.permutation(len(f))].astype(np.float32)
    order = np.argsort(-exact(f, f) - np.eye(len(f)), axis=1, kind="stable")
    cuts = 13, 7, 4
    nearest, least = neighbours(Features(torch.from_numpy(f)), cuts, block)
    for cut in cuts:
        found, expected = np.sort(nearest[:, :cut].numpy()), np.sort(order[:, :cut])
        assert np.array_equal(found, expected)
    np.testing.assert_allclose(least.numpy(), exact(f, f).min(axis=1), atol=1e-6)


@pytest.mark.parametrize("k2", [1, 6])
def test_one_image_many_times(k2):
    q, g = np.ones((40, 4), np.float32) / 2, np.ones((90, 4), np.float32) / 2
    for block in (4, 1024):
        found = at_once(q, g, 20, k2, 0.3, block=block)
        np.testing.assert_allclose(found, plainly(q, g, 20, k2, 0.3), atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cuda_gives_the_same():
    q, g = people(np.random.default_rng(0), 300, 3000, dim=64, identities=100)
    torch.set_float32_matmul_precision("high")  # as some programs and containers have it
    found = np.concatenate(list(rerank(q, g, device="cuda")))
    assert torch.get_float32_matmul_precision() == "high"
    torch.set_float32_matmul_precision("highest")
    np.testing.assert_allclose(found, at_once(q, g, 20, 6, 0.3), atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_float_types(dtype):
    q, g = (f.astype(dtype) for f in people(np.random.default_rng(0), 10, 50))
    expected = plainly(q.astype(np.float32), g.astype(np.float32), 20, 6, 0.3)
    np.testing.assert_allclose(at_once(q, g, 20, 6, 0.3), expected, atol=1e-5)


def test_arguments_stay_as_they_were():
    q, g = people(np.random.default_rng(0), 10, 50)
    matrices = exact(q, g), exact(q, q), exact(g, g)
    copies = [m.copy() for m in (q, g, *matrices)]
    at_once(q, g, 20, 6, 0.3)
    re_ranking(*matrices)
    for before, after in zip(copies, (q, g, *matrices), strict=True):
        assert np.array_equal(before, after)


# People who look alike, and large sets: long descriptions.
MEMORY = """
import re, sys
import re_ranking, numpy as np
q, g, dim = 2000, 18000, 8
rng = np.random.default_rng(0)
f = rng.normal(size=(600, dim))[rng.integers(0, 600, q + g)] + 0.3 * rng.normal(size=(q + g, dim))
f = f.astype(np.float32)
f /= np.linalg.norm(f, axis=1, keepdims=True)
list(re_ranking.rerank(f[:50], f[50:200]))  # all libraries loaded
peak = lambda: int(re.search("VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1e6
before = peak()
k1 = int(sys.argv[2])
plan = re_ranking.make_plan(q, g, dim, k1, memory=float(sys.argv[1]))
for _ in re_ranking.rerank(f[:q], f[q:], k1, plan=plan):
    pass
print(peak() - before, plan.memory)
"""


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda q, g: (1 - q @ g.T, 1 - q @ q.T, 1 - g @ g.T), r"-1 to 1; .*: distances\?"),
        (lambda q, g: (q @ g.T, 0 * q @ q.T, g @ g.T), r"1 on the diagonal; got 0: distances\?"),
        (lambda q, g: (2 - 2 * q @ g.T, q @ q.T, g @ g.T), "q_g_sim: expected cosine similarities"),
        (lambda q, g: (np.nan * q @ g.T, q @ q.T, g @ g.T), "q_g_sim: .*got nan"),
        (lambda q, g: (q @ g.T, g @ g.T, q @ q.T), r"q_g_sim: expected shape \(4, 4\)"),
        (lambda q, g: (q @ g.T, q @ q.T, g @ g.T, 0), "k1 and k2 of 1 or more"),
        (lambda q, g: (q @ g.T, q @ q.T, g @ g.T, 20, 6, 1.5), "lambda_value from 0 to 1"),
    ],
)
def test_what_re_ranking_cannot_take(wrong, says):
    """Distances in similarities' place, NaN, matrices that are mixed up."""
    queries, gallery = people(np.random.default_rng(0), 4, 9)
    re_ranking(queries @ gallery.T, queries @ queries.T, gallery @ gallery.T)
    with pytest.raises(ValueError, match=says):
        re_ranking(*wrong(queries, gallery))


def test_what_rerank_cannot_take():
    queries, gallery = people(np.random.default_rng(0), 4, 9)
    for wrong in (gallery * 3, gallery * np.nan):
        with pytest.raises(ValueError, match="gallery_f: expected L2-normalised rows"):
            rerank(queries, wrong)
    for wrong in (gallery[0], gallery[:, :3], gallery[:0]):
        with pytest.raises(ValueError, match=r"gallery_f: expected features \[N, D\]"):
            rerank(queries, wrong)
    with pytest.raises(ValueError, match="k1 and k2 of 1 or more"):
        rerank(queries, gallery, k2=0)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("memory", "k1"), [(0.35, 20), (0.9, 20), (0.9, 60)])
def test_memory_is_what_was_said(memory, k1):
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(memory), str(k1)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    grew, said = map(float, done.stdout.split())
    assert grew < said < memory  # a single matrix of these 20,000 images is 1.6 GB
    assert said < 3 * grew + 0.2  # and not by wild overstatement


def test_the_plan_is_the_fastest_that_fits():
    size = 3368, 19732, 1024
    for memory in (0.4, 0.5, 0.8, 100):
        assert ours.make_plan(*size, memory=memory).memory <= memory
    assert ours.make_plan(*size)[:2] == ours.make_plan(*size, memory=100)[:2] == (1024, True)
    assert ours.make_plan(*size, memory=0.5).block < 1024
    assert ours.make_plan(*size, memory=0.1) is None
    assert not ours.make_plan(11659, 82161, 1024).keep  # 4 GB


def test_the_formula_in_the_docstring_is_what_is_computed():
    code = textwrap.dedent(ours.__doc__.split("\n\n")[2])
    assert len(code.splitlines()) == 12
    settings = {"k1": 7, "k2": 3, "lambda_value": 0.3}
    query, gallery = people(np.random.default_rng(0), 12, 48)
    names = {"np": np, "F": np.concatenate([query, gallery]).astype(float), "N": 60, "nq": 12}
    names |= settings
    exec(code, names)
    found = np.concatenate(list(rerank(query, gallery, **settings)))
    np.testing.assert_allclose(found, names["distance"], atol=1e-5)


def test_quick_re_ranking_leaves_nothing_on_a_terminal(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    list(rerank(*people(np.random.default_rng(0), 12, 48)))
    assert terminal.getvalue() == ""
