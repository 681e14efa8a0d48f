"""Runs survive kills, and full disks are errors that name the file."""

import json
import os
import resource
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import checkpoint
import main
import numpy as np
import pytest
import resizeImage
import training
from conftest import StubGAN, draw_people, random_people
from errors import UserError

PEOPLE = random_people(8)
IMAGES = {"folder": "x", "images": 8, "fingerprint": "x"}
OPTIONS = main.NETWORK | main.TRAINING | {"output_width": 128, "input_width": 128} | IMAGES
FILE_EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"}


def train(run):
    """Train a stub for four epochs in the folder `run`, or go on where it was killed."""
    args = main.get_parser().parse_args(["--train", "--epoch=4", "--save_every=1"])
    main.settle(args, run)
    args.batch_size, args.sample_dir = 4, f"{run}_samples"
    gan = StubGAN(PEOPLE, PEOPLE[:1])
    if checkpoint.numbered(run):
        main.restore(gan, checkpoint.numbered(run)[-1])
    log = training.start_log(run, OPTIONS, gan.epochs + 1)
    training.train(gan, PEOPLE, args, run, log)


def outcome(run):
    """Return all files of a run, and what the checkpoints and the log hold, without times."""
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    log = [{key: value for key, value in line.items() if key != "seconds"} for line in log]
    checkpoints = {path.name: path.read_bytes() for path in run.glob("*.npz")}
    return sorted(path.name for path in run.iterdir()), log, checkpoints


def killed_at(number, run):
    """Train in a child process that is killed at its `number`-th event of a file in `run`.

    Returns whether there were that many events.
    """
    child = os.fork()
    if not child:
        count = 0

        def hook(event, args):
            nonlocal count
            if event == "fcntl.lockf" or (event in FILE_EVENTS and str(run) in str(args[0])):
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
            sys.addaudithook(hook)
            train(run)
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL
    return status != 0


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # the child uses no thread
def test_killed_at_any_point_a_training_ends_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # slow, and only for power cuts
    train(tmp_path / "unbroken")
    names, *_ = expected = outcome(tmp_path / "unbroken")
    assert names == [
        "ckpt-0003.npz",
        "ckpt-0004.npz",
        "healthy.npz",
        "log.jsonl",
        "options.json",
    ]
    number = 1
    while killed_at(number, run := tmp_path / f"run{number}"):
        if checkpoint.numbered(run):
            checkpoint.find(run, "healthy")  # there is one: the first epochs' samples are varied
        train(run)
        for old in checkpoint.numbered(run)[:-2]:  # killed at the very end, before its deletion
            assert old.name == "ckpt-0002.npz"
            old.unlink()
        assert outcome(run) == expected, f"killed at event {number}"
        number += 1
    assert number > 100


def test_a_user_who_deletes_the_numbered_checkpoints_starts_anew(tmp_path):
    """Files of the run before are no part of the new one."""
    train(tmp_path / "run")
    for path in checkpoint.numbered(tmp_path / "run"):
        path.unlink()
    checkpoint.find(tmp_path / "run", "healthy")
    training.start_log(tmp_path / "run", OPTIONS, 1)
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == ["log.jsonl", "options.json"]


@contextmanager
def full_disk():
    """Limit the size of files to 1000 bytes, as a disk that is full would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def save_checkpoint(folder):
    checkpoint.save(folder, 1, {"a": np.zeros(1000)})


def start_log(folder):
    training.start_log(folder, {"x": "y" * 9000}, 1)


def report(folder):
    folder.mkdir()
    bar = None  # which is not reached
    training.report({"epoch": 1, "text": "x" * 9000}, 1, bar, folder, folder / "log.jsonl")


@pytest.mark.parametrize(
    ("write", "name", "left"),
    [
        (save_checkpoint, "ckpt-0001.npz", []),
        (start_log, "options.json", ["log.jsonl"]),
        (report, "log.jsonl", ["log.jsonl"]),  # resuming cuts off its half-written line
    ],
    ids=["checkpoint", "options", "log"],
)
def test_a_full_disk_names_the_file_of_a_run(write, name, left, tmp_path):
    with full_disk(), pytest.raises(UserError) as error:
        write(tmp_path / "run")
    assert f"/{name}: can't be written (File too large)" in str(error.value)
    run = tmp_path / "run"
    assert (sorted(path.name for path in run.iterdir()) if run.exists() else []) == left


def test_a_full_disk_names_the_folder_of_resized_images(tmp_path, error_line):
    draw_people(tmp_path / "made", 3)
    output = tmp_path / "new/gen_0000"
    flags = ["--input_path", tmp_path / "made", "--width=640", "--height=640"]
    with full_disk():
        line = error_line(resizeImage.main, *flags, "--output_path", output)
    assert f"{output}: can't be written" in line
    assert not Path(tmp_path / "new").exists()
