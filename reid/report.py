"""Print, store, draw and compare scores, as the flags of evaluate.py and evaluate_rerank.py ask."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from reid import metrics
from reid.dataset import too_many_cameras
from reid.errors import UserError, printable, say
from reid.files import check_results, check_writable, update_results
from reid.intervals import FEW, Interval, interval, mean_intervals, p_value
from reid.mat import UNIT, EvalSets, load_mat, load_multi
from reid.options import SCORES, Parser, add_results_option, at_least
from reid.pictures import draw_rankings
from reid.provenance import provenance
from reid.verification import run_weights

RANKS = (1, 5, 10)
SAME = 3 * UNIT  # how far from 1 the similarity of one picture with itself may be
CURVE = 50  # ranks in the CMC curve
TOP = 10  # images of a ranking in its picture
LARGEST_SHOW = 300  # queries in a picture: a JPEG is 65,500 pixels high at most


def percent(value):
    return f"{100 * value:.2f} %"


def add_options(parser: Parser, mat: str) -> None:
    """Add the flags of both scripts. mat: default of the .mat file."""
    parser.add_argument("mat", nargs="?", default=mat, help="the file that test.py wrote")
    parser.add_argument(
        "--multi_query",
        metavar="FILE",
        help="file with features of multi-query images: mquery_f, mquery_label, mquery_cam "
        "(default: those in the .mat file itself, if it has any)",
    )
    parser.add_argument(
        "--against",
        metavar="FILE",
        help="another model's features of the same images: prints how far the scores differ, with "
        "intervals over other people and p-values (default: no comparison)",
    )
    group = parser.add_argument_group("output")
    add_results_option(group)
    group.add_argument(
        "--plot", action="store_true", help="draw the CMC curve with its band, *_cmc.jpg"
    )
    group.add_argument(
        "--show",
        type=at_least(1),
        metavar="N",
        help="draw the 10 most similar images of N queries, *_rankings.jpg (default: 0)",
    )
    group.add_argument(
        "--show_which",
        choices=["worst", "best"],
        default="worst",
        help="which queries --show draws, by average precision",
    )
    group.add_argument(
        "--show_names",
        nargs="+",
        metavar="NAME",
        help="draw these queries, by the names of their image files (default: --show's)",
    )
    group.add_argument(
        "--explain",
        action="store_true",
        help="draw below each shown ranking what in the query and in each image makes them alike, "
        "by the network that made the features; with re-ranking, too, of their cosine",
    )
    group.add_argument(
        "--output_dir", help="existing folder for the pictures (default: that of the .mat file)"
    )
    group.add_argument(
        "--data_dir", help="the `pytorch` folder of the images to draw (default: the .mat file's)"
    )


def load(args: Namespace) -> EvalSets:
    """Load args.mat, with --data_dir and --multi_query in place of its own.

    Raises UserError for wrong files.
    """
    sets = load_mat(args.mat)
    # Another code's file may name images, but no folder: then they are seen from here.
    sets = sets._replace(data_dir=Path(args.data_dir or sets.data_dir or ""))
    if args.multi_query:
        sets = sets._replace(multi=load_multi(args.multi_query, sets.gallery))
    return sets


def score(args: Namespace, sets: EvalSets, section: str, rank: Callable, settings: dict) -> None:
    """Score features; print, store and draw the scores as the flags ask.

    rank: function of query and gallery FeatureSets that yields blocks of similarities, see
    `metrics.evaluate`. section: name of the section in results.json; settings: options to store
    with it. Raises UserError for wrong files and flags.
    """
    other = other_sets(args, sets) if args.against else None
    curve_path, rankings_path = outputs(args, section)
    named = queries_to_show(args, sets) if rankings_path else None
    embed = explainer(args, sets) if args.explain else None

    def measure(query, gallery, top=0):
        return metrics.evaluate(rank(query, gallery), query, gallery, top)

    scores = measure(sets.query, sets.gallery, TOP if rankings_path else 0)
    interval_pair = score_intervals(scores, sets.query.identities)
    print("\n".join(lines(scores, sets, interval_pair)))
    warn_of_doubts(sets)
    results = summary(scores, sets.query.identities, interval_pair)
    curves = [(printable(args.mat), scores)]
    if sets.multi is not None:
        query = averaged_queries(sets)
        multi = measure(query, sets.gallery)
        interval_pair = score_intervals(multi, query.identities)
        print(f"multi-query {headline(multi)}")
        print(f"  {intervals_line(interval_pair, query.identities)}")
        results["multi_query"] = summary(multi, query.identities, interval_pair)
    if other is not None:
        other_scores = measure(other.query, other.gallery)
        print(f"against {args.against}: {headline(other_scores)}")
        results["against"] = {"mat": args.against}
        results["against"] |= compare(scores, other_scores, sets.query.identities)
        curves.append((printable(args.against), other_scores))
    chosen = chosen_queries(args, named, scores, sets) if rankings_path else None
    if args.json:
        images = (sets.source or {}).get("images")
        source = {"mat": args.mat, "made_by": sets.made_by, "images": images, **settings}
        source |= provenance()
        update_results(args.json, section, results | source)
    if curve_path:
        from reid.curves import draw_cmc  # matplotlib: half a second that others needn't wait

        draw_cmc([(name, *curve(s, sets.query)) for name, s in curves], curve_path)
        print(f"CMC curve: {curve_path}")
    if rankings_path:
        explanations = explain(embed, chosen, scores, sets) if embed else None
        draw_rankings(chosen, scores, sets, rankings_path, explanations)
        print(f"rankings: {rankings_path}")


def outputs(args, section):
    """Return the paths of the CMC curve and of the rankings, None where not asked for.

    Raises UserError where these or the --json file can't be written.
    """
    check_results(args.json)
    asked = {"cmc": args.plot, "rankings": args.show or args.show_names}
    return [picture_path(args, section, name) if asked[name] else None for name in asked]


def picture_path(args: Namespace, section: str, name: str) -> Path:
    """Return the path of a picture by its name, in --output_dir or beside the .mat file.

    Raises UserError where it can't be written.
    """
    stem = Path(args.mat).stem + ("" if section == "evaluate" else "_rerank")
    path = Path(args.output_dir or Path(args.mat).parent) / f"{stem}_{name}.jpg"
    try:
        check_writable(path)
    except UserError as error:
        raise UserError(f"{error} with --output_dir") from error
    return path


def queries_to_show(args, sets):
    """Return the indices of the queries that --show_names names; None without this flag.

    Raises UserError where pictures can't be drawn.
    """
    flag = "--show_names" if args.show_names else "--show"
    if sets.query.files is None or sets.gallery.files is None:
        raise UserError(f"{flag}: {args.mat} doesn't name its images; write it with our test.py")
    room = LARGEST_SHOW // (3 if args.explain else 1)  # its heat maps are two rows more
    if len(args.show_names or []) > room or (args.show or 0) > room:
        raise UserError(f"{flag}: a picture has room for {room} queries")
    image = sets.data_dir / sets.query.files[0]
    if not image.is_file():
        raise UserError(f"{image}: no such image; name the `pytorch` folder with --data_dir")
    if not args.show_names:
        return None
    index = {Path(file).name: i for i, file in enumerate(sets.query.files)}
    for name in args.show_names:
        if Path(name).name not in index:
            raise UserError(
                f"--show_names {name}: no such query; its name is like {sets.query.files[0]}"
            )
    return [index[Path(name).name] for name in args.show_names]


def explainer(args, sets):
    """Return the `Embedder` of the network that made the features of EvalSets.

    Raises UserError where it is not to be had.
    """
    from reid.features import Embedder  # and with it PyTorch, which others needn't wait for

    if not (args.show or args.show_names):
        raise UserError("--explain: goes with pictures; add --show or --show_names")
    weights = run_weights(args.mat, sets.source)
    scales = tuple(sets.source.get("scales", [1.0]))
    if len(scales) > 1:
        raise UserError(f"--explain: {args.mat} was made with --ms of {len(scales)} scales")
    embed = Embedder(
        weights.parent,
        weights.stem.removeprefix("net_"),
        layer=sets.source.get("layer"),
        test_size=sets.source.get("size"),
        scales=scales,
    )
    image = sets.data_dir / sets.query.files[0]
    embed.explain(image, image)  # better now than after the scores
    return embed


def explain(embed, queries, scores, sets):
    """Return the `Explanation`s of each query (an index) with its `scores.top`: a list of lists."""
    return [
        [
            embed.explain(
                sets.data_dir / sets.query.files[query], sets.data_dir / sets.gallery.files[image]
            )
            for image in scores.top[query]
        ]
        for query in tqdm(queries, "explaining", disable=None, leave=False)
    ]


def headline(scores):
    """Return the line that the original prints."""
    ranks = " ".join(f"top{k}:{scores.rank(k):.6f}" for k in RANKS)
    return f"{ranks} mAP:{scores.mean_ap():.6f}"


def lines(scores, sets, interval_pair):
    """Yield the original's line, then lines that explain it; interval_pair: of Rank@1, mAP."""
    queries, valid = len(scores.ap), int(scores.valid.sum())
    yield headline(scores)
    yield f"  {intervals_line(interval_pair, sets.query.identities)}"
    yield (
        f"  mAP by trapezoids, as Market-1501's own; standard {percent(scores.mean_ap(True))}; "
        f"mINP {percent(scores.mean_inp())}"
    )
    if not valid:
        yield f"  no query can be answered: {why_none(sets)}"
    gallery = len(sets.gallery.identities)
    yield (
        f"  single-query: {queries} queries, {queries - valid} without a good image (counted as 0)"
        f"; of {gallery} gallery images {scores.junk:.1f} junk a query, removed: its identity in "
        "its camera, and identity -1"
    )
    if valid < queries:
        yield (
            f"  the {valid} valid queries alone: "
            f"Rank@1 {percent(scores.rank(1, valid_only=True))}, "
            f"mAP {percent(scores.mean_ap(valid_only=True))}, "
            f"standard {percent(scores.mean_ap(standard=True, valid_only=True))}, "
            f"mINP {percent(scores.mean_inp(valid_only=True))}"
        )


