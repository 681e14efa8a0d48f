"""Train with several numbers of generated images and label rules; tabulate what they change.

    python ablation.py --data_dir data/Market-1501-v15.09.15/pytorch -- --train_all
    python ablation.py --name demo --data_dir data/demo/pytorch --numbers 0 700 1400 \
        --gan_labels lsro all_in_one --backbones densenet121 -- --height 128 --width 64 --epochs 15

Without flags the grid is Table 2 of Zheng et al. (ICCV 2017) with three seeds. A cell is one
training, a run folder model/<name>/<cell>/; flags after -- go to train_lsro.py for every cell. Each
cell is trained, its features are extracted at its last epoch, then scored plain and re-ranked.
Steps that are done are not repeated: after a stop the same command goes on. The pytorch_result.mat
of a cell may be deleted once the cell is scored.
Writes model/<name>/table.md, table.json and ablation.jpg.
"""

import argparse
import shlex
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import NamedTuple

import train_lsro
from reid.checkpoint import FREE_ON_RESUME, Run
from reid.curves import draw_ablation
from reid.dataset import (
    GENERATED_FOLDER,
    fingerprint,
    generated_folder,
    generated_images,
    list_images,
    training_splits,
)
from reid.errors import Interrupted, Terminated, UserError, run
from reid.files import demand, read_results, replacing, write_json, write_text
from reid.intervals import mean_interval, paired_difference
from reid.losses import needs_a_run
from reid.options import NETWORKS, Parser, at_least, run_name, seed
from reid.provenance import ROOT, command_line, provenance
from reid.weights import check_network
from results_table import read_run

DATA_DIR = "data/Market-1501-v15.09.15/pytorch"  # what prepare.py and changeIndex.py made
GEN_DIR = None  # generated images; None: <data_dir>/train_new/gen_0000
MODEL_DIR = "model"
NAME = "table2"
# Table 2 of the paper: LSRO at each number, the other rules at one.
NUMBERS = [0, 12000, 18000, 24000, 30000, 36000]
GAN_LABELS = ["lsro", "all_in_one:24000", "pseudo:24000"]
SEEDS = [0, 1, 2]

# Flags of train_lsro.py that the grid itself sets.
GRID_FLAGS = (
    "--name --model_dir --data_dir --gen_dir --num_generated --seed --backbone --use_dense "
    "--gan_label --label_run --resume"
).split()
# Options that may differ between the cells of a grid; the number of epochs may not.
FREE = FREE_ON_RESUME - {"epochs", "lr"}
PATHS = {"data_dir", "gen_dir", "label_run"}
RANKINGS = {"plain": "evaluate", "re-ranked": "evaluate_rerank"}  # sections of results.json
SCORES = ("rank1", "mAP")


class Cell(NamedTuple):
    """A training of the grid. Without generated images no label rule applies: `rule` is empty."""

    backbone: str
    rule: str
    number: int
    seed: int

    @property
    def name(self) -> str:
        """Return the name of the cell's run folder."""
        words = [self.backbone, self.rule, self.number, f"seed{self.seed}"]
        return "_".join(str(word) for word in words if word != "")

    @property
    def baseline(self) -> "Cell":
        """Return the cell of the same backbone and seed without generated images."""
        return self._replace(rule="", number=0)


