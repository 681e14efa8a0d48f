"""Draw with matplotlib: a run's loss and error, a CMC curve, an ablation, maps and heat tables."""

import os
import textwrap
from pathlib import Path

import numpy as np

os.environ["MPLBACKEND"] = "agg"  # a notebook's may be of a package that is not installed here
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from reid.errors import printable
from reid.files import write_picture

MARKERS = "os^vDP*X<>phd8H"  # of cameras on a map; more of them share the last


def draw_curves(history: list[dict], path: str | Path) -> None:
    """Draw the loss and top-1 error of `history` (log.jsonl's lines as dicts) into a JPEG."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    epochs = [line["epoch"] for line in history]
    for number, (key, title) in enumerate([("loss", "loss"), ("top1err", "top-1 error")], start=1):
        axes = figure.add_subplot(1, 2, number, title=title, xlabel="epoch")
        for split, colour in [("train", "tab:blue"), ("val", "tab:red")]:
            if f"{split}_{key}" in history[0]:
                values = [line[f"{split}_{key}"] for line in history]
                axes.plot(epochs, values, "o-", color=colour, label=split, markersize=3)
        axes.grid(alpha=0.3)
        axes.legend()
        # Validation loss spikes before batch norm's averages settle: keep the rest visible.
        highest = max(line[f"train_{key}"] for line in history)
        axes.set_ylim(0, 1.3 * highest + 1e-6)
        axes.xaxis.get_major_locator().set_params(integer=True)
    write_picture(path, lambda file: figure.savefig(file, format="jpg", dpi=120))


def draw_cmc(curves: list[tuple], path: str | Path) -> None:
    """Draw CMC curves into a JPEG: each a name and arrays of value, low, high at ranks 1, 2, ..."""
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.add_subplot(xlabel="rank k", ylabel="queries with a good image by rank k, %")
    for name, value, low, high in curves:
        ranks = range(1, len(value) + 1)
        (line,) = axes.plot(ranks, 100 * value, label=f"{name}: Rank@1 {100 * value[0]:.2f} %")
        axes.fill_between(ranks, 100 * low, 100 * high, color=line.get_color(), alpha=0.2)
    axes.set_xlim(1, len(value))
    axes.set_xticks([1, *range(5, len(value) + 1, 5)])
    axes.set_ylim(top=100)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", title="band: 95 % interval over other people")
    write_picture(path, lambda file: figure.savefig(file, format="jpg", dpi=120))


def draw_map(
    places: np.ndarray, identities: np.ndarray, cameras: np.ndarray, title: str, path: str | Path
) -> None:
    """Draw images at `places` [N, 2] into a JPEG: a colour for each identity, a mark a camera."""
    figure = Figure(figsize=(8, 7.2), layout="constrained")
    axes = figure.add_subplot(xticks=[], yticks=[])
    figure.suptitle(textwrap.fill(title, 90), fontsize="medium")
    colours = colormaps["tab20"](np.unique(identities, return_inverse=True)[1] % 20)
    legend = []
    for number, camera in enumerate(np.unique(cameras)):
        mark, of_camera = MARKERS[min(number, len(MARKERS) - 1)], cameras == camera
        axes.scatter(*places[of_camera].T, c=colours[of_camera], marker=mark, s=36, linewidths=0)
        legend.append(Line2D([], [], color="grey", marker=mark, linestyle="", label=str(camera)))
    axes.legend(handles=legend, title="camera", loc="center left", bbox_to_anchor=(1, 0.5))
    write_picture(path, lambda file: figure.savefig(file, format="jpg", dpi=120))


def draw_matrix(
    panels: dict[str, list[list[float]]],
    rows: list[str],
    columns: list[str],
    framed: list[list[bool]],
    path: str | Path,
) -> None:
    """Draw tables of numbers from 0 to 100 side by side into a JPEG, the darker the higher.

    panels: numbers [rows, columns] by the panel's title. framed: which cells have a frame.
    """
    size = 2.4 + 1.3 * len(columns), 1.4 + 0.6 * len(rows)
    figure = Figure(figsize=(size[0] * len(panels), size[1]), layout="constrained")
    for number, (title, values) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), number, title=title, xlabel="tested on")
        axes.imshow(values, cmap="Blues", vmin=0, vmax=100, aspect="auto")
        axes.set_xticks(range(len(columns)), map(printable, columns))
        axes.set_yticks(range(len(rows)), map(printable, rows) if number == 1 else [""] * len(rows))
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                colour = "white" if value > 60 else "black"
                axes.text(column, row, f"{value:.1f}", ha="center", va="center", color=colour)
                if framed[row][column]:
                    corner = column - 0.47, row - 0.47
                    axes.add_patch(Rectangle(corner, 0.94, 0.94, fill=False, color="tab:orange"))
    figure.suptitle("framed: trained there", fontsize="medium")
    write_picture(path, lambda file: figure.savefig(file, format="jpg", dpi=120))


def draw_ablation(rows: list[dict], path: str | Path) -> None:
    """Draw what unlabelled images change, seed by seed, into a JPEG.

    rows: dicts, rows of ablation.py's table for one ranking, their scores fractions. Each
    comparison is a line: a dot for the difference of each seed, their mean and its interval.
    """
    compared = [row for row in rows if row["rule"]]
    figure = Figure(figsize=(10, 1.6 + 0.42 * len(compared)), layout="constrained")
    places = range(len(compared), 0, -1)  # the first on top
    for column, (score, title) in enumerate([("mAP", "mAP"), ("rank1", "Rank@1")], start=1):
        axes = figure.add_subplot(1, 2, column, xlabel=f"{title} against the baseline, points")
        axes.axvline(0, color="grey", linewidth=1)
        for place, row in zip(places, compared, strict=True):
            pairs = [100 * pair for pair in row[f"{score}_pairs"]]
            axes.plot(pairs, [place] * len(pairs), "o", color="tab:blue", alpha=0.4, markersize=5)
            low, high = row[f"{score}_difference_interval"] or [row[f"{score}_difference"]] * 2
            mean = 100 * row[f"{score}_difference"]
            reach = [[mean - 100 * low], [100 * high - mean]]
            axes.errorbar(mean, place, xerr=reach, fmt="D", color="black", capsize=4, markersize=5)
        names = [row_name(row, rows) for row in compared] if column == 1 else [""] * len(compared)
        axes.set_yticks(places, names)
        axes.set_ylim(0.4, len(compared) + 0.6)
        axes.grid(axis="x", alpha=0.3)
    seeds = len(rows[0]["seeds"])
    what = "dot: two trainings of one seed; black: mean and 95 % interval"
    figure.suptitle(what if seeds > 1 else "one training seed", fontsize="medium")
    write_picture(path, lambda file: figure.savefig(file, format="jpg", dpi=120))


def row_name(row, rows):
    """Name a comparison by what tells it from others in the table."""
    words = [row["rule"], row["images"]]
    words.append(row["number"] if isinstance(row["number"], str) else f"{row['number']:,}")
    if len({other["num_ids"] for other in rows}) > 1:
        words.append(f"{row['num_ids'] or 'all'} identities")
    if len({other["backbone"] for other in rows}) > 1:
        words.append(row["backbone"])
    return ", ".join(word for word in words if word)
