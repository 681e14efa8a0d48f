"""Wrong flags, datasets and run folders: main.py ends with one line and leaves files alone."""

import json
import os

import main
import pytest
from conftest import draw_people, tree
from errors import UserError

RUN = "--dataset people --checkpoint_dir {trained}/checkpoint"  # a run on other images
WRONG = [
    ("", "nothing to do: pass --train"),
    ("--train --dataset nobody", "no folder {bad}/data/nobody"),
    ("--train --dataset empty", "--dataset: no image in {bad}/data/empty"),
    ("--train --train_size 1", "--dataset: only one image to train on in {bad}/data/good"),
    ("--train --input_fname_pattern *.bmp", "--input_fname_pattern: none of the 4 images"),
    ("--train --dataset damaged", "{bad}/data/damaged/b.jpg: can't be read as an image"),
    ("--train --dataset pipe", "pipe.jpg: can't be read as an image (it is no regular file)"),
    ("--train --output_width 20", "--output_width 20: heights and widths must be multiples"),
    ("--train --output_height 20", "--output_height 20: heights and widths must be multiples"),
    ("--train --sample_size 0", "--sample_size: must be 1 or more"),
    ("--train --sample_size 99999999999999999999", "is not under 2^31"),
    ("--train --seed 4294967296", "4294967296 is not under 2^32"),
    ("--train --z_dim 65536", "65536 is not under 2^16"),
    ("--train --options 6", "--options: invalid choice"),
    ("--train --out x", "unrecognized arguments: --out"),
    ("--train --crop maybe", "--crop: True or False"),
    ("--train --learning_rate 0", "--learning_rate must be above 0"),
    ("--train --learning_rate nan", "must be a finite number"),
    ("--train --beta1 inf", "must be a finite number"),
    ("--train --ema=-inf", "must be a finite number"),
    ("--train --ema 1", "--ema from 0 to below 1"),
    ("--train --augment flip,rotate", "--augment: invalid policy value: 'flip,rotate'"),
    ("--train --precision fp16", "--precision: invalid choice"),
    ("--train --dataset=", "--dataset: must not be empty"),
    ("--train --data_dir=", "--data_dir: must not be empty"),
    ("--train --checkpoint_dir=", "--checkpoint_dir: must not be empty"),
    ("--train --output_path=", "--output_path: must not be empty"),
    ("--train --sample_dir=", "--sample_dir: must not be empty"),
    ("--train --checkpoint_dir {bad}/file", "--checkpoint_dir: cannot write to {bad}/file"),
    ("--train --sample_dir {bad}/file/in", "--sample_dir: cannot write to {bad}/file/in"),
    ("--train --dataset {long}", "{long}: File name too long"),
    ("--train --checkpoint_dir {long}", "{long}"),
    ("--train --sample_dir {long}", "{long}: File name too long"),
    ("--train --sample_dir {long:.250}", "{long:.250}.new.partial: File name too long"),
    ("--train --options 5 --output_path {bad}/data/good", "already holds files"),
    ("--options 5", "no checkpoint in {bad}/checkpoint/good"),
    (f"--options 5 --output_height 64 {RUN}", "--output_height 64: the checkpoint in"),
    (f"--options 5 --output_path {{bad}}/file {RUN}", "--output_path: cannot write to {bad}/file"),
    (f"--train --seed 1 {RUN}", "--seed 1: the checkpoint in"),
    (
        f"--train {RUN}",
        "goes on with other images than those it was started with (20 of {trained}/data/people)",
    ),
]


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """A folder of datasets most of which can't be trained on, and a file in the way."""
    folder = tmp_path_factory.mktemp("bad")
    for name in ("good", "damaged", "people", "pipe"):
        draw_people(folder / "data" / name, 4)
    whole = (folder / "data/good/0000_c1s1_000151_00.jpg").read_bytes()
    (folder / "data/damaged/b.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    os.mkfifo(folder / "data/pipe/pipe.jpg")
    (folder / "data/empty").mkdir()
    (folder / "file").write_text("in the way")
    return folder


@pytest.mark.parametrize(("flags", "message"), WRONG, ids=[flags for flags, _ in WRONG])
def test_one_line_names_what_is_wrong(flags, message, bad, trained, error_line):
    names = {"bad": bad, "trained": trained, "long": "x" * 300}
    known = {
        "--data_dir": bad / "data",
        "--dataset": "good",
        "--checkpoint_dir": bad / "checkpoint",
        "--sample_dir": bad / "samples",
        "--output_path": bad / "out",
        "--output_height": 32,
    }
    before = tree(bad), tree(trained)
    # The same flag once more takes the place of the first.
    line = error_line(main.main, *sum(known.items(), ()), *flags.format(**names).split())
    assert message.format(**names) in line
    assert (tree(bad), tree(trained)) == before


def test_dots_lead_from_here(tmp_path, monkeypatch):
    """A name is one of --data_dir's first; a path that starts with dots never is."""
    (tmp_path / "work/data/people").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    for name, folder in [("people", "data/people"), (".", "."), ("..", ".."), ("../x", "../x")]:
        args = main.get_parser().parse_args(["--dataset", name])
        assert str(main.find_dataset(args)) == folder


def test_xla_needs_tensorflow(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    with pytest.raises(UserError, match="--xla: only TensorFlow has it"):
        main.main(["--train", "--xla"])


# ---- options.json of a run ---------------------------------------------------------------------

OPTIONS = {
    **{"output_height": 32, "output_width": 16, "z_dim": 6, "gf_dim": 4, "df_dim": 4},
    **{"spectral_norm": False, "ema": 0.999, "batch_size": 4, "learning_rate": 1},
    **{"beta1": 0.5, "augment": "flip", "precision": "bf16", "crop": True, "seed": 0},
    **{"input_height": 128, "input_width": 128, "input_fname_pattern": "*.jpg"},
    **{"train_size": None, "fingerprint": "00", "images": 3, "folder": "/x/people"},
}
DAMAGED = [
    (OPTIONS | {"z_dim": "6"}, "its z_dim is not a whole number"),
    (OPTIONS | {"z_dim": True}, "its z_dim is not a whole number"),
    (OPTIONS | {"z_dim": -6}, "--z_dim: must be 1 or more, not -6"),
    (OPTIONS | {"crop": 1}, "its crop is not true or false"),
    (OPTIONS | {"ema": None}, "its ema is not a number"),
    (OPTIONS | {"ema": float("nan")}, "--ema: must be a finite number"),
    (OPTIONS | {"train_size": "all"}, "its train_size is not a whole number or null"),
    (OPTIONS | {"augment": "rotate"}, "--augment: invalid policy value"),
    (OPTIONS | {"folder": []}, "its folder is not text"),
    ({key: OPTIONS[key] for key in OPTIONS if key != "fingerprint"}, "its fingerprint is not text"),
    ([OPTIONS], "not a JSON object"),
]


@pytest.fixture
def run_flags(tmp_path):
    """Flags that generate from the run runs/people, whose checkpoint is an empty file."""
    (tmp_path / "people").mkdir()
    (tmp_path / "runs/people").mkdir(parents=True)
    (tmp_path / "runs/people/ckpt-0001.npz").touch()
    flags = ["--options=0", "--checkpoint_dir", tmp_path / "runs", "--dataset"]
    return [*flags, tmp_path / "people", "--sample_dir", tmp_path / "samples"]


@pytest.mark.parametrize(("content", "message"), DAMAGED, ids=[message for _, message in DAMAGED])
def test_damaged_options_are_an_error(content, message, run_flags, tmp_path, error_line):
    path = tmp_path / "runs/people/options.json"
    path.write_text(json.dumps(content), encoding="utf-8-sig")
    assert message in error_line(main.main, *run_flags)


def test_missing_options_are_an_error(run_flags, error_line):
    assert "options.json: no such file" in error_line(main.main, *run_flags)


def test_options_may_be_utf_16(run_flags, tmp_path, error_line):
    """They are in order; the next check fails, since the dataset is another."""
    path = tmp_path / "runs/people/options.json"
    path.write_text(json.dumps(OPTIONS), encoding="utf-16")
    assert "the images in" in error_line(main.main, *run_flags)


def test_which_healthy_needs_a_healthy_checkpoint(run_flags, error_line):
    line = error_line(main.main, *run_flags, "--which=healthy")
    assert "no checkpoint's samples were found varied enough" in line
