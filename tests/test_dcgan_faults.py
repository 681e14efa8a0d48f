"""DCGAN-tensorflow where things go wrong: kills, full disks, odd names and texts, wrong flags.

As in test_dcgan.py nothing of it is imported here. What needs no network is tried many times in one
process that imports neither TensorFlow nor PyTorch.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from test_dcgan import FOLDER, NETWORK, call, draw_people, tree

ROOT = FOLDER.parent


def script(code, *args):
    """Run Python code in DCGAN-tensorflow, which must succeed."""
    done = call("-c", code, *args, backend="torch")
    assert done.returncode == 0, done.stderr
    return done


def bash(line, **environment):
    """Run a line of bash in DCGAN-tensorflow, PY being Python."""
    return subprocess.run(
        ["bash", "-c", line],
        cwd=FOLDER,
        capture_output=True,
        timeout=60,
        env=os.environ | {"PY": sys.executable, "KERAS_BACKEND": "torch", **environment},
    )


def one_line(done):
    """Whether a process ended as it should for what its user can mend."""
    lines = done.stderr.splitlines()
    start = "error: " if isinstance(done.stderr, str) else b"error: "
    return done.returncode == 2 and len(lines) == 1 and lines[0].startswith(start)


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


# ---- a run with odd names ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run of an epoch on 9 images, in a folder and with names that are no UTF-8."""
    place = tmp_path_factory.mktemp("faults")
    dataset = place / "data" / os.fsdecode(b"people\xff")
    draw_people(dataset, 9, size=(16, 32))
    (dataset / "0000_c1s1_000151_00.jpg").rename(dataset / os.fsdecode(b"\xfe\n.JPG"))
    Image.new("RGB", (16, 32)).save(dataset / "other.png")
    Image.new("RGB", (16, 32)).save(dataset / "other.webp")
    for name in ("__MACOSX", ".hidden"):
        draw_people(dataset / name, 1)
    (dataset / "._0001.jpg").write_text("macOS adds such files")
    (dataset / "folder.jpg").mkdir()
    home = place / "home/.keras"
    home.mkdir(parents=True)
    (home / "keras.json").write_text('{"floatx": 7, "image_data_format": "channels_first"}')
    options = ["--train", "--epoch=1", "--batch_size=4", "--precision=fp32", *NETWORK]
    done = main(place, "data", *options, PYTHONIOENCODING="ascii", HOME=str(home.parent))
    assert done.returncode == 0, done.stderr
    first, second, *_ = done.stdout.decode("ascii").splitlines()
    assert first == "--input_fname_pattern '*.jpg' leaves out 2 of 11 images"
    assert second.startswith("train: 9 images as 32x16") and "people\\udcff" in second
    assert sorted(path.name for path in home.iterdir()) == ["keras.json"]
    assert not list(place.rglob(".*.lock")) and not list(place.rglob(".*.partial"))
    return place


def main(place, data, *args, **environment):
    """Run main.py on the images in `data`; the odd name is put together by bash."""
    line = f"""exec "$PY" main.py --dataset "$PLACE/{data}"/$'people\\xff' --checkpoint_dir \
        "$PLACE/checkpoint" --sample_dir "$PLACE/samples" {" ".join(map(str, args))}"""
    return bash(line, PLACE=str(place), **environment)


def test_keras_json_changes_nothing_and_too_large_a_network_is_one_line(tmp_path):
    (tmp_path / ".keras").mkdir()
    settings = {"floatx": "float16", "image_data_format": "channels_first", "epsilon": 0.5}
    (tmp_path / ".keras/keras.json").write_text(json.dumps(settings | {"backend": "jax"}))
    draw_people(tmp_path / "people", 3)
    code = """import errors, main, os, sys
os.environ |= {"HOME": sys.argv[1], "KERAS_HOME": sys.argv[1] + "/.keras"}
main.start_backend()
import keras
print(keras.config.floatx(), keras.config.image_data_format(), keras.config.epsilon())
print(keras.config.backend())
flags = "--train --z_dim=65535 --gf_dim=65535 --output_height=32 --dataset=people --data_dir"
where = [sys.argv[1], "--checkpoint_dir", sys.argv[1] + "/c", "--sample_dir", sys.argv[1] + "/s"]
errors.run(lambda: main.main([*flags.split(), *where]))"""
    done = call("-c", code, tmp_path, backend="torch")
    assert done.stdout.split()[:4] == ["float32", "channels_last", "1e-07", "torch"]
    assert one_line(done) and "the memory is full" in done.stderr
    assert not (tmp_path / "c").exists() and not (tmp_path / "s").exists()


