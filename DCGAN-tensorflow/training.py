"""The training loop: batches, checkpoints, log.jsonl, grids of samples, the collapse watch."""

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import checkpoint
import numpy as np
import utils
import watch
from errors import Interrupted, UserError, postponed_interrupts
from files import parse_json, read_text, replacing, write_json, writing
from tqdm import tqdm

if TYPE_CHECKING:
    from model import DCGAN

GRID = 64  # images in the grids of samples
CHECK_EVERY = 50  # steps between checks of the losses: each check waits for the GPU


def load_data(folder: Path, args: argparse.Namespace, stored: dict) -> tuple[np.ndarray, str]:
    """Read the training images, uint8 `[N, H, W, 3]`; returns them and their fingerprint.

    `stored` is the options.json of a run that goes on, or {} for a new run.
    """
    all_paths, pattern = utils.find_images(folder, "--dataset"), args.input_fname_pattern
    left_out = len(all_paths) - len(utils.matching(all_paths, pattern))
    if left_out == len(all_paths):
        raise UserError(
            f"--input_fname_pattern: none of the {left_out} images in {folder} has a name like "
            f"{pattern!r}"
        )
    paths = choose(all_paths, vars(args))
    if len(paths) < 2:
        raise UserError(f"--dataset: only one image to train on in {folder}; a GAN needs many")
    fingerprint = fingerprint_of(folder, paths)
    if stored and fingerprint != stored["fingerprint"]:
        raise UserError(
            f"--dataset: the run goes on with other images than those it was started with "
            f"({stored['images']} of {stored['folder']}); delete its folder or name another "
            "--checkpoint_dir"
        )
    if left_out:
        print(f"--input_fname_pattern {pattern!r} leaves out {left_out} of {len(all_paths)} images")
    crop = (args.input_height, args.input_width) if args.crop else None
    return utils.load_images(paths, args.output_height, args.output_width, crop), fingerprint


def choose(images: list[Path], settings: dict) -> list[Path]:
    """Return those images of a dataset that a run with these settings trains on."""
    images, size = utils.matching(images, settings["input_fname_pattern"]), settings["train_size"]
    if size and size < len(images):
        numbers = np.random.default_rng(settings["seed"]).permutation(len(images))[:size]
        images = [images[i] for i in sorted(numbers)]
    return images


def fingerprint_of(folder: Path, paths: list[Path]) -> str:
    """Return a hash of the images' sizes and of their paths below `folder`, which may be moved."""
    lines = (f"{path.relative_to(folder).as_posix()} {path.stat().st_size}" for path in paths)
    return hashlib.sha256(os.fsencode("\n".join(lines))).hexdigest()[:16]


def check_trained_on(folder: Path, stored: dict, run: Path) -> None:
    """Raise UserError if `folder` has other images than the run with this options.json had."""
    paths = choose(utils.list_images(folder), stored)
    if fingerprint_of(folder, paths) != stored["fingerprint"]:
        raise UserError(
            f"--dataset: the images in {folder} are not those of {stored['folder']}, which the run "
            f"in {run} was trained on; name that folder, or another --checkpoint_dir"
        )


