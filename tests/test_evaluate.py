"""evaluate.py and evaluate_rerank.py: lines, JSON, comparison, multi-query, pictures, FAISS."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import FIXTURES, ROOT, call, exit_code, random_sets
from PIL import Image
from scipy.io import loadmat, savemat

import evaluate
import evaluate_rerank
import reid
from re_ranking import rerank
from reid import metrics, pictures, report
from reid.feature_map import caption, map_features, neighbours, seen_by_several
from reid.mat import EvalSets, load_mat, save_mat
from reid.metrics import FeatureSet

BOTH = pytest.mark.parametrize("script", [evaluate, evaluate_rerank])


def headline(text):
    return next(line for line in text.splitlines() if line.startswith("top1:"))


@BOTH
def test_the_scores_are_the_originals(script, tmp_path):
    call(script.main, FIXTURES / "retrieval.mat", "--json", tmp_path / "r.json")
    found = json.loads((tmp_path / "r.json").read_text())[script.__name__]
    expected = json.loads((FIXTURES / "retrieval_expected.json").read_text())
    original = expected["original" if script is evaluate else "original_reranked"]
    for name, theirs in {"rank1": "top1", "rank5": "top5", "rank10": "top10", "mAP": "mAP"}.items():
        assert found[name] == pytest.approx(original[theirs], abs=1e-6)
    if script is evaluate:
        standard, trapezoid = (
            expected[f"map_{kind}_over_valid_queries"] for kind in ("standard", "trapezoid")
        )
        assert found["mAP_standard_valid"] == pytest.approx(standard, abs=1e-6)
        assert found["mAP_standard"] == pytest.approx(standard * 91 / 98, abs=1e-6)
        assert found["mAP_valid"] == pytest.approx(trapezoid, abs=1e-6)


def test_settings_reach_re_ranking(tmp_path):
    query, gallery = load_mat(FIXTURES / "retrieval.mat")[:2]
    flags = ("--k1", 10, "--k2", 3, "--lambda_value", 0.1, "--json", tmp_path / "r.json")
    call(evaluate_rerank.main, FIXTURES / "retrieval.mat", *flags)
    found = json.loads((tmp_path / "r.json").read_text())["evaluate_rerank"]
    distances = rerank(query.features, gallery.features, 10, 3, 0.1)
    scores = metrics.evaluate((-block for block in distances), query, gallery)
    assert found["mAP"] == pytest.approx(scores.mean_ap())
    assert report.curve(scores, query)[0][0] == scores.rank(1)  # of --plot


@pytest.fixture
def mat(tmp_path):
    """A file with multi-query images and a noisier one of the same images."""
    save_mat(tmp_path / "a.mat", random_sets(dim=16, noise=0.5))
    rng = np.random.default_rng(9)
    sets = random_sets(dim=16, noise=0.5)
    noisy = [
        s._replace(features=s.features + 0.5 * rng.normal(size=s.features.shape)) for s in sets[:2]
    ]
    save_mat(tmp_path / "b.mat", EvalSets(*noisy))
    return tmp_path / "a.mat"


@BOTH
def test_the_original_line_then_what_it_means(script, capsys, tmp_path):
    path = tmp_path / "results.json"
    call(script.main, FIXTURES / "retrieval.mat", "--json", path)
    out = capsys.readouterr().out
    results = json.loads(path.read_text())[script.__name__]
    assert headline(out) == (
        f"top1:{results['rank1']:.6f} top5:{results['rank5']:.6f} "
        f"top10:{results['rank10']:.6f} mAP:{results['mAP']:.6f}"
    )
    low, high = results["rank1_interval"]
    assert low < results["rank1"] < high
    assert f"Rank@1 {100 * results['rank1']:.2f} % ({100 * low:.2f} to {100 * high:.2f})" in out
    assert "98 queries, 7 without a good image" in out
    assert f"the 91 valid queries alone: Rank@1 {100 * results['rank1_valid']:.2f} %" in out
    assert f"mINP {100 * results['mINP']:.2f} %" in out
    assert (results["queries"], results["valid_queries"]) == (98, 91)
    assert results["identities"] == 30
    assert results["made_by"] is None  # another program's file


def test_the_scores_say_what_made_the_features(tmp_path):
    made_by = {"layer": "pool", "size": "128x64"}
    sets = random_sets()._replace(source={"run": "model/r", "images": "0", **made_by})
    save_mat(tmp_path / "a.mat", sets)
    call(evaluate.main, tmp_path / "a.mat", "--json", tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["evaluate"]["made_by"] == made_by


@BOTH
def test_multi_query_of_the_file_and_by_flag(script, mat, tmp_path, capsys):
    call(script.main, mat, "--json", tmp_path / "own.json")
    out = capsys.readouterr().out
    assert "multi-query top1:" in out
    sets = random_sets(dim=16, noise=0.5)
    save_mat(tmp_path / "single.mat", EvalSets(sets.query, sets.gallery))
    save_mat(tmp_path / "multi_query.mat", sets)
    call(script.main, tmp_path / "single.mat")  # a multi_query.mat beside it changes nothing
    assert "multi-query" not in capsys.readouterr().out
    flags = "--multi_query", tmp_path / "multi_query.mat", "--json", tmp_path / "flag.json"
    call(script.main, tmp_path / "single.mat", *flags)
    own, flag = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("own", "flag"))
    assert own[script.__name__]["multi_query"] == flag[script.__name__]["multi_query"]


def test_multi_query_averages_the_images_of_identity_and_camera(capsys):
    sets = random_sets()
    query = report.averaged_queries(sets)
    alone = 0
    for i in range(len(sets.query.cameras)):
        same = (sets.multi.identities == sets.query.identities[i]) & (
            sets.multi.cameras == sets.query.cameras[i]
        )
        mean = sets.multi.features[same].mean(axis=0) if same.any() else sets.query.features[i]
        alone += not same.any()
        np.testing.assert_allclose(query.features[i], mean / np.linalg.norm(mean), atol=1e-6)
    assert alone > 0
    assert f"{alone} queries have no image in it" in capsys.readouterr().out


@BOTH
def test_against_another_model(script, mat, tmp_path, capsys):
    call(script.main, mat, "--against", tmp_path / "b.mat", "--json", tmp_path / "r.json")
    out = capsys.readouterr().out
    call(script.main, tmp_path / "b.mat", "--json", tmp_path / "b.json")
    ours, theirs = (
        json.loads((tmp_path / f"{n}.json").read_text())[script.__name__] for n in ("r", "b")
    )
    assert f"against {tmp_path / 'b.mat'}: top1:{theirs['rank1']:.6f}" in out
    for key in ("rank1", "mAP"):
        difference = ours["against"][f"{key}_difference"]
        assert difference == pytest.approx(ours[key] - theirs[key])
        low, high = ours["against"][f"{key}_interval"]
        assert low <= difference <= high
        assert 0 < ours["against"][f"{key}_p"] <= 1


def test_against_itself_nothing_differs(mat, capsys):
    call(evaluate.main, mat, "--against", mat)
    out = capsys.readouterr().out
    assert out.count("differs by +0.00 points (+0.00 to +0.00), p = 1.0000") == 2


def test_against_features_of_other_images(mat, tmp_path, capsys):
    other = random_sets(dim=16, seed=1)
    save_mat(tmp_path / "other.mat", other)
    assert exit_code(evaluate.main, mat, "--against", tmp_path / "other.mat") == 2
    assert "query image 0 (counted from 0) is not the one in" in capsys.readouterr().err
    call_off = other._replace(query=metrics.FeatureSet(*(field[:5] for field in other.query)))
    save_mat(tmp_path / "other.mat", call_off)
    assert exit_code(evaluate.main, mat, "--against", tmp_path / "other.mat") == 2
    assert "5 query images, but 12 in" in capsys.readouterr().err


@BOTH
def test_cmc_curve(script, mat, tmp_path):
    call(script.main, mat, "--plot", "--against", tmp_path / "b.mat")
    name = "a_cmc.jpg" if script is evaluate else "a_rerank_cmc.jpg"
    with Image.open(tmp_path / name) as picture:
        assert picture.size[0] > 500


def colour(files, index):
    """A colour of its own for each image, far from those of frames."""
    return (40 + index * 3, 200 - index * 2, 90 + (len(files) > 20) * 100)


@pytest.fixture
def pictured(mat, tmp_path):
    """`mat` with images, each of one colour."""
    sets = random_sets(dim=16, noise=0.5)
    for part in sets[:2]:
        for index, file in enumerate(part.files):
            path = tmp_path / "data" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 40), colour(part.files, index)).save(path)
    save_mat(mat, sets._replace(data_dir=tmp_path / "data"))
    return mat


def check_row(picture, line, scores, sets, query):
    """Whether a row of the picture shows this query and its ranking, with the right frames."""
    cell, row = pictures.WIDTH + 2 * pictures.FRAME + pictures.GAP, 178
    middle = line * row + pictures.GAP + pictures.TEXT + pictures.FRAME + 64

    def near(x, expected):
        found = picture.getpixel((x, middle))
        return max(abs(a - b) for a, b in zip(found, expected, strict=True)) < 20

    assert near(pictures.GAP + 36, colour(sets.query.files, query))
    for place, image in enumerate(scores.top[query], start=1):
        left = 2 * pictures.GAP + place * cell
        identity, camera = sets.gallery.identities[image], sets.gallery.cameras[image]
        same = identity == sets.query.identities[query]
        frame = picture.getpixel((left + 1, middle))
        if identity == -1 or (same and camera == sets.query.cameras[query]):
            assert near(left + 1, (187, 187, 187))
            grey = picture.getpixel((left + 36, middle))
            assert max(grey) - min(grey) < 12
        else:
            assert (frame[1] > frame[0]) == same
            assert near(left + 36, colour(sets.gallery.files, image))


@BOTH
def test_rankings_of_the_worst_best_and_named(script, pictured, tmp_path, capsys, monkeypatch):
    seen = []
    draw = report.draw_rankings
    monkeypatch.setattr(report, "draw_rankings", lambda *a: (seen.append(a), draw(*a)))
    name = "a_rankings.jpg" if script is evaluate else "a_rerank_rankings.jpg"
    sets = random_sets(dim=16, noise=0.5)
    names = [Path(file).name for file in sets.query.files[[5, 2]]]
    for flags in (("--show", 2), ("--show", 1, "--show_which", "best"), ("--show_names", *names)):
        call(script.main, pictured, *flags, "--output_dir", tmp_path / "data")
        chosen, scores = seen.pop()[:2]
        if flags[0] == "--show_names":
            assert list(chosen) == [5, 2]
        else:
            ordered = sorted(range(12), key=lambda q: (scores.ap[q], q))  # all have a good image
            best = "best" in flags
            assert scores.ap[list(chosen)].tolist() == pytest.approx(
                scores.ap[ordered[-1:] if best else ordered[:2]]
            )
        with Image.open(tmp_path / "data" / name) as picture:
            for line, query in enumerate(chosen):
                check_row(picture, line, scores, sets, query)
    assert exit_code(script.main, pictured, "--show_names", "nobody.jpg") == 2
    assert "--show_names nobody.jpg: no such query; its name is" in capsys.readouterr().err
    assert exit_code(script.main, pictured, "--show", 400) == 2
    assert "a picture has room for 300 queries" in capsys.readouterr().err


def test_rankings_need_names_and_images(mat, tmp_path, capsys):
    assert exit_code(evaluate.main, FIXTURES / "retrieval.mat", "--show", 1) == 2
    assert "doesn't name its images" in capsys.readouterr().err
    assert exit_code(evaluate.main, mat, "--show", 1, "--data_dir", tmp_path) == 2
    assert "no such image; name the `pytorch` folder with --data_dir" in capsys.readouterr().err
    assert exit_code(evaluate.main, tmp_path / "b.mat", "--show", 1) == 2  # names, but no folder
    assert "no such image" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.jpg"))


def test_a_missing_image_is_found_before_anything_is_written(pictured, tmp_path, capsys):
    gallery = random_sets(dim=16, noise=0.5).gallery
    (tmp_path / "data" / gallery.files[-1]).unlink()
    flags = ("--show", 12, "--plot", "--json", tmp_path / "new.json")
    assert exit_code(evaluate.main, pictured, *flags) == 2
    assert f"{gallery.files[-1]}: no such image" in capsys.readouterr().err
    assert not (tmp_path / "new.json").exists() and not list(tmp_path.glob("*.jpg"))


def test_rankings_of_a_file_with_names_alone(pictured, tmp_path, monkeypatch):
    """Another code's file, without a folder: its images are looked for from here."""
    content = {name: value for name, value in loadmat(pictured).items() if name[0] != "_"}
    del content["data_dir"]
    savemat(tmp_path / "names.mat", content)
    monkeypatch.chdir(tmp_path / "data")
    call(evaluate.main, tmp_path / "names.mat", "--show", 1)
    assert (tmp_path / "names_rankings.jpg").exists()


