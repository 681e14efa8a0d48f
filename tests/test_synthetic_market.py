"""The stand-in dataset: Market-1501's layout, the same bytes for a seed, clean failures."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import exit_code
from PIL import Image

import synthetic_market as market
from reid.errors import UserError

TINY = market.Scale(
    train_ids=5, train_images=24, test_ids=4, queries=11, gallery_images=30, distractors=5, junk=6
)
NAME = re.compile(r"(-1|\d{4})_c([1-6])s([1-6])_(\d{6})_(\d{2})\.jpg")
SCRIPT = Path(market.__file__)


def split(path):
    """Return (id, camera) of a path or name."""
    match = NAME.fullmatch(Path(path).name)
    assert match, path
    return int(match[1]), int(match[2])


def scheduled(scale, seed=0):
    """Return all the files of a schedule: {folder: [path, ...]}."""
    folders = {name: [] for name in market.FOLDERS}
    for tracklet in market.schedule(scale, seed):
        for shot in tracklet.shots:
            for path in shot.paths:
                folders[path.split("/")[0]].append(path)
    return folders


def digest(folder):
    """{relative path: hash} of every file below a folder."""
    files = (p for p in sorted(Path(folder).rglob("*")) if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """A tiny set, rendered in this process."""
    folder = tmp_path_factory.mktemp("rendered")
    counts = market.render(folder, TINY, seed=3, workers=0)
    return folder, counts


@pytest.fixture
def tiny_demo(monkeypatch):
    """Makes `--scale demo` tiny for calls of main() in this process."""
    monkeypatch.setitem(market.SCALES, "demo", TINY)


def check_rules(folders, scale):
    """Check what holds for every set, by the names alone."""
    everything = [path for paths in folders.values() for path in paths]
    assert len(set(everything)) == len(everything)
    train = Counter(split(path)[0] for path in folders["bounding_box_train"])
    gallery = [split(path) for path in folders["bounding_box_test"]]
    queries = [split(path) for path in folders["query"]]
    ids = {i for i, _ in queries}
    assert len(train) == scale.train_ids
    assert train.total() == scale.train_images
    assert len(ids) == scale.test_ids
    assert len(queries) == scale.queries
    assert len(gallery) == scale.gallery_images
    labels = Counter(i for i, _ in gallery)
    assert labels[0] == scale.distractors
    assert labels[-1] == scale.junk
    # one query for each id and camera in which the id appears, and one to find in another camera
    seen = {pair for pair in gallery if pair[0] > 0}
    assert len(set(queries)) == len(queries)
    assert set(queries) == seen
    assert all({c for i, c in seen if i == q} - {camera} for q, camera in queries)
    # real people are on one side only
    assert not ids & set(train)
    assert min(train) > 0
    assert {i for i, _ in gallery} == ids | {0, -1}
    # hand-drawn boxes: the queries themselves, and one for each gallery picture of a query's id
    hand = {Path(path).name for path in folders["gt_bbox"]}
    assert {Path(path).name for path in folders["query"]} <= hand
    assert len(hand) == scale.queries + scale.gallery_images - scale.distractors - scale.junk
    assert {split(name)[0] for name in hand} == ids


def test_market1501_schedule_has_the_exact_counts():
    scale = market.SCALES["market1501"]
    assert scale == market.Scale(751, 12936, 750, 3368, 19732, 2798, 3819)
    folders = scheduled(scale)
    check_rules(folders, scale)
    cameras = {split(path)[1] for paths in folders.values() for path in paths}
    assert cameras == set(range(1, 7))


def test_demo_schedule_mixes_ids_the_way_market_does():
    folders = scheduled(market.SCALES["demo"])
    check_rules(folders, market.SCALES["demo"])
    train = {split(path)[0] for path in folders["bounding_box_train"]}
    test = {split(path)[0] for path in folders["query"]}
    assert max(train | test) <= 1501
    assert min(train) < max(test) and min(test) < max(train)
    assert sorted(train) != list(range(min(train), min(train) + len(train)))


def test_strangers_are_never_met_twice():
    tracklets = market.schedule(market.SCALES["demo"], 0)
    strangers = [t.person for t in tracklets if split(t.shots[0].paths[0])[0] < 1]
    real = {t.person for t in tracklets} - set(strangers)
    assert strangers and len(set(strangers)) == len(strangers)
    assert max(real) <= market.MAX_ID < min(strangers)


def test_rendered_files_are_the_scheduled_ones(rendered):
    folder, counts = rendered
    folders = scheduled(TINY, seed=3)
    check_rules(folders, TINY)
    assert counts == {name: len(paths) for name, paths in folders.items()}
    on_disk = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert on_disk == {p for paths in folders.values() for p in paths} | {"contact_sheet.jpg"}


def test_pictures_are_64x128_jpegs_of_something(rendered):
    for path in (p for name in market.FOLDERS for p in (rendered[0] / name).iterdir()):
        with Image.open(path) as picture:
            assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", (64, 128))
            assert np.asarray(picture).std() > 5


def test_a_query_is_its_own_hand_drawn_box(rendered):
    folder, _ = rendered
    for query in (folder / "query").iterdir():
        assert query.read_bytes() == (folder / "gt_bbox" / query.name).read_bytes()


def test_contact_sheet_has_a_row_for_each_person_and_a_column_for_each_camera(rendered):
    with Image.open(rendered[0] / "contact_sheet.jpg") as sheet:
        assert sheet.width > 6 * 64 and sheet.height > TINY.test_ids * 128


@pytest.mark.slow
def test_workers_do_not_change_a_byte_and_the_seed_does(rendered, tmp_path):
    parallel, other = tmp_path / "parallel", tmp_path / "other"
    for folder, seed, workers in ((parallel, 3, 2), (other, 4, 0)):
        folder.mkdir()
        market.render(folder, TINY, seed, workers)
    assert digest(parallel) == digest(rendered[0])
    assert not set(digest(other).values()) & set(digest(parallel).values())


def test_a_person_looks_alike_in_two_frames_and_unlike_another(rendered):
    """The upper body's colour varies less within a tracklet than between people of a camera."""

    def colour(tracklet, frame):
        for shot, picture in market.render_tracklet(tracklet, 0):
            if shot.frame == frame and shot.box == "hand":
                return np.asarray(picture, float)[36:60, 24:40].mean((0, 1))

    def people():
        return [t for t in market.schedule(market.SCALES["demo"], 0) if t.shots[0].box == "hand"]

    same_camera = [t for t in people() if t.camera == 0 and len(t.shots) > 4][:8]
    first = [colour(t, 0) for t in same_camera]
    second = [colour(t, 1) for t in same_camera]
    within = np.mean([np.abs(a - b).mean() for a, b in zip(first, second, strict=True)])
    between = np.mean([np.abs(a - b).mean() for a in first for b in second])
    assert within < between / 2


