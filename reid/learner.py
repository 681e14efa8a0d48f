"""A network that learns: its steps, epochs and validation, on one process or several (torchrun)."""

import math
import time
from argparse import Namespace
from collections.abc import Callable
from itertools import chain, groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from reid.batches import batch_options, compares
from reid.checkpoint import unwrap
from reid.dataset import Sample, prepared_folders
from reid.device import autocast, to_device
from reid.distributed import BatchKinds, World, distribute
from reid.errors import UserError
from reid.loading import Batch, EvalBatches, StepSampler, TrainBatches, read_all
from reid.losses import MeanTargets, MetricLoss, at_least_fp32
from reid.optimizer import ema, freeze_backbone, rate_factor, set_rate, sgd
from reid.transforms import EvalTransform, TrainTransform, normalise

CHECK_EVERY = 50  # steps between looks at a GPU's loss: each look waits for the GPU
SHOW_EVERY = 0.5  # seconds between changes of the progress bar


class Learner:
    """A network, its loss and optimizer, and this process's shard of the images.

    args, world, loss_function: as for `reid.engine.opened`. dtype: autocast's, see
    `reid.device.dtype_for`.
    """

    def __init__(
        self,
        args: Namespace,
        world: World,
        net: nn.Module,
        dtype: torch.dtype | None,
        loss_function: Callable,
    ):
        self.args, self.world, self.dtype, self.loss_function = args, world, dtype, loss_function
        self.metric_loss = MetricLoss(args.triplet, args.circle) if compares(args) else None
        target = getattr(loss_function, "target", None)
        self.mean_targets = target if isinstance(target, MeanTargets) else None
        net = to_device(net, world.device)
        self.ema = ema(net, args.ema) if args.ema else None
        self.kinds = BatchKinds(world) if args.split_bn else None
        self.batch_factor = 1.0  # of the mean loss of a batch; see `read`
        self.net = distribute(net, world, self.kinds)
        self.optimizer = sgd(self.net, args.lr, args.backbone_lr)
        if args.compile:
            self.net.compile()

    def averaged(self) -> nn.Module:
        """Return the network whose weights are saved and validated."""
        return self.ema.module if self.ema else unwrap(self.net)

    def read(self, train_samples: list[Sample], val_samples: list[Sample]) -> None:
        """Set up the batches; images are mapped, kept in memory or read anew, as --cache says."""
        args, world = self.args, self.world
        size = args.height, args.width
        self.normalisation = unwrap(self.net).normalisation
        transform = TrainTransform(
            *size, self.normalisation, args.erasing_p, args.color_jitter, args.auto_augment
        )
        # Runs with other generated images, or without, share the file of the real ones.
        parts = [
            [sample.path for sample in part]
            for _, part in groupby(train_samples, lambda sample: sample.generated)
        ]
        images = read_all(
            parts,
            transform.read,
            args.workers,
            args.cache,
            "reading images",
            prepared_folders(args.data_dir)[0] / "cache",
            [transform.full_height, transform.full_width],
        )
        held_out = world.shard(val_samples)
        val_paths, val_arrays = [sample.path for sample in held_out], None
        to_validate = EvalTransform(size)
        if images is not None:
            val_arrays = read_all([val_paths], to_validate.read, args.workers, "ram", "held out")
            size = sum(image.nbytes for image in [*images, *val_arrays])
            world.say(f"images decoded: {size / 1e9:.2f} GB")
        batches = batch_options(args, train_samples)
        sampler = StepSampler(
            train_samples,
            batches.batchsize,
            world,
            args.instances,
            batches.gan_batch or 0,
            args.balance,
        )
        self.sampler = sampler
        if args.on_top:  # each image weighs as in a batch of real ones alone
            self.batch_factor = sampler.batchsize / sampler.from_pool
        two_views = self.mean_targets is not None
        self.batches = TrainBatches(sampler, transform, args.workers, images, two_views)
        self.val_labels = torch.tensor([sample.label for sample in held_out])
        self.val_images = len(val_samples)
        self.has_generated = any(sample.generated for sample in train_samples)
        self.val_batches = EvalBatches(
            val_paths, to_validate, args.batchsize, args.workers, world.device, val_arrays
        )

    def epoch(self, number: int) -> dict:
        """Train for one pass over the images, validate; returns the epoch's line of the log."""
        # Every random choice of an epoch follows from the seed and the epoch's number, so that a
        # resumed run goes on exactly as an unbroken one.
        seed = self.args.seed * 1_000_003 + number
        torch.manual_seed(seed)
        self.net.train()
        if number <= self.args.freeze_epochs:
            unwrap(self.net).backbone_eval()
        started, steps = time.perf_counter(), len(self.sampler)
        images = steps * self.sampler.batchsize
        totals = torch.zeros(3, device=self.world.device)  # loss, errors, real images
        unchecked = []
        with self.bar(number, images) as bar:
            for step, batch in enumerate(self.batches.epoch(seed)):
                set_rate(self.optimizer, rate_factor(number - 1 + step / steps, self.args))
                loss, errors = self.step(batch, number)
                totals += torch.stack([loss, *errors])
                unchecked.append((loss, batch.numbers))
                if len(unchecked) == CHECK_EVERY or self.world.device.type == "cpu":
                    self.check_losses(unchecked, number)
                if bar.update(self.sampler.batchsize):  # has just been drawn anew
                    self.show(bar, loss, number)
            self.check_losses(unchecked, number)
        self.check_weights(number)
        loss = totals[0].item()  # is over all processes already
        wrong, real = self.world.sum(totals[1:]).tolist()
        seconds = time.perf_counter() - started
        line = {
            "epoch": number,
            "lr": self.args.lr * rate_factor(number - 1, self.args),
            "train_loss": round(loss / steps, 5),
            "train_top1err": round(wrong / max(real, 1), 5),
            "images_per_s": round(images / seconds, 1),
        }
        if self.has_generated:
            line["with_generated"] = number > self.args.gan_start
        if self.val_images:
            line |= self.validate()
            if not math.isfinite(line["val_loss"]):
                raise diverged(number, "validation loss is")
        return line | {"seconds": round(time.perf_counter() - started, 2)}

    def step(self, batch: Batch, epoch: int = 1) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Learn from a batch.

        Returns its mean loss over all processes, and the errors and number of real images in this
        process's shard.
        """
        if self.kinds:
            self.kinds.tell(batch.generated)
        with autocast(self.world.device, self.dtype):
            logits, features = self.net(batch.images, return_both=True)
        if self.mean_targets:
            self.mean_targets.logits = self.predicted_by_mean(batch, logits)
        loss = self.batch_factor * self.loss_function(
            logits, batch.labels, batch.generated, self.args.label_smoothing, epoch
        )
        if self.metric_loss:
            shards = at_least_fp32(features), batch.labels, batch.generated
            loss = loss + self.metric_loss(*map(self.world.gather, shards))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if epoch <= self.args.freeze_epochs:
            freeze_backbone(self.optimizer)
        self.optimizer.step()
        if self.ema:
            self.ema.update_parameters(unwrap(self.net))
        real = batch.generated == 0
        wrong = (logits.argmax(1) != batch.labels) & real
        return self.world.sum(loss.detach()) / self.world.size, (wrong.sum(), real.sum())

    @torch.no_grad()
    def predicted_by_mean(self, batch, logits):
        """Return logits [B, K] of the mean network for a batch's other views, 0 for real images."""
        found = torch.zeros_like(logits)
        if len(batch.views):
            with autocast(self.world.device, self.dtype):
                predicted = self.ema.module.eval()(batch.views)
            found[batch.generated == 1] = predicted.to(found.dtype)
        return found

    @torch.inference_mode()
    def validate(self):
        """Return the mean cross-entropy and top-1 error over the held-out images."""
        net = self.averaged().eval()
        sums = torch.zeros(2, device=self.world.device)
        labels, done = self.val_labels.to(self.world.device), 0
        with self.world.together():
            for images in self.val_batches:
                expected = labels[done : done + len(images)]
                done += len(images)
                with autocast(self.world.device, self.dtype):
                    logits = net(normalise(images, *self.normalisation)).float()
                sums[0] += F.cross_entropy(logits, expected, reduction="sum")
                sums[1] += (logits.argmax(1) != expected).sum()
        loss, wrong = (self.world.sum(sums) / self.val_images).tolist()
        return {"val_loss": round(loss, 5), "val_top1err": round(wrong, 5)}

    def check_losses(self, unchecked, number):
        """Raise UserError with the files of the first batch whose loss is no number.

        unchecked: list of (loss, numbers of the batch's samples), which is emptied.
        """
        if not unchecked:
            return
        finite = torch.stack([loss for loss, _ in unchecked]).isfinite().tolist()
        for fine, (_, numbers) in zip(finite, unchecked, strict=True):
            if not fine:
                names = ", ".join(self.sampler.samples[n].path.name for n in numbers)
                raise diverged(number, "loss is", f"lower --lr, or look at this batch: {names}")
        unchecked.clear()

    def check_weights(self, number):
        """Raise UserError where a step has left weights that are no numbers, before they are saved.

        The loss of an epoch's last step is from before that step.
        """
        net = unwrap(self.net)
        tensors = chain(net.parameters(), net.buffers())
        if not torch.stack([tensor.isfinite().all() for tensor in tensors]).all():
            raise diverged(number, "weights are")

    def bar(self, number, images):
        """Make an epoch's progress bar, shown on a terminal and by the first process only."""
        return tqdm(
            total=images,
            desc=f"epoch {number}/{self.args.epochs}",
            unit=" images",
            unit_scale=True,
            mininterval=SHOW_EVERY,
            disable=None if self.world.first else True,
            leave=False,
        )

    def show(self, bar, loss, number):
        """Write the loss and the time left of the whole training beside the bar."""
        epochs = self.args.epochs - number + 1 - bar.n / bar.total
        left = tqdm.format_interval(epochs * bar.total * bar.format_dict["elapsed"] / bar.n)
        bar.set_postfix_str(f"loss {loss.item():.3f}, all epochs in {left}")

    def state(self) -> dict:
        """Return what `load` takes."""
        return {
            "net": unwrap(self.net).state_dict(),
            "mean": self.ema.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
        }

    def load(self, state: dict) -> float:
        """Take over a state, but for the learning rate; returns the one that it had."""
        rates = [group["full_lr"] for group in self.optimizer.param_groups]
        unwrap(self.net).load_state_dict(state["net"])
        if self.ema:
            self.ema.load_state_dict(state["mean"])
        self.optimizer.load_state_dict(state["optimizer"])
        before = self.optimizer.param_groups[-1]["full_lr"]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["full_lr"] = rate
        return before


def diverged(epoch, subject, advice="lower --lr"):
    """Return the UserError that all processes raise where something is infinite or NaN."""
    return UserError(f"epoch {epoch}: the {subject} infinite or NaN; {advice}", agreed=True)