def test_a_wrong_place_is_found_before_the_work(mat, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(metrics, "evaluate", None)
    assert exit_code(evaluate.main, tmp_path / "typo" / "a.mat", "--plot") == 2
    assert "a.mat: no such file" in capsys.readouterr().err
    assert exit_code(evaluate.main, mat, "--plot", "--output_dir", tmp_path / "none") == 2
    assert "name another place with --output_dir" in capsys.readouterr().err
    (tmp_path / "list.json").write_text("[1, 2]")
    assert exit_code(evaluate.main, mat, "--json", tmp_path / "list.json") == 2
    assert "list.json: its content is not an object" in capsys.readouterr().err


def test_memory_is_said_and_kept_to(mat, capsys):
    call(evaluate_rerank.main, mat, "--max_memory", 0.5)
    out = capsys.readouterr().out
    assert re.search(r"re-ranking 12 queries and 60 gallery images on \S+: about 0.17 GB", out)
    assert exit_code(evaluate_rerank.main, mat, "--max_memory", 0.01) == 2
    assert "--max_memory 0.01: re-ranking needs 0.17 GB at the least" in capsys.readouterr().err


def test_scoring_does_not_wait_for_torch():
    # evaluate.py is run often; importing torch takes longer than the scoring.
    words = "import sys, evaluate; print(sorted({'torch', 'matplotlib'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", words], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n"