@pytest.mark.parametrize(("total", "least", "most"), [(20, 2, 6), (60, 2, 6), (47, 1, 60)])
def test_apportion_keeps_the_total_and_the_bounds(total, least, most):
    weights = np.random.default_rng(0).lognormal(0, 1.5, 10)
    parts = market.apportion(total, weights, least, most)
    assert parts.sum() == total
    assert least <= parts.min() and parts.max() <= most


def test_apportion_refuses_the_impossible():
    with pytest.raises(ValueError, match="can't be split"):
        market.apportion(61, np.ones(10), 2, 6)


def test_main_writes_the_marker_and_then_finds_it(tmp_path, tiny_demo, capsys):
    folder = tmp_path / "deep" / "set"
    argv = ["--output_dir", str(folder), "--workers", "0"]
    market.main(argv)
    about = json.loads((folder / "synthetic_market.json").read_text())
    assert (about["scale"], about["seed"]) == ("demo", 0)
    assert about["counts"]["query"] == TINY.queries == len(list((folder / "query").iterdir()))
    assert [p.name for p in folder.parent.iterdir()] == ["set"]
    capsys.readouterr()

    before = digest(folder)
    (folder / "pytorch").mkdir()  # what prepare.py adds does not make it another set
    market.main(argv)
    said = capsys.readouterr()
    assert "already there" in said.out and len(said.out.splitlines()) == 1
    assert digest(folder) == before

    assert exit_code(market.main, *argv, "--seed", 1) == 2  # another set is not written over it
    next((folder / "query").iterdir()).unlink()
    assert exit_code(market.main, *argv) == 2  # nor is a damaged one taken for whole
    assert len(capsys.readouterr().err.splitlines()) == 2