def get_parser():
    parser = Parser("Train a grid of networks with generated images; make one table of it.")
    parser.add_argument(
        "--name", type=run_name, default=NAME, help="the grid's name: its folder in --model_dir"
    )
    parser.add_argument("--model_dir", default=MODEL_DIR, help="folder that holds the runs")
    parser.add_argument(
        "--data_dir", default=DATA_DIR, help="the `pytorch` folder that prepare.py made"
    )
    parser.add_argument(
        "--gen_dir",
        default=GEN_DIR,
        help=f"folder of generated images (default: <data_dir>/train_new/{GENERATED_FOLDER})",
    )
    group = parser.add_argument_group("grid")
    group.add_argument(
        "--numbers",
        type=at_least(0),
        nargs="+",
        default=NUMBERS,
        help="numbers of generated images; 0 is always run, for the differences to it",
    )
    group.add_argument(
        "--gan_labels",
        nargs="+",
        default=GAN_LABELS,
        metavar="RULE[:N,N]",
        help="label rules of train_lsro.py; with :N,N a rule is run at its own numbers",
    )
    group.add_argument("--seeds", type=seed, nargs="+", default=SEEDS, help="training seeds")
    group.add_argument(
        "--backbones",
        nargs="+",
        default=["resnet50"],
        help="networks, see train_lsro.py --backbone",
    )
    group.add_argument(
        "--nproc_per_node",
        type=at_least(1),
        default=1,
        help="processes, a GPU each, that torchrun starts for training and extraction",
    )
    parser.add_argument(
        "training_flags",
        nargs="*",
        metavar="-- FLAGS",
        help="flags of train_lsro.py for every cell, after --",
    )
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    folder = Path(args.model_dir) / args.name
    cells = grid(args)
    options = {cell: training_options(args, cell) for cell in cells}
    missing = [cell for cell in cells if not is_scored(folder / cell.name)]
    free = FREE if missing else FREE - PATHS  # with cells to run, `check_images` compares images
    for cell in cells:
        check_options(folder / cell.name, options[cell], free)
    if missing:
        asked = options[missing[0]]
        network = {name: asked[name] for name in ("neck", "pooling", "last_stride")}
        for backbone in {cell.backbone for cell in missing}:
            check_network(backbone, **network)
        real = check_images(args, folder, cells, options)
        names = "\n  ".join(["to run:", *(cell.name for cell in missing)])
        done = len(cells) - len(missing)
        print(f"{folder}: {len(cells)} cells, {done} of them done; {names}", flush=True)
        run_cells(args, folder, cells, missing, options, real)
    write_table(args, folder, cells)


def grid(args):
    """Return the Cells in the order in which they are run: all of a seed before the next seed."""
    numbers = {}
    for text in args.gan_labels:
        rule, own = label_rule(text)
        numbers[rule] = {*numbers.get(rule, ()), *(own or args.numbers)} - {0}
    if not any(numbers.values()):
        raise UserError("--numbers: nothing to compare; ask for a number of images above 0")
    kinds = [("", 0), *((rule, n) for rule in numbers for n in sorted(numbers[rule]))]
    every = product(dict.fromkeys(args.seeds), dict.fromkeys(args.backbones), kinds)
    return [Cell(backbone, *kind, seed) for seed, backbone, kind in every]


def label_rule(text):
    """Split "pseudo:24000" into a rule and its own numbers, ("pseudo", [24000])."""
    rule, colon, numbers = text.partition(":")
    try:
        return rule, [at_least(0)(number) for number in numbers.split(",")] if colon else []
    except (ValueError, argparse.ArgumentTypeError):
        raise UserError(
            f"--gan_labels {text}: expected a rule, alone or with its own numbers of images, "
            "like lsro or pseudo:12000,24000"
        ) from None


def training_words(args, cell):
    """Return the flags of train_lsro.py for a cell, a list of words."""
    words = ["--name", cell.name, "--model_dir", Path(args.model_dir) / args.name]
    words += ["--data_dir", args.data_dir, *(["--gen_dir", args.gen_dir] if args.gen_dir else [])]
    words += ["--num_generated", cell.number, "--seed", cell.seed, "--backbone", cell.backbone]
    flags = args.training_flags
    if cell.rule:
        words += ["--gan_label", cell.rule]
    else:  # leave out the flags on generated images
        parser = Parser("")
        train_lsro.add_generated_options(parser)
        _, flags = parser.parse_known_args(flags)
    if needs_a_run(cell.rule):
        words += ["--label_run", cell.baseline.name]
    return [*map(str, words), *flags]


def training_options(args, cell):
    """Return train_lsro.py's options for a cell. Raises UserError for flags that it can't take."""
    for word in args.training_flags:
        if word.partition("=")[0] in GRID_FLAGS:
            raise UserError(f"{word} after --: the grid sets it for each cell; leave it out")
    return vars(train_lsro.parse(training_words(args, cell)))


def check_options(folder, options, free):
    """Raise UserError where a cell was trained already, with options other than the free ones."""
    opts = Run(folder).opts()
    if not opts:
        return
    demand(opts, folder / "opts.json", "delete the folder", options=dict)
    for name in sorted(options.keys() - free):
        asked, before = options[name], opts["options"].get(name, options[name])
        if asked != before:
            raise UserError(
                f"{folder}: was trained with --{name} {before}, not {asked}; "
                "repeat its options, or take another --name for the grid"
            )


