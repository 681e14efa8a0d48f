"""Training on several processes (torchrun, gloo on the CPU) against one process."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, call, make_market, make_prepared, save_image
from PIL import Image
from scipy.io import loadmat
from under_torchrun import make_tables, train_steps

import test as extraction
import train_lsro
from model import ft_net_dense
from reid.checkpoint import Run
from reid.weights import load_network

pytestmark = pytest.mark.slow

FLAGS = f"{TINY} --workers 1 --batchsize 6 --lr 0.005".split()


def torchrun(processes, *words, cwd):
    """Run a script on several processes; returns the finished process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*command, "--nproc_per_node", str(processes), *map(str, words)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture
def generated(prepared):
    """`prepared` with generated images among the real ones."""
    return add_generated(prepared)


def add_generated(prepared):
    for number in range(9):
        save_image(prepared / "train_new" / "gen_0000" / f"gen_{number}.jpg", seed=number)
    return prepared


# Cases: a number of steps, and flags. Fewer steps where batch norm is split: over a few images of a
# kind it is chaotic. In one process, too, images changed by 1e-15 lead to other weights in 20.
CASES = {
    "lsro": (20,),
    "densenet": (2, "--backbone", "densenet121"),
    # Its batch norms have their activation inside. Untrained on a dozen pixels it is chaotic, too.
    "lite0": (2, "--backbone", "tf_efficientnet_lite0"),
    "triplet": (6, "--neck", "bnneck", "--triplet", 1, "--instances", 3),
    "balance": (4, *"--balance --instances 3 --gan_batch 2 --batchsize 8".split()),
    "consistency": (4, "--gan_label", "consistency", "--ema", 0.9, "--on_top"),
    # In eight steps, batches with no, one, some and only generated images.
    "mprl_split": (8, "--gan_label", "mprl_dynamic", "--split_bn"),
    # One process has real images alone, the other all generated ones.
    "pseudo_split": (3, *"--gan_label pseudo --split_bn --gan_batch 5 --batchsize 12".split()),
}


@pytest.fixture(scope="module")
def on_two(tmp_path_factory):
    """What two processes compute, in one start of torchrun; returns the words of each `case`.

    Beside the word of its output file FILE, which one process is to write, stands FILE_of_two.
    """
    folder = tmp_path_factory.mktemp("on_two")
    prepared = add_generated(make_prepared(make_market(folder / "market")))
    cases = {
        name: [str(folder / name), str(prepared), steps, *FLAGS, *map(str, flags)]
        for name, (steps, *flags) in CASES.items()
    }

    (folder / "old").mkdir()
    torch.manual_seed(0)
    net = ft_net_dense(3)
    torch.nn.init.normal_(net.classifier[0].weight)
    Run(folder / "old").save_weights(net, "last")
    coloured = shutil.copytree(prepared, folder / "coloured")
    for number, path in enumerate(sorted((coloured / "train_new" / "gen_0000").iterdir())):
        Image.new("RGB", (64, 128), (30 * number, 250 - 30 * number, 100)).save(path)
    flags = ["--model_dir", str(folder), "--label_run", "old", "--clusters", "2"]
    cases["tables"] = [str(folder / "tables"), str(coloured), *FLAGS, *flags]

    work = [
        ["make_tables" if name == "tables" else "train_steps", f"{out}_of_two", *words]
        for name, (out, *words) in cases.items()
    ]
    done = torchrun(2, ROOT / "tests/under_torchrun.py", json.dumps(work), cwd=folder)
    assert done.returncode == 0, done.stderr[-6000:]
    return cases


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_like_one(case, on_two):
    """Gradients, losses, weights after some steps, validation: batch norm, dropout and all."""
    train_steps(*on_two[case])
    out = on_two[case][0]
    one, two = (torch.load(path, weights_only=True) for path in (out, f"{out}_of_two"))
    # The losses are computed in fp32, the rest in fp64.
    for name, expected in one["gradients"].items():
        error = (two["gradients"][name] - expected).abs().max()
        assert error <= 1e-5 * expected.abs().max() + 1e-12, name
    for name, expected in one["weights"].items():
        error = (two["weights"][name] - expected).abs().max()
        assert error <= 1e-4 * expected.abs().max() + 1e-12, name
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert two["validation"] == pytest.approx(one["validation"], rel=1e-3)