# What makes scores doubtful, or impossible


def scored(sets, path, capsys):
    save_mat(path / "doubtful.mat", sets)
    capsys.readouterr()
    call(evaluate.main, path / "doubtful.mat")
    return capsys.readouterr()


def test_why_no_query_can_be_answered(tmp_path, capsys):
    query, gallery = random_sets()[:2]
    one = [part._replace(cameras=np.full_like(part.cameras, 7)) for part in (query, gallery)]
    said = "no query can be answered: "
    assert f"{said}all images are of camera 7" in scored(EvalSets(*one), tmp_path, capsys).out
    others = gallery._replace(identities=gallery.identities + 100)
    assert f"{said}no identity" in scored(EvalSets(query, others), tmp_path, capsys).out
    cameras = query.identities, gallery.identities  # everybody stays in a camera
    own = [p._replace(cameras=c) for p, c in zip((query, gallery), cameras, strict=True)]
    assert f"{said}all gallery images" in scored(EvalSets(*own), tmp_path, capsys).out
    assert said not in scored(EvalSets(query, gallery), tmp_path, capsys).out


def test_cameras_that_are_numbers_of_frames_are_warned_of(tmp_path, capsys):
    query, gallery = random_sets()[:2]
    frames = gallery._replace(cameras=np.arange(60))
    assert (
        "warning: 60 cameras in 72 images" in scored(EvalSets(query, frames), tmp_path, capsys).err
    )
    assert scored(EvalSets(query, gallery), tmp_path, capsys).err == ""


