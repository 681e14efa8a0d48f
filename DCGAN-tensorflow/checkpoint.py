"""Checkpoints of a run: .npz files of plain arrays, the same for both backends.

ckpt-0005.npz    the whole training state after five epochs; the last two checkpoints are kept
healthy.npz      a copy of the last checkpoint whose samples had not collapsed (see watch.py)
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
    """Return the numbered checkpoints in `folder`, the newest last."""
    paths = [p for p in folder.glob("ckpt-*.npz") if re.fullmatch(r"ckpt-\d+", p.stem)]
    return sorted(paths, key=lambda path: int(path.stem.removeprefix("ckpt-")))


def find(folder: Path, which: str) -> Path:
    """Return the path of the "last" or the "healthy" checkpoint in `folder`."""
    paths = numbered(folder)
    if which == "last" and paths:
        return paths[-1]
    if which == "healthy" and (folder / HEALTHY).is_file():
        return folder / HEALTHY
    if paths:
        raise UserError(
            f"--which healthy: there is no {folder / HEALTHY}; no checkpoint's samples were found "
            "varied enough; train longer, or leave the flag out"
        )
    raise UserError(
        f"--checkpoint_dir: no checkpoint in {folder}; train first (--train) or name its folder"
    )


def save(folder: Path, epochs: int, arrays: dict[str, np.ndarray], healthy: bool = False) -> None:
    """Write a checkpoint, whole or not at all, and delete all numbered ones but the last two."""
    path = folder / f"ckpt-{epochs:04d}.npz"
    # healthy.npz comes first: a run that is killed between the two goes on from the checkpoint
    # before and writes both again. In the other order it would go on from the new checkpoint, and
    # healthy.npz would stay an old one.
    for each in [folder / HEALTHY, path] if healthy else [path]:
        with replacing(each) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays)  # an open file: to a name np.savez would add .npz
    for old in numbered(folder)[:-KEPT]:
        old.unlink()


def load(path: Path) -> tuple[dict[str, np.ndarray], str]:
    """Return all arrays of a checkpoint and the file's SHA-256.

    Raises UserError where the file is damaged.
    """
    with open(path, "rb") as file:  # opened once: a training may replace it meanwhile
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        try:
            with np.load(file) as arrays:
                return dict(arrays), digest  # reading an array checks its checksum
        except MemoryError:
            raise
        except Exception as error:  # numpy and zipfile raise many kinds
            raise UserError(
                f"--checkpoint_dir: cannot load {path} ({error}); delete it to go on from another"
            ) from error
