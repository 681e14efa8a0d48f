"""Training on several datasets at once: people and cameras kept apart, shares of a batch."""

import json
from collections import Counter

import pytest
import torch
from conftest import TINY, call, exit_code, make_market, make_prepared, save_image

import cross_test
import test as extraction
import train_baseline
import train_lsro
from reid.dataset import Sample, training_splits
from reid.distributed import World
from reid.loading import StepSampler

FLAGS = f"{TINY} --workers 0 --batchsize 4 --epochs 1 --name r".split()
ALONE = World(0, 1, torch.device("cpu"), [])


@pytest.fixture
def both(tmp_path, monkeypatch):
    """Two prepared datasets, `x` and `y`, whose people have the same numbers."""
    monkeypatch.chdir(tmp_path)
    for name in "xy":
        make_market(tmp_path / name)
    save_image(tmp_path / "y/bounding_box_train/0010_c5s1_000009_01.jpg", seed=1)
    for name in "xy":
        make_prepared(tmp_path / name)
    return ["x/pytorch", "y/pytorch"]


def test_people_of_two_datasets_are_different_ones(both):
    """Each has 3 people, of 4 images each but one, whom a third camera saw."""
    splits = training_splits(both, train_all=True)
    found = Counter((s.dataset, s.path.name[:4], s.label) for s in splits.train)
    assert found == {
        (0, "0002", 0): 4, (0, "0007", 1): 4, (0, "0010", 2): 4,
        (1, "0002", 3): 4, (1, "0007", 4): 4, (1, "0010", 5): 5,
    }  # fmt: skip
    assert all(str(s.path).startswith(both[s.dataset]) for s in splits.train)
    single = training_splits(both[:1], train_all=True)
    assert single == training_splits(both[0], train_all=True)
    assert single.train == splits.train[:12]
    held_out = training_splits(both, train_all=False)
    assert Counter(s.label for s in held_out.validation) == dict.fromkeys(range(6), 1)
    some = training_splits(both, train_all=True, num_ids=4)
    assert {s.label for s in some.train} == {0, 1, 2, 3}


def test_people_held_out_keep_apart_too(both):
    people = training_splits(both, train_all=True, val_ids=2).people  # 0002 of either
    persons = {(image.path.parts[0], image.identity) for image in people}
    assert len(persons) == len({identity for _, identity in persons}) == 2
    seen_by = {(image.path.parts[0], image.camera) for image in people}
    assert len(seen_by) == len({camera for _, camera in seen_by}) == 4


def samples(counts, images=6):
    """For each dataset, that many people of so many images."""
    people = [dataset for dataset, count in enumerate(counts) for _ in range(count)]
    return [
        Sample(None, label, dataset=dataset)
        for label, dataset in enumerate(people)
        for _ in range(images)
    ]


@pytest.mark.parametrize("instances", [0, 3])
def test_balance_gives_each_dataset_the_same_share(instances):
    images = samples([10, 3])
    sampler = StepSampler(images, 12, ALONE, instances, balance=True)
    assert len(sampler) == len(StepSampler(images, 12, ALONE, instances)) == 78 // 12
    sampler.set_epoch(0)
    seen = Counter()
    for step in sampler.steps.tolist():
        assert [images[n].dataset for n in step] == 6 * [0] + 6 * [1]
        if instances:
            groups = [step[n : n + 3] for n in range(0, 12, 3)]
            assert all(len({images[n].label for n in group}) == 1 for group in groups)
        seen.update(step)
    assert {seen[n] for n in range(60)} <= {0, 1}  # 36 of 60 in six steps
    assert {seen[n] for n in range(60, 78)} == {2}  # 36 of 18
    first = sampler.steps
    sampler.set_epoch(0)
    assert torch.equal(sampler.steps, first)


def test_without_balance_a_batch_is_drawn_from_all():
    images = samples([10, 3])
    sampler = StepSampler(images, 12, ALONE)
    sampler.set_epoch(0)
    assert len(set(sampler.steps.flatten().tolist())) == 72
    assert len({sum(images[n].dataset for n in step) for step in sampler.steps.tolist()}) > 1


