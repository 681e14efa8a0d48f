"""Outputs that are whole or not there, what kills leave, and who may write what."""

import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
from conftest import ROOT

from reid import files
from reid.errors import UserError
from reid.files import (
    check_results,
    check_writable,
    copy,
    link,
    locked,
    new_folder,
    read_json,
    read_results,
    replacing,
    update_results,
    write_json,
)

HOLDER = """
import sys, time
from reid.errors import run
from reid.files import new_folder, replacing
def main():
    with {what}(sys.argv[1]) as temporary:
        {fill}
        print("begun", flush=True)
        time.sleep(60)
run(main)
"""
FOLDER = HOLDER.format(what="new_folder", fill='(temporary / "half.txt").write_text("x")')
FILE = HOLDER.format(what="replacing", fill='temporary.write_text("x")')


def begun(code, path):
    """A process that is in the middle of writing `path`."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "begun\n"
    return process


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("code", [FOLDER, FILE])
def test_sigterm_leaves_nothing(code, tmp_path):
    process = begun(code, tmp_path / "new" if code is FOLDER else tmp_path / "x")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "interrupted\n")
    assert tree(tmp_path) == []


@pytest.mark.parametrize("numbers", [(15, 15), (2, 15), (1, 2)])
def test_a_second_signal_does_not_disturb_the_tidying_up(numbers, tmp_path):
    code = f"import signal; signal.signal(2, signal.default_int_handler){FOLDER}"
    process = begun(code, tmp_path / "x")
    for number in numbers:
        process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "interrupted\n")
    assert tree(tmp_path) == []


@pytest.mark.parametrize("code", [FOLDER, FILE])
def test_what_a_kill_leaves_the_next_clears(code, tmp_path):
    process = begun(code, tmp_path / "x")
    process.kill()
    process.wait()
    assert tree(tmp_path)[:2] == [".x.lock", ".x.partial"]
    if code is FOLDER:
        with new_folder(tmp_path / "x") as temporary:
            (temporary / "whole.txt").write_text("y")
        assert tree(tmp_path) == ["x", "x/whole.txt"]
    else:
        with replacing(tmp_path / "x") as temporary:
            temporary.write_text("y")
        assert (tree(tmp_path), (tmp_path / "x").read_text()) == (["x"], "y")


def test_a_folder_belongs_to_one_process(tmp_path):
    process = begun(FOLDER, tmp_path / "x")
    says = rf"x: another process is writing it \(process {process.pid} on "
    with pytest.raises(UserError, match=says), new_folder(tmp_path / "x"):
        pass
    assert "x" not in tree(tmp_path)[0].split("/")  # nor has it taken away what the other has
    assert ".x.partial/half.txt" in tree(tmp_path)
    process.kill()
    process.wait()


def test_who_writes_the_same_file_waits(tmp_path):
    process = begun(FILE.replace("sleep(60)", "sleep(1)"), tmp_path / "x")
    started = time.monotonic()
    with replacing(tmp_path / "x") as temporary:
        assert time.monotonic() - started > 0.5
        temporary.write_text("ours")
    assert process.wait() == 0
    assert (tmp_path / "x").read_text() == "ours"


def test_no_section_is_lost_where_many_write_at_once(tmp_path):
    code = "import sys; from reid.files import update_results as u; u(sys.argv[1], sys.argv[2], {})"
    path = str(tmp_path / "results.json")
    processes = [
        subprocess.Popen([sys.executable, "-c", code, path, f"section{n}"], cwd=ROOT)
        for n in range(8)
    ]
    assert [process.wait() for process in processes] == [0] * 8
    assert read_results(path).keys() == {f"section{n}" for n in range(8)}
    assert tree(tmp_path) == ["results.json"]


def test_what_a_link_leads_to_is_written(tmp_path):
    (tmp_path / "large_disk").mkdir()
    name = tmp_path / "results.json"
    name.symlink_to(tmp_path / "large_disk" / "r.json")
    write_json(name, {"a": 1})
    assert name.is_symlink()
    assert read_json(tmp_path / "large_disk" / "r.json", "") == {"a": 1}
    assert [path.name for path in (tmp_path / "large_disk").iterdir()] == ["r.json"]


def test_a_file_that_somebody_has_open_for_a_moment(tmp_path, monkeypatch):
    """On Windows it can't be replaced meanwhile."""
    monkeypatch.setattr(files, "TRIES", 5)
    refusals, replace = [1, 1], os.replace

    def busy(path, name):
        if refusals:
            raise PermissionError(refusals.pop(), "Access is denied")
        replace(path, name)

    monkeypatch.setattr(os, "replace", busy)
    write_json(tmp_path / "a.json", {})
    with new_folder(tmp_path / "new"):
        refusals.append(1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "new"]
    refusals += [1] * 5
    with pytest.raises(UserError, match="can't be written"):
        write_json(tmp_path / "a.json", {"b": 1})
    assert read_json(tmp_path / "a.json", "") == {}


def test_a_link_to_an_empty_folder_leads_to_the_new_one(tmp_path):
    (tmp_path / "large_disk").mkdir()
    name = tmp_path / "pytorch"
    name.symlink_to(tmp_path / "large_disk")
    with new_folder(name) as folder:
        (folder / "a.txt").touch()
    assert name.is_symlink()
    assert (tmp_path / "large_disk" / "a.txt").exists()


def test_a_file_that_is_gone_is_named_in_place_of_the_output(tmp_path):
    for put in link, copy:
        with (
            pytest.raises(UserError, match=r"/gone\.jpg: can't be read"),
            new_folder(tmp_path / "new") as folder,
        ):
            put(tmp_path / "gone.jpg", folder / "a.jpg")
    assert not list(tmp_path.iterdir())


def test_a_lock_that_was_left_is_taken(tmp_path):
    (tmp_path / ".x.lock").write_text("process 1 on elsewhere")
    with locked(tmp_path / "x"):
        assert str(os.getpid()) in (tmp_path / ".x.lock").read_text()
    assert tree(tmp_path) == []


def test_a_device_or_a_pipe_stays_one(tmp_path):
    """As root, a file would take the place of /dev/null, too."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for name in ("pipe", "link"):
        for write in (check_writable, partial(write_json, content={}), check_results):
            with pytest.raises(UserError, match=r"/pipe: is no regular file; name another"):
                write(tmp_path / name)
    assert (tmp_path / "pipe").is_fifo()
    assert tree(tmp_path) == ["link", "pipe"]


def test_results_that_are_none(tmp_path):
    for text in ("[1]", '{"train": 1}', "{", "\0"):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(UserError, match=r"results\.json: "):
            update_results(tmp_path / "results.json", "evaluate", {})
        assert (tmp_path / "results.json").read_text() == text
    assert tree(tmp_path) == ["results.json"]
