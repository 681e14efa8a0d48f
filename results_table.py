"""One Markdown table of trained runs: model, generated images, Rank@1/5/10, mAP, plain, re-ranked.

Rank@1 and mAP come with their 95 % intervals over other test identities.

    python results_table.py model/ft_ResNet50 model/ft_ResNet50_lsro

Each number comes from the run's results.json, which evaluate.py and evaluate_rerank.py fill when
called with --json model/<name>/results.json.
"""

import json
from pathlib import Path

from reid.errors import UserError, run
from reid.options import Parser

COLUMNS = ("rank1", "rank5", "rank10", "mAP")
HEADER = "| run | model | generated | | Rank@1 (95 %) | Rank@5 | Rank@10 | mAP (95 %) |"


def get_parser():
    parser = Parser("Print a Markdown table of trained and evaluated runs.")
    parser.add_argument("runs", nargs="+", help="run folders, model/<name>")
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    lines = [row for folder in args.runs for row in rows(Path(folder))]
    print("\n".join([HEADER, "|---|---|---:|---|---:|---:|---:|---:|", *lines]))


def rows(folder):
    """The table's rows of one run folder: plain, and re-ranked."""
    opts, results = (read_json(folder / name) for name in ("opts.json", "results.json"))
    model = "DenseNet-121" if opts["options"]["use_dense"] else "ResNet-50"
    for section, ranking in [("evaluate", "plain"), ("evaluate_rerank", "re-ranked")]:
        if section not in results:
            raise UserError(
                f"{folder / 'results.json'}: has no scores of {section}.py; "
                f"run it with --json {folder / 'results.json'}"
            )
        scores = [cell(results[section], column) for column in COLUMNS]
        cells = [folder.name, model, str(opts["generated"]), ranking, *scores]
        yield f"| {' | '.join(cells)} |"


def cell(scores, column):
    """A score in %, with its interval where it has one."""
    value = f"{100 * scores[column]:.2f}"
    bounds = scores.get(f"{column}_interval")
    return f"{value} ({100 * bounds[0]:.1f}–{100 * bounds[1]:.1f})" if bounds else value


def read_json(path):
    """The content of a run folder's JSON file."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; train and evaluate this run first") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error


if __name__ == "__main__":
    run(main)
