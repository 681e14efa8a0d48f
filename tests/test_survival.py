"""A run survives: kill -9, SIGTERM, a damaged state, a full disk; it stops where it can't go on."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, call, exit_code, make_market, make_prepared, tiny_network

import train_baseline
from reid import learner
from reid.checkpoint import Run
from reid.errors import Interrupted, UserError

pytestmark = pytest.mark.slow

EPOCHS = 12
FLAGS = f"{TINY} --workers 1 --batchsize 4 --seed 3 --save_every 2".split()


def flags(prepared, folder, name, *more):
    return ["--data_dir", prepared, "--model_dir", folder, "--name", name, *FLAGS, *more]


def start(*words, **kind):
    """Start train_baseline.py as a process."""
    return subprocess.Popen(
        [sys.executable, ROOT / "train_baseline.py", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        **kind,
    )


def files(run):
    """Return everything a run says: each weights file, and the log without its timings."""
    weights = {p.name: torch.load(p, weights_only=True) for p in sorted(run.glob("net_*.pth"))}
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    timing = ("seconds", "images_per_s")
    return weights, [{k: v for k, v in line.items() if k not in timing} for line in log]


def assert_same(run, expected):
    weights, log = files(run)
    assert log == expected[1]
    assert weights.keys() == expected[0].keys()
    for name, state in weights.items():
        assert all(torch.equal(v, expected[0][name][k]) for k, v in state.items()), name
    assert not list(run.glob(".*"))  # nothing half-written


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The dataset of all tests here, which only read it."""
    return make_prepared(make_market(tmp_path_factory.mktemp("data") / "market"))


@pytest.fixture(scope="module")
def trained(prepared, tmp_path_factory):
    """The runs that nothing happens to: `unbroken` of EPOCHS epochs, `begun` of two less."""
    folder = tmp_path_factory.mktemp("trained")
    call(train_baseline.main, *flags(prepared, folder, "begun", "--epochs", EPOCHS - 2))
    call(train_baseline.main, *flags(prepared, folder, "unbroken", "--epochs", EPOCHS))
    return folder


@pytest.fixture(scope="module")
def unbroken(trained):
    return files(trained / "unbroken")


@pytest.fixture
def begun(trained, tmp_path):
    """A run `r` in tmp_path to be damaged and resumed."""
    return Path(shutil.copytree(trained / "begun", tmp_path / "r"))


def test_kill_9_at_random_moments(prepared, tmp_path, unbroken):
    """Killed again and again, half of the times while something is being written.

    At other moments each time; KILL_SEED in the environment repeats those of a failure.
    """
    seed = int(os.environ.get("KILL_SEED", random.randrange(2**32)))
    print(f"KILL_SEED={seed}")  # pytest shows it where the test fails
    rng = random.Random(seed)
    run = tmp_path / "killed"
    for attempt in range(4):
        resume = ["--resume"] if (run / "opts.json").exists() else []
        process = start(*flags(prepared, tmp_path, "killed", "--epochs", EPOCHS, *resume))
        process.stdout.readline()  # it has begun
        deadline = time.monotonic() + rng.uniform(0, 0.7)
        while process.poll() is None:
            half_written = attempt % 2 and any(run.glob(".*.partial"))
            if half_written or (not attempt % 2 and time.monotonic() > deadline):
                process.kill()
            time.sleep(0.001)
        assert process.returncode in (0, -signal.SIGKILL), process.stderr.read()
        if not attempt:
            assert process.returncode == -signal.SIGKILL
    words = flags(prepared, tmp_path, "killed", "--epochs", EPOCHS)
    call(train_baseline.main, *words, *(["--resume"] if (run / "opts.json").exists() else []))
    assert_same(run, unbroken)


def test_a_run_belongs_to_one_process(prepared, tmp_path, capsys):
    """A second one of the same name, with or without --resume, ends and leaves it alone."""
    words = flags(prepared, tmp_path, "same", "--epochs", 1000)
    first = start(*words)
    first.stdout.readline()  # it has begun
    for more in ((), ("--resume",)):
        assert exit_code(train_baseline.main, *words, *more) == 2
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1
        assert f"same: another process is writing it (process {first.pid} on " in err
    assert first.poll() is None
    first.terminate()
    first.communicate(timeout=60)
    assert (tmp_path / "same" / "opts.json").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"same"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_sigterm_and_ctrl_c_say_how_to_go_on(number, prepared, tmp_path):
    def listen():  # a shell's background job, as the tests may be, starts without Ctrl-C
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    words = flags(prepared, tmp_path, "stopped", "--epochs", 1000, "--cache", "off")
    process = start(*words, preexec_fn=listen)
    for line in process.stdout:
        if line.startswith("epoch 2/"):
            process.send_signal(number)
            break
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert "all whole epochs are saved" in lines[0]
    assert lines[0].endswith("--cache off --resume")
    epochs = len((tmp_path / "stopped" / "log.jsonl").read_text().splitlines()) + 2
    call(train_baseline.main, *flags(prepared, tmp_path, "stopped", "--epochs", epochs, "--resume"))
    call(train_baseline.main, *flags(prepared, tmp_path, "unbroken", "--epochs", epochs))
    assert_same(tmp_path / "stopped", files(tmp_path / "unbroken"))


