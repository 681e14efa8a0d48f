"""Both backends: the same arithmetic, and runs that pass between them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import errors
import keras
import main
import numpy as np
import pytest
from both_backends import NORMS, OTHER, one_step
from conftest import NETWORK, call, paths, read_log

HERE = Path(__file__).resolve().parent


class Second(NamedTuple):
    """The results of this process and of the second one."""

    folder: Path  # with data/people and a run that the other backend has trained
    stdout: str
    stderr: str
    ours: dict  # by norm: the arrays of `one_step`, computed in this process
    theirs: dict  # the same of the second process
    start: dict  # by norm: the state that both started from


@pytest.fixture(scope="module")
def second(trained, tmp_path_factory):
    """A second process with the other backend: a step from the same state, then a training.

    The training has everything that is off by default, and goes on after its first epoch.
    """
    folder = tmp_path_factory.mktemp("backends")
    (folder / "start").mkdir()
    (folder / "out").mkdir()
    (folder / "data").symlink_to(trained / "data")
    ours = {name: one_step(name, folder / "start") for name in NORMS}
    off = ["--spectral_norm", "--augment=flip,color", "--precision=bf16", "--batch_size=8"]
    calls = [["--train", "--epoch=1", *NETWORK, *off], ["--train", "--epoch=2"]]
    calls = [json.dumps([*flags, *map(str, paths(folder))]) for flags in calls]
    done = subprocess.run(
        [sys.executable, HERE / "both_backends.py", folder / "start", folder / "out", *calls],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"KERAS_BACKEND": OTHER[keras.backend.backend()]},
    )
    assert done.returncode == 0, done.stderr
    theirs = {name: dict(np.load(folder / f"out/{name}.npz")) for name in NORMS}
    start = {name: dict(np.load(folder / f"start/{name}.npz")) for name in NORMS}
    return Second(folder, done.stdout, done.stderr, ours, theirs, start)


@pytest.mark.parametrize("name", NORMS)
def test_a_step_computes_the_same(name, second):
    ours, theirs, start = second.ours[name], second.theirs[name], second.start[name]
    more = {"losses", "images", "norm"} if NORMS[name] else {"losses", "images"}
    assert set(ours) == set(theirs) == {*start, *more}
    assert abs(ours["images"].astype(int) - theirs["images"]).max() <= 1
    moved = 0
    for key in set(ours) - {"images", "norm"}:
        scale = max(np.abs(ours[key]).max(), 1e-6)
        np.testing.assert_allclose(ours[key], theirs[key], atol=2e-4 * scale, err_msg=key)
        moved += key in start and (ours[key] != start[key]).any()
    assert moved > 50  # momentums, weights, averages, statistics


def test_spectral_norm_is_the_largest_singular_value(second):
    for result in (second.ours, second.theirs):
        assert result["spectral_norm"]["norm"] == pytest.approx(1, abs=0.02)


def test_the_other_backend_trains(second):
    run = second.folder / "checkpoint/people"
    assert f"{OTHER[keras.backend.backend()]}, CPU, bf16" in second.stdout
    assert len(second.stderr.splitlines()) <= 2  # a warning of alike samples for each call
    options = json.loads((run / "options.json").read_text())
    settings = options["spectral_norm"], options["augment"], options["precision"]
    assert settings == (True, "flip,color", "bf16")
    state = np.load(run / "ckpt-0002.npz")
    assert {state[key].dtype for key in state if key.startswith("gen")} == {np.dtype(np.float32)}
    assert len(read_log(run)) == 2


def test_this_backend_generates_from_its_run(second, tmp_path):
    made = ["--options=5", "--sample_size=3", "--output_path", tmp_path / "made"]
    call(main.main, *made, *paths(second.folder))
    assert len(list((tmp_path / "made").glob("*.png"))) == 3


def test_a_keras_json_changes_nothing():
    """conftest.py has put one with other settings where Keras looks for it."""
    assert keras.config.floatx() == "float32"
    assert keras.config.image_data_format() == "channels_last"
    assert keras.config.epsilon() == 1e-7
    assert keras.config.backend() == os.environ["KERAS_BACKEND"]


class ResourceExhaustedError(Exception):
    """Named as TensorFlow's."""


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (ResourceExhaustedError("OOM when allocating tensor"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("shapes differ"), False),
        (ValueError("memory"), False),
    ],
    ids=repr,
)
def test_full_memory_is_told_from_other_errors(error, expected):
    assert errors.is_out_of_memory(error) is expected
