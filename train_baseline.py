"""Train a re-ID network on real images with cross-entropy: the baseline.

    python train_baseline.py --data_dir data/Market-1501-v15.09.15/pytorch --name ft_ResNet50
    python train_baseline.py --use_dense --batchsize 32 --train_all --name ft_DenseNet121

Writes the run folder model/<name>/ (weights, options, log, curves).
"""

from reid import engine, losses
from reid.dataset import training_splits
from reid.distributed import join_world
from reid.errors import run
from reid.options import (
    Parser,
    add_device_options,
    add_run_options,
    add_speed_options,
    add_training_options,
    parse_training,
)

DATA_DIR = "data/Market-1501-v15.09.15/pytorch"  # what prepare.py and changeIndex.py made
MODEL_DIR = "model"
NAME = "ft_ResNet50"


def get_parser():
    parser = Parser("Train a re-ID network on real images.")
    add_run_options(parser, NAME, MODEL_DIR)
    add_training_options(parser, DATA_DIR)
    add_device_options(parser)
    add_speed_options(parser)
    return parser


def main(argv=None):
    args = parse_training(get_parser(), argv)
    world = join_world(args.gpu_ids)
    with world.together():
        splits = training_splits(
            args.data_dir, args.train_all, args.val_ids, args.num_ids, args.seed
        )
    with engine.opened(args, world, splits, losses.cross_entropy) as training:
        training.run()


if __name__ == "__main__":
    run(main, torchrun=True)
