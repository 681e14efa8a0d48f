"""search.py and its gallery: against plain NumPy, killed, on folders that change, on bad input."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, call, exit_code, run_script, save_image
from PIL import Image

import search
from model import ft_net_dense
from re_ranking import rerank
from reid import gallery, images, pictures
from reid.checkpoint import Run
from reid.errors import UserError
from reid.features import Embedder, ImageModel, read_ahead
from reid.files import write_json
from reid.images import read_image

pytest.importorskip("faiss")

DIM = 8
MADE_BY = {"weights_sha256": "abc", "layer": "pool", "scales": [1.0]}
CPU = ("--gpu_ids", "-1", "--precision", "fp32")


class FakeEmbed(ImageModel):
    """An Embedder whose feature is an image's first colours; counts what it reads."""

    batchsize = 4

    def __init__(self, wait=0.0):
        self.read_paths, self.wait = [], wait

    def read(self, path):
        self.read_paths.append(path)
        return np.asarray(read_image(path)).reshape(-1)[:DIM]

    def of_batch(self, batch):
        time.sleep(self.wait)
        features = np.stack(batch).astype(np.float32) - 127.5
        return features / np.linalg.norm(features, axis=1, keepdims=True)


def open_gallery(path=None, made_by=MADE_BY):
    return gallery.Gallery(made_by, DIM, path)


def crops(folder, number=10, seed=0):
    for n in range(number):
        save_image(folder / f"{n:03d}.png", seed=seed + n, size=(8, 8))
    return folder


def unit_vectors(number, dim=DIM, seed=0):
    features = np.random.default_rng(seed).normal(size=(number, dim)).astype(np.float32)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def filled(features, path=None):
    """A Gallery of these features, of images /g/0.jpg, /g/1.jpg, ..."""
    found = open_gallery(path)
    for number, feature in enumerate(features):
        found.add((f"/g/{number}.jpg".encode(), 1, 1), feature)
    found.base.commit()
    return found


def numbers(places):
    return [int(Path(place.path).stem) for place in places]


def run_folder(path, height=32, width=32):
    run = Run(path)
    run.path.mkdir(parents=True)
    run.save_weights(ft_net_dense(3), "last")
    write_json(run.file("opts.json"), {"options": {"height": height, "width": width}})
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.manual_seed(0)
    return run_folder(tmp_path_factory.mktemp("runs") / "dense")


def people(folder):
    """Crops of all kinds: 0.png to 5.png and other suffixes, in folders."""
    rng = np.random.default_rng(0)
    names = ["0.png", "1.jpg", "a/2.webp", "a/b/3.TIF", "4.bmp", "5.gif"]
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        size = int(rng.integers(1, 90)), int(rng.integers(1, 90))
        few = rng.integers(0, 256, (4, 2, 3), dtype=np.uint8)
        Image.fromarray(few).resize(size, Image.Resampling.BICUBIC).save(path)
    return folder


@pytest.fixture
def flags(run, tmp_path, monkeypatch):
    """What makes a run of search.py; the current folder is tmp_path."""
    monkeypatch.chdir(tmp_path)
    people(tmp_path / "crops")
    save_image(tmp_path / "query.png", seed=9)
    return ("--query", "query.png", "--gallery", "crops", *of_run(run), "--output", "found.jpg")


def of_run(run):
    return ("--model_dir", run.parent, "--name", run.name, *CPU)


# --- the gallery --------------------------------------------------------------------------------


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize("queries", [1, 30])
def test_ranking_against_numpy(loaded, rows, queries, monkeypatch):
    monkeypatch.setattr(gallery, "BLOCK", rows * 4 * DIM)
    features, queries = unit_vectors(100), unit_vectors(queries, seed=1)
    with filled(features) as found:
        assert len(found) == 100
        if loaded:
            found.load()
        for number in (1, 10, 100, 500):
            places = found.search(queries, number)
            similarity = queries @ features.T
            expected = np.argsort(-similarity, axis=1)[:, :number]
            assert [numbers(row) for row in places] == expected.tolist()
            ranked = np.take_along_axis(similarity, expected, axis=1)
            assert [[p.similarity for p in row] for row in places] == [
                pytest.approx(row, abs=1e-6) for row in ranked
            ]


def test_equal_images_are_all_found():
    features = np.concatenate([unit_vectors(5), np.repeat(unit_vectors(1, seed=2), 6, axis=0)])
    with filled(features) as found:
        assert sorted(numbers(found.search(features[-1:], 6)[0])) == [5, 6, 7, 8, 9, 10]


def test_a_querys_own_image_is_left_out():
    features = unit_vectors(20)
    with filled(features) as found:
        own = ["/g/3.jpg", None, "/elsewhere/1.jpg"]
        three, four, five = found.search(features[3:6], 5, own)
        assert [len(row) for row in (three, four, five)] == [5, 5, 5]
        assert 3 not in numbers(three)
        assert (numbers(four)[0], numbers(five)[0]) == (4, 5)
        assert len(found.search(features[3:4], 20, own[:1])[0]) == 19


