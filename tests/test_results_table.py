"""results_table.py: the rows of runs, with the intervals that their scores have."""

import json

import pytest
from conftest import call

import results_table
from reid.errors import UserError

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
