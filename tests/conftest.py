"""What several tests need: fixtures on disk, tiny datasets, scripts run as a user runs them."""

import os
import subprocess
import sys
from pathlib import Path

# A thread a process, since there is a process a core; PyTorch reads this as it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from PIL import Image

from reid.errors import run
from reid.mat import EvalSets, FeatureSet
from reid.weights import build_network

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = Path(__file__).parent / "fixtures"
# A training that takes a second: timm's network for tests has a twentieth of DenseNet's weights.
TINY = (
    "--gpu_ids -1 --pretrained none --backbone test_resnet --height 64 --width 32 --precision fp32"
)


def tiny_network(class_num=3):
    """The network that `TINY` trains."""
    return build_network("test_resnet", class_num, size=(64, 32))


def run_script(*words, cwd=ROOT):
    """Run a script of the root as a process; returns (exit code, stdout, stderr)."""
    script, *flags = map(str, words)
    done = subprocess.run(
        [sys.executable, ROOT / script, *flags],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    return done.returncode, done.stdout, done.stderr


def call(main, *flags):
    """Call a script's main with flags of any type."""
    main([str(flag) for flag in flags])


def exit_code(main, *flags):
    """What a process that calls `main` with these flags exits with."""
    try:
        run(lambda: call(main, *flags))
    except SystemExit as stop:
        return stop.code
    return 0


def save_image(path, seed=None, size=(64, 128)):
    """Write a random JPEG or PNG; without a seed, of another name there is another picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if seed is None:
        seed = list(os.fsencode("/".join(path.parts[-4:])))
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def make_market(folder):
    """Make a raw Market-1501 folder: 3 training ids, 2 query ids, a distractor, junk, gt_bbox."""
    names = {
        "bounding_box_train": [
            f"{identity}_c{camera}s1_00000{shot}_01.jpg"
            for identity in ("0002", "0007", "0010")
            for camera in (1, 2)
            for shot in (1, 2)
        ],
        "query": ["0001_c1s1_000001_00.jpg", "0001_c2s1_000002_00.jpg", "0003_c3s1_000003_00.jpg"],
        "bounding_box_test": [
            "-1_c1s1_000001_01.jpg",
            "0000_c2s1_000001_01.jpg",
            "0001_c1s1_000004_01.jpg",
            "0001_c2s1_000005_01.jpg",
            "0003_c1s1_000006_01.jpg",
        ],
        "gt_bbox": [
            "0001_c1s1_000001_00.jpg",
            "0001_c1s1_000004_00.jpg",
            "0002_c1s1_000001_00.jpg",
        ],
    }
    for subfolder, files in names.items():
        for name in files:
            save_image(folder / subfolder / name)
    # A stand-in, so that nobody is warned of its size.
    (folder / "synthetic_market.json").write_text("{}")
    return folder


def make_prepared(market):
    """Make the `pytorch` folder of a raw one, classes numbered."""
    import changeIndex
    import prepare

    call(prepare.main, "--download_path", market)
    call(changeIndex.main, "--data_dir", market / "pytorch")
    return market / "pytorch"


@pytest.fixture
def market(tmp_path):
    """A raw Market-1501 folder, see `make_market`."""
    return make_market(tmp_path / "market")


@pytest.fixture
def prepared(market):
    """The `pytorch` folder made from `market`, classes numbered."""
    return make_prepared(market)


def random_sets(dim=4, seed=0, noise=0.5):
    """`reid.mat.EvalSets` of 12 queries, 60 gallery and 30 multi-query images of 6 identities."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(7, dim))

    def some(name, count, lowest):
        identities = rng.integers(lowest, 7, count)
        features = centres[identities] + rng.normal(scale=noise, size=(count, dim))
        features /= np.linalg.norm(features, axis=1, keepdims=True)
        cameras = rng.integers(1, 4, count)
        files = [
            f"{name}/{i:04d}/{i:04d}_c{c}_ü{n}.jpg"
            for n, (i, c) in enumerate(zip(identities, cameras, strict=True))
        ]
        return FeatureSet(features.astype(np.float32), identities, cameras, np.array(files))

    return EvalSets(
        some("query", 12, 1), some("gallery", 60, -1), some("multi-query", 30, 1), Path("data/x")
    )