def test_reranking_is_that_of_the_candidates_alone():
    features, query = unit_vectors(60), unit_vectors(1, seed=1)
    with filled(features) as found:
        places = found.search(query, 30)[0]
        again = found.rerank(query[0], places)
        distance = next(rerank(query, features[numbers(places)]))[0]
        order = np.argsort(distance)
        assert numbers(again) == np.array(numbers(places))[order].tolist()
        assert numbers(again) != numbers(places)
        assert [p.distance for p in again] == pytest.approx(distance[order])
        similarity = {p.id: p.similarity for p in places}
        assert all(p.similarity == similarity[p.id] for p in again)
        for few in (1, 2, 8):
            assert len(found.rerank(query[0], places[:few])) == few
        assert found.rerank(query[0], []) == []


def test_only_what_is_new_or_changed_is_extracted(tmp_path):
    folder, index = crops(tmp_path / "crops"), tmp_path / "crops.index"
    embed = FakeEmbed()
    with open_gallery(index) as found:
        assert found.update(folder, embed) == (10, 0, 0, [])
        before = {p.path: p.similarity for p in found.search(unit_vectors(1), 10)[0]}
    assert sorted(before) == sorted(embed.read_paths) == sorted(map(str, folder.iterdir()))
    embed = FakeEmbed()
    with open_gallery(index) as found:
        assert found.update(folder, embed) == (0, 0, 0, [])
        save_image(folder / "003.png", seed=50, size=(8, 8))  # changed
        os.utime(folder / "003.png", ns=(1, 1))  # maybe in one tick of the clock
        (folder / "004.png").unlink()
        (folder / "005.png").rename(folder / "more.png")
        assert found.update(folder, embed) == (2, 2, 0, [])
        assert sorted(Path(p).name for p in embed.read_paths) == ["003.png", "more.png"]
        after = {p.path: p.similarity for p in found.search(unit_vectors(1), 100)[0]}
    old, new = {Path(p).name for p in before}, {Path(p).name for p in after}
    assert new == old - {"004.png", "005.png"} | {"more.png"}
    assert after[str(folder / "more.png")] == before[str(folder / "005.png")]
    assert after[str(folder / "003.png")] != before[str(folder / "003.png")]
    with sqlite3.connect(index) as base:
        assert base.execute("SELECT count(*) FROM features").fetchone() == (9,)


def found_names(found):
    return {Path(place.path).name for place in found.search(unit_vectors(1), 100)[0]}


def test_a_gallery_that_was_renamed_is_dropped(tmp_path):
    old, index = crops(tmp_path / "old", 3), tmp_path / "crops.index"
    other = crops(tmp_path / "other", 2, seed=50)
    with open_gallery(index) as found:
        found.update(old, FakeEmbed())
        found.update(other, FakeEmbed())
        old.rename(tmp_path / "new")
        found.update(tmp_path / "new", FakeEmbed())
        assert found.check_roots() == [f"{old}: gone, its 3 images dropped"]
        assert found.check_roots() == []
        assert len(found) == 5
        paths = [Path(place.path) for place in found.search(unit_vectors(1), 100)[0]]
        assert len(paths) == 5 and all(path.exists() for path in paths)


@pytest.mark.parametrize("unmounted", ["empty", "above_empty", "mount_point"])
def test_a_disk_that_is_away_empties_no_index(unmounted, tmp_path, monkeypatch):
    """Its images are left out, and are there again when it is."""
    disk, index = tmp_path / "media" / "disk", tmp_path / "crops.index"
    folder = crops(disk if unmounted != "above_empty" else disk / "crops", 3)
    other = crops(tmp_path / "other", 2, seed=50)
    with open_gallery(index) as found:
        if unmounted == "mount_point":
            crops(tmp_path / "media" / "another", 1)
            monkeypatch.setattr(os.path, "ismount", lambda path: path == str(disk))
        found.update(folder, FakeEmbed())
        found.update(other, FakeEmbed())
        everything = found_names(found)
    disk.rename(tmp_path / "aside")
    if unmounted != "mount_point":
        disk.mkdir()
    with open_gallery(index) as found:
        assert found.check_roots() == [f"{folder}: not there now, its 3 images left out"]
        assert found_names(found) == {path.name for path in other.iterdir()}
        found.load()
        assert len(found) == len(found.search(unit_vectors(1), 100)[0]) == 2
    if disk.exists():
        disk.rmdir()
    (tmp_path / "aside").rename(disk)
    with open_gallery(index) as found:
        assert found.check_roots() == []
        assert found_names(found) == everything and len(found) == 5


