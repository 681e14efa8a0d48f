"""The sizes of batches: what the options ask for, and whether it can be had."""

from argparse import Namespace

from reid.dataset import Sample, prepared_folders
from reid.distributed import World
from reid.errors import UserError


def check_data_parallel(args: Namespace, world: World) -> None:
    """Raise UserError for flags that DataParallel can't keep: a GPU would get more of a kind."""
    for flag in ("split_bn", "gan_batch", "on_top", "balance"):
        if getattr(args, flag) and world.gpus:
            raise UserError(
                f"--{flag}: DataParallel can't; start one process a GPU: "
                f"torchrun --nproc_per_node {len(world.gpus)}"
            )


def batch_options(args: Namespace, samples: list[Sample]) -> Namespace:
    """Return the options with --batchsize and --gan_batch as --on_top means them."""
    if not args.on_top:
        return args
    generated = sum(sample.generated for sample in samples)
    real = len(samples) - generated
    in_proportion = round(min(args.batchsize, real) * generated / real)
    gan_batch = args.gan_batch or max(1, in_proportion)
    batches = {"batchsize": args.batchsize + gan_batch, "gan_batch": gan_batch}
    return Namespace(**vars(args) | batches)


def check_batchsize(args: Namespace, world: World, samples: list[Sample]) -> None:
    """Raise UserError where batches can't be shared out, or hold too few images for batch norm.

    args: as `batch_options` returns them. samples: to train on.
    """
    generated = sum(sample.generated for sample in samples)
    images = len(samples) - generated + (args.gan_batch or generated)
    real = args.batchsize - (args.gan_batch or 0)
    parts, batchsize = max(world.size, len(world.gpus)), min(args.batchsize, images)
    if batchsize % parts:
        generated = f", {args.gan_batch} of them generated (--gan_batch)," if args.gan_batch else ""
        raise UserError(f"--batchsize: {batchsize} images{generated} can't be shared among {parts}")
    if batchsize < 2 * len(world.gpus) or batchsize < 2:
        raise UserError("--batchsize: batch norm needs two images or more, on each GPU of its own")
    if args.instances and real % args.instances:
        raise UserError(f"--instances: {real} images a batch are no multiple of it")
    if compares(args) and args.instances < 2:
        raise UserError("--triplet and --circle compare images of an identity: add --instances 4")


def check_balance(args, samples):
    """Raise UserError where --balance has nothing to balance, or no equal shares."""
    if not args.balance:
        return
    generated = sum(sample.generated for sample in samples)
    number = len(prepared_folders(args.data_dir))
    if number == 1:
        raise UserError("--balance: there is one --data_dir; name several, or leave it out")
    if generated and not args.gan_batch:
        raise UserError("--balance: say with --gan_batch how many generated images a batch has")
    real = args.batchsize - (args.gan_batch or 0)
    if real % (number * max(args.instances, 1)):
        raise UserError(
            f"--balance: {real} real images a batch have no equal shares for {number} datasets"
            + (f" in groups of {args.instances} (--instances)" if args.instances else "")
        )
    with_images = {sample.dataset for sample in samples if not sample.generated}
    if len(samples) - generated < real or len(with_images) < number:
        raise UserError(
            f"--balance: {len(samples) - generated} real images of {len(with_images)} datasets "
            f"can't fill a batch of {real} of {number}; lower --batchsize, or raise --num_ids"
        )


def compares(args):
    """Tell whether the recipe has a loss that compares images of a batch."""
    return args.triplet > 0 or args.circle > 0
