"""The file of decoded images: the same training, shared, never stale, damaged or half-written."""

import errno
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, call, exit_code, save_image

import train_baseline
import train_lsro
from model import IMAGENET
from reid import cache, loading
from reid.cache import shared_images
from reid.errors import UserError
from reid.loading import read_all
from reid.transforms import TrainTransform

FLAGS = f"{TINY} --batchsize 4 --epochs 1".split()


@pytest.fixture
def paths(tmp_path):
    """Five images of several heights in a folder of its own."""
    return [save_image(tmp_path / "data" / f"{n}.png", seed=n, size=(40, 60 + n)) for n in range(5)]


def read(path):
    return TrainTransform(64, 32, IMAGENET, 0).read(path)


def shared(paths, how=read, about=(72, 36)):
    folder = paths[0].parent / "cache"
    return shared_images(paths, how, about, folder, threads=2, label="reading")


def must_not_read(path):
    raise AssertionError(f"{path} was decoded again")


def test_images_are_decoded_once_and_then_mapped(paths):
    first = shared(paths)
    again = shared(paths, must_not_read)
    for path, one, other in zip(paths, first, again, strict=True):
        np.testing.assert_array_equal(one, read(path))
        np.testing.assert_array_equal(other, one)
        assert not other.flags.owndata
        assert not other.flags.writeable
    [file] = (paths[0].parent / "cache").iterdir()
    np.testing.assert_array_equal(np.load(file), first)  # any program reads it


def test_a_quota_that_is_used_up(paths, monkeypatch):
    def used_up(descriptor):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "fsync", used_up)
    with pytest.raises(UserError, match=r"Disk quota exceeded\); take --cache ram"):
        shared(paths)
    assert not list((paths[0].parent / "cache").iterdir())


def test_other_images_sizes_or_versions_are_decoded_anew(paths, monkeypatch):
    shared(paths)
    decoded = []

    def reading(path):
        decoded.append(path)
        return read(path)

    shared(paths, reading, about=(80, 40))
    shared(paths[:4], reading)
    shared(paths[::-1], reading)
    assert len(decoded) == 5 + 4 + 5
    monkeypatch.setattr(cache.PIL, "__version__", "99")
    shared(paths, reading)
    assert len(decoded) == 19
    monkeypatch.undo()
    shared(paths, must_not_read)
    facts = os.stat(paths[2])
    save_image(paths[2], seed=9, size=(40, 62))
    os.utime(paths[2], ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
    found = shared(paths, reading)
    assert len(decoded) == 24
    np.testing.assert_array_equal(found[2], read(paths[2]))


def test_a_dataset_may_move(paths, tmp_path):
    shared(paths)
    (tmp_path / "data").rename(tmp_path / "moved")
    shared([tmp_path / "moved" / path.name for path in paths], must_not_read)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "gone", "header"])
def test_a_damaged_file_is_made_anew(paths, damage):
    shared(paths)
    [file] = (paths[0].parent / "cache").iterdir()
    content = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(content[:-1])
    elif damage == "flipped":
        content[1000] ^= 1
        file.write_bytes(content)
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "gone":
        file.unlink()
    else:
        assert b"72, 36" in content
        file.write_bytes(content.replace(b"72, 36", b"36, 72"))
    for path, image in zip(paths, shared(paths), strict=True):
        np.testing.assert_array_equal(image, read(path))
    shared(paths, must_not_read)


def test_the_oldest_files_make_room(paths, monkeypatch):
    shared(paths)
    folder = paths[0].parent / "cache"
    size = next(folder.iterdir()).stat().st_size
    monkeypatch.setattr(cache, "BUDGET", 2 * size)

    def age():
        for file in folder.glob("*.npy"):  # a second older than it is
            facts = os.stat(file)
            os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns - 10**9))

    for number in range(4):
        shared(paths, about=number)
        age()
    assert len(list(folder.iterdir())) == 2
    for number in (3, 2):
        shared(paths, must_not_read, about=number)
        age()
    shared(paths, about=4)
    shared(paths, must_not_read, about=2)  # it was used after 3
    monkeypatch.setattr(cache, "BUDGET", size - 1)  # never the one that is asked for
    shared(paths, about=5)
    shared(paths, must_not_read, about=5)


