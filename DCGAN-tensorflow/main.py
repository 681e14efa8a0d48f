"""Train a DCGAN on a folder of images, and generate images from it.

Run inside this folder:
    python main.py --dataset market --train --output_height 128 --output_width 64
    python main.py --dataset market --options 5 --sample_size 24000 --output_path gen

KERAS_BACKEND=torch python main.py ... computes with PyTorch instead of TensorFlow.
"""

import argparse
import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING

import checkpoint
import sampling
import training
import utils
from errors import UserError, run
from files import check_writable, locked, read_json

if TYPE_CHECKING:
    from model import DCGAN

# Edit these, or pass the flag of the same name.
DATASET = "market"  # the name of a folder under DATA_DIR, or the path of any folder
DATA_DIR = "./data"
OUTPUT_PATH = "./generated"  # folder for the single images of --options 5
CHECKPOINT_DIR = "./checkpoint"
SAMPLE_DIR = "./samples"  # folder for grids and GIFs

OPTIONS = """Generate: 0 = one grid of --sample_size random images; 1 = for each dimension of z a
grid that sweeps it from -1 to 1; 2 = GIFs of such sweeps for some random dimensions; 3 = a GIF of
the sweep for each dimension; 4 = one GIF of all sweeps side by side (0 to 4 go to --sample_dir);
5 = exactly --sample_size single images, gen_00000.png ..., to --output_path, an empty or new
folder. Not given: nothing is generated"""

AUGMENT = ("flip", "color", "translation", "cutout")

# A run stores the values of these flags in its options.json. A flag that is not given takes the
# stored value.
NETWORK = {"output_height": 128, "output_width": None, "z_dim": 100, "gf_dim": 64, "df_dim": 64}
NETWORK |= {"spectral_norm": False, "ema": 0.999}
TRAINING = {"batch_size": 64, "learning_rate": 2e-4, "beta1": 0.5, "augment": "none"}
TRAINING |= {"precision": "auto", "crop": False, "input_height": 128, "input_width": None}
TRAINING |= {"input_fname_pattern": "*.jpg", "train_size": None, "seed": 0}
# A run that goes on keeps these: with other values it would see other images.
SAME_IMAGES = ("seed", "crop", "input_height", "input_width")


