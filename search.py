"""Search a folder of crops, of any sizes and names, for the people on other crops.

    python search.py --query a.jpg b.jpg --gallery crops --name ft_ResNet50
    python search.py --query a.jpg --gallery crops --name ft_ResNet50 --index crops.index

Prints each query's ranking and draws its first places. With --index features are kept, so that the
next search extracts only images that are new or changed. A query that lies in the gallery is left
out of its own ranking. From where on two images count as one person, `evaluate.py --calibrate`
finds out, and this script marks.
"""

import argparse
import os
import sys
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from reid.device import choose_device, set_up
from reid.errors import UserError, printable, run
from reid.features import Embedder
from reid.files import check_writable, write_json
from reid.gallery import Gallery, check_folder, import_faiss
from reid.images import read_image
from reid.options import (
    Parser,
    add_device_options,
    add_feature_options,
    add_run_options,
    at_least,
)
from reid.provenance import provenance
from reid.rankings import GOOD, HEIGHT, PLAIN, WIDTH, Cell, Row, draw_sheet, fitted
from reid.verification import FILE, KNOWN_PEOPLE, stored_threshold

MODEL_DIR = "model"
NAME = "ft_ResNet50"
OUTPUT = "search.jpg"

OTHER = "#999999"  # the frame of an image under the threshold
DRAWN_QUERIES, DRAWN_PLACES = 100, 20  # a JPEG has no room for more than some hundred rows


def get_parser():
    parser = Parser("Search a folder of crops for the people on other crops.")
    add_run_options(parser, NAME, MODEL_DIR)
    parser.add_argument(
        "--query", nargs="+", required=True, metavar="IMAGE", help="crops of who is searched for"
    )
    parser.add_argument(
        "--gallery",
        metavar="FOLDER",
        help="folder of crops to search, with all folders in it but hidden, linked, prepared ones "
        "(default: what --index holds)",
    )
    parser.add_argument(
        "--index",
        metavar="FILE",
        help="file that keeps the features, of this gallery and of those searched before with it; "
        "all are searched (default: a temporary one)",
    )
    parser.add_argument("--top", type=at_least(1), default=10, help="places to print")
    parser.add_argument(
        "--rerank", action="store_true", help="order by k-reciprocal re-ranking (Zhong et al. 2017)"
    )
    parser.add_argument(
        "--candidates",
        type=at_least(1),
        default=1000,
        help="of the most similar images, how many --rerank looks at",
    )
    parser.add_argument(
        "--threshold",
        type=cosine,
        metavar="SIMILARITY",
        help="from where on to mark an image as the same person (default: what evaluate.py "
        "--calibrate stored in the run folder, if it did)",
    )
    parser.add_argument("--output", default=OUTPUT, help="picture to draw, a JPEG")
    parser.add_argument(
        "--json", metavar="FILE", help="also write the rankings to this file (default: no file)"
    )
    parser.add_argument("--batchsize", type=at_least(1), default=64, help="images in a batch")
    add_feature_options(parser)
    add_device_options(parser)
    return parser


def cosine(text):
    """An argument type: a number from -1 to 1."""
    value = float(text)
    if not -1 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between -1 and 1")
    return value


def main(argv=None):
    args = get_parser().parse_args(argv)
    device = check(args)
    # What Pillow says about odd files helps nobody; the ones that it can't read are named below.
    warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
    folder = Path(args.model_dir) / args.name
    embed = Embedder(
        folder,
        args.which_epoch,
        device,
        args.precision,
        args.which_layer,
        args.ms,
        args.batchsize,
    )
    set_up(embed.device)
    print(f"{embed.weights}: features of {embed.dim} numbers, on {embed.device}")
    threshold, origin = find_threshold(args, folder, embed)
    queries = query_features(args.query, embed)
    with Gallery(embed.made_by, embed.dim, args.index) as gallery:
        if args.gallery:
            # The picture of an earlier search may lie among the crops.
            update = gallery.update(
                args.gallery, embed, args.workers, leave_out=[stored_path(args.output)]
            )
            say_update(update, gallery, args)
        for line in gallery.check_roots():
            print(printable(line), file=sys.stderr)
        if not len(gallery):
            raise UserError(f"{args.gallery or args.index}: no image in it can be read")
        rankings = search(gallery, queries, args)
    for query, places in zip(args.query, rankings, strict=True):
        print_ranking(query, places, threshold)
    if threshold is not None:
        print(f"threshold of the same person: {threshold:.4f} ({origin})")
    draw(args.query, rankings, threshold, args.output)
    if args.json:
        found = {"threshold": threshold, "queries": as_dicts(args.query, rankings, threshold)}
        write_json(args.json, found | {"made_by": embed.made_by} | provenance())


def check(args):
    """Raise UserError for what can't work, before anything takes time. Returns the device."""
    import_faiss()
    device, several = choose_device(args.gpu_ids)
    if several:
        raise UserError(f"--gpu_ids {args.gpu_ids}: searching uses one GPU; name one")
    for path in [args.output, args.json]:
        if path:
            check_writable(path)
    if args.index and not os.path.exists(args.index):
        if not args.gallery:
            raise UserError(f"{args.index}: no such index; name a folder with --gallery to make it")
        check_writable(args.index)
    if args.gallery:
        check_folder(args.gallery)
    elif not args.index:
        raise UserError("--gallery or --index: name what to search")
    return device


