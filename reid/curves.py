"""`train.jpg`: what a run's loss and error did, epoch by epoch."""

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
