"""DCGAN-tensorflow as a user runs it: processes that are started in its folder.

Its modules have the names of the root's, so nothing of it is imported here. Its own tests, in
DCGAN-tensorflow/tests, import them; one test here runs those.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

FOLDER = Path(__file__).resolve().parents[1] / "DCGAN-tensorflow"
NETWORK = ["--output_height=32", "--output_width=16", "--gf_dim=4", "--df_dim=4", "--z_dim=6"]


def call(*args, backend="tensorflow", timeout=120):
    """Run one Python process in DCGAN-tensorflow; paths and numbers become strings."""
    return subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=FOLDER,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | {"KERAS_BACKEND": backend, "CUDA_VISIBLE_DEVICES": ""},
    )


def succeed(*args):
    done = call(*args)
    assert done.returncode == 0, done.stderr
    return done


def one_line(done):
    """Tell whether a process ended as it should for a mistake that its user can mend."""
    lines = done.stderr.splitlines()
    start = "error: " if isinstance(done.stderr, str) else b"error: "
    return done.returncode == 2 and len(lines) == 1 and lines[0].startswith(start)


def tree(folder):
    """Return every path in `folder` with its content."""
    return {p: p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def draw_people(folder, n, size=(32, 64)):
    """Write n images with a dark upright block on a light ground, named as in Market-1501."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(n):
        image = np.full((size[1], size[0], 3), 200, np.uint8)
        image[size[1] // 8 :, size[0] // 4 : size[0] * 3 // 4] = rng.integers(0, 120, 3)
        Image.fromarray(image).save(folder / f"{i:04d}_c1s1_000151_00.jpg", quality=95)


@pytest.mark.slow
def test_its_own_tests_pass():
    """They start another process with PyTorch, and compare the two backends."""
    done = call("-m", "pytest", timeout=300)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert " passed" in done.stdout and " skipped" not in done.stdout


@pytest.mark.slow
def test_train_interrupt_resume_generate(tmp_path):
    draw_people(tmp_path / "data/people", 12)
    draw_people(tmp_path / "data/people/0002", 8)
    draw_people(tmp_path / "data/people/gen_0000", 5)  # generated images: not to be trained on
    where = ["--data_dir", tmp_path / "data", "--dataset", "people"]
    where += ["--checkpoint_dir", tmp_path / "checkpoint", "--sample_dir", tmp_path / "samples"]
    run = tmp_path / "checkpoint/people"
    train = ["main.py", "--train", "True", "--epoch", 10000, "--batch_size", 64, *NETWORK, *where]

    def listen():  # a shell's background job, as the tests may be, starts without Ctrl-C
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(
        [sys.executable, *map(str, train)],
        cwd=FOLDER,
        preexec_fn=listen,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"KERAS_BACKEND": "tensorflow", "CUDA_VISIBLE_DEVICES": ""},
    ) as process:
        assert process.stdout.readline().startswith("only 20 images: --batch_size 64 becomes 20")
        assert process.stdout.readline().startswith("train: 20 images as 32x16, epochs 1..10000, ")
        while not process.stdout.readline().startswith("epoch 3/"):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.startswith("stopped in epoch") and len(stderr.splitlines()) == 1
    epochs = len((run / "log.jsonl").read_text().splitlines())
    assert epochs >= 3 and (run / f"ckpt-{epochs:04d}.npz").is_file()

    # It goes on with the run's own sizes, then generates.
    made = tmp_path / "made"
    generate = ["--options", 5, "--sample_size", 3, "--output_path", made]
    done = succeed("main.py", "--train", "--epoch", epochs + 1, *generate, *where)
    assert f"epochs {epochs + 1}..{epochs + 1}" in done.stdout
    assert "\ngenerate: 3 single images, 32x16" in done.stdout
    # After so few steps the samples are alike still, and that is all it complains of.
    assert done.stderr.startswith(f"warning: epoch {epochs + 1}: samples have 0.0")
    assert len(done.stderr.splitlines()) == 1
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in log] == list(range(1, epochs + 2))
    images = [f"gen_{i:05d}.png" for i in range(3)]
    assert sorted(file.name for file in made.iterdir()) == [*images, "manifest.json"]
    content = (run / f"ckpt-{epochs + 1:04d}.npz").read_bytes()
    about = json.loads((made / "manifest.json").read_text())
    assert about["checkpoint_sha256"] == hashlib.sha256(content).hexdigest()


def test_help():
    done = succeed("resizeImage.py", "--help")
    assert all(text in done.stdout for text in ("--input_path", "128", "default: "))
    done = succeed("-X", "importtime", "main.py", "--help")
    texts = ("--dataset", "--gf_dim", "--sample_dir", "0.0002", "default: ")
    assert all(text in done.stdout for text in texts)
    # It answers at once.
    assert "tensorflow" not in done.stderr and "torch" not in done.stderr


def test_a_wrong_flag_is_one_line_and_exit_code_2():
    """DCGAN-tensorflow/tests/test_flags.py and test_resize.py have many more."""
    done = call("main.py", "--train", "--sample_size", 0)
    assert one_line(done) and done.stdout == ""
    assert "--sample_size: must be 1 or more" in done.stderr
