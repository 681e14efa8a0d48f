"""Train a re-ID network on real and GAN-generated images with LSRO (Zheng et al., ICCV 2017).

A real image is taught its identity, a generated one the uniform distribution over all identities,
or what another rule (--gan_label) gives it.

    python train_lsro.py --data_dir data/Market-1501-v15.09.15/pytorch --num_generated 12000
    python train_lsro.py --gan_label pseudo --gan_batch 16 --split_bn --name pseudo
    python train_lsro.py --gan_label sls --label_run ft_ResNet50 --name sls

Generated images lie in <data_dir>/train_new/gen_0000, or in the folder that --gen_dir names.
Writes the run folder model/<name>/ (weights, options, log, curves).
"""

from argparse import Namespace
from pathlib import Path

from reid import engine, losses
from reid.dataset import (
    GENERATED_FOLDER,
    generated_folder,
    generated_images,
    prepared_folders,
    training_splits,
)
from reid.distributed import join_world
from reid.errors import UserError, run
from reid.gan_labels import Teacher
from reid.options import (
    Parser,
    add_device_options,
    add_run_options,
    add_speed_options,
    add_training_options,
    amount,
    at_least,
    parse_training,
)

DATA_DIR = "data/Market-1501-v15.09.15/pytorch"  # what prepare.py and changeIndex.py made
GEN_DIR = None  # generated images; None: <data_dir>/train_new/gen_0000
MODEL_DIR = "model"
NAME = "ft_ResNet50_lsro"
GAN_LABEL = "lsro"
PSEUDO_WEIGHT, PSEUDO_START = 0.1, 20  # as Zheng et al. 2017 trained it


def get_parser():
    parser = Parser("Train a re-ID network on real and generated images with LSRO or a relative.")
    add_run_options(parser, NAME, MODEL_DIR)
    add_training_options(parser, DATA_DIR)
    add_generated_options(parser)
    add_device_options(parser)
    add_speed_options(parser)
    return parser


def add_generated_options(parser: Parser) -> None:
    """Add the flags that choose generated images and what they are taught."""
    group = parser.add_argument_group("generated images")
    group.add_argument(
        "--gen_dir",
        default=GEN_DIR,
        help=f"folder of generated images (default: <data_dir>/train_new/{GENERATED_FOLDER})",
    )
    group.add_argument(
        "--num_generated",
        type=amount,
        metavar="N",
        help="how many generated images to use, chosen by the seed, or how many times as many as "
        "real ones, like 3x (default: all)",
    )
    group.add_argument(
        "--gan_batch",
        type=at_least(1),
        help="exact number of generated images in each batch (default: shuffled among the real)",
    )
    group.add_argument(
        "--on_top",
        action="store_true",
        help="--batchsize counts real images alone, generated ones come on top: as many as "
        "--gan_batch says, or in proportion. So the steps, and what real images add to each, are "
        "those of the baseline",
    )
    group.add_argument(
        "--gan_label",
        choices=list(losses.RULES),
        default=GAN_LABEL,
        help="target of a generated image: lsro, the uniform distribution; all_in_one, a class of "
        "its own; pseudo, the most probable identity; mprl_*, identities by rank of their "
        "probability, in a finished run or now (Huang et al. 2018); sls, the identities of its "
        "cluster (Ainam et al. 2018); teacher, the probabilities of a finished run (Zheng et al. "
        "2019); consistency, those of the mean weights (--ema) for another view of it (Tarvainen "
        "and Valpola 2017); own, the identity that its folder is named after (Zhong et al. 2018)",
    )
    group.add_argument(
        "--gan_weight",
        type=at_least(0, float),
        help="weight of a generated image's loss (default: 1, with pseudo 0.1)",
    )
    group.add_argument(
        "--gan_start",
        type=at_least(0),
        default=None,  # said outright: else add_training_options' 0 counts as given
        help="number of first epochs in which generated images don't count in the loss (default: "
        "0, with pseudo 20)",
    )
    group.add_argument(
        "--label_run",
        help="finished run in --model_dir that decides the targets of mprl_static, sls and teacher "
        "(default: none)",
    )
    group.add_argument(
        "--clusters", type=at_least(1), default=3, help="number of k-means clusters, with sls"
    )
    group.add_argument(
        "--split_bn",
        action="store_true",
        help="batch norm with separate statistics for generated images; tests see the real ones' "
        "(Xie et al. 2020)",
    )


