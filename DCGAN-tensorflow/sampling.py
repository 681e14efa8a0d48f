"""Images and pictures from a trained generator: all that --options asks for."""

import math
from importlib import metadata
from pathlib import Path

import numpy as np
import utils
from files import new_folder, write_json
from PIL import Image
from tqdm import tqdm

STEPS = 8  # images from z = -1 to z = 1 in a sweep
FIGURES = 8  # figures side by side in a sweep, and dimensions that --options 2 picks


def write_singles(gan, n: int, seed: int, output: Path, about: dict) -> None:
    """Exactly `n` images, gen_00000.png ..., in the new folder `output`, with manifest.json.

    `about` goes into the manifest beside what is known here.
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


def visualize(gan, option: int, folder: Path, n: int, seed: int) -> None:
    """The pictures of --options 0..4 (see main.py --help) in `folder`, n images for option 0."""
    rng = np.random.default_rng(seed)
    if option == 0:
        utils.save_png(folder / "grid.png", utils.grid(gan.generate(gan.noise(n, rng)), square(n)))
    elif option == 4:
        z = np.repeat(gan.noise(1, rng), gan.z_dim, axis=0)  # one figure, many times:
        cells = np.arange(gan.z_dim)  # cell d sweeps dimension d
        frames = [utils.grid(made, square(gan.z_dim)) for made in sweep(gan, z, (cells, cells))]
        utils.save_gif(folder / "sweeps.gif", frames)
    else:
        z = gan.noise(FIGURES, rng)
        some = sorted(rng.permutation(gan.z_dim)[:FIGURES])
        for d in tqdm(some if option == 2 else range(gan.z_dim), unit="z", disable=None):
            made = sweep(gan, z, (slice(None), d))
            if option == 1:  # a row is a figure, a column a value of z
                picture = utils.grid(np.concatenate(made.swapaxes(0, 1)), STEPS)
                utils.save_png(folder / f"sweep_{d:03d}.png", picture)
            else:
                frames = [utils.grid(frame, FIGURES) for frame in made]
                utils.save_gif(folder / f"sweep_{d:03d}.gif", frames)


def square(n: int) -> int:
    """Columns of a grid of `n` images that is about as high as wide (in images)."""
    return math.ceil(n**0.5)


def sweep(gan, z: np.ndarray, where) -> np.ndarray:
    """Images `[STEPS, N, H, W, 3]` of z `[N, z_dim]` with z[where] going from -1 to 1."""
    steps = np.repeat(z[None], STEPS, axis=0)
    for step, value in zip(steps, np.linspace(-1, 1, STEPS), strict=True):
        step[where] = value
    made = gan.generate(steps.reshape(-1, gan.z_dim))
    return made.reshape(STEPS, len(z), *made.shape[1:])
