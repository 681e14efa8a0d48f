"""A run's checkpoints: .npz files of plain arrays, the same for each backend.

ckpt-0005.npz    all of the training state after five whole epochs; the last two are kept
healthy.npz      the last one whose samples were as varied as they should be (see watch.py)
"""

import hashlib
import re
from pathlib import Path

import numpy as np
from utils import fail, write_whole

KEPT = 2
HEALTHY = "healthy.npz"


def numbered(folder: Path) -> list[Path]:
    """The numbered checkpoints in `folder`, the newest last."""
    found = [p for p in folder.glob("ckpt-*.npz") if re.fullmatch(r"ckpt-\d+", p.stem)]
    return sorted(found, key=lambda path: int(path.stem.removeprefix("ckpt-")))


def save(folder: Path, epochs: int, arrays: dict[str, np.ndarray], healthy: bool = False) -> None:
    """Write a checkpoint, whole or not at all, and delete those that are not kept."""
    path = folder / f"ckpt-{epochs:04d}.npz"

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:  # a name without .npz
            np.savez(file, **arrays)

    write_whole(path, write)
    if healthy:
        write_whole(folder / HEALTHY, write)
    for old in numbered(folder)[:-KEPT]:
        old.unlink()


def load(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a checkpoint; a damaged file is an error."""
    try:
        with np.load(path) as arrays:
            return dict(arrays)  # reading an array to its end compares its checksum
    except Exception as problem:  # a damaged file raises anything
        fail(f"--checkpoint_dir: cannot load {path} ({problem}); delete it to go on from another")


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