def test_queries_that_find_themselves_are_warned_of(tmp_path, capsys):
    query = random_sets().query
    copies = query._replace(cameras=query.cameras + 10)
    err = scored(EvalSets(query, copies), tmp_path, capsys).err
    said = "warning: 12 queries have a good image with the very same features"
    assert said in err
    call(evaluate_rerank.main, tmp_path / "doubtful.mat")
    assert said in capsys.readouterr().err
    assert scored(EvalSets(query, query), tmp_path, capsys).err == ""  # junk
    shorter = (query.features * np.float32(1 - 9e-6), copies.features * np.float32(1 - 9e-6))
    few = [one._replace(features=f) for one, f in zip((query, copies), shorter, strict=True)]
    assert said in scored(EvalSets(*few), tmp_path, capsys).err  # as other programs write them


def test_a_collapsed_network_is_warned_of(tmp_path, capsys):
    """Whose features are the same for all images: that is not the same picture twice."""
    sets = random_sets()
    same = [one._replace(features=np.full_like(one.features, 0.5)) for one in sets[:2]]
    err = scored(EvalSets(*same), tmp_path, capsys).err
    assert err.startswith("warning: all images have the same features: the network has collapsed")
    assert "same picture" not in err


# --- the map ------------------------------------------------------------------------------------


