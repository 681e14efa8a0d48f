"""Processes of DCGAN-tensorflow where things go wrong: signals, locks, odd names, closed streams.

As in test_dcgan.py nothing of it is imported here. What can be tried without a process of its own
is in DCGAN-tensorflow/tests.
"""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image
from test_dcgan import FOLDER, NETWORK, call, draw_people, one_line, tree

ROOT = FOLDER.parent


def bash(line, **environment):
    """Run a line of bash in DCGAN-tensorflow, PY being Python."""
    return subprocess.run(
        ["bash", "-c", line],
        cwd=FOLDER,
        capture_output=True,
        timeout=60,
        env=os.environ | {"PY": sys.executable, "KERAS_BACKEND": "torch", **environment},
    )


def test_images_is_a_copy():
    ours, roots = (
        (folder / "images.py").read_text(encoding="utf-8").splitlines()
        for folder in (FOLDER, ROOT / "reid")
    )
    pairs = list(zip(ours, roots, strict=True))
    differing = [one for one, other in pairs if one != other]
    assert len(differing) == 2
    assert "A copy of the root's reid/images.py" in differing[0]
    assert differing[1] == "from errors import UserError  # isort: skip"


def main(folder, data, *args, **environment):
    """Run main.py on the images in `data`, a folder whose name is put together by bash."""
    line = f"""exec "$PY" main.py --dataset "$FOLDER/{data}"/$'people\\xff' --checkpoint_dir \
        "$FOLDER/checkpoint" --sample_dir "$FOLDER/samples" {" ".join(map(str, args))}"""
    return bash(line, FOLDER=str(folder), **environment)


@pytest.mark.slow
def test_names_that_are_no_utf_8(tmp_path):
    """Training with ASCII streams and a keras.json of nonsense, generating with closed streams."""
    dataset = tmp_path / "data" / os.fsdecode(b"people\xff")
    draw_people(dataset, 9, size=(16, 32))
    (dataset / "0000_c1s1_000151_00.jpg").rename(dataset / os.fsdecode(b"\xfe\n.JPG"))
    Image.new("RGB", (16, 32)).save(dataset / "other.png")
    Image.new("RGB", (16, 32)).save(dataset / "other.webp")
    for name in ("__MACOSX", ".hidden"):
        draw_people(dataset / name, 1)
    (dataset / "._0001.jpg").write_text("macOS adds such files")
    (dataset / "folder.jpg").mkdir()
    home = tmp_path / "home/.keras"
    home.mkdir(parents=True)
    (home / "keras.json").write_text('{"floatx": 7, "image_data_format": "channels_first"}')
    options = ["--train", "--epoch=1", "--batch_size=4", "--precision=fp32", *NETWORK]
    done = main(tmp_path, "data", *options, PYTHONIOENCODING="ascii", HOME=str(home.parent))
    assert done.returncode == 0, done.stderr
    first, second, *_ = done.stdout.decode("ascii").splitlines()
    assert first == "--input_fname_pattern '*.jpg' leaves out 2 of 11 images"
    assert second.startswith("train: 9 images as 32x16") and "people\\udcff" in second
    assert sorted(path.name for path in home.iterdir()) == ["keras.json"]
    assert not list(tmp_path.rglob(".*.lock")) and not list(tmp_path.rglob(".*.partial"))

    # The images may have been moved.
    (tmp_path / "data").rename(tmp_path / "moved")
    generate = "--options=5 --sample_size=2 --seed=3 --train_size=2 --output_path"
    done = main(tmp_path, "moved", generate, tmp_path / "made", ">&- 2>&-")
    assert done.returncode == 0
    assert len(list((tmp_path / "made").iterdir())) == 3


@pytest.mark.slow
def test_too_large_a_network_is_one_line(tmp_path):
    draw_people(tmp_path / "people", 3)
    where = ["--dataset", tmp_path / "people", "--checkpoint_dir", tmp_path / "c"]
    where += ["--sample_dir", tmp_path / "s"]
    size = ["--z_dim=65535", "--gf_dim=65535", "--output_height=32"]
    done = call("main.py", "--train", *size, *where, backend="torch")
    assert one_line(done) and "the memory is full" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["people"]


