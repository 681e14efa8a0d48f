"""Thresholds for "same person": rates against plain counting, what is stored, who uses it."""

import hashlib
import json
import shutil

import numpy as np
import pytest
from conftest import call, exit_code, random_sets

import evaluate
from reid import verification
from reid.errors import UserError
from reid.mat import EvalSets, FeatureSet, save_mat


def plain_pairs(query, gallery):
    """Similarities of impostor and genuine pairs, one pair at a time."""
    impostor, genuine = [], []
    for q, feature in enumerate(query.features):
        for g, other in enumerate(gallery.features):
            similarity = float(feature @ other)
            same = query.identities[q] == gallery.identities[g]
            if gallery.identities[g] == -1:
                continue
            if not same:
                impostor.append((q, similarity))
            elif query.cameras[q] != gallery.cameras[g]:
                genuine.append((q, similarity))
    return impostor, genuine


@pytest.mark.parametrize("rate", [0.03, 0.1, 0.5])
def test_threshold_against_plain_counting(rate):
    sets = random_sets(noise=0.8)
    impostor, genuine = plain_pairs(sets.query, sets.gallery)
    threshold = verification.threshold_at(
        rate, verification.rates_by_step(sets.query, sets.gallery)
    )

    def false_match_rate(at):
        by_query = [[s >= at for r, s in impostor if r == q] for q in range(len(sets.query[0]))]
        return np.mean([np.mean(reached) for reached in by_query])

    assert false_match_rate(threshold) <= rate < false_match_rate(threshold - 1.1e-5) + 0.02
    ordered = sorted((s for _, s in impostor), reverse=True)
    below = next(s for s in ordered if s < threshold - 1e-5)
    assert false_match_rate(below) > rate
    found = verification.rates_at(threshold, sets.query, sets.gallery)
    assert found["impostors"] == len(impostor)
    assert found["genuine"] == len(genuine)
    for name, pairs in (("false_match", impostor), ("true_match", genuine)):
        queries = sorted({q for q, _ in pairs})
        shares = [np.mean([s >= threshold for r, s in pairs if r == q]) for q in queries]
        assert found[f"{name}_rate"] == pytest.approx(np.mean(shares))
        low, high = found[f"{name}_interval"]
        assert low <= found[f"{name}_rate"] <= high


def test_junk_queries_make_no_pairs():
    sets = random_sets(noise=0.8)
    found = verification.rates_at(0.1, sets.query, sets.gallery)
    junk = sets.query._replace(identities=np.append(sets.query.identities[:-1], -1))
    fewer = verification.rates_at(0.1, junk, sets.gallery)
    last = plain_pairs(FeatureSet(*(part[-1:] for part in sets.query)), sets.gallery)
    assert fewer["impostors"] == found["impostors"] - len(last[0])
    assert fewer["genuine"] == found["genuine"] - len(last[1])


def test_the_interval_of_false_matches_draws_both_people(monkeypatch):
    """Draws and jackknife against loops over all pairs; distractors stay as they are."""
    seen, real = [], verification.bca
    monkeypatch.setattr(verification, "bca", lambda *a: seen.append(a) or real(*a))
    query, gallery = random_sets(noise=0.8)[:2]
    verification.rates_at(0.5, query, gallery)
    pairs = []  # the people of query and image, the pair's weight, whether it reaches
    for feature, one in zip(query.features, query.identities, strict=True):
        images = np.flatnonzero((gallery.identities != one) & (gallery.identities != -1))
        for n in images:
            reaches = feature @ gallery.features[n] >= 0.5
            pairs.append((one, gallery.identities[n], 1 / len(images), reaches))
    one, other, weight, reaches = (np.array(column) for column in zip(*pairs, strict=True))

    def rate(people, number):  # where these come so many times, all others once
        times = np.ones(7)
        times[people] = number
        weights = weight * times[one] * times[other]
        return (weights * reaches).sum() / weights.sum()

    people = np.arange(1, 7)  # neither junk nor distractors
    assert {*gallery.identities} == {-1, 0, *people}
    draws, _, left = seen[0]
    np.testing.assert_allclose(left[:, 0], [rate(n, 0) for n in people])
    rng = np.random.default_rng(verification.SEED)
    times = rng.multinomial(6, np.full(6, 1 / 6), verification.DRAWS)
    np.testing.assert_allclose(draws[:50, 0], [rate(people, row) for row in times[:50]])


