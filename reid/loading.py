"""From files to batches: decoded once into memory where that fits, else by loader processes."""

import os
import signal
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from reid.device import send

CACHE_BUDGET = 2 * 1024**3  # bytes of decoded images that --cache auto keeps in memory
GIGABYTE = 1e9


class Batch(NamedTuple):
    """Images to train on: this process's share of a step."""

    images: torch.Tensor  # float32 [B, 3, height, width] on the device
    labels: torch.Tensor  # int64 [B]; of generated image number n it is -1 - n
    generated: torch.Tensor  # int64 [B], 1 where a GAN made the image
    numbers: list  # which samples the whole step is made of, over all processes


class TrainBatches:
    """The batches of each epoch, drawn by a seed alone: the same for any number of processes.

    samples: list of `reid.dataset.Sample`; transform: `reid.transforms.TrainTransform`;
    instances: images of an identity that stand together in a batch, or 0 to shuffle freely;
    gan_batch: generated images in every batch, or 0 to shuffle them among the real ones; an epoch
    is then a pass over the real ones. world: `reid.parallel.World`. A batch is shared out evenly
    among its processes.
    """

    def __init__(
        self, samples, transform, batchsize, workers, cache, world, instances=0, gan_batch=0
    ):
        self.samples, self.transform, self.world = samples, transform, world
        self.instances, self.gan_batch = instances, gan_batch
        self.generated = torch.tensor([sample.generated for sample in samples])
        labels = torch.tensor([sample.label for sample in samples])
        # Generated images get a number each, for losses that know each of them.
        self.labels = torch.where(self.generated == 1, -self.generated.cumsum(0), labels)
        # What an epoch is a pass over, as numbers of samples.
        self.pool = [n for n, s in enumerate(samples) if not (gan_batch and s.generated)]
        # Batch norm needs full batches, so an incomplete last one is left out; of a set smaller
        # than one batch, all of it is one.
        self.from_pool = min(batchsize - gan_batch, len(self.pool))
        self.batchsize = self.from_pool + gan_batch
        images = len(self.pool)
        if instances:  # groups are filled up
            counts = Counter(samples[n].label for n in self.pool).values()
            images = sum(-(-count // instances) * instances for count in counts)
        self.steps = images // self.from_pool
        self.images = cache
        if cache is None:
            dataset = Decoded([sample.path for sample in samples], transform.read)
            self.plan = []  # the epoch's shares, set before each
            self.loader = worker_loader(dataset, self.plan, workers)

    def __len__(self):
        return self.steps

    def epoch(self, seed):
        """The batches of an epoch, as `Batch`."""
        generator = torch.Generator().manual_seed(seed)
        steps = self.draw_steps(generator)
        choices = self.transform.draw(steps.numel(), generator)
        shares = [self.world.share(step) for step in steps]
        if self.images is not None:
            decoded = ([self.images[n] for n in share.tolist()] for share in shares)
        else:
            self.plan[:] = [share.tolist() for share in shares]
            decoded = self.loader
        device = self.world.device
        places = torch.arange(steps.numel()).view_as(steps)
        for step, place, share, images in zip(steps, places, shares, decoded, strict=True):
            drawn = choices.part(self.world.share(place))
            images = self.transform.crop(images, drawn, device)
            yield Batch(
                self.transform.finish(images, drawn),
                send(self.labels[share], device),
                send(self.generated[share], device),
                step.tolist(),
            )

    def draw_steps(self, generator):
        """Which samples each step of an epoch is made of: int64 [steps, batchsize]."""
        pool = torch.tensor(self.pool)
        if self.instances:
            order = identity_order([self.samples[n] for n in self.pool], self.instances, generator)
        else:
            order = torch.randperm(len(pool), generator=generator)
        steps = pool[order[: self.steps * self.from_pool]].view(self.steps, self.from_pool)
        if not self.gan_batch:
            return steps
        passes = repeated_passes(
            self.generated.nonzero()[:, 0], self.steps * self.gan_batch, generator
        )
        return torch.cat([steps, passes.view(self.steps, self.gan_batch)], dim=1)


class EvalBatches:
    """Images in the order of `paths`, `batchsize` at a time, as uint8 [B, H, W, 3] on the device.

    cache: their arrays, already read, or None to have loader processes read them.
    """

    def __init__(self, paths, transform, batchsize, workers, device, cache=None):
        self.paths, self.batchsize, self.device, self.images = paths, batchsize, device, cache
        if cache is None:
            numbers = list(range(len(paths)))
            plan = [numbers[n : n + batchsize] for n in range(0, len(paths), batchsize)]
            self.loader = worker_loader(Decoded(paths, transform.read), plan, workers)

    def __iter__(self):
        if self.images is None:
            decoded = self.loader
        else:
            starts = range(0, len(self.paths), self.batchsize)
            decoded = (self.images[n : n + self.batchsize] for n in starts)
        for images in decoded:
            yield send(torch.from_numpy(np.stack(images)), self.device)


class Decoded(Dataset):
    """Files as the arrays that `read` makes of them."""

    def __init__(self, paths, read):
        self.paths, self.read = paths, read

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return self.read(self.paths[index])


def worker_loader(dataset, plan, workers):
    """Lists of arrays, one for each list of numbers in `plan`, read by processes."""
    return DataLoader(
        dataset,
        batch_sampler=plan,
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=leave_interrupts,
        persistent_workers=workers > 0,
        generator=torch.Generator(),  # else it would draw from the network's random numbers
    )


def leave_interrupts(worker):
    """Ctrl-C is the training process's to handle, not the loader's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def read_all(paths, read, threads, mode, label):
    """All images as a list of arrays; None where they are to be read anew each epoch.

    mode: "off", "ram", or "auto": where they take no more than CACHE_BUDGET, for all of this
    machine's processes together, judged by a hundred images. Raises UserError that names a file
    which can't be read.
    """
    if mode == "off" or not paths:
        return None if paths else []
    if mode == "auto":
        some = paths[:: len(paths) // 100 + 1]
        images = sum(read(path).nbytes for path in some) / len(some) * len(paths)
        if images * int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > CACHE_BUDGET:  # each has its own
            return None
    pool = ThreadPoolExecutor(max(threads, 1))  # decoding lets other threads run
    try:
        images = pool.map(read, paths)
        return list(tqdm(images, label, len(paths), unit="image", disable=None, leave=False))
    finally:
        pool.shutdown(cancel_futures=True)


def size_in_memory(images):
    """Gigabytes that a list of arrays takes."""
    return sum(image.nbytes for image in images) / GIGABYTE


def repeated_passes(numbers, length, generator):
    """The first `length` of shuffled passes over `numbers`, one after the other."""
    passes = -(-length // len(numbers))
    orders = [torch.randperm(len(numbers), generator=generator) for _ in range(passes)]
    return numbers[torch.cat(orders)[:length]]


def identity_order(samples, instances, generator):
    """An order in which `instances` images of one identity follow one another (PK sampling).

    Hermans et al. 2017, "In Defense of the Triplet Loss". Each image comes once; where an
    identity's number is no multiple, some of its images come twice. Generated images, which have
    no identity, form groups among themselves.
    """
    members = {}
    for number, sample in enumerate(samples):
        members.setdefault(sample.label, []).append(number)
    groups = []
    for numbers in members.values():
        numbers = torch.tensor(numbers)
        missing = -len(numbers) % instances
        again = torch.randint(len(numbers), (missing,), generator=generator)
        shuffled = numbers[torch.randperm(len(numbers), generator=generator)]
        groups += torch.cat([shuffled, numbers[again]]).split(instances)
    order = torch.randperm(len(groups), generator=generator)
    return torch.stack(groups)[order].flatten()
