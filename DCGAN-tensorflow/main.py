"""Train a DCGAN on a folder of images, and generate images from it.

Run inside this folder:
    python main.py --dataset market --train --output_height 128 --output_width 64
    python main.py --dataset market --options 5 --sample_size 24000 --output_path gen
"""

import hashlib
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import utils
from tqdm import tqdm
from utils import fail

# Edit these, or pass the flag of the same name.
DATASET = "market"  # a folder under DATA_DIR, or the path of one
DATA_DIR = "./data"
OUTPUT_PATH = "./generated"  # where --options 5 puts its single images
CHECKPOINT_DIR = "./checkpoint"
SAMPLE_DIR = "./samples"  # grids and GIFs

OPTIONS = """Generate: 0 = one grid of --sample_size random images; 1 = for each dimension of z a
grid that sweeps it from -1 to 1; 2 = GIFs of such sweeps for some random dimensions; 3 = a GIF of
the sweep for each dimension; 4 = one GIF of all sweeps side by side (0 to 4 go to --sample_dir);
5 = exactly --sample_size single images, gen_00000.png ..., to --output_path, an empty or new
folder. Not given: nothing is generated"""

# A run remembers these two in its options.json: a flag not given takes the run's own value.
NETWORK = {"output_height": 128, "output_width": None, "z_dim": 100, "gf_dim": 64, "df_dim": 64}
TRAINING = {"batch_size": 64, "learning_rate": 2e-4, "beta1": 0.5, "crop": False, "seed": 0} | {
    "input_height": 128, "input_width": None, "input_fname_pattern": "*.jpg", "train_size": None
}  # fmt: skip


def get_parser() -> utils.Parser:
    """All flags; those of the original TensorFlow 1 script work as they did."""
    parser = utils.Parser(
        description="DCGAN (Radford et al. 2016): pass --train, --options K, or both.",
        epilog="Resuming and generating keep the sizes and settings that the run was started with "
        "(its options.json); the defaults of network and training flags are for a new run.",
    )
    remembered, group = NETWORK | TRAINING, parser

    def add(name: str, kind, text: str, default=None, **kwargs) -> None:
        shown = remembered.get(name, default)
        text = text if shown is None else f"{text} (default: {shown})"
        if kind is utils.boolean:
            kwargs = {"nargs": "?", "const": True, "metavar": "True/False"}
        default = None if name in remembered else default  # None: left to settle()
        group.add_argument(f"--{name}", type=kind, default=default, help=text, **kwargs)

    count = utils.at_least(1)
    group = parser.add_argument_group("what to do")
    add("train", utils.boolean, "train, going on from the last checkpoint if there is one", False)
    add("options", int, OPTIONS, choices=range(6))
    add("sample_size", count, "how many images --options 0 and 5 make", 64)
    add("seed", utils.at_least(0), "the same seed gives the same order, noise and images")
    group = parser.add_argument_group("where")
    add("dataset", str, "folder of images, one level of folders included: its path, or its name "
        "under --data_dir", DATASET)  # fmt: skip
    add("data_dir", str, "where datasets are looked up by name", DATA_DIR)
    add("input_fname_pattern", str, "which files to take, upper or lower case")
    add("train_size", count, "train on this many images, picked by --seed (default: all)")
    add("output_path", str, "folder for the single images of --options 5", OUTPUT_PATH)
    add("checkpoint_dir", str, "a run lives in <checkpoint_dir>/<dataset's name>", CHECKPOINT_DIR)
    add("sample_dir", str, "folder for grids and GIFs", SAMPLE_DIR)
    group = parser.add_argument_group("network")
    add("output_height", count, "height of the images it makes, a multiple of 16")
    add("output_width", count, "their width, likewise (default: the height)")
    add("z_dim", count, "length of the noise vector")
    add("gf_dim", count, "filters of the generator next to the image; fewer are faster")
    add("df_dim", count, "filters of the discriminator next to the image")
    group = parser.add_argument_group("training")
    add("epoch", count, "epochs in all, those of earlier calls included", 25)
    add("batch_size", count, "images a step; fewer if the dataset is smaller")
    add("learning_rate", float, "of Adam")
    add("beta1", float, "of Adam")
    add("crop", utils.boolean, "take the middle --input_height x --input_width of each image and "
        "scale that, not the whole image")  # fmt: skip
    add("input_height", count, "height of the middle that --crop takes")
    add("input_width", count, "its width (default: the height)")
    add("save_every", count, "epochs between checkpoints and sample grids; the end has both", 5)
    return parser