def test_two_processes_make_the_same_tables(on_two):
    """Of the label rules, in each process; nine generated images are dealt out unevenly."""
    make_tables(*on_two["tables"])
    out = on_two["tables"][0]
    ranks, clusters, probabilities = torch.load(f"{out}.0")
    assert ranks.shape == clusters.shape == probabilities.shape == (9, 3)
    assert len(ranks.unique(dim=0)) > 1
    for rank in (0, 1):
        of_two = torch.load(f"{out}_of_two.{rank}")
        assert torch.equal(of_two[0], ranks)
        assert torch.equal(of_two[1], clusters)
        torch.testing.assert_close(of_two[2], probabilities)


def test_two_processes_fill_one_run_folder(generated, tmp_path, capsys):
    flags = ["--data_dir", generated, "--model_dir", tmp_path, *FLAGS, "--name", "r"]
    done = torchrun(2, ROOT / "train_lsro.py", *flags, "--epochs", 2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-6000:]
    assert "Warning" not in done.stderr  # nothing of PyTorch's that is to go
    assert done.stdout.count("epoch 2/2") == 1  # one of them talks
    run = tmp_path / "r"
    assert len((run / "log.jsonl").read_text().splitlines()) == 2
    assert json.loads((run / "opts.json").read_text())["processes"] == 2
    names = load_network(run / "net_best.pth").state_dict().keys()
    assert not any(name.startswith("module.") for name in names)
    call(train_lsro.main, *flags, "--epochs", 3, "--resume")
    assert "epoch 3/3" in capsys.readouterr().out
    for more, says in [
        (("--batchsize", 7), "error: --batchsize: 7 images can't be shared among 2"),
        ((), "r: holds a run already"),  # which the first process alone finds
    ]:
        done = torchrun(2, ROOT / "train_lsro.py", *flags, *more, cwd=tmp_path)
        assert done.returncode != 0
        assert done.stderr.count(says) == 1
        assert done.stderr.count("error: ") == 1
        assert "[rank" not in done.stderr  # no traceback of the script


def test_what_one_process_alone_finds_is_said_once(generated, tmp_path):
    """The second of two processes reads the last of the held-out images."""
    damaged = sorted((generated / "val_new").glob("*/*.jpg"))[-1]
    damaged.write_bytes(damaged.read_bytes()[:300])
    flags = ["--data_dir", generated, "--model_dir", tmp_path, *FLAGS, "--name", "r"]
    done = torchrun(2, ROOT / "train_lsro.py", *flags, "--epochs", 1, cwd=tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1
    assert f"error: {damaged}: can't be read as an image" in done.stderr
    assert "[rank" not in done.stderr
    assert not (tmp_path / "r").exists()


def test_extraction_is_shared_out(generated, tmp_path):
    flags = ["--data_dir", generated, "--model_dir", tmp_path, *FLAGS, "--epochs", 1]
    call(train_lsro.main, *flags, "--name", "r")
    flags = ["--test_dir", generated, "--model_dir", tmp_path, "--name", "r", "--gpu_ids", -1]
    flags += ["--precision", "fp32"]
    call(extraction.main, *flags, "--mat", tmp_path / "one.mat")
    done = torchrun(2, ROOT / "test.py", *flags, "--mat", "two.mat", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-6000:]
    one, two = loadmat(tmp_path / "one.mat"), loadmat(tmp_path / "two.mat")
    for name in ("query_f", "gallery_f"):
        np.testing.assert_allclose(one[name], two[name], atol=1e-5)
    for name in ("query_label", "gallery_cam", "gallery_label"):
        assert (one[name] == two[name]).all()
