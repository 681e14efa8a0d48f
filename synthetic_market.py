"""Render a stand-in for Market-1501: same folders, same file names, 64x128 JPEGs, made-up people.

    python synthetic_market.py --output_dir data/synthetic_market --scale demo --seed 0
    python synthetic_market.py --output_dir data/winter --look winter

Market-1501 may not be redistributed, so this draws a set of its shape for trying out the pipeline
and comparing methods. `reid/rendering/people.py` makes the people, `scenes.py` the pictures;
`looks.py` says how people dress and which cameras see them. This script decides who passes which
camera, and writes the files. A seed gives the same files byte for byte, whatever the number of
workers. Scores on the set tell which method is better on it, not how good a method is on
photographs.
"""

import functools
import itertools
import math
import multiprocessing
import os
import signal
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from reid.dataset import STAND_IN
from reid.errors import UserError, run
from reid.files import encoded, new_folder, read_json, write_json
from reid.options import Parser, at_least, processors, seed
from reid.rendering.looks import LOOKS
from reid.rendering.people import (
    COLOURS,
    PASSERS_BY,
    SCHEDULE,
    SHOT,
    TRACKLET,
    make_gait,
    make_person,
    pick,
    pose_body,
    stream,
)
from reid.rendering.scenes import (
    HEIGHT,
    SCENE_H,
    SCENE_W,
    WIDTH,
    crop_scene,
    develop,
    draw_body,
    draw_obstacle,
    draw_shadow,
    make_scene,
    over,
    project,
)

OUTPUT_DIR = "data/synthetic_market"
SCALE = "demo"
LOOK = "summer"
SEED = 0
WORKERS = min(processors(), 61)  # Windows allows no more

VERSION = 1  # raise it when the pictures change, so that an old set isn't taken for a new one
FOLDERS = ("bounding_box_train", "bounding_box_test", "query", "gt_bbox")
MAX_ID = 1501  # Market's; training and test ids are drawn from 1..MAX_ID


@dataclass(frozen=True)
class Scale:
    """The size of a set; `gallery_images` counts distractors and junk as well."""

    train_ids: int
    train_images: int
    test_ids: int
    queries: int
    gallery_images: int
    distractors: int
    junk: int


SCALES = {
    "demo": Scale(100, 1400, 50, 230, 1000, 150, 100),
    "market1501": Scale(751, 12936, 750, 3368, 19732, 2798, 3819),
}


def get_parser():
    parser = Parser("Render a stand-in for Market-1501.")
    parser.add_argument("--output_dir", default=OUTPUT_DIR, help="folder to make")
    parser.add_argument(
        "--scale",
        default=SCALE,
        choices=SCALES,
        help="number of pictures: a few thousand, or as many as Market-1501",
    )
    parser.add_argument(
        "--look",
        default=LOOK,
        choices=LOOKS,
        help="clothes, light, cameras and backgrounds: sets of two looks differ as two datasets do",
    )
    parser.add_argument("--seed", type=seed, default=SEED, help="each seed draws other people")
    parser.add_argument(
        "--workers", type=at_least(0), default=WORKERS, help="processes that draw; 0: only this one"
    )
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    folder = Path(args.output_dir)
    about = {"version": VERSION, "scale": args.scale, "seed": args.seed, "look": args.look}
    if already_there(folder, about):
        print(f"{folder}: already there ({args.scale}, {args.look}, seed {args.seed})")
        return
    with new_folder(folder) as partial:
        counts = render(partial, SCALES[args.scale], args.seed, args.workers, args.look)
        write_json(partial / STAND_IN, about | {"counts": counts})
    print(f"{folder}: " + ", ".join(f"{name} {count}" for name, count in counts.items()))


