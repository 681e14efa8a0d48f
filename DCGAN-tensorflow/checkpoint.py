"""A run's checkpoints: .npz files of plain arrays, the same for each backend.

ckpt-0005.npz    all of the training state after five whole epochs; the last two are kept
healthy.npz      the last one whose samples were as varied as they should be (see watch.py)
"""

import hashlib
import re
from pathlib import Path

import numpy as np
from errors import UserError
from files import replacing

KEPT = 2
HEALTHY = "healthy.npz"


def numbered(folder: Path) -> list[Path]:
    """The numbered checkpoints in `folder`, the newest last."""
    found = [p for p in folder.glob("ckpt-*.npz") if re.fullmatch(r"ckpt-\d+", p.stem)]
    return sorted(found, key=lambda path: int(path.stem.removeprefix("ckpt-")))


def find(folder: Path, which: str) -> Path:
    """The "last" or the "healthy" checkpoint in `folder`, to generate from."""
    found = numbered(folder)
    if which == "last" and found:
        return found[-1]
    if which == "healthy" and (folder / HEALTHY).is_file():
        return folder / HEALTHY
    if found:
        raise UserError(
            f"--which healthy: there is no {folder / HEALTHY}; no checkpoint's samples were found "
            "varied enough; train longer, or leave the flag out"
        )
    raise UserError(
        f"--checkpoint_dir: no checkpoint in {folder}; train first (--train) or name its folder"
    )


def save(folder: Path, epochs: int, arrays: dict[str, np.ndarray], healthy: bool = False) -> None:
    """Write a checkpoint, whole or not at all, and delete those that are not kept."""
    path = folder / f"ckpt-{epochs:04d}.npz"
    # healthy.npz first: killed between the two, a run goes on from before and writes both again.
    # The other way round it would go on from a checkpoint that healthy.npz knows nothing of.
    for each in [folder / HEALTHY, path] if healthy else [path]:
        with replacing(each) as temporary, open(temporary, "wb") as file:  # a name without .npz
            np.savez(file, **arrays)
    for old in numbered(folder)[:-KEPT]:
        old.unlink()


def load(path: Path) -> tuple[dict[str, np.ndarray], str]:
    """All arrays of a checkpoint, and the file's SHA-256; a damaged file is an error."""
    with open(path, "rb") as file:  # once: a training may put another file in its place
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        try:
            with np.load(file) as arrays:
                return dict(arrays), digest  # reading an array to its end compares its checksum
        except Exception as error:  # a damaged file raises anything
            raise UserError(
                f"--checkpoint_dir: cannot load {path} ({error}); delete it to go on from another"
            ) from error
