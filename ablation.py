"""Train with several numbers of generated images and label rules; tabulate what they change.

    python ablation.py --data_dir data/Market-1501-v15.09.15/pytorch -- --train_all
    python ablation.py --name demo --data_dir data/demo/pytorch --numbers 0 700 1400 \
        --gan_labels lsro all_in_one --backbones densenet121 -- --height 128 --width 64 --epochs 15
    python ablation.py --name few --data_dir DIR --num_ids 50 100 --numbers 1x 3x --jobs 2 \
        --unlabelled gan=GENERATED real=DIR/train_all_new --gan_labels lsro pseudo -- --train_all

Without flags the grid is Table 2 of Zheng et al. (ICCV 2017) with three seeds. A cell is one
training, a run folder model/<name>/<cell>/; flags after -- go to train_lsro.py for every cell. Each
cell is trained, its features are extracted at its last epoch, then scored plain and re-ranked.
Steps that are done are not repeated: after a stop the same command goes on. The pytorch_result.mat
of a cell may be deleted once the cell is scored.
All cells of a number of identities take the same steps, each with as many real images: generated
ones come on top of a batch, as many times as many as there are of them, and each image weighs as it
would in a batch of real ones. So neither more steps nor fewer or weaker real images can be taken
for an effect of them. --more_steps shuffles them among the real ones and has them add steps, as in
the paper.
Writes model/<name>/table.md, table.json and ablation.jpg.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import time
from functools import cache
from itertools import dropwhile, product
from pathlib import Path

import torch

import train_lsro
from reid.batches import batch_options, check_batchsize
from reid.checkpoint import FREE_ON_RESUME, Run, changed_option
from reid.comparison import (
    Cell,
    cell_scores,
    power_lines,
    table_lines,
    table_notes,
    table_rows,
)
from reid.curves import draw_ablation
from reid.dataset import (
    GENERATED_FOLDER,
    draw_generated,
    fingerprint,
    generated_folder,
    training_splits,
    unlabelled_images,
)
from reid.device import choose_device, dtype_for
from reid.distributed import World
from reid.errors import Interrupted, UserError, run
from reid.files import demand, read_results, write_json, write_text
from reid.losses import needs_a_run
from reid.options import (
    RANKINGS,
    SCORES,
    Parser,
    amount,
    at_least,
    processors,
    run_name,
    seed,
)
from reid.provenance import ROOT, provenance
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
    "--gan_label --label_run --num_ids --on_top --resume"
).split()
# Options that may differ between the cells of a grid; the number of epochs may not.
FREE = FREE_ON_RESUME - {"epochs", "lr"}
PATHS = {"data_dir", "gen_dir"}
POLL = 0.1  # seconds between looks at running processes
GRACE = 2  # seconds that a stopped process has to end by itself


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
        type=amount,
        nargs="+",
        default=NUMBERS,
        help="numbers of generated images, or multiples of the real ones, like 3x; 0 is always "
        "run, for the differences to it",
    )
    group.add_argument(
        "--num_ids",
        type=at_least(2),
        nargs="+",
        metavar="N",
        help="numbers of identities to train on (default: all)",
    )
    group.add_argument(
        "--unlabelled",
        nargs="+",
        metavar="NAME=FOLDER",
        help="several folders in place of --gen_dir, of any images; those that are trained on with "
        "their identity are left out (default: --gen_dir alone)",
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
        "--more_steps",
        action="store_true",
        help="shuffle generated images among the real ones, and have them add steps (default: add "
        "them to each batch)",
    )
    group = parser.add_argument_group("running")
    group.add_argument(
        "--jobs",
        type=at_least(1),
        default=1,
        help="number of cells at a time; each then has its part of the processors (but all use "
        "one GPU), and its output goes to model/<name>/<cell>.log",
    )
    group.add_argument(
        "--nproc_per_node",
        type=at_least(1),
        default=1,
        help="processes, a GPU each, that torchrun starts for training and extraction",
    )
    group.add_argument(
        "--power",
        action="store_true",
        help="also tell how many seeds would find a difference of 1 point in 80 %% of studies",
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
    if args.power and len(set(args.seeds)) < 2:
        raise UserError("--power: takes two seeds or more")
    cells = grid(args)
    options = {cell: training_options(args, cell) for cell in cells}
    missing = [cell for cell in cells if not is_scored(folder / cell.name)]
    free = FREE if missing else FREE - PATHS  # with cells to run, `check_images` compares images
    for cell in cells:
        unused = set() if cell.rule else {"gen_dir"}
        check_options(folder / cell.name, options[cell], free | unused)
    if missing:
        asked = options[missing[0]]
        network = {name: asked[name] for name in ("neck", "pooling", "last_stride")}
        for backbone in {cell.backbone for cell in missing}:
            check_network(backbone, **network)
        check_device(args, asked)
        work = check_images(folder, options, args.nproc_per_node)
        names = "\n  ".join(["to run:", *(cell.name for cell in missing)])
        done = len(cells) - len(missing)
        print(f"{folder}: {len(cells)} cells, {done} of them done; {names}", flush=True)
        run_cells(args, folder, cells, missing, options, work)
    write_table(args, folder, cells)


def unlabelled_folders(args):
    """Return the folders of unlabelled images by name; "" alone, for the usual one."""
    if not args.unlabelled:
        return {"": args.gen_dir}
    if args.gen_dir:
        raise UserError("--gen_dir: --unlabelled names the folders; leave one of them out")
    folders = {}
    for text in args.unlabelled:
        name, equals, folder = text.partition("=")
        if not equals or not folder or not re.fullmatch("[a-z0-9-]+", name) or name in folders:
            raise UserError(
                f"--unlabelled {text}: expected NAME=FOLDER, each name once, in a-z and 0-9"
            )
        folders[name] = folder
    return folders


def grid(args):
    """Return the Cells in the order in which they are run: all of a seed before the next seed."""
    numbers = {}
    for text in args.gan_labels:
        rule, own = label_rule(text)
        numbers.setdefault(rule, []).extend(n for n in own or args.numbers if n)
    for rule, some in numbers.items():
        if not some:
            raise UserError(f"--numbers: no images for {rule}; ask for a number above 0")
    kinds = [("", "", 0)]
    kinds += [
        (images, rule, n)
        for images in unlabelled_folders(args)
        for rule in numbers
        for n in dict.fromkeys(numbers[rule])
    ]
    factors = args.seeds, args.backbones, args.num_ids or [None]
    every = product(*map(dict.fromkeys, factors), kinds)
    return [Cell(backbone, ids, *kind, seed) for seed, backbone, ids, kind in every]


def label_rule(text):
    """Split "pseudo:24000" into a rule and its own numbers, ("pseudo", [24000])."""
    rule, colon, numbers = text.partition(":")
    try:
        if not rule:
            raise ValueError
        return rule, [amount(number) for number in numbers.split(",")] if colon else []
    except (ValueError, argparse.ArgumentTypeError):
        raise UserError(
            f"--gan_labels {text}: expected a rule, alone or with its own numbers of images, "
            "like lsro or pseudo:12000,24000 or lsro:1x,3x"
        ) from None


def training_words(args, cell):
    """Return the flags of train_lsro.py for a cell, a list of words."""
    words = ["--name", cell.name, "--model_dir", Path(args.model_dir) / args.name]
    words += ["--data_dir", args.data_dir]
    words += ["--num_generated", cell.number, "--seed", cell.seed, "--backbone", cell.backbone]
    words += [] if cell.num_ids is None else ["--num_ids", cell.num_ids]
    gen_dir = unlabelled_folders(args).get(cell.images)
    words += ["--gen_dir", gen_dir] if gen_dir else []
    flags = args.training_flags
    if cell.rule:
        words += ["--gan_label", cell.rule]
        words += [] if args.more_steps else ["--on_top"]
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
    if changed := changed_option(with_paths(options), with_paths(opts["options"]), free):
        name, before = changed
        advice = "repeat its options"
        if name == "on_top":
            advice = f"{'leave out' if before else 'add'} --more_steps"
        raise UserError(
            f"{folder}: was trained with --{name} {before}, not {options[name]}; {advice}, or "
            "take another --name for the grid"
        )


def with_paths(options):
    """Return options with absolute paths: the same, however they are spelled."""
    return options | {name: os.path.abspath(options[name]) for name in PATHS if options.get(name)}


def is_scored(folder):
    """Tell whether a cell has all results that the table needs."""
    return {"train", *RANKINGS.values()} <= read_results(folder / "results.json").keys()


def check_device(args, options):
    """Raise UserError where cells can't be run on the device that the flags after -- ask for."""
    device, gpus = choose_device(options["gpu_ids"])
    if gpus:
        raise UserError(
            f"--gpu_ids {options['gpu_ids']} after --: re-ranking uses one GPU; name one, or train "
            f"on several with --nproc_per_node {len(gpus)} before --"
        )
    if options["precision"] == "auto" and dtype_for(device):
        raise UserError(
            "--precision: each cell would choose the faster arithmetic for itself; add --precision "
            "bf16 or fp32 after --"
        )


