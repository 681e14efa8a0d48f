"""prepare.py on a miniature of each dataset, rendered here; links, counts, kills, mistakes."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import ROOT, call, exit_code, run_script, save_image
from PIL import Image
from scipy.io import savemat

import changeIndex
import prepare
from reid.dataset import eval_images, identity_folders, parse_name, training_splits
from reid.datasets import cuhk03
from reid.datasets.layouts import LAYOUTS, Counts, find
from reid.datasets.own_photos import NAME_BYTES, make_patterns, match_name, number_names
from reid.errors import UserError
from reid.files import new_folder

SIZE = (16, 32)
SPLITS = ("train_all", "train", "val", "query", "gallery")


def save_all(folder, names):
    for name in names:
        save_image(folder / name, size=SIZE)


def market_like(root, names, folders=("bounding_box_train", "query", "bounding_box_test")):
    """A dataset with three folders: `names` are those of each."""
    for folder, files in zip(folders, names, strict=True):
        save_all(root / folder, files)
    return root


def market(root):
    train = [
        f"{i}_c{c}s1_00000{n}_01.jpg" for i in ("0002", "0007") for c in (1, 2) for n in (1, 2)
    ]
    gallery = ["-1_c1s1_000001_01.jpg", "0000_c2s1_000001_01.jpg", "0001_c2s1_000005_01.jpg"]
    return market_like(root, [train, ["0001_c1s1_000001_00.jpg"], gallery])


def duke(root):
    train = ["0001_c2_f0046182.jpg", "0001_c2_f0046302.jpg", "0005_c8_f0046302.jpg"]
    return market_like(
        root, [[*train, "0005_c1_f0046303.jpg"], ["0003_c1_f01.jpg"], ["0003_c2_f02.jpg"]]
    )


def cuhk03_folders(root):
    for variant, last in [("detected", 2), ("labeled", 3)]:
        train = [f"0001_c{c}_{n}.png" for c in (1, 2) for n in range(1, last + 1)]
        market_like(root / variant, [train, ["0002_c1_1.png"], ["0002_c2_1.png"]])
    return root


LISTS = {
    "train": ["0000/0000_000_01_0303morning_0015_0.jpg", "0000/0000_001_05_0303noon_0016_0.jpg"],
    "val": ["0000/0000_002_15_0303noon_0017_0.jpg", "0001/0001_000_01_0303noon_0018_0.jpg"],
    "query": ["0000/0000_000_02_0303noon_0019_0.jpg"],
    "gallery": ["0000/0000_001_03_0303noon_0020_1.jpg", "0001/0001_001_03_0303noon_0020_1.jpg"],
}


def msmt17(root, folders=("train", "test")):
    for name, paths in LISTS.items():
        save_all(root / folders[name in ("query", "gallery")], paths)
        lines = [f"{path} {int(path.split('/')[0])}\n" for path in paths]
        (root / f"list_{name}.txt").write_text("".join(lines))
    return root


def veri(root, v=""):
    names = [
        [f"{v}0001_c001_00016450_0.jpg", f"{v}0001_c020_00016460_0.jpg"],
        [f"{v}0002_c012_00016450_0.jpg"],
        [f"{v}0002_c013_00016450_0.jpg"],
    ]
    return market_like(root, names, ["image_train", "image_query", "image_test"])


MADE = {
    "market1501": market,
    "duke": duke,
    "cuhk03-np": cuhk03_folders,
    "msmt17": msmt17,
    "veri": veri,
}


def ids_of(split):
    return [folder.name for folder in identity_folders(split)]


def names(split):
    return sorted(path.name for path in split.glob("*/*"))


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def fails(tmp_path, capsys):
    """Expect exit code 2, one line with these words, and nothing new on disk."""

    def check(*flags, says):
        before = tree(tmp_path)
        capsys.readouterr()
        assert exit_code(prepare.main, *flags) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        for text in [says] if isinstance(says, (str, Path)) else says:
            assert str(text) in lines[0]
        assert tree(tmp_path) == before

    return check


# Which dataset it is


@pytest.mark.parametrize("dataset", MADE)
def test_dataset_is_seen_from_its_files_here_and_from_above(dataset, tmp_path, capsys):
    root = MADE[dataset](tmp_path / "data" / "x")
    assert find(root) == find(tmp_path / "data") == (dataset, root)
    assert find(root, dataset) == find(tmp_path / "data", dataset) == (dataset, root)
    call(prepare.main, "--download_path", tmp_path / "data")
    out = capsys.readouterr().out
    assert f"x: {dataset} (guessed; name another with --dataset)" in out
    made = tmp_path / "data" / "pytorch"
    assert {path.name for path in made.iterdir()} == {
        "train_all",
        "train",
        "val",
        "query",
        "gallery",
    }
    train = [path.name for path in made.glob("train/*/*")]
    for identity in ids_of(made / "train_all"):
        ours = sorted(path.name for path in (made / "train_all" / identity).iterdir())
        held_out, *rest = ours
        assert [path.name for path in (made / "val" / identity).iterdir()] == [held_out]
        assert set(rest) <= set(train) and held_out not in train
    assert sorted(train + names(made / "val")) == names(made / "train_all")
    call(prepare.main, "--download_path", root, "--dataset", dataset)
    assert "guessed" not in capsys.readouterr().out
    assert tree(root / "pytorch") == tree(made)
    call(changeIndex.main, "--data_dir", made)


def test_market_and_duke_in_a_folder(fails, tmp_path, capsys):
    """They have the same folders; names tell which is asked for."""
    market(tmp_path / "Market")
    duke(tmp_path / "Duke")
    assert find(tmp_path, "duke") == ("duke", tmp_path / "Duke")
    assert find(tmp_path, "market1501") == ("market1501", tmp_path / "Market")
    shutil.rmtree(tmp_path / "Duke")
    fails("--download_path", tmp_path, "--dataset", "duke", says="no such folder")


def test_several_datasets_in_a_folder(fails, tmp_path):
    msmt17(tmp_path / "MSMT17_V1")
    msmt17(tmp_path / "MSMT17_V2", ("mask_train_v2", "mask_test_v2"))
    duke(tmp_path / "duke")
    for flags in ([], ["--dataset", "msmt17"]):
        fails("--download_path", tmp_path, *flags, says=["MSMT17_V1", "MSMT17_V2"])
    assert find(tmp_path, "duke") == ("duke", tmp_path / "duke")


def test_nothing_known(fails, tmp_path):
    says = "bounding_box_train detected cuhk03_new_protocol_config list_train.txt image_train <id>"
    fails("--download_path", tmp_path, says=says.split())
    fails("--download_path", tmp_path, "--dataset", "market", says=["--dataset", "market1501"])
    fails("--download_path", tmp_path, "--dataset", "duke", says="bounding_box_train: no such")
    fails("--download_path", tmp_path, "--dataset", "veri", says="image_train: no such folder")
    fails("--download_path", tmp_path, "--dataset", "msmt17", says="train: no such folder")
    says = ["detected/bounding_box_train", "cuhk03_new_protocol_config_detected.mat"]
    fails("--download_path", tmp_path, "--dataset", "cuhk03-np", says=says)
    fails("--download_path", tmp_path, "--dataset", "folder", "--no_camera", says="no folders <id>")


# The layouts


@pytest.mark.parametrize("folders", [("train", "test"), ("mask_train_v2", "mask_test_v2")])
def test_msmt17(folders, tmp_path, capsys):
    """Train and val train; identity 0 is a person; names of train and test may be the same."""
    made = msmt17(tmp_path / "m", folders) / "pytorch"
    call(prepare.main, "--download_path", tmp_path / "m")
    assert ids_of(made / "train_all") == ["0000", "0001"]
    assert len(names(made / "train_all")) == 4
    assert names(made / "val") == [Path(LISTS["train"][0]).name, Path(LISTS["val"][1]).name]
    assert [entry[1:] for entry in eval_images(made / "query")] == [(0, 2)]
    assert [entry[1:] for entry in eval_images(made / "gallery")] == [(0, 3), (1, 3)]
    out = capsys.readouterr().out
    assert "train_all        2       4       3  published: 1041 ids, 32621 images" in out


def test_msmt17_lists_that_are_wrong(fails, tmp_path):
    root = msmt17(tmp_path / "m")
    path = root / "list_query.txt"
    good = path.read_text()
    flags = ("--download_path", root)
    path.write_text(f"{good}\n0000/0000_000_02_gone.jpg 0\n")
    fails(*flags, says=["list_query.txt line 3", "gone.jpg: no such file"])
    path.write_text(good.replace(" 0\n", " 7\n"))
    fails(*flags, says=["list_query.txt line 1", "id 7", Path(LISTS["query"][0]).name])
    path.write_text("0000\n")
    fails(*flags, says="list_query.txt line 1: not a path and an id")
    path.write_text(good + good)
    fails(*flags, says=[Path(LISTS["query"][0]).name, "twice in query"])
    path.write_text("")
    fails(*flags, says="list_query.txt: empty")
    path.unlink()
    fails(*flags, says="list_query.txt: no such file")


def test_msmt17_paths_with_spaces(tmp_path):
    root = msmt17(tmp_path / "m")
    name = "my people/0001_000_04_0303noon_x y.jpg"
    save_image(root / "test" / name, size=SIZE)
    (root / "list_query.txt").write_text(f"{name} 1\n")
    call(prepare.main, "--download_path", root)
    assert names(root / "pytorch" / "query") == ["0001_000_04_0303noon_x y.jpg"]


@pytest.mark.parametrize("v", ["", "v"])
def test_veri(v, tmp_path):
    made = veri(tmp_path, v) / "pytorch"
    call(prepare.main, "--download_path", tmp_path)
    assert ids_of(made / "train_all") == ["0001"]
    assert names(made / "val") == [f"{v}0001_c001_00016450_0.jpg"]
    assert [entry[1:] for entry in eval_images(made / "gallery")] == [(2, 13)]


def test_cuhk03_variants(tmp_path, capsys):
    root = cuhk03_folders(tmp_path / "cuhk03-np")

    def prepared(path, *flags):
        made = tmp_path / f"made{len(list(tmp_path.iterdir()))}"
        call(prepare.main, "--download_path", path, *flags, "--save_path", made)
        return len(names(made / "train_all")), "7368" in capsys.readouterr().out

    assert prepared(root) == (4, False)
    assert prepared(root, "--variant", "labeled") == (6, True)
    assert prepared(root / "labeled") == (6, True)
    assert prepared(root / "labeled", "--variant", "detected") == (6, True)  # the path goes before
    assert prepared(tmp_path, "--dataset", "cuhk03-np", "--variant", "labeled") == (6, True)


# Camera pair, person, view, number among the person's ten; missing images are counted.
RELEASE = {
    "1_001_1_01.png": (1, "train"),
    "1_001_1_02.png": (1, "train"),
    "1_001_2_06.png": (1, "train"),
    "1_002_1_03.png": (2, "query"),
    "1_002_2_08.png": (2, "gallery"),
    "2_001_1_01.png": (3, "train"),
    "2_001_2_10.png": (3, "train"),
}
PRESENT = {(0, 0): [0, 1, 5], (0, 1): [2, 7], (1, 0): [0, 9]}  # (pair, person): images of the ten


def protocol(root, variant="detected", **changes):
    """Write the protocol of RELEASE."""
    root.mkdir(parents=True, exist_ok=True)
    filelist = np.empty((len(RELEASE), 1), dtype=object)
    filelist[:, 0] = list(RELEASE)
    content = {"filelist": filelist, "labels": np.array([[i] for i, _ in RELEASE.values()])}
    for split in ("train", "query", "gallery"):
        numbers = [n for n, (_, where) in enumerate(RELEASE.values(), 1) if where == split]
        content[f"{split}_idx"] = np.array([numbers])
    path = root / f"cuhk03_new_protocol_config_{variant}.mat"
    savemat(path, {k: v for k, v in (content | changes).items() if v is not None})
    return path


def release(path, variant="detected", damaged=False):
    """Write a cuhk-03.mat of RELEASE; return {name: pixels [H, W, 3]}."""
    rng = np.random.default_rng(0)
    pixels = {name: rng.integers(0, 256, (6, 4, 3), dtype=np.uint8) for name in RELEASE}
    left = iter(pixels.values())
    with h5py.File(path, "w") as file:
        empty = file.create_dataset("empty", data=np.zeros(2, np.uint64))  # as MATLAB has it
        pairs = []
        for pair in range(5):
            shots = np.full((2 if pair < 2 else 1, 10), empty.ref, dtype=h5py.ref_dtype)
            for person in range(len(shots)):
                for number in PRESENT.get((pair, person), []):
                    image = np.zeros((6, 4, 3), np.float64) if damaged else next(left)
                    stored = file.create_dataset(f"image{pair}_{person}_{number}", data=image.T)
                    shots[person, number] = stored.ref
            pairs.append(file.create_dataset(f"pair{pair}", data=shots.T, dtype=h5py.ref_dtype).ref)
        file.create_dataset(variant, data=np.array([pairs], h5py.ref_dtype), dtype=h5py.ref_dtype)
    return pixels


RELEASED = {
    "train_all": [
        "0001_c1_1_001_1_01.png",
        "0001_c1_1_001_1_02.png",
        "0001_c2_1_001_2_06.png",
        "0003_c1_2_001_1_01.png",
        "0003_c2_2_001_2_10.png",
    ],
    "query": ["0002_c1_1_002_1_03.png"],
    "gallery": ["0002_c2_1_002_2_08.png"],
}


@pytest.mark.parametrize("folder", ["images_labeled", "labeled/images_labeled"])
def test_cuhk03_protocol_with_a_folder_of_images(folder, tmp_path):
    protocol(tmp_path, "labeled")
    save_all(tmp_path / folder, RELEASE)
    call(prepare.main, "--download_path", tmp_path, "--variant", "labeled")
    for split, expected in RELEASED.items():
        assert names(tmp_path / "pytorch" / split) == expected
    assert [entry[1:] for entry in eval_images(tmp_path / "pytorch" / "gallery")] == [(2, 2)]


@pytest.mark.parametrize("folder", [".", "cuhk03_release"])
def test_cuhk03_protocol_with_the_release(folder, tmp_path, capsys):
    protocol(tmp_path)
    (tmp_path / folder).mkdir(exist_ok=True)
    pixels = release(tmp_path / folder / "cuhk-03.mat")
    call(prepare.main, "--download_path", tmp_path)
    made = tmp_path / "pytorch"
    for split, expected in RELEASED.items():
        assert names(made / split) == expected
    for path in [*made.glob("train_all/*/*"), *made.glob("query/*/*"), *made.glob("val/*/*")]:
        assert np.array_equal(np.array(Image.open(path)), pixels[path.name.split("_", 2)[2]])
    call(prepare.main, "--download_path", tmp_path)
    assert "already there and complete" in capsys.readouterr().out
    call(prepare.main, "--download_path", tmp_path, "--copy")
    assert "--copy: changes nothing of it; delete it first" in capsys.readouterr().err


def test_cuhk03_files_that_are_wrong(fails, tmp_path):
    flags = ("--download_path", tmp_path)
    path = protocol(tmp_path)
    fails(*flags, says="no images_detected and no cuhk-03.mat")
    (tmp_path / "cuhk-03.mat").write_text("no HDF5")
    fails(*flags, says=["cuhk-03.mat", "can't be read as CUHK03's release"])
    release(tmp_path / "cuhk-03.mat", "labeled")
    fails(*flags, says=["cuhk-03.mat", "detected"])
    release(tmp_path / "cuhk-03.mat", damaged=True)
    fails(*flags, says=["cuhk-03.mat", "1_001_1_01.png is no image"])
    save_all(tmp_path / "images_detected", list(RELEASE)[:-1])
    fails(*flags, says=["2_001_2_10.png, which is not among the detected images"])
    path.write_text("no MATLAB")
    fails(*flags, says=[path, "can't be read as CUHK03's protocol"])
    protocol(tmp_path, labels=None)
    fails(*flags, says=[path, "labels"])
    protocol(tmp_path, labels=np.array([[1]]))
    fails(*flags, says=[path, "7 names, but 1 labels"])
    for wrong in (0, 8):
        protocol(tmp_path, query_idx=np.array([[wrong]]))
        fails(*flags, says=[path, "query_idx is not within 1 to 7"])
    strange = np.empty((1, 1), dtype=object)
    strange[0, 0] = "photo.png"
    protocol(tmp_path, filelist=strange)
    fails(*flags, says=[path, "photo.png"])


# One's own photos

PHOTOS = {  # identity: photos of the cameras front and back, in sub-folders
    "alice": ["front/1.jpg", "front/2.JPG", "back/deep/1.png"],
    "bob b.": ["front/1.jpg", "back/1.jpg"],
    "7": ["front/1.jpg", "front/2.jpg", "back/1.jpg", "back/2.jpg"],
    "élodie": [f"front/{'ü' * 123}{n}.jpg" for n in range(3)] + ["back/a b'c.jpg"],
}


def own(root, photos=None):
    for identity, paths in (photos or PHOTOS).items():
        save_all(root / identity, paths)
    (root / next(iter(photos or PHOTOS)) / "notes.txt").write_text("no image")
    return root


REGEX = ("--dataset", "folder", "--camera_regex", "^(front|back)/")


def test_own_photos(tmp_path, capsys):
    root = own(tmp_path / "photos")
    call(prepare.main, "--download_path", root, *REGEX)
    made = root / "pytorch"
    who = json.loads((made / "identities.json").read_text())
    assert who["identities"] == {"7": 7, "alice": 1, "bob b.": 2, "élodie": 3}
    assert who["cameras"] == {"back": 1, "front": 2}
    train, tested = ids_of(made / "train_all"), ids_of(made / "query")
    assert len(train) == len(tested) == 2
    assert sorted(train + tested) == ["0001", "0002", "0003", "0007"]
    everything = [p for s in ("train_all", "query", "gallery") for p in made.glob(f"{s}/*/*")]
    assert len({path.name for path in everything}) == len(everything)
    # Each photo is there once, as the person and the camera that its own path says.
    raw = {(root / i / p).stat().st_ino: (i, p) for i, paths in PHOTOS.items() for p in paths}
    for path in everything:
        name, below = raw.pop(path.stat().st_ino)
        identity, camera = parse_name(path)
        assert path.parent.name == f"{identity:04d}" == f"{who['identities'][name]:04d}"
        assert camera == who["cameras"][below.split("/")[0]]
        assert len(path.name.encode()) <= NAME_BYTES + 30
    assert not raw
    capsys.readouterr()
    call(prepare.main, "--download_path", root, *REGEX)  # though `pytorch` lies among the folders
    assert "already there and complete" in capsys.readouterr().out
    call(changeIndex.main, "--data_dir", made)
    deep = ("--save_path", root / "other" / "folder")
    for _ in range(2):
        call(prepare.main, "--download_path", root, *REGEX, *deep)
    assert names(root / "other" / "folder" / "train_all") == names(made / "train_all")


def good_ones(made):
    """Return the number of gallery images that are right answers to each query."""
    gallery = eval_images(made / "gallery")
    return [
        sum(g.identity == q.identity and g.camera != q.camera for g in gallery)
        for q in eval_images(made / "query")
    ]


def test_own_photos_of_a_test_identity(tmp_path):
    """The first photo of each camera is a query, as long as every query has a right answer."""
    cases = {
        "case a": (["1/1.jpg", "1/2.jpg", "2/1.jpg", "2/2.jpg"], ["1/1.jpg", "2/1.jpg"]),
        "case b": (["1/1.jpg", "2/1.jpg"], ["1/1.jpg"]),
        "case c": (["1/1.jpg", "1/2.jpg", "2/1.jpg"], ["1/1.jpg"]),
        "case d": (["1/1.jpg", "1/2.jpg"], []),
        "case e": (["1/1.jpg", "2/1.jpg", "3/1.jpg"], ["1/1.jpg", "2/1.jpg"]),
    }
    photos = {"alice": ["1/1.jpg", "2/1.jpg"]} | {name: paths for name, (paths, _) in cases.items()}
    root = own(tmp_path / "photos", photos)
    flags = (
        "--download_path",
        root,
        "--camera_regex",
        r"(x)?(?P<camera>\d)/",
        "--test_fraction",
        0.99,
    )
    for seed in range(20):  # until alice, whom the cases say nothing of, is the one to train on
        made = tmp_path / "made" / str(seed)
        call(prepare.main, *flags, "--seed", seed, "--save_path", made)
        if ids_of(made / "train_all") == ["0001"]:
            break
    found = {(entry.identity, entry.camera) for entry in eval_images(made / "query")}
    expected = {
        (number, int(query[0]))
        for number, (_, queries) in enumerate(cases.values(), 2)
        for query in queries
    }
    assert found == expected
    assert min(good_ones(made)) >= 1


def test_own_photos_fraction_and_seed(tmp_path):
    photos = {f"p{n}": ["c1.jpg", "c2.jpg"] for n in range(10)} | {"alice": ["c1.jpg", "c2.jpg"]}
    own(tmp_path / "photos", photos)

    def tested(name, *flags):
        made = tmp_path / name
        flags = ("--camera_regex", r"c(\d)", "--save_path", made, *flags)  # folder is guessed
        call(prepare.main, "--download_path", tmp_path / "photos", *flags)
        assert not set(ids_of(made / "gallery")) & set(ids_of(made / "train_all"))
        return ids_of(made / "gallery")

    first = tested("a", "--test_fraction", 0.2)
    assert len(first) == 2
    assert tested("b", "--test_fraction", 0.2) == first
    assert tested("c", "--test_fraction", 0.2, "--seed", 1) != first
    assert len(tested("d", "--test_fraction", 0.001)) == 1
    assert len(tested("e", "--test_fraction", 0.999)) == 10


def test_own_photos_without_cameras(tmp_path):
    root = own(tmp_path / "photos")
    call(prepare.main, "--download_path", root, "--dataset", "folder", "--no_camera")
    made = root / "pytorch"
    queries = eval_images(made / "query")
    assert len(queries) == 2
    assert {entry.camera for entry in queries} == {1}
    assert {entry.camera for entry in eval_images(made / "gallery")} == {2}
    right = [len(list((made / "gallery" / i).iterdir())) for i in ids_of(made / "query")]
    assert good_ones(made) == right  # nothing is junk
    assert json.loads((made / "identities.json").read_text())["cameras"] == {}
    # Nor is it in validation, where thresholds come from.
    assert {entry.camera for entry in eval_images(made / "val")} == {1}
    assert {entry.camera for entry in eval_images(made / "train")} == {2}
    call(changeIndex.main, "--data_dir", made)
    assert ids_of(made / "train_all_new") == ["0000", "0001"]


def test_own_photos_already_split(tmp_path, fails):
    photos = {"alice": ["cam_01.jpg", "cam_2.jpg"], "carol": ["cam_1.jpg", "cam_2.jpg"]}
    own(tmp_path / "train", photos)
    save_all(tmp_path / "query" / "bob", ["cam_1.jpg"])
    flags = ("--download_path", tmp_path, "--dataset", "folder", "--camera_regex", r"cam_(\d+)")
    fails(*flags, says="gallery: no such folder, though there is")
    save_all(tmp_path / "gallery" / "bob", ["cam_2.jpg"])
    save_all(tmp_path / "gallery" / "zoe", ["sub/cam_10.jpg"])
    for drawing in (["--seed", 0], ["--test_fraction", 0.5]):
        fails(*flags, *drawing, says=[drawing[0], "has query and gallery", "leave it out"])
    call(prepare.main, *flags)
    made = tmp_path / "pytorch"
    who = json.loads((made / "identities.json").read_text())
    assert who["identities"] == {"alice": 1, "bob": 2, "carol": 3, "zoe": 4}
    assert who["cameras"] == {"1": 1, "2": 2, "10": 10}
    assert names(made / "train_all") == [
        "0001_c1_0001_cam_01.jpg",
        "0001_c2_0002_cam_2.jpg",
        "0003_c1_0001_cam_1.jpg",
        "0003_c2_0002_cam_2.jpg",
    ]
    assert [e[1:] for e in eval_images(made / "query")] == [(2, 1)]
    assert [e[1:] for e in eval_images(made / "gallery")] == [(2, 2), (4, 10)]


def test_numbers_of_names():
    assert number_names({"b", "a", "2", "010"}) == {"010": 10, "2": 2, "a": 1, "b": 3}
    assert number_names({"20260131123456", "²"}) == {"20260131123456": 1, "²": 2}


def test_own_photos_that_are_wrong(fails, tmp_path):
    root = own(tmp_path / "photos")
    flags = ("--download_path", root)
    fails(*flags, says=["--camera_regex", "--no_camera"])
    fails(*flags, "--dataset", "folder", says=["--camera_regex", "--no_camera"])
    fails(*flags, *REGEX, "--no_camera", says=["--no_camera", "not allowed with"])
    fails(*flags, "--camera_regex", "front", says=["--camera_regex front", "no group"])
    fails(*flags, "--camera_regex", "(front", says=["--camera_regex (front", "regular expression"])
    fails(*flags, "--camera_regex", "(side)", says=["7/back/1.jpg", "--camera_regex (side)"])
    fails(*flags, "--camera_regex", "front|(back)", says=["front/1.jpg", "finds no camera"])
    fails(*flags, *REGEX, "--test_fraction", 0, says=["--test_fraction", "0"])
    damaged = root / "bob b." / "front" / "1.jpg"
    good = damaged.read_bytes()
    damaged.write_bytes(good[:200])
    fails(*flags, *REGEX, says=[damaged, "can't be read as an image"])
    damaged.write_bytes(good)
    save_all(root / "007", ["front/1.jpg", "back/1.jpg"])
    fails(*flags, *REGEX, says="identities 007 and 7 are one")
    (root / "007" / "front" / "1.jpg").unlink()
    (root / "007" / "back" / "1.jpg").unlink()
    fails(*flags, *REGEX, says="007: no images in it")
    one = tmp_path / "one"
    save_all(one / "alice", ["front/1.jpg", "back/1.jpg"])
    fails("--download_path", one, *REGEX, says="alice: the only identity")
    save_all(one / "bob", ["front/1.jpg"])
    (one / "alice" / "back" / "1.jpg").unlink()
    fails(
        "--download_path", one, *REGEX, says="no identity for testing has photos from two cameras"
    )


def test_flags_of_another_dataset(fails, tmp_path):
    market(tmp_path)
    own_only = ["--no_camera"], ["--camera_regex", "(x)"], ["--test_fraction", 0.3], ["--seed", 0]
    for flag in own_only:
        fails("--download_path", tmp_path, *flag, says=[flag[0], "only for --dataset folder"])
    says = "--variant: only for --dataset cuhk03-np, and this is market1501; leave it out"
    fails("--download_path", tmp_path, "--variant", "detected", says=says)
    fails(
        "--download_path", tmp_path, "--copy", "--symlink", says=["--symlink", "not allowed with"]
    )


# Links


def first_pair(root):
    """A raw training image, and the same in the prepared folder."""
    raw = min((root / "bounding_box_train").iterdir())
    return raw, root / "pytorch" / "train_all" / "0002" / raw.name


def test_images_are_hard_links(tmp_path):
    raw, made = first_pair(market(tmp_path))
    call(prepare.main, "--download_path", tmp_path)
    call(changeIndex.main, "--data_dir", tmp_path / "pytorch")
    new = tmp_path / "pytorch" / "train_all_new" / "0000" / raw.name
    assert raw.samefile(made) and raw.samefile(new)
    assert not made.is_symlink()
    assert raw.stat().st_nlink == 1 + 4  # train_all, val, and both with class numbers


def test_a_raw_symbolic_link_is_followed(tmp_path):
    """A link to a relative path leads nowhere from another folder."""
    raw, made = first_pair(market(tmp_path))
    raw.rename(tmp_path / "bounding_box_train" / "original")
    raw.symlink_to("original")
    call(prepare.main, "--download_path", tmp_path)
    assert not made.is_symlink() and made.samefile(raw)


@pytest.mark.parametrize("why", ["asked for", "no links"])
def test_copies(why, tmp_path, monkeypatch):
    raw, made = first_pair(market(tmp_path))

    def refused(*args):
        raise OSError(18, "Invalid cross-device link")

    if why == "no links":
        monkeypatch.setattr(os, "link", refused)
    call(prepare.main, "--download_path", tmp_path, *(["--copy"] if why == "asked for" else []))
    assert made.read_bytes() == raw.read_bytes()
    assert not made.samefile(raw)


def test_symbolic_links(tmp_path, monkeypatch):
    """Relative paths on the command line too; changeIndex.py keeps them working."""
    raw, made = first_pair(market(tmp_path / "raw"))
    monkeypatch.chdir(tmp_path)
    call(prepare.main, "--download_path", "raw", "--symlink")
    call(changeIndex.main, "--data_dir", "raw/pytorch")
    new = tmp_path / "raw" / "pytorch" / "train_all_new" / "0000" / raw.name
    for path in (made, new):
        assert path.is_symlink() and path.readlink() == raw
    assert len(eval_images(Path("raw/pytorch/gallery"))) == 3


# Counts


@pytest.mark.parametrize("dataset", MADE)
def test_counts_beside_the_published_ones(dataset, tmp_path, capsys, monkeypatch):
    root = MADE[dataset](tmp_path)
    small = {
        "market1501": {"train": (2, 8, 2), "query": (1, 1, 1), "gallery": (1, 3, 2)},
        "duke": {"train": (2, 4, 3), "query": (1, 1, 1), "gallery": (1, 1, 1)},
        "cuhk03-np": {"train": (1, 4, 2), "query": (1, 1, 1), "gallery": (1, 1, 1)},
        "msmt17": {"train": (2, 4, 3), "query": (1, 1, 1), "gallery": (2, 2, 1)},
        "veri": {"train": (1, 2, 2), "query": (1, 1, 1), "gallery": (1, 1, None)},
    }[dataset]
    call(prepare.main, "--download_path", root)
    out, err = capsys.readouterr()
    assert out.count("  published: ") == 3
    warning, *_ = err.splitlines()
    published = LAYOUTS[dataset].published
    if dataset == "cuhk03-np":
        published = cuhk03.PUBLISHED["detected"]
    assert warning.startswith("warning: train_all, query, gallery: not as large as")
    for split, counts in small.items():
        monkeypatch.setitem(published, split, Counts(*counts))
    call(prepare.main, "--download_path", root)
    out, err = capsys.readouterr()
    assert "published: {} ids, {} images, {} cameras".format(*small["train"]) in out
    assert "not as large" not in err
    monkeypatch.setitem(published, "query", Counts(1, 2, 1))
    call(prepare.main, "--download_path", root)
    assert "warning: query: not as large as" in capsys.readouterr().err


def test_a_rendered_set_has_no_published_counts(tmp_path, capsys):
    (market(tmp_path) / "synthetic_market.json").write_text("{}")
    call(prepare.main, "--download_path", tmp_path)
    out, err = capsys.readouterr()
    assert "published" not in out and err == ""


def test_an_identity_with_one_image_is_warned_of(tmp_path, capsys):
    root = market(tmp_path)
    (root / "synthetic_market.json").write_text("{}")
    save_image(root / "bounding_box_train" / "0009_c1s1_000001_01.jpg", size=SIZE)
    call(prepare.main, "--download_path", root)
    assert "warning: 1 training identities have one image" in capsys.readouterr().err


def test_identities_with_one_image_each(tmp_path, capsys):
    """There is nothing to put into train; all of it is there for --train_all."""
    names = [f"000{n}_c1s1_000001_01.jpg" for n in range(2, 5)]
    market_like(tmp_path, [names, ["0001_c1s1_000001_00.jpg"], ["0001_c2s1_000005_01.jpg"]])
    made = tmp_path / "pytorch"
    call(prepare.main, "--download_path", tmp_path)
    for _ in range(2):
        call(changeIndex.main, "--data_dir", made)
        assert "train with --train_all" in capsys.readouterr().err
    new = ["class_index.json", "train_all_new", "val_new"]
    assert sorted(path.name for path in made.iterdir() if path.name not in SPLITS) == new
    assert len(training_splits(made, train_all=True).train) == 3
    next(made.glob("val/0002/*")).unlink()  # not as prepare.py makes it
    (made / "val/0002").rmdir()
    with pytest.raises(UserError, match=r"pytorch/train: no such folder; make it with prepare\.py"):
        call(changeIndex.main, "--data_dir", made)


@pytest.mark.parametrize("flags", [(), ("--copy",)])
def test_a_raw_image_that_was_replaced(flags, tmp_path):
    raw, _ = first_pair(market(tmp_path))
    data = ("--data_dir", tmp_path / "pytorch")
    call(prepare.main, "--download_path", tmp_path, *flags)
    call(changeIndex.main, *data)
    raw.unlink()
    save_image(raw, size=(20, 40))
    says = rf"{raw.name}: is another picture than .* is now; delete .*pytorch, or name"
    with pytest.raises(UserError, match=says):
        call(prepare.main, "--download_path", tmp_path, *flags)
    for split in SPLITS:
        shutil.rmtree(tmp_path / "pytorch" / split)
    call(prepare.main, "--download_path", tmp_path, "--save_path", tmp_path / "again", *flags)
    for split in (tmp_path / "again").iterdir():
        split.rename(tmp_path / "pytorch" / split.name)
    with pytest.raises(UserError, match="_new: holds something else; delete it"):
        call(changeIndex.main, *data)


# Stopped half-way


# prepare.py, in which one image takes as long as the file "go" is not there.
SLOW = """
import os, sys, time
import prepare
from reid.errors import run
read_image = prepare.read_image
def slow(path):
    while path.name.startswith("0001_c2") and not os.path.exists(sys.argv[-1]):
        time.sleep(0.01)
    return read_image(path)
