"""The command line: a parser class, types of arguments, groups of flags that scripts have.

Imports no torch, so that scripts without a network start at once. Each script keeps its paths as
constants at its top and passes them in as defaults.
"""

import argparse
import operator
import os
import re
from collections.abc import Callable
from pathlib import Path

from reid.errors import UserError

HEIGHT, WIDTH = 256, 128  # pixels of a training image
NETWORKS = {"resnet50": "ResNet-50", "densenet121": "DenseNet-121"}  # their names in tables
RANKINGS = {"plain": "evaluate", "re-ranked": "evaluate_rerank"}  # and their parts of results.json
SCORES = {"rank1": "Rank@1", "mAP": "mAP"}
SMALLEST = 32  # pixels a side: the networks' feature maps are a 32nd of that
PRECISIONS = ("auto", "fp32", "bf16")
TEST_SIZES = (
    "enlarged, 9/8 of that in training; center, the middle of the enlarged image, in which people "
    "are as large as in training; same; or in pixels, as 256x128 or, to cut out the middle, "
    "'256x128 of 288x144'"
)
# --recipe strong: chosen on the rendered set, see docs/training.md.
STRONG = {
    "warm_epoch": 5,
    "schedule": "cosine",
    "label_smoothing": 0.1,
    "last_stride": 1,
    "neck": "bnneck",
    "instances": 4,
    "triplet": 1.0,
}


