"""Score the features that test.py extracted: Rank@1/5/10 and mAP, with error bars.

    python evaluate.py                                   # pytorch_result.mat in this folder
    python evaluate.py model/lsro/pytorch_result.mat --against model/baseline/pytorch_result.mat
    python evaluate.py --map 15                          # does the network group people or cameras?

Or find the threshold above which two images count as one person, for search.py:

    python test.py --name lsro --val --mat val.mat
    python evaluate.py val.mat --calibrate 0.001
"""

from reid import report, verification
from reid.errors import UserError, run
from reid.files import update_results
from reid.metrics import similarity_blocks
from reid.options import Parser, number, rate

MAT = "pytorch_result.mat"


def get_parser():
    parser = Parser("Score extracted features: Rank@1/5/10, mAP and mINP, with 95 %% intervals.")
    report.add_options(parser, MAT)
    parser.add_argument(
        "--map",
        type=number(int, least=2, most=20),
        metavar="N",
        help="draw a map (t-SNE) of the features of N identities, coloured by identity and marked "
        "by camera, *_map.jpg (default: none)",
    )
    parser.add_argument(
        "--calibrate",
        type=rate,
        metavar="RATE",
        help="instead of scoring, find the similarity that this fraction of image pairs of "
        "different people reaches, e.g. 0.001, and store it in the run folder (default: score; "
        "where such a threshold is stored, give the rates at it, too)",
    )
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    if args.calibrate:
        check_calibrate(args)
        verification.calibrate(args.mat, args.calibrate)
        return
    sets = report.load(args)
    if args.map:
        from reid import feature_map  # scikit-learn and matplotlib: seconds

        map_path = report.picture_path(args, "evaluate", "map")
        feature_map.check_map(sets, args.map)
    report.score(args, sets, "evaluate", similarity_blocks, {})
    if args.map:
        found = feature_map.map_features(sets, args.map, map_path)
        print(f"map: {map_path}: {feature_map.caption(found)}")
    rates = verification.rates_at_stored(args.mat, sets)
    if rates:
        print(verification.rates_line(rates))
        if args.json:
            update_results(args.json, "verification", {"mat": args.mat, **rates})


def check_calibrate(args):
    """Raise UserError where flags that go with scores are given with --calibrate, without any."""
    flags = "multi_query against json plot show show_names explain map output_dir data_dir"
    for name in flags.split():
        if getattr(args, name):
            raise UserError(f"--{name}: goes with scores, not with --calibrate; leave one out")


if __name__ == "__main__":
    run(main)
