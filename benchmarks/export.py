"""How fast an exported network extracts features, beside PyTorch, on the CPU.

    python benchmarks/export.py                          # DenseNet-121 at 128x64
    python benchmarks/export.py --backbone resnet50
    python benchmarks/export.py --run model/ft_ResNet50  # a trained one: its network and size

Images are decoded and resized already: what is timed is from uint8 pixels to features, image and
mirror. int8 takes its ranges from the same images, which are noise unless --data_dir names a
prepared dataset; that changes no speed. Each measurement is a process of its own, for the threads
of PyTorch and of ONNX Runtime wait for work at each other's expense; they take turns, and the
table has medians, ranges, and the ratios turn by turn.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import onnxruntime
import torch
from tqdm import tqdm

from reid.checkpoint import Run, load_trained
from reid.dataset import eval_images
from reid.device import device_name, dtype_for, set_up
from reid.exporting.agreement import Eager, File, spread_out
from reid.exporting.network import metadata, torch_compute, torch_file
from reid.exporting.onnx_format import onnx_compute, onnx_file
from reid.features import Embedder
from reid.weights import build_network

CPU = torch.device("cpu")
EAGER, ONNX, EMBEDDER = "PyTorch, eager, fp32", "ONNX, fp32", "PyTorch, Embedder"
WAYS = (
    EAGER,
    f"{EMBEDDER}, fp32",  # batch norm folded, channels_last
    f"{EMBEDDER}, auto",
    ONNX,
    "ONNX, fp16",
    "ONNX, int8",
    "torch.export, fp32",
)
CALIBRATION = 64
IMAGES = "images.npy"


def get_parser():
    parser = argparse.ArgumentParser(description="Time exported networks against PyTorch.")
    parser.add_argument("--run", help="a run folder (default: a new network, random weights)")
    parser.add_argument("--backbone", default="densenet121", help="of a new network")
    parser.add_argument("--height", type=int, default=128, help="of a new network's images")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--data_dir", help="what prepare.py made (default: noise for images)")
    parser.add_argument("--batchsize", type=int, default=32)
    parser.add_argument("--batches", type=int, default=8, help="timed in a turn")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--fp16", action="store_true", help="also time fp16, which is slow")
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    if args.one:
        print(json.dumps(measure(args)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run = Path(args.run) if args.run else new_run(args, folder / "run")
        trained = load_trained(run)
        images = some_images(args, trained)
        np.save(folder / IMAGES, images)
        export_all(args, run, images, folder)
        ways = [way for way in WAYS if args.fp16 or "fp16" not in way]
        turns = [
            {way: child(args, way, run, folder) for way in ways}
            for _ in tqdm(range(args.turns), desc="turns", disable=None)
        ]
    height, width = trained.transform.size
    print(
        f"{trained.net.backbone}, images of {height}x{width}, batch {args.batchsize}, "
        f"{args.threads} threads, {device_name(CPU)}; torch {torch.__version__}, "
        f"onnxruntime {onnxruntime.__version__}; {args.turns} turns of {len(images)} images\n"
    )
    bf16 = "bf16" if dtype_for(CPU) is not None else "fp32, for bf16 is not fast here"
    print("| | images/s | times eager PyTorch | times ONNX fp32 |\n|---|---:|---:|---:|")
    for way in ways:
        cells = [spread([turn[way] for turn in turns], 0)]
        cells += [spread([turn[way] / turn[e] for turn in turns], 2) for e in (EAGER, ONNX)]
        print(f"| {way.replace('auto', bf16)} | {' | '.join(cells)} |")


def child(args, way, run, folder):
    """One measurement, as a process of its own."""
    command = [sys.executable, __file__, "--one", way, "--run", str(run), "--folder", str(folder)]
    command += ["--batchsize", str(args.batchsize), "--threads", str(args.threads)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def measure(args):
    """Images a second of one way, once it is warm."""
    set_up(CPU)
    torch.set_num_threads(1 if args.one.startswith("ONNX") else args.threads)
    images = list(np.load(Path(args.folder) / IMAGES))
    way = prepared_way(args)
    time_of(way, images[: 2 * args.batchsize], args.batchsize)
    return len(images) / time_of(way, images, args.batchsize)


def prepared_way(args):
    """A function of a batch of resized images, uint8 [H, W, 3] each, to features."""
    if args.one == EAGER:
        return Eager(load_trained(args.run)).of_batch
    kind, precision = args.one.rsplit(", ", 1)
    if kind == EMBEDDER:
        embed = Embedder(args.run, device="cpu", precision=precision)
        return lambda images: embed.of_batch([[image] for image in images])
    if kind == "torch.export":
        return File(*torch_compute(Path(args.folder) / "fp32.pt2")).of_batch
    return File(*onnx_compute(Path(args.folder) / f"{precision}.onnx", args.threads)).of_batch


def time_of(way, images, batchsize):
    """Seconds that a way takes for the features of all images."""
    started = time.perf_counter()
    for start in range(0, len(images), batchsize):
        way(images[start : start + batchsize])
    return time.perf_counter() - started


def spread(values, digits):
    """Median (smallest to largest)."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def export_all(args, run, images, folder):
    """Write the files to measure."""
    precisions = ["fp32", "int8", *(["fp16"] if args.fp16 else [])]
    for precision in tqdm(precisions, desc="exporting", disable=None):
        trained = load_trained(run)
        facts = metadata(trained, "benchmark", precision, "outside")
        extra = {"calibration": images[:CALIBRATION]} if precision == "int8" else {}
        (folder / f"{precision}.onnx").write_bytes(onnx_file(trained, facts, **extra))
    trained = load_trained(run)
    facts = metadata(trained, "benchmark", "fp32", "outside")
    (folder / "fp32.pt2").write_bytes(torch_file(trained, facts))


def some_images(args, trained):
    """Resized images: list of uint8 [H, W, 3]."""
    count = args.batchsize * args.batches
    if args.data_dir:
        entries = spread_out(eval_images(Path(args.data_dir) / "gallery"), count)
        read = trained.transform.read
        return [read(entry.path) for entry in entries]
    noise = partial(np.random.default_rng(0).integers, 0, 256, dtype=np.uint8)
    return list(noise((count, *trained.transform.size, 3)))


def new_run(args, path):
    """A run folder with a new network."""
    torch.manual_seed(0)
    net = build_network(args.backbone, 751, size=(args.height, args.width))
    run = Run(path)
    run.start({"height": args.height, "width": args.width}, {})
    run.save_weights(net, "last")
    return path


if __name__ == "__main__":
    main()
