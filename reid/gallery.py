"""Search a gallery of images: their features lie in an SQLite file, FAISS finds the nearest.

    with Gallery(embed.made_by, embed.dim, "people.index") as gallery:
        gallery.update("crops", embed)  # extracts what is new or changed
        for hits in gallery.search(embed(pictures), 10):  # one list for each picture
            print(hits[0].path, hits[0].similarity)

Features are written as they are extracted and read a block at a time, so memory is bounded whatever
the gallery's size; `load` reads all of them into memory, for many searches one after the other.
A Gallery belongs to the thread that made it; several, in threads or processes, may use one file.
FAISS: Douze et al., "The Faiss library", 2024; an optional dependency.
"""

import json
import os
import sqlite3
import sys
import time
from collections.abc import Iterable
from contextlib import closing, contextmanager
from itertools import tee
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from re_ranking import rerank
from reid.dataset import NO_IMAGE, NO_IMAGES, is_prepared, walk_images
from reid.errors import UserError, missing_package
from reid.features import ImageModel
from reid.files import parse_json

PAGE = 65536  # bytes, SQLite's largest: else a feature would lie scattered over several pages
BLOCK = 1 << 24  # bytes of features that are read at a time
COMMIT = 2  # seconds between commits: a kill loses no more work
WAIT = 60  # seconds to wait for another process that is writing
NAMED = 3  # number of skipped files whose message is kept
NO_INDEX = "not an index of search.py; name another file"

SCHEMA = (
    "CREATE TABLE gallery (made_by TEXT NOT NULL)",
    "CREATE TABLE images (id INTEGER PRIMARY KEY AUTOINCREMENT, path BLOB NOT NULL UNIQUE, "
    "size INTEGER NOT NULL, modified INTEGER NOT NULL)",
    "CREATE TABLE features (id INTEGER PRIMARY KEY, feature BLOB NOT NULL)",
    "CREATE TRIGGER forget AFTER DELETE ON images "
    "BEGIN DELETE FROM features WHERE id = old.id; END",
)
# The folders that were added, and whether a disk was mounted right there.
ROOTS = "CREATE TABLE IF NOT EXISTS roots (path BLOB PRIMARY KEY, mounted INTEGER NOT NULL)"
# Images that are left out of this process's searches.
AWAY = "CREATE TEMP TABLE away (id INTEGER PRIMARY KEY)"
NOT_AWAY = "id NOT IN (SELECT id FROM away)"
UNDER = "path >= ? AND path < ?"  # with the two values of `bounds`
# Images that are on disk now; in SQLite's temporary file, since there may be millions.
LISTED = "CREATE TEMP TABLE listed (path BLOB PRIMARY KEY, size INTEGER, modified INTEGER)"
SAME = "a.path = b.path AND a.size = b.size AND a.modified = b.modified"


class Hit(NamedTuple):
    """An image in a ranking. `path` is absolute; `distance` is the re-ranked one, or None."""

    id: int
    path: str
    similarity: float
    distance: float | None = None


class Update(NamedTuple):
    """The result of `Gallery.update`: numbers of images, messages of the first skipped files."""

    extracted: int
    dropped: int
    skipped: int
    messages: list