def processors() -> int:
    """Return the number of processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Parser(argparse.ArgumentParser):
    """An argparse parser with defaults in its help, no abbreviations, and errors of one line."""

    def __init__(self, description: str):
        super().__init__(
            description=description, allow_abbrev=False, formatter_class=HelpWithDefaults
        )

    def parse_known_args(self, args=None, namespace=None):
        """Parse as argparse does; an empty text, as of a shell variable not set, is an error."""
        args, rest = super().parse_known_args(args, namespace)
        for action in self._actions:
            value = getattr(args, action.dest, None)
            if value == "" or (isinstance(value, list) and "" in value):
                name = max(action.option_strings, key=len, default=action.dest)
                self.error(f"argument {name}: is empty; is a variable not set?")
        return args, rest

    def print_help(self, file=None):
        """Print the help. (argparse's own says nothing where it can't be written.)"""
        print(self.format_help(), end="", file=file, flush=True)

    def error(self, message):
        # All processes of a torchrun are called with the same flags.
        raise UserError(f"{message} (see {self.prog} --help)", agreed=True)


class HelpWithDefaults(argparse.ArgumentDefaultsHelpFormatter):
    """A help that shows each default; where it is None, the help text says what happens."""

    def _get_help_string(self, action):
        if isinstance(action.default, list):  # as one would type them
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return action.help if action.default is None else super()._get_help_string(action)


# --- argument types -----------------------------------------------------------------------------


def number(
    kind: type = float,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Callable[[str], int | float]:
    """Return an argument type: a finite number of `kind` within bounds."""

    def parse(text):
        value = kind(text)
        problems = {
            "is not finite": not abs(value) < float("inf"),  # nor nan
            f"is under {least}": least is not None and value < least,
            f"is over {most}": most is not None and value > most,
            f"is not above {above}": above is not None and value <= above,
            f"is not under {below}": below is not None and value >= below,
        }
        for problem, there in problems.items():
            if there:
                raise argparse.ArgumentTypeError(f"{text} {problem}")
        return value

    parse.__name__ = kind.__name__  # what argparse calls it: "invalid int value"
    return parse


def at_least(smallest: float, kind: type = int) -> Callable[[str], int | float]:
    """Return an argument type: a number of `kind` that is `smallest` or more."""
    return number(kind, least=smallest)


seed = number(int, least=0, below=2**32)  # every random generator takes these
fraction = number(least=0, most=1)
decay = number(least=0, below=1)
rate = number(above=0, below=1)
positive = number(above=0)
cosine = number(least=-1, most=1)


def image_size(text: str) -> str:
    """Parse an argument: the size to test at, see `reid.transforms.transform_for_testing`."""
    match = re.fullmatch(r"(\d{1,4})x(\d{1,4})(?: of (\d{1,4})x(\d{1,4}))?", text)
    sides = [int(side) for side in match.groups() if side] if match else [0]
    fits = min(sides) >= SMALLEST and all(map(operator.le, sides[:2], sides[-2:]))
    if text not in ("enlarged", "center", "same") and not fits:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected enlarged, center, same, a size of {SMALLEST} pixels or more like "
            "256x128, or '256x128 of 288x144', the second no smaller"
        )
    return text


def amount(text: str) -> int | str:
    """Parse an argument: a number of images, or a multiple of the real ones like "3x"."""
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?x", text) and float(text[:-1]):
        return f"{float(text[:-1]):.15g}x"
    return at_least(0)(text)


def run_name(text: str) -> str:
    """Parse an argument: the name of a folder in another."""
    name = text.rstrip("/")
    if name in ("", ".", ".."):
        raise argparse.ArgumentTypeError(f"{text!r} is no name of a folder")
    return name


def scales(text: str) -> tuple[float, ...]:
    """Parse an argument: the scales of an image, with commas, e.g. 1,0.9."""
    values = tuple(float(word) for word in text.split(","))
    if not all(0.1 <= scale <= 10 for scale in values):
        raise argparse.ArgumentTypeError(f"{text}: scales go from 0.1 to 10")
    return values


# --- groups of flags ----------------------------------------------------------------------------


def add_device_options(parser: Parser, torchrun: bool = True) -> None:
    """Add `--gpu_ids --precision --workers`: the device, and how it computes.

    torchrun: whether the script can be several processes.
    """
    group = parser.add_argument_group("device")
    several = (
        "; 0,1 is DataParallel, which costs accuracy: for several GPUs start the script with "
        "torchrun --nproc_per_node N"
    )
    group.add_argument(
        "--gpu_ids",
        help="GPU to use: 0, or -1 for the CPU (default: an NVIDIA or Apple GPU where there is "
        f"one, else the CPU){several if torchrun else ''}",
    )
    group.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="auto",
        help="auto: bf16 autocast where the hardware computes in it and a short trial finds fp32 "
        "no faster for this network, else fp32",
    )
    group.add_argument(
        "--workers",
        type=at_least(0),
        default=2,
        help="number of processes that read images, or of threads that decode them into memory; 0: "
        "none",
    )


def add_run_options(parser: Parser, name: str, model_dir: str) -> None:
    """Add `--name --model_dir`: the run folder."""
    group = parser.add_argument_group("run")
    group.add_argument(
        "--name", type=run_name, default=name, help="the run's name: its folder in --model_dir"
    )
    group.add_argument("--model_dir", default=model_dir, help="folder that holds the runs")


def add_feature_options(parser: Parser) -> None:
    """Add `--ms` to the flags of `add_layer_options`."""
    group = add_layer_options(parser)
    group.add_argument(
        "--ms",
        type=scales,
        default="1",
        metavar="SCALES",
        help="multi-scale: extract each image at these scales, e.g. 1,0.9, and take the mean "
        "direction of the features",
    )


def add_layer_options(parser: Parser) -> argparse._ArgumentGroup:
    """Add the weights, layer and size of features, of a run or a file. Returns the group.

    `--which_epoch --which_layer --test_size` and the flags of `add_weights_options`.
    """
    add_weights_options(parser)
    group = parser.add_argument_group("features")
    group.add_argument(
        "--which_epoch", default="last", help="last, best, or the number of a saved epoch"
    )
    group.add_argument(
        "--which_layer",
        choices=["pool", "bottleneck"],
        help="pool: the pooled features (2048 numbers of a ResNet-50); bottleneck: what the "
        "classifier sees (512, or with --neck bnneck the pooled ones after batch norm) (default: "
        "what --val_ids chose in training, else pool; of another code's --weights with a batch "
        "norm neck, bottleneck)",
    )
    group.add_argument(
        "--test_size",
        type=image_size,
        metavar="{enlarged,center,same,HxW}",
        help=f"image size: {TEST_SIZES} (default: the run's; of another code's --weights same)",
    )
    return group


def add_results_option(group: argparse._ArgumentGroup) -> None:
    """Add `--json`, the file of `reid.files.update_results`."""
    group.add_argument(
        "--json",
        metavar="FILE",
        help="add the results to this file, such as model/<name>/results.json, as a section of it "
        "(default: none is written)",
    )


def add_weights_options(parser: Parser) -> None:
    """Add `--weights --backbone --last_stride --height --width`: weights without a run folder."""
    group = parser.add_argument_group("weights of other codes")
    group.add_argument(
        "--weights",
        metavar="FILE",
        help="take the features of this file in place of a run's: a .pth, .pt or .safetensors of "
        "torchvision, timm, torchreid, fast-reid and others (default: --name's)",
    )
    add_backbone_options(group, None)
    group.add_argument(
        "--last_stride",
        type=int,
        choices=[1, 2],
        default=2,
        help="stride of the last stage of the network in --weights; a run's own file tells",
    )
    for side, usual in (("height", HEIGHT), ("width", WIDTH)):
        group.add_argument(
            f"--{side}",
            type=at_least(SMALLEST),
            help=f"{side} of the images that the network was trained on (default: the run's, of "
            f"other weights {usual})",
        )


def add_backbone_options(group: argparse._ArgumentGroup, default: str | None) -> None:
    """Add `--backbone --use_dense`, which both set `backbone`."""
    either = group.add_mutually_exclusive_group()
    either.add_argument(
        "--backbone",
        default=default,
        metavar="NAME",
        help="resnet50, densenet121, or the name of any timm model, such as "
        "tf_efficientnet_lite0, convnext_tiny, vit_small_patch16_224"
        + ("" if default else " (default: what the run holds, of other weights resnet50)"),
    )
    either.add_argument(
        "--use_dense",
        action="store_const",
        const="densenet121",
        dest="backbone",
        default=argparse.SUPPRESS,
        help="the same as --backbone densenet121",
    )


def add_training_options(parser: Parser, data_dir: str) -> None:
    """Add the flags that train_baseline.py and train_lsro.py have in common."""
    # The engine reads these; train_baseline.py has no such flags and gets these values.
    parser.set_defaults(gan_batch=None, on_top=False, split_bn=False, gan_start=0, label_run=None)
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data_dir",
        nargs="+",
        default=[data_dir],
        help="the `pytorch` folder that prepare.py made; or several: each has people and cameras "
        "of its own",
    )
    data.add_argument(
        "--balance",
        action="store_true",
        help="with several --data_dir: equally many images of each dataset in every batch",
    )
    data.add_argument(
        "--train_all",
        action="store_true",
        help="train on all training images, as published tables do; none is held out to validate",
    )
    data.add_argument(
        "--num_ids",
        type=at_least(2),
        metavar="N",
        help="number of identities to train on, drawn by the seed (default: all)",
    )
    side = at_least(SMALLEST)
    data.add_argument("--height", type=side, default=HEIGHT, help="image height in pixels")
    data.add_argument("--width", type=side, default=WIDTH, help="image width in pixels")
    data.add_argument(
        "--erasing_p",
        type=fraction,
        default=0.8,
        help="probability that an image is erased at random",
    )

    network = parser.add_argument_group("network")
    add_backbone_options(network, "resnet50")
    network.add_argument(
        "--pretrained",
        default="imagenet",
        metavar="{imagenet,none,FILE}",
        help="weights that the backbone starts from: torchvision's or timm's ImageNet weights "
        "(downloaded on first use); none: random ones; or a file, of this code or another",
    )
    network.add_argument(
        "--neck",
        choices=["bottleneck", "bnneck"],
        default="bottleneck",
        help="bnneck: one batch norm between features and classifier (Luo et al. 2019)",
    )
    network.add_argument(
        "--pooling",
        choices=["avg", "gem"],
        default="avg",
        help="gem: generalised mean with a learnt exponent (Radenovic et al. 2018)",
    )
    network.add_argument(
        "--last_stride",
        type=int,
        choices=[1, 2],
        default=2,
        help="1: the last stage keeps twice the resolution (Sun et al. 2018), if the backbone can",
    )

    testing = parser.add_argument_group("testing")
    testing.add_argument(
        "--val_ids",
        type=at_least(0),
        default=0,
        metavar="N",
        help="number of identities to hold out whole; the layer and image size that find them best "
        "at the end are kept with the run, for testing",
    )
    testing.add_argument(
        "--test_size",
        type=image_size,
        metavar="{enlarged,center,same,HxW}",
        help=f"image size in testing: {TEST_SIZES} (default: found with --val_ids, else enlarged "
        "for resnet50 and densenet121, center for others)",
    )

    recipe = parser.add_argument_group("recipe")
    recipe.add_argument(
        "--recipe",
        choices=["original", "strong"],
        default="original",
        help=f"strong: {' '.join(as_flags(STRONG))}, unless given otherwise",
    )
    recipe.add_argument(
        "--epochs", type=at_least(1), default=130, help="number of passes over the images"
    )
    recipe.add_argument(
        "--batchsize",
        type=at_least(2),
        default=64,
        help="number of images in a step, over all processes and GPUs together",
    )
    recipe.add_argument(
        "--lr",
        type=positive,
        default=0.05,
        help="learning rate of head and classifier",
    )
    recipe.add_argument(
        "--backbone_lr",
        type=positive,
        default=0.2,
        metavar="FRACTION",
        help="the backbone's learning rate, as a fraction of --lr",
    )
    recipe.add_argument(
        "--schedule",
        choices=["step", "cosine"],
        default="step",
        help="cosine: the rate falls along a cosine to 0 (Loshchilov and Hutter 2017)",
    )
    recipe.add_argument(
        "--lr_step",
        type=at_least(1),
        default=40,
        help="with --schedule step: epochs after which the rate falls to a tenth, each time",
    )
    recipe.add_argument(
        "--warm_epoch",
        type=at_least(0),
        default=0,
        help="number of first epochs in which the rate rises from a tenth (Fan et al. 2019)",
    )
    recipe.add_argument(
        "--freeze_epochs",
        type=at_least(0),
        default=0,
        help="number of first epochs in which only head and classifier are trained",
    )
    recipe.add_argument(
        "--label_smoothing",
        type=fraction,
        default=0.0,
        help="fraction of a real image's target spread over all identities (Szegedy et al. 2016)",
    )
    recipe.add_argument(
        "--triplet",
        type=at_least(0, float),
        default=0.0,
        help="weight of the batch-hard triplet loss (Hermans et al. 2017)",
    )
    recipe.add_argument(
        "--circle",
        type=at_least(0, float),
        default=0.0,
        help="weight of the circle loss (Sun et al. 2020)",
    )
    recipe.add_argument(
        "--instances",
        type=at_least(0),
        default=0,
        help="PK sampling: number of images of an identity that stand together in a batch, e.g. 4; "
        "0: shuffle freely",
    )
    recipe.add_argument(
        "--ema",
        type=decay,
        default=0.0,
        help="decay of a moving average of the weights, which is then saved and validated, e.g. "
        "0.999; 0: off",
    )
    recipe.add_argument(
        "--color_jitter",
        action="store_true",
        help="vary brightness, contrast and saturation",
    )
    recipe.add_argument(
        "--auto_augment",
        action="store_true",
        help="torchvision's AutoAugment (Cubuk et al. 2019)",
    )
    recipe.add_argument("--seed", type=seed, default=0, help="seed of every random choice")

    saving = parser.add_argument_group("saving")
    saving.add_argument(
        "--save_every",
        type=at_least(1),
        default=10,
        help="number of epochs between net_<epoch>.pth files",
    )
    saving.add_argument(
        "--resume",
        action="store_true",
        help="go on with an unfinished run, or start it where there is none yet",
    )
    saving.add_argument(
        "--tensorboard", action="store_true", help="also write the log for TensorBoard"
    )


def add_speed_options(parser: Parser) -> None:
    """Add `--cache --compile`: the speed of training."""
    group = parser.add_argument_group("speed")
    group.add_argument(
        "--cache",
        choices=["auto", "file", "ram", "off"],
        default="auto",
        help="file: decode all images once, into <data_dir>/cache, for all processes and later "
        "runs; ram: into each process's memory; off: --workers processes read them anew in each "
        "epoch; auto: the first of these that has room (8 GiB on disk, 2 in memory)",
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile the network: takes minutes and a C++ compiler; no faster on CPUs",
    )


def training_defaults() -> dict:
    """Return the options of a training where no flag is given: of runs older than a flag, too."""
    parser = Parser("")
    add_training_options(parser, "data")
    return vars(parser.parse_args([]))


def parse_training(parser: Parser, argv: list[str] | None) -> argparse.Namespace:
    """Parse the options of a training script; --recipe strong sets what the user did not."""
    if parser.parse_args(argv).recipe == "strong":
        parser.set_defaults(**STRONG)
    args = parser.parse_args(argv)
    if len(args.data_dir) == 1:  # as opts.json has it
        [args.data_dir] = args.data_dir
    elif len(args.data_dir) != len({Path(folder).resolve() for folder in args.data_dir}):
        parser.error("--data_dir: names a folder twice; leave one out")
    return args


def backbone_of(options: dict) -> str | None:
    """Return the backbone in a run's options, where older versions have only `use_dense`."""
    older = {True: "densenet121", False: "resnet50"}.get(options.get("use_dense"))
    return options.get("backbone", older)


def as_flags(settings):
    """Yield a dict of options as one would type them."""
    for name, value in settings.items():
        yield f"--{name}" if value is True else f"--{name} {value}"
