"""Feed mutated inputs to all scripts: each must end in time, without a traceback.

    python benchmarks/fuzz.py --seed 0 --cases 1200
    python benchmarks/fuzz.py --only image --cases 100
    python benchmarks/fuzz.py --case 17 --keep faults    # that case again, and its files

A case is a copy of the tiny inputs of forked.py with something wrong in it, or a command line with
an odd value, drawn from the seed and the case's number. It passes if its process ends within
--limit seconds with exit code 0, 2 or 130, and without a traceback; with 2, the last of few lines
on standard error begins with "error". What may rightly take long is ended by SIGTERM.
"""

import argparse
import io
import json
import os
import random
import re
import shlex
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import defaultdict
from pathlib import Path

import numpy as np
from forked import ABLATION, CELLS, FEATURES, GENERATE, ROOT, TRAIN, TRAIN_GAN, House
from PIL import Image
from scipy.io import loadmat, savemat

QUERY = "raw/query/0011_c1s1_0.jpg"
COMMANDS = {  # a good one of each script, and others of some
    "ablation": ABLATION,
    "changeIndex": "changeIndex --data_dir photos/pytorch",
    "cross_test": f"cross_test --runs run --data_dirs raw/pytorch {FEATURES} --name table",
    "evaluate": "evaluate --json model/run/results.json --plot --show 2",
    "evaluate_gan": f"evaluate_gan --data_dir raw/pytorch --nearest_k 2 {FEATURES} "
    "--json model/run/results.json",
    "evaluate_rerank": "evaluate_rerank --json model/run/results.json --gpu_ids -1",
    "export": "export --name run --data_dir raw/pytorch --check_images 10 --format torch "
    "--json model/run/results.json",
    "main": f"{TRAIN_GAN} --epoch 3",
    "page": f"page --index index {FEATURES}",
    "prepare": "prepare --download_path raw --save_path out",
    "resizeImage": "resizeImage --input_path generated --output_path out",
    "results_table": "results_table model/run",
    "search": f"search --query {QUERY} --gallery crops --index index {FEATURES}",
    "synthetic_market": "synthetic_market --output_dir raw --workers 0",
    "test": f"test --data_dir raw/pytorch {FEATURES}",
    "train_baseline": f"train_baseline --name new {TRAIN} --epochs 1",
    "train_lsro": f"train_lsro --name new {TRAIN} --num_generated 4 --epochs 1",
    "calibrate": "evaluate pytorch_result.mat --calibrate 0.3",
    "sample": f"{GENERATE} --options 0",
    "generate": f"{GENERATE} --options 5 --output_path out",
    "identities": "prepare --download_path photos --dataset folder --no_camera",
    "photos": "prepare --download_path photos --dataset folder --no_camera --save_path out",
    "msmt17": "prepare --download_path msmt --save_path out",
    "pretrained": f"train_baseline --name new {TRAIN} --epochs 1 --pretrained "
    "model/run/net_last.pth",
    "resume": f"train_baseline --name run {TRAIN} --epochs 2 --resume",
    "sls": f"train_lsro --name new {TRAIN} --epochs 1 --gan_label sls --label_run run",
}
CELL = f"model/grid/{[*CELLS][1]}"
JSON_FILES = {
    "model/run/opts.json": "results_table test search resume sls evaluate_gan export cross_test",
    "model/run/results.json": "results_table evaluate evaluate_rerank resume evaluate_gan",
    "model/run/testing.json": "test search evaluate_gan export cross_test",
    "model/run/threshold.json": "evaluate search",
    f"{CELL}/opts.json": "ablation",
    f"{CELL}/results.json": "ablation",
    "gan/bounding_box_train/options.json": "main sample generate",
    "gan/bounding_box_train/log.jsonl": "main",
    "generated/manifest.json": "resizeImage",
    "raw/pytorch/train_new/gen_0000/manifest.json": "evaluate_gan train_lsro",
    "raw/pytorch/class_index.json": "train_baseline test",
    "photos/pytorch/identities.json": "identities",
    "raw/synthetic_market.json": "synthetic_market prepare",
}
IMAGES = {
    "raw/bounding_box_train": "prepare main",
    "photos/pytorch/train": "changeIndex",
    "raw/pytorch/query": "test evaluate evaluate_gan cross_test",
    "raw/query": "search",
    "crops": "search",
    "raw/pytorch/train_new": "train_baseline train_lsro resume sls",
    "raw/pytorch/train_new/gen_0000": "train_lsro sls evaluate_gan",
    "generated": "resizeImage",
    "photos": "photos identities",
}
NAMED = {
    "raw/bounding_box_train": "prepare main",
    "raw/query": "prepare",
    "photos": "photos",
    "photos/person 0": "photos",
    "photos/pytorch/train_all": "changeIndex",
    "photos/pytorch/train": "changeIndex",
    "raw/pytorch/query": "test",
    "raw/pytorch/query/0011": "test",
    "raw/pytorch/train_new": "train_baseline",
    "crops": "search",
    "generated": "resizeImage",
}
WEIGHTS = {
    "model/run/net_last.pth": "test search pretrained evaluate_gan cross_test",
    "model/run/state.pth": "resume",
    "index": "search",
    "gan/bounding_box_train/ckpt-0002.npz": "main sample generate",
}
EDGES = [float("inf"), float("nan"), 2.0**63, 2**63, 2**63 - 1, 2**64 - 1, -1, -2, 0, 1e300, 0.5]
ODD = [None, True, -1, 0, 0.5, 1e300, float("inf"), float("nan"), 2**63, 10**400, "", "a b", "\n"]
ODD += ["x" * 300, "\ud800", [], {}, [[1]], {"a": 1}, ["a"]]
VALUES = "-1 0 0.5 nan inf -inf 1e400 4294967296 9223372036854775808 0x10 1_0 ١ .. é".split()
VALUES += ["", "a b", "a\nb", "x" * 300, "1" * 5000, "\udcff", "1,nan", "0,0", "/dev/null/x"]
NAMES = ["0002_c1s1_é.jpg", "٣_c1s1_1.jpg", "²_c1s1_1.jpg", "-5_c1s1_1.jpg", "0002.jpg", "_c1.jpg"]
NAMES += [f"{2**63}_c1s1_1.jpg", f"0002_c{2**64}s1_1.jpg", "9" * 240 + "_c1s1_1.jpg", "-0_c0_1.jpg"]
NAMES += [
    "0002_c1s1_\udcff.jpg",
    "0002_c1s1_a\nb.jpg",
    "0002_c1s1_" + "x" * 241 + ".jpg",
    "a\\b.jpg",
]
NAMES += ["__MACOSX", "._0002_c1s1_1.jpg", ".hidden", "00002", "0 2", "+2", "-1", "1" * 200, "2\n"]
NAMES += [str(2**63), "\udcff", "x" * 255, "gen_0001", "Thumbs.db", "0002_c1s1_1.JPG", "x.jpg.txt"]
TIDY = 10  # seconds that a process has to end after SIGTERM
LONG = set("--epoch --epochs --sample_size --z_dim --gf_dim --df_dim --seeds --numbers".split())
LINES = 8  # of standard error at most, with exit code 2