def test_generated_images_keep_their_own_share():
    images = samples([4, 4]) + [Sample(None, -1, generated=1)] * 5
    sampler = StepSampler(images, 10, ALONE, gan_batch=2, balance=True)
    sampler.set_epoch(0)
    for step in sampler.steps.tolist():
        assert [images[n].generated for n in step] == 8 * [0] + 2 * [1]
        assert Counter(images[n].dataset for n in step[:8]) == {0: 4, 1: 4}


def test_a_run_on_both(both, tmp_path, capsys):
    call(train_baseline.main, *FLAGS, "--data_dir", *both, "--balance", "--train_all")
    out = capsys.readouterr().out
    assert "x/pytorch: 12 images of 3 people by 2 cameras\n" in out
    assert "y/pytorch: 13 images of 3 people by 3 cameras\n" in out
    assert "25 images of 6 classes" in out
    opts = json.loads((tmp_path / "model/r/opts.json").read_text())
    assert opts["options"]["data_dir"] == both
    assert [row["images"] for row in opts["sources"]] == [12, 13]
    assert len({row["sha256"] for row in opts["sources"]}) == 2
    more = ("--train_all", "--balance", "--resume", "--epochs", 2)
    call(train_baseline.main, *FLAGS, "--data_dir", *both, *more)
    assert "epoch 2/2" in capsys.readouterr().out
    assert exit_code(train_baseline.main, *FLAGS, "--data_dir", *both[::-1], *more) == 2
    assert "model/r was trained on other images" in capsys.readouterr().err
    call(extraction.main, "--name", "r", "--data_dir", both[1], "--gpu_ids", "-1", "--workers", 0)
    cpu = ("--gpu_ids", "-1", "--workers", 0)
    call(cross_test.main, "--runs", "r", "--data_dirs", *both, *cpu)
    table = json.loads((tmp_path / "model/cross_test/table.json").read_text())
    assert [cell["own"] for cell in table["cells"]] == [True, True]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("x/pytorch", "x/pytorch/../pytorch/"), "--data_dir: names a folder twice"),
        (
            ("x/pytorch", "y/pytorch", "--balance", "--batchsize", 30),
            "--balance: 25 real images of 2 datasets can't fill a batch of 30 of 2",
        ),
        (("x/pytorch", "z"), "z: no such folder"),
        (("x/pytorch", "--balance"), "--balance: there is one --data_dir"),
        (
            ("x/pytorch", "y/pytorch", "--balance", "--batchsize", 5),
            "no equal shares for 2 datasets",
        ),
        (
            ("x/pytorch", "y/pytorch", "--balance", "--instances", 4),
            "4 real images a batch have no equal shares for 2 datasets in groups of 4",
        ),
    ],
)
def test_mistakes(flags, says, both, tmp_path, capsys):
    assert exit_code(train_baseline.main, *FLAGS, "--train_all", "--data_dir", *flags) == 2
    err = capsys.readouterr().err
    assert says in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "model").exists()


def test_mistakes_with_generated_images(both, tmp_path, capsys):
    flags = (*FLAGS, "--train_all", "--data_dir", *both)
    assert exit_code(train_lsro.main, *flags) == 2
    assert "--gen_dir: with several --data_dir, name the folder" in capsys.readouterr().err
    for number in range(4):
        save_image(tmp_path / "gan" / f"{number}.jpg", seed=number)
    flags = (*flags, "--gen_dir", tmp_path / "gan")
    assert exit_code(train_lsro.main, *flags, "--balance") == 2
    assert "--balance: say with --gan_batch how many generated" in capsys.readouterr().err
    assert exit_code(train_lsro.main, *flags, "--gan_label", "own") == 2
    assert "--gan_label own: of several --data_dir" in capsys.readouterr().err
    call(train_lsro.main, *flags, "--balance", "--gan_batch", 2)


def test_several_without_generated_images(both, tmp_path):
    flags = (*FLAGS, "--train_all", "--data_dir", *both)
    call(train_lsro.main, *flags, "--num_generated", 0)
