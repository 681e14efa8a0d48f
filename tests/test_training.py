"""The training scripts: what a run folder holds, resumption, the learning rate, best weights."""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, call, make_market, make_prepared, save_image, tiny_network
from PIL import Image

import train_baseline
import train_lsro
from model import IMAGENET, ft_net
from reid import engine, learner, optimizer
from reid.checkpoint import Run
from reid.dataset import labelled_images
from reid.errors import UserError
from reid.files import read_results, update_results
from reid.weights import load_network

FLAGS = f"{TINY} --workers 0 --batchsize 4 --seed 3".split()


def train(main, prepared, tmp_path, name, *flags):
    where = ("--data_dir", prepared, "--model_dir", tmp_path, "--name", name)
    call(main, *where, *FLAGS, *flags)
    return tmp_path / name


def weights(run, label="last"):
    return torch.load(run / f"net_{label}.pth", weights_only=True)


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def log_of(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A prepared dataset that tests only read."""
    return make_prepared(make_market(tmp_path_factory.mktemp("shared") / "market"))


@pytest.fixture(scope="module")
def finished(shared, tmp_path_factory):
    """A run of the baseline on `shared`, of four epochs with the weights of each."""
    folder = tmp_path_factory.mktemp("finished")
    return train(train_baseline.main, shared, folder, "r", "--epochs", 4, "--save_every", 1)


@pytest.fixture(scope="module")
def first_epoch(shared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("first_epoch")
    return train(train_baseline.main, shared, folder, "r", "--epochs", 1)


@pytest.fixture
def begun(first_epoch, tmp_path):
    """A run `r` in tmp_path, on `shared`, after its first epoch: to be changed and resumed."""
    return Path(shutil.copytree(first_epoch, tmp_path / "r"))


def test_run_folder(finished):
    run = finished
    there = {path.name for path in run.iterdir()}
    expected = "opts.json log.jsonl results.json state.pth state_previous.pth train.jpg"
    weights_files = "net_1.pth net_2.pth net_3.pth net_4.pth net_best.pth net_last.pth"
    assert there == {*expected.split(), *weights_files.split()}
    opts = json.loads((run / "opts.json").read_text())
    assert opts["options"]["batchsize"] == 4
    assert opts["class_num"] == 3
    assert opts["generated"] == 0
    assert opts["dataset"]["images"] == 9
    assert {"command", "versions", "git", "device", "arithmetic", "train_all_sha256"} <= opts.keys()
    log = log_of(run)
    assert [line["epoch"] for line in log] == [1, 2, 3, 4]
    assert {"train_loss", "train_top1err", "val_loss", "val_top1err", "lr"} <= log[0].keys()
    assert Image.open(run / "train.jpg").size[0] > 800
    assert not any(name.startswith("module.") for name in weights(run))


def test_best_weights_are_of_the_best_epoch(finished):
    run = finished
    best = min(log_of(run), key=lambda line: (line["val_top1err"], line["val_loss"]))["epoch"]
    assert equal(weights(run, "best"), weights(run, best))
    others = {1, 2, 3, 4} - {best}
    assert not any(equal(weights(run, "best"), weights(run, other)) for other in others)


def test_validation_is_that_of_the_saved_weights(finished, shared):
    net, losses, wrong = load_network(finished / "net_1.pth").eval(), [], 0
    samples = labelled_images(shared / "val_new")
    for sample in samples:
        pixels = np.asarray(Image.open(sample.path).resize((32, 64), Image.Resampling.BICUBIC))
        pixels = (pixels / 255 - IMAGENET[0]) / IMAGENET[1]
        with torch.no_grad():
            logits = net(torch.tensor(pixels).float().permute(2, 0, 1)[None])
        losses.append(F.cross_entropy(logits, torch.tensor([sample.label])).item())
        wrong += logits.argmax().item() != sample.label
    line = log_of(finished)[0]
    assert len(samples) == 3  # an odd number: errors are not as many as right answers
    assert line["val_loss"] == pytest.approx(np.mean(losses), abs=1e-3)
    assert line["val_top1err"] == pytest.approx(wrong / 3, abs=1e-5)


def test_rate_of_each_step(shared, tmp_path, monkeypatch):
    """Two steps an epoch: it rises from step to step of the first, and is a tenth in the second."""
    seen, set_rate = [], learner.set_rate
    monkeypatch.setattr(learner, "set_rate", lambda *a: seen.append(a[1]) or set_rate(*a))
    flags = ("--epochs", 2, "--warm_epoch", 1, "--lr_step", 1)
    run = train(train_baseline.main, shared, tmp_path, "r", *flags)
    assert seen == pytest.approx([0.1, 0.55, 0.1, 0.1])
    assert [line["lr"] for line in log_of(run)] == pytest.approx([0.005, 0.005])


@pytest.mark.slow
def test_resumed_run_is_bit_identical(shared, tmp_path):
    # With the default of workers: random numbers are drawn in them
    flags = ("--workers", 2, "--backbone", "densenet121", "--epochs")
    whole = train(train_baseline.main, shared, tmp_path, "whole", *flags, 2)
    train(train_baseline.main, shared, tmp_path, "cut", *flags, 1)
    cut = train(train_baseline.main, shared, tmp_path, "cut", *flags, 2, "--resume")
    assert equal(weights(whole), weights(cut))
    timing = ("seconds", "images_per_s")
    logs = [
        [{k: v for k, v in line.items() if k not in timing} for line in log_of(run)]
        for run in (whole, cut)
    ]
    assert logs[0] == logs[1]


def test_resume_refuses_other_options_and_a_run_is_never_overwritten(shared, tmp_path, begun):
    before = weights(begun)
    with pytest.raises(UserError, match=r"was started with --lr_step 40, not 9"):
        train(train_baseline.main, shared, tmp_path, "r", "--resume", "--lr_step", 9)
    opts = json.loads((begun / "opts.json").read_text())
    del opts["options"]["lr_step"]  # as if the run were older than the flag
    (begun / "opts.json").write_text(json.dumps(opts))
    with pytest.raises(UserError, match=r"was started with --lr_step 40, not 9"):
        train(train_baseline.main, shared, tmp_path, "r", "--resume", "--lr_step", 9)
    with pytest.raises(UserError, match="holds a run already"):
        train(train_baseline.main, shared, tmp_path, "r", "--epochs", 1)
    assert equal(before, weights(begun))


def test_resume_starts_a_run_that_is_not_there_yet(shared, tmp_path, capsys):
    """A scheduler repeats one command."""
    flags = (train_baseline.main, shared, tmp_path, "r", "--resume", "--epochs", 1)
    run = train(*flags)
    assert "there is no run in" in capsys.readouterr().out
    train(*flags)
    assert len(log_of(run)) == 1


def test_a_run_that_goes_on_is_not_finished(shared, tmp_path, begun, monkeypatch):
    """Whoever asks, as --label_run does, sees the scores of its end alone."""

    def interrupt(*args):
        raise KeyboardInterrupt

    update_results(begun / "results.json", "evaluate", {"mAP": 0.5})
    monkeypatch.setattr(learner.Learner, "step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(train_baseline.main, shared, tmp_path, "r", "--epochs", 2, "--resume")
    assert read_results(begun / "results.json") == {"evaluate": {"mAP": 0.5}}


def test_learning_rate_may_change_on_resume(shared, tmp_path, begun, capsys):
    run = train(train_baseline.main, shared, tmp_path, "r", "--epochs", 2, "--resume", "--lr", 0.01)
    assert "--lr: 0.05 up to epoch 1, 0.01 from there on" in capsys.readouterr().out
    opts = json.loads((run / "opts.json").read_text())
    assert opts["options"]["lr"] == 0.05
    [part] = opts["resumed"]
    assert part["epochs"] == 1
    for name in ("command", "git", "versions", "device_name", "processes", "threads"):
        assert part[name] == opts[name]
    assert [line["lr"] for line in log_of(run)] == [0.05, 0.01]
    groups = torch.load(run / "state.pth", weights_only=True)["optimizer"]["param_groups"]
    assert [group["lr"] for group in groups] == pytest.approx([0.002, 0.01])


def test_what_a_path_leads_to_decides_on_resume(prepared, tmp_path):
    """The data, the runs, the weights to start from may lie elsewhere by now."""
    start = tmp_path / "start.pth"
    torch.save(tiny_network().state_dict(), start)
    flags = ("--pretrained", start, "--epochs")
    train(train_baseline.main, prepared, tmp_path / "a", "r", *flags, 1)
    moved, start = prepared.rename(tmp_path / "moved"), start.rename(tmp_path / "other.pth")
    (tmp_path / "a").rename(tmp_path / "b")
    (tmp_path / "b" / "r").rename(tmp_path / "b" / "s")
    again = (train_baseline.main, f"{moved}/", tmp_path / "b", "s", "--resume", "--epochs", 2)
    run = train(*again, "--pretrained", start)
    assert len(log_of(run)) == 2
    torch.save(tiny_network().state_dict(), start)
    with pytest.raises(UserError, match="began with other --pretrained weights"):
        train(*again, "--pretrained", start)
    with pytest.raises(UserError, match=r"was started with --pretrained .*, not none"):
        train(*again)


def test_another_number_of_threads_is_said(shared, tmp_path, begun, capsys):
    """On a CPU sums, and so the last bits, depend on it."""
    opts = json.loads((begun / "opts.json").read_text())
    assert opts["threads"] == torch.get_num_threads()
    (begun / "opts.json").write_text(json.dumps(opts | {"threads": 99}))
    train(train_baseline.main, shared, tmp_path, "r", "--epochs", 1, "--resume")
    assert "threads, not 99: the last bits differ" in capsys.readouterr().out


def test_frozen_backbone(shared, tmp_path):
    """At first the head alone is trained; neither weights nor batch norm of the backbone move."""
    torch.manual_seed(3)  # as the script seeds it
    start = tiny_network().state_dict()
    flags = ("--epochs", 2, "--freeze_epochs", 1, "--save_every", 1)
    run = train(train_baseline.main, shared, tmp_path, "r", *flags)
    first, second = weights(run, 1), weights(run, 2)
    for name, value in start.items():
        same = torch.equal(value, first[name])
        assert same == (not optimizer.is_head(name)), name
    moved = [name for name in start if not torch.equal(first[name], second[name])]
    assert "model.conv1.0.weight" in moved
    assert "model.bn1.running_mean" in moved


def test_best_epoch_compares_like_with_like():
    """Generated images count in the training loss from some epoch on, and raise it."""
    losses = [(1, 3.0, False), (2, 1.0, False), (3, 2.5, True), (4, 2.0, True), (5, 2.2, True)]
    history = [
        {"epoch": epoch, "train_loss": loss, "with_generated": counts}
        for epoch, loss, counts in losses
    ]
    assert [engine.best_epoch(history[:n]) for n in range(1, 6)] == [1, 2, 3, 4, 4]
    for line in history:  # what is validated is the same in all epochs
        line |= {"val_loss": line["train_loss"], "val_top1err": 0.5}
    assert engine.best_epoch(history) == 2


def test_the_commit_is_this_codes(tmp_path, monkeypatch):
    """An archive that is unpacked in another project's checkout has none."""
    shutil.copytree(ROOT / "reid", tmp_path / "code" / "reid")

    def git(*words):
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        return subprocess.run(["git", "-C", tmp_path, *who, *words], check=True)

    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "another project")
    code = "from reid.provenance import git_commit; print(git_commit())"

    def commit():
        words = [sys.executable, "-c", code]
        return subprocess.run(words, cwd=tmp_path / "code", capture_output=True, text=True).stdout

    assert commit() == "None\n"
    git("add", ".")
    git("commit", "-q", "-m", "it is in there")
    assert "'dirty': False" in commit()


