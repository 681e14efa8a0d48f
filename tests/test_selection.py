"""People held out of training, and what they choose: the layer and the image size for testing."""

import itertools
import json
import shutil

import numpy as np
import pytest
from conftest import TINY, call, exit_code, save_image

import train_baseline
import train_lsro
from reid.checkpoint import load_trained
from reid.dataset import EvalImage, generated_images, training_splits
from reid.errors import UserError
from reid.features import Embedder
from reid.metrics import FeatureSet, evaluate, similarity_blocks
from reid.selection import queries_and_gallery

FLAGS = f"{TINY} --workers 0 --batchsize 4 --epochs 1 --name r".split()


@pytest.fixture
def six_people(tmp_path):
    """Training folders of six people of four images each, by two cameras; the first validates."""
    for label in range(6):
        for shot in range(4):
            name = f"{10 * label:04d}_c{shot % 2 + 1}s1_{shot:06d}_00.jpg"
            for split in ["train_all_new", "val_new" if shot == 0 else "train_new"]:
                save_image(tmp_path / "pytorch" / split / f"{label:04d}" / name)
    return tmp_path / "pytorch"


@pytest.mark.parametrize("train_all", [False, True])
def test_identities_are_held_out_whole(train_all, six_people):
    """Evenly spaced; the others are numbered anew, in their old order."""
    splits = training_splits(six_people, train_all, val_ids=2)
    assert {image.identity for image in splits.people} == {0, 30}
    assert len(splits.people) == 8
    left = splits.train + splits.validation
    assert len(left) == 16
    assert len(splits.validation) == (0 if train_all else 4)
    classes = {(sample.path.name[:4], sample.label) for sample in left}
    assert classes == {("0010", 0), ("0020", 1), ("0040", 2), ("0050", 3)}
    everyone = training_splits(six_people, train_all)
    assert len(everyone.train) + len(everyone.validation) == 24
    assert everyone.people == []


def test_too_many_to_hold_out(six_people):
    with pytest.raises(UserError, match="--val_ids 5: of 6 identities; leave two to train on"):
        training_splits(six_people, True, val_ids=5)


def test_some_identities_are_trained_on(six_people):
    """The seed draws them among those that are not held out; classes are numbered anew."""
    drawn = set()
    for seed in range(20):
        splits = training_splits(six_people, False, val_ids=2, num_ids=2, seed=seed)
        assert {image.identity for image in splits.people} == {0, 30}
        classes = {(sample.path.name[:4], sample.label) for sample in splits.train}
        assert classes == {(s.path.name[:4], s.label) for s in splits.validation}
        assert (len(splits.train), len(splits.validation)) == (6, 2)
        (one, other) = sorted(classes)
        assert (one[1], other[1]) == (0, 1)
        drawn.add((one[0], other[0]))
        assert splits == training_splits(six_people, False, val_ids=2, num_ids=2, seed=seed)
    people = ["0010", "0020", "0040", "0050"]
    assert drawn == set(itertools.combinations(people, 2))
    with pytest.raises(UserError, match="--num_ids 5: only 4 identities to draw from"):
        training_splits(six_people, True, val_ids=2, num_ids=5)


def test_unlabelled_images_are_those_of_others(six_people, tmp_path):
    """Real crops: not those that are trained on, under whatever name; and in proportion."""
    splits = training_splits(six_people, True, num_ids=2)
    real = splits.train
    trained = {sample.path.name for sample in real}
    others = generated_images(six_people / "train_all_new", splits=splits)
    assert len(others) == 16
    assert not trained & {sample.path.name for sample in others}
    assert {(sample.label, sample.generated) for sample in others} == {(-1, 1)}
    again = tmp_path / "again"
    again.mkdir()
    (again / "one.jpg").hardlink_to(real[0].path)
    (again / "two.jpg").symlink_to(real[1].path)
    shutil.copy(real[2].path, again / "three.jpg")
    with pytest.raises(UserError, match="again: all its images are trained on with their"):
        generated_images(again, splits=splits)
    assert len(generated_images(six_people / "train_all_new", "1.5x", splits=splits)) == 12
    with pytest.raises(UserError, match=r"--num_generated 2\.5x: only 16 images"):
        generated_images(six_people / "train_all_new", "2.5x", splits=splits)
    held_out = training_splits(six_people, True, val_ids=2)
    with pytest.raises(UserError, match="all its images are trained on with their identity"):
        generated_images(six_people / "train_all_new", splits=held_out)
    for hidden in (".half.partial", "gen_0000"):
        (again / hidden).mkdir()
        save_image(again / hidden / "x.jpg", seed=7)
    assert len(generated_images(again)) == 3
    (tmp_path / "pytorch" / "train_all").mkdir()
    for name in ("query", "gallery"):
        (six_people / name).mkdir(exist_ok=True)
    for folder in (six_people, six_people / "gallery"):
        with pytest.raises(UserError, match=r"pytorch.*: has images to test on"):
            generated_images(folder)
    (again / "more").symlink_to(six_people / "train_all_new")
    with pytest.raises(UserError, match="more: is a linked folder; replace it, or take it away"):
        generated_images(again)


