"""Text: what is printed whatever the encoding, text files of any, JSON of other types."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

from reid.errors import UserError, printable
from reid.files import parse_json, read_json, read_text, write_text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_text_is_read_in_each_encoding_that_editors_write(encoding, tmp_path):
    (tmp_path / "list.txt").write_bytes("é 数\r\n".encode(encoding))
    assert read_text(tmp_path / "list.txt").splitlines() == ["é 数"]


def test_text_is_written_in_utf_8(tmp_path):
    write_text(tmp_path / "table.md", "– 数\n")
    assert (tmp_path / "table.md").read_bytes() == "– 数\n".encode()
    write_text(tmp_path / "table.md", f"python a.py {os.fsdecode(b'x' + bytes([255]))}\n")
    assert read_text(tmp_path / "table.md") == "python a.py x\\udcff\n"


def test_what_is_no_text(tmp_path):
    with pytest.raises(UserError, match=r"none\.txt: no such file"):
        read_text(tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(UserError, match="not text in UTF-8; save it"):
        read_text(tmp_path / "latin.txt")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="no such file"):
        read_text(tmp_path / "pipe")


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1]", "its content is not an object"),
        ("null", "its content is not an object"),
        ('{"rate": "0.1"}', "its rate is not a number"),
        ('{"rate": true}', "its rate is not a number"),
        ('{"number": 1.5}', "its number is not a whole number"),
        ('{"content": 1}', "its content is not a list"),
    ],
)
def test_json_of_other_types_is_refused(text, says):
    with pytest.raises(UserError, match=f"^x.json: {says}.*; write it again$"):
        parse_json(text, "x.json", "write it again", rate=float, number=int, content=list)


def test_json_of_the_right_types(tmp_path):
    (tmp_path / "x.json").write_text('{"rate": 1, "number": 2, "other": []}')
    found = read_json(tmp_path / "x.json", "", rate=float, number=int, missing=dict)
    assert found == {"rate": 1, "number": 2, "other": []}


def test_an_error_is_one_line_that_can_be_printed_anywhere():
    assert printable("a\nb\udcff数") == "a\\nb\\udcff数"
    assert str(UserError("model/a\nb: no such run")) == "model/a\\nb: no such run"
    # As it comes from a loader's process.
    wrapped = "Caught UserError in DataLoader worker\n  File x\nreid.errors.UserError: a.jpg: bad"
    assert str(UserError(wrapped)) == "a.jpg: bad"


SCRIPT = """
import sys
from reid.errors import UserError, run
def main():
    print("– 数 \\udcff", flush=True)
    raise UserError("数 \\udcff: no such folder")
run(main)
"""


def run_code(code, shell="", **environment):
    """Run code as a script; `shell` stands after the command."""
    return subprocess.run(
        f'"{sys.executable}" - {shell}',
        input=code,
        shell=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
    )


def test_torchrun_of_a_script_that_is_one_process():
    of_two = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2"}
    first, second = (run_code(SCRIPT, RANK=rank, **of_two) for rank in "01")
    line = "error: torchrun: this script is one process; start it with python\n"
    assert (first.returncode, first.stdout, first.stderr) == (2, "", line)
    assert (second.returncode, second.stdout, second.stderr) == (2, "", "")
    shared = SCRIPT.replace("run(main)", "run(main, torchrun=True)")
    assert "数" in run_code(shared, **of_two).stdout


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp932", "utf-8"])
def test_any_text_can_be_printed_in_any_encoding(encoding):
    done = run_code(SCRIPT, PYTHONIOENCODING=encoding)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ") and "no such folder" in done.stderr


@pytest.mark.parametrize("shell, code", [(">&-", 2), ("2>&-", 2), (">&- 2>&-", 2)])
def test_standard_streams_may_be_closed(shell, code):
    done = run_code(SCRIPT, shell)
    assert done.returncode == code
    assert "Traceback" not in done.stderr


def test_a_full_disk_under_the_output_is_one_line():
    code = SCRIPT.replace(", flush=True", "").replace("    raise", "    # raise")
    done = run_code(code, ">/dev/full")
    assert done.returncode == 2
    assert done.stderr.startswith("error: input or output: No space left on device; check")
    assert done.stderr.count("\n") == 1


def test_what_the_system_refuses_is_one_line_and_what_is_ours_a_traceback():
    for failure, says in [
        ("MemoryError()", "error: the memory is full"),
        ("OSError(36, 'File name too long', 'x' * 300)", "x: File name too long"),
        ("RuntimeError('CUDA error: out of memory')", "error: the GPU's memory is full"),
        ("__import__('torch').distributed.DistBackendError('NCCL: no space')", "NCCL: no space"),
        ("RuntimeError('DataLoader worker (pid 5) is killed by signal: Killed.')", "--workers"),
    ]:
        done = run_code(SCRIPT.replace('UserError("数 \\udcff: no such folder")', failure))
        assert done.returncode == 2, done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert says in done.stderr
    done = run_code(SCRIPT.replace('UserError("数 \\udcff: no such folder")', "KeyError(1)"))
    assert done.returncode == 1
    assert "Traceback" in done.stderr
