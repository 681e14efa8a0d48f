"""Search a folder of crops, of any sizes and names, for the people on other crops.

    python search.py --query a.jpg b.jpg --gallery crops --name ft_ResNet50
    python search.py --query a.jpg --gallery crops --name ft_ResNet50 --index crops.index
    python search.py --query a.jpg --gallery crops --name ft_ResNet50 --explain

Prints each query's ranking and draws its first images. With --index the features are kept, so that
the next search extracts only new and changed images. A query that lies in the gallery is left out
of its own ranking. `evaluate.py --calibrate` finds the threshold above which two images count as
one person; this script marks the images that reach it. --explain draws heat maps of what makes an
image like the query; their cells add up to the similarity (`reid.explain`).
"""

import os
import warnings
from argparse import Namespace
from pathlib import Path

import torch
from tqdm import tqdm

from reid.checkpoint import load_asked
from reid.device import choose_device, set_up
from reid.errors import UserError, printable, run, say
from reid.features import Embedder
from reid.files import check_writable, write_json
from reid.gallery import Gallery, check_folder, import_faiss
from reid.options import (
    Parser,
    add_device_options,
    add_feature_options,
    add_run_options,
    at_least,
    cosine,
)
from reid.pictures import (
    GOOD,
    PLAIN,
    Row,
    Tile,
    centred,
    draw_sheet,
    heat_rows,
    largest,
    picture_of,
)
from reid.provenance import provenance
from reid.verification import FILE, KNOWN_PEOPLE, stored_threshold

MODEL_DIR = "model"
NAME = "ft_ResNet50"
OUTPUT = "search.jpg"

OTHER = "#999999"  # the frame of an image under the threshold
DRAWN_QUERIES, DRAWN_HITS = 100, 20  # a JPEG has no room for more than some hundred rows


def get_parser():
    parser = Parser("Search a folder of crops for the people on other crops.")
    add_run_options(parser, NAME, MODEL_DIR)
    parser.add_argument(
        "--query",
        nargs="+",
        required=True,
        metavar="IMAGE",
        help="crops of the people to search for",
    )
    parser.add_argument(
        "--gallery",
        metavar="FOLDER",
        help="folder of crops to search, with its sub-folders, except hidden and linked ones and "
        "those that prepare.py made (default: the crops that --index holds)",
    )
    parser.add_argument(
        "--index",
        metavar="FILE",
        help="file that keeps the features of this gallery and of earlier ones; all of them are "
        "searched (default: a temporary file)",
    )
    parser.add_argument("--top", type=at_least(1), default=10, help="images to print per query")
    parser.add_argument(
        "--rerank", action="store_true", help="order by k-reciprocal re-ranking (Zhong et al. 2017)"
    )
    parser.add_argument(
        "--candidates",
        type=at_least(1),
        default=1000,
        help="how many of the most similar images --rerank re-orders",
    )
    parser.add_argument(
        "--threshold",
        type=cosine,
        metavar="SIMILARITY",
        help="similarity from which on an image is marked as the same person (default: the "
        "threshold that evaluate.py --calibrate stored in the run folder, if any)",
    )
    parser.add_argument(
        "--explain",
        action="store_true",
        help="draw below each ranking what in the query and in each image makes them alike",
    )
    parser.add_argument("--output", default=OUTPUT, help="picture to draw, a JPEG")
    parser.add_argument(
        "--json", metavar="FILE", help="also write the rankings to this file (default: no file)"
    )
    parser.add_argument("--batchsize", type=at_least(1), default=64, help="images in a batch")
    add_feature_options(parser)
    add_device_options(parser, torchrun=False)
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    device = check(args)
    folder = Path(args.model_dir) / args.name
    embed = load_embedder(args, device)
    threshold, origin = find_threshold(args, folder, embed)
    queries = embed(args.query)
    if args.explain:  # better now than after the search
        embed.explain(args.query[0], args.query[0])
    with Gallery(embed.made_by, embed.dim, args.index) as gallery:
        bring_up_to_date(gallery, embed, args, args.output)
        rankings = rank_gallery(gallery, queries, args)
    for query, hits in zip(args.query, rankings, strict=True):
        print_ranking(query, hits, threshold)
    if threshold is not None:
        print(f"threshold of the same person: {threshold:.4f} ({origin})")
    explanations = explain(embed, args.query, rankings) if args.explain else None
    draw(args.query, rankings, threshold, explanations, args.output)
    if args.json:
        content = {"threshold": threshold, "queries": as_dicts(args.query, rankings, threshold)}
        write_json(args.json, content | {"made_by": embed.made_by} | provenance())