def test_pairs_that_are_all_alike():
    """Equal similarities reach a threshold together or not at all."""
    features = np.full((40, 4), 0.4, np.float32)  # as if similarities were 0.64
    people = FeatureSet(features, np.arange(40), np.ones(40, int))
    threshold = verification.threshold_at(0.5, verification.rates_by_step(people, people))
    assert 0.64 < threshold < 0.64002
    found = verification.rates_at(threshold, people, people)
    assert found["false_match_rate"] == 0
    assert (found["true_match_rate"], found["genuine"]) == (None, 0)
    people = people._replace(features=np.full((40, 4), 0.5, np.float32))
    with pytest.raises(UserError, match="100 % of image pairs of different people have equal"):
        verification.threshold_at(0.5, verification.rates_by_step(people, people))


def test_curves_against_the_rates_at_each_threshold():
    sets = random_sets(noise=0.8)
    curves = verification.rate_curves(verification.rates_by_step(sets.query, sets.gallery))
    steps = np.linspace(-1, 1, verification.STEPS + 1)
    for number in (0, 7, 100, 150, 193, 200):
        found = verification.rates_at(steps[number], sets.query, sets.gallery)
        for name, curve in curves.items():
            assert len(curve) == len(steps)
            assert curve[number] == pytest.approx(found[f"{name}_rate"], abs=1e-3)
    assert set(curves) == {"false_match", "true_match"}
    for curve in curves.values():
        assert curve == sorted(curve, reverse=True) and curve[0] == 1
    # No image pairs of the same person: no rate of them.
    people = FeatureSet(sets.query.features, np.arange(12), np.ones(12, int))
    assert set(verification.rate_curves(verification.rates_by_step(people, people))) == {
        "false_match"
    }


def test_rate_at_a_threshold():
    curve = [1 - n / 200 for n in range(201)]
    stored = {"threshold": 0.5, "false_match_rate": 0.1, "true_match_rate": None}
    assert verification.rate_at(stored, 0.5) == 0.1
    assert verification.rate_at(stored, 0.6) is None  # a file of an older version
    stored |= {"curves": {"false_match": curve}}
    assert verification.rate_at(stored, 0.5) == 0.1
    for threshold, rate in ((-1, 1), (0.6, 0.2), (0.605, 0.1975), (1, 0)):
        assert verification.rate_at(stored, threshold) == pytest.approx(rate)
    assert verification.rate_at(stored, 0.6, "true_match") is None


@pytest.mark.parametrize(
    "curves", [[], {"false_match": 1}, {"false_match": [0.5]}, {"x": [""] * 201}]
)
def test_curves_that_are_none(written, curves, capsys):
    mat, run = written
    call(evaluate.main, mat, "--calibrate", 0.1)
    stored = json.loads((run / "threshold.json").read_text())
    assert verification.stored_threshold(run)["curves"] == stored["curves"]
    (run / "threshold.json").write_text(json.dumps(stored | {"curves": curves}))
    with pytest.raises(UserError, match=r"its curves? .*calibrate again"):
        verification.stored_threshold(run)
    del stored["curves"]
    (run / "threshold.json").write_text(json.dumps(stored))
    assert verification.stored_threshold(run) == stored


WEIGHTS = hashlib.sha256(b"weights").hexdigest()