prepare.read_image = slow
run(lambda: prepare.main(sys.argv[1:-1]))
"""


@pytest.fixture
def stuck(tmp_path):
    """prepare.py in the middle of its work: the process, its dataset, flags, "go"."""
    root, go = market(tmp_path / "data" / "market"), tmp_path / "go"
    flags = ["--download_path", str(root), "--save_path", str(tmp_path / "data" / "new" / "made")]

    def listen():  # a shell's background job, as the tests may be, starts without Ctrl-C
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *flags, str(go)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=listen,
    )
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("data/new/.*/*/*/*.jpg"))) < 8 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert process.poll() is None, process.stderr.read()
    yield process, root, flags, go
    process.kill()
    process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_leave_nothing(number, stuck, tmp_path):
    process, _, _, go = stuck
    process.send_signal(number)
    go.touch()
    _, err = process.communicate()
    assert (process.returncode, err) == (130, "interrupted\n")
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["market"]


def test_what_kill_9_leaves_the_next_run_removes(stuck, tmp_path):
    process, root, flags, _ = stuck
    process.kill()
    process.communicate()
    new = tmp_path / "data" / "new"
    assert {path.name for path in new.iterdir()} == {".made.lock", ".made.partial"}
    code, out, err = run_script("prepare.py", *flags)
    assert code == 0, err
    assert [path.name for path in new.iterdir()] == ["made"]
    code, out, err = run_script("prepare.py", *flags)
    assert "already there and complete" in out
    assert names(new / "made" / "query") == sorted(path.name for path in (root / "query").iterdir())


def test_a_living_process_is_left_alone(stuck, tmp_path):
    process, _, flags, go = stuck
    before = tree(tmp_path / "data" / "new")
    code, _, err = run_script("prepare.py", *flags)
    assert (code, len(err.splitlines())) == (2, 1)
    assert f"another process is writing it (process {process.pid} " in err
    assert set(before) <= set(tree(tmp_path / "data" / "new"))
    go.touch()
    assert process.wait() == 0


def test_new_folder_that_fails_leaves_no_parents(tmp_path):
    with pytest.raises(UserError), new_folder(tmp_path / "a" / "b" / "c"):
        raise UserError("no")
    assert tree(tmp_path) == []


def test_an_empty_folder_is_filled(tmp_path):
    market(tmp_path / "market")
    (tmp_path / "made").mkdir()
    call(prepare.main, "--download_path", tmp_path / "market", "--save_path", tmp_path / "made")
    assert len(names(tmp_path / "made" / "train_all")) == 8


# What others met


def test_a_dataset_lies_some_folders_down(tmp_path, capsys):
    """As Kaggle unpacks it, with what macOS adds to a ZIP file."""
    msmt17(tmp_path / "input" / "msmt" / "MSMT17_V1")
    save_image(tmp_path / "__MACOSX" / "bounding_box_train" / "._0002_c1s1_000451_03.jpg")
    call(prepare.main, "--download_path", tmp_path)
    assert "MSMT17_V1: msmt17 (guessed" in capsys.readouterr().out
    assert len(names(tmp_path / "pytorch" / "train_all")) == 4


def test_a_dataset_whose_signs_are_missing_is_nobodys_own_photos(tmp_path, fails):
    root = msmt17(tmp_path / "m")
    for path in root.glob("list_*.txt"):
        path.unlink()
    fails("--download_path", root, says=["called as msmt17's", "list_train.txt"])
    save_all(tmp_path / "photos" / "0002", ["0002_c1s1_000451_03.jpg"])
    fails("--download_path", tmp_path / "photos", says=["called as market1501's", "bounding_box"])


def test_a_pattern_belongs_to_its_layout(tmp_path, fails):
    """Market-1501's folders with names of another kind: the frame is no camera."""
    names = ["0007_01_000213_00.jpg"]
    market_like(tmp_path / "a", [names] * 3)
    fails(
        "--download_path",
        tmp_path / "a",
        says=[names[0], "no identity and camera", "--dataset folder"],
    )
    # MSMT17's names, put into such folders by somebody, can't be mistaken for others.
    folders = [[f"000{n}_00{n}_0{n}_0303morning_0015_0.jpg"] for n in range(3)]
    market_like(tmp_path / "b", folders)
    call(prepare.main, "--download_path", tmp_path / "b")
    assert [entry[1:] for entry in eval_images(tmp_path / "b" / "pytorch" / "query")] == [(1, 1)]


