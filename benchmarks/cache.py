"""How soon a run can begin and how much memory it takes, by --cache, at Market-1501's size.

    python benchmarks/cache.py
    python benchmarks/cache.py --processes 1 8

Processes of their own, as torchrun or an ablation starts them, each decode or map all training
images and look at every pixel. The table has the seconds until the last of them has its images
(importing left out), without and with the decoded file of an earlier run, and the memory of all
of them together, shared pages counted once; that of processes without images is taken off.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model import IMAGENET
from reid.dataset import labelled_images
from reid.loading import read_all
from reid.transforms import TrainTransform

DATA_DIR = "data/demo/pytorch"
MARKET_IMAGES = 12_936


def get_parser():
    parser = argparse.ArgumentParser(description="Time and weigh the ways of keeping images.")
    parser.add_argument("--data_dir", default=DATA_DIR, help="what changeIndex.py made")
    parser.add_argument("--images", type=int, default=MARKET_IMAGES, help="repeated up to so many")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--one", nargs=2, metavar=("MODE", "FOLDER"), help=argparse.SUPPRESS)
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    if args.one:
        one(args, *args.one)
        return
    print(f"{args.images:,} images, 256x128\n")
    print("| `--cache` | processes | first start, s | next start, s | memory of all, GB |")
    print("|---|---:|---:|---:|---:|")
    for number in args.processes:
        _, without = together(args, "off", number, "")
        for mode in ("ram", "file"):
            with tempfile.TemporaryDirectory(dir=args.data_dir) as folder:
                first, _ = together(args, mode, number, folder)
                again, memory = together(args, mode, number, folder)
            cells = [f"{first:.1f}", f"{again:.1f}", f"{memory - without:.2f}"]
            print(f"| {' | '.join([mode, str(number), *cells])} |", flush=True)


def together(args, mode, number, folder):
    """Have processes get all images at once: seconds of the slowest, gigabytes of all of them."""
    flags = ["--data_dir", args.data_dir, "--images", str(args.images), "--one", mode, folder]
    children = [
        subprocess.Popen(
            [sys.executable, __file__, *flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(number)
    ]
    for child in children:
        child.stdout.readline()  # it has imported what it needs
    for child in children:
        child.stdin.write("start\n")
        child.stdin.flush()
    seconds = max(float(child.stdout.readline()) for child in children)
    gigabytes = sum(proportional(child.pid) for child in children)
    for child in children:
        child.communicate()
        assert child.returncode == 0
    return seconds, gigabytes


def proportional(pid):
    """Return the gigabytes of a process; of a page that several map, each counts its part."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) / 1e6 for line in lines if line.startswith("Pss:"))


def one(args, mode, folder):
    """Get all images when told to, say how long that took, and keep them until stdin ends."""
    paths = [sample.path for sample in labelled_images(Path(args.data_dir) / "train_new")]
    paths = (paths * (args.images // len(paths) + 1))[: args.images]
    transform = TrainTransform(256, 128, IMAGENET, erasing_p=0)
    about = [transform.full_height, transform.full_width]
    print("ready", flush=True)
    sys.stdin.readline()
    started = time.perf_counter()
    images = read_all([paths], transform.read, 2, mode, None, Path(folder), about)
    for image in images or ():
        image.max()
    print(time.perf_counter() - started, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