def check_images(folder, options, processes):
    """Return how many images each Cell's epoch has, a dict.

    processes: number of them that share a cell's batches. Raises UserError where these can't be
    shared out, where images are missing, or are not those that earlier cells were trained on.
    """
    splits, work, unlabelled = cache(training_splits), {}, {}
    world = World(0, processes, torch.device("cpu"), [])
    for cell, asked in options.items():
        names = ("data_dir", "train_all", "val_ids", "num_ids")
        seeds = {"seed": cell.seed if cell.num_ids else 0}  # else it changes nothing
        real = splits(**{name: asked[name] for name in names} | seeds)
        flags = argparse.Namespace(**asked)
        gen_dir = generated_folder(flags)
        there = gen_dir, cell.num_ids, seeds["seed"]
        if asked["num_generated"] != 0 and there not in unlabelled:  # listing takes its time
            unlabelled[there] = unlabelled_images(gen_dir, real)
        images = unlabelled.get(there, [])
        generated = draw_generated(gen_dir, images, asked["num_generated"], cell.seed, real)
        train_lsro.check_rule(flags, generated)
        if cell.rule == "own":
            train_lsro.own_targets(real, generated)
        samples = real.train + generated
        batches = batch_options(flags, samples)
        check_batchsize(batches, world, samples)
        work[cell] = images_of_an_epoch(batches, real.train, generated)
        opts = Run(folder / cell.name).opts()
        if opts and opts.get("dataset") != fingerprint(samples):
            raise UserError(
                f"{folder / cell.name}: was trained on other images than there are now in "
                f"{asked['data_dir']} and {gen_dir}; take another --name for the grid"
            )
    return work


