"""Transforms and random erasing: sizes, values, statistics."""

import numpy as np
import pytest
import torch
from PIL import Image

from random_erasing import RandomErasing
from reid import transforms

FILL = (0.4914, 0.4822, 0.4465)


def test_sizes():
    image = Image.new("RGB", (64, 128))
    assert transforms.train_transform(256, 128, 0.8)(image).shape == (3, 256, 128)
    assert transforms.val_transform(256, 128)(image).shape == (3, 256, 128)
    assert transforms.test_transform(256, 128)(image).shape == (3, 288, 144)


@pytest.mark.parametrize("level", [0, 100, 255])
def test_normalisation_is_imagenets_everywhere(level):
    image = Image.new("RGB", (64, 128), (level,) * 3)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = ((level / 255 - mean) / std)[:, None, None]
    for transform in (
        transforms.train_transform(32, 16, erasing_p=0.0),
        transforms.val_transform(32, 16),
        transforms.test_transform(32, 16),
    ):
        assert torch.allclose(transform(image), expected, atol=1e-5)


def test_test_resize_is_pillows_bicubic():
    pixels = np.random.default_rng(0).integers(0, 256, (128, 64, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    resized = np.asarray(image.resize((144, 288), Image.Resampling.BICUBIC)) / 255
    found = transforms.test_transform(256, 128)(image).permute(1, 2, 0).numpy()
    found = found * transforms.IMAGENET_STD + transforms.IMAGENET_MEAN
    np.testing.assert_allclose(found, resized, atol=1e-5)


def test_erasing_is_off_at_zero_and_leaves_its_input_alone():
    images = torch.randn(8, 3, 32, 16)
    before = images.clone()
    assert torch.equal(RandomErasing(0.0)(images), images)
    assert not torch.equal(RandomErasing(1.0)(images), images)
    assert torch.equal(images, before)


def test_one_image_gets_one_filled_rectangle():
    torch.manual_seed(0)
    for _ in range(50):
        erased = RandomErasing(1.0)(torch.full((3, 64, 32), 9.0))
        mask = erased[0] != 9
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        assert mask.sum() == len(rows) * len(columns) > 0  # full rows x full columns
        assert rows[-1] - rows[0] + 1 == len(rows)  # without gaps
        assert columns[-1] - columns[0] + 1 == len(columns)
        for channel, fill in enumerate(FILL):
            assert torch.allclose(erased[channel][mask], torch.tensor(fill))


def test_erasing_statistics():
    """Probability, area and aspect of the rectangles, and that they lie anywhere."""
    torch.manual_seed(0)
    height, width, number = 256, 128, 20_000
    top, left, tall, wide = RandomErasing(0.8).rectangles(number, height, width)
    erased = tall > 0
    assert erased.float().mean() == pytest.approx(0.8, abs=0.01)
    tall, wide, top, left = (x[erased].float() for x in (tall, wide, top, left))
    area, aspect = tall * wide / (height * width), tall / wide
    assert 0.018 < area.min() < 0.03
    assert 0.38 < area.max() < 0.42
    assert aspect.min() > 0.28
    assert aspect.max() < 3.5
    assert (tall < height).all()
    assert (wide < width).all()
    assert (top + tall <= height).all()
    assert (left + wide <= width).all()
    assert (top == 0).any()
    assert (top + tall == height).any()
    # Drawn naively, one at a time, for comparison: uniform area and aspect, redrawn until it fits.
    rng = np.random.default_rng(0)
    naive = []
    while len(naive) < 5_000:
        share, ratio = rng.uniform(0.02, 0.4), rng.uniform(0.3, 1 / 0.3)
        h = round(np.sqrt(share * height * width * ratio))
        w = round(np.sqrt(share * height * width / ratio))
        if h < height and w < width:
            naive.append(h * w / (height * width))
    assert area.mean() == pytest.approx(np.mean(naive), abs=0.004)