def settle(args, run: Path) -> dict:
    """Fill the open flags from the run's options.json, else from the defaults above.

    Returns what options.json holds, {} for a new run. Values that the checkpoint in `run` cannot
    take are an error. Looks at files only: no TensorFlow yet.
    """
    stored = {}
    if (run / "checkpoint").is_file():  # written by TensorFlow beside the first checkpoint
        try:
            stored = json.loads((run / "options.json").read_text())
            _ = [stored[key] for key in [*NETWORK, *TRAINING, "fingerprint"]]
        except (OSError, ValueError, KeyError) as problem:
            fail(
                f"--checkpoint_dir: {run} has a checkpoint but no usable options.json "
                f"({problem}); delete the folder or name another"
            )
    elif not args.train:
        fail(f"--checkpoint_dir: no checkpoint in {run}; train first (--train) or name its folder")
    for key, default in (NETWORK | TRAINING).items():
        given = getattr(args, key)
        if stored and given is not None and key in NETWORK and given != stored[key]:
            fail(
                f"--{key} {given}: the checkpoint in {run} has {stored[key]}; leave the flag out, "
                "or name another --checkpoint_dir"
            )
        if given is None:
            setattr(args, key, stored.get(key, default))
    args.output_width = args.output_width or args.output_height
    args.input_width = args.input_width or args.input_height
    for key in ("output_height", "output_width"):
        size = getattr(args, key)
        if size % 16:
            near = ", ".join(str(n) for n in (size // 16 * 16, size // 16 * 16 + 16) if n)
            fail(f"--{key} {size}: heights and widths must be multiples of 16 (near it: {near})")
    if not (args.learning_rate > 0 and 0 <= args.beta1 < 1):
        fail("--learning_rate must be above 0, and --beta1 from 0 to below 1")
    return stored


def load_data(args, stored: dict, run: Path) -> tuple[np.ndarray, str]:
    """The training images, uint8 `[N, H, W, 3]`, and the fingerprint of their list."""
    folder = find_dataset(args)
    paths = utils.find_images(folder, args.input_fname_pattern)
    if args.train_size and args.train_size < len(paths):
        chosen = np.random.default_rng(args.seed).permutation(len(paths))[: args.train_size]
        paths = [paths[i] for i in sorted(chosen)]
    names = "\n".join(path.relative_to(folder).as_posix() for path in paths)
    fingerprint = hashlib.sha256(names.encode()).hexdigest()[:16]
    if stored and fingerprint != stored["fingerprint"]:
        fail(
            f"--dataset: the run in {run} was trained on other images ({stored['images']} of "
            f"{stored['folder']}); delete that folder or name another --checkpoint_dir"
        )
    crop = (args.input_height, args.input_width) if args.crop else None
    return utils.load_images(paths, args.output_height, args.output_width, crop), fingerprint


def find_dataset(args) -> Path:
    """`--dataset` is a folder under --data_dir, or else a path."""
    named = Path(args.data_dir) / args.dataset
    return named if named.is_dir() or not Path(args.dataset).is_dir() else Path(args.dataset)


def build(args):
    """The GAN that `args` (settled) describe. Starts TensorFlow, which takes seconds."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    os.environ["KERAS_BACKEND"] = "tensorflow"
    with utils.silence():
        import tensorflow as tf

        from model import DCGAN

        gpus = tf.config.list_physical_devices("GPU")
        for gpu in gpus:
            tf.config.experimental.set_memory_growth(gpu, True)  # leave the rest to others
        names = ("z_dim", "gf_dim", "df_dim", "learning_rate", "beta1", "seed")
        settings = {name: getattr(args, name) for name in names}
        gan = DCGAN(args.output_height, args.output_width, **settings)
    return gan, "GPU" if gpus else "CPU"


def start_run(args, run: Path, images: int, fingerprint: str, first: int) -> Path:
    """Make the run's folder and options.json; returns log.jsonl, cut before epoch `first`."""
    run.mkdir(parents=True, exist_ok=True)
    options = {key: getattr(args, key) for key in [*NETWORK, *TRAINING]}
    options |= {
        "folder": str(find_dataset(args).resolve()),
        "images": images,
        "fingerprint": fingerprint,
        "command": " ".join(sys.argv),
    }
    text = json.dumps(options, indent=2) + "\n"
    utils.write_whole(run / "options.json", lambda path: path.write_text(text))
    log, kept = run / "log.jsonl", ""
    for line in log.read_text().splitlines(keepends=True) if log.exists() else []:
        if not line.endswith("}\n") or json.loads(line)["epoch"] >= first:
            break  # written after the checkpoint that we go on from: comes again
        kept += line
    utils.write_whole(log, lambda path: path.write_text(kept))
    return log


def train(args, stored: dict, run: Path) -> None:
    """Train up to --epoch epochs in all; checkpoints, log.jsonl and sample grids on the way."""
    images, fingerprint = load_data(args, stored, run)
    if len(images) < args.batch_size:
        print(f"only {len(images)} images: --batch_size {args.batch_size} becomes {len(images)}")
        args.batch_size = len(images)
    gan, device = build(args)
    from model import batches  # after build(), which starts TensorFlow quietly

    gan.restore(run)
    first, steps = int(gan.epochs) + 1, len(images) // args.batch_size
    skip = min(int(gan.batches), steps - 1)  # fewer steps than then: --batch_size has changed
    if first > args.epoch:
        print(f"train: nothing to do, {run} has {first - 1} epochs and --epoch is {args.epoch}")
        return
    print(
        f"train: {len(images)} images as {args.output_height}x{args.output_width}, epochs "
        f"{first}..{args.epoch}, batch {args.batch_size}, generator "
        f"{gan.generator.count_params():,} parameters, discriminator "
        f"{gan.discriminator.count_params():,}, {device}, run in {run}",
        flush=True,
    )
    log = start_run(args, run, len(images), fingerprint, first)
    samples = Path(args.sample_dir)
    samples.mkdir(parents=True, exist_ok=True)
    fixed = gan.noise(64, args.seed)
    total = steps * (args.epoch - first + 1)
    with (
        tqdm(total=total, initial=skip, unit="step", disable=None) as bar,
        utils.postponed_interrupts() as interrupts,
    ):
        for epoch in range(first, args.epoch + 1):
            started, losses = time.time(), []
            for real in batches(images, args.batch_size, args.seed, epoch, skip):
                if interrupts:
                    gan.save(run)
                    message = f"stopped in epoch {epoch}: saved in {run}, the same command goes on"
                    print(message, file=sys.stderr)
                    raise SystemExit(130)
                losses.append(gan.train_step(real))
                gan.batches.assign_add(1)
                bar.update()
            skip = 0
            gan.epochs.assign(epoch)
            gan.batches.assign(0)
            d_loss, g_loss = np.mean(losses, axis=0).tolist()
            seconds = round(time.time() - started, 2)
            record = {"epoch": epoch, "d_loss": d_loss, "g_loss": g_loss, "seconds": seconds}
            with log.open("a") as file:
                file.write(json.dumps(record) + "\n")
            bar.write(
                f"epoch {epoch}/{args.epoch}  d_loss {d_loss:.3f}  g_loss {g_loss:.3f}  "
                f"{seconds:.1f} s"
            )
            sys.stdout.flush()  # each epoch is seen when it ends, through a pipe too
            if epoch % args.save_every == 0 or epoch == args.epoch:
                gan.save(run)
                picture = utils.grid(gan.generate(fixed), 8)
                utils.save_png(samples / f"train_{epoch:04d}.png", picture)


def generate(args, stored: dict, run: Path) -> None:
    """What --options asks for, from the last checkpoint in `run`."""
    single, n = args.options == 5, args.sample_size
    what = {0: f"a grid of {n} images", 1: "grids", 2: "GIFs", 3: "GIFs", 4: "a GIF of all sweeps"}
    what = what.get(args.options, f"{n} single images")
    print(
        f"generate: {what}, {args.output_height}x{args.output_width}, seed {args.seed}, from "
        f"{run} (trained on {stored.get('folder', args.dataset)}) to "
        f"{args.output_path if single else args.sample_dir}",
        flush=True,
    )
    gan, _ = build(args)
    gan.restore(run, generator_only=True)
    if not single:
        utils.visualize(gan, args.options, Path(args.sample_dir), n, args.seed)
        return
    rng = np.random.default_rng(args.seed)
    digits = max(5, len(str(n - 1)))
    with (
        tqdm(total=n, desc="generating", unit="image", disable=None) as bar,
        utils.new_folder(Path(args.output_path)) as folder,
    ):
        for start in range(0, n, 64):
            made = gan.generate(gan.noise(min(64, n - start), rng))
            for i, image in enumerate(made, start):
                utils.save_png(folder / f"gen_{i:0{digits}d}.png", image)
            bar.update(len(made))


def main(argv: list[str] | None = None) -> None:
    """Check everything that can be checked without TensorFlow, then train and/or generate."""
    args = get_parser().parse_args(argv)
    if not args.train and args.options is None:
        fail("nothing to do: pass --train to train, --options 0..5 to generate, or both")
    try:
        run = Path(args.checkpoint_dir) / find_dataset(args).resolve().name
        stored = settle(args, run)
        if args.train:
            utils.check_writable(run, "--checkpoint_dir")
        if args.options == 5:
            utils.check_writable(Path(args.output_path), "--output_path", new=True)
        if args.train or args.options in range(5):
            utils.check_writable(Path(args.sample_dir), "--sample_dir")
        if args.train:
            train(args, stored, run)
        if args.options is not None:
            generate(args, stored, run)
    except OSError as problem:  # a disk that fills up, a folder taken away
        fail(problem)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