def test_a_run_on_some_identities(six_people, tmp_path):
    """With real crops of the others, shuffled among those or one on top of each batch."""
    flags = ["--data_dir", six_people, "--model_dir", tmp_path, *FLAGS, "--num_ids", 3]
    unlabelled = ["--gen_dir", six_people / "train_all_new", "--num_generated", "1x"]
    seen = {}
    one = ["--on_top", "--gan_batch", 1]
    for name, more in [("all", []), ("one", one), ("own", ["--gan_label", "own"])]:
        if name == "own":  # the folders of identities that are not trained on are no classes
            assert exit_code(train_lsro.main, *flags, *unlabelled, "--name", name, *more) == 2
            continue
        call(train_lsro.main, *flags, *unlabelled, "--train_all", "--name", name, *more)
        opts = json.loads((tmp_path / name / "opts.json").read_text())
        assert (opts["class_num"], opts["generated"]) == (3, 12)
        assert opts["dataset"]["images"] == 24
        log = json.loads((tmp_path / name / "log.jsonl").read_text())
        seen[name] = round(log["images_per_s"] * log["seconds"])
    assert seen["one"] == pytest.approx(12 / 4 * 5, abs=1)
    assert seen["all"] == pytest.approx(24, abs=1)


def test_queries_are_the_first_of_each_person_and_camera():
    people = [EvalImage(f"{n}", *who) for n, who in enumerate([(1, 1), (1, 1), (1, 2), (1, 2)])]
    queries, gallery = queries_and_gallery(people)
    assert [image.path for image in queries] == ["0", "2"]
    assert [image.path for image in gallery] == ["1", "3"]
    with pytest.raises(UserError, match="seen by two cameras"):
        queries_and_gallery(people[1:3])


@pytest.mark.parametrize("main", [train_baseline.main, train_lsro.main])
def test_what_is_found_best_is_the_runs(main, six_people, tmp_path, capsys):
    if main is train_lsro.main:
        for number in range(3):
            save_image(six_people / "train_new" / "gen_0000" / f"gen_{number}.jpg")
    flags = ["--data_dir", six_people, "--model_dir", tmp_path, *FLAGS, "--val_ids", 2]
    call(main, *flags)
    out = capsys.readouterr().out
    assert "on 2 people held out (4 queries, 4 gallery):" in out
    results = json.loads((tmp_path / "r" / "testing.json").read_text())
    scores = results["scores"]
    assert [(score["layer"], score["test_size"]) for score in scores] == [
        (layer, size) for size in ("same", "center", "enlarged") for layer in ("pool", "bottleneck")
    ]
    parts = queries_and_gallery(training_splits(six_people, False, val_ids=2).people)
    for score in scores:
        layer, size = score["layer"], score["test_size"]
        how = {"device": "cpu", "precision": "fp32", "layer": layer, "test_size": size}
        embed = Embedder(tmp_path / "r", **how)
        sets = [
            FeatureSet(
                embed([image.path for image in images]),
                np.array([image.identity for image in images]),
                np.array([image.camera for image in images]),
            )
            for images in parts
        ]
        found = evaluate(similarity_blocks(*sets), *sets)
        assert (score["rank1"], score["mAP"]) == pytest.approx((found.rank(1), found.mean_ap()))
    best = max(scores, key=lambda score: score["mAP"])
    assert (results["layer"], results["test_size"]) == (best["layer"], best["test_size"])
    trained = load_trained(tmp_path / "r")
    assert trained.layer == best["layer"]
    sizes = {"same": "64x32", "center": "64x32 of 72x36", "enlarged": "72x36"}
    assert str(trained.transform) == sizes[best["test_size"]]
    # With a size given only layers are left to choose from; other people, another training.
    call(main, *flags, "--name", "s", "--test_size", "80x40")
    results = json.loads((tmp_path / "s" / "testing.json").read_text())
    assert [score["test_size"] for score in results["scores"]] == ["80x40"] * 2
    assert load_trained(tmp_path / "s").transform.size == (80, 40)
    for weights in (tmp_path / "s").glob("*.pth"):
        weights.unlink()
    call(main, *flags[:-2], "--name", "s")  # another run, which has held out nobody
    assert not (tmp_path / "s" / "testing.json").exists()
    (tmp_path / "s" / "testing.json").write_text('{"layer": "pool"}')
    with pytest.raises(UserError, match="has no test_size; restore or delete it"):
        load_trained(tmp_path / "s")
    assert exit_code(main, *flags[:-1], 3, "--epochs", 2, "--resume") == 2
    assert "with another number of classes" in capsys.readouterr().err
