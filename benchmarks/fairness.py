"""Is the rendered stand-in a fair problem? Rank@1 of methods that should not solve it.

    python benchmarks/fairness.py --data_dir data/demo/pytorch --height 64 --width 32

Scores, on the test split, colour histograms of eight horizontal stripes and an untrained
DenseNet-121. A trained baseline should be far above all, and below perfect. The histogram of the
centre columns, where the person is, was the strongest of those tried.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model import ft_net_dense
from reid import metrics
from reid.dataset import eval_images
from reid.device import choose_device, dtype_for, set_up, to_device
from reid.errors import run
from reid.features import extract_batches
from reid.images import read_image
from reid.loading import EvalBatches
from reid.mat import feature_set
from reid.options import Parser, at_least
from reid.transforms import EvalTransform, enlarged

DATA_DIR = "data/demo/pytorch"
STRIPES = 8


def get_parser():
    parser = Parser("Rank@1 of a colour histogram and of an untrained network.")
    parser.add_argument("--data_dir", default=DATA_DIR, help="what prepare.py made")
    parser.add_argument("--height", type=at_least(32), default=64, help="of the network's images")
    parser.add_argument("--width", type=at_least(32), default=32, help="of the network's images")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the network's weights")
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    data_dir = Path(args.data_dir)
    splits = [eval_images(data_dir / name) for name in ("query", "gallery")]
    device, _ = choose_device()
    set_up(device)
    torch.manual_seed(args.seed)
    net = to_device(ft_net_dense(1), device)
    transform = EvalTransform(enlarged(args.height, args.width))

    def untrained(entries):
        batches = EvalBatches([entry.path for entry in entries], transform, 64, 2, device)
        return extract_batches(net, batches, dtype_for(device), "untrained")

    methods = {
        "stripe histogram, joint RGB 8x8x8": lambda entries: histograms(entries, joint_bins),
        "stripe histogram, RGB 16, centre columns": lambda entries: histograms(
            entries, centre_bins
        ),
        "untrained DenseNet-121": untrained,
    }
    for name, describe in methods.items():
        sets = [feature_set(describe(entries), entries, data_dir) for entries in splits]
        scores = metrics.evaluate(metrics.similarity_blocks(*sets), *sets)
        print(f"{name:42} Rank@1 {100 * scores.rank(1):5.2f}  mAP {100 * scores.mean_ap():5.2f}")


def histograms(entries, bins):
    """Square roots of each stripe's histogram: [N, D], rows L2-normalised.

    The dot product of two is Bhattacharyya's similarity, the usual one for histograms.
    """
    features = []
    for entry in tqdm(entries, desc="histogram", unit="image", disable=None):
        codes, number = bins(np.asarray(read_image(entry.path)).astype(int))
        stripes = np.array_split(codes, STRIPES)
        counts = [np.bincount(stripe.ravel(), minlength=number) for stripe in stripes]
        features.append(np.sqrt(np.concatenate(counts) / codes.size).astype(np.float32))
    return np.stack(features)


def joint_bins(pixels):
    """The colour cell of each pixel [H, W], eight steps a channel, and the number of cells."""
    return pixels // 32 @ np.array([64, 8, 1]), 8**3


def centre_bins(pixels):
    """Cells of each channel alone [H, W / 2, 3], sixteen steps, of the middle half of columns."""
    quarter = pixels.shape[1] // 4
    return pixels[:, quarter:-quarter] // 16 + np.array([0, 16, 32]), 48


if __name__ == "__main__":
    run(main)
