"""Augmentation, compared with the same changes in numpy, image by image."""

import augment
import numpy as np
import pytest
from keras import ops

SHAPE = (40, 32, 16, 3)
POLICY = ("flip", "color", "translation", "cutout")


@pytest.fixture
def images():
    return np.random.default_rng(0).uniform(-1, 1, SHAPE).astype(np.float32)


def draw(policy):
    return augment.draw(policy, *SHAPE[:3], np.random.default_rng(1))


def apply(images, augmentation):
    changed = augment.apply(ops.convert_to_tensor(images), augmentation)
    return ops.convert_to_numpy(changed)


def sources(augmentation):
    """Return for each pixel of each image, [40, 32, 16], the pixel that it is taken from."""
    first = np.arange(40)[:, None, None] * 32 * 16
    return augmentation["pixels"].reshape(SHAPE[:3]) - first


def test_colors_pixels_and_masks_as_drawn(images):
    augmentation = draw(POLICY)
    for image, changed, (brightness, saturation, contrast), source, mask in zip(
        images,
        apply(images, augmentation),
        augmentation["color"],
        sources(augmentation),
        augmentation["mask"],
        strict=True,
    ):
        image = image + brightness
        grey = image.mean(axis=2, keepdims=True)
        image = grey + (image - grey) * saturation
        image = image.mean() + (image - image.mean()) * contrast
        moved = image[source // 16, source % 16]
        np.testing.assert_allclose(changed, mask * moved, atol=1e-5)


def test_every_flip_and_shift_is_drawn_and_no_other_move():
    flips, shifts = set(), set()
    for source in sources(draw(POLICY)):
        # A neighbour comes from a neighbour; at the border from the same pixel.
        rows, columns = np.diff(source[:, 8] // 16), np.diff(source[16] % 16)
        assert set(rows) <= {0, 1} and set(columns) in ({0, 1}, {1}, {0, -1}, {-1})
        flips.add(-1 in columns)
        shifts.add(source[16, 8] // 16 - 16)
    assert flips == {False, True} and shifts == set(range(-4, 5))


def test_cutout_leaves_out_about_a_quarter():
    masks = draw(POLICY)["mask"]
    assert set(np.unique(masks)) == {0, 1}
    left_out = 1 - masks.mean(axis=(1, 2, 3))
    # Less where it lies at the border, more where pixels were shifted in.
    assert 0.05 < left_out.min() < left_out.max() < 0.6


def test_only_what_the_policy_names_is_drawn(images):
    assert draw(()) == {}
    only = draw(("cutout",))
    assert only.keys() == {"mask"}
    np.testing.assert_array_equal(apply(images, only), images * only["mask"])