def damaged(rng, data):
    """Bytes with something wrong in them."""
    reach = rng.choice([len(data), 200])  # flips in a header do more
    flipped = bytearray(data)
    for _ in range(rng.choice([1, 3, 30])):
        if flipped:
            flipped[int(rng.random() * min(reach, len(data)))] ^= 1 << rng.randrange(8)
    cut = int(rng.random() * len(data))
    how = rng.randrange(10)
    others = [data[:cut], data[cut:], b"", bytes(len(data)), data + data, rng.randbytes(100)]
    return others[how] if how < len(others) else bytes(flipped)


def write(path, data):
    """Put a file in place of another, which may be a link to the inputs of all cases."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def change_json(rng, path):
    text = path.read_text()
    how = rng.choice(["value"] * 5 + ["gone", "whole", "deep", "digits", "coded", "bytes"])
    content = json.loads(text.splitlines()[0] if path.suffix == ".jsonl" else text)
    holders = [*values_in(content)] or [([content], 0)]
    holder, key = holders[int(rng.random() * len(holders))]
    if how == "value":
        holder[key] = rng.choice(ODD)
    elif how == "gone":
        del holder[key]
    elif how == "whole":
        content = rng.choice(ODD)
    data = json.dumps(content).encode()
    depth = 10**5
    write(path, {
        "deep": rng.choice([b"[" * depth + b"]" * depth, b'{"a":' * depth]),
        "digits": re.sub(rb"\d+", b"1" * 5000, data, count=1),
        "coded": rng.choice([text.encode("utf-16"), b"\xef\xbb\xbf" + data, data + b"\xff", b"\0"]),
        "bytes": damaged(rng, text.encode()),
    }.get(how, data))  # fmt: skip


def values_in(content):
    """Where each value of a JSON document lies: what holds it, and its key there."""
    for key in content if isinstance(content, dict) else range(len(content)):
        yield content, key
        if isinstance(content[key], dict | list):
            yield from values_in(content[key])


def change_mat(rng, path):
    content = {k: v for k, v in loadmat(path).items() if not k.startswith("__")}
    key = rng.choice([key for key in sorted(content) if "_" in key])
    value = np.atleast_2d(content[key])
    how = rng.choice("bytes gone shape type edge edge text archive v7.3".split())
    if how == "gone":
        del content[key]
    elif how == "shape":
        others = [value.T, value[:0], value[:, :1], value[None], np.concatenate([value, value])]
        content[key] = rng.choice([*others, value[:1, :1], value.ravel()[:-1]])
    elif how == "text":
        content[key] = rng.choice([np.array(["a b"] * value.size), {"a": 1}, "x", [], ["a", 1]])
    elif value.dtype.kind in "fiu":
        kinds = [np.float64, np.int8, np.uint8, np.int64, np.uint64, np.complex128, bool]
        with np.errstate(all="ignore"):
            value = value.astype(rng.choice(kinds if how == "type" else [np.float64, np.uint64]))
            if how == "edge":
                edge = np.array(rng.choice(EDGES)).astype(value.dtype)
                value.flat[int(rng.random() * value.size)] = edge
        content[key] = value
    file = io.BytesIO()
    savemat(file, content)
    if how == "archive":
        file = io.BytesIO()
        np.savez(file, **content) if rng.random() < 0.5 else np.save(file, content[key])
    if how == "v7.3":
        file = io.BytesIO(b"MATLAB 7.3 MAT-file".ljust(512) + b"\x89HDF\r\n\x1a\n" + bytes(99))
    write(path, damaged(rng, file.getvalue()) if how == "bytes" else file.getvalue())


def change_list(rng, path):
    lines = path.read_text().splitlines()
    at = int(rng.random() * len(lines))
    name, identity = lines[at].rsplit(" ", 1)
    odd = [name, identity, "", f"{name} ", f" {identity}", f"{name} x", f"{name} -1", "../" + name]
    odd += [f"{name} {2**63}", f"{name} {'9' * 5000}", f"{name} ٣", f"{name} {identity} {identity}"]
    odd += [f"{name}\t{identity}", f"/{name} {identity}", f"{name}\0 {identity}", "x.jpg 0000"]
    odd += [lines[at - 1], f"0/{name} 0", f"{name}\u2028 {identity}", f"{name} {int(identity) + 1}"]
    odd += [lines[at].replace("/", "\\")]
    how = rng.randrange(10)
    if how < 6:
        lines[at] = rng.choice(odd)
    text = rng.choice(["\n", "\n", "\r\n", "\r", "\n\n"]).join(lines)
    if how == 6:
        text = text.replace("/", "\\")
    coded = text.encode(rng.choice(["utf-16", "utf-8-sig", "utf-32"]) if how == 7 else "utf-8")
    write(path, damaged(rng, coded) if how > 7 else coded)


def png_of_size(width, height):
    """A PNG file whose header promises pixels that are not in it."""
    parts = [b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT", b"IEND"]
    chunks = [struct.pack(">I", len(p) - 4) + p + struct.pack(">I", zlib.crc32(p)) for p in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def change_image(rng, path):
    data = path.read_bytes()
    how = rng.choice("bytes bytes format format mode header text folder pipe link loop".split())
    if how == "bytes":
        return write(path, damaged(rng, data))
    path.unlink()
    if how in ("format", "mode"):
        mode = rng.choice(["L", "P", "1", "RGBA", "CMYK", "I", "F", "LA", "I;16"])
        image, file = Image.open(io.BytesIO(data)), io.BytesIO()
        image = image.convert("I").convert(mode) if mode == "I;16" else image.convert(mode)
        formats = ["GIF", "WEBP", "TIFF", "BMP", "PPM", "ICO", "TGA", "PDF", "EPS", "PNG", "JPEG"]
        kind = "TIFF" if how == "mode" else rng.choice(formats)
        try:
            image.save(file, kind)
        except (OSError, KeyError, ValueError):  # not every mode in every format
            Image.open(io.BytesIO(data)).save(file, "PNG")
        path.write_bytes(file.getvalue())
    elif how == "header":
        sizes = [(0, 5), (20000, 20000), (2**31 - 1, 9), (9, 9)]
        path.write_bytes(png_of_size(*rng.choice(sizes)))
    elif how == "text":
        path.write_text(
            rng.choice(["GIF89a", "<html>", "BM", "\n", "P6 99999 99999 255\n", "%!PS"])
        )
    elif how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("nothing.jpg" if how == "link" else path.name)
    return None


def change_name(rng, folder):
    """Give a file or folder an odd name, or put one with such a name beside the others."""
    entry = rng.choice(sorted(folder.iterdir()))
    target = folder / rng.choice(NAMES)
    if rng.random() < 0.5:
        return entry.rename(target)
    if entry.is_dir():
        return subprocess.run(["cp", "-r", entry, target], check=True)
    return target.write_bytes(entry.read_bytes())


def change_weights(rng, path):
    import pickle

    import torch

    data = path.read_bytes()
    file = io.BytesIO()
    how = rng.choice("bytes bytes bytes pickle wrapped other shapes".split())
    if how in ("wrapped", "shapes", "other") and path.suffix == ".pth":
        content = torch.load(path, weights_only=True)
        key = sorted(content, key=str)[int(rng.random() * len(content))]
        if how == "shapes":
            content[key] = rng.choice([torch.zeros(3, 3), torch.tensor(float("nan")), None, "x"])
        things = [{}, [], 1, "x", {"a": 1}, {1: 2}, torch.zeros(3), {"module." + key: content[key]}]
        content = {"state_dict": content} if how == "wrapped" else content
        torch.save(rng.choice(things) if how == "other" else content, file)
        return write(path, file.getvalue())
    if how == "shapes" and path.suffix == ".npz":
        arrays = dict(np.load(path))
        key = sorted(arrays)[int(rng.random() * len(arrays))]
        arrays[key] = rng.choice([np.zeros(3), np.array("x"), np.zeros(arrays[key].shape, bool)])
        np.savez(file, **arrays)
        return write(path, file.getvalue())
    thing = rng.choice([b"x", {"a": 1}, {"state_dict": {}}, {1, 2}, Path("x"), None])
    return write(path, pickle.dumps(thing) if how == "pickle" else damaged(rng, data))


def change_value(rng, house):
    """A good command with an odd value for one of its flags."""
    name = rng.choice(sorted(name for name in house.flags if house.flags[name]))
    flag, value = rng.choice(house.flags[name]), rng.choice(VALUES)
    if flag in ("--workers", "--nproc_per_node") and value.isdigit() and len(value) > 2:
        value = "-1"  # as many processes would take the machine
    words = shlex.split(COMMANDS[name])
    end = words.index("--") if "--" in words else len(words)
    may_last = flag in LONG or name in ("ablation", "page")  # a page is there until it is ended
    return [*words[:end], f"{flag}={value}", *words[end:]], may_last


def changed(kind, rng, house):
    """Make the case's inputs; returns its command and whether it may take long."""
    here = house.here
    if kind == "value":
        return change_value(rng, house)
    if kind == "list":
        change_list(rng, here / f"msmt/MSMT17_V1/list_{rng.choice(['train', 'val', 'query'])}.txt")
        return shlex.split(COMMANDS["msmt17"]), False
    if kind == "mat":
        change_mat(rng, here / "pytorch_result.mat")
        names = "evaluate evaluate_rerank calibrate"
    else:
        change, places = CHANGES[kind]
        place = rng.choice([*places])
        names, path = places[place], here / place
        if kind == "image":
            path = rng.choice(sorted(p for p in path.rglob("*") if p.suffix in (".jpg", ".png")))
        change(rng, path)
    name = rng.choice(names.split())
    return shlex.split(COMMANDS[name]), name == "ablation"  # may train what seems to be missing


