"""A training: its batches, its files, stopping it and going on, damaged checkpoints and logs."""

import hashlib
import json
import shutil
import signal

import checkpoint
import main
import numpy as np
import pytest
import training
from conftest import NETWORK, TRAINING, call, paths, read_log
from errors import Interrupted, UserError
from PIL import Image

import model


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of `trained` that a test may change."""
    return shutil.copytree(trained, tmp_path / "copied")


def test_an_epoch_has_every_image_once():
    images = np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1).repeat(3, -1)

    def epoch(number, skip=0):
        batches = training.batches(images, 5, 0, number, skip)
        return [batch[:, 0, 0, 0].tolist() for batch in batches]

    first, second = epoch(1)
    assert sorted(first + second) == list(range(10))
    assert epoch(1) != epoch(2)
    assert epoch(1, skip=1) == epoch(1)[1:]


def test_files_of_a_run(trained):
    run = trained / "checkpoint/people"
    assert [line["epoch"] for line in read_log(run)] == [1, 2, 3]
    assert read_log(run)[0].keys() == {"epoch", "d_loss", "g_loss", "diversity", "seconds"}
    assert np.isfinite([line["d_loss"] + line["g_loss"] for line in read_log(run)]).all()
    options = json.loads((run / "options.json").read_text())
    assert (options["output_height"], options["output_width"], options["gf_dim"]) == (32, 16, 4)
    assert options["images"] == 20  # without those of gen_0000
    assert [path.name for path in checkpoint.numbered(run)] == ["ckpt-0002.npz", "ckpt-0003.npz"]
    samples = sorted((trained / "checkpoint_samples").iterdir())
    assert [file.name for file in samples] == [f"train_000{epoch}.png" for epoch in (1, 2, 3)]
    assert Image.open(samples[0]).size == (8 * (16 + 2) + 2, 8 * (32 + 2) + 2)


def test_stopped_and_gone_on_a_run_ends_as_an_unbroken_one(trained, tmp_path, monkeypatch, capsys):
    shutil.copytree(trained / "data", tmp_path / "data")
    real_step = model.DCGAN.train_step

    def stopping_step(gan, real):
        if gan.steps == 6:
            signal.raise_signal(signal.SIGINT)
        return real_step(gan, real)

    run = tmp_path / "checkpoint/people"
    monkeypatch.setattr(model.DCGAN, "train_step", stopping_step)
    with pytest.raises(Interrupted, match="stopped in epoch 2"):
        call(main.main, *TRAINING, *NETWORK, *paths(tmp_path))
    monkeypatch.undo()
    stopped, _ = checkpoint.load(run / "ckpt-0001.npz")
    assert stopped["done"].tolist() == [7, 1, 2]  # steps, epochs, batches

    # A run that was killed before its checkpoint leaves lines in the log.
    with (run / "log.jsonl").open("a") as file:
        file.write('{"epoch": 2, "d_loss": 9, "g_loss": 9, "diversity": 9, "seconds": 9}\n{"epo')
    # It goes on with the run's own sizes, then generates.
    capsys.readouterr()
    generate = ["--options", 5, "--sample_size", 70, "--output_path", tmp_path / "made"]
    call(main.main, "--train", "--epoch=3", "--save_every=1", *generate, *paths(tmp_path))
    stdout, stderr = capsys.readouterr()
    assert stdout.startswith("train: 20 images as 32x16, epochs 2..3, batch 4, generator ")
    assert "\ngenerate: 70 single images, 32x16" in stdout
    # After fifteen steps the samples are alike still, and that is all it complains of.
    assert stderr.startswith("warning: epoch 3: samples have 0.0")
    assert len(stderr.splitlines()) == 1

    ended, unbroken = (
        checkpoint.load(folder / "checkpoint/people/ckpt-0003.npz")[0]
        for folder in (tmp_path, trained)
    )
    assert ended["done"].tolist() == [15, 3, 0]
    assert ended.keys() == unbroken.keys()
    for name in unbroken:
        np.testing.assert_allclose(ended[name], unbroken[name], rtol=1e-5, atol=1e-8, err_msg=name)
    log, unbroken_log = read_log(run), read_log(trained / "checkpoint/people")
    assert [line["epoch"] for line in log] == [1, 2, 3] and log[1]["seconds"] != 9
    # The figures of epoch 2 are those of its batches after the stop.
    for line, other in ((log[0], unbroken_log[0]), (log[2], unbroken_log[2])):
        assert line["d_loss"] == pytest.approx(other["d_loss"], rel=1e-4)
        assert line["g_loss"] == pytest.approx(other["g_loss"], rel=1e-4)

    *made, manifest = sorted((tmp_path / "made").iterdir())
    assert [file.name for file in made] == [f"gen_{i:05d}.png" for i in range(70)]
    assert {(Image.open(f).size, Image.open(f).mode) for f in made} == {((16, 32), "RGB")}
    about = json.loads(manifest.read_text())
    assert [about[key] for key in ("count", "seed", "height", "width")] == [70, 0, 32, 16]
    backend = model.keras.backend.backend()
    assert (about["epochs"], about["backend"]) == (3, backend)
    content = (run / "ckpt-0003.npz").read_bytes()
    assert about["checkpoint_sha256"] == hashlib.sha256(content).hexdigest()


def test_a_run_that_is_done_is_left_alone(copied, capsys):
    before = read_log(copied / "checkpoint/people")
    call(main.main, *TRAINING, *paths(copied))
    assert "train: nothing to do" in capsys.readouterr().out.splitlines()[-1]
    assert read_log(copied / "checkpoint/people") == before


def test_a_checkpoint_holds_all_but_the_learning_rate(trained):
    gan = model.DCGAN(32, 16, z_dim=6, gf_dim=4, df_dim=4, learning_rate=0.25, ema=0.999)
    main.restore(gan, checkpoint.numbered(trained / "checkpoint/people")[-1])
    assert (gan.epochs, gan.batches) == (3, 0)
    assert float(gan.d_optimizer.learning_rate) == 0.25
    iterations = int(gan.g_optimizer.iterations), int(gan.d_optimizer.iterations)
    assert iterations == (2 * gan.steps, gan.steps) == (30, 15)


def test_a_damaged_checkpoint_is_refused(copied):
    for file in (copied / "checkpoint/people").glob("*.npz"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    with pytest.raises(UserError, match="cannot load"):
        call(main.main, "--options=5", "--output_path", copied / "no", *paths(copied))
    assert not (copied / "no").exists()


def test_a_half_written_last_line_of_the_log_is_cut_off(tmp_path):
    lines = ['{"epoch": 1}\n', '{"epoch": 2}\n', '{"epoch": 3}\n', '{"epo']
    (tmp_path / "log").write_text("".join(lines))
    assert training.lines_before(tmp_path / "log", 3) == lines[:2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[]\n{"epoch": 1}\n', "line 1: not a JSON object"),
        (b'{"epoch": "1"}\n', "its epoch is not a whole number"),
        (bytes(range(256)), "not text in UTF-8"),
    ],
)
def test_other_damage_of_the_log_is_an_error(content, message, tmp_path):
    (tmp_path / "log").write_bytes(content)
    with pytest.raises(UserError, match=f"{message}.*; delete it; the checkpoints don't need it$"):
        training.lines_before(tmp_path / "log", 3)