def test_generates_only_for_the_dataset_it_was_trained_on(place, tmp_path):
    # The same images elsewhere, with a closed standard output and error, and another --seed.
    (place / "data").rename(place / "moved")
    done = main(
        place, "moved", "--options=5 --sample_size=2 --seed=3 --train_size=2 --output_path",
        tmp_path / "made", ">&- 2>&-",
    )  # fmt: skip
    (place / "moved").rename(place / "data")
    assert done.returncode == 0
    assert len(list((tmp_path / "made").iterdir())) == 3

    # Other images in a folder of the same name; or none.
    for name, count in (("others", 3), ("none", 0)):
        other = place / name / os.fsdecode(b"people\xff")
        draw_people(other, count)
        done = main(place, name, "--options=5 --output_path", tmp_path / "no")
        assert one_line(done) and b"are not those of" in done.stderr
        assert b"/data/people\\udcff" in done.stderr and name.encode() in done.stderr
    # Where there is no such folder, it goes on.
    code = "import errors, main, sys; main.start_backend = lambda: sys.exit('went on'); "
    code += "errors.run(main.main)"
    nowhere = place / "nowhere" / os.fsdecode(b"people\xff")
    args = ["--options=0", "--dataset", nowhere, "--checkpoint_dir", place / "checkpoint"]
    done = call("-c", code, *args)
    assert done.stderr == "went on\n"


# ---- kills and full disks ----------------------------------------------------------------------

# A GAN of one number, whose samples are varied up to epoch 2. Its training is killed at each thing
# that it does with a file.
KILLS = """
import json, os, signal, sys
from pathlib import Path
import numpy as np
import checkpoint, main, training
from errors import UserError

place = Path(sys.argv[1])
people = np.random.default_rng(0).integers(0, 256, (8, 32, 16, 3), dtype=np.uint8)
people = people[:, ::8, ::8].repeat(8, 1).repeat(8, 2)
settings = {"output_width": 128, "input_width": 128, "folder": "x", "images": 8}
options = main.NETWORK | main.TRAINING | settings | {"fingerprint": "x"}

class OneNumber:
    def __init__(self): self.steps, self.epochs, self.batches, self.sum = 0, 0, 0, 0.0
    def noise(self, n, rng): return np.zeros((n, 1))
    def generate(self, z): return people[np.arange(len(z)) % (8 if self.epochs <= 2 else 1)]
    def train_step(self, real):
        self.steps += 1
        self.sum += real.mean() * self.steps
        return self.sum, 1.0
    def state(self):
        return {"sum": self.sum, "done": np.array([self.steps, self.epochs, self.batches])}

def train(run):
    args = main.get_parser().parse_args(["--train", "--epoch=4", "--save_every=1"])
    main.settle(args, run)
    args.batch_size, args.sample_dir = 4, str(run) + "_samples"
    gan = OneNumber()
    if checkpoint.numbered(run):
        state, _ = checkpoint.load(checkpoint.numbered(run)[-1])
        gan.sum = float(state["sum"])
        gan.steps, gan.epochs, gan.batches = state["done"].tolist()
    log = training.start_log(run, options, gan.epochs + 1)
    training.train(gan, people, args, run, log)

def outcome(run):
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for line in log:
        del line["seconds"]
    files = {p.name: p.read_bytes() for p in run.glob("*.npz")}
    return sorted(p.name for p in run.iterdir()), log, files

def killed_at(number, run):
    '''Train in a child process that is killed at this event; whether there was one.'''
    child = os.fork()
    if not child:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        count = 0
        def hook(event, words):
            nonlocal count
            if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "fcntl.lockf"):
                if event == "fcntl.lockf" or str(run) in str(words[0]):
                    count += 1
                    if count == number:
                        os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        train(run)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])

os.fsync = lambda descriptor: None  # slow, and of use only in a power cut
train(place / "unbroken")
expected = outcome(place / "unbroken")
assert expected[0] == ["ckpt-0003.npz", "ckpt-0004.npz", "healthy.npz", "log.jsonl",
                       "options.json"], expected[0]
number = 1
while killed_at(number, run := place / f"run{number}"):
    if checkpoint.numbered(run):
        checkpoint.find(run, "healthy")  # which the samples of the first epochs were
    train(run)
    for old in checkpoint.numbered(run)[:-2]:  # killed at the very end, before it was deleted
        assert old.name == "ckpt-0002.npz"
        old.unlink()
    got = outcome(run)
    assert got == expected, (number, got[:2], expected[:2])
    number += 1
assert number > 100, number

# A user who deletes the numbered checkpoints starts anew; those of before are no part of it.
for path in checkpoint.numbered(run):
    path.unlink()
checkpoint.find(run, "healthy")
training.start_log(run, options, 1)
assert sorted(p.name for p in run.iterdir()) == ["log.jsonl", "options.json"]
print(number)
"""