def get_parser() -> utils.Parser:
    """Return the parser of all flags; those of the TensorFlow 1 script work as they did."""
    parser = utils.Parser(
        description="DCGAN (Radford et al. 2016): pass --train, --options K, or both.",
        epilog="Resuming and generating keep the sizes and settings that the run had before "
        "(its options.json); the defaults of network and training flags are those of a new run. "
        "KERAS_BACKEND=torch in the environment computes with PyTorch instead of TensorFlow.",
    )
    remembered, group = NETWORK | TRAINING, parser

    def add(name: str, kind, text: str, default=None, **kwargs) -> None:
        shown = remembered.get(name, default)
        text = text if shown is None else f"{text} (default: {shown})"
        if kind is utils.boolean:
            kwargs = {"nargs": "?", "const": True, "metavar": "True/False"}
        default = None if name in remembered else default  # settle() replaces None
        group.add_argument(f"--{name}", type=kind, default=default, help=text, **kwargs)

    count = utils.whole(1)
    size = utils.whole(1, bits=16)  # so that products of sizes fit into 64 bits
    group = parser.add_argument_group("what to do")
    add("train", utils.boolean, "train, going on from the last checkpoint if there is one", False)
    add("options", int, OPTIONS, choices=range(6))
    add("sample_size", count, "how many images --options 0 and 5 make", 64)
    add("which", str, "generate from the last checkpoint, or from the last one before the samples "
        "became too much alike", "last", choices=["last", "healthy"])  # fmt: skip
    add(
        "seed",
        utils.whole(0, bits=32),
        "seed of all random numbers: the same seed gives the same images",
    )
    group = parser.add_argument_group("where")
    add("dataset", utils.nonempty, "folder of images, one level of folders included: its path, "
        "or its name under --data_dir", DATASET)  # fmt: skip
    add("data_dir", utils.nonempty, "where datasets are looked up by name", DATA_DIR)
    add("input_fname_pattern", str, "take the files whose names match this, in upper or lower case")
    add("train_size", count, "train on this many images, picked by --seed (default: all)")
    add("output_path", utils.nonempty, "folder for the single images of --options 5", OUTPUT_PATH)
    add("checkpoint_dir", utils.nonempty, "a run is stored in <checkpoint_dir>/<dataset's name>",
        CHECKPOINT_DIR)  # fmt: skip
    add("sample_dir", utils.nonempty, "folder for grids and GIFs", SAMPLE_DIR)
    group = parser.add_argument_group("network")
    add("output_height", size, "height of the generated images, a multiple of 16")
    add(
        "output_width",
        size,
        "width of the generated images, a multiple of 16, for people 64 (default: the height)",
    )
    add("z_dim", size, "length of the noise vector")
    add("gf_dim", size, "filters of the generator's layer next to the image; fewer are faster")
    add("df_dim", size, "filters of the discriminator's layer next to the image")
    add("spectral_norm", utils.boolean, "normalise the discriminator's kernels by their largest "
        "singular value, in place of batch norm (Miyato et al. 2018)")  # fmt: skip
    add("ema", utils.finite, "images are made with a running average of the generator's weights "
        "that has this decay (Yazici et al. 2019); 0: with the newest weights")  # fmt: skip
    group = parser.add_argument_group("training")
    add("epoch", count, "train up to this epoch, counted from the start of the run", 25)
    add("batch_size", count, "images per step; fewer if the dataset is smaller")
    add("learning_rate", utils.finite, "learning rate of Adam")
    add("beta1", utils.finite, "decay of Adam's first moment")
    add("augment", policy, "augment all images that the discriminator sees, for small datasets "
        f"(Zhao et al. 2020): some of {','.join(AUGMENT)}, with commas, or none")  # fmt: skip
    add("precision", str, "arithmetic of training; auto: bf16 where the hardware multiplies in "
        "it, else fp32. --options always computes in fp32",
        choices=["auto", "fp32", "bf16"])  # fmt: skip
    add("xla", utils.boolean, "have XLA compile the training step (TensorFlow): for GPUs; on two "
        "CPU cores it was many times slower", False)  # fmt: skip
    add("crop", utils.boolean, "take the middle --input_height x --input_width of each image and "
        "scale that, not the whole image")  # fmt: skip
    add("input_height", size, "height of the middle that --crop takes")
    add("input_width", size, "width of the middle that --crop takes (default: the height)")
    add(
        "save_every",
        count,
        "epochs between checkpoints and sample grids; the last epoch has both",
        5,
    )
    return parser


def policy(text: str) -> str:
    """Check the names in AUGMENT with commas between them, or `none`, for argparse."""
    wrong = [name for name in text.split(",") if name not in AUGMENT]
    if text != "none" and wrong:
        raise ValueError(text)
    return text


