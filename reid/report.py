"""How scores are said: the printed lines, and the entry in a results.json."""

from reid.checkpoint import provenance, update_results

RANKS = (1, 5, 10)


def add_options(parser, mat):
    """What evaluate.py and evaluate_rerank.py take alike."""
    parser.add_argument("mat", nargs="?", default=mat, help="the file that test.py wrote")
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="also write the scores here, as a section of the file (model/<name>/results.json)",
    )


def show(scores, gallery_size):
    """Print the original's one line, then what its numbers mean."""
    ranks = " ".join(f"top{k}:{scores.rank(k):.6f}" for k in RANKS)
    print(f"{ranks} mAP:{scores.mean_ap():.6f}")
    valid = int(scores.valid.sum())
    print(
        f"{len(scores.ap)} queries, {len(scores.ap) - valid} of them without a good image "
        f"(counted as 0 above); {gallery_size} gallery images, on average {scores.junk:.1f} "
        "junk for a query (removed)"
    )
    ranks = " ".join(f"top{k}:{scores.rank(k, valid_only=True):.6f}" for k in RANKS)
    print(f"over the {valid} valid queries: {ranks} mAP:{scores.mean_ap(valid_only=True):.6f}")
    print(
        f"mAP above by trapezoids (Market-1501's code); standard AP: {scores.mean_ap(True):.6f} "
        f"over all, {scores.mean_ap(True, valid_only=True):.6f} over valid queries"
    )


def save(scores, path, section, settings):
    """Set `section` of the JSON file `path` (None: nothing to do) to scores and their source."""
    if path is None:
        return
    values = {f"rank{k}": scores.rank(k) for k in RANKS}
    values |= {
        "mAP": scores.mean_ap(),
        "mAP_standard": scores.mean_ap(standard=True),
        "mAP_valid": scores.mean_ap(valid_only=True),
        "mAP_standard_valid": scores.mean_ap(standard=True, valid_only=True),
        "queries": len(scores.ap),
        "valid_queries": int(scores.valid.sum()),
    }
    update_results(path, section, values | settings | provenance())
