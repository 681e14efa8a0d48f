"""The training loop: batches, checkpoints, log.jsonl, grids of samples, the collapse watch."""

import hashlib
import json
import os
import sys
import time
from pathlib import Path

import checkpoint
import numpy as np
import utils
import watch
from errors import Interrupted, UserError, postponed_interrupts
from files import parse_json, read_text, replacing, write_json, writing
from tqdm import tqdm

GRID = 64  # figures in the grids of samples
CHECK_EVERY = 50  # steps between looks at the losses: each look waits for a GPU


def load_data(folder: Path, args, stored: dict) -> tuple[np.ndarray, str]:
    """The training images, uint8 `[N, H, W, 3]`, and the fingerprint of their list.

    `stored`: the options.json of a run that goes on, else {}.
    """
    found, pattern = utils.find_images(folder, "--dataset"), args.input_fname_pattern
    left_out = len(found) - len(utils.matching(found, pattern))
    if left_out == len(found):
        raise UserError(
            f"--input_fname_pattern: none of the {left_out} images in {folder} has a name like "
            f"{pattern!r}"
        )
    paths = choose(found, vars(args))
    if len(paths) < 2:
        raise UserError(f"--dataset: only one image to train on in {folder}; a GAN needs many")
    fingerprint = describe(folder, paths)
    if stored and fingerprint != stored["fingerprint"]:
        raise UserError(
            f"--dataset: the run goes on with other images than those it was started with "
            f"({stored['images']} of {stored['folder']}); delete its folder or name another "
            "--checkpoint_dir"
        )
    if left_out:
        print(f"--input_fname_pattern {pattern!r} leaves out {left_out} of {len(found)} images")
    crop = (args.input_height, args.input_width) if args.crop else None
    return utils.load_images(paths, args.output_height, args.output_width, crop), fingerprint


def choose(images: list[Path], settings: dict) -> list[Path]:
    """Those of a dataset's images that a run of these settings trains on."""
    images, size = utils.matching(images, settings["input_fname_pattern"]), settings["train_size"]
    if size and size < len(images):
        chosen = np.random.default_rng(settings["seed"]).permutation(len(images))[:size]
        images = [images[i] for i in sorted(chosen)]
    return images


def describe(folder: Path, paths: list[Path]) -> str:
    """A fingerprint of images in `folder`, by names and sizes; another path of it changes none."""
    lines = (f"{path.relative_to(folder).as_posix()} {path.stat().st_size}" for path in paths)
    return hashlib.sha256(os.fsencode("\n".join(lines))).hexdigest()[:16]


def check_trained_on(folder: Path, stored: dict, run: Path) -> None:
    """Raise UserError where `folder` has other images than the run of this options.json had."""
    paths = choose(utils.list_images(folder), stored)
    if describe(folder, paths) != stored["fingerprint"]:
        raise UserError(
            f"--dataset: the images in {folder} are not those of {stored['folder']}, which the run "
            f"in {run} was trained on; name that folder, or another --checkpoint_dir"
        )


def batches(images: np.ndarray, batch_size: int, seed: int, epoch: int, skip: int = 0):
    """One epoch of uint8 `[batch_size, H, W, 3]`, out of uint8 `[N, H, W, 3]`.

    The order depends on seed and epoch alone, so a run that stopped after `skip` batches goes on
    with the batch it would have seen next. The few images that do not fill a batch are left
    out; they are others in each epoch.
    """
    order = np.random.default_rng([seed, epoch]).permutation(len(images))
    for k in range(skip, len(images) // batch_size):
        yield images[order[k * batch_size : (k + 1) * batch_size]]


def start_log(run: Path, options: dict, first: int) -> Path:
    """Make the run's folder and options.json; returns log.jsonl, cut before epoch `first`.

    Clears what a killed training has left in the folder. A kill in between here changes nothing:
    a run without checkpoints starts anew, another has its settings in either options.json.
    """
    log = run / "log.jsonl"
    lines = lines_before(log, first) if log.exists() and first > 1 else []
    for name in ("ckpt-*.npz", checkpoint.HEALTHY, log.name, "options.json"):
        for left in [*run.glob(f".{name}.new.partial"), *run.glob(f".{name}.lock")]:
            left.unlink()
    if first == 1:  # of a run whose checkpoints were deleted: not to be taken for one of this run
        (run / checkpoint.HEALTHY).unlink(missing_ok=True)
    with replacing(log) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8", newline="\n")
    with replacing(run / "options.json") as temporary:
        write_json(temporary, options)
    return log


def lines_before(log: Path, first: int) -> list[str]:
    """The lines of log.jsonl that are of epochs before `first`."""
    advice, kept = "delete it; the checkpoints don't need it", []
    for number, line in enumerate(read_text(log, advice).splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break  # the last, half-written by a process that was killed
        source = f"{log}, line {number}"
        if parse_json(line, source, advice, epoch=int)["epoch"] < first:
            kept.append(line)
    return kept


def train(gan, images: np.ndarray, args, run: Path, log: Path) -> None:
    """Train `gan` from where it is up to --epoch epochs in all."""
    first, steps = gan.epochs + 1, len(images) // args.batch_size
    skip = min(gan.batches, steps - 1)  # fewer steps than then: --batch_size has changed
    folder = Path(args.sample_dir)
    fixed = gan.noise(max(GRID, watch.IMAGES), args.seed)
    some = np.random.default_rng(args.seed).permutation(len(images))[: watch.IMAGES]
    real_diversity = watch.diversity(images[some])
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
                record["diversity"] = watch.diversity(made[: len(some)]) / max(real_diversity, 1e-9)
            healthy = record.get("diversity", 1) >= watch.COLLAPSED
            # Samples are alike at first, too: what never was better is only said at the end.
            if not healthy and (epoch == args.epoch or (run / checkpoint.HEALTHY).is_file()):
                record["warning"] = "collapse"
            record["seconds"] = round(time.time() - started, 2)
            report(record, args.epoch, bar, run, log)
            if saving:  # last: a line of the log without a checkpoint is cut off on resuming
                save(gan, run, healthy)
        if interrupts:
            raise Interrupted(f"stopped; all {args.epoch} epochs are done, saved in {run}")


def save(gan, run: Path, healthy: bool = False) -> None:
    """Write a checkpoint, unless it would be of no use: then end, as `check` does."""
    arrays = gan.state()
    check([np.isfinite(array).all() or np.nan for array in arrays.values()], gan.epochs, run)
    checkpoint.save(run, gan.epochs, arrays, healthy)


def report(record: dict, epochs: int, bar, run: Path, log: Path) -> None:
    """Write an epoch's figures to the log, and say them."""
    with writing(log), log.open("a", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps(record) + "\n")
    diversity = f"  diversity {record['diversity']:.2f}" if "diversity" in record else ""
    bar.write(
        f"epoch {record['epoch']}/{epochs}  d_loss {record['d_loss']:.3f}  "
        f"g_loss {record['g_loss']:.3f}{diversity}  {record['seconds']:.1f} s"
    )
    sys.stdout.flush()  # each epoch is seen when it ends, through a pipe too
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
    """End where a loss, or a weight, is no number any more; the checkpoints stay as they are."""
    if not np.isfinite([float(loss) for loss in losses]).all():
        raise UserError(
            f"--learning_rate: in epoch {epoch} the loss or a weight is no number any more; lower "
            f"the rate and go on from the last checkpoint in {run}"
        )