def already_there(folder, about):
    """Tell whether `folder` holds this very set; raise UserError where it holds anything else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    files = {name: len(list((folder / name).glob("*.jpg"))) for name in FOLDERS}
    try:
        stored = read_json(folder / STAND_IN, "")
    except UserError:
        stored = {}
    stored = {"look": "summer"} | stored  # older sets don't say
    if not (about | {"counts": files}).items() <= stored.items():
        raise UserError(f"--output_dir {folder}: holds something else; delete it or name another")
    return True


@dataclass(frozen=True)
class Shot:
    """One picture of a tracklet: its frame, its kind of box, and its files."""

    frame: int
    box: str  # hand (tight and centred), detector (neither), junk (misses the person)
    paths: tuple  # relative to the dataset's folder


@dataclass(frozen=True)
class Tracklet:
    """A person, by the number of a random stream, who passes a camera, counted from 0."""

    person: int
    camera: int
    shots: tuple


def apportion(total, weights, least, most):
    """Split `total` into whole numbers about proportional to `weights` [n], within bounds: int [n].

    Raises ValueError where the bounds don't allow it.
    """
    if not least * len(weights) <= total <= most * len(weights):
        raise ValueError(f"{total} can't be split into {len(weights)} parts of {least}..{most}")
    low, high = 0.0, most / weights.min()  # scale the weights until the clipped parts add up
    for _ in range(100):
        middle = (low + high) / 2
        parts = np.clip(weights * middle, least, most)
        low, high = (middle, high) if parts.sum() < total else (low, middle)
    whole = np.floor(parts + 1e-6).astype(int)
    rest = total - whole.sum()
    whole[np.argsort(whole - parts, kind="stable")[:rest]] += 1
    return whole


def schedule(scale, seed, look=LOOK):
    """Decide on every picture without drawing one: a list of `Tracklet`."""
    rng = stream(seed, SCHEDULE)
    popularity = np.array([camera.popularity for camera in LOOKS[look].cameras], float)
    popularity /= popularity.sum()
    used, tracklets = set(), []

    def file_names(label, camera, count):
        """Draw `count` file names of a sequence, in order of time, the box's number left open."""
        while True:
            start, sequence = rng.integers(1, 120000), rng.integers(1, 7)
            frames = start + np.cumsum(rng.integers(3, 50, count))
            names = [f"{label}_c{camera + 1}s{sequence}_{f:06d}_{{:02d}}.jpg" for f in frames]
            if used.isdisjoint(names):
                used.update(names)
                return names

    def detected(folder, name):
        """Draw the number of a detector's box and return the path of its file."""
        return f"{folder}/{name.format(rng.integers(1, 7))}"

    def tracklets_of(ids, pairs, images, spare):
        """Draw `pairs` tracklets, yielding (id, camera, file names).

        There are `images` names in all, and `spare` more in each tracklet.
        """
        counts = apportion(pairs, rng.uniform(0.5, 1.5, len(ids)), 2, len(popularity))
        cameras = [
            sorted(rng.choice(len(popularity), n, replace=False, p=popularity)) for n in counts
        ]
        visits = [(int(i), int(c)) for i, cs in zip(ids, cameras, strict=True) for c in cs]
        weights = rng.lognormal(0, 0.7, pairs) * popularity[[c for _, c in visits]]
        for (i, c), length in zip(visits, apportion(images, weights, 1, 60), strict=True):
            yield i, c, file_names(f"{i:04d}", c, length + spare)

    ids = rng.choice(np.arange(1, MAX_ID + 1), scale.train_ids + scale.test_ids, replace=False)
    train_ids, test_ids = np.sort(ids[: scale.train_ids]), np.sort(ids[scale.train_ids :])
    pairs = min(round(scale.train_ids * 4.5), scale.train_images)
    for person, camera, names in tracklets_of(train_ids, pairs, scale.train_images, 0):
        paths = [(detected("bounding_box_train", name),) for name in names]
        shots = tuple(Shot(frame, "detector", path) for frame, path in enumerate(paths))
        tracklets.append(Tracklet(person, camera, shots))

    seen = scale.gallery_images - scale.distractors - scale.junk
    for person, camera, names in tracklets_of(test_ids, scale.queries, seen, 1):
        shots, query = [], rng.integers(len(names))
        for frame, name in enumerate(names):  # the query is one of the hand-drawn boxes
            hand = name.format(0)
            folders = ("gt_bbox", "query") if frame == query else ("gt_bbox",)
            shots.append(Shot(frame, "hand", tuple(f"{folder}/{hand}" for folder in folders)))
            if frame != query:
                shots.append(Shot(frame, "detector", (detected("bounding_box_test", name),)))
        tracklets.append(Tracklet(person, camera, tuple(shots)))

    for label, box, total in (("0000", "detector", scale.distractors), ("-1", "junk", scale.junk)):
        while total:
            camera = int(rng.choice(len(popularity), p=popularity))
            names = file_names(label, camera, min(total, int(rng.integers(1, 5))))
            paths = [(detected("bounding_box_test", name),) for name in names]
            shots = tuple(Shot(frame, box, path) for frame, path in enumerate(paths))
            # such a person appears in no other tracklet
            tracklets.append(Tracklet(MAX_ID + 1 + len(tracklets), camera, shots))
            total -= len(names)
    return tracklets