def test_one_identity_spelled_in_two_ways(tmp_path, fails):
    train = ["0001_c1s1_000001_00.jpg", "1_c1s1_000002_00.jpg"]
    test = ["0002_c1s1_000001_00.jpg"]
    market_like(tmp_path, [train, test, ["0002_c2s1_000003_00.jpg"]])
    fails("--download_path", tmp_path, says="train_all: identities")
    (tmp_path / "bounding_box_train" / train[1]).rename(
        tmp_path / "bounding_box_train" / "-1_c1s1_000002_00.jpg"
    )
    fails("--download_path", tmp_path, says=["-1_c1s1_000002_00.jpg", "junk in train_all"])


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_msmt17_lists_as_windows_writes_them(encoding, tmp_path):
    root = msmt17(tmp_path / "m")
    for path in root.glob("list_*.txt"):
        text = path.read_text().replace("/", "\\").replace("\n", "\r\n")
        path.write_bytes(text.encode(encoding))
    call(prepare.main, "--download_path", root)
    assert len(names(root / "pytorch" / "train_all")) == 4


def test_only_query_and_gallery(tmp_path, capsys):
    """A dataset to test on; changeIndex.py and training say what is missing."""
    root = duke(tmp_path / "duke")
    shutil.rmtree(root / "bounding_box_train")
    call(prepare.main, "--download_path", root)
    assert sorted(path.name for path in (root / "pytorch").iterdir()) == ["gallery", "query"]
    out, err = capsys.readouterr()
    assert "duke (guessed" in out
    assert "no training images" in err
    root = cuhk03_folders(tmp_path / "cuhk03-np") / "detected"
    shutil.rmtree(root / "bounding_box_train")
    call(prepare.main, "--download_path", root)
    assert "cuhk03-np (guessed" in capsys.readouterr().out
    save_all(tmp_path / "own" / "query" / "a", ["1.jpg"])
    save_all(tmp_path / "own" / "gallery" / "a", ["2.jpg"])
    call(prepare.main, "--download_path", tmp_path / "own", "--no_camera")
    assert good_ones(tmp_path / "own" / "pytorch") == [1]


