"""results_table.py: the rows of runs, with the intervals that their scores have."""

import json

import pytest
from conftest import call

import results_table
from reid.errors import UserError
from reid.files import sha256

SCORES = {"rank1": 0.9, "rank5": 0.95, "rank10": 0.96, "mAP": 0.7}


def make_run(folder, use_dense, **plain):
    folder.mkdir()
    opts = {"options": {"use_dense": use_dense}, "generated": 700}
    (folder / "opts.json").write_text(json.dumps(opts))
    results = {"evaluate": SCORES | plain, "evaluate_rerank": SCORES | {"mAP": 0.8}}
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def test_rows_of_two_runs(tmp_path, capsys):
    dense = make_run(tmp_path / "a", True, mAP_interval=[0.65, 0.754])
    call(results_table.main, dense, make_run(tmp_path / "b", False))
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| a | DenseNet-121 | 700 | plain | 90.00 | 95.00 | 96.00 | 70.00 (65.0–75.4) |",
        "| a | DenseNet-121 | 700 | re-ranked | 90.00 | 95.00 | 96.00 | 80.00 |",
        "| b | ResNet-50 | 700 | plain | 90.00 | 95.00 | 96.00 | 70.00 |",
        "| b | ResNet-50 | 700 | re-ranked | 90.00 | 95.00 | 96.00 | 80.00 |",
    ]


def test_an_interval_that_is_none(tmp_path):
    run = make_run(tmp_path / "a", True, rank1_interval=[0.8])
    with pytest.raises(UserError, match=r"results\.json: has an interval that is not two numbers"):
        call(results_table.main, run)


def test_scores_of_other_weights(tmp_path, capsys):
    """Such as a run's own before it was resumed, or those of another run."""
    run = make_run(tmp_path / "a", True)
    for name in ("last", "best", "8"):
        (run / f"net_{name}.pth").write_text(name)
    results = json.loads((run / "results.json").read_text())
    of_best = {"made_by": {"weights_sha256": sha256(run / "net_best.pth")}}
    results = {section: scores | of_best for section, scores in results.items()}
    (run / "results.json").write_text(json.dumps(results))
    call(results_table.main, run)
    assert capsys.readouterr().out.count("| a |") == 2
    (run / "net_best.pth").write_text("resumed")
    with pytest.raises(UserError, match=r"scores of evaluate are of other weights than .*/a has"):
        call(results_table.main, run)
    for path in run.glob("net_*.pth"):
        path.unlink()
    call(results_table.main, run)  # nothing is left to compare with


def test_scores_of_different_features(tmp_path):
    """As of two datasets, whose rows would look like a gain by re-ranking."""
    run = make_run(tmp_path / "a", True, images="one")
    results = json.loads((run / "results.json").read_text())
    results["evaluate_rerank"]["images"] = "another"
    (run / "results.json").write_text(json.dumps(results))
    says = "of evaluate and evaluate_rerank are of different features; run evaluate.py and"
    with pytest.raises(UserError, match=says):
        call(results_table.main, run)
