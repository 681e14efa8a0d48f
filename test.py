"""Extract the features of query and gallery with a trained network: writes `pytorch_result.mat`.

    python test.py --name ft_ResNet50 --which_epoch best --test_dir data/Market/pytorch
    python test.py --name ft_ResNet50 --val --mat val.mat    # for evaluate.py --calibrate

Which network it is, how many classes it has, and the size of its images are read from the run
folder; nothing needs to be repeated here. (The project's tests are in tests/.)
"""

from pathlib import Path

import numpy as np
import torch

from reid.checkpoint import load_trained
from reid.dataset import test_images
from reid.device import arithmetic, place
from reid.errors import UserError, run
from reid.features import combined, extract, made_by
from reid.files import check_writable
from reid.inference import frozen
from reid.loading import EvalBatches
from reid.mat import TestSets, feature_set, save_mat
from reid.options import (
    Parser,
    add_device_options,
    add_feature_options,
    add_run_options,
    at_least,
)
from reid.parallel import join_world, leave_world
from reid.transforms import test_transform

DATA_DIR = "data/Market-1501-v15.09.15/pytorch"  # what prepare.py made
MODEL_DIR = "model"
NAME = "ft_ResNet50"
MAT = "pytorch_result.mat"


def get_parser():
    parser = Parser("Extract features of query and gallery into a .mat file.")
    add_run_options(parser, NAME, MODEL_DIR)
    parser.add_argument(
        "--data_dir",
        "--test_dir",
        default=DATA_DIR,
        help="the `pytorch` folder that prepare.py made; both flags mean the same",
    )
    parser.add_argument("--mat", default=MAT, help="file to write")
    others = parser.add_mutually_exclusive_group()
    others.add_argument(
        "--multi",
        action="store_true",
        help="also extract `multi-query`: evaluate.py then scores multi-query, too",
    )
    others.add_argument(
        "--val",
        action="store_true",
        help="the validation data in place of the test data: `val` as query, `train` as gallery",
    )
    parser.add_argument(
        "--use_dense",
        action="store_true",
        help="expect a DenseNet-121; not needed, the weights tell",
    )
    parser.add_argument("--batchsize", type=at_least(1), default=64, help="images in a batch")
    parser.add_argument(
        "--height", type=at_least(32), help="image height in training (default: the run's, or 256)"
    )
    parser.add_argument(
        "--width", type=at_least(32), help="image width in training (default: the run's, or 128)"
    )
    add_feature_options(parser)
    add_device_options(parser)
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    check_writable(args.mat)
    world = join_world(args.gpu_ids)
    data_dir = Path(args.data_dir)
    if not data_dir.is_dir():
        raise UserError(f"{data_dir}: no such folder; name the prepared dataset with --data_dir")
    names = ["val", "train"] if args.val else ["query", "gallery"]
    names += ["multi-query"] if args.multi else []
    splits = [test_images(data_dir / name) for name in names]

    run_folder = Path(args.model_dir) / args.name
    trained = load_trained(
        run_folder, args.which_epoch, args.use_dense or None, args.height, args.width
    )
    world.say(
        f"{trained.weights}: {type(trained.net).__name__}, trained at "
        f"{trained.height}x{trained.width}, on {world.device}"
    )
    dtype = arithmetic(world.device, args.precision, world.gpus)
    source = {"run": str(run_folder.resolve()), "split": names[0]}
    source |= made_by(trained, args.which_layer, args.ms)
    net = place(frozen(trained.net, dtype), world.device)
    if world.gpus:
        net = torch.nn.DataParallel(net, world.gpus)

    sets = []
    for name, entries in zip(names, splits, strict=True):
        features = split_features(net, name, [e.path for e in entries], trained, args, world, dtype)
        if world.first:
            sets.append(feature_set(features, entries, data_dir))
    leave_world()
    if not world.first:
        return
    query, gallery, multi = sets if args.multi else (*sets, None)
    save_mat(args.mat, TestSets(query, gallery, multi, data_dir.resolve(), source))
    counts = ", ".join(
        f"{len(entries)} {name}" for name, entries in zip(names, splits, strict=True)
    )
    print(f"{args.mat}: {counts} images")


def split_features(net, name, paths, trained, args, world, dtype):
    """Features [N, D] of a split's images, shared out among the processes; for the first of them.

    trained: `reid.checkpoint.Trained`, whose `net` is the network by now on its devices.
    """
    scales = []
    for scale in args.ms:
        transform = test_transform(trained.height, trained.width, scale)
        batches = EvalBatches(
            world.share(paths), transform, args.batchsize, args.workers, world.device
        )
        label = f"{name}, size {scale:g}" if len(args.ms) > 1 else name
        label = label if world.first else None
        scales.append(extract(net, batches, dtype, label, args.which_layer))
    parts = world.collect(combined(scales))
    return np.concatenate(parts) if world.first else None


if __name__ == "__main__":
    run(main)
