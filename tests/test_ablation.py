"""ablation.py: means over seeds, the table, and a grid that is stopped and goes on."""

import argparse
import importlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, call, exit_code, save_image
from PIL import Image
from scipy import stats

import ablation
from reid.batches import batch_options
from reid.dataset import Sample
from reid.files import sha256
from reid.intervals import (
    adjusted,
    mean_interval,
    paired_p,
    power,
    seeds_needed,
    spread_interval,
)

SMALL = (
    "--gpu_ids -1 --workers 0 --pretrained none --height 64 --width 32 --batchsize 4 "
    "--precision fp32 --epochs"
).split()


def cells(*flags):
    args = ablation.get_parser().parse_args([*map(str, flags)])
    return args, ablation.grid(args)


def invented(cell):
    """Scores of a cell: a generated image gives mAP 1.01e-5 more, and seeds differ by much."""
    mean_ap = 0.3 + 0.1 * cell.seed + 1.01e-5 * cell.number * (1 + 0.1 * cell.seed)
    plain = {"rank1": mean_ap + 0.2, "mAP": mean_ap}
    ranked = {name: value + 0.05 for name, value in plain.items()}
    if cell.seed:  # those of seed 0 were scored by an older version
        plain["made_by"] = {"layer": "pool", "size": "128x64 of 144x72"}
    return {"train": {}, "evaluate": plain, "evaluate_rerank": ranked}


def invent(folder, *flags, device="GPU"):
    """Run folders of a grid, as if all of it had been run."""
    args, grid = cells(*flags)
    for cell in grid:
        (folder / cell.name).mkdir(parents=True)
        opts = {"options": ablation.training_options(args, cell), "device_name": device}
        opts |= {"git": {"commit": "0123456789abc", "dirty": cell.seed == 1}}
        opts |= {"processes": 1, "arithmetic": "bfloat16", "command": " ".join(map(str, flags))}
        if cell.seed == 2:
            opts["resumed"] = [opts | {"git": {"commit": "7654321", "dirty": False}}]
        (folder / cell.name / "opts.json").write_text(json.dumps(opts))
        (folder / cell.name / "results.json").write_text(json.dumps(invented(cell)))


def test_interval_is_students():
    values = [0.31, 0.35, 0.30, 0.38]
    mean, bounds = mean_interval(values)
    expected = stats.t.interval(0.95, 3, loc=mean, scale=stats.sem(values))
    assert (mean, bounds) == (pytest.approx(0.335), pytest.approx(expected))
    assert mean_interval([0.5]) == (0.5, None)


def test_paired_p_is_students():
    test = stats.ttest_rel([0.21, 0.33, 0.42], [0.20, 0.30, 0.40])
    mean, bounds = mean_interval([0.01, 0.03, 0.02])
    assert mean == pytest.approx(0.02)
    assert bounds == pytest.approx(test.confidence_interval(0.95))
    assert paired_p([0.01, 0.03, 0.02]) == pytest.approx(test.pvalue)
    assert paired_p([0.01]) is None
    assert paired_p([0.3 - 0.2, 0.2 - 0.1]) is None  # the same but for rounding


