"""Score the features that test.py extracted, after k-reciprocal re-ranking (Zhong et al. 2017).

python evaluate_rerank.py                            # pytorch_result.mat in this folder
python evaluate_rerank.py model/ft_ResNet50/pytorch_result.mat --k1 20 --k2 6
"""

import time

from re_ranking import re_ranking
from reid import metrics, report
from reid.errors import run
from reid.features import load_mat
from reid.files import check_writable
from reid.options import Parser, at_least, share

MAT = "pytorch_result.mat"


def get_parser():
    parser = Parser("Score extracted features after k-reciprocal re-ranking.")
    report.add_options(parser, MAT)
    group = parser.add_argument_group("re-ranking")
    group.add_argument("--k1", type=at_least(1), default=20, help="size of reciprocal sets")
    group.add_argument("--k2", type=at_least(1), default=6, help="neighbours averaged over")
    group.add_argument(
        "--lambda_value", type=share, default=0.3, help="weight of the original distance"
    )
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    if args.json:
        check_writable(args.json)
    query, gallery = load_mat(args.mat)
    started = time.perf_counter()
    q, g = query.features, gallery.features
    distance = re_ranking(q @ g.T, q @ q.T, g @ g.T, args.k1, args.k2, args.lambda_value)
    print(f"re-ranked in {time.perf_counter() - started:.1f} s")
    scores = metrics.evaluate([-distance], query, gallery)
    report.show(scores, len(gallery.identities))
    settings = {"mat": args.mat, "k1": args.k1, "k2": args.k2, "lambda": args.lambda_value}
    report.save(scores, args.json, "evaluate_rerank", settings)


if __name__ == "__main__":
    run(main)