# fmt: off
# (right, down, zoom) of a bad box, in body heights: halves, legs, head, mostly background
JUNK = (
    (0, 0.5, 1), (0, -0.5, 1), (0.36, 0, 1), (-0.36, 0, 1), (0.9, 0, 1), (0, 0.25, 0.5),
    (0, -0.25, 0.5), (0.1, 0, 2.2),
)
# fmt: on


def choose_box(points, camera, kind, habit, rng):
    """Choose the box around a body: (left, top, width, height) in picture metres.

    habit: (right, down, zoom), the detector's usual error in this tracklet.
    """
    x, y, _ = project(points[::5], camera)
    left, right, top, bottom = x.min(), x.max(), y.min(), y.max()
    dx, dy, zoom = 0.0, 0.0, rng.uniform(1.03, 1.1)
    if kind != "hand":
        dx, dy, zoom = rng.normal((habit[0], habit[1], habit[2] * 1.08), (0.025, 0.02, 0.03))
    if kind == "junk":
        dx, dy, zoom = np.array(JUNK[rng.integers(len(JUNK))]) * rng.uniform(0.9, 1.1, 3)
    high = (bottom - top) * zoom
    wide = high * rng.normal(0.5, 0.02)
    if kind == "hand":
        wide = max(wide, (right - left) * 0.85)
    dx, dy = dx * (bottom - top), dy * (bottom - top)
    return (left + right - wide) / 2 + dx, (top + bottom - high) / 2 + dy, wide, high


def render_tracklet(tracklet, seed, look=LOOK):
    """Draw the shots of a tracklet, yielding (shot, image)."""
    camera, wardrobe = LOOKS[look].cameras[tracklet.camera], LOOKS[look].wardrobe
    person = make_person(seed, tracklet.person, wardrobe)
    key = (tracklet.person, tracklet.camera)
    rng = stream(seed, TRACKLET, *key)
    gait = make_gait(rng, camera, person.who)
    scene, base = make_scene(seed, tracklet.camera, camera)
    spot = rng.uniform((60, max(base + 20, 120)), (SCENE_W - 60, SCENE_H - 12))
    zoom = rng.uniform(55, 75)
    pace = math.sin(gait.yaw) * gait.stride * 6
    mood = np.float32(rng.uniform(0.8, 1.15) * rng.uniform(0.95, 1.05, 3))  # weather
    habit = rng.normal((0, 0, 1.03), (0.04, 0.03, 0.06))
    if rng.random() < 0.1:  # a tracklet whose boxes cut off head or feet
        habit += (0, rng.choice([-0.2, 0.2]), -0.15)
    neighbour = None
    if rng.random() < 0.2:
        neighbour = make_person(seed, -1 - int(rng.integers(PASSERS_BY)), wardrobe)
        his_gait = make_gait(rng, camera, neighbour.who)
        away = rng.choice([-1, 1], 3) * rng.uniform((0.4, 0, 0.5), (0.75, 0, 1.2))
    obstacle = pick(rng, {"none": 8, "bicycle": 1, "pole": 0.8})
    obstacle_x = int(rng.choice([rng.uniform(4, 24), rng.uniform(40, 60)]))
    paint = COLOURS[pick(rng, wardrobe.bag)]

    for shot in tracklet.shots:
        kind = ("hand", "detector", "junk").index(shot.box)
        rng = stream(seed, SHOT, *key, shot.frame, kind)
        points, normals = pose_body(person, gait, shot.frame)
        box = choose_box(points, camera, shot.box, habit, rng)
        x, y, _ = project(np.zeros((1, 3)), camera)
        here = (spot[0] + pace * shot.frame, spot[1])
        picture = crop_scene(scene, here, zoom, box, (x[0], y[0]))
        picture = picture * (1 - 0.45 * draw_shadow(points, camera, box))
        bodies = [(0.0, points, normals, person.colours)]
        if neighbour:
            points, normals = pose_body(neighbour, his_gait, shot.frame)
            shift = np.float32(away)
            bodies.append((away[2], points + shift, normals, neighbour.colours))
        for _, *body in sorted(bodies, key=lambda body: body[0]):
            picture = over(picture, draw_body(*body, camera, box))
        if obstacle != "none":
            picture = over(picture, draw_obstacle(obstacle, paint, obstacle_x))
        yield shot, develop(picture, camera, mood, rng)


