"""Both houses' scripts, run as forks of a process that has imported them, on tiny inputs.

For fuzz.py and kills.py, which run thousands of scripts: importing torch takes seconds each time.
"""

import argparse
import atexit
import importlib
import json
import os
import resource
import runpy
import select
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
GAN = {"main", "resizeImage"}  # scripts in DCGAN-tensorflow/
SIZES = "--pretrained none --height 64 --width 32 --batchsize 4 --precision fp32 "
SIZES += "--workers 0 --gpu_ids -1"
TRAIN = f"--data_dir raw/pytorch --use_dense {SIZES}"
GENERATE = "main --dataset raw/bounding_box_train --checkpoint_dir gan --sample_dir samples"
TRAIN_GAN = f"{GENERATE} --train --output_height 32 --output_width 16 --gf_dim 4 --df_dim 4 "
TRAIN_GAN += "--z_dim 8 --batch_size 8 --save_every 1 --precision fp32"
FEATURES = "--name run --batchsize 4 --precision fp32 --workers 0 --gpu_ids -1"
ABLATION = "ablation --name grid --data_dir raw/pytorch --numbers 4 --gan_labels lsro --seeds 0 "
ABLATION += f"--backbones densenet121 -- {SIZES} --epochs 1"
CELLS = {"densenet121_0_seed0": 0, "densenet121_lsro_4_seed0": 4}
# What makes the inputs, in this order; exactly as a user would.
STEPS = [
    "prepare --download_path raw",
    "changeIndex --data_dir raw/pytorch",
    "prepare --download_path photos --dataset folder --no_camera",
    f"{TRAIN_GAN} --epoch 2",
    f"{GENERATE} --options 5 --sample_size 12 --output_path generated",
    "resizeImage --input_path generated --output_path raw/pytorch/train_new/gen_0000 --width 32",
    f"train_baseline --name run {TRAIN} --epochs 1",
    f"test --data_dir raw/pytorch {FEATURES}",
    f"test --data_dir raw/pytorch {FEATURES} --val --mat val.mat",
    "evaluate val.mat --calibrate 0.3",
    "evaluate --json model/run/results.json",
    "evaluate_rerank --json model/run/results.json",
    f"search --query raw/query/0011_c1s1_0.jpg --gallery crops --index index {FEATURES}",
]
for cell, number in CELLS.items():
    there = f"model/grid/{cell}"
    words = f"--name {cell} --model_dir model/grid"
    STEPS += [
        f"train_lsro {words} {TRAIN} --num_generated {number} --epochs 1",
        f"test {words} --data_dir raw/pytorch --mat {there}/pytorch_result.mat --gpu_ids -1",
        f"evaluate {there}/pytorch_result.mat --json {there}/results.json",
        f"evaluate_rerank {there}/pytorch_result.mat --json {there}/results.json --gpu_ids -1",
    ]
LIMIT = 120  # seconds for an undisturbed run
MEMORY = 8 << 30  # bytes that a script can have


class Server:
    """A process that has imported a house's scripts, and forks one for each call."""

    def __init__(self, root, gan):
        env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "gan" if gan else "root", root],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # else the line that select waits for may be in a buffer
            env=env | {"KERAS_BACKEND": "torch"},
        )
        self.numbers = []

    def start(self, words, here):
        """Start a script in the folder `here`."""
        ask = {"words": words, "here": str(here)}
        self.process.stdin.write(json.dumps(ask).encode() + b"\n")
        self.process.stdin.flush()
        self.numbers.append(int(self.process.stdout.readline()))

    def ended(self, seconds):
        """Exit code of what was started last, None where it still runs after so long."""
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            return None
        return int(self.process.stdout.readline())

    def kill(self, number):
        """Send a signal to what was started last, if it still runs."""
        with suppress(ProcessLookupError):
            os.kill(self.numbers[-1], number)

    def sweep(self):
        """End what is left of all that was started."""
        for number in self.numbers:
            with suppress(ProcessLookupError):
                os.killpg(number, signal.SIGKILL)
        self.numbers = []


def serve(house, root):
    """Fork a process for each line of standard input."""
    folder = Path(root) / ("DCGAN-tensorflow" if house == "gan" else "")
    sys.path[0] = str(folder)
    import torch

    torch.set_num_threads(1)  # other threads would not live on in a forked process
    warm = ["reid.gan_metrics", "reid.curves", "faiss"]
    if house == "gan":
        warm = ["keras", "model", "step_torch", "training", "sampling"]
    for name in warm:
        importlib.import_module(name)
    names = {path.stem for path in folder.glob("*.py")}
    flags = {}
    for name in sorted(names - {"random_erasing", "re_ranking", "watch", "augment"}):
        if "def get_parser" in (folder / f"{name}.py").read_text():
            actions = importlib.import_module(name).get_parser()._actions
            flags[name] = [
                a.option_strings[0] for a in actions if a.option_strings and a.nargs != 0
            ]
    print(json.dumps(flags), flush=True)
    for line in sys.stdin:
        ask = json.loads(line)
        number = os.fork()
        if not number:
            become(folder, **ask)
        print(number, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]), flush=True)


