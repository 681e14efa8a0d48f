"""Differentiable augmentation: random changes to all images that the discriminator sees.

Real and generated images are changed alike, and gradients pass through the changes. This keeps a
discriminator from learning a small training set by heart. The method is that of Zhao, Liu, Lin,
Zhu, Han: "Differentiable Augmentation for Data-Efficient GAN Training", NeurIPS 2020. Flipping
comes from Karras et al., "Training Generative Adversarial Networks with Limited Data", NeurIPS
2020.

    augmentation = draw(("color", "translation"), 64, 128, 64, rng)
    changed = apply(images, augmentation)     # float [64, 128, 64, 3], from images in [-1, 1]
"""

import numpy as np
from keras import ops

SHIFT = 1 / 8  # the largest shift, as a fraction of height and width
CUT = 1 / 2  # the size of the rectangle that is cut out, as a fraction of height and width


def draw(
    policy: tuple[str, ...], n: int, height: int, width: int, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Draw the random numbers that augment a batch of `n` images.

    They are numpy arrays on the CPU, so that both backends get the same. `policy` holds some of
    "flip", "color", "translation" and "cutout". The result holds those arrays that the policy
    needs: "color" `[n, 3]`, brightness, saturation and contrast; "pixels" `[n * H * W]`, for each
    pixel of the result the index of the pixel that it is taken from; "mask" `[n, H, W, 1]`, 0
    where a pixel becomes 0, else 1.
    """
    augmentation = {}
    if not policy:
        return augmentation
    if "color" in policy:  # brightness is added; saturation and contrast are factors
        augmentation["color"] = rng.uniform([-0.5, 0, 0.5], [0.5, 2, 1.5], (n, 3)).astype(
            np.float32
        )
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
        pixels = first + y[:, :, None] * width + x[:, None]
        augmentation["pixels"] = pixels.ravel().astype(np.int32)
    if "translation" in policy or "cutout" in policy:
        augmentation["mask"] = mask[..., None]
    return augmentation


def inside(positions: np.ndarray, size: int) -> np.ndarray:
    """Tell for each row (or column) number whether an image of `size` rows has it."""
    return (positions >= 0) & (positions < size)


def apply(images, augmentation: dict[str, np.ndarray]):
    """Augment the images `[N, H, W, 3]`, a tensor of either backend, by what `draw` has drawn."""
    if "color" in augmentation:
        brightness, saturation, contrast = (
            ops.convert_to_tensor(augmentation["color"])[:, i, None, None, None] for i in range(3)
        )
        images = images + brightness
        grey = ops.mean(images, axis=3, keepdims=True)
        images = grey + (images - grey) * saturation
        mean = ops.mean(images, axis=(1, 2, 3), keepdims=True)
        images = mean + (images - mean) * contrast
    if "pixels" in augmentation:
        shape = images.shape
        flat = ops.reshape(images, (-1, shape[3]))
        images = ops.reshape(ops.take(flat, augmentation["pixels"], axis=0), shape)
    if "mask" in augmentation:
        images = images * ops.convert_to_tensor(augmentation["mask"])
    return images