def find_threshold(args, folder, embed):
    """The similarity from which on two images count as one person, and its origin; or two None."""
    if args.threshold is not None:
        return args.threshold, "--threshold"
    stored = stored_threshold(folder)
    if stored is None:
        return None, None
    if stored["made_by"] != embed.made_by:
        print(
            f"{folder / FILE}: of other weights, another layer or other scales, so not used; "
            "calibrate again, or pass --threshold",
            file=sys.stderr,
        )
        return None, None
    rate = 100 * stored["false_match_rate"]
    pairs = f"{stored['impostors']:,} pairs of two people"
    origin = f"{folder / FILE}: {rate:.3g} % of {pairs} reach it"
    origin += f", {KNOWN_PEOPLE}" if stored.get("queries") == "val" else ""
    return stored["threshold"], origin


def query_features(paths, embed):
    """Features [Q, D] of the queries. Raises UserError where they are of no use."""
    parts = [
        embed.of_prepared([embed.read(path) for path in paths[n : n + embed.batchsize]])
        for n in range(0, len(paths), embed.batchsize)
    ]
    features = np.concatenate(parts)
    if not np.isfinite(features).all():
        raise UserError(f"{embed.weights}: makes features that are no numbers; take another epoch")
    return features


def say_update(update, gallery, args):
    """Print what became of the gallery."""
    done = [f"{update.extracted:,} extracted"]
    done += [f"{update.dropped:,} gone, dropped"] if update.dropped else []
    done += [f"{update.skipped:,} skipped"] if update.skipped else []
    print(f"{args.index or args.gallery}: {len(gallery):,} images ({', '.join(done)})")
    for message in update.messages:
        print(f"skipped: {printable(message)}", file=sys.stderr)
    if update.skipped > len(update.messages):
        print(f"and {update.skipped - len(update.messages):,} more", file=sys.stderr)


def search(gallery, queries, args):
    """The `Place`s of each query."""
    number = max(args.top, args.candidates) if args.rerank else args.top
    own = [stored_path(path) for path in args.query]
    found = gallery.search(queries, number, own)
    if not all(gallery.is_current(place) for places in found for place in places):
        number_gone = gallery.drop_missing()
        print(f"{number_gone:,} images are gone or changed, and left out", file=sys.stderr)
        found = gallery.search(queries, number, own)
    if args.rerank:
        found = [gallery.rerank(q, places) for q, places in zip(queries, found, strict=True)]
    return [places[: args.top] for places in found]


def stored_path(path):
    """The name under which a gallery would hold this file."""
    folder, name = os.path.split(os.path.abspath(path))
    return os.path.join(os.path.realpath(folder), name)


def is_same(place, threshold):
    """Whether the image counts as of the same person; None without a threshold."""
    return None if threshold is None else place.similarity >= threshold


def print_ranking(query, places, threshold):
    """A line for the query, then rank, similarity and path of each place."""
    print(printable(query))
    for rank, place in enumerate(places, start=1):
        columns = [f"{rank:4}", f"{place.similarity:7.4f}"]
        if place.distance is not None:
            columns.append(f"distance {place.distance:.4f}")
        if threshold is not None:
            columns.append("same person" if is_same(place, threshold) else " " * 11)
        print("  ".join([*columns, printable(shown(place.path))]))


def shown(path):
    """An absolute path as seen from the current folder, where it lies under it."""
    here = os.path.join(os.getcwd(), "")
    return path.removeprefix(here)


def draw(queries, rankings, threshold, path):
    """Draw the first rankings; say so where there are more."""
    rows = [
        Row(printable(os.path.basename(query)), picture(query), cells(places, threshold))
        for query, places in zip(queries[:DRAWN_QUERIES], rankings, strict=False)
    ]
    draw_sheet(rows, path)
    left = len(queries) - DRAWN_QUERIES
    print(f"{path}: first places" + (f", without the last {left} queries" if left > 0 else ""))


def cells(places, threshold):
    """The `Cell`s of a ranking's first places."""
    colours = {None: PLAIN, True: GOOD, False: OTHER}
    return [
        Cell(picture(p.path), f"{rank}   {p.similarity:.3f}", colours[is_same(p, threshold)])
        for rank, p in enumerate(places[:DRAWN_PLACES], start=1)
    ]


def picture(path):
    """An image in a cell's size; a white one where it is gone since its feature was extracted."""
    try:
        return fitted(read_image(path))
    except UserError:
        return Image.new("RGB", (WIDTH, HEIGHT), "white")


def as_dicts(queries, rankings, threshold):
    """Rankings for a JSON file."""
    return [
        {
            "query": query,
            "places": [
                {
                    "rank": rank,
                    "path": place.path,
                    "similarity": place.similarity,
                    "reranked_distance": place.distance,
                    "same_person": is_same(place, threshold),
                }
                for rank, place in enumerate(places, start=1)
            ],
        }
        for query, places in zip(queries, rankings, strict=True)
    ]


if __name__ == "__main__":
    run(main)