def test_interrupted_in_the_first_epoch(prepared, tmp_path, monkeypatch):
    """Goes on from the start that it had: here, a backbone out of a file."""

    def interrupt(*args):
        raise KeyboardInterrupt

    Run(tmp_path).save_weights(tiny_network(), "last")
    start_from = ["--epochs", 2, "--pretrained", tmp_path / "net_last.pth"]
    words = flags(prepared, tmp_path, "early", *start_from)
    with monkeypatch.context() as patch:
        patch.setattr("reid.learner.Learner.step", interrupt)
        with pytest.raises(Interrupted, match="--resume"):
            call(train_baseline.main, *words)
    call(train_baseline.main, *words, "--resume")
    call(train_baseline.main, *flags(prepared, tmp_path, "unbroken", *start_from))
    assert_same(tmp_path / "early", files(tmp_path / "unbroken"))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_a_damaged_state_falls_back_to_the_one_before(
    damage, prepared, tmp_path, begun, unbroken, capsys
):
    path = begun / "state.pth"
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    call(train_baseline.main, *flags(prepared, tmp_path, "r", "--epochs", EPOCHS, "--resume"))
    out, err = capsys.readouterr()
    assert f"epochs {EPOCHS - 2} to {EPOCHS}" in out  # one epoch again
    assert "state_previous.pth: going on from this, the state before the newest" in err
    assert ("state.pth: damaged" in err) == (damage != "missing")
    assert (begun / "state_previous.pth").exists()
    assert_same(begun, unbroken)


def test_states_deleted_to_save_room_lose_no_weights(prepared, tmp_path, begun):
    """The run can't go on, and nothing takes its place."""
    words = flags(prepared, tmp_path, "r", "--epochs", EPOCHS)
    for name in ("state.pth", "state_previous.pth"):
        (begun / name).unlink()
    there = sorted(path.name for path in begun.iterdir())
    with pytest.raises(UserError, match="holds a run already"):
        call(train_baseline.main, *words)
    with pytest.raises(UserError, match=r"its state\.pth is gone"):
        call(train_baseline.main, *words, "--resume")
    assert sorted(path.name for path in begun.iterdir()) == there


def test_when_both_states_are_damaged(prepared, tmp_path, begun):
    for name in ("state.pth", "state_previous.pth"):
        (begun / name).write_bytes(b"damaged")
    with pytest.raises(UserError, match="its states are damaged"):
        call(train_baseline.main, *flags(prepared, tmp_path, "r", "--epochs", EPOCHS, "--resume"))


@pytest.mark.parametrize("refusal", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_a_state_for_which_there_is_no_memory_is_not_damaged(
    refusal, prepared, tmp_path, begun, monkeypatch
):
    """Such as while another process still holds the GPU: all files stay as they are."""

    def full(*args, **more):
        raise refusal

    before = {path.name: path.read_bytes() for path in begun.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", full)
        with pytest.raises(type(refusal)):
            call(train_baseline.main, *flags(prepared, tmp_path, "r", "--epochs", 99, "--resume"))
    assert {path.name: path.read_bytes() for path in begun.iterdir()} == before


@pytest.mark.parametrize("content", [{}, {"net": torch.zeros(3)}, {"net": {}, "history": []}])
def test_a_state_of_something_else(content, prepared, tmp_path, begun):
    torch.save(content, begun / "state.pth")
    with pytest.raises(UserError, match=r"its state is not this run's .*; start anew"):
        call(train_baseline.main, *flags(prepared, tmp_path, "r", "--epochs", EPOCHS, "--resume"))


def test_a_full_disk(prepared, tmp_path, begun, unbroken):
    """Files can't grow over 1 MB, as if the disk were full: one line, and the run goes on later."""

    def small_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))

    words = flags(prepared, tmp_path, "r", "--epochs", EPOCHS, "--resume")
    before = (begun / "state.pth").read_bytes()
    process = start(*words, preexec_fn=small_disk)
    _, err = process.communicate()
    assert process.returncode == 2
    assert len(err.splitlines()) == 1, err
    assert "can't be written (File too large)" in err
    assert (begun / "state.pth").read_bytes() == before
    call(train_baseline.main, *words)
    assert_same(begun, unbroken)


def test_best_weights_are_mended_after_a_kill_between_state_and_weights(
    prepared, tmp_path, unbroken, monkeypatch
):
    class KilledError(BaseException):
        pass

    def killed(*args):
        raise KilledError

    words = flags(prepared, tmp_path, "r", "--epochs")
    with monkeypatch.context() as patch:
        patch.setattr(Run, "save_weights", killed)
        with pytest.raises(KilledError):
            call(train_baseline.main, *words, EPOCHS)
    call(train_baseline.main, *words, 1, "--resume")  # nothing left to train
    call(train_baseline.main, *words, EPOCHS, "--resume")
    assert_same(tmp_path / "r", unbroken)


def test_a_diverged_epoch_is_not_saved(prepared, tmp_path, monkeypatch):
    """Its loss is from before the step that made it diverge."""
    words = flags(prepared, tmp_path, "r", "--epochs", 3, "--batchsize", 9)
    with pytest.raises(UserError, match="epoch 1: the validation loss is infinite or NaN"):
        call(train_baseline.main, *words, "--lr", "1e30")
    step = learner.Learner.step

    def overflowing(learner, *batch):
        done = step(learner, *batch)
        next(learner.net.parameters()).data[0] = float("inf")
        return done

    monkeypatch.setattr(learner.Learner, "step", overflowing)
    with pytest.raises(UserError, match="epoch 1: the weights are infinite or NaN"):
        call(train_baseline.main, *words)
    assert not (tmp_path / "r").exists()


def test_a_loss_that_is_no_number_names_the_images(prepared, tmp_path):
    words = flags(prepared, tmp_path, "r", "--epochs", 3, "--lr", "1e30", "--train_all")
    with pytest.raises(UserError, match="epoch 1: the loss is infinite or NaN") as error:
        call(train_baseline.main, *words)
    named = str(error.value).split(": ")[-1].split(", ")
    assert len(named) == 4
    there = {path.name for path in (prepared / "train_all_new").glob("*/*.jpg")}
    assert set(named) <= there