def why_none(sets):
    """Explain why no query of EvalSets has a good image."""
    cameras = np.union1d(sets.query.cameras, sets.gallery.cameras)
    if not np.isin(sets.query.identities, sets.gallery.identities).any():
        return "no identity of theirs is in the gallery"
    if len(cameras) == 1:
        return (
            f"all images are of camera {cameras[0]}, and those of a query's own camera are junk; "
            "prepare.py has --no_camera for photos without cameras"
        )
    return "all gallery images of their identities are from their own camera, so they are junk"


def warn_of_doubts(sets):
    """Warn on standard error of what makes the scores of EvalSets doubtful."""
    cameras = np.concatenate([sets.query.cameras, sets.gallery.cameras])
    number = len(np.unique(cameras))
    if too_many_cameras(number, len(cameras)):
        say(
            f"warning: {number} cameras in {len(cameras)} images: are these numbers of frames? "
            "Then nothing is junk, and the scores are too good"
        )
    first = sets.query.features[0]
    if all((one.features @ first).min() > 1 - SAME for one in (sets.query, sets.gallery)):
        say(
            "warning: all images have the same features: the network has collapsed; train it again "
            "with a lower --lr"
        )
    elif same := copies(sets.query, sets.gallery):
        say(
            f"warning: {same} queries have a good image with the very same features: is "
            "it the same picture, in query and in gallery? Then the scores are too good"
        )