# ---- signals and locks -------------------------------------------------------------------------


@pytest.mark.slow
def test_resize_survives_signals(tmp_path):
    draw_people(tmp_path / "made", 40)
    args = ["--input_path", tmp_path / "made", "--output_path", tmp_path / "new/gen_0000"]
    small = [sys.executable, "resizeImage.py", *map(str, args)]
    for number, code in ((signal.SIGTERM, 130), (signal.SIGKILL, -9)):
        large = [*small, "--width=1280", "--height=2560"]
        with subprocess.Popen(large, cwd=FOLDER, text=True, stderr=subprocess.PIPE) as process:
            while not list((tmp_path / "new").glob(".gen_0000.new.partial/*.jpg")):
                assert process.poll() is None
                time.sleep(0.01)
            if number == signal.SIGTERM:  # another process of the same output
                done = call(*small[1:])
                assert one_line(done) and "another process is writing it" in done.stderr
            process.send_signal(number)
            _, stderr = process.communicate(timeout=30)
        assert process.returncode == code
        if number == signal.SIGTERM:
            assert stderr == "stopped\n" and not (tmp_path / "new").exists()
    assert call(*small[1:]).returncode == 0
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["gen_0000"]
    assert len(list((tmp_path / "new/gen_0000").iterdir())) == 41


def test_a_run_belongs_to_one_process(tmp_path):
    draw_people(tmp_path / "data/people", 4)
    where = ["--data_dir", tmp_path / "data", "--dataset", "people"]
    where += ["--checkpoint_dir", tmp_path / "c", "--sample_dir", tmp_path / "s"]
    code = "import files, sys; from pathlib import Path\n"
    code += "with files.locked(Path(sys.argv[1])): print(flush=True); sys.stdin.read()"
    (tmp_path / "c/people").mkdir(parents=True)
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "c/people"],
        cwd=FOLDER,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        process.stdout.readline()
        before = tree(tmp_path)
        done = call("main.py", "--train", *where)
        assert one_line(done) and f"process {process.pid} on" in done.stderr
        assert tree(tmp_path) == before
        process.kill()
    # The lock ends with its process; a file that it left is in nobody's way.
    done = call("main.py", "--train", "--output_height=20", *where)
    assert one_line(done) and "multiples of 16" in done.stderr
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["people"]


# ---- streams and text --------------------------------------------------------------------------


@pytest.mark.slow
def test_streams(tmp_path):
    name = os.fsdecode(b"\xfe")
    (tmp_path / "in").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / f"in/{name}.png")
    line = f'"$PY" resizeImage.py --input_path {tmp_path}/in --output_path {tmp_path}/'
    for number, encoding in enumerate(("ascii", "cp932", "latin-1")):
        done = bash(f"{line}{number}$'\\xff'", PYTHONIOENCODING=encoding)
        assert done.returncode == 0 and b"1 images of 128x64" in done.stdout, done.stderr
        made = tmp_path / f"{number}{os.fsdecode(bytes([255]))}"
        assert (made / f"{name}.jpg").exists()
    for number, closed in enumerate((">&-", "2>&-", "<&- >&- 2>&-"), 3):
        assert bash(f"{line}{number} {closed}").returncode == 0
        assert bash(f"{line}{number} {closed}").returncode == 2
    assert one_line(bash(f"{line}6 >/dev/full"))
    assert one_line(bash('"$PY" main.py --help >/dev/full'))


def test_a_manifest_is_read_whatever_the_language(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    Image.new("RGB", (8, 8)).save(source / "x.png")
    (source / "manifest.json").write_bytes('{"name": "ü"}'.encode("utf-16"))
    line = f'"$PY" resizeImage.py --input_path {source} --output_path {tmp_path}/out'
    assert bash(line, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0").returncode == 0
    about = json.loads((tmp_path / "out/manifest.json").read_bytes())
    assert about["generated"] == {"name": "ü"}
