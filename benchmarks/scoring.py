"""How fast evaluate.py and evaluate_rerank.py are, in how much memory, against the plain way.

    python benchmarks/scoring.py                       # Market-1501's size, with the plain way
    python benchmarks/scoring.py --size msmt17         # MSMT17's size, ours alone
    python benchmarks/scoring.py --distractors 100000  # Market-1501 with distractors, ours alone

Makes a file of random features of a difficulty like a trained network's, runs each script as a
user would, in turn, and prints a Markdown table: seconds and peak memory of the whole process. The
plain way is benchmarks/dense.py; both must give the same distances and scores, or this fails. The
floor is the time of the dot products alone, at the rate of NumPy's matrix multiplication here.
Ratios are of medians.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["OPENBLAS_THREAD_TIMEOUT"] = "4"  # for this process, as re_ranking.py has it

import numpy as np
from tqdm import tqdm

from re_ranking import make_plan, rerank
from reid import metrics
from reid.mat import EvalSets, FeatureSet, load_mat, save_mat

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = "OPENBLAS_THREAD_TIMEOUT"
DIM = 1024
# queries, gallery images of identities, of distractors (0) and junk (-1), identities, cameras
SIZES = {
    "market1501": (3368, 13115, 2798, 3819, 750, 6),
    "msmt17": (11659, 82161, 0, 0, 3060, 15),
    "tiny": (100, 500, 100, 50, 25, 6),
}


def get_parser():
    parser = argparse.ArgumentParser(description="Time scoring and re-ranking as whole processes.")
    parser.add_argument("--size", choices=SIZES, default="market1501", help="the dataset's size")
    parser.add_argument("--distractors", type=int, default=0, help="further gallery images")
    parser.add_argument("--repeats", type=int, default=3, help="runs of ours")
    parser.add_argument("--dense_repeats", type=int, default=1, help="runs of the plain way")
    parser.add_argument("--folder", help="where to keep the files made (default: nowhere)")
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        mat = folder / f"{args.size}_{args.distractors}.mat"
        if not mat.exists():
            make_file(mat, *SIZES[args.size], args.distractors)
        dense = args.size != "msmt17" and not args.distractors
        measure(mat, folder, args, args.dense_repeats if dense else 0)


def measure(mat, folder, args, dense_repeats):
    """Run all scripts in turn and print the table."""
    dense, saved = str(ROOT / "benchmarks/dense.py"), folder / "dense.npy"
    commands = {
        "evaluate.py": ["evaluate.py", str(mat)],
        "evaluate_rerank.py": ["evaluate_rerank.py", str(mat)],
    }
    plain = {
        "evaluate.py": [dense, "evaluate", str(mat)],
        "evaluate_rerank.py": [dense, "rerank", str(mat), "--save", str(saved)],
    }
    runs = {}
    for number in range(max(args.repeats, dense_repeats)):
        for name in commands:
            if number < args.repeats:
                runs.setdefault((name, "ours"), []).append(run(commands[name]))
            if number < dense_repeats:
                runs.setdefault((name, "plain"), []).append(run(plain[name]))
    print("| | seconds: median (all) | ratio | peak memory, GB | scores |\n|---|---|---:|---:|---|")
    for (name, whose), results in runs.items():
        seconds = sorted(r[0] for r in results)
        ratio = ""
        if whose == "plain":
            ours = statistics.median(r[0] for r in runs[name, "ours"])
            ratio = f"{statistics.median(seconds) / ours:.1f}"
        every = ", ".join(f"{s:.1f}" for s in seconds)
        memory = max(r[1] for r in results)
        cells = [
            f"{name}, {whose}",
            f"{statistics.median(seconds):.1f} ({every})",
            ratio,
            f"{memory:.2f}",
        ]
        print(f"| {' | '.join([*cells, results[0][2]])} |")
    if dense_repeats:
        for name in commands:
            scores = {line for whose in ("ours", "plain") for _, _, line in runs[name, whose]}
            if len(scores) > 1:
                sys.exit(f"{name}: scores differ: {' / '.join(scores)}")
    parts(mat, saved if dense_repeats else None)


# Started in between, because a process's peak memory counts what its parent held when it began.
LAUNCHER = """
import resource, subprocess, sys, time
started = time.perf_counter()
done = subprocess.run([sys.executable, *sys.argv[1:]], stdout=subprocess.PIPE, text=True)
print(time.perf_counter() - started)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
print(done.stdout)
sys.exit(done.returncode)
"""


def run(command):
    """Seconds, peak memory in GB and the line of scores of `python command`."""
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER, *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={name: text for name, text in os.environ.items() if name != TIMEOUT},
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)}: failed")
    seconds, memory, *text = done.stdout.splitlines()
    line = next(line for line in text if line.startswith("top1:"))
    return float(seconds), float(memory) / 1e6, line


def parts(mat, dense):
    """Print the time of the computation alone, its floor, and how far from `dense` distances."""
    sets = load_mat(mat)
    query, gallery = sets.query, sets.gallery
    started = time.perf_counter()
    metrics.evaluate(metrics.similarity_blocks(query, gallery), query, gallery)
    print(f"\nevaluate, computation alone: {time.perf_counter() - started:.2f} s")
    started = time.perf_counter()
    for _ in rerank(query.features, gallery.features):
        pass
    print(f"re-ranking, computation alone: {time.perf_counter() - started:.2f} s")
    rate = multiplication_rate()
    q, g = len(query.features), len(gallery.features)
    again = 0 if make_plan(q, g, DIM).keep else 2 * q * g
    flops = DIM * ((q + g) ** 2 + again)  # half of the symmetric square
    print(
        f"its dot products: {flops / 1e12:.2f} TFLOP, at {rate / 1e9:.0f} GFLOP/s measured here "
        f"{flops / rate:.1f} s"
    )
    if dense is not None:
        expected, start, worst = np.load(dense, mmap_mode="r"), 0, 0.0
        for block in rerank(query.features, gallery.features):
            worst = max(worst, np.abs(block - expected[start : start + len(block)]).max())
            start += len(block)
        print(f"largest difference to the plain way's re-ranked distances: {worst:.1e}")
        if worst > 1e-5:
            sys.exit("more than the 1e-5 allowed")


def multiplication_rate():
    """Floating-point operations a second of a large float32 matrix multiplication."""
    a = np.random.default_rng(0).standard_normal((4096, DIM), dtype=np.float32)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        a @ a[:2048].T
        times.append(time.perf_counter() - started)
    return 2 * 4096 * 2048 * DIM / min(times)


def make_file(path, queries, images, distractors, junk, identities, cameras, more):
    """Write random features: an image is its person, its camera and noise, weak or strong.

    Three people look alike each time: Rank@1 is in the nineties and mAP far below, as in practice.
    Identities are sorted, as folders of images are. Distractors and junk are nobody's.
    """
    rng = np.random.default_rng(0)
    people = np.concatenate([
        np.full(junk, -1), np.zeros(distractors + more, np.int64),
        np.sort(rng.integers(1, identities + 1, images)),
    ])  # fmt: skip
    sets = []
    looks = rng.standard_normal((identities // 3 + 1, DIM), dtype=np.float32)
    centres = 0.6 * rng.standard_normal((identities + 1, DIM), dtype=np.float32)
    centres += looks[np.arange(identities + 1) // 3]
    views = rng.standard_normal((cameras + 1, DIM), dtype=np.float32)
    for ids in (np.sort(rng.integers(1, identities + 1, queries)), people):
        seen_by = rng.integers(1, cameras + 1, len(ids))
        features = np.empty((len(ids), DIM), np.float32)
        for start in tqdm(range(0, len(ids), 4096), desc=path.name, disable=None):
            rows = slice(start, start + 4096)
            part = rng.standard_normal((len(ids[rows]), DIM), dtype=np.float32)
            strength = 1.2 * np.exp(0.45 * rng.standard_normal(len(part)))
            part *= strength[:, None].astype(np.float32)
            known = ids[rows] > 0
            part[known] += centres[ids[rows][known]]
            part += 0.4 * views[seen_by[rows]] + 1
            features[rows] = part / np.linalg.norm(part, axis=1, keepdims=True)
        sets.append(FeatureSet(features, ids, seen_by))
    save_mat(path, EvalSets(*sets))


if __name__ == "__main__":
    main()
