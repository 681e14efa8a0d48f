"""Test trained runs on several datasets: a table of how each does on each.

    python cross_test.py --runs market duke \
        --data_dirs data/Market-1501-v15.09.15/pytorch data/DukeMTMC-reID/pytorch

Rows are runs, columns are datasets; scores of a run on the dataset that it was trained on are bold
(the images decide, not where they lie).
A second table tells how far other runs are from those, on the same test images. Features stay in
model/<run>/cross_<dataset>.mat and are taken from there as long as neither the run nor the images
change, so that after a stop the same command goes on.
Writes model/<name>/table.md, table.json and matrix.jpg.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

import test as extraction
from re_ranking import rerank
from reid import report
from reid.checkpoint import Run, load_trained
from reid.curves import draw_matrix
from reid.dataset import (
    check_prepared,
    eval_fingerprint,
    eval_images,
    prepared_folders,
    prepared_hash,
)
from reid.device import GPUMemoryError, choose_device, dtype_for, dtype_name
from reid.errors import UserError, run
from reid.features import made_by
from reid.files import write_json, write_text
from reid.intervals import Interval
from reid.mat import load_mat
from reid.metrics import Scores, evaluate, similarity_blocks
from reid.options import RANKINGS, SCORES, Parser, add_device_options, at_least, run_name
from reid.provenance import command_line, provenance

MODEL_DIR = "model"
NAME = "cross_test"


class Cell(NamedTuple):
    """A run's results on a dataset.

    own: whether it was trained there. scores: of each ranking, for the queries of `identities`;
    intervals: of Rank@1 and mAP, over other people.
    """

    own: bool
    scores: dict[str, Scores]
    intervals: dict[str, list[Interval]]
    identities: np.ndarray


def get_parser():
    parser = Parser("Test trained runs on several datasets; make one table of it.")
    parser.add_argument(
        "--name", type=run_name, default=NAME, help="the table's name: its folder in --model_dir"
    )
    parser.add_argument("--model_dir", default=MODEL_DIR, help="folder that holds the runs")
    parser.add_argument(
        "--runs", type=run_name, nargs="+", required=True, help="names of trained runs"
    )
    parser.add_argument(
        "--data_dirs",
        nargs="+",
        required=True,
        metavar="[NAME=]FOLDER",
        help="`pytorch` folders that prepare.py made; NAME stands in the table (default: the "
        "name of the folder that holds it)",
    )
    parser.add_argument(
        "--which_epoch", default="last", help="last, best, or the number of a saved epoch"
    )
    parser.add_argument("--batchsize", type=at_least(1), default=64, help="images in a batch")
    add_device_options(parser, torchrun=False)
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    runs = {name: Run(Path(args.model_dir) / name) for name in args.runs}
    made = {
        name: made_by(load_trained(one.path, args.which_epoch), (1.0,))
        for name, one in runs.items()
    }
    datasets = named_folders(args.data_dirs)
    for folder in datasets.values():
        check_prepared(folder)
    folder = Path(args.model_dir) / args.name
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is no folder; take another --name")
    cells = {
        (name, dataset): test_run(args, one, made[name], dataset, data_dir)
        for name, one in runs.items()
        for dataset, data_dir in datasets.items()
    }
    lines = "\n".join([*table_lines(cells), ""])
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "table.md", lines)
    write_json(folder / "table.json", {"cells": as_dicts(cells, datasets)} | provenance())
    draw(cells, folder / "matrix.jpg")
    print(f"\n{lines}\n{folder}: table.md, table.json, matrix.jpg")


def named_folders(words):
    """Return {name: folder} of --data_dirs."""
    folders = {}
    for word in words:
        name, equals, text = ("", "", "") if Path(word).is_dir() else word.partition("=")
        if equals and not text:
            raise UserError(f"--data_dirs {word}: needs a name and a folder; write {word}FOLDER")
        folder = Path(text if equals else word)
        if not equals:
            whole = folder.resolve()
            name = whole.parent.name if whole.name == "pytorch" else whole.name
        if not name or "/" in name or name in folders:
            raise UserError(f"--data_dirs {word}: needs a name of its own; write NAME={folder}")
        folders[name] = folder
    return folders


def test_run(args, one, made, dataset, folder):
    """Return the Cell of a run and a dataset; extract the features where there are none.

    made: what `made_by` says of the run's network.
    """
    mat = one.file(f"cross_{dataset}.mat")
    sets = load_mat(mat) if mat.exists() else None
    wanted = None
    if args.precision != "auto":  # which takes features of either arithmetic
        wanted = dtype_name(dtype_for(choose_device(args.gpu_ids)[0], args.precision))
    if sets is None or not is_current(sets.source, made, folder, wanted):
        flags = {"model_dir": one.path.parent, "name": one.path.name, "data_dir": folder}
        flags |= {"mat": mat, "which_epoch": args.which_epoch, "batchsize": args.batchsize}
        flags |= {"precision": args.precision, "workers": args.workers, "gpu_ids": args.gpu_ids}
        extraction.main([f"--{name}={value}" for name, value in flags.items() if value is not None])
        sets = load_mat(mat)
    query, gallery = sets.query, sets.gallery
    scores = scores_by_ranking(query, gallery, choose_device(args.gpu_ids)[0])
    own = trained_on(one.opts(), folder)
    intervals = {
        ranking: report.score_intervals(some, query.identities) for ranking, some in scores.items()
    }
    return Cell(own, scores, intervals, query.identities)


def scores_by_ranking(query, gallery, device):
    """Return the Scores of each ranking. device: to re-rank on, where it is an NVIDIA GPU."""
    device = device if device.type == "cuda" else "cpu"
    try:
        distances = rerank(query.features, gallery.features, device=device)
        blocks = similarity_blocks(query, gallery), (-distance for distance in distances)
        scores = [evaluate(some, query, gallery) for some in blocks]
    except GPUMemoryError as error:
        raise UserError(
            "the GPU's memory is full in re-ranking; take the CPU with --gpu_ids -1"
        ) from error
    return dict(zip(RANKINGS, scores, strict=True))


def trained_on(opts: dict, folder: Path) -> bool:
    """Tell whether a run was trained on the images that a dataset has now, wherever they lie.

    opts: the run's opts.json. That of an older version knows paths alone, and these decide then.
    """
    if known := opts.get("train_all_sha256"):
        return prepared_hash(folder) in known
    paths = prepared_folders(opts.get("options", {}).get("data_dir", []))
    return folder.resolve() in [path.resolve() for path in paths]


def is_current(source, made, folder, arithmetic):
    """Tell whether features are those of a network and of a dataset's images as they are now.

    arithmetic: the one that they must have been computed in, None for any.
    """
    if source is None or (arithmetic and source.get("arithmetic") != arithmetic):
        return False
    splits = {name: eval_images(folder / name) for name in ("query", "gallery")}
    return source.get("images") == eval_fingerprint(splits) and source.items() >= made.items()


def table_lines(cells: dict[tuple[str, str], Cell]) -> Iterator[str]:
    """Yield the tables in Markdown. cells: by names of run and dataset."""
    runs, datasets = (list(dict.fromkeys(names)) for names in zip(*cells, strict=True))
    yield "| run | " + " | ".join(["", *datasets]) + " |"
    yield "|---|---|" + "---:|" * len(datasets)
    for ranking in RANKINGS:
        for name in runs:
            texts = [scores_text(cells[name, dataset], ranking) for dataset in datasets]
            yield f"| {name} | {ranking} | {' | '.join(texts)} |"
    yield ""
    yield "Rank@1 / mAP in %, with 95 % intervals over other people to test on; bold: of the run"
    yield f"that was trained there. Made by `{command_line()}`."
    if not any(cell.own for cell in cells.values()):
        yield "No run was trained on one of these datasets: no differences to such a run."
        return
    rows = []
    for ranking in RANKINGS:
        for name in runs:
            texts = [difference_text(cells, name, dataset, ranking) for dataset in datasets]
            if any(texts):
                rows.append(f"| {name} | {ranking} | {' | '.join(texts)} |")
    if not rows:  # each run was trained on all that it is compared on
        return
    yield ""
    yield "| run | against the run trained there | " + " | ".join(datasets) + " |"
    yield "|---|---|" + "---:|" * len(datasets)
    yield from rows
    yield ""
    yield "Differences of Rank@1 / mAP in points, on the same queries."


def scores_text(cell, ranking):
    """Return the scores of a Cell as the table has them."""
    bold = "**" if cell.own else ""
    return " / ".join(
        f"{bold}{100 * one.value:.2f}{bold}{reach_text(one)}" for one in cell.intervals[ranking]
    )


def difference_text(cells, name, dataset, ranking):
    """Return a run's distance to the one that was trained on a dataset; "" where it has none."""
    own = own_run(cells, dataset)
    if own in (None, name):
        return ""
    differences = difference(cells[name, dataset], cells[own, dataset], ranking)
    return " / ".join(f"{100 * one.value:+.2f}{reach_text(one, '+')}" for one in differences)


