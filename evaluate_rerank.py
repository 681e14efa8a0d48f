"""Score the features that test.py extracted, after k-reciprocal re-ranking (Zhong et al. 2017).

python evaluate_rerank.py                            # pytorch_result.mat in this folder
python evaluate_rerank.py model/ft_ResNet50/pytorch_result.mat --k1 20 --k2 6
"""

import time

from re_ranking import (
    K1,
    K2,
    LAMBDA,
    SMALLEST_BLOCK,
    largest_block,
    memory_needed,
    rerank,
)
from reid import report
from reid.device import choose_device
from reid.errors import UserError, run
from reid.faiss_search import faiss_search
from reid.options import Parser, at_least, positive, share

MAT = "pytorch_result.mat"


def get_parser():
    parser = Parser("Score extracted features after k-reciprocal re-ranking.")
    report.add_options(parser, MAT)
    group = parser.add_argument_group("re-ranking")
    group.add_argument("--k1", type=at_least(1), default=K1, help="size of reciprocal sets")
    group.add_argument("--k2", type=at_least(1), default=K2, help="neighbours averaged over")
    group.add_argument(
        "--lambda_value", type=share, default=LAMBDA, help="weight of the original distance"
    )
    group.add_argument(
        "--knn",
        choices=["exact", "faiss"],
        default="exact",
        help="who searches for neighbours: this code, exactly, or FAISS (pip install faiss-cpu), "
        "which says what share of them it found",
    )
    group.add_argument(
        "--nlist", type=at_least(0), default=0, help="lists of an IVF index of FAISS; 0: flat"
    )
    group.add_argument(
        "--nprobe", type=at_least(1), default=16, help="lists of the IVF index searched"
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
        "--gpu_ids", help="the GPU to use, or -1 for the CPU (default: a GPU where there is one)"
    )
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    settings = {"k1": args.k1, "k2": args.k2, "lambda": args.lambda_value}
    device = choose_device(args.gpu_ids)[0]
    device = device if device.type == "cuda" else "cpu"
    search = None
    if args.knn == "faiss":
        search = faiss_search(args.nlist, args.nprobe)
        settings |= {"knn": "faiss", "nlist": args.nlist, "nprobe": args.nprobe}

    def rank(query, gallery):
        started = time.perf_counter()
        for distance in rerank(
            query.features,
            gallery.features,
            args.k1,
            args.k2,
            args.lambda_value,
            block_size(args, query, gallery, device),
            device,
            search,
        ):
            distance *= -1  # the nearer, the more similar
            yield distance
        print(f"re-ranked and scored in {time.perf_counter() - started:.1f} s")

    report.score(args, "evaluate_rerank", rank, settings)


def block_size(args, query, gallery, device):
    """Images in a block, so that --max_memory is kept to. Says what is needed before it is used."""
    size = len(query.features), *gallery.features.shape, args.k1, args.k2
    limit = float("inf") if args.max_memory is None else args.max_memory
    block = largest_block(limit, *size)
    if block is None:
        least = memory_needed(*size, SMALLEST_BLOCK)
        raise UserError(f"--max_memory {limit:g}: re-ranking needs {least:.2g} GB at the least")
    print(
        f"re-ranking {size[0]} queries and {size[1]} gallery images on {device}: about "
        f"{memory_needed(*size, block):.2g} GB beside the features, blocks of {block} images",
        flush=True,
    )
    return block


if __name__ == "__main__":
    run(main)
