"""Images of every kind, and files that are none: what `read_image` makes of them or says."""

import os
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import save_image
from PIL import Image

from reid.errors import UserError, printable
from reid.images import read_image, readable_suffixes

LIMIT = f"{Image.MAX_IMAGE_PIXELS:,} pixels"


def pixels(path):
    image = read_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


def bomb(path, side):
    """A small PNG file of side x side black pixels."""

    def chunk(kind, content):
        crc = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    packer = zlib.compressobj(9)
    lines = b"".join(packer.compress(bytes(side // 8 + 1)) for _ in range(side)) + packer.flush()
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
    return path


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, suffix, orientation):
    upright = np.zeros((40, 24, 3), np.uint8)
    upright[:20, :12], upright[:20, 12:], upright[20:, :12] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    # How a camera that is held so stores it, by the EXIF standard's words for row 0 and column 0.
    stored = {
        1: upright,  # top, left
        2: upright[:, ::-1],  # top, right
        3: upright[::-1, ::-1],  # bottom, right
        4: upright[::-1],  # bottom, left
        5: upright.transpose(1, 0, 2),  # left, top
        6: upright.transpose(1, 0, 2)[::-1],  # right, top
        7: upright.transpose(1, 0, 2)[::-1, ::-1],  # right, bottom
        8: upright.transpose(1, 0, 2)[:, ::-1],  # left, bottom
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{suffix}"
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif, quality=95)
    found = pixels(path).astype(int)
    assert found.shape == upright.shape
    for row, column in [(10, 6), (10, 18), (30, 6), (30, 18)]:
        assert abs(found[row, column] - upright[row, column]).max() < 40


def test_damaged_exif_is_no_damaged_image(tmp_path):
    path = tmp_path / "a.jpg"
    Image.new("RGB", (8, 8), "red").save(path, exif=b"Exif\0\0no TIFF header at all")
    assert pixels(path).shape == (8, 8, 3)


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bits_are_scaled(tmp_path, suffix):
    values = np.array([[0, 1000, 30000, 65535]], np.uint16)
    path = tmp_path / f"deep.{suffix}"
    Image.fromarray(values).save(path)
    expected = np.rint(values / 257)
    assert abs(pixels(path)[..., 0] - expected).max() <= 1
    Image.fromarray(values.astype(">u2")).save(tmp_path / "big.tif")
    assert abs(pixels(tmp_path / "big.tif")[..., 0] - expected).max() <= 1


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.float32([[0, 0.25, 1]]), [0, 64, 255]),
        (np.float32([[0, 64, 200]]), [0, 64, 200]),
        (np.float32([[0, 6400, 65535]]), [0, 25, 255]),
        (np.float32([[-1, 0, 1]]), [0, 128, 255]),
        (np.float32([[0, 5e5, 1e6]]), [0, 128, 255]),
        (np.float32([[3, 3, 3]]) * 1e6, [255, 255, 255]),
        (np.int32([[0, 0, 0]]), [0, 0, 0]),
        (np.int32([[0, 2570, 65535]]), [0, 10, 255]),
        (np.int32([[-1000, 0, 1000]]), [0, 128, 255]),
    ],
    ids=str,
)
def test_float_and_32_bit_pictures(tmp_path, values, expected):
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert pixels(tmp_path / "a.tif")[0, :, 0].tolist() == expected


@pytest.mark.parametrize("bad", [np.inf, -np.inf])
def test_infinite_values(tmp_path, bad):
    Image.fromarray(np.float32([[0, bad]])).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match="its values are not finite"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("1", "png"),
        ("1", "tif"),
        ("L", "jpg"),
        ("LA", "png"),
        ("P", "png"),
        ("P", "gif"),
        ("RGBA", "png"),
        ("RGBA", "webp"),
        ("CMYK", "jpg"),
        ("CMYK", "tif"),
        ("YCbCr", "jpg"),
        ("RGB", "bmp"),
        ("RGB", "avif"),
        ("RGB", "jp2"),
    ],
)
def test_modes(tmp_path, mode, suffix):
    if f".{suffix}" not in readable_suffixes():
        pytest.skip(f"this Pillow has no {suffix}")
    path = tmp_path / f"a.{suffix}"
    Image.new("RGB", (16, 24), "white").convert(mode).save(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = pixels(path)
    assert found.shape == (24, 16, 3)
    assert found.min() > 250


@pytest.mark.parametrize("transparency", [0, bytes([0, 128])])
def test_a_palette_with_transparency(tmp_path, transparency):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 0])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=transparency)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pixels(tmp_path / "a.png").tolist() == [[[10, 20, 30], [200, 100, 0]]]