def test_what_is_left_out_is_counted_and_named(tmp_path, capsys):
    """One list of formats with search.py; links that lead nowhere, or to folders."""
    root = own(tmp_path / "photos", {"a": ["cam1.jpg", "cam2.webp"], "b": ["cam1.tif", "cam2.GIF"]})
    (root / "b" / "cam3.jpg").symlink_to(tmp_path / "gone.jpg")
    (root / "b" / "more").symlink_to(root / "a")
    (root / "a" / "__MACOSX").mkdir()
    (root / "a" / "__MACOSX" / "._cam1.jpg").write_text("x")
    os.mkfifo(root / "b" / "cam4.jpg")
    flags = ("--download_path", root, "--camera_regex", r"cam(\d)")
    call(prepare.main, *flags)
    everything = [p for s in ("train_all", "query", "gallery") for p in names(root / "pytorch" / s)]
    assert len(everything) == 4
    err = capsys.readouterr().err
    assert "warning: 4 left out: " in err
    for said in ("notes.txt: is no image", "a broken link", "; and 1 more"):
        assert said in err


def test_copies_without_cameras_are_junk(tmp_path):
    """A query that lies in the gallery, too, does not find itself, but the others."""
    for n in range(2):
        save_all(tmp_path / "train" / f"t{n}", ["1.jpg", "2.jpg"])
    save_all(tmp_path / "gallery" / "a", ["1.jpg", "2.jpg", "3.jpg"])
    save_all(tmp_path / "gallery" / "b", ["1.jpg", "2.jpg"])
    for folder in ("a", "b"):
        shutil.copytree(tmp_path / "gallery" / folder, tmp_path / "query" / folder)
    (tmp_path / "query" / "a" / "3.jpg").unlink()
    call(prepare.main, "--download_path", tmp_path, "--dataset", "folder", "--no_camera")
    assert good_ones(tmp_path / "pytorch") == [2, 2, 1, 1]
    content = {p: p.read_bytes() for p in (tmp_path / "pytorch").glob("*/*/*.jpg")}
    for query in eval_images(tmp_path / "pytorch" / "query"):
        for image in eval_images(tmp_path / "pytorch" / "gallery"):
            if content[query.path] == content[image.path]:
                assert query[1:] == image[1:]  # junk


