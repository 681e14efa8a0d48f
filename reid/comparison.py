"""The cells of a grid of trainings, compared by seed: the rows of ablation.py's table."""

import statistics
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from reid.intervals import adjusted, mean_interval, paired_p, seeds_needed, spread_interval
from reid.options import NETWORKS, RANKINGS, SCORES
from reid.provenance import command_line

WANTED = 0.01  # the difference that --power plans for: a point


class Cell(NamedTuple):
    """A training of the grid. The baseline has no unlabelled images: `images`, `rule` are empty.

    num_ids: identities to train on, None for all. images: the name of a folder of unlabelled
    images, "" for the grid's only one. number: how many of these, as --num_generated takes it.
    """

    backbone: str
    num_ids: int | None
    images: str
    rule: str
    number: int | str
    seed: int

    @property
    def kind(self) -> str:
        """Return the name that cells of all seeds have in common."""
        ids = "" if self.num_ids is None else f"{self.num_ids}ids"
        words = [self.backbone, ids, self.images, self.rule, self.number]
        return "_".join(str(word) for word in words if word != "")

    @property
    def name(self) -> str:
        """Return the name of the cell's run folder."""
        return f"{self.kind}_seed{self.seed}"

    @property
    def baseline(self) -> "Cell":
        """Return the cell of the same backbone, identities and seed without unlabelled images."""
        return self._replace(images="", rule="", number=0)


def cell_scores(cell: Cell, results: dict) -> dict:
    """Return a cell and the scores of its results.json as a dict."""
    scores = {
        ranking: {score: results[section][score] for score in SCORES}
        for ranking, section in RANKINGS.items()
    }
    return {"name": cell.name, **cell._asdict(), **scores}


def table_rows(scores: dict[Cell, dict]) -> list[dict]:
    """Return the table's rows as dicts: means and differences to the baseline.

    scores: the results.json of each Cell. Scores are fractions, as there; intervals [low, high] and
    p-values are None with one seed. p-values are adjusted for their number in the whole table.
    """
    kinds = {}
    for cell in scores:
        kinds.setdefault(cell[:-1], []).append(cell)
    rows = [
        row_of(cells, scores, section) | {"ranking": ranking}
        for ranking, section in RANKINGS.items()
        for cells in kinds.values()
    ]
    compared = [(row, f"{score}_p") for row in rows if row["rule"] for score in SCORES]
    values = adjusted([row[name] for row, name in compared])
    for (row, name), value in zip(compared, values, strict=True):
        row[name] = value
    return rows


def row_of(cells, scores, section):
    """Return the row of the Cells that differ only in their seed."""
    first = cells[0]
    row = {name: value for name, value in first._asdict().items() if name != "seed"}
    row["seeds"] = [cell.seed for cell in cells]
    for score in SCORES:
        own = {cell.seed: scores[cell][section][score] for cell in cells}
        row[score], row[f"{score}_interval"] = mean_interval(own.values())
        if first.rule:
            zero = {cell.seed: scores[cell.baseline][section][score] for cell in cells}
            # Runs of one seed start from the same weights and see the real images in the same
            # order: what they have in common cancels.
            row[f"{score}_pairs"] = [own[seed] - zero[seed] for seed in own]
            difference, bounds = mean_interval(row[f"{score}_pairs"])
            row[f"{score}_difference"], row[f"{score}_difference_interval"] = difference, bounds
            row[f"{score}_p"] = paired_p(row[f"{score}_pairs"])
    return row


