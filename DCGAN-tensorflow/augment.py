"""Differentiable augmentation: what the discriminator sees is varied, real and fake alike.

Zhao, Liu, Lin, Zhu, Han: "Differentiable Augmentation for Data-Efficient GAN Training", NeurIPS
2020. It keeps a discriminator from learning a small training set by heart. Flipping, which people
allow, is as in Karras et al., "Training Generative Adversarial Networks with Limited Data",
NeurIPS 2020.

    plan = draw(("color", "translation"), 64, 128, 64, rng)
    varied = apply(images, plan)              # float [64, 128, 64, 3] in [-1, 1]
"""

import numpy as np
from keras import ops

SHIFT = 1 / 8  # of height and width, at most
CUT = 1 / 2  # of height and width: the side of the square that is left out


def draw(policy, n: int, height: int, width: int, rng: np.random.Generator) -> dict:
    """Random numbers for `n` images as arrays, on the CPU, so that each backend has the same.

    `policy`: some of "flip", "color", "translation", "cutout". Returns, of these, what is needed:
    "color", `[n, 3]`; "pixels", which pixel goes where, `[n * H * W]`; "mask", `[n, H, W, 1]`, 0
    where nothing is left.
    """
    plan = {}
    if not policy:
        return plan
    if "color" in policy:  # brightness is added; saturation and contrast are factors
        plan["color"] = rng.uniform([-0.5, 0, 0.5], [0.5, 2, 1.5], (n, 3)).astype(np.float32)
    y, x = (np.broadcast_to(np.arange(size), (n, size)) for size in (height, width))
    mask = np.ones((n, height, width), np.float32)
    if "flip" in policy:
        x = np.where(rng.integers(2, size=(n, 1)), width - 1 - x, x)
    if "translation" in policy:
        most = [round(height * SHIFT), round(width * SHIFT)]
        shift = rng.integers(np.negative(most), most, (n, 2), endpoint=True)
        y, x = y - shift[:, :1], x - shift[:, 1:]
        mask *= inside(y, height)[:, :, None] & inside(x, width)[:, None]
    if "cutout" in policy:
        sides = np.array([height, width]) * CUT
        centre = rng.uniform(0, [height, width], (n, 2))
        away = [
            np.abs(np.arange(size) + 0.5 - centre[:, [axis]]) > sides[axis] / 2
            for axis, size in enumerate((height, width))
        ]
        mask *= away[0][:, :, None] | away[1][:, None]
    if "flip" in policy or "translation" in policy:
        y, x = y.clip(0, height - 1), x.clip(0, width - 1)
        first = np.arange(n)[:, None, None] * height * width
        plan["pixels"] = (first + y[:, :, None] * width + x[:, None]).ravel().astype(np.int32)
    if "translation" in policy or "cutout" in policy:
        plan["mask"] = mask[..., None]
    return plan


def inside(places: np.ndarray, size: int) -> np.ndarray:
    """Which places lie in the image."""
    return (places >= 0) & (places < size)


def apply(images, plan: dict):
    """Images `[N, H, W, 3]` of either backend, varied as `draw` decided; differentiable."""
    if "color" in plan:
        brightness, saturation, contrast = (
            ops.convert_to_tensor(plan["color"])[:, i, None, None, None] for i in range(3)
        )
        images = images + brightness
        grey = ops.mean(images, axis=3, keepdims=True)
        images = grey + (images - grey) * saturation
        mean = ops.mean(images, axis=(1, 2, 3), keepdims=True)
        images = mean + (images - mean) * contrast
    if "pixels" in plan:
        shape = images.shape
        flat = ops.reshape(images, (-1, shape[3]))
        images = ops.reshape(ops.take(flat, plan["pixels"], axis=0), shape)
    if "mask" in plan:
        images = images * ops.convert_to_tensor(plan["mask"])
    return images
