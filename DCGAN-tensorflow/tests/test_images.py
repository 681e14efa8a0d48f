"""Images on their way from a file to the networks and back."""

import os

import numpy as np
import pytest
import utils
from errors import UserError
from PIL import Image


@pytest.fixture
def pale():
    """An image of 32x16 whose pixels are all between 100 and 140."""
    return np.linspace(100, 140, 32 * 16 * 3).round().reshape(32, 16, 3).astype(np.uint8)


def test_pixels_map_linearly_to_minus_1_to_1_and_back():
    every = np.arange(256, dtype=np.float32)
    signed = utils.to_signed(every)
    assert signed[[0, 255]].tolist() == [-1, 1]
    np.testing.assert_allclose(np.diff(signed), 2 / 255, atol=1e-6)
    np.testing.assert_array_equal(utils.to_uint8(signed), every)


@pytest.mark.parametrize("memory_limit", [utils.MEMORY_LIMIT, 0], ids=["memory", "file"])
def test_a_pale_image_stays_pale(memory_limit, pale, tmp_path, monkeypatch):
    """Also in a set that is too large for memory and goes through a file."""
    monkeypatch.setattr(utils, "MEMORY_LIMIT", memory_limit)
    Image.fromarray(pale).save(tmp_path / "pale.png")
    images = utils.load_images([tmp_path / "pale.png"], 32, 16)
    assert isinstance(images, np.memmap) == (memory_limit == 0)
    np.testing.assert_array_equal(images, pale[None])


def test_crop_takes_the_middle(pale, tmp_path):
    framed = np.zeros((60, 40, 3), np.uint8)
    framed[14:46, 12:28] = pale
    Image.fromarray(framed).save(tmp_path / "framed.png")
    cropped = utils.read_resized(tmp_path / "framed.png", 32, 16, crop=(32, 16))
    np.testing.assert_array_equal(cropped, pale)


def test_a_pipe_stays_one(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.png: is no regular file; name another"):
        utils.save_png(tmp_path / "a.png", np.zeros((2, 2, 3), np.uint8))
    assert [path.is_fifo() for path in tmp_path.iterdir()] == [True]