def images_of_an_epoch(batches, real, generated):
    """Return the number of images that an epoch takes, about: for the estimate of time."""
    if not generated or not batches.gan_batch:
        return len(real) + len(generated)
    return len(real) * batches.batchsize / (batches.batchsize - batches.gan_batch)


def run_cells(args, folder, cells, missing, options, work):
    """Run the missing cells, --jobs at a time; estimate the time left by the images to train on."""
    waiting, running, done = list(missing), {}, []
    started = time.monotonic()
    try:
        while waiting or running:
            for cell in ready(waiting, running)[: args.jobs - len(running)]:
                waiting.remove(cell)
                left = time_left(started, work, missing, done)
                number = cells.index(cell) + 1
                print(f"\n== cell {number} of {len(cells)}: {cell.name}{left}", flush=True)
                steps = steps_of(args, folder / cell.name, options[cell], cell)
                running[cell] = steps, launch(args, folder, cell, *steps.pop(0))
            cell = ended(running)
            steps, process = running.pop(cell)
            check_ended(args, folder, cell, process)
            if steps:
                running[cell] = steps, launch(args, folder, cell, *steps.pop(0))
            else:
                done.append(cell)
    except BaseException as stop:
        stop_all([process for _, process in running.values()])
        if isinstance(stop, KeyboardInterrupt):
            raise Interrupted("the grid is stopped; the same command goes on from here") from None
        raise


def ready(waiting, running):
    """Return the cells that can be started: a rule of a finished run needs the baseline done."""
    busy = {*waiting, *running}
    return [c for c in waiting if not (needs_a_run(c.rule) and c.baseline in busy)]