def batches(
    images: np.ndarray, batch_size: int, seed: int, epoch: int, skip: int = 0
) -> Iterator[np.ndarray]:
    """Yield the batches of one epoch, uint8 `[batch_size, H, W, 3]`, but for the first `skip`.

    The order depends on seed and epoch alone, so a run that stopped after `skip` batches goes on
    with the batch that it would have seen next. The last few images, which do not fill a batch,
    are left out; each epoch leaves out others.
    """
    order = np.random.default_rng([seed, epoch]).permutation(len(images))
    for k in range(skip, len(images) // batch_size):
        yield images[order[k * batch_size : (k + 1) * batch_size]]


def start_log(run: Path, options: dict, first: int) -> Path:
    """Prepare a run's folder: options.json, and log.jsonl without epochs from `first` on.

    Returns the path of log.jsonl. Leftovers of a killed training are deleted. A kill in the middle
    of this function does no harm: a run without checkpoints starts anew, and for a run with
    checkpoints the old options.json holds the same network and images as the new one.
    """
    log = run / "log.jsonl"
    lines = lines_before(log, first) if log.exists() and first > 1 else []
    for name in ("ckpt-*.npz", checkpoint.HEALTHY, log.name, "options.json"):
        for leftover in [*run.glob(f".{name}.new.partial"), *run.glob(f".{name}.lock")]:
            leftover.unlink()
    if first == 1:  # it is from an earlier run, whose numbered checkpoints were deleted
        (run / checkpoint.HEALTHY).unlink(missing_ok=True)
    with replacing(log) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8", newline="\n")
    with replacing(run / "options.json") as temporary:
        write_json(temporary, options)
    return log


def lines_before(log: Path, first: int) -> list[str]:
    """Return the lines of log.jsonl for the epochs before `first`."""
    advice, kept = "delete it; the checkpoints don't need it", []
    for number, line in enumerate(read_text(log, advice).splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break  # the last line, half-written by a process that was killed
        source = f"{log}, line {number}"
        if parse_json(line, source, advice, epoch=int)["epoch"] < first:
            kept.append(line)
    return kept


def train(gan: "DCGAN", images: np.ndarray, args: argparse.Namespace, run: Path, log: Path) -> None:
    """Train `gan`, which may have done some epochs before, up to epoch `args.epoch`."""
    first, steps = gan.epochs + 1, len(images) // args.batch_size
    skip = min(gan.batches, steps - 1)  # a larger --batch_size makes fewer steps
    folder = Path(args.sample_dir)
    fixed = gan.noise(max(GRID, watch.IMAGES), args.seed)
    compared = np.random.default_rng(args.seed).permutation(len(images))[: watch.IMAGES]
    real_diversity = watch.diversity(images[compared])
    total = steps * (args.epoch - first + 1)
    with (
        tqdm(total=total, initial=skip, unit="step", disable=None) as bar,
        postponed_interrupts() as interrupts,
    ):
        for epoch in range(first, args.epoch + 1):
            started, losses = time.time(), []
            for real in batches(images, args.batch_size, args.seed, epoch, skip):
                if interrupts:
                    save(gan, run)
                    raise Interrupted(
                        f"stopped in epoch {epoch}: saved in {run}, the same command goes on"
                    )
                losses.append(gan.train_step(real))
                gan.batches += 1
                bar.update()
                if len(losses) % CHECK_EVERY == 0:
                    check(losses[-1], epoch, run)
            check(losses[-1], epoch, run)
            skip = gan.batches = 0
            gan.epochs = epoch
            d_loss, g_loss = np.mean([[float(x) for x in pair] for pair in losses], axis=0).tolist()
            record = {"epoch": epoch, "d_loss": d_loss, "g_loss": g_loss}
            saving = epoch % args.save_every == 0 or epoch == args.epoch
            if saving:
                made = gan.generate(fixed)
                utils.save_png(folder / f"train_{epoch:04d}.png", utils.grid(made[:GRID], 8))
                diversity = watch.diversity(made[: len(compared)])
                record["diversity"] = diversity / max(real_diversity, 1e-9)
            healthy = record.get("diversity", 1) >= watch.COLLAPSED
            # Early samples are alike in every run. So while no checkpoint has been healthy, the
            # warning waits for the last epoch.
            if not healthy and (epoch == args.epoch or (run / checkpoint.HEALTHY).is_file()):
                record["warning"] = "collapse"
            record["seconds"] = round(time.time() - started, 2)
            report(record, args.epoch, bar, run, log)
            if saving:  # after the log: resuming cuts off lines of the log without a checkpoint
                save(gan, run, healthy)
        if interrupts:
            raise Interrupted(f"stopped; all {args.epoch} epochs are done, saved in {run}")


def save(gan: "DCGAN", run: Path, healthy: bool = False) -> None:
    """Write a checkpoint. Raises UserError instead where a weight is NaN or infinite."""
    arrays = gan.state()
    epoch = gan.epochs + bool(gan.batches)  # one that was stopped in its middle is not counted yet
    check([np.isfinite(array).all() or np.nan for array in arrays.values()], epoch, run)
    checkpoint.save(run, gan.epochs, arrays, healthy)


def report(record: dict, epochs: int, bar: tqdm, run: Path, log: Path) -> None:
    """Append the record of an epoch to the log, and print it."""
    with writing(log), log.open("a", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps(record) + "\n")
    diversity = f"  diversity {record['diversity']:.2f}" if "diversity" in record else ""
    bar.write(
        f"epoch {record['epoch']}/{epochs}  d_loss {record['d_loss']:.3f}  "
        f"g_loss {record['g_loss']:.3f}{diversity}  {record['seconds']:.1f} s"
    )
    sys.stdout.flush()  # a reader of a pipe sees each epoch when it ends
    if "warning" in record:
        path, advice = run / checkpoint.HEALTHY, "train longer"
        if path.is_file():
            advice = f"{path} is from before: generate from it with --which healthy"
        bar.write(
            f"warning: epoch {record['epoch']}: samples have {record['diversity']:.2f} of the real "
            f"images' diversity (a collapse?); {advice}, or train anew with "
            "--augment flip,translation or --spectral_norm",
            file=sys.stderr,
        )


def check(losses, epoch: int, run: Path) -> None:
    """Raise UserError where a loss is NaN or infinite; the checkpoints stay as they are."""
    if not np.isfinite([float(loss) for loss in losses]).all():
        raise UserError(
            f"--learning_rate: in epoch {epoch} the loss or a weight is no number any more; lower "
            f"the rate and go on from the last checkpoint in {run}"
        )
