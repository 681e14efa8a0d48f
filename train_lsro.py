"""Train a re-ID network on real and GAN-generated images with LSRO (Zheng et al., ICCV 2017).

A real image is taught its identity, a generated one the uniform distribution over all identities.

    python train_lsro.py --data_dir data/Market-1501-v15.09.15/pytorch --num_generated 24000

Generated images lie in <data_dir>/train_new/gen_0000, or in the folder that --gen_dir names.
Writes the run folder model/<name>/ (weights, options, log, curves).
"""

from pathlib import Path

from reid import engine, losses
from reid.dataset import GENERATED_FOLDER, count_classes, generated_images, training_splits
from reid.errors import is_first, run
from reid.options import (
    Parser,
    add_device_options,
    add_run_options,
    add_speed_options,
    add_training_options,
    at_least,
    parse_training,
)

DATA_DIR = "data/Market-1501-v15.09.15/pytorch"  # what prepare.py and changeIndex.py made
GEN_DIR = None  # generated images; None: <data_dir>/train_new/gen_0000
MODEL_DIR = "model"
NAME = "ft_ResNet50_lsro"


def get_parser():
    parser = Parser("Train a re-ID network on real and generated images with LSRO.")
    add_run_options(parser, NAME, MODEL_DIR)
    add_training_options(parser, DATA_DIR)
    group = parser.add_argument_group("generated images")
    group.add_argument(
        "--gen_dir",
        default=GEN_DIR,
        help=f"folder of generated images (default: <data_dir>/train_new/{GENERATED_FOLDER})",
    )
    group.add_argument(
        "--num_generated",
        type=at_least(0),
        help="how many of them to use, chosen by the seed (default: all)",
    )
    add_device_options(parser)
    add_speed_options(parser)
    return parser


def main(argv=None):
    args = parse_training(get_parser(), argv)
    real, validation = training_splits(args.data_dir, args.train_all)
    gen_dir = args.gen_dir or Path(args.data_dir) / "train_new" / GENERATED_FOLDER
    generated = generated_images(gen_dir, args.num_generated, args.seed)
    if is_first():
        print(f"{len(real)} real and {len(generated)} generated images")
    engine.train(args, real + generated, validation, count_classes(real + validation), losses.lsro)


if __name__ == "__main__":
    run(main)
