"""Kill each script that writes files, call it again, and look whether all is as if undisturbed.

    python benchmarks/kills.py --seed 0 --kills 20
    python benchmarks/kills.py --only train_baseline search

Makes a tiny dataset, runs, an index and a GAN with the scripts themselves. Then each script runs
undisturbed twice, and --kills times on fresh inputs it is ended by SIGKILL or SIGTERM, drawn from
the seed: mostly right after one of its changes to the files, else at any time; and called again.
Files and their contents must then be the same, but for times and command lines. SIGTERM must end
it within TIDY seconds with exit code 130, and leave nothing half-written.
Each is a fork (forked.py), so that a kill while modules are imported is not tried.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shlex
import signal
import sqlite3
import sys
import tempfile
import time
from contextlib import closing, suppress
from functools import cache
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from forked import ABLATION, FEATURES, GENERATE, LIMIT, ROOT, TRAIN, TRAIN_GAN, House

# What is killed, under the script's name; "again": what the second call has in addition.
KILLED = {
    "synthetic_market": "synthetic_market --output_dir new/demo --workers 2",
    "prepare": "prepare --download_path raw --save_path new/pytorch",
    "changeIndex": "changeIndex --data_dir photos/pytorch",
    "train_baseline": f"train_baseline --name new {TRAIN} --epochs 3 --save_every 2",
    "train_lsro": f"train_lsro --name new {TRAIN} --epochs 3 --save_every 2",
    "test": f"test --data_dir raw/pytorch {FEATURES} --mat new.mat",
    "evaluate": "evaluate --json model/run/results.json --plot --show 2",
    "evaluate_rerank": "evaluate_rerank --json model/run/results.json --plot --show 2",
    "calibrate": "evaluate val.mat --calibrate 0.4",
    "search": "search --query raw/query/0011_c1s1_0.jpg --gallery raw/bounding_box_train "
    f"--index index --json found.json {FEATURES}",
    "export": "export --name run --data_dir raw/pytorch --check_images 10 --format torch "
    "--json model/run/results.json",
    "evaluate_gan": f"evaluate_gan --data_dir raw/pytorch --nearest_k 2 {FEATURES} "
    "--json model/run/results.json",
    "main": f"{TRAIN_GAN} --checkpoint_dir new --sample_dir new/samples --epoch 3",
    "generate": f"{GENERATE} --options 5 --sample_size 200 --output_path new/images",
    "resizeImage": "resizeImage --input_path generated --output_path new/images",
    "ablation": ABLATION,
}
AGAIN = {"train_baseline": " --resume", "train_lsro": " --resume"}
# Facts that differ by nature, and the keys of what they make differ in turn.
VARYING = set("seconds images_per_s command resume time date".split())
TIDY = 10  # seconds that a process has to end after SIGTERM


def get_parser():
    parser = argparse.ArgumentParser(description="Kill scripts that write files.")
    parser.add_argument("--seed", default="0", help="of every random choice")
    parser.add_argument("--kills", type=int, default=20, help="of each script")
    parser.add_argument("--only", nargs="+", choices=KILLED, default=[*KILLED], help="scripts")
    parser.add_argument("--root", type=Path, default=ROOT, help="the code to test")
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    found = 0
    with tempfile.TemporaryDirectory() as work, House(args.root.resolve(), Path(work)) as house:
        house.build()
        print(f"seed {args.seed}\nscript, kills: before, while, after it writes; faults; seconds")
        for name in args.only:
            started = time.monotonic()
            counts, faults = kill_often(house, name, args)
            numbers = ", ".join(map(str, counts))
            seconds = time.monotonic() - started
            print(f"{name}, {args.kills}: {numbers}; {len(faults)}; {seconds:.0f} s", flush=True)
            print("".join(f"    {fault}\n" for fault in faults), end="", flush=True)
            found += len(faults)
    return 1 if found else 0


def kill_often(house, name, args):
    """Kills before, while and after a script writes, and what was wrong with it, as texts."""
    words = shlex.split(KILLED[name])
    changes, seconds, wanted = undisturbed(house, words)
    again = undisturbed(house, words)[2]
    varying = {path for path in wanted if wanted[path] != again.get(path)}
    faults = [f"not compared, differs from run to run: {path}" for path in sorted(varying)]
    counts = [0, 0, 0]
    for kill in range(args.kills):
        rng = random.Random(f"{args.seed} {name} {kill}")
        number = rng.choice([signal.SIGKILL, signal.SIGTERM])
        change, moment = rng.randint(1, max(changes - 1, 1)), rng.uniform(0, seconds)
        change, moment = (change, LIMIT) if rng.random() < 0.75 else (LIMIT**2, moment)
        house.fresh()
        server, before = house.start(words), listing(house.here)
        seen, code, _ = follow(server, house.here, change, moment)
        if code is None:
            server.kill(number)
            code = server.ended(TIDY)
        state = 2 if code == 0 else int(listing(house.here) != before)
        counts[state] += 1
        wrong = []
        if code is None:
            wrong.append(f"still runs after {TIDY} s")
            server.kill(signal.SIGKILL)
            server.ended(TIDY)
        elif code not in (0, -signal.SIGKILL, 130) and (code, state) != (-signal.SIGTERM, 0):
            wrong.append(f"exit code {code}: {house.said().strip()[-300:]}")
        if code not in (None, -signal.SIGKILL):
            left = sorted(path for path, _, _ in listing(house.here) - before if is_half(path))
            wrong += [f"left {path}" for path in left]
        words_again = words + AGAIN.get(name, "").split()
        server = house.start(words_again)
        code = server.ended(LIMIT)
        if code is None:
            wrong.append(f"second call: still runs after {LIMIT} s")
            server.kill(signal.SIGKILL)
            server.ended(TIDY)
        found = list(differences(wanted, tree(house.here), varying))
        if code and (code != 2 or found):  # 2: all is there already, says resizeImage.py
            wrong.append(f"second call: exit code {code}: {house.said().strip()[-300:]}")
        wrong += found
        when = f"at change {seen}" if moment == LIMIT else f"after {moment:.2f} s"
        faults += [f"kill {kill}, {number.name} {when}: {text}" for text in wrong]
    return counts, faults


def undisturbed(house, words):
    """How often a script changes the files, how many seconds it takes, and what it comes to."""
    house.fresh()
    server = house.start(words)
    changes, code, seconds = follow(server, house.here, LIMIT**2, LIMIT)
    if code != 0:
        sys.exit(f"{shlex.join(words)}\n{house.said()}\nexit code {code}: can't go on")
    return changes, seconds, tree(house.here)


def follow(server, here, change, moment):
    """Watch a script until its change number `change`, or `moment` seconds, or its end.

    Returns the number of changes seen, the exit code or None, and the seconds.
    """
    started, last, seen, code = time.monotonic(), listing(here), 0, None
    while code is None and seen < change and time.monotonic() - started < moment:
        code = server.ended(0.0005)
        now = listing(here)
        seen, last = seen + (now != last), now
    return seen, code, time.monotonic() - started


def listing(folder):
    """Path, size and time of change of each file and folder below a folder: a set."""
    found = set()
    for place, folders, files in os.walk(folder):
        for name in folders + files:
            with suppress(FileNotFoundError):
                facts = os.lstat(path := os.path.join(place, name))
                is_folder = name in folders  # its time changes with what is in it
                found.add((path, 0 if is_folder else facts.st_size, is_folder or facts.st_mtime_ns))
    return found


def is_half(path):
    """Whether a file's name says that it isn't whole."""
    name = os.path.basename(path)
    return name.startswith(".") or name.endswith((".partial", ".lock", "-journal", "-wal"))


def differences(wanted, found, varying):
    """What is missing, what there is too much, and what has other contents."""
    for what, paths in (
        ("missing", wanted.keys() - found.keys()),
        ("extra", found.keys() - wanted.keys()),
    ):
        whole = {path for path in paths if os.path.dirname(path) not in paths}
        yield from (f"{what}: {path}" for path in sorted(whole))
    for path in sorted((wanted.keys() & found.keys()) - varying):
        if wanted[path] != found[path]:
            yield f"other contents: {path}"


def tree(folder):
    """{path: digest of its contents} of all files and folders below a folder."""
    found = {}
    for path in folder.rglob("*"):
        facts = path.stat()
        same = facts.st_ino, facts.st_size, facts.st_mtime_ns
        found[path.relative_to(folder).as_posix()] = digest(path, same) if path.is_file() else ""
    return found


@cache  # most files are those of the case before
def digest(path, same):
    """A hash of what two undisturbed runs have in common in a file; "damaged" where it is."""
    try:
        return hashlib.sha256(contents(path)).hexdigest()
    except (ValueError, BadZipFile, sqlite3.Error):
        return "damaged"


def contents(path):
    """What two undisturbed runs have in common in a file, as bytes."""
    if path.suffix in (".json", ".jsonl"):
        texts = [path.read_text()] if path.suffix == ".json" else path.read_text().splitlines()
        return repr([lasting(json.loads(text)) for text in texts]).encode()
    if path.suffix == ".pth":  # the tensors; what is beside them in state.pth has times
        tensors = [i for i in ZipFile(path).infolist() if re.search(r"/data/\d+$", i.filename)]
        return repr([(i.filename, i.CRC, i.file_size) for i in tensors]).encode()
    if path.suffix == ".mat":
        return path.read_bytes()[128:]  # the header has the time
    if path.name == "index":
        with closing(sqlite3.connect(path)) as base:
            query = "SELECT path, size, modified, feature FROM images JOIN features USING (id)"
            return repr(base.execute(f"{query} ORDER BY path").fetchall()).encode()
    return path.read_bytes()


def lasting(value):
    """A value out of JSON without what varies."""
    if isinstance(value, dict):
        return {key: lasting(item) for key, item in value.items() if key not in VARYING}
    return [lasting(item) for item in value] if isinstance(value, list) else value


if __name__ == "__main__":
    sys.exit(main())