CHANGES = {
    "json": (change_json, JSON_FILES),
    "image": (change_image, IMAGES),
    "name": (change_name, NAMED),
    "weights": (change_weights, WEIGHTS),
}
KINDS = ["json"] * 4 + ["value"] * 4 + ["mat", "image"] * 3 + ["name", "list", "weights"] * 2


def get_parser():
    parser = argparse.ArgumentParser(description="Feed mutated inputs to all scripts.")
    parser.add_argument("--seed", default="0", help="of every random choice")
    parser.add_argument("--cases", type=int, default=1200, help="how many")
    parser.add_argument("--case", type=int, help="this one alone")
    parser.add_argument("--only", choices=sorted(set(KINDS)), help="this kind of case alone")
    parser.add_argument("--keep", type=Path, help="folder to keep the files of faulty cases in")
    parser.add_argument("--limit", type=float, default=30, help="seconds of a case")
    parser.add_argument("--root", type=Path, default=ROOT, help="the code to test")
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    numbers = range(args.cases) if args.case is None else [args.case]
    counts, faults = defaultdict(lambda: defaultdict(float)), 0
    with tempfile.TemporaryDirectory() as work, House(args.root.resolve(), Path(work)) as house:
        house.build()
        print(f"seed {args.seed}", flush=True)
        for number in numbers:
            rng = random.Random(f"{args.seed} {number}")
            kind = rng.choice(KINDS)
            if args.only in (None, kind):
                started = time.monotonic()
                code, fault, words = run_case(kind, rng, house, args.limit)
                row = counts[kind]
                row["s"] += time.monotonic() - started
                row[code] += 1
                row["faults"] += bool(fault)
                faults += bool(fault)
                if fault:
                    text = f"case {number} ({kind}): {shlex.join(words)[:400]!r}\n    {fault}"
                    print(text.encode(errors="backslashreplace").decode(), flush=True)
                if args.keep and (fault or args.case is not None):
                    args.keep.mkdir(parents=True, exist_ok=True)
                    subprocess.run(["cp", "-a", house.case, args.keep / f"case_{number}"])
    print("| kind | cases | exit 0 | exit 2 | exit 130 | faults | s a case |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for kind, row in sorted(counts.items()):
        cases = sum(row[code] for code in row if code not in ("s", "faults"))
        cells = [cases, row[0], row[2], row[130], row["faults"]]
        print(f"| {kind} | {' | '.join(f'{n:.0f}' for n in cells)} | {row['s'] / cases:.2f} |")
    return 1 if faults else 0


def run_case(kind, rng, house, limit):
    """Exit code of a case, None where there was none in time; what is wrong or ""; the command."""
    house.fresh()
    words, long = changed(kind, rng, house)
    server = house.start(words)
    code = server.ended(limit)
    if code is None and long:
        server.kill(signal.SIGTERM)
        code = server.ended(TIDY)
    if code is None:
        server.kill(signal.SIGKILL)
        server.ended(TIDY)
        return None, f"hangs: no end within {limit:g} s", words
    return code, wrong_with(code, house.said()), words


def wrong_with(code, said):
    """What a process should not have done, or ""."""
    lines = said.splitlines() or [""]
    if "Traceback" in said:
        frames = re.findall(r'File "(.*?)", line (\d+), in (\S+)', said)
        ours = [
            f"{os.path.basename(p)}:{n} {f}"
            for p, n, f in frames
            if "/lib/" not in p and p[0] != "<"
        ]
        errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line)]
        return f"exit {code}: traceback: {(errors or lines)[-1][:200]} ({ours[-1] if ours else ''})"
    if code not in (0, 2, 130):
        return f"exit code {code}: {lines[-1][:300]}"
    if code == 2 and (not lines[-1].startswith("error") or len(lines) > LINES):
        return f"exit code 2 with {len(lines)} lines, the last: {lines[-1][:300]}"
    return ""


if __name__ == "__main__":
    sys.exit(main())