def own_run(cells, dataset):
    """Return the name of the first run that was trained on a dataset; None without one."""
    names = (name for (name, other), cell in cells.items() if other == dataset and cell.own)
    return next(names, None)


def difference(one, other, ranking):
    """Return the Intervals of a Cell's Rank@1 and mAP less those of another."""
    return report.score_differences(one.scores[ranking], other.scores[ranking], one.identities)


def reach_text(one, sign=""):
    """Return the text of an Interval's ends; "" where there are none."""
    return f" ({100 * one.low:{sign}.1f} to {100 * one.high:{sign}.1f})" if one.known else ""


def as_dicts(cells, datasets):
    """Return the Cells as table.json holds them."""
    found = []
    for (name, dataset), cell in cells.items():
        row = {"run": name, "dataset": dataset, "data_dir": str(datasets[dataset])}
        row |= {"own": cell.own, "against": own_run(cells, dataset)}
        for ranking, scores in cell.scores.items():
            row[ranking] = report.summary(scores, cell.identities, cell.intervals[ranking])
            if row["against"] not in (None, name):
                differences = difference(cell, cells[row["against"], dataset], ranking)
                for score, one in zip(SCORES, differences, strict=True):
                    row[ranking][f"{score}_difference"] = one.value
                    row[ranking][f"{score}_difference_interval"] = one.ends()
        found.append(row)
    return found


def draw(cells, path):
    """Draw the plain scores as a heat table."""
    runs, datasets = (list(dict.fromkeys(names)) for names in zip(*cells, strict=True))
    panels = {}
    for number, title in enumerate(("Rank@1, %", "mAP, %")):
        panels[title] = [
            [100 * cells[name, dataset].intervals["plain"][number].value for dataset in datasets]
            for name in runs
        ]
    own = [[cells[name, dataset].own for dataset in datasets] for name in runs]
    draw_matrix(panels, runs, datasets, own, path)


if __name__ == "__main__":
    run(main)