def fails(argv, capsys, *words):
    """main(argv) exits with 2 and one line that has the words."""
    assert exit_code(market.main, *argv) == 2
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 1 and not said.out
    assert all(word in said.err for word in words), said.err


def test_looks_differ_in_light_and_clothes(tmp_path):
    """The same people in winter: other pictures, darker on average, no bare arms."""
    pixels, people = {}, {}
    for look in market.LOOKS:
        (tmp_path / look).mkdir()
        market.render(tmp_path / look, TINY, seed=3, workers=0, look=look)
        queries = sorted((tmp_path / look / "query").iterdir())
        pixels[look] = np.stack([np.asarray(Image.open(path)) for path in queries]) / 255
        wardrobe = market.LOOKS[look].wardrobe
        people[look] = [market.make_person(3, number, wardrobe).who for number in range(40)]
    assert pixels["summer"].shape == pixels["winter"].shape
    assert pixels["winter"].mean() < pixels["summer"].mean() - 0.05
    assert {who.sleeve for who in people["winter"]} == {1.0}
    assert min(who.sleeve for who in people["summer"]) < 1
    kinds = {look: {who.lower_kind for who in whole} for look, whole in people.items()}
    assert "shorts" in kinds["summer"] - kinds["winter"]


def test_a_set_of_another_look_is_another_set(tmp_path, tiny_demo, capsys):
    folder = tmp_path / "set"
    argv = ["--output_dir", str(folder), "--workers", "0"]
    market.main([*argv, "--look", "winter"])
    market.main([*argv, "--look", "winter"])
    assert "already there (demo, winter, seed 0)" in capsys.readouterr().out
    fails(argv, capsys, "holds something else")
    marker = folder / "synthetic_market.json"  # as older versions wrote it, before there were looks
    about = json.loads(marker.read_text())
    del about["look"]
    marker.write_text(json.dumps(about))
    market.main(argv)
    assert "already there (demo, summer, seed 0)" in capsys.readouterr().out
    fails([*argv, "--look", "winter"], capsys, "holds something else")


def test_user_errors_are_one_line(tmp_path, tiny_demo, capsys):
    file = tmp_path / "file"
    file.write_text("not a folder")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    fails(["--output_dir", tmp_path / "a", "--seed", -1], capsys, "--seed")
    fails(["--output_dir", tmp_path / "a", "--workers", -2], capsys, "--workers")
    fails(["--output_dir", file], capsys, "--output_dir", str(file))
    fails(["--output_dir", file / "below"], capsys, str(file / "below"), "can't be written")
    fails(["--output_dir", tmp_path / "full"], capsys, "--output_dir", "full")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "full"]
    assert (tmp_path / "full" / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interrupted_run_leaves_nothing(tmp_path, tiny_demo, monkeypatch, capsys, error):
    def stop(*args, **kwargs):
        raise error

    monkeypatch.setattr(market, "contact_sheet", stop)  # when all the pictures are written
    code = exit_code(market.main, "--output_dir", tmp_path / "set", "--workers", 0)
    assert code == (130 if isinstance(error, KeyboardInterrupt) else 2)
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_worker_that_is_killed_is_said():
    with pytest.raises(UserError, match="a process that renders has ended"):
        list(market.by_processes(os._exit, [1, 1, 1], 2))


def test_as_a_process_help_shows_defaults_and_flags_are_not_abbreviated(tmp_path):
    def call(*argv):
        command = [sys.executable, str(SCRIPT), *argv]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)

    told = call("--help")
    assert told.returncode == 0
    assert "(default: data/synthetic_market)" in told.stdout and "(default: demo)" in told.stdout
    assert call("--out", "somewhere").returncode == 2
    assert not list(tmp_path.iterdir())
