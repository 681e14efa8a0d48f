"""cross_test.py: the table against single evaluations, what is kept and what is made anew."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import (
    call,
    exit_code,
    make_market,
    make_prepared,
    run_script,
    save_image,
    tiny_network,
)
from PIL import Image
from test_features import lived_in, run_folder

import cross_test
import evaluate
import evaluate_rerank
import prepare
import test as extraction
from reid.curves import draw_matrix
from reid.dataset import prepared_hash
from reid.device import GPUMemoryError
from reid.files import write_json

CPU = ("--gpu_ids", "-1", "--workers", 0, "--precision", "fp32")


@pytest.fixture
def flags(tmp_path, monkeypatch):
    """Runs `a`, trained on the dataset `x`, and `b`, trained nowhere; datasets `x` and `y`."""
    monkeypatch.chdir(tmp_path)
    for name in "xy":
        make_market(tmp_path / name)
        call(prepare.main, "--download_path", tmp_path / name)
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        folder = run_folder(tmp_path / "model" / name, lived_in(tiny_network(), seed), 64, 32)
        options = {"height": 64, "width": 32, "backbone": "test_resnet"}
        options |= {"data_dir": "x/pytorch"} if name == "a" else {}
        write_json(folder / "opts.json", {"options": options})
    return ("--runs", "a", "b", "--data_dirs", "x/pytorch", "why=y/pytorch", *CPU)


def table():
    with open("model/cross_test/table.json") as file:
        return {(cell["run"], cell["dataset"]): cell for cell in json.load(file)["cells"]}


def test_the_table_is_that_of_single_evaluations(flags, tmp_path, capsys):
    call(cross_test.main, *flags)
    out, found = capsys.readouterr().out, table()
    assert set(found) == {("a", "x"), ("a", "why"), ("b", "x"), ("b", "why")}
    for (name, dataset), cell in found.items():
        folder = tmp_path / dataset.replace("why", "y") / "pytorch"
        words = ("--name", name, "--data_dir", folder, "--mat", "one.mat", *CPU)
        call(extraction.main, *words)
        for script, ranking in ((evaluate, "plain"), (evaluate_rerank, "re-ranked")):
            call(script.main, "one.mat", "--json", "one.json")
            single = json.loads((tmp_path / "one.json").read_text())[script.__name__]
            assert cell[ranking]["mAP"] == pytest.approx(single["mAP"])
            assert cell[ranking]["rank1"] == single["rank1"]
            assert cell[ranking]["mAP_interval"] == pytest.approx(single["mAP_interval"])
    own = found["a", "x"]["plain"]
    assert f"| a | plain | **{100 * own['rank1']:.2f}** (" in out
    assert f"/ **{100 * own['mAP']:.2f}** (" in out
    assert out.count("**") == 8  # a run's own dataset, two scores, two rankings
    other = found["b", "x"]["plain"]
    assert other["mAP_difference"] == pytest.approx(other["mAP"] - own["mAP"])
    assert f"| b | plain | {100 * (other['rank1'] - own['rank1']):+.2f}" in out
    assert "mAP_difference" not in found["b", "why"]["plain"]  # nobody was trained there
    written = (tmp_path / "model/cross_test/table.md").read_text()
    assert written in out
    with Image.open("model/cross_test/matrix.jpg") as picture:
        assert len(picture.getcolors(1 << 24)) > 20


def test_the_images_decide_what_a_run_was_trained_on(tmp_path):
    """Not where they lie, nor their names and identities, which x and y have in common."""
    x, y = (make_prepared(make_market(tmp_path / name)) for name in "xy")
    options = {"data_dir": str(x)}
    on_x = {"options": options, "train_all_sha256": [prepared_hash(x)]}
    on_both = {"options": options, "train_all_sha256": [prepared_hash(x), prepared_hash(y)]}
    older = {"options": options}
    for opts, expected in ((on_x, [True, False]), (on_both, [True, True]), (older, [True, False])):
        assert [cross_test.trained_on(opts, folder) for folder in (x, y)] == expected
    moved = x.rename(tmp_path / "elsewhere")
    y.rename(x)
    for opts, expected in ((on_x, [True, False]), (on_both, [True, True]), (older, [False, True])):
        assert [cross_test.trained_on(opts, folder) for folder in (moved, x)] == expected
    shutil.rmtree(moved / "train_all_new")
    assert not cross_test.trained_on(on_x, moved)


def test_features_are_kept_as_long_as_they_are_true(flags, tmp_path, monkeypatch, capsys):
    extracted = []
    extract = extraction.main
    monkeypatch.setattr(extraction, "main", lambda words: (extracted.append(words), extract(words)))
    call(cross_test.main, *flags)
    assert len(extracted) == 4
    first = table()
    call(cross_test.main, *flags)
    assert len(extracted) == 4
    assert table() == first
    torch.manual_seed(7)  # the run was trained again
    (tmp_path / "model/b/net_last.pth").unlink()
    (tmp_path / "model/b/opts.json").unlink()
    (tmp_path / "model/b").rename(tmp_path / "model/older")
    run_folder(tmp_path / "model/b", lived_in(tiny_network(), 7), 64, 32)
    for mat in (tmp_path / "model/older").glob("*.mat"):
        mat.rename(tmp_path / "model/b" / mat.name)
    call(cross_test.main, *flags)
    assert len(extracted) == 6
    changed = next((tmp_path / "y/pytorch/query").glob("*/*"))
    changed.unlink()
    save_image(changed, seed=3, size=(20, 30))
    call(cross_test.main, *flags)
    assert len(extracted) == 8
    assert table() != first
    changed.rename(changed.parents[2] / "gallery" / changed.parent.name / changed.name)
    call(cross_test.main, *flags)
    assert len(extracted) == 10
    call(cross_test.main, *flags, "--precision", "bf16")
    assert len(extracted) == 14
    call(cross_test.main, *flags, "--precision", "auto")
    assert len(extracted) == 14
    capsys.readouterr()


def test_a_run_in_a_folder_of_a_grid(flags, tmp_path, capsys):
    """Its features are its own, not those of a run with the last part of its name."""
    (tmp_path / "model/grid").mkdir()
    (tmp_path / "model/b").rename(tmp_path / "model/grid/a")
    call(cross_test.main, *flags, "--runs", "a", "grid/a/")
    found = table()
    assert found["a", "x"]["plain"]["mAP"] != found["grid/a", "x"]["plain"]["mAP"]
    assert (tmp_path / "model/grid/a/cross_x.mat").exists()


def test_features_of_another_layer_or_size_are_not_taken(flags, tmp_path, monkeypatch):
    call(cross_test.main, *flags)
    first = table()
    write_json(tmp_path / "model/b/testing.json", {"layer": "pool", "test_size": "same"})
    call(cross_test.main, *flags)
    changed = {pair for pair, cell in table().items() if cell["plain"] != first[pair]["plain"]}
    assert changed == {("b", "x"), ("b", "why")}


def test_a_stop_loses_no_whole_extraction(flags, tmp_path, monkeypatch):
    extract, done = extraction.main, []

    def third_is_stopped(words):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(words)
        extract(words)

    monkeypatch.setattr(extraction, "main", third_is_stopped)
    with pytest.raises(KeyboardInterrupt):
        call(cross_test.main, *flags)
    assert not (tmp_path / "model/cross_test").exists()
    monkeypatch.setattr(extraction, "main", lambda words: (done.append(words), extract(words)))
    call(cross_test.main, *flags)
    assert len(done) == 4


def test_the_gpu_reranks(flags, monkeypatch, capsys):
    card, rerank, devices = torch.device("cuda", 1), cross_test.rerank, []

    def on_card(query_f, gallery_f, device):
        devices.append(device)
        if len(devices) == 3:
            raise GPUMemoryError
        return rerank(query_f, gallery_f)

    monkeypatch.setattr(cross_test, "choose_device", lambda gpu_ids: (card, [1, 2]))
    monkeypatch.setattr(cross_test, "rerank", on_card)
    assert exit_code(cross_test.main, *flags) == 2
    assert "re-ranking; take the CPU with --gpu_ids -1" in capsys.readouterr().err
    assert devices == [card] * 3


def test_differences_are_paired_by_query():
    rng = np.random.default_rng(0)
    identities = rng.integers(0, 9, 40)
    ranks = [rng.random(40) for _ in range(2)]
    cells = [cross_test.Cell(False, {"plain": Fixed(ap)}, {}, identities) for ap in ranks]
    rank1, mean_ap = cross_test.difference(*cells, "plain")
    assert rank1 == (0, 0, 0)
    assert mean_ap.value == pytest.approx((ranks[0] - ranks[1]).mean())
    assert mean_ap.low < mean_ap.value < mean_ap.high
    assert cross_test.difference(cells[0], cells[0], "plain") == [(0, 0, 0)] * 2


def test_names_that_are_no_text(tmp_path):
    name = os.fsdecode(b"\xff")
    draw_matrix({"mAP, %": [[50.0]]}, [name], [name], [[False]], tmp_path / "matrix.jpg")
    assert (tmp_path / "matrix.jpg").stat().st_size


class Fixed:
    """Scores of which only AP differs."""

    def __init__(self, ap):
        self.ap = ap

    def hits(self, rank):
        return self.ap >= 0


def test_bad_input(flags, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    cases = [
        (("--runs", "a", "none"), "model/none: no such run"),
        (("--data_dirs", "none"), "none: no such folder; name the prepared dataset"),
        (("--data_dirs", "x"), "x: not prepared itself; name x/pytorch"),
        (
            ("--data_dirs", "x/pytorch", "x/pytorch"),
            "--data_dirs x/pytorch: needs a name of its own",
        ),
        (("--data_dirs", "x="), "--data_dirs x=: needs a name and a folder"),
        (("--data_dirs", "=x/pytorch"), "needs a name of its own; write NAME=x/pytorch"),
        (("--which_epoch", "7"), "--which_epoch can be last"),
        (("--gpu_ids", "0"), "--gpu_ids 0"),
    ]
    for wrong, says in cases:
        assert exit_code(cross_test.main, *flags, *wrong) == 2, says
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert says in lines[0]
        assert sorted(tmp_path.rglob("*")) == before, says


def test_folders_with_an_equals_sign(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a=b", "b"):
        (tmp_path / name / "pytorch").mkdir(parents=True)
    found = cross_test.named_folders(["a=b/pytorch", "c=b/pytorch", "d=a=b/pytorch"])
    assert {name: str(folder) for name, folder in found.items()} == {
        "a=b": "a=b/pytorch",
        "c": "b/pytorch",
        "d": "a=b/pytorch",
    }


@pytest.mark.slow
def test_as_a_process():
    code, out, err = run_script("cross_test.py", "--help")
    assert (code, err) == (0, "")
    assert "--data_dirs [NAME=]FOLDER" in out