def test_a_file_that_is_gone_is_no_place_in_a_ranking(tmp_path):
    folder, index = crops(tmp_path / "crops", 3), tmp_path / "crops.index"
    with open_gallery(index) as found:
        found.update(folder, FakeEmbed())
        (folder / "001.png").unlink()
        assert found.drop_missing() == 1
        assert found_names(found) == {"000.png", "002.png"}
    with open_gallery(index) as found:
        assert len(found) == 2


def test_a_file_that_has_changed_is_no_place_either(tmp_path):
    """Its feature is of the picture that it was."""
    folder, index = crops(tmp_path / "crops", 3), tmp_path / "crops.index"
    with open_gallery(index) as found:
        found.update(folder, FakeEmbed())
        assert all(map(found.is_current, found.search(unit_vectors(1), 10)[0]))
        save_image(folder / "001.png", seed=77, size=(9, 9))
        places = found.search(unit_vectors(1), 10)[0]
        assert [found.is_current(p) for p in places].count(False) == 1
        assert found.drop_missing() == 1
        assert found_names(found) == {"000.png", "002.png"}


def test_what_prepare_made_is_not_searched(tmp_path):
    """Its images are those beside it once more."""
    folder = crops(tmp_path / "crops", 3)
    shutil.copytree(folder, folder / "pytorch" / "train_all" / "0001")
    with open_gallery() as found:
        assert found.update(folder, FakeEmbed())[:2] == (3, 0)


def test_renamed_gallery_as_a_user(run, tmp_path, monkeypatch):
    people(tmp_path / "g")
    monkeypatch.chdir(tmp_path)
    query = tmp_path / "g" / "0.png"
    flags = ("--index", "i", "--model_dir", run.parent, "--name", run.name, *CPU)
    call(search.main, "--query", query, "--gallery", "g", *flags)
    (tmp_path / "g").rename(tmp_path / "g2")
    query = tmp_path / "g2" / "0.png"
    call(search.main, "--query", query, "--gallery", "g2", *flags, "--json", "o.json")
    places = json.loads((tmp_path / "o.json").read_text())["queries"][0]["places"]
    assert len(places) == 5
    assert all(os.path.exists(place["path"]) for place in places)
    (tmp_path / "g2" / "1.jpg").unlink()
    call(search.main, "--query", query, *flags, "--json", "o.json")
    assert len(json.loads((tmp_path / "o.json").read_text())["queries"][0]["places"]) == 4


def test_loaded_features_follow_an_update(tmp_path):
    folder = crops(tmp_path / "crops", 3)
    with open_gallery() as found:
        found.update(folder, FakeEmbed())
        found.load()
        crops(folder, 5)
        found.update(folder, FakeEmbed())
        assert len(found.search(unit_vectors(1), 10)[0]) == 5


def test_another_process_changes_a_gallery_that_is_loaded(tmp_path):
    folder, index = crops(tmp_path / "crops", 6), tmp_path / "crops.index"
    with open_gallery(index) as one, open_gallery(index) as other:
        one.update(folder, FakeEmbed())
        one.load()
        query = unit_vectors(1)
        before = one.search(query, 6)[0]
        Path(before[0].path).unlink()
        save_image(folder / "new.png", seed=70, size=(8, 8))
        assert other.update(folder, FakeEmbed())[:2] == (1, 1)
        # What was dropped is missing; nothing takes its place under its number.
        assert one.search(query, 6)[0] == before[1:]
        assert len(one.rerank(query[0], before)) == 5
        one.load()
        assert {Path(p.path).name for p in one.search(query, 9)[0]} == {
            path.name for path in folder.iterdir()
        }


def test_two_processes_make_an_index_at_once(tmp_path, monkeypatch):
    """The second sees no tables yet, but when it is its turn they are there."""
    tables = gallery.Gallery.tables
    seen = []

    def late(self):
        seen.append(tables(self))
        if len(seen) == 1:
            with monkeypatch.context() as patch:
                patch.setattr(gallery.Gallery, "tables", tables)
                open_gallery(tmp_path / "crops.index").base.close()
        return seen[-1]

    monkeypatch.setattr(gallery.Gallery, "tables", late)
    with open_gallery(tmp_path / "crops.index") as found:
        assert seen[0] == set() != seen[1]
        assert len(found) == 0


def test_a_changed_image_that_is_damaged_has_no_feature(tmp_path):
    folder, index = crops(tmp_path / "crops", 3), tmp_path / "crops.index"
    with open_gallery(index) as found:
        found.update(folder, FakeEmbed())
        (folder / "001.png").write_bytes(b"damaged")
        update = found.update(folder, FakeEmbed())
        assert (update.extracted, update.dropped, update.skipped) == (0, 0, 1)
        assert "001.png: can't be read as an image" in update.messages[0]
        assert len(found) == 2