def test_p_values_are_adjusted_by_holm():
    assert adjusted([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert adjusted([0.9, 0.8]) == [1.0, 1.0]
    assert adjusted([]) == []
    assert adjusted([0.01, None, 0.02]) == [pytest.approx(0.03), None, pytest.approx(0.04)]


def test_seeds_needed_find_the_difference():
    """Against simulated studies: about 80 % of them find it, and with a seed less fewer do."""
    rng = np.random.default_rng(0)
    found = []
    for spread in (0.005, 0.01, 0.03):
        needed = seeds_needed(spread, 0.01)
        for seeds in (needed, needed - 1):
            pairs = rng.normal(0.01, spread, size=(20000, seeds))
            found.append((stats.ttest_1samp(pairs, 0, axis=1).pvalue < 0.05).mean())
        assert found[-2] >= 0.79
        assert found[-1] < 0.805
    assert seeds_needed(0.01, 0.01) == 10
    assert seeds_needed(0.0, 0.01) == 2
    assert seeds_needed(3.0, 0.01) is None


def test_power_is_known_for_every_spread():
    """SciPy's noncentral t distribution is NaN for some; where it is not, the two agree."""
    spreads = np.geomspace(0.0002, 0.03, 60)
    for seeds in (2, 3, 8, 40):
        found = np.array([power(spread, 0.01, seeds) for spread in spreads])
        assert ((found >= 0) & (found <= 1 + 1e-12)).all()
        assert (np.diff(found) <= 1e-9).all()
        shift, limit = 0.01 / spreads * seeds**0.5, stats.t.ppf(0.975, seeds - 1)
        theirs = stats.nct.sf(limit, seeds - 1, shift) + stats.nct.cdf(-limit, seeds - 1, shift)
        known = np.isfinite(theirs)
        assert known.sum() > 20
        np.testing.assert_allclose(found[known], theirs[known], atol=1e-4)
    needed = [seeds_needed(spread, 0.01) for spread in spreads]
    assert needed == sorted(needed)


def test_interval_of_a_spread():
    rng = np.random.default_rng(0)
    spreads = rng.normal(scale=2.0, size=(4000, 4)).std(axis=1, ddof=1)
    covered = [low < 2.0 < high for low, high in (spread_interval(s, 4) for s in spreads)]
    assert 0.94 <= np.mean(covered) <= 0.965


def test_default_grid_is_table_2():
    _, grid = cells()
    assert len(grid) == 3 * 8
    assert {(cell.num_ids, cell.images) for cell in grid} == {(None, "")}
    assert [(cell.backbone, cell.rule, cell.number) for cell in grid if cell.seed == 1] == [
        ("resnet50", "", 0),
        *(("resnet50", "lsro", 6000 * n) for n in range(2, 7)),
        ("resnet50", "all_in_one", 24000),
        ("resnet50", "pseudo", 24000),
    ]


def test_what_a_cell_is_trained_with():
    flags = "--gan_labels sls:8 lsro --numbers 6 --backbones densenet121 --seeds 5".split()
    args, grid = cells(*flags, "--", "--gan_batch=2", "--lr", "0.02", "--split_bn", "--train_all")
    none, sls, lsro = (ablation.training_options(args, cell) for cell in grid)
    assert [cell.name for cell in grid] == [
        "densenet121_0_seed5",
        "densenet121_sls_8_seed5",
        "densenet121_lsro_6_seed5",
    ]
    for options in (none, sls, lsro):
        assert (options["seed"], options["lr"]) == (5, 0.02)
        assert options["backbone"] == "densenet121"
        assert options["train_all"]
    asked = "num_generated", "gan_label", "gan_batch", "split_bn", "label_run"
    # Without generated images there is nothing for their flags to be about.
    assert [none[name] for name in asked] == [0, "lsro", None, False, None]
    assert [sls[name] for name in asked] == [8, "sls", 2, True, "densenet121_0_seed5"]
    assert [lsro[name] for name in asked] == [6, "lsro", 2, True, None]
    assert [options["on_top"] for options in (none, sls, lsro)] == [False, True, True]


def test_images_of_an_epoch():
    real, made = [Sample(None, 0)] * 100, [Sample(None, -1, 1)] * 300

    def images(gan_batch, on_top, generated=made):
        flags = argparse.Namespace(batchsize=10, gan_batch=gan_batch, on_top=on_top)
        batches = batch_options(flags, real + generated)
        return ablation.images_of_an_epoch(batches, real, generated)

    assert images(5, on_top=True) == 150
    assert images(5, on_top=True, generated=[]) == 100
    assert images(5, on_top=False) == 200  # five in ten
    assert images(None, on_top=False) == 400
    assert images(None, on_top=True) == 400


def test_a_grid_of_identities_and_folders():
    flags = "--num_ids 50 100 --unlabelled gan=a/b real=c --gan_labels lsro:1x pseudo --numbers 3x"
    args, grid = cells(*flags.split(), "--seeds", 7, "--more_steps")
    assert len(grid) == 2 * (1 + 2 * 2)
    names = [cell.name for cell in grid]
    assert names[:2] == ["resnet50_50ids_0_seed7", "resnet50_50ids_gan_lsro_1x_seed7"]
    assert names[-1] == "resnet50_100ids_real_pseudo_3x_seed7"
    options = ablation.training_options(args, grid[-1])
    wanted = {"num_ids": 100, "gen_dir": "c", "num_generated": "3x", "on_top": False}
    assert wanted.items() <= options.items()
    assert {cell.baseline for cell in grid} == {grid[0], grid[5]}
    assert ablation.ready(grid, {}) == grid
    waiting = cells("--gan_labels", "sls", "--numbers", 5, "--seeds", 1)[1]
    assert ablation.ready(waiting, {}) == waiting[:1]
    assert ablation.ready(waiting[1:], {waiting[0]: None}) == []
    assert ablation.ready(waiting[1:], {}) == waiting[1:]


def test_table_of_a_grid_that_is_done(tmp_path, capsys):
    flags = ["--model_dir", tmp_path, "--name", "g", "--gan_labels", "lsro", "sls:50"]
    flags += ["--numbers", 100, 200, "--data_dir", tmp_path / "not needed"]
    invent(tmp_path / "g", *flags, "--seeds", 0, 1)
    invent(tmp_path / "g", *flags, "--seeds", 2, device="another GPU")
    call(ablation.main, *flags, "--seeds", 2, 0, 1)
    out = capsys.readouterr().out
    table = (tmp_path / "g" / "table.md").read_text()
    assert table in out
    rows = table.splitlines()[2:10]
    none = "| ResNet-50 | – | 0 | plain | 60.00 ± 24.84 |  |  | 40.00 ± 24.84 |  |  |"
    assert rows[0] == none
    # Differences of 0.101, 0.111, 0.121: t(2) = 4.303 times 0.0101 over the root of 3. Their p of
    # 0.00274 counts twelve times in a table of twelve comparisons.
    lsro = "| ResNet-50 | lsro | 100 | plain | 60.11 ± 24.87 | +0.11 ± 0.03 | 0.033 |"
    assert rows[1].startswith(lsro)
    assert [row.split(" | ")[2] for row in rows] == ["0", "100", "200", "50"] * 2
    last = "| re-ranked | 65.06 ± 24.85 | +0.06 ± 0.01 | 0.033 | 45.06 ± 24.85 | +0.06 ± 0.01 |"
    assert last in rows[7]
    assert "not over people to test on" in table
    commits = "commit 0123456 and commit 7654321 and commit 0123456 (with changes)"
    assert f"trained at {commits} on 1 x another GPU in" in table
    assert "and 1 x GPU in bfloat16; tested by layer pool at 128x64 of 144x72 and" in table
    assert "and an unknown layer and size." in table
    content = json.loads((tmp_path / "g" / "table.json").read_text())
    assert len(content["cells"]) == 3 * 4
    assert content["rows"][1]["mAP_difference"] == pytest.approx(0.001111)
    assert content["rows"][1]["mAP_difference_interval"] == pytest.approx(
        [0.001111 - 2.509e-4, 0.001111 + 2.509e-4], abs=1e-7
    )
    assert {"command", "versions", "git"} <= content.keys()
    assert Image.open(tmp_path / "g" / "ablation.jpg").size[0] > 800

    call(ablation.main, *flags, "--power")
    text = (tmp_path / "g" / "table.md").read_text()
    assert "| resnet50_lsro_200 | mAP | 0.02 | 2 (2 to 3) |" in text

    call(ablation.main, *flags, "--seeds", 1)
    text = (tmp_path / "g" / "table.md").read_text()
    assert "In %, of one training seed, 1: no intervals." in text
    assert "±" not in text


def test_cells_with_other_options_are_not_mixed(tmp_path, capsys):
    flags = ["--model_dir", tmp_path, "--name", "g", "--gan_labels", "lsro:9", "--seeds", 0]
    invent(tmp_path / "g", *flags, "--", "--epochs", 5, "--gan_weight", 0.5)
    for other, says in [
        (["--epochs", 6], "resnet50_0_seed0: was trained with --epochs 5, not 6"),
        (["--epochs", 5], "_lsro_9_seed0: was trained with --gan_weight 0.5, not 1.0"),
        (["--epochs", 5, "--gan_weight", 2], "with --gan_weight 0.5, not 2.0"),
    ]:
        assert exit_code(ablation.main, *flags, "--", *other) == 2
        err = capsys.readouterr().err
        assert says in err
        assert len(err.splitlines()) == 1
    call(ablation.main, *flags, "--", "--epochs", 5, "--gan_weight", 0.5, "--workers", 7)


def test_cells_compute_in_one_arithmetic(small, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(ablation, "dtype_for", lambda device: torch.bfloat16)
    assert exit_code(ablation.main, *small, "--numbers", 2) == 2
    assert "add --precision bf16 or fp32 after --" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_a_cell_takes_one_gpu(small, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert exit_code(ablation.main, *small, "--", "--gpu_ids", "0,1") == 2
    assert "--gpu_ids 0,1 after --: re-ranking uses one GPU" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


@pytest.fixture
def small(prepared, tmp_path):
    """Flags of a grid on a tiny dataset with three generated images."""
    for number in range(3):
        save_image(prepared / "train_new" / "gen_0000" / f"gen_{number}.jpg", seed=number)
    flags = ["--data_dir", prepared, "--model_dir", tmp_path / "model", "--name", "g"]
    return [*flags, "--backbones", "test_resnet", "--gan_labels", "lsro"]


def test_mistakes_before_anything_is_trained(small, prepared, tmp_path, capsys):
    for flags, says in [
        (["--", "--heigth", 128], "unrecognized arguments: --heigth 128 (see train_lsro.py"),
        (["--", "--epochs", "many"], "--epochs: invalid int value: 'many'"),
        (["--more_steps", "--", "--gan_batch", 64], "--gan_batch 64: leaves no real images"),
        (
            ["--gan_labels", "lsro", "pseudo", "--", "--epochs", 9],
            "--gan_start 20: with --gan_label",
        ),
        (["--", "--seed", 3], "--seed after --: the grid sets it"),
        (["--", "--name=x"], "--name=x after --"),
        (["--gan_labels", "lsr"], "invalid choice: 'lsr'"),
        (["--gan_labels", "lsro:x"], "--gan_labels lsro:x: expected a rule"),
        (["--numbers", 0], "--numbers: no images for lsro; ask for a number above 0"),
        (["--numbers", 2, "--gan_labels", "lsro", "pseudo:0"], "--numbers: no images for pseudo"),
        (["--gan_labels", ":2"], "--gan_labels :2: expected a rule"),
        (
            ["--numbers", 2, "--nproc_per_node", 2, "--", "--batchsize", 6],
            "--batchsize: 7 images, 1 of them generated (--gan_batch), can't be shared among 2",
        ),
        (
            ["--numbers", 2, "--nproc_per_node", 3, "--", "--gan_batch", 4, "--batchsize", 12],
            "--batchsize: 13 images, 4 of them generated (--gan_batch), can't be shared among 3",
        ),
        (["--numbers", 4], "--num_generated 4: only 3 images in"),
        (["--num_ids", 9], "--num_ids 9: only 3 identities"),
        (["--gan_labels", "consistency"], "compares with mean weights; add --ema 0.999"),
        (["--power", "--seeds", 3], "--power: takes two seeds or more"),
        (["--unlabelled", "a"], "--unlabelled a: expected NAME=FOLDER"),
        (["--unlabelled", "a=x", "--gen_dir", "y"], "--gen_dir: --unlabelled names the folders"),
        (["--unlabelled", f"a={tmp_path / 'x'}"], "x: no such folder"),
        (["--data_dir", tmp_path / "nowhere"], "--data_dir"),
    ]:
        assert exit_code(ablation.main, *small, *flags) == 2
        out, err = capsys.readouterr()
        assert says in err
        assert (out, len(err.splitlines())) == ("", 1)
    assert not (tmp_path / "model").exists()


@pytest.fixture
def in_process(monkeypatch):
    """A function: from its call on the grid's scripts run in this process, which saves starts."""

    class Finished:
        def __init__(self, command):
            self.args = command
            script = next(n for n, word in enumerate(command) if word.endswith(".py"))
            module = importlib.import_module(Path(command[script]).stem)
            self.returncode = exit_code(module.main, *command[script + 1 :])

        def poll(self):
            return self.returncode

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield lambda: monkeypatch.setattr(ablation, "subprocess", SimpleNamespace(Popen=Finished))
    torch.set_num_threads(threads)


def stop_at(line, number, flags):
    """Start the grid, stop it at a line of its output; returns all of that and the error lines.

    SIGINT goes to its children as well, as a terminal's Ctrl-C does.
    """

    def listen():  # a shell's background job, as the tests may be, starts without Ctrl-C
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = subprocess.Popen(
        [sys.executable, ROOT / "ablation.py", *map(str, flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=listen,
    )
    out = ""
    for text in process.stdout:
        out += text
        if text.startswith(line):
            (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
            break
    rest, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    return out + rest, err.splitlines()


@pytest.mark.slow
def test_a_grid_is_stopped_goes_on_and_is_not_run_again(
    small, prepared, tmp_path, capfd, in_process
):
    """SIGTERM to it alone, Ctrl-C, the rest, nothing; then a cell of which results are lost."""
    flags = [*small, "--numbers", 2, "--seeds", 0, "--", *SMALL, 20]
    folder = tmp_path / "model" / "g"
    none, lsro = folder / "test_resnet_0_seed0", folder / "test_resnet_lsro_2_seed0"
    stopped = "the grid is stopped; the same command goes on from here"

    out, err = stop_at("epoch 1/20", signal.SIGTERM, flags)
    assert "2 cells, 0 of them done; to run:\n  test_resnet_0_seed0\n" in out
    assert "== cell 1 of 2: test_resnet_0_seed0\n\n$ python train_lsro.py --name" in out
    assert "all whole epochs are saved" in err[0]
    assert err[1:] == [stopped]

    out, err = stop_at("epoch ", signal.SIGINT, flags)
    assert re.search(r"train_lsro.py --name test_resnet_0_seed0 .* --resume\n", out)
    assert err[-1] == stopped
    assert not (folder / "table.md").exists()

    in_process()
    call(ablation.main, *flags)
    out = capfd.readouterr().out
    assert re.search(r"== cell 2 of 2: test_resnet_lsro_2_seed0, about \d+ min left\n", out)
    assert scripts(out) == ["train_lsro", "test", "evaluate", "evaluate_rerank"] * 2
    for run in (none, lsro):
        assert len((run / "log.jsonl").read_text().splitlines()) == 20
    table = json.loads((folder / "table.json").read_text())["rows"]
    scores = [json.loads((run / "results.json").read_text()) for run in (none, lsro)]
    assert [row["mAP"] for row in table[:2]] == [score["evaluate"]["mAP"] for score in scores]
    text = (folder / "table.md").read_text()
    assert text in out

    call(ablation.main, *flags)
    assert scripts(capfd.readouterr().out) == []
    assert (folder / "table.md").read_text() == text

    results = {name: score for name, score in scores[1].items() if name != "evaluate"}
    (lsro / "results.json").write_text(json.dumps(results))
    call(ablation.main, *flags)
    out = capfd.readouterr().out
    assert "2 cells, 1 of them done; to run:\n  test_resnet_lsro_2_seed0\n" in out
    assert scripts(out) == ["evaluate", "evaluate_rerank"]
    assert (folder / "table.md").read_text() == text

    save_image(next((prepared / "train_new" / "0000").iterdir()), size=(9, 9))
    (lsro / "results.json").unlink()
    assert exit_code(ablation.main, *flags) == 2
    assert "_0_seed0: was trained on other images than there are now" in capfd.readouterr().err


def scripts(out):
    """The names of the scripts that a grid has run."""
    return re.findall(r"^\$ python (\w+)\.py ", out, re.MULTILINE)


@pytest.mark.slow
def test_two_cells_at_a_time_are_the_same(small, tmp_path, monkeypatch, capfd, in_process):
    """A rule of a finished run waits for its baseline; output goes to a file for each cell."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    flags = [*small, "--gan_labels", "teacher", "--numbers", 2, "--seeds", 0]
    results = {}
    for jobs in (2, 1):
        name = f"jobs{jobs}"
        if jobs == 1:
            in_process()
        call(ablation.main, *flags, "--name", name, "--jobs", jobs, "--", *SMALL, 1)
        out = capfd.readouterr().out
        folder = tmp_path / "model" / name
        cells = sorted(path for path in folder.iterdir() if path.is_dir())
        assert len(cells) == 2
        results[jobs] = [sha256(cell / "net_last.pth") for cell in cells]
        results[jobs] += [
            {name: scores for name, scores in row.items() if name != "command"}
            for row in json.loads((folder / "table.json").read_text())["rows"]
        ]
        logs = sorted(path.stem for path in folder.glob("*.log"))
        assert logs == ([] if jobs == 1 else [cell.name for cell in cells])
        assert len(scripts(out)) == (8 if jobs == 1 else 0)
    assert results[1] == results[2]
    monkeypatch.undo()
    image = next((tmp_path / "market" / "pytorch" / "train_new" / "0001").iterdir())
    image.write_bytes(b"no image")
    assert exit_code(ablation.main, *flags, "--name", "bad", "--jobs", 2, "--", *SMALL, 1) == 2
    err = capfd.readouterr().err.splitlines()
    assert len(err) == 1
    assert f".log: train_lsro.py: {image}: can't be read as an image" in err[0]


@pytest.mark.slow
def test_a_cell_that_fails_ends_the_grid_with_its_own_line(small, prepared, capfd):
    image = next((prepared / "train_new" / "0001").iterdir())
    image.write_bytes(b"no image")
    assert exit_code(ablation.main, *small, "--numbers", 2, "--", *SMALL, 1) == 2
    out, err = capfd.readouterr()
    assert len(err.splitlines()) == 1
    assert err.startswith(f"error: {image}: can't be read as an image")
    assert scripts(out) == ["train_lsro"]