def check(args):
    """Raise UserError for options that can't work, before anything slow. Returns the device."""
    device = check_searched(args)
    for path in [args.output, args.json]:
        if path:
            check_writable(path)
    return device


def check_searched(args: Namespace) -> torch.device:
    """Raise UserError unless --gallery and --index can be searched. Returns the device."""
    import_faiss()
    device, several = choose_device(args.gpu_ids)
    if several:
        raise UserError(f"--gpu_ids {args.gpu_ids}: searching uses one GPU; name one")
    if args.index and not os.path.exists(args.index):
        if not args.gallery:
            raise UserError(f"{args.index}: no such index; name a folder with --gallery to make it")
        check_writable(args.index)
    if args.gallery:
        check_folder(args.gallery)
    elif not args.index:
        raise UserError("--gallery or --index: name what to search")
    return device


def load_embedder(args: Namespace, device: torch.device) -> Embedder:
    """Return the `Embedder` that the options name, on the device, and say what it is."""
    # Pillow's warnings about odd files help nobody; files that it can't read are named.
    warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
    set_up(device)
    embed = Embedder(
        load_asked(args),
        device=device,
        precision=args.precision,
        scales=args.ms,
        batchsize=args.batchsize,
    )
    print(f"{embed.weights}: features of {embed.dim} numbers, on {embed.device}")
    return embed


def find_threshold(args, folder, embed):
    """Return the threshold above which two images count as one person, and its origin, if any."""
    if args.threshold is not None:
        return args.threshold, "--threshold"
    stored = usable_threshold(args, folder, embed)
    if stored is None:
        return None, None
    rate = 100 * stored["false_match_rate"]
    pairs = f"{stored['impostors']:,} image pairs of different people"
    origin = f"{folder / FILE}: {rate:.3g} % of {pairs} reach it"
    origin += f", {KNOWN_PEOPLE}" if stored.get("queries") == "val" else ""
    return stored["threshold"], origin


def usable_threshold(args, folder, embed):
    """Return what is stored in the run folder of the threshold; None unless it is of this network.

    Says so where it is of another.
    """
    stored = None if args.weights else stored_threshold(folder)
    if stored is None or stored["made_by"] == embed.made_by:
        return stored
    say(
        f"{folder / FILE}: of other weights, another layer, size or scales, so not used; "
        "calibrate again"
    )
    return None


def bring_up_to_date(gallery, embed, args, picture=OUTPUT):
    """Add the images in --gallery to the index, and check what is in it; says what was done.

    picture: that of an earlier search, which may lie among the crops.
    Raises UserError where there is no image.
    """
    if args.gallery:
        pictures = [stored_path(picture)]
        update = gallery.update(args.gallery, embed, args.workers, leave_out=pictures)
        say_update(update, gallery, args)
    for line in gallery.check_roots():
        say(printable(line))
    if not len(gallery):
        raise UserError(f"{args.gallery or args.index}: no image in it can be read")


def say_update(update, gallery, args):
    """Print how many images were extracted, dropped and skipped."""
    done = [f"{update.extracted:,} extracted"]
    done += [f"{update.dropped:,} gone, dropped"] if update.dropped else []
    done += [f"{update.skipped:,} skipped"] if update.skipped else []
    print(f"{args.index or args.gallery}: {len(gallery):,} images ({', '.join(done)})")
    for message in update.messages:
        say(f"skipped: {printable(message)}")
    if update.skipped > len(update.messages):
        say(f"and {update.skipped - len(update.messages):,} more")