def test_folders_side_by_side_and_within_one_another(tmp_path):
    """Only what lies under the folder is dropped; a folder's name may begin with another's."""
    inner, beside = crops(tmp_path / "a" / "b", 3), crops(tmp_path / "a-more", 2, seed=20)
    index = tmp_path / "all.index"
    with open_gallery(index) as found:
        found.update(inner, FakeEmbed())
        found.update(beside, FakeEmbed())
        embed = FakeEmbed()
        assert found.update(tmp_path / "a", embed).extracted == 0  # all are there already
        crops(tmp_path / "a", 1)
        shutil.rmtree(inner)
        assert found.update(tmp_path / "a", embed)[:2] == (1, 3)
        assert len(found) == 3
        shutil.rmtree(tmp_path / "a")
        crops(tmp_path / "a" / "c", 1)
        link = tmp_path / "link"
        link.symlink_to(tmp_path / "a")  # another name of the same folder
        assert found.update(link, embed)[:2] == (1, 1)
        assert len(found) == 3


@pytest.mark.parametrize("kind", ["train_all", "gallery"])
def test_a_prepared_folder_inside_keeps_its_images(kind, tmp_path):
    """Only an update of its own enters it; one of the folder above says nothing about it."""
    query = crops(tmp_path / "market" / "pytorch" / "query", 3)
    (tmp_path / "market" / "pytorch" / kind).mkdir()
    crops(tmp_path / "market", 1)
    with open_gallery(tmp_path / "all.index") as found:
        found.update(query, FakeEmbed())
        assert found.update(tmp_path / "market", FakeEmbed())[:2] == (1, 0)
        assert found.update(query, FakeEmbed())[:2] == (0, 0)
        assert len(found) == 4