def is_scored(folder):
    """Tell whether a cell has all results that the table needs."""
    return {"train", *RANKINGS.values()} <= read_results(folder / "results.json").keys()


def check_images(args, folder, cells, options):
    """Return the number of real images to train on.

    Raises UserError where images are missing, or are not those that earlier cells were trained on.
    """
    asked = options[cells[0]]
    real = training_splits(args.data_dir, asked["train_all"], asked["val_ids"]).train
    gen_dir = generated_folder(args)
    largest = max(cell.number for cell in cells)
    count = len(list_images(gen_dir))
    if count < largest:
        raise UserError(
            f"{gen_dir}: {count} images, too few for a cell of {largest}; generate "
            "more, or ask for fewer with --numbers and --gan_labels"
        )
    for cell in cells:
        opts = Run(folder / cell.name).opts()
        if not opts:
            continue
        images = [*real, *generated_images(gen_dir, cell.number, cell.seed)]
        if opts.get("dataset") != fingerprint(images):
            raise UserError(
                f"{folder / cell.name}: was trained on other images than there are now in "
                f"{args.data_dir} and {gen_dir}; take another --name for the grid"
            )
    return len(real)


def run_cells(args, folder, cells, missing, options, real):
    """Run the missing cells; estimate the time left by the number of images to train on."""
    started, done = time.monotonic(), 0
    work = {cell: real + cell.number for cell in missing}
    for cell in missing:
        left = ""
        if done:
            rate = (time.monotonic() - started) / done
            left = f", about {rate * (sum(work.values()) - done) / 60:.0f} min left"
        print(f"\n== cell {cells.index(cell) + 1} of {len(cells)}: {cell.name}{left}", flush=True)
        run_cell(args, folder / cell.name, training_words(args, cell), options[cell])
        done += work[cell]


def run_cell(args, folder, words, options):
    """Train a cell, extract its features and score them, from the first step not done yet on."""
    results, mat = folder / "results.json", folder / "pytorch_result.mat"
    sections = read_results(results)
    if "train" not in sections and Run(folder).has_state():
        words = [*words, "--resume"]
    run = ["--name", folder.name, "--model_dir", folder.parent, "--data_dir", args.data_dir]
    device = ["--precision", options["precision"], "--workers", options["workers"]]
    gpu = [] if options["gpu_ids"] is None else ["--gpu_ids", options["gpu_ids"]]
    many = args.nproc_per_node
    steps = [
        ("train" in sections, many, ["train_lsro.py", *words]),
        (mat.exists(), many, ["test.py", *run, "--mat", mat, *device, *gpu]),
        ("evaluate" in sections, 1, ["evaluate.py", mat, "--json", results]),
        ("evaluate_rerank" in sections, 1, ["evaluate_rerank.py", mat, "--json", results, *gpu]),
    ]
    first = [done for done, _, _ in steps].index(False)
    for _, processes, command in steps[first:]:
        launch(processes, *map(str, command))


def launch(processes, script, *words):
    """Run a script as a process, or as several by torchrun; end this process where it fails."""
    typed, python = ["python"], [sys.executable]
    if processes > 1:
        flags = ["--standalone", "--nproc_per_node", str(processes)]
        typed, python = ["torchrun", *flags], [*python, "-m", "torch.distributed.run", *flags]
    print(f"\n$ {shlex.join([*typed, script, *words])}", flush=True)
    code = wait(subprocess.Popen([*python, str(ROOT / script), *words]))
    if code == 2:
        sys.exit(2)  # the script has said why, in its one line
    if code:
        raise UserError(f"{script} ended with exit code {code}; the same command goes on from here")


def wait(process):
    """Return the exit code of a process. At Ctrl-C and SIGTERM wait until it has saved its work."""
    try:
        code = process.wait()
    except KeyboardInterrupt as stop:
        if isinstance(stop, Terminated):  # Ctrl-C reaches it by itself, this doesn't
            process.terminate()
        process.wait()
        code = 130
    if code == 130:
        raise Interrupted("the grid is stopped; the same command goes on from here")
    return code