def test_copies_of_a_training_photo_without_cameras_are_left_out(tmp_path, capsys):
    """Else a photo and its copies would have a camera of their own, and another be held out."""
    save_all(tmp_path / "train" / "a", ["1.jpg", "3.jpg", "4.jpg"])
    save_all(tmp_path / "train" / "b", ["2.jpg"])
    shutil.copy(tmp_path / "train/a/1.jpg", tmp_path / "train/a/2.jpg")
    shutil.copy(tmp_path / "train/a/1.jpg", tmp_path / "train/b/1.jpg")  # another person, by name
    save_all(tmp_path / "query" / "c", ["1.jpg"])
    save_all(tmp_path / "gallery" / "c", ["2.jpg"])
    call(prepare.main, "--download_path", tmp_path, "--dataset", "folder", "--no_camera")
    made = tmp_path / "pytorch"
    assert names(made / "val") == ["0001_c1_0001_1.jpg", "0002_c1_0001_1.jpg"]
    assert names(made / "train") == [
        "0001_c2_0002_3.jpg",
        "0001_c2_0003_4.jpg",
        "0002_c2_0002_2.jpg",
    ]
    assert "train/a/2.jpg: is the same picture as" in capsys.readouterr().err


def test_copies_with_cameras_are_left_out(tmp_path, capsys):
    """Copies show one person; where they show two, or in another dataset, they are an error."""
    root = own(tmp_path / "photos", {i: ["cam1.jpg", "cam2.jpg", "cam3.jpg"] for i in "abcd"})
    for folder in "abcd":
        shutil.copy(root / folder / "cam1.jpg", root / folder / "cam2.jpg")
    call(prepare.main, "--download_path", root, "--camera_regex", r"cam(\d)")
    assert good_ones(root / "pytorch") == [1, 1]
    assert "cam2.jpg: is the same picture as" in capsys.readouterr().err
    split = tmp_path / "split"
    for name in (
        "query/a/cam1.jpg",
        "query/b/cam1.jpg",
        "gallery/a/cam2.jpg",
        "gallery/b/cam2.jpg",
    ):
        save_image(split / name, size=SIZE)
    shutil.copy(split / "query" / "a" / "cam1.jpg", split / "gallery" / "a" / "cam3.jpg")
    call(prepare.main, "--download_path", split, "--camera_regex", r"cam(\d)")
    assert good_ones(split / "pytorch") == [1, 1]


