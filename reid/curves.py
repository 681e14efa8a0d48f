"""Curves: `train.jpg`, what a run's loss and error did, and the CMC curve of its scores."""

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from reid.files import replacing


def draw_curves(history, path):
    """Draw the loss and top-1 error of `history` (log.jsonl's lines as dicts) into a JPEG."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    epochs = [line["epoch"] for line in history]
    for number, (key, title) in enumerate([("loss", "loss"), ("top1err", "top-1 error")], start=1):
        axes = figure.add_subplot(1, 2, number, title=title, xlabel="epoch")
        for split, colour in [("train", "tab:blue"), ("val", "tab:red")]:
            if f"{split}_{key}" in history[0]:
                values = [line[f"{split}_{key}"] for line in history]
                axes.plot(epochs, values, "o-", color=colour, label=split, markersize=3)
        axes.grid(alpha=0.3)
        axes.legend()
        # Validation can spike before batch norm's averages settle; that must not flatten the rest.
        highest = max(line[f"train_{key}"] for line in history)
        axes.set_ylim(0, 1.3 * highest + 1e-6)
        axes.xaxis.get_major_locator().set_params(integer=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="jpg", dpi=120)


def draw_cmc(curves, path):
    """Draw CMC curves into a JPEG: of each its name and value, low, high at ranks 1, 2, ..."""
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
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
    with replacing(path) as temporary:
        figure.savefig(temporary, format="jpg", dpi=120)