def test_auto_takes_the_first_that_has_room(paths, monkeypatch, tmp_path):
    folder = tmp_path / "data" / "cache"
    size = sum(read(path).nbytes for path in paths)

    def auto():
        return read_all([paths], read, 1, "auto", "", folder, "about")

    assert auto()[0].base is not None
    next(folder.glob("*.npy")).unlink()
    monkeypatch.setattr(cache, "BUDGET", size // 2)
    assert all(image.flags.owndata for image in auto())
    monkeypatch.setattr(loading, "CACHE_BUDGET", size // 2)
    assert auto() is None
    monkeypatch.setattr(cache, "BUDGET", 10 * size)
    assert auto() is not None
    monkeypatch.setattr(cache, "BUDGET", size // 2)
    assert auto() is not None  # the file that is there by now
    monkeypatch.setattr(cache, "BUDGET", 10 * size)
    next(folder.glob("*.npy")).unlink()
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: type("", (), {"free": size}))
    assert auto() is None


def writer(folder, wait):
    """A process that stores the images of `folder`, slowly, then says so."""
    code = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
sys.path.insert(0, {str(ROOT / "tests")!r})
from pathlib import Path
import test_cache
paths = sorted(Path({str(folder)!r}).glob("*.png"))
def slow(path):
    print("reads", flush=True)
    time.sleep({wait})
    return test_cache.read(path)
test_cache.shared(paths, slow)
print("done", flush=True)
"""
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_two_processes_at_once_decode_once(paths):
    both = [writer(paths[0].parent, wait=0.3) for _ in range(2)]
    said = [process.communicate(timeout=60)[0] for process in both]
    assert sorted(text.count("reads") for text in said) == [0, 5]
    assert all(text.endswith("done\n") for text in said)
    for path, image in zip(paths, shared(paths, must_not_read), strict=True):
        np.testing.assert_array_equal(image, read(path))


@pytest.mark.slow
def test_a_kill_leaves_nothing_that_is_taken(paths):
    process = writer(paths[0].parent, wait=5)
    process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    folder = paths[0].parent / "cache"
    assert not list(folder.glob("*.npy"))
    shared(paths, about="other")
    assert not list(folder.glob(".*.partial"))  # whoever finds them clears them away
    started = time.monotonic()
    for path, image in zip(paths, shared(paths), strict=True):
        np.testing.assert_array_equal(image, read(path))
    assert time.monotonic() - started < 5  # the killed process's lock is gone with it
    assert not [file for file in folder.iterdir() if file.name.endswith((".partial", ".lock"))]


def trained(data, folder, name, *flags):
    places = ("--data_dir", data, "--model_dir", folder, "--name", name)
    call(train_baseline.main, *places, *FLAGS, *flags)
    return torch.load(folder / name / "net_last.pth", weights_only=True)


@pytest.mark.slow
def test_all_modes_train_alike(prepared, tmp_path, monkeypatch):
    weights = trained(prepared, tmp_path, "ram", "--cache", "ram")
    for name, mode in (("made", "file"), ("found", "file"), ("auto", "auto"), ("off", "off")):
        if name in ("found", "auto"):
            monkeypatch.setattr(cache, "store", None)
        other = trained(prepared, tmp_path, name, "--cache", mode, "--workers", 0)
        monkeypatch.undo()
        assert all(torch.equal(weights[key], other[key]) for key in weights), name
    assert len(list((prepared / "cache").iterdir())) == 1


def test_runs_with_and_without_generated_images_share_the_real_ones(prepared, tmp_path):
    places = ("--data_dir", prepared, "--model_dir", tmp_path, *FLAGS, "--cache", "file")
    call(train_baseline.main, *places, "--name", "baseline")
    [real] = (prepared / "cache").glob("*.npy")
    made = real.stat().st_ino
    save_image(prepared / "train_new" / "gen_0000" / "a.png")
    call(train_lsro.main, *places, "--name", "lsro")
    assert len(list((prepared / "cache").glob("*.npy"))) == 2
    assert real.stat().st_ino == made


def test_a_file_that_cannot_be_read_again(paths, monkeypatch):
    """As when another process has made room for its own at that moment."""
    monkeypatch.setattr(cache, "stored_images", lambda file: None)
    with pytest.raises(UserError, match=r"npy: can't be read again once written; take --cache ram"):
        shared(paths)


def test_a_folder_that_cannot_be_written(prepared, tmp_path, capsys):
    (prepared / "cache").write_text("a file")
    flags = ("--data_dir", prepared, "--model_dir", tmp_path / "model", *FLAGS, "--cache", "file")
    assert exit_code(train_baseline.main, *flags) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1
    assert f"{prepared / 'cache'}: can't be made" in err[0]
    assert not (tmp_path / "model").exists()
