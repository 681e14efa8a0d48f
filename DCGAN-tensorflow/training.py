"""The training loop: batches, checkpoints, log.jsonl, grids of samples, the collapse watch."""

import hashlib
import json
import sys
import time
from pathlib import Path

import checkpoint
import numpy as np
import utils
import watch
from tqdm import tqdm
from utils import fail

GRID = 64  # figures in the grids of samples
CHECK_EVERY = 50  # steps between looks at the losses: each look waits for a GPU


def load_data(folder: Path, args, stored: dict) -> tuple[np.ndarray, str]:
    """The training images, uint8 `[N, H, W, 3]`, and the fingerprint of their list.

    `stored`: the options.json of a run that goes on, else {}.
    """
    paths = utils.find_images(folder, args.input_fname_pattern)
    if args.train_size and args.train_size < len(paths):
        chosen = np.random.default_rng(args.seed).permutation(len(paths))[: args.train_size]
        paths = [paths[i] for i in sorted(chosen)]
    if len(paths) < 2:
        fail(f"--dataset: only one image to train on in {folder}; a GAN needs many")
    lines = (f"{path.relative_to(folder).as_posix()} {path.stat().st_size}" for path in paths)
    names = "\n".join(lines)
    fingerprint = hashlib.sha256(names.encode()).hexdigest()[:16]
    if stored and fingerprint != stored["fingerprint"]:
        fail(
            f"--dataset: the run goes on with other images than those it was started with "
            f"({stored['images']} of {stored['folder']}); delete its folder or name another "
            "--checkpoint_dir"
        )
    crop = (args.input_height, args.input_width) if args.crop else None
    return utils.load_images(paths, args.output_height, args.output_width, crop), fingerprint


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
    """Make the run's folder and options.json; returns log.jsonl, cut before epoch `first`."""
    run.mkdir(parents=True, exist_ok=True)
    text = json.dumps(options, indent=2) + "\n"
    utils.write_whole(run / "options.json", lambda path: path.write_text(text))
    if first == 1:  # of a run whose checkpoints were deleted
        (run / checkpoint.HEALTHY).unlink(missing_ok=True)
    log = run / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True)[: first - 1] if log.exists() else []
    utils.write_whole(log, lambda path: path.write_text("".join(lines)))
    return log


def train(gan, images: np.ndarray, args, run: Path, log: Path) -> None:
    """Train `gan` from where it is up to --epoch epochs in all."""
    first, steps = gan.epochs + 1, len(images) // args.batch_size
    skip = min(gan.batches, steps - 1)  # fewer steps than then: --batch_size has changed
    folder = Path(args.sample_dir)
    folder.mkdir(parents=True, exist_ok=True)
    fixed = gan.noise(max(GRID, watch.IMAGES), args.seed)
    some = np.random.default_rng(args.seed).permutation(len(images))[: watch.IMAGES]
    real_diversity = watch.diversity(images[some])
    total = steps * (args.epoch - first + 1)
    with (
        tqdm(total=total, initial=skip, unit="step", disable=None) as bar,
        utils.postponed_interrupts() as interrupts,
    ):
        for epoch in range(first, args.epoch + 1):
            started, losses = time.time(), []
            for real in batches(images, args.batch_size, args.seed, epoch, skip):
                if interrupts:
                    save(gan, run)
                    message = f"stopped in epoch {epoch}: saved in {run}, the same command goes on"
                    print(message, file=sys.stderr)
                    raise SystemExit(130)
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
            print(f"stopped; all {args.epoch} epochs are done, saved in {run}", file=sys.stderr)
            raise SystemExit(130)


def save(gan, run: Path, healthy: bool = False) -> None:
    """Write a checkpoint, unless it would be of no use: then end, as `check` does."""
    arrays = gan.state()
    check([np.isfinite(array).all() or np.nan for array in arrays.values()], gan.epochs, run)
    checkpoint.save(run, gan.epochs, arrays, healthy)


def report(record: dict, epochs: int, bar, run: Path, log: Path) -> None:
    """Write an epoch's figures to the log, and say them."""
    with log.open("a") as file:
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
        fail(
            f"--learning_rate: in epoch {epoch} the loss or a weight is no number any more; lower "
            f"the rate and go on from the last checkpoint in {run}"
        )