class Gallery:
    """Images that can be searched: their paths and features.

    made_by, dim: those of the Embedder (`reid.features`) that makes the features. path: the index
    file, made where there is none; None: a temporary one. Raises UserError where FAISS is missing,
    where the file is no index, or one of another network, layer or scales. Any method raises it
    where the file can't be read or written.
    """

    def __init__(self, made_by: dict, dim: int, path: str | Path | None = None):
        self.faiss = import_faiss()
        self.path, self.dim = path, dim
        self.loaded = None
        with self.errors():
            self.base = sqlite3.connect("" if path is None else os.fspath(path), timeout=WAIT)
            self.base.execute(f"PRAGMA page_size = {PAGE}")
            self.base.execute(f"PRAGMA cache_size = {-(BLOCK >> 10)}")
            self.open_tables(made_by)

    def open_tables(self, made_by):
        """Make the tables in a new file, or check that they were made for the same features."""
        if not self.tables():
            self.base.execute("BEGIN IMMEDIATE")  # one process makes the tables, all or none
            if not self.tables():
                for statement in SCHEMA:
                    self.base.execute(statement)
                self.base.execute("INSERT INTO gallery VALUES (?)", [json.dumps(made_by)])
            self.base.commit()
        row = None
        if {"gallery", "images", "features"} <= self.tables():
            row = self.base.execute("SELECT made_by FROM gallery").fetchone()
        if row is None:
            raise UserError(f"{self.path}: {NO_INDEX}")
        self.base.execute(AWAY)
        stored = parse_json(str(row[0]), self.path, NO_INDEX)
        for name in made_by:
            if stored.get(name) != made_by[name]:
                theirs, ours = (str(facts.get(name))[:24] for facts in (stored, made_by))
                raise UserError(
                    f"{self.path}: made with another {name} ({theirs}, not {ours}); search with "
                    "that, or name another --index"
                )

    def tables(self):
        """Return the names of the tables in the file."""
        return {name for (name,) in self.base.execute("SELECT name FROM sqlite_master")}

    @contextmanager
    def errors(self):
        """Raise SQLite's errors inside as UserErrors."""
        try:
            yield
        except sqlite3.Error as error:
            if "not a database" in str(error):
                raise UserError(f"{self.path}: {NO_INDEX}") from error
            raise UserError(
                f"{self.path}: {error}; if another process uses the index, wait for it, else name "
                "another --index"
                if self.path
                else f"temporary file of the features: {error}; set TMPDIR to a folder with room"
            ) from error

    @contextmanager
    def snapshot(self):
        """Read the state of one moment inside, whatever other processes do to the file."""
        with self.errors():
            self.base.execute("BEGIN")
            try:
                yield
            finally:
                self.base.rollback()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.base.close()

    def __len__(self):
        with self.errors():
            return self.count(NOT_AWAY)

    def count(self, condition, values=()):
        """Count the images that fulfil an SQL condition."""
        query = f"SELECT count(*) FROM images WHERE {condition}"
        return self.base.execute(query, values).fetchone()[0]

    def check_roots(self) -> list[str]:
        """Check that the folders added so far are there; return lines that say which are not.

        Images of a folder that is gone are dropped. Where its disk may only be away, they are left
        out of this object's searches.
        """
        lines = []
        with self.errors():
            for root, mounted in self.roots():
                if is_there(root):
                    continue
                name, under = os.fsdecode(root), bounds(root)
                number = self.count(UNDER, under)
                if seems_gone(root, mounted):
                    self.base.execute(f"DELETE FROM images WHERE {UNDER}", under)
                    self.base.execute("DELETE FROM roots WHERE path = ?", [root])
                    lines.append(f"{name}: gone, its {number:,} images dropped")
                else:
                    away = f"INSERT OR IGNORE INTO away SELECT id FROM images WHERE {UNDER}"
                    self.base.execute(away, under)
                    lines.append(f"{name}: not there now, its {number:,} images left out")
            self.base.commit()
        self.loaded = None
        return lines

    def roots(self):
        """List the folders that were added, as (path, whether a disk was mounted there)."""
        with self.errors():
            known = "roots" in self.tables()  # not in the indexes of older versions
            return self.base.execute("SELECT * FROM roots").fetchall() if known else []

    def is_current(self, hit: Hit) -> bool:
        """Tell whether an image's file is there, as it was when its feature was extracted."""
        with self.errors():
            row = self.base.execute(
                "SELECT path, size, modified FROM images WHERE id = ?", [hit.id]
            ).fetchone()
        return row is not None and unchanged(*row)

    def drop_missing(self) -> int:
        """Leave images whose files are gone or changed out of further searches; return how many.

        They are dropped for good where the folder that was added is there.
        """
        with self.errors():
            query = f"SELECT id, path, size, modified FROM images WHERE {NOT_AWAY}"
            missing = [row[:2] for row in self.base.execute(query) if not unchanged(*row[1:])]
            there = tuple(bounds(root)[0] for root, _ in self.roots() if is_there(root))
            away = [(image,) for image, _ in missing]
            gone = [(image,) for image, path in missing if path.startswith(there)]
            self.base.executemany("INSERT INTO away VALUES (?)", away)
            self.base.executemany("DELETE FROM images WHERE id = ?", gone)
            self.base.commit()
        if missing:
            self.loaded = None
        return len(missing)

    def update(
        self, folder: str | Path, embed: ImageModel, threads: int = 2, leave_out: Iterable[str] = ()
    ) -> Update:
        """Extract the images under a folder that are new or changed; drop those that are gone.

        folder: hidden files and folders in it are left out, links to folders not followed. embed:
        a `reid.features.Embedder`. threads: number of threads that decode files. leave_out: real
        paths of files that are no part of the gallery. Images of other folders stay as they are.
        Returns an `Update`. Raises UserError where there are no images: the disk may be away.
        """
        check_folder(folder)
        root, messages = os.path.realpath(folder), []
        with self.errors():
            row = os.fsencode(root), os.path.ismount(root)
            self.base.execute(ROOTS)
            self.base.execute("INSERT OR REPLACE INTO roots VALUES (?, ?)", row)
            self.base.commit()  # else others would wait while the folder is listed
            self.list_folder(root, messages, set(map(os.fsencode, leave_out)))
            dropped = self.forget(root)
            extracted = self.extract(embed, threads, messages)
        return Update(extracted, dropped, len(messages), messages[:NAMED])

    def list_folder(self, root, messages, leave_out):
        """Fill the table `listed` with the images under a folder."""
        images = (row for row in images_under(root, messages) if row[0] not in leave_out)
        self.base.execute("DROP TABLE IF EXISTS listed")
        self.base.execute(LISTED)
        self.base.executemany("INSERT INTO listed VALUES (?, ?, ?)", images)
        self.base.commit()

    def forget(self, root):
        """Delete the features of images under a folder that are gone or changed.

        Takes those that are unchanged out of `listed`. Returns how many are gone.
        """
        inside, under = UNDER, [*bounds(os.fsencode(root))]
        for part in self.passed_over(*under):
            inside, under = f"{inside} AND NOT ({UNDER})", [*under, *bounds(part)]
        inside += " AND NOT EXISTS (SELECT 1 FROM listed AS b WHERE"
        gone = self.base.execute(
            f"SELECT count(*) FROM images AS a WHERE {inside} a.path = b.path)", under
        ).fetchone()[0]
        self.base.execute(f"DELETE FROM images AS a WHERE {inside} {SAME})", under)
        self.base.execute(
            f"DELETE FROM listed AS a WHERE EXISTS (SELECT 1 FROM images AS b WHERE {SAME})"
        )
        self.base.commit()
        self.loaded = None
        return gone

    def passed_over(self, first, after):
        """List folders between two paths that were added themselves, of which `listed` has none.

        Such as prepared ones, which only a search of their own enters: their images stay.
        """
        found = f"SELECT 1 FROM listed WHERE {UNDER}"
        inside = [root for root in self.roots() if first <= root[0] < after]
        return [
            root
            for root, mounted in inside
            if not self.base.execute(found, bounds(root)).fetchone()
            and not seems_gone(root, mounted)
        ]

    def extract(self, embed, threads, messages):
        """Add the features of the images in `listed`. Returns how many were extracted."""
        total = self.base.execute("SELECT count(*) FROM listed").fetchone()[0]
        rows, again = tee(self.listed())
        features = embed.of_files((os.fsdecode(path) for path, _, _ in again), threads)
        extracted, found, written = 0, [], time.monotonic()
        with closing(features), tqdm(rows, "gallery", total, unit="image", disable=None) as bar:
            for row, (_, feature) in zip(bar, features, strict=True):
                if isinstance(feature, UserError):
                    messages.append(str(feature))
                else:
                    found.append((row, feature))
                    extracted += 1
                if time.monotonic() - written > COMMIT:
                    self.write(found)
                    written = time.monotonic()
        self.write(found)
        return extracted

    def listed(self):
        """Yield the rows of `listed`. Between them no query is open, which would lock the file."""
        path, query = b"", "SELECT * FROM listed WHERE path > ? ORDER BY path LIMIT 1000"
        while rows := self.base.execute(query, [path]).fetchall():
            yield from rows
            path = rows[-1][0]

    def write(self, found):
        """Add images and features, all at once: other processes wait no longer than for that."""
        for row, feature in found:
            self.add(row, feature)
        self.base.commit()
        found.clear()

    def add(self, row, feature):
        """Add an image, (path, size, modified), and its feature; an older one is replaced."""
        self.base.execute("DELETE FROM images WHERE path = ?", row[:1])
        image = self.base.execute(
            "INSERT INTO images (path, size, modified) VALUES (?, ?, ?)", row
        ).lastrowid
        feature = np.ascontiguousarray(feature, np.float32).tobytes()
        self.base.execute("INSERT INTO features VALUES (?, ?)", (image, feature))

    def load(self) -> None:
        """Read all features into memory, 4 * dim bytes an image, and keep them there."""
        self.loaded = None
        with self.snapshot():
            size = len(self)
            ids, features = np.empty(size, np.int64), np.empty((size, self.dim), np.float32)
            start = 0
            for some, part in self.blocks():
                end = start + len(some)
                ids[start:end], features[start:end] = some, part
                start = end
            self.loaded = ids, features

    def blocks(self):
        """Yield the gallery in parts: ids [n] and features float32 [n, D] of each."""
        if self.loaded:
            yield self.loaded
            return
        last, rows = -1, max(BLOCK // (4 * self.dim), 1)
        query = f"SELECT id, feature FROM features WHERE id > ? AND {NOT_AWAY} ORDER BY id LIMIT ?"
        while some := self.base.execute(query, (last, rows)).fetchall():
            ids = np.array([image for image, _ in some])
            features = np.frombuffer(b"".join([f for _, f in some]), np.float32)
            last = some[-1][0]
            del some  # else there would be two copies of the features while they are searched
            yield ids, features.reshape(-1, self.dim)

    def search(
        self, queries: np.ndarray, number: int, own: list[str] | None = None
    ) -> list[list[Hit]]:
        """Return the `number` most similar images of each query, most similar first: lists of Hit.

        queries: L2-normalised float32 [Q, D]. own: for each query the path of an image to leave out
        of its ranking, or None.
        """
        own = own or [None] * len(queries)
        with self.snapshot():
            count = min(number + 1, len(self.loaded[0]) if self.loaded else len(self))
            heap = self.faiss.ResultHeap(len(queries), count, keep_max=True)
            for ids, features in self.blocks():
                similarity, rows = self.faiss.knn(
                    queries, features, min(count, len(ids)), self.faiss.METRIC_INNER_PRODUCT
                )
                heap.add_result(similarity, ids[rows])
            heap.finalize()
            nearest = zip(heap.I.tolist(), heap.D.tolist(), strict=True)
            rankings = [list(map(self.hit, images, values)) for images, values in nearest]
        return [
            [hit for hit in ranking if hit and hit.path != path][:number]
            for ranking, path in zip(rankings, own, strict=True)
        ]

    def hit(self, image, similarity):
        """Return the Hit of an image; None where another process dropped it since `load`."""
        row = self.base.execute("SELECT path FROM images WHERE id = ?", [image]).fetchone()
        return row and Hit(image, os.fsdecode(row[0]), similarity)

    def rerank(self, query: np.ndarray, hits: list[Hit]) -> list[Hit]:
        """Return a query's hits, ordered by k-reciprocal re-ranking among them, with distances.

        query: its feature, float32 [D]. Hits that another process dropped are left out.
        """
        select = "SELECT feature FROM features WHERE id = ?"
        with self.snapshot():
            rows = [self.base.execute(select, [hit.id]).fetchone() for hit in hits]
        hits = [hit for hit, row in zip(hits, rows, strict=True) if row]
        if not hits:
            return []
        features = np.frombuffer(b"".join(row[0] for row in rows if row), np.float32)
        distance = next(rerank(query[None], features.reshape(-1, self.dim)))[0]
        order = np.argsort(distance, kind="stable")
        return [hits[n]._replace(distance=float(distance[n])) for n in order]


def import_faiss() -> ModuleType:
    """Return the module. Raises UserError where it is not installed."""
    # On macOS it and PyTorch each bring an OpenMP, and the second would end the process.
    os.environ.setdefault("KMP_DUPLICATE_LIB_OK", "TRUE")
    try:
        import faiss
    except ImportError as error:
        raise missing_package("searching", "faiss-cpu") from error
    if sys.platform == "darwin":
        faiss.omp_set_num_threads(1)
    return faiss


def check_folder(folder: str | Path) -> None:
    """Raise UserError unless there are images under a folder."""
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder; name one of images with --gallery")
    if next(images_under(folder, []), None) is None:
        raise UserError(f"{folder}: {NO_IMAGES}")


def images_under(root, messages):
    """Yield path, size in bytes and time of change in ns of each image under a folder.

    Adds a message to `messages` for what can't be read; says nothing of files that are no images.
    """
    left_out = []
    for path in walk_images(root, left_out, skip=is_prepared):
        try:
            status = os.stat(path)
        except OSError as error:  # gone by now
            messages.append(f"{path}: can't be read ({error.strerror})")
            continue
        yield os.fsencode(path), status.st_size, status.st_mtime_ns
    messages += [message for message in left_out if not message.endswith(NO_IMAGE)]


def unchanged(path, size, modified):
    """Tell whether a file still has this size in bytes and time of change in ns."""
    try:
        status = os.stat(path)
    except OSError:
        return False
    return (status.st_size, status.st_mtime_ns) == (size, modified)


def bounds(root):
    """Return the lowest path under a folder and the lowest above all of them, as bytes."""
    first = os.path.join(root, b"")
    return first, first[:-1] + bytes([first[-1] + 1])


def is_there(root):
    """Tell whether a folder is there and not empty: an empty one may wait for its disk."""
    try:
        with os.scandir(root) as entries:
            return any(entries)
    except OSError:
        return False


def seems_gone(root, mounted):
    """Tell whether a folder was deleted or renamed: its disk is there, as its parent shows."""
    return not mounted and not os.path.lexists(root) and is_there(os.path.dirname(root))
