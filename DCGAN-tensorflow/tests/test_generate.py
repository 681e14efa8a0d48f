"""--options: grids, GIFs and single images, and the dataset that a run belongs to."""

import os
import shutil

import main
import pytest
from conftest import call, draw_people, paths
from PIL import Image, ImageSequence


def generate(trained, output, *flags):
    """Generate from the trained run into `output`; returns the names of the files there."""
    call(main.main, *paths(trained), "--sample_dir", output, "--output_path", output, *flags)
    return sorted(file.name for file in output.iterdir())


def test_option_0_makes_a_grid(trained, tmp_path):
    assert generate(trained, tmp_path, "--options=0", "--sample_size=10") == ["grid.png"]
    assert Image.open(tmp_path / "grid.png").size == (4 * 18 + 2, 3 * 34 + 2)


def test_option_1_makes_a_grid_for_each_dimension(trained, tmp_path):
    names = generate(trained, tmp_path, "--options=1")
    assert names == [f"sweep_{d:03d}.png" for d in range(6)]
    assert Image.open(tmp_path / names[0]).size == (8 * 18 + 2, 8 * 34 + 2)


def test_options_2_and_3_make_gifs(trained, tmp_path):
    some = generate(trained, tmp_path / "some", "--options=2")
    every = generate(trained, tmp_path / "every", "--options=3")
    assert every == [f"sweep_{d:03d}.gif" for d in range(6)]
    assert some and set(some) <= set(every)
    frames = ImageSequence.Iterator(Image.open(tmp_path / "every" / every[0]))
    assert sum(frame.info["duration"] for frame in frames) == 14 * 120  # 8 forth, 6 back


def test_option_4_makes_one_gif(trained, tmp_path):
    assert generate(trained, tmp_path, "--options=4") == ["sweeps.gif"]
    assert Image.open(tmp_path / "sweeps.gif").size == (3 * 18 + 2, 2 * 34 + 2)


def test_a_seed_gives_the_same_images_whatever_else_differs(trained, tmp_path):
    def contents(name, *flags):
        *images, manifest = generate(trained, tmp_path / name, "--options=5", *flags)
        assert manifest == "manifest.json"
        return [(tmp_path / name / image).read_bytes() for image in images]

    seven = contents("seven", "--sample_size=7", "--seed=3")
    ninety = contents("ninety", "--sample_size=90", "--seed=3", "--batch_size=5")
    other = contents("other", "--sample_size=7", "--seed=4")
    assert (len(seven), len(ninety), len(other)) == (7, 90, 7)
    assert seven == ninety[:7] and seven != other
    assert len(set(seven)) > 1


@pytest.mark.parametrize("count", [3, 0])
def test_other_images_of_the_same_name_are_refused(count, trained, tmp_path, error_line):
    """The names need not be UTF-8; the message shows their bytes as escapes."""
    name = os.fsdecode(b"people\xff")
    shutil.copytree(trained / "checkpoint/people", tmp_path / "runs" / name)
    draw_people(tmp_path / "others" / name, count)
    where = ["--dataset", tmp_path / "others" / name, "--checkpoint_dir", tmp_path / "runs"]
    line = error_line(main.main, "--options=5", *where, "--output_path", tmp_path / "made")
    assert f"the images in {tmp_path}/others/people\\udcff are not those of" in line
    assert f"{trained}/data/people" in line
    assert not (tmp_path / "made").exists()


def test_the_images_may_be_elsewhere_or_missing(trained, tmp_path, monkeypatch):
    class WentOn(Exception):
        pass

    def go_on(args, stored, folder):
        raise WentOn

    monkeypatch.setattr(main, "generate", go_on)
    runs = ["--checkpoint_dir", trained / "checkpoint", "--sample_dir", tmp_path / "samples"]
    shutil.copytree(trained / "data", tmp_path / "moved")
    for dataset in (tmp_path / "moved/people", tmp_path / "nowhere/people"):
        with pytest.raises(WentOn):
            call(main.main, "--options=0", "--seed=3", "--dataset", dataset, *runs)