def test_queries_that_nothing_answers(tmp_path, fails, capsys):
    save_all(tmp_path / "query" / "a", ["cam1.jpg"])
    save_all(tmp_path / "query" / "b", ["cam1.jpg"])
    shutil.copytree(tmp_path / "query" / "a", tmp_path / "gallery" / "a")
    flags = ("--download_path", tmp_path, "--dataset", "folder")
    says = "every photo in gallery is a copy of one in query"
    fails(*flags, "--camera_regex", r"cam(\d)", says=says)
    call(prepare.main, *flags, "--no_camera")
    assert "warning: 2 of 2 queries have no image of another camera" in capsys.readouterr().err


def test_many_copies_are_not_many_cameras(tmp_path):
    save_all(tmp_path / "gallery" / "a", [f"{n}.jpg" for n in range(12)])
    shutil.copytree(tmp_path / "gallery" / "a", tmp_path / "query" / "a")
    call(prepare.main, "--download_path", tmp_path, "--dataset", "folder", "--no_camera")
    assert good_ones(tmp_path / "pytorch") == [11] * 12


def test_digits_are_ascii(tmp_path, fails):
    names = ["0002_c1s1_000001_00.jpg"], ["٣_c1s1_000001_00.jpg"], ["0003_c2s1_000001_00.jpg"]
    fails("--download_path", market_like(tmp_path, names), says="٣_c1s1_000001_00.jpg")


