"""How long a query of search.py takes, and in how much memory.

    python benchmarks/search.py                         # 100,000 images, in memory and in a file
    python benchmarks/search.py --stream 1000000        # also a file of 4.3 GB

Makes index files of random features, in clusters as people's are, and a run folder with a random
network that makes as many numbers: DenseNet-121 1024, ResNet-50 2048, for images of 288x144. A
query is all there is to it: a JPEG file, decoded, resized, it and its mirror image through the
network, the ten nearest images and their paths; from a file, as in search.py, all features are read
for each query. Each turn is a process of its own; the table has medians and ranges over all queries
of all turns, and the largest peak memory of a whole process.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from PIL import Image
from tqdm import tqdm

NETWORKS = {1024: "DenseNet-121", 2048: "ResNet-50"}
SHARED = 0.7  # how similar two images of a cluster are
CLUSTER = 20  # images in one
TOP = 10


def get_parser():
    parser = argparse.ArgumentParser(description="Time queries of search.py.")
    parser.add_argument("--images", type=int, default=100_000, help="in the gallery in memory")
    parser.add_argument(
        "--dims", type=int, nargs="+", choices=NETWORKS, default=[1024, 2048], help="of features"
    )
    parser.add_argument("--stream", type=int, default=0, help="images of 1024 numbers in a file")
    parser.add_argument("--queries", type=int, default=20, help="queries a turn, from memory")
    parser.add_argument("--turns", type=int, default=3, help="processes for each row")
    parser.add_argument("--folder", help="where to keep the files made (default: nowhere)")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    if args.one:
        print(json.dumps(measure(*args.one, args.queries)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        print(
            "| gallery | network | load, s | query, s | features, s | search, s | peak, GB |"
            "\n|---|---|---:|---:|---:|---:|---:|"
        )
        for dim in args.dims:
            row(folder, args.images, dim, "memory", args)
            row(folder, args.images, dim, "file", args)
        if args.stream:
            row(folder, args.stream, 1024, "file", args)
    print(f"load average of the last minute: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


def row(folder, images, dim, where, args):
    """Measure and print a row of the table."""
    run, index = folder / f"run_{dim}", folder / f"{images}_{dim}.index"
    if not index.exists():  # under its name only when whole
        begun = index.with_suffix(".begun")
        begun.unlink(missing_ok=True)
        child(["--one", "make", str(run), str(begun)])
        begun.rename(index)
    queries = args.queries if where == "memory" else 3
    words = ["--one", where, str(run), str(index), "--queries", str(queries)]
    turns = [child(words) for _ in range(args.turns)]
    seconds = {
        part: [value for turn in turns for value in turn[part]]
        for part in ("load", "query", "features", "search")
    }
    cells = [f"{images:,} x {dim}, from {where}", NETWORKS[dim]]
    cells += [spread(values) for values in seconds.values()]
    cells += [f"{max(turn['memory'] for turn in turns):.2f}"]
    print(f"| {' | '.join(cells)} |", flush=True)


def spread(values):
    """Median and range."""
    if not values:
        return ""
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def child(words):
    """What a process of this script prints, from JSON."""
    done = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout)


def measure(what, run, index, queries):
    """Make an index file, or time queries with it: seconds of each, and peak memory in GB."""
    if what == "make":
        return make_files(Path(run), Path(index))
    from reid.device import choose_device, set_up
    from reid.features import Embedder
    from reid.gallery import Gallery

    set_up(choose_device()[0])
    embed = Embedder(run)
    found = {"load": [], "query": [], "features": [], "search": []}
    with Gallery(embed.made_by, embed.dim, index) as gallery:
        if what == "memory":
            started = time.perf_counter()
            gallery.load()
            found["load"].append(time.perf_counter() - started)
            for number in range(2):  # to warm up
                time_query(number, embed, gallery)
        for number in range(queries):
            features, search = time_query(number, embed, gallery)
            found["features"].append(features)
            found["search"].append(search)
            found["query"].append(features + search)
    found["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return found


def time_query(number, embed, gallery):
    """Seconds until a JPEG file's feature is there, and until its ranking is."""
    pixels = np.random.default_rng(number).integers(0, 256, (16, 8, 3), np.uint8)
    with tempfile.NamedTemporaryFile(suffix=".jpg") as file:
        Image.fromarray(pixels).resize((64, 128), Image.Resampling.BICUBIC).save(file.name)
        started = time.perf_counter()
        features = embed([file.name])
    embedded = time.perf_counter()
    assert len(gallery.search(features, TOP)[0]) == TOP
    return embedded - started, time.perf_counter() - embedded


def make_files(run, index):
    """A run folder of a random network, an index file of as many features as its name says."""
    from model import ft_net, ft_net_dense
    from reid.checkpoint import Run
    from reid.features import Embedder
    from reid.gallery import Gallery

    images, dim = map(int, index.stem.split("_"))
    if not run.exists():
        run.mkdir()
        Run(run).save_weights((ft_net_dense if dim == 1024 else ft_net)(751), "last")
    embed = Embedder(run)
    with Gallery(embed.made_by, dim, index) as gallery:
        for start in tqdm(range(0, images, 4096), desc=index.name, disable=None):
            for number, feature in enumerate(clustered(start, min(4096, images - start), dim)):
                path = f"/crops/{(start + number) // 1000:06d}/{start + number:09d}.jpg"
                gallery.add((path.encode(), 0, 0), feature)
            gallery.base.commit()
    return None


def clustered(start, number, dim):
    """Unit vectors [number, dim], of which CLUSTER at a time are near each other."""
    rng = np.random.default_rng(start)
    centres = rng.standard_normal((number // CLUSTER + 1, dim), np.float32) * SHARED**0.5
    features = rng.standard_normal((number, dim), np.float32) * (1 - SHARED) ** 0.5
    features += centres[np.arange(number) // CLUSTER]
    return features / np.linalg.norm(features, axis=1, keepdims=True)


if __name__ == "__main__":
    main()