def ended(running):
    """Wait until a step of some cell has ended; returns that cell."""
    while True:
        for cell, (_, process) in running.items():
            if process.poll() is not None:
                return cell
        time.sleep(POLL)


def time_left(started, work, missing, done):
    """Say how long the rest will take, by the cells that are done."""
    if not done:
        return ""
    rate = (time.monotonic() - started) / sum(work[cell] for cell in done)
    left = sum(work[cell] for cell in missing) - sum(work[cell] for cell in done)
    return f", about {rate * left / 60:.0f} min left"


def steps_of(args, folder, options, cell):
    """List the steps of a cell that are not done: train, extract, score, as (processes, words)."""
    results, mat = folder / "results.json", folder / "pytorch_result.mat"
    sections = read_results(results)
    words = training_words(args, cell)
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
    left = dropwhile(lambda step: step[0], steps[:-1])  # the last one ends a cell in any case
    return [(many, [*map(str, command)]) for _, many, command in [*left, steps[-1]]]


def launch(args, folder, cell, processes, words):
    """Start a script as a process, or as several by torchrun; returns the process."""
    typed, python = ["python"], [sys.executable]
    if processes > 1:
        flags = ["--nproc_per_node", str(processes)]
        flags = ["--standalone", *flags]  # finds a free port
        typed, python = ["torchrun", *flags], [*python, "-m", "torch.distributed.run", *flags]
    script, *rest = words
    command = [*python, str(ROOT / script), *rest]
    line = f"$ {shlex.join([*typed, *words])}"
    if args.jobs == 1:
        print(f"\n{line}", flush=True)
        return subprocess.Popen(command)
    threads = max(1, processors() // (args.jobs * processes))
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
    folder.mkdir(parents=True, exist_ok=True)
    with open(log_of(folder, cell), "a", encoding="utf-8") as log:
        print(line, file=log, flush=True)
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def log_of(folder, cell):
    """Return the file of a cell's output, where several cells run at a time."""
    return folder / f"{cell.name}.log"


def check_ended(args, folder, cell, process):
    """End this process where a step failed, with its one line where it has said why."""
    code = process.returncode
    if code == 0:
        return
    script = Path(next(word for word in process.args if word.endswith(".py"))).name
    if args.jobs > 1:
        log = log_of(folder, cell)
        output = log.read_text(encoding="utf-8", errors="replace").rpartition("\n$ ")[2]
        errors = re.findall("^error: (.*)", output, re.MULTILINE)  # torchrun's own come after
        said = errors[0] if errors else f"ended with exit code {code}"
        raise UserError(f"{log}: {script}: {said}; the same command goes on from here")
    if code == 2:
        sys.exit(2)
    if code == 130:  # Ctrl-C reached it first
        raise KeyboardInterrupt
    raise UserError(f"{script} ended with exit code {code}; the same command goes on from here")


def stop_all(processes):
    """Have running steps save their work and end. Ctrl-C on a terminal has reached them already."""
    deadline = time.monotonic() + GRACE
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(POLL)
    for process in processes:
        process.terminate()  # does nothing to one that has ended
    for process in processes:
        process.wait()


def write_table(args, folder, cells):
    """Print the table and write table.md, table.json and ablation.jpg into the grid's folder."""
    runs = [read_run(folder / cell.name, RANKINGS.values(), SCORES) for cell in cells]
    scores = {cell: results for cell, (_, results) in zip(cells, runs, strict=True)}
    rows = table_rows(scores)
    notes = table_notes(rows[0]["seeds"], *zip(*runs, strict=True))
    lines = [*table_lines(rows), "", notes]
    lines += ["", *power_lines(rows)] if args.power else []
    text = "\n".join(lines) + "\n"
    write_text(folder / "table.md", text)
    content = {"cells": [cell_scores(cell, scores[cell]) for cell in cells], "rows": rows}
    write_json(folder / "table.json", content | provenance())
    draw_ablation([row for row in rows if row["ranking"] == "plain"], folder / "ablation.jpg")
    print(f"\n{text}\n{folder}: table.md, table.json, ablation.jpg")


if __name__ == "__main__":
    run(main)
