"""Score the features that test.py extracted: Rank@1/5/10 and mAP, with error bars.

python evaluate.py                                   # pytorch_result.mat in this folder
python evaluate.py model/lsro/pytorch_result.mat --against model/baseline/pytorch_result.mat
"""

from reid import report
from reid.errors import run
from reid.metrics import similarity_blocks
from reid.options import Parser

MAT = "pytorch_result.mat"


def get_parser():
    parser = Parser("Score extracted features: Rank@1/5/10 and mAP.")
    report.add_options(parser, MAT)
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    report.score(args, "evaluate", similarity_blocks, {})


if __name__ == "__main__":
    run(main)
