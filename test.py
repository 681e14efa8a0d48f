"""Extract the features of query and gallery with a trained network: writes `pytorch_result.mat`.

    python test.py --name ft_ResNet50 --which_epoch best --test_dir data/Market/pytorch

Which network it is, how many classes it has, and the size of its images are read from the run
folder; nothing needs to be repeated here. (The project's tests are in tests/.)
"""

from pathlib import Path

import numpy as np
import torch

from reid.checkpoint import Run, load_network
from reid.dataset import test_images
from reid.device import arithmetic, place
from reid.errors import UserError, run
from reid.features import extract
from reid.files import check_writable
from reid.loading import EvalBatches
from reid.mat import TestSets, feature_set, save_mat
from reid.options import Parser, add_device_options, add_run_options, at_least
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
    parser.add_argument(
        "--which_epoch", default="last", help="last, best, or the number of a saved epoch"
    )
    parser.add_argument("--mat", default=MAT, help="file to write")
    parser.add_argument(
        "--multi",
        action="store_true",
        help="also extract `multi-query`: evaluate.py then scores multi-query, too",
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
    add_device_options(parser)
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    check_writable(args.mat)
    world = join_world(args.gpu_ids)
    data_dir = Path(args.data_dir)
    if not data_dir.is_dir():
        raise UserError(f"{data_dir}: no such folder; name the prepared dataset with --data_dir")
    names = ["query", "gallery", *(["multi-query"] if args.multi else [])]
    splits = [test_images(data_dir / name) for name in names]

    trained = Run(Path(args.model_dir) / args.name)
    options = trained.opts().get("options", {})
    weights = trained.weights_file(args.which_epoch)
    net = load_network(weights, args.use_dense or options.get("use_dense"))
    height = args.height or options.get("height", 256)
    width = args.width or options.get("width", 128)
    world.say(f"{weights}: {type(net).__name__}, trained at {height}x{width}, on {world.device}")
    net = place(net, world.device)
    if world.gpus:
        net = torch.nn.DataParallel(net, world.gpus)

    transform = test_transform(height, width)
    dtype = arithmetic(world.device, args.precision, world.gpus)
    sets = []
    for name, entries in zip(names, splits, strict=True):
        paths = [entry.path for entry in world.share(entries)]
        batches = EvalBatches(paths, transform, args.batchsize, args.workers, world.device)
        label = name if world.first else None
        parts = world.collect(extract(net, batches, world.device, dtype, label))
        if world.first:
            sets.append(feature_set(np.concatenate(parts), entries, data_dir))
    leave_world()
    if not world.first:
        return
    query, gallery, multi = sets if args.multi else (*sets, None)
    save_mat(args.mat, TestSets(query, gallery, multi, data_dir.resolve()))
    counts = ", ".join(
        f"{len(entries)} {name}" for name, entries in zip(names, splits, strict=True)
    )
    print(f"{args.mat}: {counts} images")


if __name__ == "__main__":
    run(main)