def test_killed_at_any_point_a_training_ends_the_same(tmp_path):
    assert int(script(KILLS, tmp_path).stdout.splitlines()[-1]) > 100


def test_full_disk_names_the_file(tmp_path):
    """A limit on the size of files stands for a disk that is full."""
    code = """import resource, sys
from pathlib import Path
import numpy as np
import checkpoint, errors, files, training
place = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
class Bar:
    def write(self, text): raise AssertionError("written")
record = {"epoch": 1, "text": "x" * 9000}
for work in (lambda: checkpoint.save(place / "run", 1, {"a": np.zeros(1000)}),
             lambda: training.start_log(place / "run", {"x": "y" * 9000}, 1),
             lambda: training.report(record, 1, Bar(), place, place / "log.jsonl")):
    try:
        work()
        raise AssertionError("no error")
    except errors.UserError as error:
        print(error)"""
    lines = script(code, tmp_path).stdout.splitlines()
    for line, name in zip(lines, ("ckpt-0001.npz", "options.json", "log.jsonl"), strict=True):
        assert f"/{name}: can't be written (File too large)" in line
    assert {path.name for path in tmp_path.rglob("*")} == {"run", "log.jsonl"}

    draw_people(tmp_path / "made", 3)
    line = f'ulimit -f 1; "$PY" resizeImage.py --input_path {tmp_path}/made'
    done = bash(f"{line} --width 640 --height 640 --output_path {tmp_path}/new/gen_0000")
    assert one_line(done) and f"{tmp_path}/new/gen_0000: can't be written".encode() in done.stderr
    assert not (tmp_path / "new").exists()


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


# ---- text, streams, flags ----------------------------------------------------------------------


def test_streams(tmp_path):
    name = os.fsdecode(b"\xfe")
    (tmp_path / "in").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / f"in/{name}.png")
    line = f'"$PY" resizeImage.py --input_path {tmp_path}/in --output_path {tmp_path}/'
    for number, encoding in enumerate(("ascii", "cp932", "latin-1")):
        done = bash(f"{line}{number}$'\\xff'", PYTHONIOENCODING=encoding)
        assert done.returncode == 0 and b"1 images of 64x128" in done.stdout, done.stderr
        made = tmp_path / f"{number}{os.fsdecode(bytes([255]))}"
        assert (made / f"{name}.jpg").exists()
    for number, closed in enumerate((">&-", "2>&-", "<&- >&- 2>&-"), 3):
        assert bash(f"{line}{number} {closed}").returncode == 0
        assert bash(f"{line}{number} {closed}").returncode == 2
    assert one_line(bash(f"{line}6 >/dev/full"))
    assert one_line(bash('"$PY" main.py --help >/dev/full'))