def settle(args: argparse.Namespace, folder: Path) -> dict:
    """Fill in flags that were not given, from the run's options.json or the defaults above.

    Returns the content of options.json, {} for a new run. Raises UserError for values that the
    checkpoint in `folder` cannot take. It only looks at files, so TensorFlow is not needed yet.
    """
    if not args.train:
        checkpoint.find(folder, args.which)
    exists = not args.train or checkpoint.numbered(folder)
    stored = read_options(folder / "options.json") if exists else {}
    fixed = {*NETWORK, *(SAME_IMAGES if args.train else ())}
    for key, default in (NETWORK | TRAINING).items():
        given = getattr(args, key)
        if stored and given is not None and key in fixed and given != stored[key]:
            raise UserError(
                f"--{key} {given}: the checkpoint in {folder} has {stored[key]}; leave the flag "
                "out, or name another --checkpoint_dir"
            )
        if given is None:
            setattr(args, key, stored.get(key, default))
    args.output_width = args.output_width or args.output_height
    args.input_width = args.input_width or args.input_height
    for key in ("output_height", "output_width"):
        size = getattr(args, key)
        if size % 16:
            near = ", ".join(str(n) for n in (size // 16 * 16, size // 16 * 16 + 16) if n)
            raise UserError(
                f"--{key} {size}: heights and widths must be multiples of 16 (near it: {near})"
            )
    if not (args.learning_rate > 0 and 0 <= args.beta1 < 1 and 0 <= args.ema < 1):
        raise UserError("--learning_rate must be above 0, --beta1 and --ema from 0 to below 1")
    return stored


def read_options(path: Path) -> dict:
    """Read a run's options.json and check that the flags take its values."""
    defaults = NETWORK | TRAINING
    types = {key: int if value is None else type(value) for key, value in defaults.items()}
    types |= {"train_size": int | None, "fingerprint": str, "images": int, "folder": str}
    advice = "delete the run's folder or name another --checkpoint_dir"
    stored = read_json(path, advice, **types)
    flags = [f"--{key}={stored[key]}" for key in defaults if stored[key] is not None]
    try:
        get_parser().parse_args(flags)
    except UserError as error:
        raise UserError(f"{path}: {error}; {advice}") from error
    return stored


def find_dataset(args: argparse.Namespace) -> Path:
    """Return the folder --dataset: the one of this name under --data_dir, or else the path."""
    named, path = Path(args.data_dir) / args.dataset, Path(args.dataset)
    if args.dataset.startswith("."):  # ., .. and what begins with them are paths
        return path
    is_name = path.name == args.dataset and not path.is_dir()
    return named if named.is_dir() or is_name else path


def start_backend() -> str:
    """Import Keras and its backend, which takes seconds; returns "CPU" or "GPU"."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    # Keras would read image layout and float type from the keras.json in the user's home, and make
    # one where there is none. The same command should do the same for everyone, so Keras gets a
    # home that is no folder: it can neither read nor make a file there.
    os.environ["KERAS_HOME"] = os.devnull
    # By itself TensorFlow leaves out oneDNN on CPUs without AVX-512, where a step takes two thirds
    # of the time with it.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    backend = os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    if backend not in ("tensorflow", "torch"):
        raise UserError(f"KERAS_BACKEND={backend}: only tensorflow and torch are supported here")
    for package in (backend, "keras"):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"{package} is not installed: pip install {package}, or set KERAS_BACKEND to "
                "tensorflow or torch, whichever is there"
            )
    with utils.silence():
        if backend == "torch":
            import torch

            device = "cuda" if torch.cuda.is_available() else "cpu"
            os.environ.setdefault("KERAS_TORCH_DEVICE", device)  # else an Apple GPU: never tried
            import keras

            return "GPU" if device == "cuda" else "CPU"
        import keras  # noqa: F401
        import tensorflow as tf

        gpus = tf.config.list_physical_devices("GPU")
        for gpu in gpus:
            tf.config.experimental.set_memory_growth(gpu, True)  # leave the rest to other processes
        return "GPU" if gpus else "CPU"


def build(args: argparse.Namespace, precision: str) -> "DCGAN":
    """Build the GAN that the flags describe, after `settle` has filled them in."""
    with utils.silence():
        from model import DCGAN

        names = ("z_dim", "gf_dim", "df_dim", "learning_rate", "beta1", "seed", "ema")
        return DCGAN(
            args.output_height,
            args.output_width,
            **{name: getattr(args, name) for name in names},
            spectral_norm=args.spectral_norm,
            policy=tuple(args.augment.split(",")) if args.augment != "none" else (),
            precision=precision,
            xla=args.xla,
        )


def restore(gan: "DCGAN", path: Path, generator_only: bool = False) -> str:
    """Load a checkpoint into `gan`; returns the SHA-256 of the file."""
    arrays, digest = checkpoint.load(path)
    try:
        gan.set_state(arrays, generator_only)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"--checkpoint_dir: {path} is of another network ({error}); name another folder"
        ) from error
    return digest


def train(args: argparse.Namespace, stored: dict, folder: Path) -> None:
    """Do what --train asks for: train a new run, or go on with the run in `folder`."""
    dataset = find_dataset(args)
    images, fingerprint = training.load_data(dataset, args, stored)
    if len(images) < args.batch_size:
        print(f"only {len(images)} images: --batch_size {args.batch_size} becomes {len(images)}")
        args.batch_size = len(images)
    device = start_backend()
    if args.precision == "auto":
        args.precision = "bf16" if utils.computes_bf16(device) else "fp32"
    gan = build(args, args.precision)
    if stored:
        restore(gan, checkpoint.numbered(folder)[-1])
    first = gan.epochs + 1
    if first > args.epoch:
        print(f"train: nothing to do, {folder} has {gan.epochs} epochs, --epoch is {args.epoch}")
        return
    print(
        f"train: {len(images)} images as {args.output_height}x{args.output_width}, epochs "
        f"{first}..{args.epoch}, batch {args.batch_size}, generator "
        f"{gan.generator.count_params():,} parameters, discriminator "
        f"{gan.discriminator.count_params():,}, {gan.backend}, {device}, {args.precision}, "
        f"run in {folder}",
        flush=True,
    )
    options = {key: getattr(args, key) for key in [*NETWORK, *TRAINING]}
    options |= {"folder": str(dataset.resolve()), "images": len(images)}
    options |= {"fingerprint": fingerprint, "backend": gan.backend, "command": utils.command_line()}
    log = training.start_log(folder, options, first)
    training.train(gan, images, args, folder, log)


def generate(args: argparse.Namespace, stored: dict, folder: Path) -> None:
    """Do what --options asks for: generate images from the run in `folder`."""
    checkpoint.find(folder, args.which)  # where there is none, it is said before the backend starts
    single, n = args.options == 5, args.sample_size
    start_backend()
    gan = build(args, "fp32")
    path = checkpoint.find(folder, args.which)  # a training may have replaced the one from before
    what = {0: f"a grid of {n} images", 1: "grids", 2: "GIFs", 3: "GIFs", 4: "a GIF of all sweeps"}
    what = what.get(args.options, f"{n} single images")
    print(
        f"generate: {what}, {args.output_height}x{args.output_width}, seed {args.seed}, from "
        f"{path} (trained on {stored.get('folder', args.dataset)}) to "
        f"{args.output_path if single else args.sample_dir}",
        flush=True,
    )
    digest = restore(gan, path, generator_only=True)
    if single:
        about = {
            "checkpoint": str(path.resolve()),
            "checkpoint_sha256": digest,
            "epochs": gan.epochs,
            "trained_on": stored.get("folder", str(find_dataset(args).resolve())),
        }
        sampling.write_singles(gan, n, args.seed, Path(args.output_path), about)
    else:
        sampling.visualize(gan, args.options, Path(args.sample_dir), n, args.seed)


def check_outputs(args: argparse.Namespace) -> None:
    """Raise UserError if the folders for the results can't be written."""
    if args.options == 5:
        check_writable(Path(args.output_path), "--output_path", new=True)
    if args.train or args.options in range(5):
        check_writable(Path(args.sample_dir), "--sample_dir")


def main(argv: list[str] | None = None) -> None:
    """Check all that can be checked without TensorFlow, then train, generate, or both."""
    args = get_parser().parse_args(argv)
    if not args.train and args.options is None:
        raise UserError("nothing to do: pass --train to train, --options 0..5 to generate, or both")
    if args.xla and os.environ.get("KERAS_BACKEND") == "torch":
        raise UserError("--xla: only TensorFlow has it; leave the flag out")
    dataset = find_dataset(args)
    folder = Path(args.checkpoint_dir) / dataset.resolve().name
    if args.train:
        check_writable(folder, "--checkpoint_dir")
        with locked(folder):
            stored = settle(args, folder)
            check_outputs(args)
            train(args, stored, folder)
    else:
        stored = settle(args, folder)
        check_outputs(args)
        if dataset.is_dir():  # a checkpoint may be used without its images
            training.check_trained_on(dataset, stored, folder)
    if args.options is not None:
        generate(args, stored, folder)


if __name__ == "__main__":
    run(main)