def test_a_picture_of_two_people(tmp_path, fails):
    names = ["0002_c1s1_000001_00.jpg"], ["0003_c1s1_000001_00.jpg"], ["0004_c2s1_000001_00.jpg"]
    root = market_like(tmp_path, names)
    shutil.copy(root / "query" / names[1][0], root / "bounding_box_test" / names[2][0])
    fails("--download_path", root, says=["id 3, camera 1", "id 4, camera 2", "the same picture"])


def test_people_in_training_and_in_testing_are_said(tmp_path, capsys):
    names = ["0002_c1s1_000001_00.jpg"], ["0002_c1s1_000002_00.jpg"], ["0002_c2s1_000003_00.jpg"]
    call(prepare.main, "--download_path", market_like(tmp_path, names))
    assert "1 identities are in training and in testing, 2 the first" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "id_regex", "camera_regex"),
    [
        (["cam_a/001_45.bmp", "cam_b/001_90.bmp"], r"/(\d+)_", "cam_(.)"),  # VIPeR
        (["cam_a/person_0001.png", "cam_b/person_0001.png"], r"person_(\d+)", "cam_(.)"),  # PRID
        (["probe/0001_1_25.jpeg", "gallery/0001_2_25.jpeg"], r"/(\d+)_", r"/\d+_(\d)"),  # GRID
        (["x/0001/0001C1T1F001.jpg", "x/0001/0001C2T1F001.jpg"], r"/(\d+)C", r"C(\d)T"),  # MARS
        (["a/0001/x1.png", "b/0001/x2.png"], r"([^/]+)/[^/]+$", r"(?P<camera>\d)\.png"),
    ],
)
def test_identities_in_names(files, id_regex, camera_regex, tmp_path):
    """Layouts whose identities are in the files' names or in the innermost folder."""
    save_all(tmp_path, files)
    save_all(tmp_path, [name.replace("1", "7") for name in files])
    flags = ("--dataset", "folder", "--id_regex", id_regex, "--camera_regex", camera_regex)
    call(prepare.main, "--download_path", tmp_path, *flags)
    call(prepare.main, "--download_path", tmp_path, *flags)  # its own folder is not looked into
    made = tmp_path / "pytorch"
    assert len(json.loads((made / "identities.json").read_text())["identities"]) >= 2
    assert len(ids_of(made / "query")) == 1