@pytest.mark.parametrize("suffix", ["gif", "tif", "webp", "png"])
def test_the_first_of_several_frames(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "blue")]
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
    red, _, blue = pixels(tmp_path / f"a.{suffix}")[4, 4]
    assert red > 240
    assert blue < 15


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "tif"])
def test_one_pixel(tmp_path, suffix):
    Image.new("RGB", (1, 1)).save(tmp_path / f"a.{suffix}")
    assert pixels(tmp_path / f"a.{suffix}").shape == (1, 1, 3)


@pytest.mark.parametrize("side", [10_000, 20_000])  # Pillow warns of one, refuses the other
def test_a_bomb_is_refused_in_every_thread_without_decoding(tmp_path, capfd, side, monkeypatch):
    path = bomb(tmp_path / "bomb.png", side)
    assert path.stat().st_size < 60_000
    monkeypatch.setattr(Image.Image, "convert", None)
    monkeypatch.setattr(Image.Image, "load", None)

    def attempt(_):
        with pytest.raises(UserError, match=f"more than {LIMIT}.; make it smaller"):
            read_image(path)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(attempt, range(50)))
    with warnings.catch_warnings():  # as other code's threads do it, and undo what was set
        warnings.resetwarnings()
        attempt(0)
    assert capfd.readouterr() == ("", "")


MP4 = b"\0\0\0\x18ftypisom" + bytes(400)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.mp4", MP4),
        ("a.jpg", MP4),
        ("a.mov", b"\0\0\0\x14ftypqt  " + bytes(400)),
        ("a.jpg", b"\0\0\0\x08wide" + bytes(400)),
        ("a.avi", b"RIFF\0\0\0\0AVI LIST" + bytes(400)),
        ("a.png", b"\x1aE\xdf\xa3" + bytes(400)),
        ("a.mpg", b"\0\0\1\xba" + bytes(400)),
        ("a.mpg", b"\0\0\1\xb3\x16\x00\xf0\x15" + bytes(400)),
        ("a.jpg", b"\0\0\1\xb3\x16\x00\xf0\x15" + bytes(400)),
        ("a.ts", (b"G" + bytes(187)) * 3),
        ("a.mkv", b"cut off"),
    ],
)
def test_videos(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=r"can't be read as an image \(it is a video\); extract fr"):
        read_image(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jpg", b"", "the file is empty"),
        ("a.jpg", b"some text\nin lines", "of no format that Pillow knows"),
        ("a.heic", b"\0\0\0\x18ftypheic" + bytes(400), "of no format that Pillow knows"),
        ("a.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "EPS files"),
        ("a\n.jpg", b"text", "of no format that Pillow knows"),
    ],
)
def test_files_that_are_no_images(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_image(tmp_path / name)
    path = printable(tmp_path / name)
    assert str(caught.value).startswith(f"{path}: can't be read as an image ({says}")
    assert str(caught.value).endswith("; replace it")


def test_a_truncated_image(tmp_path):
    path = save_image(tmp_path / "a.jpg")
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(UserError, match=r"a.jpg: can't be read as an image \(image file is trunc"):
        read_image(path)


def test_no_file_and_a_folder(tmp_path):
    with pytest.raises(UserError, match=r"none.jpg: no such file"):
        read_image(tmp_path / "none.jpg")
    (tmp_path / "a.jpg").mkdir()
    with pytest.raises(UserError, match=r"a.jpg: is a folder; name an image"):
        read_image(tmp_path / "a.jpg")
    with pytest.raises(UserError, match="File name too long"):
        read_image(tmp_path / ("x" * 300))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read all")
def test_no_permission(tmp_path):
    path = save_image(tmp_path / "a.jpg")
    path.chmod(0)
    with pytest.raises(UserError, match=r"a.jpg: can't be read as an image \(Permission denied\)"):
        read_image(path)


@pytest.mark.parametrize("name", ["人物 ü.png", "x" * 246 + ".png", os.fsdecode(b"\xff\xfe.png")])
def test_names(tmp_path, name):
    assert pixels(save_image(tmp_path / name)).shape == (128, 64, 3)


def test_plain_images_are_as_pillow_decodes_them(tmp_path):
    for name in ("a.jpg", "a.png", "a.bmp"):
        path = save_image(tmp_path / name)
        assert np.array_equal(pixels(path), np.asarray(Image.open(path)))


def test_suffixes():
    suffixes = readable_suffixes()
    assert {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".mpo"} <= suffixes
    assert not {".mpg", ".mpeg", ".pdf", ".eps", ".h5", ".mp4"} & suffixes