def copies(query, gallery):
    """Count the queries that have a good image with their own features."""
    relevance = metrics.Relevance(gallery)
    number = 0
    for row in range(len(query.features)):
        good, _ = relevance.of(query.identities[row], query.cameras[row])
        similarities = gallery.features[good] @ query.features[row]
        number += bool(len(good)) and bool(similarities.max() > 1 - SAME)
    return number


def intervals_line(interval_pair, identities):
    rank1, mean_ap = interval_pair
    number = len(np.unique(identities))
    few = ", few: they are too narrow" if 1 < number < FEW else ""
    return (
        f"Rank@1 {rank1}, mAP {mean_ap}: 95 % intervals over other people "
        f"({number} identities resampled{few})"
    )


def score_intervals(scores: metrics.Scores, identities: np.ndarray) -> list[Interval]:
    """Return the Intervals of Rank@1 and mAP, over other people."""
    return mean_intervals(rank1_and_ap(scores), identities)


def score_differences(
    scores: metrics.Scores, other: metrics.Scores, identities: np.ndarray
) -> list[Interval]:
    """Return the Intervals of the differences in Rank@1 and mAP, to `other` on the same queries."""
    differences = rank1_and_ap(scores) - rank1_and_ap(other)
    return mean_intervals(differences, identities, fractions=False)


def rank1_and_ap(scores):
    """Return whether a query's first image is good, and its AP: float64 [Nq, 2]."""
    return np.column_stack([scores.hits(1), scores.ap])