def check_rule(args, generated):
    """Raise UserError where the flags of the label rule don't go together."""
    by_a_run = losses.needs_a_run(args.gan_label)
    if by_a_run and not args.label_run:
        raise UserError(f"--gan_label {args.gan_label}: name a finished run with --label_run")
    if args.label_run and not by_a_run:
        raise UserError(f"--label_run: --gan_label {args.gan_label} does not use it; leave it out")
    flags = "gan_batch", "on_top", "label_run", "split_bn"
    needing = {f"--{name}": getattr(args, name) for name in flags}
    needing["--gan_label own"] = args.gan_label == "own"
    for flag, given in needing.items():
        if given and not generated:
            raise UserError(f"{flag}: there are no generated images; raise --num_generated")


def parse(argv: list[str] | None = None) -> Namespace:
    """Parse the options, and set the defaults that depend on the label rule.

    Raises UserError where generated images would leave no room for others, or never count.
    """
    parser = get_parser()
    parser.prog = Path(__file__).name  # in errors, also where ablation.py parses a cell's flags
    args = parse_training(parser, argv)
    pseudo = args.gan_label == "pseudo"
    if args.gan_weight is None:
        args.gan_weight = PSEUDO_WEIGHT if pseudo else 1.0
    if args.gan_start is None:
        args.gan_start = PSEUDO_START if pseudo else 0
    if args.gan_label == "own" and len(prepared_folders(args.data_dir)) > 1:
        parser.error("--gan_label own: of several --data_dir, a folder's number names no person")
    if args.gan_label == "consistency" and not args.ema:
        parser.error("--gan_label consistency: compares with mean weights; add --ema 0.999")
    if args.gan_batch and not args.on_top and args.gan_batch >= args.batchsize:
        parser.error(
            f"--gan_batch {args.gan_batch}: leaves no real images in a --batchsize of "
            f"{args.batchsize}; lower it, or add --on_top"
        )
    if args.num_generated != 0 and args.gan_start >= args.epochs:
        parser.error(
            f"--gan_start {args.gan_start}: with --gan_label {args.gan_label} generated images "
            f"would not count in any of the {args.epochs} epochs; lower it"
        )
    return args


def main(argv=None):
    args = parse(argv)
    world = join_world(args.gpu_ids)
    with world.together():
        splits = training_splits(
            args.data_dir, args.train_all, args.val_ids, args.num_ids, args.seed
        )
        generated = []
        if args.num_generated != 0:
            folder = generated_folder(args)
            generated = generated_images(folder, args.num_generated, args.seed, splits)
        check_rule(args, generated)
    world.say(f"{len(splits.train)} real and {len(generated)} generated images")
    rule = losses.label_rule(args.gan_label, args.gan_weight, args.gan_start)
    together = splits._replace(train=splits.train + generated)
    with engine.opened(args, world, together, rule) as training:
        if losses.needs_a_run(args.gan_label):
            rule.target.weights = taught_targets(args, world, splits, generated)
        if args.gan_label == "own":
            with world.together():
                rule.target.weights = own_targets(splits, generated).to(world.device)
        training.run()


def own_targets(splits, generated):
    """Return the targets' weights, [N, K], by the folders that the generated images lie in."""
    real = splits.train + splits.validation
    classes = {int(sample.path.parent.name): sample.label for sample in real}
    own = []
    for sample in generated:
        folder = sample.path.parent
        if not folder.name.isdecimal() or int(folder.name) not in classes:
            raise UserError(
                f"{folder}: --gan_label own takes images in folders named after the classes that "
                "are trained on, as in train_all_new; leave this folder out of --gen_dir"
            )
        own.append(classes[int(folder.name)])
    return losses.own_class(own, len(classes))


def taught_targets(args, world, splits, generated):
    """Return the targets' weights that the finished run --label_run decides: int [N, K]."""
    with world.together():
        teacher = Teacher(args, splits.train + splits.validation, world)
    return teacher.targets(args.gan_label, splits.train, generated)


if __name__ == "__main__":
    run(main, torchrun=True)
