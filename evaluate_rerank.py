"""Score the features that test.py extracted, after k-reciprocal re-ranking (Zhong et al. 2017).

python evaluate_rerank.py                            # pytorch_result.mat in this folder
python evaluate_rerank.py model/ft_ResNet50/pytorch_result.mat --k1 20 --k2 6
"""

import time

from re_ranking import K1, K2, LAMBDA, SMALLEST_BLOCK, make_plan, memory_needed, rerank
from reid import report
from reid.device import GPUMemoryError, choose_device
from reid.errors import UserError, run
from reid.options import Parser, at_least, fraction, positive

MAT = "pytorch_result.mat"


def get_parser():
    parser = Parser("Score extracted features after k-reciprocal re-ranking.")
    report.add_options(parser, MAT)
    group = parser.add_argument_group("re-ranking")
    group.add_argument("--k1", type=at_least(1), default=K1, help="size of k-reciprocal sets")
    group.add_argument("--k2", type=at_least(1), default=K2, help="neighbours to average over")
    group.add_argument(
        "--lambda_value", type=fraction, default=LAMBDA, help="weight of the original distance"
    )
    group = parser.add_argument_group("device")
    group.add_argument(
        "--max_memory",
        type=positive,
        metavar="GB",
        help="memory that re-ranking may take beside the features (default: what the fastest "
        "block size takes)",
    )
    group.add_argument(
        "--gpu_ids", help="the GPU to use, or -1 for the CPU (default: an NVIDIA GPU if any)"
    )
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    settings = {"k1": args.k1, "k2": args.k2, "lambda": args.lambda_value}
    device, several = choose_device(args.gpu_ids)
    if several:
        raise UserError(f"--gpu_ids {args.gpu_ids}: re-ranking uses one GPU; name one")
    device = device if device.type == "cuda" else "cpu"

    def rank(query, gallery):
        started = time.perf_counter()
        plan = choose_plan(args, query, gallery, device)
        options = args.k1, args.k2, args.lambda_value, plan, device
        for distance in rerank(query.features, gallery.features, *options):
            distance *= -1  # the nearer, the more similar
            yield distance
        print(f"re-ranked and scored in {time.perf_counter() - started:.1f} s")

    try:
        report.score(args, report.load(args), "evaluate_rerank", rank, settings)
    except GPUMemoryError as error:
        raise UserError(
            "the GPU's memory is full; limit re-ranking with --max_memory, or take the CPU with "
            "--gpu_ids -1"
        ) from error


def choose_plan(args, query, gallery, device):
    """Return the Plan that keeps to --max_memory, and print what it needs.

    Raises UserError where none does.
    """
    sizes = len(query.features), *gallery.features.shape, args.k1, args.k2
    plan = make_plan(*sizes, args.max_memory)
    if plan is None:
        least = memory_needed(*sizes, SMALLEST_BLOCK, keep=False)
        raise UserError(
            f"--max_memory {args.max_memory:g}: re-ranking needs {least:.2g} GB at the least"
        )
    print(
        f"re-ranking {sizes[0]} queries and {sizes[1]} gallery images on {device}: about "
        f"{plan.memory:.2g} GB beside the features, {plan.block} images at a time",
        flush=True,
    )
    return plan


if __name__ == "__main__":
    run(main)
