"""Print a Markdown table of trained runs: model, number of generated images, Rank@1/5/10 and mAP.

A run has two rows, plain and re-ranked; Rank@1 and mAP have their 95 % intervals over other people.

    python results_table.py model/ft_ResNet50 model/ft_ResNet50_lsro

Each number comes from the run's results.json, which evaluate.py and evaluate_rerank.py fill when
called with --json model/<name>/results.json.
"""

from collections.abc import Iterable
from itertools import product
from pathlib import Path

from reid.dataset import content_hash
from reid.errors import UserError, run
from reid.files import demand, is_a, read_json, read_results
from reid.options import NETWORKS, RANKINGS, Parser, backbone_of

COLUMNS = ("rank1", "rank5", "rank10", "mAP")
ADVICE = "train this run first"
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
    """Yield the table's rows of a run folder: plain, then re-ranked."""
    opts, results = read_run(folder, RANKINGS.values(), COLUMNS)
    demand(opts, folder / "opts.json", ADVICE, options=dict, generated=int)
    backbone = backbone_of(opts["options"])
    demand({"backbone": backbone}, folder / "opts.json", ADVICE, backbone=str)
    model = NETWORKS.get(backbone, backbone)
    for ranking, section in RANKINGS.items():
        scores = [cell(results[section], column) for column in COLUMNS]
        cells = [folder.name, model, str(opts["generated"]), ranking, *scores]
        yield f"| {' | '.join(cells)} |"


def cell(scores, column):
    """Return a score in %, with its interval where it has one."""
    value = f"{100 * scores[column]:.2f}"
    bounds = scores.get(f"{column}_interval")
    return f"{value} ({100 * bounds[0]:.1f}–{100 * bounds[1]:.1f})" if bounds else value


def read_run(folder: Path, sections: Iterable[str], scores: Iterable[str]) -> tuple[dict, dict]:
    """Read a run folder's opts.json and results.json: two dicts.

    sections: names of the sections that results.json must have; scores: keys that each must have.
    Raises UserError where the files are not as train_*.py and evaluate*.py write them, or scores
    are not of this run's weights.
    """
    opts_path, results_path = folder / "opts.json", folder / "results.json"
    opts = read_json(opts_path, ADVICE, options=dict)
    results = read_results(results_path)
    for section in sections:
        advice = f"run {section}.py with --json {results_path}"
        demand(results, results_path, advice, **{section: dict})
        demand(results[section], results_path, advice, **dict.fromkeys(scores, float))
        for score in scores:
            check_interval(results[section].get(f"{score}_interval"), results_path, advice)
        check_weights(folder, section, results[section].get("made_by"))
    first, *others = sections
    for other, fact in product(others, ("made_by", "images")):
        one, another = results[first].get(fact), results[other].get(fact)
        if one and another and one != another:  # older versions don't say
            raise UserError(
                f"{results_path}: the scores of {first} and {other} are of different features; run "
                f"{first}.py and {other}.py on the same file of features"
            )
    return opts, results


def check_weights(folder, section, made_by):
    """Raise UserError where scores are of weights that the run folder no longer has, or never had.

    made_by: the section's; None where an older version or another code's features were scored. A
    folder whose weights were deleted passes.
    """
    weights = sorted(folder.glob("net_*.pth"), reverse=True)  # the last first: mostly its own
    wanted = made_by.get("weights_sha256") if isinstance(made_by, dict) else None
    if wanted and weights and not any(content_hash(path) == wanted for path in weights):
        raise UserError(
            f"{folder / 'results.json'}: the scores of {section} are of other weights than "
            f"{folder} has; run test.py, evaluate.py and evaluate_rerank.py again"
        )


def check_interval(bounds, source, advice):
    """Raise UserError where this is neither None nor two numbers."""
    is_pair = isinstance(bounds, list) and len(bounds) == 2 and all(is_a(b, float) for b in bounds)
    if bounds is not None and not is_pair:
        raise UserError(f"{source}: has an interval that is not two numbers; {advice}")


if __name__ == "__main__":
    run(main)