def become(folder, words, here):
    """Run a script as `python <script>.py <words>` in the folder `here`, its output in files.

    Ends the process as Python does, but for taking its modules apart, which takes seconds.
    """
    os.setsid()
    os.chdir(here)
    script = f"{folder / words[0]}.py"
    for number, name in enumerate([os.devnull, "../stdout", "../stderr"]):
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC if number else os.O_RDONLY
        os.dup2(os.open(name, flags), number)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    sys.argv = [script, *words[1:]]
    code = 1
    try:
        if words[0] == "synthetic_market":  # has no scale that is small enough
            made = importlib.import_module(words[0])
            made.SCALES["demo"] = made.Scale(6, 60, 4, 16, 80, 10, 8)
            importlib.import_module("reid.errors").run(made.main)
        else:
            runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading._shutdown()  # waits for threads: they may hang
    atexit._run_exitfuncs()
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(code)


class House:
    """Both servers, and the folder in which all is made: always at the same path."""

    def __init__(self, root, work):
        self.servers = {gan: Server(root, gan) for gan in (False, True)}
        answers = [json.loads(s.process.stdout.readline()) for s in self.servers.values()]
        self.flags = answers[0] | answers[1]  # of each script
        self.base, self.case = work / "base", work / "case"
        self.here = self.case / "here"  # has a folder above that is no one else's

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for server in self.servers.values():
            server.sweep()
            server.process.kill()

    def start(self, words):
        """Start a script; returns its Server."""
        server = self.servers[words[0] in GAN]
        server.start(words, self.here)
        return server

    def call(self, text):
        """Run a script that must do well."""
        code = self.start(shlex.split(text)).ended(LIMIT)
        if code != 0:
            sys.exit(f"{text}\n{self.said()}\nexit code {code}: can't go on")

    def said(self):
        """What the last script wrote to standard error."""
        return (self.case / "stderr").read_text(errors="replace")

    def build(self):
        """Make the inputs that every case has a copy of."""
        self.here.mkdir(parents=True)
        for number, name in enumerate(raw_images()):
            path = self.here / name
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(path)
        (self.here / "raw/synthetic_market.json").write_text("{}")  # so nobody is warned of size
        lists = self.here / "msmt/MSMT17_V1"
        for folder, names in (("train", ["train", "val"]), ("test", ["query", "gallery"])):
            paths = sorted((lists / folder).rglob("*.jpg"))
            for which, name in enumerate(names):
                lines = [
                    f"{path.relative_to(lists / folder).as_posix()} {path.parent.name}"
                    for path in paths[which::2]
                ]
                (lists / f"list_{name}.txt").write_text("\n".join(lines) + "\n")
        for step in STEPS:
            self.call(step)
        testing = {"layer": "pool", "test_size": "same"}  # as a run with --val_ids has it
        (self.here / "model/run/testing.json").write_text(json.dumps(testing))
        self.case.rename(self.base)

    def fresh(self):
        """A new copy of the inputs in place of the last case's."""
        for server in self.servers.values():
            server.sweep()
        shutil.rmtree(self.case, ignore_errors=True)
        shutil.copytree(self.base, self.case, copy_function=copy)


def copy(source, target):
    """Copy a small file, link a large one, which no script changes in place."""
    if os.path.getsize(source) < 2**20:
        return shutil.copy2(source, target)
    return os.link(source, target)


def raw_images():
    """Names of the images that all is made of."""
    for shot in range(16):
        identity, camera = shot % 4, shot // 8 + 1
        yield f"raw/bounding_box_train/{identity + 2:04d}_c{camera}s1_{shot}.jpg"
        yield f"photos/person {identity}/{shot}.jpg"
        part = "train" if identity < 2 else "test"
        name = f"{identity:04d}/{identity:04d}_{shot:03d}_{camera:02d}_0303morning_0015_0.jpg"
        yield f"msmt/MSMT17_V1/{part}/{name}"
    for shot in range(4):
        yield f"raw/query/{shot % 2 + 11:04d}_c{shot // 2 + 1}s1_{shot}.jpg"
    for shot, identity in enumerate(["0011", "0012", "0011", "0012", "0000", "-1"]):
        yield f"raw/bounding_box_test/{identity}_c{shot // 2 + 1}s1_{shot + 10}.jpg"
        yield f"crops/{shot}.jpg"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Serve scripts to fuzz.py or kills.py.")
    parser.add_argument("house", choices=["root", "gan"])
    parser.add_argument("root", type=Path)
    given = parser.parse_args()
    serve(given.house, given.root)