def table_lines(rows: list[dict]) -> Iterator[str]:
    """Yield the table's lines in Markdown, in points; ± is half of a 95 % interval."""
    factors = {
        "identities": [row["num_ids"] or "all" for row in rows],
        "images": [row["images"] or "–" for row in rows],
    }
    factors = {name: values for name, values in factors.items() if set(values) - {"all", "–"}}
    scores = ["Rank@1", "to baseline", "p", "mAP", "to baseline", "p"]
    names = ["model", *factors, "rule", "unlabelled", "", *scores]
    yield f"| {' | '.join(names)} |"
    yield "|" + "|".join("---" for _ in names[: -len(scores)]) + "|---:" * len(scores) + "|"
    for number, row in enumerate(rows):
        count = row["number"]
        cells = [
            NETWORKS.get(row["backbone"], row["backbone"]),
            *(str(values[number]) for values in factors.values()),
            row["rule"] or "–",
            count if isinstance(count, str) else f"{count:,}",
            row["ranking"],
        ]
        for score in SCORES:
            cells += [points(row, score), points(row, f"{score}_difference", "+")]
            cells.append(rounded_p(row.get(f"{score}_p")))
        yield f"| {' | '.join(cells)} |"


def power_lines(rows: list[dict]) -> Iterator[str]:
    """Yield a table of how many seeds would show a difference of a point in mAP or Rank@1."""
    yield "| comparison | | deviation of a pair, points | seeds for 1 point |"
    yield "|---|---|---:|---:|"
    for row in rows:
        if not row["rule"] or row["ranking"] != "plain":
            continue
        kind = Cell(*(row[name] for name in Cell._fields[:-1]), seed=None).kind
        for score, title in SCORES.items():
            spread = statistics.stdev(row[f"{score}_pairs"])
            ends = spread_interval(spread, len(row["seeds"]))
            needed, low, high = (
                seeds_needed(one, WANTED) or "over 1,000" for one in (spread, *ends)
            )
            yield f"| {kind} | {title} | {100 * spread:.2f} | {needed} ({low} to {high}) |"
    yield ""
    yield (
        "Seeds that find a true difference of 1 point in 80 % of studies with a single comparison "
        "(adjusted for many, it takes more); in brackets for the 95 % interval of the deviation, "
        "which few pairs hardly tell."
    )


def points(row, name, sign=""):
    """Return a row's value and half of its interval, in points; "" where it has no such value."""
    if name not in row:
        return ""
    text = f"{100 * row[name]:{sign}.2f}"
    if row[f"{name}_interval"]:
        low, high = row[f"{name}_interval"]
        text += f" ± {50 * (high - low):.2f}"
    return text


def rounded_p(value):
    """Return a p-value as a table has it; "" for None."""
    if value is None:
        return ""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def table_notes(seeds: list[int], opts: Sequence[dict], results: Sequence[dict]) -> str:
    """Return the sentences under the table: what it says, what made it.

    opts, results: of each cell, as its opts.json and results.json hold them.
    """
    names = ", ".join(map(str, seeds))
    if len(seeds) == 1:
        text = f"In %, of one training seed, {names}: no intervals."
    else:
        text = (
            f"In %, means over training seeds {names}, ± 95 % intervals (Student's t); differences "
            "are paired by seed, p by Student's t, adjusted for all comparisons of the table "
            "(Holm). "
            "The intervals are over trainings, not over people to test on."
        )
    parts = [part for run in opts for part in (run, *run.get("resumed", []))]
    commits = " and ".join(dict.fromkeys(map(commit, parts)))
    machines = " and ".join(dict.fromkeys(map(hardware, parts)))
    tests = " and ".join(dict.fromkeys(map(testing, results)))
    return (
        f"{text} Made by `{command_line()}`; trained at {commits} on {machines}; tested by {tests}."
    )


def commit(opts):
    """Name the commit of the code that trained a run."""
    git = opts.get("git")
    if not isinstance(git, dict) or not isinstance(git.get("commit"), str):
        return "an unknown commit"
    return f"commit {git['commit'][:7]}{' (with changes)' if git.get('dirty') else ''}"


def testing(results):
    """Name the layer and the image size that a run was tested by."""
    made_by = results[RANKINGS["plain"]].get("made_by")
    if not isinstance(made_by, dict):  # scored by an older version
        return "an unknown layer and size"
    return f"layer {made_by.get('layer')} at {made_by.get('size')}"


def hardware(opts):
    """Name the hardware that a run was trained on, and its precision."""
    name = opts.get("device_name") or opts.get("device")
    return f"{opts.get('processes')} x {name} in {opts.get('arithmetic')}"
