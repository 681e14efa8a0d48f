"""The part of test_backends.py that runs on both backends, the second time as another process.

    KERAS_BACKEND=torch python tests/both_backends.py START OUT FLAGS_OF_MAIN...

The script compares nothing. It leaves the arrays of `one_step` in the folder OUT, from the states
in START, then calls main.py's main with each list of flags (in JSON).
"""

import json
import os
import sys
from pathlib import Path

import numpy as np

NORMS = {"batch_norm": False, "spectral_norm": True}
OTHER = {"tensorflow": "torch", "torch": "tensorflow"}


def one_step(name, start):
    """Train a GAN for one step, from the state in the folder `start`, written if it is missing.

    The learning rate is tiny, so that the second generator step is comparable. Adam's momentums
    hold the gradients.
    """
    import main

    import model

    images = np.random.default_rng(1).integers(0, 256, (16, 32, 16, 3), dtype=np.uint8)
    settings = {"ema": 0.9, "learning_rate": 1e-6, "spectral_norm": NORMS[name]}
    policy = ("flip", "color", "translation", "cutout")
    gan = model.DCGAN(32, 16, z_dim=6, gf_dim=8, df_dim=8, policy=policy, **settings)
    if (start / f"{name}.npz").exists():
        main.restore(gan, start / f"{name}.npz")
    else:
        np.savez(start / f"{name}.npz", **gan.state())
    losses = [float(loss) for loss in gan.train_step(images)]
    result = {"losses": losses, **gan.state(), "images": gan.generate(gan.noise(3, 0))}
    if NORMS[name]:
        result["norm"] = relative_norm(gan, images)
    return result


def relative_norm(gan, images):
    """Return the norm that a kernel is divided by, over its largest singular value: nearly 1."""
    from keras import ops

    for _ in range(30):
        gan.train_step(images)
    layer = gan.discriminator.layers[2]
    kernel, u = map(ops.convert_to_numpy, (layer.kernel, layer.u))
    matrix = kernel.reshape(-1, kernel.shape[-1])
    return np.linalg.norm(u @ matrix.T) / np.linalg.svd(matrix)[1][0]


def run(start, out, *calls):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    if os.environ["KERAS_BACKEND"] == "torch":
        sys.modules["tensorflow"] = None  # as where it isn't installed
    import main

    main.start_backend()
    for name in NORMS:
        np.savez(Path(out, f"{name}.npz"), **one_step(name, Path(start)))
    for flags in calls:
        main.main(json.loads(flags))


if __name__ == "__main__":
    run(*sys.argv[1:])