def write_table(args, folder, cells):
    """Print the table and write table.md, table.json and ablation.jpg into the grid's folder."""
    runs = [read_run(folder / cell.name, RANKINGS.values(), SCORES) for cell in cells]
    scores = {cell: results for cell, (_, results) in zip(cells, runs, strict=True)}
    rows = table_rows(scores)
    notes = table_notes(rows[0]["seeds"], [opts for opts, _ in runs])
    text = "\n".join([*table_lines(rows), "", notes]) + "\n"
    with replacing(folder / "table.md") as temporary:
        write_text(temporary, text)
    content = {"cells": [cell_scores(cell, scores[cell]) for cell in cells], "rows": rows}
    write_json(folder / "table.json", content | provenance())
    draw_ablation([row for row in rows if row["ranking"] == "plain"], folder / "ablation.jpg")
    print(f"\n{text}\n{folder}: table.md, table.json, ablation.jpg")


def cell_scores(cell, results):
    """Return a cell and the scores of its results.json as a dict."""
    scores = {
        ranking: {score: results[section][score] for score in SCORES}
        for ranking, section in RANKINGS.items()
    }
    return {"name": cell.name, **cell._asdict(), **scores}


def table_rows(scores):
    """Return the table's rows as dicts: means and differences to 0 images, with their intervals.

    scores: the results.json of each Cell. Scores are fractions, as there; intervals [low, high], or
    None with one seed.
    """
    kinds = {}
    for cell in scores:
        kinds.setdefault(cell[:3], []).append(cell)
    rows = []
    for ranking, section in RANKINGS.items():
        for (backbone, rule, number), cells in kinds.items():
            row = {"backbone": backbone, "rule": rule, "number": number, "ranking": ranking}
            row["seeds"] = [cell.seed for cell in cells]
            for score in SCORES:
                own = {cell.seed: scores[cell][section][score] for cell in cells}
                zero = {cell.seed: scores[cell.baseline][section][score] for cell in cells}
                row[score], row[f"{score}_interval"] = mean_interval(own.values())
                if number:
                    difference = paired_difference(own, zero)
                    row[f"{score}_difference"], row[f"{score}_difference_interval"] = difference
            rows.append(row)
    return rows


def table_lines(rows):
    """Yield the table's lines in Markdown, in points; ± is half of a 95 % interval."""
    yield "| model | rule | generated | | Rank@1 | to 0 images | mAP | to 0 images |"
    yield "|---|---|---:|---|---:|---:|---:|---:|"
    for row in rows:
        cells = [
            NETWORKS.get(row["backbone"], row["backbone"]),
            row["rule"] or "–",
            f"{row['number']:,}",
            row["ranking"],
        ]
        for score in SCORES:
            cells += [points(row, score), points(row, f"{score}_difference", "+")]
        yield f"| {' | '.join(cells)} |"


def points(row, name, sign=""):
    """Return a row's value and half of its interval, in points; "" where it has no such value."""
    if name not in row:
        return ""
    text = f"{100 * row[name]:{sign}.2f}"
    if row[f"{name}_interval"]:
        low, high = row[f"{name}_interval"]
        text += f" ± {50 * (high - low):.2f}"
    return text


def table_notes(seeds, opts):
    """Return the sentences under the table: what it says, what made it. opts: of each cell."""
    names = ", ".join(map(str, seeds))
    if len(seeds) == 1:
        text = f"In %, of one training seed, {names}: no intervals."
    else:
        text = (
            f"In %, means over training seeds {names}, ± 95 % intervals (Student's t); differences "
            "are paired by seed. The intervals are over trainings, not over people to test on."
        )
    commits = " and ".join(dict.fromkeys(map(commit, opts)))
    machines = " and ".join(dict.fromkeys(map(hardware, opts)))
    return f"{text} Made by `{command_line()}`; trained at {commits} on {machines}."


def commit(opts):
    """Name the commit of the code that trained a run."""
    git = opts.get("git")
    if not isinstance(git, dict) or not isinstance(git.get("commit"), str):
        return "an unknown commit"
    return f"commit {git['commit'][:7]}{' (with changes)' if git.get('dirty') else ''}"


def hardware(opts):
    """Name the hardware that a run was trained on, and its precision."""
    name = opts.get("device_name") or opts.get("device")
    return f"{opts.get('processes')} x {name} in {opts.get('arithmetic')}"


if __name__ == "__main__":
    run(main)