def rank_gallery(gallery, queries, args):
    """Search the gallery for each query; return a list of `Hit`s for each."""
    number = max(args.top, args.candidates) if args.rerank else args.top
    own = [stored_path(path) for path in args.query]
    rankings = gallery.search(queries, number, own)
    if not all(gallery.is_current(hit) for hits in rankings for hit in hits):
        number_gone = gallery.drop_missing()
        say(f"{number_gone:,} images are gone or changed, and left out")
        rankings = gallery.search(queries, number, own)
    if args.rerank:
        rankings = [gallery.rerank(q, hits) for q, hits in zip(queries, rankings, strict=True)]
    return [hits[: args.top] for hits in rankings]


def stored_path(path):
    """Return the path under which a gallery would hold this file."""
    folder, name = os.path.split(os.path.abspath(path))
    return os.path.join(os.path.realpath(folder), name)


def is_same(hit, threshold):
    """Tell whether an image counts as the same person; None without a threshold."""
    return None if threshold is None else hit.similarity >= threshold


def print_ranking(query, hits, threshold):
    """Print a line for the query, then rank, similarity and path of each hit."""
    print(printable(query))
    for rank, hit in enumerate(hits, start=1):
        columns = [f"{rank:4}", f"{hit.similarity:7.4f}"]
        if hit.distance is not None:
            columns.append(f"distance {hit.distance:.4f}")
        if threshold is not None:
            columns.append("same person" if is_same(hit, threshold) else " " * 11)
        print("  ".join([*columns, printable(shown(hit.path))]))


def shown(path):
    """Shorten an absolute path that lies under the current folder."""
    return path.removeprefix(os.path.join(os.getcwd(), ""))


def explain(embed, queries, rankings):
    """Return the `Explanation`s that are drawn: for each query, of its first hits."""
    pairs = list(zip(queries[:DRAWN_QUERIES], rankings, strict=False))
    return [
        [explanation(embed, query, hit.path) for hit in hits[:DRAWN_HITS]]
        for query, hits in tqdm(pairs, "explaining", disable=None, leave=False)
    ]


def explanation(embed, query, path):
    """Return the `Explanation` of a query and an image; None where its file is gone by now."""
    return embed.explain(query, path) if os.path.exists(path) else None


def draw(queries, rankings, threshold, explanations, path):
    """Draw the rankings of the first queries into a JPEG; say so where there are more."""
    rows, scale = [], largest(explanations or [])
    for number, query in enumerate(queries[:DRAWN_QUERIES]):
        hits = rankings[number][:DRAWN_HITS]
        pictures = [picture_of(path) for path in (query, *(hit.path for hit in hits))]
        rows.append(Row(printable(os.path.basename(query)), tiles(pictures, hits, threshold)))
        if explanations:
            rows += heat_rows(pictures, explanations[number], scale)
    draw_sheet(rows, path)
    left = len(queries) - DRAWN_QUERIES
    print(f"rankings: {path}" + (f", without the last {left} queries" if left > 0 else ""))


def tiles(pictures, hits, threshold):
    """Return the `Tile`s of a query and of its hits, whose pictures follow the query's."""
    colours = {None: PLAIN, True: GOOD, False: OTHER}
    framed = [Tile(centred(pictures[0]), "", PLAIN)]
    for rank, (image, hit) in enumerate(zip(pictures[1:], hits, strict=True), start=1):
        colour = colours[is_same(hit, threshold)]
        framed.append(Tile(centred(image), f"{rank}   {hit.similarity:.3f}", colour))
    return framed


def as_dicts(queries, rankings, threshold):
    """Return the rankings as the JSON file holds them."""
    return [
        {
            "query": query,
            "places": [
                {
                    "rank": rank,
                    "path": hit.path,
                    "similarity": hit.similarity,
                    "reranked_distance": hit.distance,
                    "same_person": is_same(hit, threshold),
                }
                for rank, hit in enumerate(hits, start=1)
            ],
        }
        for query, hits in zip(queries, rankings, strict=True)
    ]


if __name__ == "__main__":
    run(main)
