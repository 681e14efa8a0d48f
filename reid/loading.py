"""Batches of images, decoded once into a file or memory where that fits, else by processes."""

import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from reid.cache import decoded, has_room, is_stored, shared_images
from reid.dataset import Sample
from reid.device import send
from reid.distributed import World
from reid.options import processors
from reid.transforms import EvalTransform, TrainTransform

CACHE_BUDGET = 2 * 1024**3  # bytes of decoded images that --cache auto keeps in memory


class Batch(NamedTuple):
    """Images to train on: this process's shard of a step."""

    images: Tensor  # float32 [B, 3, height, width] on the device
    labels: Tensor  # int64 [B]; of generated image number n it is -1 - n
    generated: Tensor  # int64 [B], 1 where a GAN made the image
    numbers: list  # which samples the whole step consists of, over all processes
    views: Tensor | None = None  # other views of the shard's generated images, like `images`


class StepSampler(Sampler):
    """The samples of each training step, drawn by a seed alone.

    Iterating over it gives lists of sample numbers, this process's shard of each step; the steps
    themselves are the same for any number of processes.

    samples: list of `reid.dataset.Sample`; batchsize: images in a step, over all processes; world:
    `reid.distributed.World`; instances: images of an identity that stand together in a batch, or 0
    to shuffle freely; gan_batch: generated images in every batch, or 0 to shuffle them among the
    real ones. With gan_batch an epoch is a pass over the real images. balance: whether each dataset
    has the same number of images in every batch; an epoch then has as many steps, but repeats the
    smaller datasets.
    """

    def __init__(
        self,
        samples: list[Sample],
        batchsize: int,
        world: World,
        instances: int = 0,
        gan_batch: int = 0,
        balance: bool = False,
    ):
        self.samples, self.world = samples, world
        self.instances, self.gan_batch = instances, gan_batch
        # The numbers of the samples that an epoch is a pass over.
        self.pool = [n for n, s in enumerate(samples) if not (gan_batch and s.generated)]
        # Batch norm needs full batches, so an incomplete last one is left out; a set smaller than
        # one batch is one batch.
        self.from_pool = min(batchsize - gan_batch, len(self.pool))
        self.batchsize = self.from_pool + gan_batch
        images = len(self.pool)
        if instances:  # groups are filled up
            counts = Counter(samples[n].label for n in self.pool).values()
            images = sum(-(-count // instances) * instances for count in counts)
        self.number = images // self.from_pool
        datasets = {}
        for n in self.pool:
            datasets.setdefault(samples[n].dataset if balance else 0, []).append(n)
        self.datasets = list(datasets.values())

    def __len__(self):
        return self.number

    def set_epoch(self, seed: int) -> torch.Generator:
        """Draw the steps of an epoch: `steps`, int64 [len(self), batchsize].

        Returns the generator, from which the images' augmentation is drawn next.
        """
        generator = torch.Generator().manual_seed(seed)
        share = self.from_pool // len(self.datasets)
        parts = [
            self.passes(numbers, share, self.instances, generator) for numbers in self.datasets
        ]
        if self.gan_batch:
            generated = [n for n, s in enumerate(self.samples) if s.generated]
            parts.append(self.passes(generated, self.gan_batch, 0, generator))
        self.steps = torch.cat(parts, dim=1)
        return generator

    def passes(self, numbers, share, instances, generator):
        """Draw shuffled passes over samples, until each step has its share: [len(self), share]."""
        orders, drawn = [], 0
        while drawn < len(self) * share:
            if instances:
                order = identity_order([self.samples[n] for n in numbers], instances, generator)
            else:
                order = torch.randperm(len(numbers), generator=generator)
            orders.append(torch.tensor(numbers)[order])
            drawn += len(order)
        return torch.cat(orders)[: len(self) * share].view(len(self), share)

    def __iter__(self):
        for step in self.steps:
            yield self.world.shard(step).tolist()


class TrainBatches:
    """The batches of each epoch, this process's shard of them.

    sampler: a `StepSampler`; transform: `reid.transforms.TrainTransform`; workers: processes that
    read images. images: their arrays, already read, or None to read them anew in each epoch.
    two_views: whether generated images are augmented a second time.
    """

    def __init__(
        self,
        sampler: StepSampler,
        transform: TrainTransform,
        workers: int,
        images: list[np.ndarray] | None,
        two_views: bool = False,
    ):
        self.sampler, self.transform, self.two_views = sampler, transform, two_views
        samples = sampler.samples
        self.generated = torch.tensor([sample.generated for sample in samples])
        labels = torch.tensor([sample.label for sample in samples])
        # Generated images get a number each, for losses that know each of them.
        self.labels = torch.where(self.generated == 1, -self.generated.cumsum(0), labels)
        self.images = images
        if images is None:
            dataset = Decoded([sample.path for sample in samples], transform.read)
            self.loader = worker_loader(dataset, sampler, workers)

    def epoch(self, seed: int) -> Iterator[Batch]:
        """Yield the batches of an epoch, as `Batch`."""
        generator = self.sampler.set_epoch(seed)
        steps, world = self.sampler.steps, self.sampler.world
        augmentation = self.transform.draw(steps.numel(), generator)
        again = self.transform.draw(steps.numel(), generator) if self.two_views else None
        if self.images is None:
            shards = self.loader
        else:
            shards = ([self.images[n] for n in shard] for shard in self.sampler)
        rows = torch.arange(steps.numel()).view_as(steps)  # of the augmentation
        for step, row, images in zip(steps, rows, shards, strict=True):
            shard, rows_here = world.shard(step), world.shard(row)
            generated, views = self.generated[shard], None
            if again:
                chosen = generated.nonzero()[:, 0]
                views = self.augmented([images[n] for n in chosen], again.part(rows_here[chosen]))
            yield Batch(
                self.augmented(images, augmentation.part(rows_here)),
                send(self.labels[shard], world.device),
                send(generated, world.device),
                step.tolist(),
                views,
            )

    def augmented(self, images, drawn):
        """Return images on the device, float32 [B, 3, H, W], augmented as drawn."""
        device, transform = self.sampler.world.device, self.transform
        if not images:
            return torch.empty(0, 3, transform.height, transform.width, device=device)
        return transform.finish(transform.crop(images, drawn, device), drawn)


class EvalBatches:
    """Batches of images in the order of `paths`, uint8 [B, H, W, 3] on the device.

    images: their arrays, already read, or None to have loader processes read them.
    """

    def __init__(
        self,
        paths: list[Path],
        transform: EvalTransform,
        batchsize: int,
        workers: int,
        device: torch.device,
        images: list[np.ndarray] | None = None,
    ):
        self.paths, self.batchsize, self.device, self.images = paths, batchsize, device, images
        if images is None:
            batches = BatchSampler(range(len(paths)), batchsize, drop_last=False)
            self.loader = worker_loader(Decoded(paths, transform.read), batches, workers)

    def __iter__(self):
        if self.images is None:
            batches = self.loader
        else:
            starts = range(0, len(self.paths), self.batchsize)
            batches = (self.images[n : n + self.batchsize] for n in starts)
        for images in batches:
            yield send(torch.from_numpy(np.stack(images)), self.device)


class Decoded(Dataset):
    """A dataset of files, each as the array that `read` makes of it."""

    def __init__(self, paths, read):
        self.paths, self.read = paths, read

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return self.read(self.paths[index])


def worker_loader(dataset, batches, workers):
    """Return a loader of lists of arrays, one for each list of numbers in `batches`.

    workers: processes that read, no more than there are processors (PyTorch would warn of more); 0
    reads in this one.
    """
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=min(workers, processors()),
        collate_fn=list,
        worker_init_fn=leave_interrupts,
        persistent_workers=workers > 0,
        generator=torch.Generator(),  # else it would draw from the network's random numbers
    )


def leave_interrupts(worker):
    """Have a loader's process ignore Ctrl-C, which the training process handles."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def read_all(
    parts: list[list[Path]],
    read: Callable,
    threads: int,
    mode: str,
    label: str,
    folder: Path | None = None,
    about: object = None,
) -> list[np.ndarray] | None:
    """Read all images into a list of arrays; None where they are to be read anew each epoch.

    parts: lists of files, which go into one cache file each. mode: "file": of files in `folder`,
    see `reid.cache`; "ram"; "off"; or "auto": files where there is room for them, else memory where
    the images take no more than CACHE_BUDGET, for all of this machine's processes together, judged
    by a hundred of them. about: what `read` does. Raises UserError that names a file which can't be
    read.
    """
    parts = [paths for paths in parts if paths]
    if not parts:
        return []
    if mode == "auto":
        stored = folder and all(is_stored(paths, about, folder) for paths in parts)
        mode = "file" if stored else chosen_mode([*chain(*parts)], read, folder)
    if mode == "off":
        return None
    if mode == "file":
        files = [shared_images(paths, read, about, folder, threads, label) for paths in parts]
    else:
        files = [decoded(paths, read, threads, label) for paths in parts]
    return [*chain(*files)]


def chosen_mode(paths, read, folder):
    """Return the mode that "auto" means for these images."""
    some = paths[:: len(paths) // 100 + 1]
    size = sum(read(path).nbytes for path in some) / len(some) * len(paths)
    if folder and has_room(folder, size):
        return "file"
    own_copies = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return "ram" if size * own_copies <= CACHE_BUDGET else "off"


def identity_order(samples, instances, generator):
    """Draw an order in which `instances` images of one identity follow one another (PK sampling).

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
