"""Training on several processes (torchrun, gloo on the CPU) against one process."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script, save_image
from PIL import Image
from scipy.io import loadmat

from model import ft_net_dense
from reid.checkpoint import Run, load_network

FLAGS = (
    "--gpu_ids -1 --workers 1 --pretrained none --use_dense --height 64 --width 32 "
    "--precision fp32 --batchsize 6 --lr 0.005"
).split()


def torchrun(processes, *words, cwd):
    """Run a script of the root on several processes; returns the finished process."""
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
    """Generated images among the real ones of `prepared`; returns the prepared folder."""
    for number in range(9):
        save_image(prepared / "train_new" / "gen_0000" / f"gen_{number}.jpg", seed=number)
    return prepared


# Batch norm over a few images of a kind is chaotic: in one process, too, images changed by 1e-15
# lead to other weights in 20 steps. So there it is fewer.
@pytest.mark.parametrize(
    "steps, extra",
    [
        (20, ()),
        (20, ("--neck", "bnneck", "--triplet", 1, "--instances", 3)),
        # In eight steps, batches with no, one, some and only generated images.
        (8, ("--gan_label", "mprl_dynamic", "--split_bn")),
        # One process has real images alone, the other all generated ones.
        (8, ("--gan_label", "pseudo", "--split_bn", "--gan_batch", 5, "--batchsize", 12)),
    ],
    ids=["lsro", "triplet", "mprl_split", "pseudo_split_gan_batch"],
)
def test_two_processes_train_like_one(steps, extra, generated, tmp_path):
    """Gradients, and weights after some steps: batch norm, dropout, generated images and all."""
    flags = [steps, *FLAGS, *map(str, extra)]
    script, one, two = ROOT / "tests/twenty_steps.py", tmp_path / "one.pth", tmp_path / "two.pth"
    code, _, err = run_script(script, generated, one, *flags)
    assert code == 0, err
    done = torchrun(2, script, generated, two, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-6000:]
    one, two = (torch.load(path, weights_only=True) for path in (one, two))
    # The losses are computed in fp32, the rest in fp64.
    for name, expected in one["gradients"].items():
        error = (two["gradients"][name] - expected).abs().max()
        assert error <= 1e-5 * expected.abs().max() + 1e-12, name
    for name, expected in one["weights"].items():
        error = (two["weights"][name] - expected).abs().max()
        assert error <= 1e-4 * expected.abs().max() + 1e-12, name


def test_two_processes_make_the_same_tables(generated, tmp_path):
    """Of the label rules, in each process; nine generated images are shared out unevenly."""
    for number, path in enumerate(sorted((generated / "train_new" / "gen_0000").iterdir())):
        Image.new("RGB", (64, 128), (30 * number, 250 - 30 * number, 100)).save(path)
    torch.manual_seed(0)
    (tmp_path / "old").mkdir()
    net = ft_net_dense(3)
    torch.nn.init.normal_(net.classifier[0].weight)
    Run(tmp_path / "old").save_weights(net, "last")
    flags = [*FLAGS, "--model_dir", tmp_path, "--label_run", "old", "--clusters", 2]
    script, out = ROOT / "tests/gan_tables.py", tmp_path / "table"
    code, _, err = run_script(script, generated, out, *flags)
    assert code == 0, err
    ranks, clusters = torch.load(f"{out}.0")
    assert ranks.shape == clusters.shape == (9, 3)
    assert len(ranks.unique(dim=0)) > 1
    done = torchrun(2, script, generated, out, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-6000:]
    for rank in (0, 1):
        found = torch.load(f"{out}.{rank}")
        assert torch.equal(found[0], ranks)
        assert torch.equal(found[1], clusters)


def test_two_processes_fill_one_run_folder(generated, tmp_path):
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
    code, out, err = run_script("train_lsro.py", *flags, "--epochs", 3, "--resume", cwd=tmp_path)
    assert code == 0, err
    assert "epoch 3/3" in out
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
    assert run_script("train_lsro.py", *flags, "--name", "r", cwd=tmp_path)[0] == 0
    flags = ["--test_dir", generated, "--model_dir", tmp_path, "--name", "r", "--gpu_ids", -1]
    flags += ["--precision", "fp32"]
    assert run_script("test.py", *flags, "--mat", "one.mat", cwd=tmp_path)[0] == 0
    done = torchrun(2, ROOT / "test.py", *flags, "--mat", "two.mat", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-6000:]
    one, two = loadmat(tmp_path / "one.mat"), loadmat(tmp_path / "two.mat")
    for name in ("query_f", "gallery_f"):
        np.testing.assert_allclose(one[name], two[name], atol=1e-5)
    for name in ("query_label", "gallery_cam", "gallery_label"):
        assert (one[name] == two[name]).all()
