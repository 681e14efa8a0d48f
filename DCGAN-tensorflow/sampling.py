"""Generate what --options asks for: single images, grids and GIFs."""

import math
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import utils
from files import new_folder, write_json
from PIL import Image
from tqdm import tqdm

if TYPE_CHECKING:
    from model import DCGAN

VALUES = 8  # values from -1 to 1 that a sweep gives to a dimension of z
FIGURES = 8  # figures side by side in a sweep
PICKED = 8  # dimensions that --options 2 sweeps


def write_singles(gan: "DCGAN", n: int, seed: int, output: Path, about: dict) -> None:
    """Write exactly `n` images, gen_00000.png ..., and manifest.json to the new folder `output`.

    `about` is added to the manifest.
    """
    rng = np.random.default_rng(seed)
    digits = max(5, len(str(n - 1)))
    manifest = {
        "count": n,
        "seed": seed,
        "height": gan.height,
        "width": gan.width,
        **about,
        "backend": gan.backend,
        "versions": {name: metadata.version(name) for name in ("keras", gan.backend, "numpy")},
        "command": utils.command_line(),
    }
    with (
        tqdm(total=n, desc="generating", unit="image", disable=None) as bar,
        new_folder(output) as folder,
    ):
        for start in range(0, n, 64):
            made = gan.generate(gan.noise(min(64, n - start), rng))
            for i, image in enumerate(made, start):
                target = folder / f"gen_{i:0{digits}d}.png"
                utils.write_image(target, Image.fromarray(image), "PNG")
            bar.update(len(made))
        write_json(folder / utils.MANIFEST, manifest)


def visualize(gan: "DCGAN", option: int, folder: Path, n: int, seed: int) -> None:
    """Write the grids or GIFs of --options 0..4 to `folder`; a grid of `n` images for option 0."""
    rng = np.random.default_rng(seed)
    if option == 0:
        utils.save_png(folder / "grid.png", utils.grid(gan.generate(gan.noise(n, rng)), square(n)))
    elif option == 4:
        # One figure many times: copy d sweeps dimension d.
        z, d = np.repeat(gan.noise(1, rng), gan.z_dim, axis=0), np.arange(gan.z_dim)
        frames = [utils.grid(made, square(gan.z_dim)) for made in sweep(gan, z, (d, d))]
        utils.save_gif(folder / "sweeps.gif", frames)
    else:
        z = gan.noise(FIGURES, rng)
        picked = sorted(rng.permutation(gan.z_dim)[:PICKED])
        for d in tqdm(picked if option == 2 else range(gan.z_dim), unit="z", disable=None):
            made = sweep(gan, z, (slice(None), d))
            if option == 1:  # a row is a figure, a column a value of z
                picture = utils.grid(np.concatenate(made.swapaxes(0, 1)), VALUES)
                utils.save_png(folder / f"sweep_{d:03d}.png", picture)
            else:
                frames = [utils.grid(frame, FIGURES) for frame in made]
                utils.save_gif(folder / f"sweep_{d:03d}.gif", frames)


def square(n: int) -> int:
    """Return the number of columns with which a grid of `n` images has about as many rows."""
    return math.ceil(n**0.5)


def sweep(gan: "DCGAN", z: np.ndarray, index) -> np.ndarray:
    """Generate images `[VALUES, N, H, W, 3]` from z `[N, z_dim]`, z[index] going from -1 to 1."""
    copies = np.repeat(z[None], VALUES, axis=0)
    for copy, value in zip(copies, np.linspace(-1, 1, VALUES), strict=True):
        copy[index] = value
    made = gan.generate(copies.reshape(-1, gan.z_dim))
    return made.reshape(VALUES, len(z), *made.shape[1:])
