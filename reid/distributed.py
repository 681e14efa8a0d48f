"""Many processes that train one network as one process would: `torchrun --nproc_per_node N`.

Each process computes its shard of every batch. What would make their result differ from a single
process's is done over the whole batch here: the gradient's mean (DistributedDataParallel), batch
norm's statistics, dropout's mask, and losses that compare images. Everything random is drawn from
the same seed in all of them.
"""

import inspect
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from reid.device import choose_device, set_up
from reid.errors import UserError, by_torchrun, explanation

TIMEOUT = timedelta(minutes=30)  # rank 0 may read the dataset much slower than the others


class World(NamedTuple):
    """This process among those that train together; rank 0 of size 1 when it is alone."""

    rank: int
    size: int
    device: torch.device
    gpus: list  # for DataParallel, within one process; else empty

    @property
    def first(self) -> bool:
        """Tell whether this process is the one that writes and talks."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print from one process only."""
        if self.first:
            print(text, flush=True)

    def shard(self, items: Sequence) -> Sequence:
        """Return this process's part of a batch or list; parts are even where the length allows."""
        low, high = (len(items) * n // self.size for n in (self.rank, self.rank + 1))
        return items[low:high]

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all processes; gradients flow back to each."""
        return AllSum.apply(tensor) if self.size > 1 else tensor

    def gather(self, shard: Tensor) -> Tensor:
        """Return the whole batch [B, ...], of even shards [B / size, ...]; gradients flow back."""
        return self.gather_rows(shard, len(shard) * self.size)

    def gather_rows(self, shard: Tensor, number: int) -> Tensor:
        """Return all `number` rows of which each process has its `shard`, on the shard's device."""
        if self.size == 1:
            return shard
        rows, shape = self.shard(range(number)), shard.shape[1:]
        before, after = (
            shard.new_zeros(rows.start, *shape),
            shard.new_zeros(number - rows.stop, *shape),
        )
        return self.sum(torch.cat([before, shard, after]))

    def collect(self, item: object) -> list | None:
        """Return a list of every process's item in the first process, None in the others."""
        if self.size == 1:
            return [item]
        items = [None] * self.size if self.first else None
        dist.gather_object(item, items)
        return items

    def of_first(self, value: object) -> object:
        """Return the first process's value in all of them."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Have all processes go on from the end of the block, or all stop with one's error.

        The block must not wait for other processes.
        """
        error = None
        try:
            yield
        except Exception as raised:
            message = str(raised) if isinstance(raised, UserError) else explanation(raised)
            if self.size == 1 or message is None:
                raise
            error = message
        if self.size > 1:
            errors = [None] * self.size
            dist.all_gather_object(errors, error)
            message = next(filter(None, errors), None)
            if message is not None:
                raise UserError(message, agreed=True)

    def agree(self, value: object) -> bool:
        """Tell whether all processes have the same value."""
        if self.size == 1:
            return True
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return all(other == value for other in values)

    def wait(self) -> None:
        """Wait until all processes have come here."""
        if self.size > 1:
            dist.barrier()


def join_world(gpu_ids: str | None = None) -> World:
    """Return the World of this process, joined with the others where torchrun started several.

    The process is set up for its device: see `reid.device.set_up`.

    gpu_ids: as `reid.device.choose_device`; under torchrun, each process takes the GPU of its
    number, or the one named, or "-1" the CPU.
    """
    if not by_torchrun():
        device, gpus = choose_device(gpu_ids)
        set_up(device)
        return World(0, 1, device, gpus)
    local, size = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    if gpu_ids is not None:
        device, gpus = choose_device(gpu_ids)
        if gpus:
            raise UserError(
                f"--gpu_ids {gpu_ids}: torchrun gives each process its GPU; leave the flag out"
            )
    elif not torch.cuda.is_available():
        device = torch.device("cpu")
    elif int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count():
        raise UserError(
            f"--nproc_per_node: more processes than the {torch.cuda.device_count()} GPUs here"
        )
    else:
        device = torch.device("cuda", local)
    set_up(device)
    shared = gpu_ids is not None and size > 1  # NCCL can't have one GPU twice; gloo can
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        nccl = device.type == "cuda" and not shared and dist.is_nccl_available()
        backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT)
    return World(int(os.environ["RANK"]), size, device, [])


def leave_world() -> None:
    """Part from the other processes."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def distribute(net: nn.Module, world: World, kinds: "BatchKinds | None" = None) -> nn.Module:
    """Wrap a network so that it trains on a shard of each batch as on the whole batch.

    On one process: itself, or as DataParallel over `world.gpus`. kinds: a `BatchKinds`, by which
    batch norm treats real and generated images apart, or None.
    """
    if world.gpus:
        return nn.DataParallel(net, world.gpus)
    norms = nn.modules.batchnorm._BatchNorm
    if kinds:
        net = replace(net, norms, lambda old: WholeBatchNorm(old, world, kinds))
    if world.size == 1:
        return net
    if world.device.type == "cuda":
        net = synchronised(net)  # finds none where they are split
    else:
        net = replace(net, norms, lambda old: WholeBatchNorm(old, world))
    net = replace(net, nn.Dropout, lambda old: WholeDropout(old.p, world) if old.p else old)
    if "timm" in sys.modules:
        from timm.layers import DropPath

        net = replace(net, DropPath, lambda old: WholeDropPath(old, world))
    ids = [world.device.index] if world.device.type == "cuda" else None
    # The buffers are batch norm's, and the same everywhere. PyTorch 2.14 has renamed the flag.
    wrapper = nn.parallel.DistributedDataParallel
    names = inspect.signature(wrapper).parameters
    flag = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    return wrapper(net, device_ids=ids, **{flag: False})


def synchronised(net):
    """Convert batch norms to those for several GPUs: PyTorch's, of timm's own kinds timm's."""
    if "timm" not in sys.modules:
        return nn.SyncBatchNorm.convert_sync_batchnorm(net)
    from timm.layers import convert_sync_batchnorm

    return convert_sync_batchnorm(net)