@pytest.mark.parametrize(
    ("name", "identity", "camera", "left_out"),
    [
        ("VIPeR", "0", "a", None),
        ("PRID", "1", "a", "single_shot/cam_b/person_0201.png"),
        ("GRID", "1", "1", "probe/0000_1_25004.jpeg"),
        ("MARS", "2", "1", "bbox_test/0000/0000C1T0001F001.jpg"),
    ],
)
def test_expressions_of_the_manual(name, identity, camera, left_out):
    lines = (ROOT / "docs/data.md").read_text().splitlines()
    line = next(line for line in lines if line.startswith(f"| {name}") and "--id_regex" in line)
    _, layout, flags, _ = line.replace(r"\|", "\0").split("|")
    flags = shlex.split(flags.strip(" `").replace("\0", "|"))
    args = prepare.get_parser().parse_args(["--download_path", "x", *flags])
    patterns = make_patterns(args.id_regex, args.camera_regex, False)
    path = layout.split("`")[1]
    assert match_name(patterns.identity, "id", path) == identity
    assert match_name(patterns.camera, "camera", path) == camera
    assert left_out is None or not match_name(patterns.identity, "id", left_out)


def test_id_regex_mistakes(tmp_path, fails, capsys):
    save_all(tmp_path / "x", ["0001C1.jpg", "0001C2.jpg", "0002C1.jpg", "0002C2.jpg", "0002C3.jpg"])
    save_all(tmp_path / "x", ["00-1C1.jpg"])
    flags = ("--download_path", tmp_path, "--camera_regex", r"C(\d)")
    fails(*flags, "--id_regex", "(", says=["--id_regex (", "regular expression"])
    fails(*flags, "--id_regex", "x", says=["--id_regex x", "no group"])
    fails(*flags, "--id_regex", "(nobody)", says="finds no identity in any")
    fails(*flags, "--id_regex", "", says="argument --id_regex: is empty; is a variable not set?")
    capsys.readouterr()
    call(prepare.main, *flags, "--id_regex", r"/(\d+)C")
    assert "1 left out: " in (err := capsys.readouterr().err) and "00-1C1.jpg" in err


def test_a_train_folder_alone_is_no_person(tmp_path, fails):
    for split in ("train", "val"):
        save_all(tmp_path / split / "0001", ["1.jpg", "2.jpg"])
    fails("--download_path", tmp_path, "--no_camera", says="query: no such folder, though there is")


def test_own_photos_that_look_like_a_datasets_once_they_are_prepared(tmp_path):
    """The prepared names of 001.png are like CUHK03's."""
    for person in ("a", "b"):
        save_all(tmp_path / person, [f"{n:03d}.png" for n in range(5)])
    for _ in range(2):
        call(prepare.main, "--download_path", tmp_path, "--no_camera")


@pytest.mark.parametrize("name", ["Train", "test", "bounding_box_train", "Query", "-1"])
def test_folders_that_are_no_persons(name, tmp_path, fails):
    """A person called so would be one, without a word."""
    for folder in (name, "alice", "bob"):
        save_all(tmp_path / folder, ["x/1.jpg", "x/2.jpg"])
    flags = ("--dataset", "folder", "--no_camera")
    says = "junk by its name" if name == "-1" else "is a part of a dataset by its name"
    fails("--download_path", tmp_path, *flags, says=[name, says])


def test_a_picture_of_two_identities(tmp_path, capsys):
    """In training as in testing: a copied folder."""
    for folder in ("a", "b", "c", "d"):
        save_all(tmp_path / folder, ["1.jpg", "2.jpg"])
    call(prepare.main, "--download_path", tmp_path, "--no_camera", "--save_path", tmp_path / "x")
    assert "two identities" not in capsys.readouterr().err
    test = json.loads((tmp_path / "x" / "identities.json").read_text())["identities"]
    made = ids_of(tmp_path / "x" / "query")
    tested = {name for name, number in test.items() if f"{number:04d}" in made}
    one, other = min(tested), min({*"abcd"} - tested)
    shutil.copy(tmp_path / one / "1.jpg", tmp_path / other / "3.jpg")
    call(prepare.main, "--download_path", tmp_path, "--no_camera")
    assert "warning: 1 pictures are of two identities" in capsys.readouterr().err


def test_names_that_are_one(tmp_path):
    """José as macOS writes it, with the accent apart, and as others do."""
    for folder in ("Jos\u00e9", "Jose\u0301", "a"):
        save_all(tmp_path / folder, [f"{len(folder)}1.jpg", f"{len(folder)}2.jpg"])
    call(prepare.main, "--download_path", tmp_path, "--no_camera")
    who = json.loads((tmp_path / "pytorch" / "identities.json").read_text())
    assert who["identities"] == {"Jos\u00e9": 1, "a": 2}


def test_folders_beside_train_query_and_gallery_are_said(tmp_path, capsys):
    for name in ("train/a", "query/b", "gallery/b", "distractors/x"):
        save_all(tmp_path / name, ["1.jpg", "2.jpg"])
    save_all(tmp_path / "query", ["loose.jpg"])
    call(prepare.main, "--download_path", tmp_path, "--no_camera")
    err = capsys.readouterr().err
    assert "2 left out: " in err
    assert "distractors: is not train, query or gallery" in err
    assert "loose.jpg: is in no folder <id>" in err