def test_what_is_no_image_of_the_gallery(tmp_path):
    folder = crops(tmp_path / "crops", 2)
    save_image(folder / "._000.png")
    save_image(folder / ".hidden" / "a.png")
    (folder / "notes.txt").write_text("no image")
    (folder / "film.mp4").write_bytes(b"\0\0\0\x18ftypisom")
    (folder / "broken.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(folder / "pipe.png")  # reading it would wait for ever
    (folder / "folder.png").mkdir()
    (folder / "empty.jpg").touch()
    (folder / "film.jpg").write_bytes(b"\0\0\0\x18ftypisom")
    save_image(folder / "cut.png").write_bytes((folder / "000.png").read_bytes()[:60])
    with open_gallery() as found:
        update = found.update(folder, FakeEmbed())
        assert (update.extracted, update.skipped) == (2, 5)
        assert len(update.messages) == gallery.NAMED
        assert "broken.png: is a broken link" in update.messages[0]


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    folder = crops(tmp_path / "crops", 2)
    crops(folder / "closed", 2)
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with open_gallery() as found:
        update = found.update(folder, FakeEmbed())
    assert update[:3] == (2, 0, 1)
    assert "closed: can't be listed (Permission denied)" in update.messages[0]


def test_decoding_is_a_bounded_number_of_files_ahead(tmp_path):
    """Never more than so many decoded or being decoded; never fewer while the caller works."""
    started, lock = [], threading.Lock()

    def read(path):
        with lock:
            started.append(path)
        if path == "5":
            raise UserError("damaged")
        return path

    paths = [str(n) for n in range(100)]
    for number, (path, image) in enumerate(read_ahead(iter(paths), read, 3, ahead=10)):
        assert path == paths[number]
        assert isinstance(image, UserError) if number == 5 else image == str(number)
        assert len(started) <= number + 11
        if number < 85:
            deadline = time.monotonic() + 5
            while len(started) < number + 11:
                assert time.monotonic() < deadline
    assert number == 99
    assert len(started) == 100


KILLED = """
import sys
sys.path[:0] = sys.argv[1:3]
from test_search import FakeEmbed, open_gallery
from reid import gallery
gallery.COMMIT = 0
with open_gallery(sys.argv[4]) as found:
    found.update(sys.argv[3], FakeEmbed(wait=0.05))
"""


@pytest.mark.slow
def test_kill_9_loses_only_the_batch_in_work(tmp_path):
    folder, index = crops(tmp_path / "crops", 200), tmp_path / "crops.index"
    words = [ROOT, ROOT / "tests", folder, index]
    process = subprocess.Popen([sys.executable, "-c", KILLED, *map(str, words)])

    def there():
        try:
            with sqlite3.connect(f"file:{index}?mode=ro", uri=True) as base:
                return base.execute("SELECT count(*) FROM features").fetchone()[0]
        except sqlite3.Error:
            return 0

    deadline = time.monotonic() + 60
    while there() < 20:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with open_gallery(index) as found:
        kept = len(found)
        assert 20 <= kept < 200
        embed = FakeEmbed()
        assert found.update(folder, embed).extracted == len(embed.read_paths) == 200 - kept
        assert len(found) == 200
        assert [p.path for p in found.search(unit_vectors(1), 3)[0]]


def test_a_temporary_gallery_is_on_disk_not_in_memory():
    """SQLite's "" is a file that it deletes by itself, ":memory:" is not."""
    with open_gallery() as found:
        assert found.base.execute("PRAGMA page_size").fetchone() == (gallery.PAGE,)
        size = found.base.execute("PRAGMA cache_size").fetchone()[0]
        assert 0 < -size * 1024 <= gallery.BLOCK
        assert found.base.execute("PRAGMA database_list").fetchone()[2] == ""


def test_an_index_of_another_network_or_of_something_else(tmp_path):
    index = tmp_path / "crops.index"
    open_gallery(index).base.close()
    open_gallery(index).base.close()  # the same: nothing to say
    others = {"layer": "bottleneck", "scales": [1.0, 0.9], "weights_sha256": "d"}
    for name, other in (others | {"size": "256x128 of 288x144"}).items():
        with pytest.raises(UserError, match=f"made with another {name}") as error:
            open_gallery(index, MADE_BY | {name: other})
        assert f", not {other});" in str(error.value)
    (tmp_path / "text").write_text("no database at all, but a long enough text" * 100)
    with pytest.raises(UserError, match=r"text: not an index of search.py; name another file"):
        open_gallery(tmp_path / "text")
    with sqlite3.connect(tmp_path / "other") as base:
        base.execute("CREATE TABLE songs (name TEXT)")
    with pytest.raises(UserError, match=r"other: not an index of search.py; name another file"):
        open_gallery(tmp_path / "other")
    with pytest.raises(UserError, match="none/i: unable to open database file"):
        open_gallery(tmp_path / "none" / "i")


def test_a_full_disk(tmp_path):
    with open_gallery(tmp_path / "i") as found:
        found.base.execute("PRAGMA max_page_count = 12")
        embed = FakeEmbed()
        embed.of_batch = lambda batch: np.zeros((len(batch), 50_000), np.float32)
        with pytest.raises(UserError, match=r"/i: database or disk is full"):
            found.update(crops(tmp_path / "crops", 10), embed)


def test_an_index_in_use(tmp_path, monkeypatch):
    monkeypatch.setattr(gallery, "WAIT", 0.1)
    with open_gallery(tmp_path / "i") as one, open_gallery(tmp_path / "i") as other:
        one.add((b"/a", 0, 0), np.zeros(DIM))
        with pytest.raises(UserError, match="database is locked; if another process"):
            other.update(crops(tmp_path / "crops", 3), FakeEmbed())


@pytest.mark.parametrize("commit", [0, 9])
def test_two_fill_one_index(commit, tmp_path, monkeypatch):
    """One adds a folder while the other waits for its network, both after and before a commit."""
    monkeypatch.setattr(gallery, "WAIT", 0.5)
    monkeypatch.setattr(gallery, "COMMIT", commit)
    with open_gallery(tmp_path / "i") as one, open_gallery(tmp_path / "i") as other:
        embed, added = FakeEmbed(), []

        def busy(batch, of_batch=embed.of_batch):
            folder = crops(tmp_path / f"other{len(added)}", 3, seed=90 + 9 * len(added))
            added.append(other.update(folder, FakeEmbed()).extracted)
            return of_batch(batch)

        embed.of_batch = busy
        assert one.update(crops(tmp_path / "one", 40), embed).extracted == 40
        assert added == [3] * 10
        assert len(one) == len(other) == 40 + 3 * 10


def test_an_index_that_can_only_be_read(tmp_path):
    filled(unit_vectors(5), tmp_path / "i").base.close()
    (tmp_path / "i").chmod(0o444)
    with open_gallery(tmp_path / "i") as found:
        assert numbers(found.search(unit_vectors(5)[2:3], 1)[0]) == [2]


# --- the script ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_search_as_a_process(flags, run, tmp_path):
    before = sorted((tmp_path / "crops").rglob("*"))
    code, out, err = run_script("search.py", *flags, "--json", "found.json", cwd=tmp_path)
    assert (code, err) == (0, "")
    assert sorted((tmp_path / "crops").rglob("*")) == before
    embed = Embedder(run, device="cpu", precision="fp32")
    files = [p for p in (tmp_path / "crops").rglob("*") if p.is_file()]
    features = embed([*files, tmp_path / "query.png"])
    ranked = sorted(zip(features[:-1] @ features[-1], files, strict=True), reverse=True)
    lines = out.splitlines()
    assert "crops: 6 images (6 extracted)" in lines
    start = lines.index("query.png")
    for rank, (similarity, path) in enumerate(ranked, start=1):
        words = lines[start + rank].split()
        assert (words[0], words[2]) == (str(rank), str(path.relative_to(tmp_path)))
        assert float(words[1]) == pytest.approx(similarity, abs=2e-4)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["threshold"] is None
    assert found["made_by"] == embed.made_by
    assert "search.py --query query.png" in found["command"]
    (query,) = found["queries"]
    assert query["query"] == "query.png"
    for rank, (place, (similarity, path)) in enumerate(zip(query["places"], ranked, strict=True)):
        assert place["path"] == str(path)
        assert place["similarity"] == pytest.approx(similarity, abs=1e-4)
        assert (place["rank"], place["same_person"], place["reranked_distance"]) == (
            rank + 1,
            None,
            None,
        )


def result(path="found.json"):
    return json.loads(Path(path).read_text())


def test_a_query_of_the_gallery_by_any_name(flags, tmp_path):
    (tmp_path / "way").symlink_to(tmp_path / "crops")
    for name in ("crops/0.png", tmp_path / "crops/../crops/0.png", "way/0.png"):
        call(search.main, *flags, "--query", name, "--json", "found.json")
        assert all(place["path"][-5:] != "0.png" for place in result()["queries"][0]["places"])
        assert len(result()["queries"][0]["places"]) == 5
    shutil.copy("crops/0.png", "copy.png")  # a copy is another file: found first
    call(search.main, *flags, "--query", "copy.png", "--json", "found.json")
    assert result()["queries"][0]["places"][0]["path"].endswith("0.png")


def test_an_earlier_searchs_picture_is_no_crop(flags, tmp_path, capsys):
    flags = [*flags, "--output", "crops/search.jpg"]
    for _ in range(2):
        call(search.main, *flags)
        assert "crops: 6 images (6 extracted)" in capsys.readouterr().out
    assert (tmp_path / "crops" / "search.jpg").exists()


@pytest.mark.slow
def test_index_then_search_without_a_folder(flags, run, tmp_path, capsys):
    index = ("--index", "crops.index", "--json", "found.json")
    call(search.main, *flags, *index)
    first, out = result()["queries"], capsys.readouterr().out
    assert "crops.index: 6 images (6 extracted)" in out
    call(search.main, *flags, *index)
    assert "crops.index: 6 images (0 extracted)" in capsys.readouterr().out
    assert result()["queries"] == first
    flags = ("--query", "query.png", *of_run(run), "--output", "found.jpg")
    call(search.main, *flags, *index)
    assert result()["queries"] == first
    people(tmp_path / "more")
    call(search.main, *flags, *index, "--gallery", "more", "--top", 12)
    assert len(result()["queries"][0]["places"]) == 12
    (tmp_path / "more" / "0.png").unlink()
    call(search.main, *flags, *index, "--top", 12)
    assert len(result()["queries"][0]["places"]) == 11
    shutil.rmtree(tmp_path / "more")
    call(search.main, *flags, *index, "--top", 12)
    assert result()["queries"] == first
    capsys.readouterr()
    for other in (("--which_layer", "bottleneck"), ("--ms", "1,0.9")):
        assert exit_code(search.main, *flags, *index, *other) == 2
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1
        assert "crops.index: made with another " in err


@pytest.mark.parametrize("more", [("--ms", "1,0.9"), ("--which_layer", "bottleneck")])
def test_layers_and_scales_reach_the_features(flags, run, more, tmp_path):
    call(search.main, *flags, *more, "--json", "found.json")
    kind = {"scales": (1, 0.9)} if more[0] == "--ms" else {"layer": "bottleneck"}
    embed = Embedder(run, device="cpu", precision="fp32", **kind)
    assert result()["made_by"] == embed.made_by
    first = result()["queries"][0]["places"][0]
    one, other = embed(["query.png", first["path"]])
    assert first["similarity"] == pytest.approx(float(one @ other), abs=1e-4)


def test_rerank(flags, run, capsys):
    call(search.main, *flags, "--rerank", "--json", "found.json", "--top", 3)
    places = result()["queries"][0]["places"]
    distances = [place["reranked_distance"] for place in places]
    assert len(places) == 3
    assert distances == sorted(distances)
    assert f"distance {distances[0]:.4f}" in capsys.readouterr().out
    # Of one candidate at first, but never fewer than --top.
    call(search.main, *flags, "--rerank", "--candidates", 1, "--json", "found.json", "--top", 3)
    assert len(result()["queries"][0]["places"]) == 3


def test_thresholds(flags, run, capsys, tmp_path):
    call(search.main, *flags, "--json", "found.json")
    scores = [place["similarity"] for place in result()["queries"][0]["places"]]
    middle = (scores[2] + scores[3]) / 2
    made_by = result()["made_by"]
    assert "same person" not in capsys.readouterr().out
    shutil.copytree(run, tmp_path / "runs" / "dense")
    flags = [*flags, "--model_dir", tmp_path / "runs", "--json", "found.json"]
    stored = {"threshold": middle, "false_match_rate": 0.00123, "made_by": made_by}
    stored |= {"queries": "query", "impostors": 1234}
    path = tmp_path / "runs" / "dense" / "threshold.json"

    def marked():
        out, err = capsys.readouterr()
        same = [place["same_person"] for place in result()["queries"][0]["places"]]
        lines = [line for line in out.splitlines() if "same person  " in line]
        assert len(lines) == same.count(True)
        return same, out, err

    path.write_text(json.dumps(stored))
    call(search.main, *flags)
    same, out, err = marked()
    assert same == [True] * 3 + [False] * 3
    pairs = "1,234 image pairs of different people"
    assert f"{middle:.4f} ({path}: 0.123 % of {pairs} reach it)" in out
    assert err == ""
    with Image.open("found.jpg") as picture:
        cell, y = pictures.WIDTH + 2 * pictures.FRAME + pictures.GAP, 88
        for place in range(1, 7):
            red, green, _ = picture.getpixel((2 * pictures.GAP + place * cell + 1, y))
            assert (green > red + 50) == same[place - 1]
    path.write_text(json.dumps(stored | {"queries": "val"}))
    call(search.main, *flags)
    assert f"{pairs} reach it, of people that the network" in marked()[1]
    call(search.main, *flags, "--threshold", scores[0] + 1e-3)
    same, out, err = marked()
    assert same == [False] * 6
    assert "(--threshold)" in out
    path.write_text(json.dumps(stored | {"made_by": made_by | {"layer": "bottleneck"}}))
    call(search.main, *flags)
    same, out, err = marked()
    assert same == [None] * 6
    assert len(err.splitlines()) == 1
    assert f"{path}: of other weights, another layer, size or scales" in err


def test_the_picture_keeps_the_shape_of_odd_crops(tmp_path):
    """Wide, narrow and tiny crops, in a cell's middle."""
    for width, height, shown in [(200, 50, (64, 16)), (2, 400, (1, 128)), (1, 1, (64, 64))]:
        cell = np.asarray(pictures.fitted(Image.new("RGB", (width, height), "red")), int)
        red = (cell[..., 0] - cell[..., 1]) > 200
        assert (red.any(0).sum(), red.any(1).sum()) == shown
        rows, columns = np.nonzero(red)
        assert rows.min() + rows.max() == pytest.approx(127, abs=1)
        assert columns.min() + columns.max() == pytest.approx(63, abs=1)
    path = tmp_path / "sheet.jpg"
    tile = pictures.Tile(pictures.fitted(Image.new("RGB", (9, 9))), "1", "#000000")
    pictures.draw_sheet([pictures.Row("name" * 100, [tile, tile])], path)
    with Image.open(path) as picture:
        assert picture.size == (2 * 78 + 18, 184)


@pytest.mark.slow
def test_names_of_every_kind(flags, tmp_path):
    """Undecodable, with line breaks, as long as may be; to a terminal of ASCII, too."""
    names = ["人物 ü.png", "x" * 251 + ".png", os.fsdecode(b"\xff\xfe.png"), "a\nb\x1b[1m.png"]
    (tmp_path / "odd").mkdir()
    for number, name in enumerate(names):
        save_image(tmp_path / "odd" / name, seed=number)
    (tmp_path / "odd" / os.fsdecode(b"\xfd.png")).write_bytes(b"damaged")
    words = [*flags, "--query", *(f"odd/{name}" for name in names), "--gallery", "odd"]
    words += ["--json", "found.json"]
    for encoding in ("utf-8", "ascii"):
        done = subprocess.run(
            [sys.executable, ROOT / "search.py", *map(str, words)],
            cwd=tmp_path,
            capture_output=True,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONIOENCODING": encoding},
        )
        assert done.returncode == 0, done.stderr
        out = done.stdout.decode(encoding)
        assert "odd/a\\nb\\x1b[1m.png" in out
        assert "odd/\\udcff\\udcfe.png" in out
        assert "odd/" + ("人物 ü.png" if encoding == "utf-8" else "\\u4eba\\u7269 \\xfc.png") in out
        assert b"skipped: " in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert len(result(tmp_path / "found.json")["queries"]) == 4
    assert (tmp_path / "found.jpg").stat().st_size


def test_a_damaged_image_of_the_gallery(flags, tmp_path, capsys):
    for number in range(5):
        (tmp_path / "crops" / f"damaged{number}.jpg").write_text("damaged")
    call(search.main, *flags)
    out, err = capsys.readouterr()
    assert "crops: 6 images (6 extracted, 5 skipped)" in out
    assert err.count("skipped: ") == 3
    assert err.endswith("and 2 more\n")


def test_bad_input(flags, run, tmp_path, capsys):
    """One line that names the file or flag; nothing left behind."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "hidden").mkdir()
    save_image(tmp_path / "hidden" / "._0.png")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "0.png").write_text("damaged")
    (tmp_path / "film.mp4").write_bytes(b"\0\0\0\x18ftypisom" + bytes(400))
    (tmp_path / "cut.png").write_bytes((tmp_path / "query.png").read_bytes()[:500])
    before = sorted(tmp_path.rglob("*"))
    query = ("--query", "query.png", *of_run(run))
    cases = [
        ((*flags, "--gallery", "none"), "none: no such folder; name one of images with --gallery"),
        ((*flags, "--gallery", "query.png"), "query.png: no such folder"),
        ((*flags, "--gallery", "empty"), "empty: no images in it"),
        ((*flags, "--gallery", "hidden", "--index", "i"), "hidden: no images in it"),
        ((*flags, "--gallery", "damaged"), "damaged: no image in it can be read"),
        ((*flags, "--name", "none"), "none: no such run"),
        ((*flags, "--which_epoch", "7"), "--which_epoch can be last"),
        ((*flags, "--query", "crops"), "crops: is a folder; name an image"),
        ((*flags, "--query", "film.mp4"), "film.mp4: can't be read as an image (it is a video)"),
        ((*flags, "--query", "query.png", "cut.png"), "cut.png: can't be read as an image"),
        ((*flags, "--query", "none.png"), "none.png: no such file"),
        ((*flags, "--output", "none/a.jpg"), "a.jpg: can't be written"),
        ((*flags, "--json", "crops"), "crops: is a folder; name a file"),
        ((*flags, "--index", "none/i"), "i: can't be written"),
        ((*flags, "--index", "query.png"), "query.png: not an index of search.py"),
        ((*flags, "--threshold", "1.5"), "1.5 is over 1"),
        ((*flags, "--top", "0"), "--top: 0 is under 1"),
        ((*query, "--index", "none"), "none: no such index; name a folder with --gallery"),
        (query, "--gallery or --index: name what to search"),
    ]
    for words, says in cases:
        assert exit_code(search.main, *words) == 2, says
        lines = [line for line in capsys.readouterr().err.splitlines() if line[:8] != "skipped:"]
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        assert says in lines[0]
        assert sorted(tmp_path.rglob("*")) == before, says


def test_several_gpus(flags, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert exit_code(search.main, *flags, "--gpu_ids", "0,1") == 2
    assert "searching uses one GPU; name one" in capsys.readouterr().err


def test_without_faiss(flags, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert exit_code(search.main, *flags) == 2
    assert capsys.readouterr().err == "error: searching: needs faiss-cpu; pip install faiss-cpu\n"


def test_an_image_whose_feature_is_no_number_is_named(tmp_path):
    folder = crops(tmp_path / "a", 3)

    class Overflows(FakeEmbed):
        def of_batch(self, batch):
            features = super().of_batch(batch)
            features[1] = np.inf
            return features

    with open_gallery(None) as found:
        extracted, _, left_out, lines = found.update(folder, Overflows())
        assert (extracted, left_out, len(found)) == (2, 1, 2)
    assert "its features are infinite or NaN" in lines[0]


def test_a_network_that_diverged(flags, run, tmp_path, capsys):
    net = ft_net_dense(3)
    net.model.features.norm5.bias.data.fill_(float("nan"))
    diverged = run_folder(tmp_path / "runs" / "diverged")
    Run(diverged).save_weights(net, "last")
    assert exit_code(search.main, *flags, *of_run(diverged)) == 2
    assert "its features are infinite or NaN; take a higher" in capsys.readouterr().err


@pytest.mark.slow
def test_a_bomb_as_a_process(flags, tmp_path):
    from test_pictures import bomb

    bomb(tmp_path / "bomb.png", 10_000)
    code, _, err = run_script("search.py", *flags, "--query", "bomb.png", cwd=tmp_path)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert f"has more than {Image.MAX_IMAGE_PIXELS:,} pixels" in err
    bomb(tmp_path / "crops" / "bomb.png", 10_000)
    code, out, err = run_script("search.py", *flags, cwd=tmp_path)
    assert code == 0
    assert "6 images (6 extracted, 1 skipped)" in out
    assert len(err.splitlines()) == 1


def test_many_queries_and_places(flags, monkeypatch, capsys):
    monkeypatch.setattr(search, "DRAWN_QUERIES", 2)
    monkeypatch.setattr(search, "DRAWN_HITS", 3)
    call(search.main, *flags, "--query", *["query.png"] * 3, "--batchsize", 2)
    assert "without the last 1 queries" in capsys.readouterr().out
    with Image.open("found.jpg") as picture:
        assert picture.size == (4 * 78 + 18, 2 * 178 + 6)


def test_suffixes_are_known_before_threads_read():
    """Pillow loads its plugins at the first unknown file: not safe from several threads at once."""
    assert images.readable_suffixes()
    assert Image._initialized >= 2
