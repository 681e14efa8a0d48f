"""Score the features that test.py extracted: Rank@1/5/10 and mAP.

python evaluate.py                                   # pytorch_result.mat in this folder
python evaluate.py model/ft_ResNet50/pytorch_result.mat
"""

from reid import metrics, report
from reid.errors import run
from reid.features import load_mat
from reid.files import check_writable
from reid.options import Parser

MAT = "pytorch_result.mat"


def get_parser():
    parser = Parser("Score extracted features: Rank@1/5/10 and mAP.")
    report.add_options(parser, MAT)
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    if args.json:
        check_writable(args.json)
    query, gallery = load_mat(args.mat)
    scores = metrics.evaluate(metrics.similarity_blocks(query, gallery), query, gallery)
    report.show(scores, len(gallery.identities))
    report.save(scores, args.json, "evaluate", {"mat": args.mat})


if __name__ == "__main__":
    run(main)