def save_tracklets(seed, look, folder, tracklets):
    """Render and write some tracklets of one person; return the number of files."""
    files, parent = 0, multiprocessing.parent_process()
    for tracklet in tracklets:
        if parent and not parent.is_alive():  # killed; the next run may write the same files
            os._exit(1)
        for shot, picture in render_tracklet(tracklet, seed, look):
            for path in shot.paths:
                save_jpeg(Path(folder, path), picture, LOOKS[look].cameras[tracklet.camera].quality)
                files += 1
    return files


def save_jpeg(path, picture, quality):
    """Write a Pillow image as a JPEG."""
    path.write_bytes(encoded(lambda file: picture.save(file, "JPEG", quality=quality)))


def render(folder, scale, seed, workers, look=LOOK):
    """Render a set of the size `scale` into an empty folder; return {subfolder: files}."""
    tracklets = schedule(scale, seed, look)
    for name in FOLDERS:
        Path(folder, name).mkdir()
    counts = Counter(path.split("/")[0] for t in tracklets for s in t.shots for path in s.paths)
    save = functools.partial(save_tracklets, seed, look, str(folder))
    tasks = [tuple(group) for _, group in itertools.groupby(tracklets, lambda t: t.person)]
    with tqdm(total=counts.total(), unit="img", desc="rendering", disable=None) as bar:
        if workers == 0:
            for task in tasks:
                bar.update(save(task))
        else:
            for files in by_processes(save, tasks, workers):
                bar.update(files)
    save_jpeg(Path(folder, "contact_sheet.jpg"), contact_sheet(tracklets, folder, look), 92)
    return dict(sorted(counts.items()))


def by_processes(function, tasks, workers):
    """Yield `function(task)` of each task, as they are done, by worker processes."""
    # spawn is the same on every system, and workers start with one thread each
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the workers inherit it
    try:
        jobs = [pool.submit(function, task) for task in tasks]
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        for job in as_completed(jobs):
            yield job.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a process that renders has ended; is the memory full? lower --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def contact_sheet(tracklets, folder, look=LOOK, rows=8):
    """Draw queries of the people whom most cameras saw: a row per identity, a column per camera."""
    seen = defaultdict(dict)
    for tracklet in tracklets:
        for path in itertools.chain.from_iterable(shot.paths for shot in tracklet.shots):
            if path.startswith("query/"):
                seen[tracklet.person][tracklet.camera] = Path(folder, path)
    people = sorted(sorted(seen, key=lambda i: -len(seen[i]))[:rows])
    wide, high, left, top = WIDTH * 3 // 2, HEIGHT * 3 // 2, 46, 26
    columns, lines = (range(start, start + n * (size + 6), size + 6) for start, n, size in (
        (left, len(LOOKS[look].cameras), wide), (top, len(people), high)))  # fmt: skip
    sheet = Image.new("RGB", (columns.stop, lines.stop), (250, 250, 248))
    draw, ink, font = ImageDraw.Draw(sheet), (70, 70, 74), ImageFont.load_default(13)
    for camera, x in enumerate(columns):
        draw.text((x + wide / 2, top / 2), f"camera {camera + 1}", ink, font, "mm")
    for person, y in zip(people, lines, strict=True):
        draw.text((left / 2, y + high / 2), f"{person:04d}", ink, font, "mm")
        for camera, path in seen[person].items():
            with Image.open(path) as picture:
                big = picture.resize((wide, high), Image.Resampling.LANCZOS)
            sheet.paste(big, (columns[camera], y))
    return sheet


if __name__ == "__main__":
    run(main)