def replace(module, kind, make):
    """Put `make(part)` in the place of each part of some kind; returns the module."""
    if isinstance(module, kind):
        return make(module)
    for name, child in module.named_children():
        setattr(module, name, replace(child, kind, make))
    return module


class AllSum(torch.autograd.Function):
    """A sum over all processes. Its gradient is summed again: each process's loss counts.

    (PyTorch's own, torch.distributed.nn.functional.all_reduce, is deprecated.)
    """

    @staticmethod
    def forward(ctx, tensor):
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient):
        return AllSum.apply(gradient)


class BatchKinds:
    """The real and the generated images of the batch at hand, for all batch norms to look up."""

    def __init__(self, world: World):
        self.world = world

    def tell(self, generated: Tensor) -> None:
        """Set the batch before each forward pass: [B], 1 where a GAN made the image."""
        self.groups = torch.stack([generated == 0, generated != 0])  # [2, B]
        self.images = self.world.sum(self.groups.sum(1))  # of the whole batch, [2]


class WholeBatchNorm(nn.Module):
    """Batch norm with the statistics of the whole batch, on any device; PyTorch has it for CUDA.

    Takes over the parameters and buffers of `norm`, under their names. With `kinds`, real and
    generated images have statistics of their own (the idea of Chang et al. 2019, domain-specific
    batch normalisation, and Xie et al. 2020, AdvProp), but share scale and shift; what is kept for
    testing are the real images' statistics.
    """

    def __init__(self, norm, world, kinds=None):
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        for name, value in norm.named_buffers():
            self.register_buffer(name, value)
        self.eps, self.momentum, self.world, self.kinds = norm.eps, norm.momentum, world, kinds
        self.following = nn.Sequential(*norm.children())  # timm's have their activation inside

    def forward(self, x):
        """Normalise [B, C, ...] over all but C, in fp32 (or fp64)."""
        return self.following(self.normalised(x))

    def normalised(self, x):
        """Normalise alone."""
        if not self.training:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        values = x if x.dtype == torch.float64 else x.float()
        pixels = list(range(2, x.dim()))
        members, number = self.membership(values)

        def mean_of(values):
            """Return the mean over each group's pixels: [groups, C]."""
            per_image = values.sum(pixels) if pixels else values
            return self.world.sum((members * per_image).sum(1)) / number.clamp(min=1)

        def of_images(statistics):
            """Look up each image's group: [groups, C] to [B, C, ...], or [1, C, ...] of one."""
            rows = statistics if len(number) == 1 else (members * statistics[:, None]).sum(0)
            return rows.view(*rows.shape, *[1] * len(pixels))

        mean = mean_of(values)
        centred = values - of_images(mean)
        variance = mean_of(centred.square())
        with torch.no_grad():
            self.num_batches_tracked += 1
            # A group of one value a channel has no variance to learn from.
            momentum = self.momentum * (number[0] > 1).to(values.dtype)
            unbiased = variance[0] * (number[0] / (number[0] - 1).clamp(min=1))
            self.running_mean.lerp_(mean[0], momentum)
            self.running_var.lerp_(unbiased, momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        shift = self.bias.view(1, -1, *[1] * len(pixels))
        return torch.addcmul(shift, centred, of_images(scale)).to(x.dtype)

    def membership(self, values):
        """Return who belongs to which group, 0 or 1 [groups, B, 1], and the groups' sizes.

        A size [groups, 1] is the number of values a channel in the group, over all processes.
        """
        if self.kinds:
            members, images = self.kinds.groups, self.kinds.images
            if members.shape[1] != len(values):
                raise UserError(
                    "--split_bn: this backbone's batch norms see parts of images, not whole ones; "
                    "leave it out"
                )
        else:
            members = values.new_ones(1, len(values))
            images = values.new_tensor([len(values) * self.world.size])
        number = images.to(values.dtype) * values.shape[2:].numel()
        return members.to(values.dtype)[:, :, None], number[:, None]


class WholeDropPath(nn.Module):
    """timm's stochastic depth with the mask that one process would draw for the whole batch."""

    def __init__(self, path, world):
        super().__init__()
        self.path, self.world = path, world

    def forward(self, x):
        """Draw which images of the whole batch keep this branch; use this process's shard."""
        if not self.training:
            return x
        whole = x.new_ones(len(x) * self.world.size, *[1] * (x.dim() - 1))
        return x * self.world.shard(self.path(whole))


class WholeDropout(nn.Module):
    """Dropout with the mask that one process would draw for the whole batch."""

    def __init__(self, p, world):
        super().__init__()
        self.p, self.world = p, world

    def forward(self, x):
        """Draw the whole batch's mask, from the same seed in each process; use this one's shard."""
        if not self.training:
            return x
        whole = x.new_ones(len(x) * self.world.size, *x.shape[1:])
        return x * self.world.shard(F.dropout(whole, self.p))