def summary(scores: metrics.Scores, identities: np.ndarray, interval_pair: list[Interval]) -> dict:
    """Return the scores and the Intervals of Rank@1 and mAP as a dict for results.json."""
    rank1, mean_ap = interval_pair
    return {f"rank{k}": scores.rank(k) for k in RANKS} | {
        "mAP": scores.mean_ap(),
        "rank1_interval": rank1.ends(),
        "mAP_interval": mean_ap.ends(),
        "mAP_standard": scores.mean_ap(standard=True),
        "mINP": scores.mean_inp(),
        "rank1_valid": scores.rank(1, valid_only=True),
        "mAP_valid": scores.mean_ap(valid_only=True),
        "mAP_standard_valid": scores.mean_ap(standard=True, valid_only=True),
        "mINP_valid": scores.mean_inp(valid_only=True),
        "queries": len(scores.ap),
        "valid_queries": int(scores.valid.sum()),
        "identities": len(np.unique(identities)),
    }


def curve(scores, query):
    """Return the CMC curve and its band: arrays [CURVE] of value, low, high."""
    hits = np.column_stack([scores.hits(k) for k in range(1, CURVE + 1)])
    return hits.mean(axis=0), *interval(hits, query.identities)


def other_sets(args, sets):
    """Load the EvalSets of --against. Raises UserError unless they are of the same images."""
    other = load_mat(args.against)
    for name in ("query", "gallery"):
        a, b = getattr(sets, name), getattr(other, name)
        counts = len(a.cameras), len(b.cameras)
        if counts[0] != counts[1]:
            raise UserError(
                f"--against {args.against}: {counts[1]} {name} images, but {counts[0]} in "
                f"{args.mat}; compare features of the same test images"
            )
        differ = (a.identities != b.identities) | (a.cameras != b.cameras)
        if a.files is not None and b.files is not None:
            differ |= a.files != b.files
        if differ.any():
            raise UserError(
                f"--against {args.against}: {name} image {int(differ.argmax())} (counted from 0) "
                f"is not the one in {args.mat}; compare features of the same images in order"
            )
    return other


def compare(scores, other, identities):
    """Print the differences of two models' scores on the same queries; return them as a dict."""
    differences = score_differences(scores, other, identities)
    p_values = p_value(rank1_and_ap(scores) - rank1_and_ap(other), identities)
    result = {}
    for (key, name), one, p in zip(SCORES.items(), differences, p_values, strict=True):
        band = f" ({100 * one.low:+.2f} to {100 * one.high:+.2f})" if one.known else ""
        print(f"  {name} differs by {100 * one.value:+.2f} points{band}, p = {p:.4f}")
        result[f"{key}_difference"] = one.value
        result[f"{key}_interval"] = one.ends()
        result[f"{key}_p"] = float(p)
    print("  (over other people to test on; other training seeds are not in it)")
    return result


def averaged_queries(sets):
    """Return the queries, each with the mean feature of its identity's multi-query images.

    Only images of the query's camera count. A query without any keeps its own feature; the number
    of such queries is printed.
    """
    query, multi = sets.query, sets.multi
    keys = np.stack([multi.identities, multi.cameras], axis=1)
    groups, group = np.unique(keys, axis=0, return_inverse=True)
    sums = np.zeros((len(groups), multi.features.shape[1]), np.float32)
    np.add.at(sums, group.reshape(-1), multi.features)
    index = {tuple(key): i for i, key in enumerate(groups.tolist())}
    wanted = zip(query.identities.tolist(), query.cameras.tolist(), strict=True)
    rows = np.array([index.get(key, -1) for key in wanted])
    features = np.where((rows >= 0)[:, None], sums[rows], query.features)
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    alone = int((rows < 0).sum())
    if alone:
        print(f"multi-query: {alone} queries have no image in it and keep their own feature")
    return query._replace(features=features / np.maximum(lengths, 1e-12))


def chosen_queries(args, named, scores, sets):
    """Return the indices of the queries to draw. Raises UserError where an image is missing.

    named: those of --show_names, or None.
    """
    chosen = by_score(scores, args.show, args.show_which) if named is None else named
    for query in chosen:
        files = [sets.query.files[query], *sets.gallery.files[scores.top[query]]]
        for path in (sets.data_dir / file for file in files):
            if not path.is_file():
                raise UserError(f"{path}: no such image; name the `pytorch` folder with --data_dir")
    return chosen


def by_score(scores, count, which):
    """Return the `count` queries with the lowest or highest AP, of those that have a good image."""
    valid = np.flatnonzero(scores.valid)
    if len(valid) == 0:
        raise UserError("--show: no query has a good image; name some with --show_names")
    order = np.argsort(scores.ap[valid], kind="stable")
    return valid[order if which == "worst" else order[::-1]][:count]