@pytest.fixture
def written(tmp_path):
    """A .mat file as test.py writes it, and its run folder."""
    run = tmp_path / "project" / "model" / "run"
    run.mkdir(parents=True)
    (run / "net_last.pth").write_bytes(b"weights")
    source = {"run": str(run), "run_from_mat": "model/run", "split": "val"}
    source |= {"weights_sha256": WEIGHTS, "scales": [1.0]}
    mat = tmp_path / "project" / "val.mat"
    save_mat(mat, random_sets()._replace(source=source))
    return mat, run


def test_calibrate(written, capsys):
    mat, run = written
    call(evaluate.main, mat, "--calibrate", 0.1)
    out = capsys.readouterr().out
    stored = json.loads((run / "threshold.json").read_text())
    assert f"threshold {stored['threshold']:.4f}: false-match rate" in out
    assert "people that the network was trained on" in out
    assert 0 < stored["false_match_rate"] <= 0.11
    assert stored["made_by"] == {"weights_sha256": WEIGHTS, "scales": [1.0]}
    assert (stored["asked_rate"], stored["mat"], stored["queries"]) == (0.1, str(mat), "val")
    assert "git" in stored
    # Scoring says the rates at the stored threshold, too; also of other pairs of this network.
    results = run / "results.json"
    call(evaluate.main, mat, "--json", results)
    assert f"threshold {stored['threshold']:.4f}: false-match rate" in capsys.readouterr().out
    section = json.loads(results.read_text())["verification"]
    assert section["true_match_rate"] == stored["true_match_rate"]
    # Another network's features in the same run folder are not compared with it.
    source = {"run": str(run), "split": "query", "weights_sha256": "cd", "scales": [1.0]}
    save_mat(mat, random_sets(seed=1)._replace(source=source))
    call(evaluate.main, mat)
    assert "threshold" not in capsys.readouterr().out


def test_calibrate_writes_into_the_project_that_it_is_run_in(written, tmp_path):
    """A copied project's run folder is its own; so is a moved one's."""
    _, run = written
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "project", copy)
    call(evaluate.main, copy / "val.mat", "--calibrate", 0.1)
    assert (copy / "model" / "run" / "threshold.json").exists()
    assert not (run / "threshold.json").exists()
    moved = (tmp_path / "project").rename(tmp_path / "moved")
    call(evaluate.main, moved / "val.mat", "--calibrate", 0.1)
    assert (moved / "model" / "run" / "threshold.json").exists()
    # The file alone was moved: the run is where it was. Beside a run: it is of that one.
    away = (moved / "val.mat").rename(tmp_path / "val.mat")
    moved.rename(tmp_path / "project")
    call(evaluate.main, away, "--calibrate", 0.2)
    assert json.loads((run / "threshold.json").read_text())["asked_rate"] == 0.2
    beside = away.rename(copy / "model" / "run" / "val.mat")
    call(evaluate.main, beside, "--calibrate", 0.3)
    stored = json.loads((copy / "model" / "run" / "threshold.json").read_text())
    assert stored["asked_rate"] == 0.3


def test_a_run_that_has_other_weights_by_now(written, capsys):
    mat, run = written
    (run / "net_last.pth").write_bytes(b"of a later epoch")
    assert exit_code(evaluate.main, mat, "--calibrate", 0.1) == 2
    assert "is gone or has other weights by now" in capsys.readouterr().err


def test_calibrate_mistakes(written, tmp_path, capsys):
    mat, run = written
    save_mat(tmp_path / "other.mat", EvalSets(*random_sets()[:2]))
    (run / "threshold.json").write_text("no JSON")
    for flags, says in [
        ((mat, "--calibrate", 1e-6), "too low a rate to be seen in"),
        ((mat, "--calibrate", 0), "--calibrate"),
        ((mat, "--calibrate", 0.1, "--json", run / "r.json"), "--json: goes with scores"),
        ((mat, "--calibrate", 1), "--calibrate"),
        ((tmp_path / "other.mat", "--calibrate", 0.1), "other.mat: doesn't say which run made it"),
        ((mat,), "threshold.json: not valid JSON"),
    ]:
        capsys.readouterr()
        assert exit_code(evaluate.main, *flags) == 2
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1
        assert says in err
