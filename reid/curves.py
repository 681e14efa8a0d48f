"""Draw curves: a run's loss and error, the CMC curve of its scores, the scores of an ablation."""

from pathlib import Path

from matplotlib.figure import Figure

from reid.files import write_picture


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


def draw_ablation(rows: list[dict], path: str | Path) -> None:
    """Draw mAP and Rank@1 against the number of generated images into a JPEG.

    rows: dicts, rows of ablation.py's table, their scores fractions. A rule with several numbers is
    a line from 0 images on with its interval as a band, with one number a point with an error bar.
    """
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    lines = {}
    for row in rows:
        lines.setdefault((row["backbone"], row["rule"]), []).append(row)
    zeros = {row["backbone"]: row for row in rows if row["number"] == 0}
    numbers = sorted({row["number"] for row in rows})
    for column, (score, title) in enumerate([("mAP", "mAP"), ("rank1", "Rank@1")], start=1):
        axes = figure.add_subplot(1, 2, column, xlabel="generated images", ylabel=f"{title}, %")
        for zero in zeros.values():
            axes.axhline(100 * zero[score], color="grey", linestyle=":", linewidth=1)
            draw_point(axes, zero, 0, score, color="grey")
        shift = numbers[-1] / 80  # lest points at one number hide one another
        for (backbone, rule), own in lines.items():
            if not rule:
                continue
            name = f"{backbone} {rule}" if len(zeros) > 1 else rule
            if len(own) > 1:
                draw_line(axes, [zeros[backbone], *own], score, name)
            else:
                draw_point(axes, own[0], own[0]["number"] + shift, score, label=name)
                shift += numbers[-1] / 80
        axes.set_xticks(numbers, [f"{number:,}" for number in numbers])
        axes.grid(alpha=0.3)
    seeds = len(rows[0]["seeds"])
    title = f"band: 95 % interval over {seeds} training seeds" if seeds > 1 else "one training seed"
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=6, title=title)
    write_picture(path, lambda file: figure.savefig(file, format="jpg", dpi=120))


def draw_line(axes, rows, score, name):
    """Draw a line through rows of the table, and a band where they have intervals."""
    numbers = [row["number"] for row in rows]
    (line,) = axes.plot(numbers, [100 * row[score] for row in rows], "o-", label=name, markersize=4)
    if rows[0][f"{score}_interval"]:
        low, high = zip(*(row[f"{score}_interval"] for row in rows), strict=True)
        bounds = [100 * value for value in low], [100 * value for value in high]
        axes.fill_between(numbers, *bounds, color=line.get_color(), alpha=0.15, linewidth=0)


def draw_point(axes, row, at, score, **style):
    """Draw a row of the table as a point, and an error bar where it has an interval."""
    bounds = row[f"{score}_interval"]
    reach = 50 * (bounds[1] - bounds[0]) if bounds else None
    axes.errorbar(at, 100 * row[score], reach, fmt="s", markersize=4, capsize=3, **style)
