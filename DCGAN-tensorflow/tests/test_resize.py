"""resizeImage.py: sizes, manifests, wrong flags."""

import json

import numpy as np
import pytest
import resizeImage
from conftest import call, draw_people, tree
from PIL import Image


def test_images_become_jpegs_of_the_size(tmp_path, capsys):
    draw_people(tmp_path / "made", 9, size=(16, 32))
    Image.new("L", (20, 20), 77).save(tmp_path / "made/grey.png")
    output = tmp_path / "new/gen_0000"
    call(resizeImage.main, "--input_path", tmp_path / "made", "--output_path", output)
    stdout, stderr = capsys.readouterr()
    assert stdout.startswith("10 images of 128x64 in ") and stderr == ""
    files = sorted(output.glob("*.jpg"))
    assert [f.stem for f in files] == sorted(f.stem for f in (tmp_path / "made").iterdir())
    assert {(Image.open(f).format, Image.open(f).size) for f in files} == {("JPEG", (64, 128))}
    assert abs(np.asarray(Image.open(output / "grey.jpg")).astype(int) - 77).max() <= 1
    about = json.loads((output / "manifest.json").read_text())
    assert [about[key] for key in ("count", "height", "width", "generated")] == [10, 128, 64, None]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["gen_0000"]  # nothing temporary


def test_folders_of_generated_images_are_input(tmp_path):
    for number, name in enumerate(("gen_0000", "gen_1", "other")):
        draw_people(tmp_path / "made" / name, 1)
        only = tmp_path / "made" / name / "0000_c1s1_000151_00.jpg"
        only.rename(only.with_name(f"{number}.jpg"))
    call(resizeImage.main, "--input_path", tmp_path / "made", "--output_path", tmp_path / "new")
    made = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert made == ["0.jpg", "1.jpg", "2.jpg", "manifest.json"]


def test_other_sizes(tmp_path):
    draw_people(tmp_path / "made", 1, size=(16, 32))
    flags = ["--input_path", tmp_path / "made", "--output_path", tmp_path / "small"]
    call(resizeImage.main, *flags, "--width=24", "--height=40", "--quality=50")
    assert Image.open(tmp_path / "small/0000_c1s1_000151_00.jpg").size == (24, 40)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1]", "not a JSON object"),
        (b"{", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"x": "\xff"}', "not text in UTF-8"),
    ],
    ids=["list", "half", "nested", "no UTF-8"],
)
def test_a_damaged_manifest_is_an_error(content, message, tmp_path, error_line):
    draw_people(tmp_path / "made", 1)
    (tmp_path / "made/manifest.json").write_bytes(content)
    flags = ["--input_path", tmp_path / "made", "--output_path", tmp_path / "new"]
    assert message in error_line(resizeImage.main, *flags)
    assert not (tmp_path / "new").exists()


WRONG = [
    ("--input_path {bad}/none", "--input_path: there is no folder {bad}/none"),
    ("--input_path {bad}/empty", "--input_path: no image in {bad}/empty"),
    ("--input_path {bad}/damaged", "damaged/b.jpg: can't be read as an image"),
    ("--input_path {bad}/twins", "would both become 0000_c1s1_000151_00.jpg"),
    ("--output_path {bad}/good", "--output_path: {bad}/good already holds files"),
    ("--output_path {bad}/file", "--output_path: cannot write"),
    ("--output_path=", "--output_path: must not be empty"),
    ("--height 0", "--height: must be 1 or more"),
    ("--quality 101", "--quality: from 1 to 100"),
]


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """A folder of folders most of which can't be resized, and a file in the way."""
    folder = tmp_path_factory.mktemp("bad")
    for name in ("good", "damaged", "twins"):
        draw_people(folder / name, 4)
    whole = (folder / "good/0000_c1s1_000151_00.jpg").read_bytes()
    (folder / "damaged/b.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    Image.new("RGB", (8, 8)).save(folder / "twins/0000_c1s1_000151_00.png")
    (folder / "empty").mkdir()
    (folder / "file").write_text("in the way")
    return folder


@pytest.mark.parametrize(("flags", "message"), WRONG, ids=[flags for flags, _ in WRONG])
def test_one_line_names_what_is_wrong(flags, message, bad, error_line):
    known = ["--input_path", bad / "good", "--output_path", bad / "out"]
    before = tree(bad)
    # The same flag once more takes the place of the first.
    line = error_line(resizeImage.main, *known, *flags.format(bad=bad).split())
    assert message.format(bad=bad) in line
    assert tree(bad) == before