def test_manifests(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    Image.new("RGB", (8, 8)).save(source / "x.png")
    line = f'"$PY" resizeImage.py --input_path {source} --output_path {tmp_path}/out'
    for content, message in (
        (b"[1]", b"not a JSON object"),
        (b"{", b"not valid JSON"),
        (b"[" * 100_000, b"not valid JSON"),
        (b'{"x": "\xff"}', b"not text in UTF-8"),
    ):
        (source / "manifest.json").write_bytes(content)
        done = bash(line)
        assert one_line(done) and message in done.stderr
    (source / "manifest.json").write_bytes('{"name": "ü"}'.encode("utf-16"))
    assert bash(line, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0").returncode == 0
    about = json.loads((tmp_path / "out/manifest.json").read_bytes())
    assert about["generated"] == {"name": "ü"}


# Each list of flags in one process: prints the line that each ends in.
EACH = """
import contextlib, io, json, sys
import errors, main
errors.prepare_streams = lambda: None  # of pytest's process alone
for flags in json.loads(sys.argv[1]):
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        try:
            errors.run(lambda: main.main(flags))
            code = 0
        except SystemExit as stop:
            code = stop.code
    print(json.dumps([code, stderr.getvalue()]))
"""


def lines_of(lists):
    """The error line of main.py for each of these lists of flags."""
    done = script(EACH, json.dumps(lists))
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == len(lists)
    for code, text in lines:
        assert code == 2 and text.startswith("error: ") and text.count("\n") == 1, text
    return [text for _, text in lines]


def test_flags(tmp_path):
    draw_people(tmp_path / "people", 3)
    os.mkfifo(tmp_path / "people/pipe.jpg")
    long = "x" * 300
    known = [f"--dataset={tmp_path}/people", f"--checkpoint_dir={tmp_path}/c"]
    known += ["--train", f"--sample_dir={tmp_path}/s"]
    wrong = {
        "--seed=4294967296": "4294967296 is not under 2^32",
        "--z_dim=65536": "65536 is not under 2^16",
        "--sample_size=99999999999999999999": "is not under 2^31",
        "--learning_rate=nan": "must be a finite number",
        "--beta1=inf": "must be a finite number",
        "--ema=-inf": "must be a finite number",
        "--dataset=": "--dataset: must not be empty",
        "--data_dir=": "--data_dir: must not be empty",
        "--checkpoint_dir=": "--checkpoint_dir: must not be empty",
        "--output_path=": "--output_path: must not be empty",
        "--sample_dir=": "--sample_dir: must not be empty",
        f"--dataset={long}": f"{long}: File name too long",
        f"--checkpoint_dir={long}": f"{long}",
        f"--sample_dir={long}": f"{long}: File name too long",
        f"--sample_dir={long[:250]}": f"{long[:250]}.new.partial: File name too long",
        "--output_height=32": "pipe.jpg: can't be read as an image (it is no regular file)",
    }
    for line, message in zip(
        lines_of([[*known, flag] for flag in wrong]), wrong.values(), strict=True
    ):
        assert message in line
    assert [path.name for path in tmp_path.iterdir()] == ["people"]
    done = call("resizeImage.py", "--output_path", "")
    assert one_line(done) and "--output_path: must not be empty" in done.stderr


def test_damaged_run_folders(tmp_path):
    good = {"output_height": 32, "output_width": 16, "z_dim": 6, "gf_dim": 4, "df_dim": 4}
    good |= {"spectral_norm": False, "ema": 0.999, "batch_size": 4, "learning_rate": 1}
    good |= {"beta1": 0.5, "augment": "flip", "precision": "bf16", "crop": True, "seed": 0}
    good |= {"input_height": 128, "input_width": 128, "input_fname_pattern": "*.jpg"}
    good |= {"train_size": None, "fingerprint": "00", "images": 3, "folder": "/x/people"}
    wrong = [
        ({**good, "z_dim": "6"}, "its z_dim is not a whole number"),
        ({**good, "z_dim": True}, "its z_dim is not a whole number"),
        ({**good, "z_dim": -6}, "--z_dim: must be 1 or more, not -6"),
        ({**good, "crop": 1}, "its crop is not true or false"),
        ({**good, "ema": None}, "its ema is not a number"),
        ({**good, "ema": float("nan")}, "--ema: must be a finite number"),
        ({**good, "train_size": "all"}, "its train_size is not a whole number or null"),
        ({**good, "augment": "rotate"}, "--augment: invalid policy value"),
        ({**good, "folder": []}, "its folder is not text"),
        ({key: good[key] for key in good if key != "fingerprint"}, "its fingerprint is not text"),
        ([good], "not a JSON object"),
        (good, "the images in"),  # in order; but the dataset is another
    ]
    flags = []
    for number, (content, _) in enumerate(wrong):
        run = tmp_path / f"{number}/people"
        run.mkdir(parents=True)
        (run / "ckpt-0001.npz").touch()
        encoding = "utf-16" if content is good else "utf-8-sig"
        (run / "options.json").write_text(json.dumps(content), encoding=encoding)
        flags.append(["--options=0", f"--checkpoint_dir={run.parent}", "--dataset"])
        flags[-1].append(str(tmp_path / "people"))
    (tmp_path / "people").mkdir()
    shutil.copytree(tmp_path / "11", tmp_path / "12")
    (tmp_path / "12/people/options.json").unlink()
    flags.append([*flags[-1], f"--checkpoint_dir={tmp_path}/12"])
    flags.append([*flags[-2], "--which=healthy"])
    messages = [*(message for _, message in wrong), "options.json: no such file"]
    messages.append("no checkpoint's samples were found varied enough")
    for line, message in zip(lines_of(flags), messages, strict=True):
        assert message in line

    # log.jsonl: a half-written last line is cut off, another damage is said.
    code = """import sys; from pathlib import Path; import errors, training
for name in sys.argv[2:]:
    try:
        print(training.lines_before(Path(sys.argv[1], name), 3))
    except errors.UserError as error:
        print(error)"""
    lines = ['{"epoch": 1}\n', '{"epoch": 2}\n', '{"epoch": 3}\n', '{"epo']
    (tmp_path / "torn").write_text("".join(lines))
    (tmp_path / "list").write_text("[]\n" + "".join(lines))
    (tmp_path / "text").write_text('{"epoch": "1"}\n')
    (tmp_path / "bytes").write_bytes(np.arange(256, dtype=np.uint8).tobytes())
    torn, *damaged = script(code, tmp_path, "torn", "list", "text", "bytes").stdout.splitlines()
    assert torn == str(lines[:2])
    for line, message in zip(
        damaged,
        ("line 1: not a JSON object", "its epoch is not a whole number", "not text in UTF-8"),
        strict=True,
    ):
        assert message in line and line.endswith("delete it; the checkpoints don't need it")