def test_resume_refuses_another_script_or_other_images(shared, tmp_path, begun):
    prepared = shutil.copytree(shared, tmp_path / "pytorch")
    with pytest.raises(UserError, match="was trained by another script"):
        train(train_lsro.main, prepared, tmp_path, "r", "--resume", "--num_generated", 0)
    held_out = next((prepared / "val_new").glob("*/*.jpg"))
    before = held_out.read_bytes()
    held_out.unlink()  # it may be a link to the training image
    save_image(held_out, size=(9, 9))
    with pytest.raises(UserError, match="was trained with other images held out"):
        train(train_baseline.main, prepared, tmp_path, "r", "--resume", "--epochs", 2)
    held_out.write_bytes(before)
    next((prepared / "train_new").glob("*/*.jpg")).unlink()
    with pytest.raises(UserError, match="was trained on other images"):
        train(train_baseline.main, prepared, tmp_path, "r", "--resume", "--epochs", 2)
    (tmp_path / "original").mkdir()  # has weights and no state
    (tmp_path / "original" / "net_last.pth").write_bytes(b"")
    with pytest.raises(UserError, match=r"original has weights, but no opts\.json"):
        train(train_baseline.main, prepared, tmp_path, "original", "--resume")


def test_a_run_killed_while_its_first_epoch_is_saved_can_be_started_again(
    prepared, tmp_path, monkeypatch
):
    def full_disk(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save_state", full_disk)
        with pytest.raises(OSError, match="No space"):
            train(train_baseline.main, prepared, tmp_path, "r", "--epochs", 1)
    assert not (tmp_path / "r").exists()
    (tmp_path / "r").mkdir()  # and what a kill, which runs no clean-up, leaves
    (tmp_path / "r" / "opts.json").write_text("{}")
    (tmp_path / "r" / ".state.pth.partial").write_bytes(b"half")
    run = train(train_baseline.main, prepared, tmp_path, "r", "--epochs", 1)
    assert (run / "state.pth").exists()


def test_reduced_precision_is_recorded_and_trains(shared, tmp_path):
    run = train(train_baseline.main, shared, tmp_path, "r", "--epochs", 1, "--precision", "bf16")
    assert json.loads((run / "opts.json").read_text())["arithmetic"] == "bfloat16"
    assert all(value.isfinite().all() for value in weights(run).values())


def test_seed_decides(shared, finished, first_epoch, tmp_path):
    other = train(train_baseline.main, shared, tmp_path, "r", "--epochs", 1, "--seed", 6)
    assert equal(weights(first_epoch), weights(finished, 1))  # two runs of one seed
    assert not equal(weights(first_epoch), weights(other))


def test_train_all_trains_on_everything_and_holds_nothing_out(shared, tmp_path):
    run = train(train_baseline.main, shared, tmp_path, "r", "--epochs", 1, "--train_all")
    assert json.loads((run / "opts.json").read_text())["dataset"]["images"] == 12
    assert "val_loss" not in json.loads((run / "log.jsonl").read_text())


def test_lsro_uses_the_number_of_generated_images_asked_for(prepared, tmp_path):
    for number in range(6):
        save_image(prepared / "train_new" / "gen_0000" / f"gen_{number}.jpg", seed=number)
    (prepared / "train_new" / "gen_0000" / "manifest.json").write_text("{}")
    run = train(train_lsro.main, prepared, tmp_path, "r", "--epochs", 1, "--num_generated", 5)
    opts = json.loads((run / "opts.json").read_text())
    assert (opts["generated"], opts["dataset"]["images"], opts["class_num"]) == (5, 14, 3)
    assert opts["gan_manifest"]["sha256"] == hashlib.sha256(b"{}").hexdigest()


def test_lsro_without_generated_images_is_the_baseline(shared, finished, tmp_path):
    none = train(train_lsro.main, shared, tmp_path, "r", "--epochs", 2, "--num_generated", 0)
    a, b = weights(finished, 2), weights(none)
    for name in a:
        np.testing.assert_allclose(a[name], b[name], atol=1e-5, err_msg=name)


def test_a_failure_in_the_first_epoch_leaves_no_run(prepared, tmp_path):
    damaged = next((prepared / "train_new").glob("*/*.jpg"))
    damaged.write_bytes(damaged.read_bytes()[:200])
    with pytest.raises(UserError, match=damaged.name):
        train(train_baseline.main, prepared, tmp_path, "r", "--epochs", 1)
    assert not (tmp_path / "r").exists()


def test_groups_of_the_optimizer():
    net = ft_net(3)
    backbone, head = optimizer.sgd(net, 0.05, 0.2).param_groups
    assert (backbone["lr"], head["lr"]) == (pytest.approx(0.01), 0.05)
    for group in (backbone, head):
        assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 5e-4, True)
    in_head = {id(p) for p in [*net.model.fc.parameters(), *net.classifier.parameters()]}
    assert {id(p) for p in head["params"]} == in_head
    assert len(backbone["params"]) + len(in_head) == len(list(net.parameters()))
    net = ft_net(3, pooling="gem")
    _, head = optimizer.sgd(net, 0.05, 0.2).param_groups
    assert any(parameter is net.pooling.p for parameter in head["params"])  # newly made, too


def test_schedule():
    args = argparse.Namespace(schedule="step", lr_step=40, warm_epoch=5)
    assert optimizer.rate_factor(0, args) == pytest.approx(0.1)
    assert optimizer.rate_factor(2.5, args) == pytest.approx(0.55)
    assert [optimizer.rate_factor(e, args) for e in (5, 39.9, 40, 80)] == pytest.approx(
        [1, 1, 0.1, 0.01]
    )
