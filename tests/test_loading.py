"""Images in memory or read anew: the same training; the budget; other ways to start processes."""

import functools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, call, save_image

import train_baseline
from model import IMAGENET
from reid import cache, loading
from reid.errors import UserError
from reid.loading import read_all
from reid.transforms import EvalTransform, TrainTransform

FLAGS = f"{TINY} --batchsize 4 --epochs 1".split()


def train(prepared, folder, name, *flags):
    call(
        train_baseline.main,
        *("--data_dir", prepared, "--model_dir", folder, "--name", name, *FLAGS, *flags),
    )
    return torch.load(folder / name / "net_last.pth", weights_only=True)


def test_no_more_processes_than_processors(tmp_path, monkeypatch, recwarn):
    """The default of two, on a machine with one: PyTorch would warn of it for each batch loader."""
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0}, raising=False)
    paths = [save_image(tmp_path / f"{n}.png") for n in range(3)]
    transform = EvalTransform((128, 64))
    found = list(loading.EvalBatches(paths, transform, 2, 2, torch.device("cpu")))
    assert np.array_equal(torch.cat(found), [transform.read(path) for path in paths])
    assert not recwarn.list


@pytest.mark.slow
def test_cached_or_not_is_the_same(prepared, tmp_path):
    cached = train(prepared, tmp_path, "ram", "--cache", "ram")
    for workers in (0, 2):
        name = f"off{workers}"
        other = train(prepared, tmp_path, name, "--cache", "off", "--workers", workers)
        assert all(torch.equal(cached[name], other[name]) for name in cached)


def test_budget(tmp_path, monkeypatch):
    paths = [save_image(tmp_path / f"{n}.png", seed=n) for n in range(5)]
    read = TrainTransform(256, 128, IMAGENET, 0).read
    one = read(paths[0]).nbytes
    assert one == 288 * 144 * 3
    monkeypatch.setattr(loading, "CACHE_BUDGET", 5 * one)
    images = read_all([paths[:2], paths[2:]], read, 2, "auto", "")
    assert [i.tobytes() for i in images] == [read(path).tobytes() for path in paths]
    monkeypatch.setattr(loading, "CACHE_BUDGET", 5 * one - 1)
    assert read_all([paths], read, 2, "auto", "") is None
    assert len(read_all([paths, []], read, 0, "ram", "")) == 5
    assert read_all([paths], read, 2, "off", "") is None


def test_market_fits_into_memory_and_with_24000_generated_images_into_the_file_budget():
    one = 288 * 144 * 3
    assert 12_936 * one <= loading.CACHE_BUDGET
    assert (12_936 + 24_000) * one <= cache.BUDGET


def test_a_damaged_image_is_named(tmp_path):
    paths = [save_image(tmp_path / f"{n}.jpg", seed=n) for n in range(5)]
    paths[3].write_bytes(paths[3].read_bytes()[:300])
    for read in (TrainTransform(64, 32, IMAGENET, 0).read, EvalTransform((64, 32)).read):
        with pytest.raises(UserError, match=r"3\.jpg: can't be read as an image"):
            read_all([paths], read, 2, "ram", "")


@pytest.mark.slow
def test_processes_that_are_spawned_as_on_windows_and_macos(prepared, tmp_path):
    code = f"""
import multiprocessing
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    import sys; sys.path.insert(0, {str(ROOT)!r})
    import train_baseline
    train_baseline.main(sys.argv[1:])
"""
    (tmp_path / "start.py").write_text(code)
    flags = ["--data_dir", prepared, "--model_dir", tmp_path, "--name", "r", *FLAGS]
    flags += ["--cache", "off", "--workers", "1"]
    done = subprocess.run(
        [sys.executable, tmp_path / "start.py", *map(str, flags)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "best epoch 1" in done.stdout


@pytest.mark.slow
def test_tensorboards_files_take_no_tensorflow(tmp_path):
    code = "import sys; from reid.engine import tensorboard_writer as writer; writer(sys.argv[1])()"
    code += "; sys.exit('tensorflow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "log"], cwd=ROOT)
    assert done.returncode == 0
    assert [*(tmp_path / "log").iterdir()]


def test_tensorboard(prepared, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(prepared, tmp_path, "r", "--tensorboard", "--epochs", 2)
    events = EventAccumulator(str(tmp_path / "r" / "tensorboard")).Reload()
    lines = [json.loads(line) for line in (tmp_path / "r" / "log.jsonl").open()]
    found = [(e.step, round(e.value, 5)) for e in events.Scalars("train_loss")]
    assert found == [
        (n, pytest.approx(line["train_loss"], 1e-4)) for n, line in enumerate(lines, 1)
    ]


@pytest.mark.slow
def test_compiled_network_has_the_same_names(prepared, tmp_path, monkeypatch):
    """With dynamo's own back end, which traces but leaves the slow C++ compiler out."""
    eager = functools.partialmethod(torch.nn.Module.compile, backend="eager")
    monkeypatch.setattr(torch.nn.Module, "compile", eager)
    compiled = train(prepared, tmp_path, "compiled", "--compile")
    plain = train(prepared, tmp_path, "plain")
    assert compiled.keys() == plain.keys()
    assert all(
        torch.allclose(compiled[name].float(), plain[name].float(), atol=1e-4) for name in plain
    )