def test_the_map_says_whether_people_or_cameras_group(tmp_path, capsys):
    """Features that tell people apart, then features that tell cameras apart."""
    people = random_sets(dim=16, noise=0.05)
    directions = np.eye(16, dtype=np.float32)
    cameras = people._replace(
        query=people.query._replace(features=directions[people.query.cameras]),
        gallery=people.gallery._replace(features=directions[people.gallery.cameras]),
    )
    found = {}
    for name, sets in (("people", people), ("cameras", cameras)):
        save_mat(tmp_path / f"{name}.mat", sets)
        call(evaluate.main, tmp_path / f"{name}.mat", "--map", 4)
        out = capsys.readouterr().out
        assert f"map: {tmp_path / name}_map.jpg: the nearest other image shows" in out
        found[name] = map_features(sets, 4, tmp_path / "again.jpg")
        assert caption(found[name]) in out
        pictures = [(tmp_path / file).read_bytes() for file in (f"{name}_map.jpg", "again.jpg")]
        assert pictures[0] == pictures[1]
        with Image.open(tmp_path / "again.jpg") as picture:
            assert len(picture.getcolors(1 << 20)) > 50
    assert found["people"].same_person > 0.9 > found["people"].same_camera
    assert found["cameras"].same_camera == 1 > found["cameras"].same_person
    assert found["people"].by_chance == found["cameras"].by_chance


def test_identity_0_is_a_person_where_it_is_a_query():
    """As in MSMT17; in Market-1501 it is the distractors."""
    query = FeatureSet(None, np.array([1, 0]), np.array([1, 1]))
    gallery = FeatureSet(None, np.array([0, 1, -1, -1]), np.array([2, 2, 1, 2]))
    query, gallery = (one._replace(features=np.ones((len(one[1]), 1))) for one in (query, gallery))
    assert seen_by_several(EvalSets(query, gallery)).tolist() == [0, 1]
    of_others = query._replace(identities=np.array([1, 2]))
    distractors = gallery._replace(identities=np.array([0, 1, 0, -1]))
    assert seen_by_several(EvalSets(of_others, distractors)).tolist() == [1]


def test_neighbours_are_those_of_loops():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(30, 4)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    identities, cameras = rng.integers(0, 5, 30), rng.integers(0, 3, 30)
    person, camera, chance = [], [], []
    for one in range(30):
        others = [other for other in range(30) if other != one]
        nearest = max(others, key=lambda other: features[one] @ features[other])
        person.append(identities[one] == identities[nearest])
        camera.append(cameras[one] == cameras[nearest])
        chance.append(np.mean([cameras[one] == cameras[other] for other in others]))
    expected = pytest.approx((np.mean(person), np.mean(camera), np.mean(chance)))
    assert tuple(neighbours(features, identities, cameras)) == expected


def test_a_map_that_cannot_be_drawn(mat, tmp_path, capsys, monkeypatch):
    assert exit_code(evaluate.main, mat, "--map", 20) == 2
    assert "--map 20: only 6 identities are in two cameras or more; lower it" in (
        capsys.readouterr().err
    )
    assert exit_code(evaluate.main, mat, "--map", 21) == 2
    assert "21 is over 20" in capsys.readouterr().err
    assert exit_code(evaluate.main, mat, "--map", 2, "--calibrate", 0.1) == 2
    assert "--map: goes with scores" in capsys.readouterr().err
    monkeypatch.delattr(reid, "feature_map")
    monkeypatch.delitem(sys.modules, "reid.feature_map")
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    assert exit_code(evaluate.main, mat, "--map", 2) == 2
    assert "--map: needs scikit-learn" in capsys.readouterr().err
    assert not list(tmp_path.glob("*map.jpg"))
