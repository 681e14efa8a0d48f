"""Helpers and fixtures of several tests: tiny datasets, a trained run, a GAN stub, error lines.

All tests run in one process with one backend, KERAS_BACKEND or else TensorFlow. While the backend
starts, a keras.json with other settings lies in Keras's home; test_backends.py checks that it has
no effect.
"""

import json
import os
import signal
import tempfile
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same arithmetic on machines with and without a GPU

import errors
import main
import numpy as np
import pytest
from PIL import Image

NETWORK = ["--output_height=32", "--output_width=16", "--gf_dim=4", "--df_dim=4", "--z_dim=6"]
TRAINING = ["--train", "--epoch=3", "--save_every=1", "--batch_size=4", "--augment=flip"]

with tempfile.TemporaryDirectory() as home:
    settings = {"floatx": "float16", "image_data_format": "channels_first", "epsilon": 0.5}
    Path(home, "keras.json").write_text(json.dumps(settings | {"backend": "jax"}))
    os.environ["KERAS_HOME"] = home
    main.start_backend()


def draw_people(folder, count, size=(32, 64)):
    """Write images with a dark upright block on a light ground, named as in Market-1501."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        image = np.full((size[1], size[0], 3), 200, np.uint8)
        image[size[1] // 8 :, size[0] // 4 : size[0] * 3 // 4] = rng.integers(0, 120, 3)
        Image.fromarray(image).save(folder / f"{i:04d}_c1s1_000151_00.jpg", quality=95)


def call(script_main, *flags):
    """Call the main of a script with flags of any type."""
    script_main([str(flag) for flag in flags])


def paths(folder, checkpoint_dir="checkpoint"):
    """Return flags for the dataset `people` and a run of it in `folder`."""
    return [
        *("--data_dir", folder / "data", "--dataset", "people"),
        *("--checkpoint_dir", folder / checkpoint_dir),
        *("--sample_dir", folder / f"{checkpoint_dir}_samples"),
    ]


def read_log(run):
    """Return the records in the log.jsonl of a run."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def tree(folder):
    """Return every path in `folder` with its content."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with a dataset of 20 images, data/people, and a run of three epochs on it.

    It serves all tests: none may change it.
    """
    folder = tmp_path_factory.mktemp("trained")
    draw_people(folder / "data/people", 12)
    draw_people(folder / "data/people/0002", 8)  # images one level deep are taken, too
    draw_people(folder / "data/people/gen_0000", 5)  # generated images are not
    call(main.main, *TRAINING, *NETWORK, *paths(folder))
    return folder


@pytest.fixture(autouse=True)
def heard_signals():
    """Signals that end a script are heard: pytest in a shell's background starts without some."""
    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {getattr(signal, name): signal.getsignal(getattr(signal, name)) for name in names}
    for number in before:
        signal.signal(number, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def error_line(monkeypatch, capsys):
    """A function that calls a script's main with wrong flags and returns its error line.

    It checks that a process would end with exit code 2, one line and no other output.
    """
    monkeypatch.setattr(errors, "prepare_streams", lambda: None)  # the streams are pytest's

    def error_line(script_main, *flags):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            errors.run(lambda: call(script_main, *flags))
        stdout, stderr = capsys.readouterr()
        assert stop.value.code == 2 and stdout == ""
        assert stderr.startswith("error: ") and stderr.index("\n") == len(stderr) - 1, stderr
        return stderr

    return error_line


class StubGAN:
    """A GAN of one number, whose samples are varied up to epoch 2 and collapse then."""

    def __init__(self, varied, collapsed):
        self.varied, self.collapsed = varied, collapsed
        self.steps, self.epochs, self.batches, self.sum = 0, 0, 0, 0.0

    def noise(self, n, rng):
        return np.zeros((n, 1))

    def generate(self, z):
        images = self.varied if self.epochs <= 2 else self.collapsed
        return images[np.arange(len(z)) % len(images)]

    def train_step(self, real):
        self.steps += 1
        self.sum += real.mean() * self.steps
        return self.sum, 1.0

    def state(self):
        return {"sum": self.sum, "done": np.array([self.steps, self.epochs, self.batches])}

    def set_state(self, arrays, generator_only):
        self.sum = float(arrays["sum"])
        self.steps, self.epochs, self.batches = arrays["done"].tolist()


def random_people(count):
    """Return uint8 images [count, 32, 16, 3] of random blocks of 8x8 pixels."""
    blocks = np.random.default_rng(0).integers(0, 256, (count, 4, 2, 3))
    return blocks.repeat(8, 1).repeat(8, 2).astype(np.uint8)
