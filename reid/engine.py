"""The training loop, one for every training script, on one process or several (torchrun)."""

import copy
import math
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from itertools import chain, groupby
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from reid.checkpoint import Run, unwrap, weights_hash
from reid.curves import draw_curves
from reid.dataset import (
    Sample,
    Splits,
    classes_hash,
    count_classes,
    datasets_read,
    fingerprint,
    manifest,
    prepared_folders,
    prepared_hash,
)
from reid.device import (
    autocast,
    computes_bf16,
    device_name,
    dtype_for,
    dtype_name,
    faster_dtype,
    set_up,
    to_device,
)
from reid.distributed import BatchKinds, World, distribute, leave_world
from reid.errors import Interrupted, UserError, first_line, missing_package, say
from reid.files import sha256, update_results
from reid.gan_labels import label_weights
from reid.loading import Batch, EvalBatches, StepSampler, TrainBatches, read_all
from reid.losses import MeanTargets, MetricLoss, at_least_fp32
from reid.optimizer import ema, freeze_backbone, rate_factor, set_rate, sgd
from reid.provenance import command_line
from reid.selection import choose_testing, queries_and_gallery
from reid.transforms import EvalTransform, TrainTransform, normalise, transform_for_testing
from reid.weights import as_user_errors, build_network

CHECK_EVERY = 50  # steps between looks at a GPU's loss: each look waits for the GPU
SHOW_EVERY = 0.5  # seconds between changes of the progress bar


@contextmanager
def opened(
    args: Namespace,
    world: World,
    splits: Splits,
    loss_function: Callable,
) -> Iterator["Training"]:
    """Check all that can be checked, claim the run folder, and give a `Training` that can `run`.

    args: options of `reid.options.add_training_options`, `add_run_options`, `add_device_options`,
    `add_speed_options`. splits: of which only the images to train on must be there. loss_function:
    see `reid.losses`. The block may do what the loss needs before images are read. Nothing is left
    of a run that fails before its first epoch is saved.
    """
    run = Run(Path(args.model_dir) / args.name)
    with ExitStack() as stack:
        # ============ check, and build the network ============
        with world.together():
            check_data_parallel(args, world)
            batches = batch_options(args, splits.train)
            check_batchsize(batches, world, splits.train)
            check_balance(batches, splits.train)
            warn(args, world)
            if splits.people:
                queries_and_gallery(splits.people)
            facts = measure(args, world, splits, loss_function)
            if world.first:
                stack.enter_context(run.claimed())
            resuming = args.resume and run.exists()
            if resuming:
                run.check_same(vars(args), facts)
            else:
                run.check_new()
            writer = tensorboard_writer(run.file("tensorboard")) if args.tensorboard else None
            torch.manual_seed(args.seed)
            net = build_network(
                args.backbone,
                facts["class_num"] + getattr(loss_function, "extra", 0),
                "none" if resuming and run.has_state() else args.pretrained,
                (args.height, args.width),
                neck=args.neck,
                pooling=args.pooling,
                last_stride=args.last_stride,
            )
            if args.test_size:
                transform = transform_for_testing(args.test_size, args.height, args.width)
                with as_user_errors(args.backbone):
                    copy.deepcopy(net).set_size(*transform.size)
            dtype = None
            if world.first:  # others beside it would disturb its trial
                dtype = choose_dtype(args, world, net, run.opts() if resuming else {})
        dtype = world.of_first(dtype)
        facts["arithmetic"] = dtype_name(dtype)
        facts["mean"], facts["std"] = net.normalisation

        # ============ start the run folder, or resume ============
        stack.enter_context(leaving_clean(run, world))
        with world.together():  # and not above: other processes look there whether a run exists
            if world.first and not resuming:
                run.start(vars(args), facts)
        learner = Learner(args, world, net, dtype, loss_function)
        training = Training(learner, run, facts, splits, writer)
        with world.together():
            if resuming:
                training.resume()
            elif args.resume:
                world.say(f"--resume: there is no run in {run.path} yet; this starts it")
        if not world.agree((resuming, len(training.history))):
            raise UserError(
                f"--resume: not all processes find the same in {run.path}; it must be on a disk "
                "that all machines share",
                agreed=True,
            )
        yield training


def measure(args: Namespace, world: World, splits: Splits, loss_function: Callable) -> dict:
    """Return the facts that opts.json holds beside the options."""
    real = [s for s in splits.train + splits.validation if not s.generated]
    folders = prepared_folders(args.data_dir)
    return {
        "loss": loss_function.__name__,
        "class_num": count_classes(real),
        "generated": sum(sample.generated for sample in splits.train),
        "dataset": fingerprint(splits.train),
        "train_all_sha256": [found for found in map(prepared_hash, folders) if found],
        "sources": datasets_read(folders, splits.train) if len(folders) > 1 else None,
        "gan_manifest": manifest(splits.train),
        "pretrained_sha256": weights_hash(args.pretrained),
        "label_run_sha256": sha256(label_weights(args)) if args.label_run else None,
        "device": str(world.device),
        "device_name": device_name(world.device),
        "processes": world.size,
        "threads": torch.get_num_threads(),
        "held_out": fingerprint(splits.validation),
        "classes_sha256": classes_hash(real),
    }


def choose_dtype(args, world, net, opts):
    """Return the dtype to train in. opts: those of the run that goes on, which keeps its own."""
    precision, kept = args.precision, opts.get("arithmetic")
    if precision == "auto" and kept:
        precision = "fp32" if kept == dtype_name(None) else "bf16"
        if precision == "bf16" and world.gpus:
            raise UserError(
                "--gpu_ids: this run computes in bf16, which DataParallel can't; name one GPU"
            )
        if precision == "bf16" and not computes_bf16(world.device):
            say("warning: --resume: this run computes in bf16, which may be slow here")
    dtype = dtype_for(world.device, precision, world.gpus)
    if precision == "auto" and dtype:
        set_up(world.device)  # the trial's arithmetic is that of training
        size = args.height, args.width
        batchsize = max(2, args.batchsize // world.size)  # batch norm needs two images
        dtype = faster_dtype(net, world.device, size, batchsize, training=True)
        world.say(f"{dtype_name(dtype)} is the faster arithmetic for {net.backbone} here")
    return dtype


class Training:
    """A Learner that fills a run folder, epoch by epoch. Made by `opened`.

    facts: those of opts.json. writer: gives TensorBoard's, or None. history: the lines of
    log.jsonl, one for each epoch that is done.
    """

    def __init__(
        self,
        learner: "Learner",
        run: Run,
        facts: dict,
        splits: Splits,
        writer: Callable | None,
    ):
        self.learner, self.run_folder, self.facts, self.writer = learner, run, facts, writer
        self.splits, self.history = splits, []

    def run(self) -> None:
        """Read the images, train the epochs that are left, write the run folder after each."""
        learner, run, history = self.learner, self.run_folder, self.history
        args, world = learner.args, learner.world
        # ============ read the images ============
        with world.together():
            learner.read(self.splits.train, self.splits.validation)
        for row in self.facts["sources"] or ():
            counts = "{images} images of {identities} people by {cameras} cameras".format(**row)
            world.say(f"{row['data_dir']}: {counts}")
        held_out = len(self.splits.validation) + len(self.splits.people)
        world.say(
            f"{run.path}: {args.backbone}, {len(self.splits.train)} images of "
            f"{self.facts['class_num']} classes, {held_out} held out, epochs "
            f"{len(history) + 1} to {args.epochs} on {world.size} x {world.device}, "
            f"{self.facts['arithmetic']}"
        )
        # ============ train ============
        for epoch in range(len(history) + 1, args.epochs + 1):
            history.append(learner.epoch(epoch))
            if world.first:
                run.save_state(learner.state() | {"history": history})
                publish(run, learner.averaged(), history, args.save_every)
                print_epoch(history[-1], args.epochs, self.writer)
            world.wait()
        # ============ the end ============
        result = {"epochs": len(history), "best": history[best_epoch(history) - 1]}
        testing = None
        if self.splits.people:
            net = learner.averaged()
            testing = choose_testing(net, self.splits.people, args, world, learner.dtype)
        leave_world()
        if world.first:
            if testing:
                run.save_testing(testing)
            best = result["best"]
            update_results(run.file("results.json"), "train", result)
            print(
                f"{run.path}: best epoch {best['epoch']}, weights in net_best.pth and net_last.pth"
            )

    def resume(self) -> None:
        """Go back to what the run saved last. Says what differs from then."""
        learner, run, facts = self.learner, self.run_folder, self.facts
        args, world = learner.args, learner.world
        threads = run.opts().get("threads", facts["threads"])
        if world.device.type == "cpu" and threads != facts["threads"]:
            world.say(
                f"--resume: with {facts['threads']} threads, not {threads}: the last bits differ"
            )
        state = run.load_state()
        if state is None:  # stopped in its first epoch
            return
        try:
            before, self.history = learner.load(state), state["history"]
            epochs = len(self.history)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                f"{run.path}: its state is not this run's ({first_line(error)}); start anew"
            ) from error
        if epochs > args.epochs:
            raise UserError(
                f"--epochs {args.epochs}: {run.path} has {epochs} already; ask for as many or more"
            )
        if world.first and epochs < args.epochs:
            run.go_on(epochs, facts)
        if before != args.lr:
            world.say(f"--lr: {before} up to epoch {epochs}, {args.lr} from there on")
        if facts["generated"]:  # runs of older versions don't say
            for line in self.history:
                line.setdefault("with_generated", line["epoch"] > args.gan_start)
        if world.first:  # a kill may have come between the state and what follows from it
            publish(run, learner.averaged(), self.history, args.save_every)


class Learner:
    """A network, its loss and optimizer, and this process's shard of the images.

    args, world, loss_function: as for `opened`. dtype: autocast's, see `reid.device.dtype_for`.
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


def compares(args):
    """Tell whether the recipe has a loss that compares images of a batch."""
    return args.triplet > 0 or args.circle > 0


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


def warn(args: Namespace, world: World) -> None:
    """Say on standard error what is allowed, but hardly meant: DataParallel, an endless warm-up."""
    if world.first and args.warm_epoch >= args.epochs:
        say(
            f"warning: --warm_epoch {args.warm_epoch}: the learning rate still rises in the last "
            f"of {args.epochs} epochs; lower it"
        )
    number = len(world.gpus)
    if number:
        say(
            f"warning: DataParallel: batch norm sees 1/{number} of each batch, which cost the 2018 "
            f"code 8 points of Rank@1 on three GPUs; torchrun --nproc_per_node {number} does not"
        )


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


@contextmanager
def leaving_clean(run, world):
    """End training inside, where Ctrl-C or SIGTERM stops it, with a word on how to go on.

    A training that fails before its first epoch is saved leaves no run.
    """
    try:
        yield
    except KeyboardInterrupt:
        command = command_line()
        command += "" if "--resume" in command.split() else " --resume"
        if world.size > int(os.environ.get("LOCAL_WORLD_SIZE", 1)):  # where the others are unknown
            command = "the same command and --resume, on each machine"
        raise Interrupted(
            f"stopped; all whole epochs are saved in {run.path}; go on with: {command}"
        ) from None
    except Exception:
        if world.first:
            run.abandon()
        raise


def best_epoch(history: list[dict]) -> int:
    """Return the epoch with the lowest validation error, then loss.

    With no images held out, the training loss decides. It is another loss once generated images
    count in it, so then only epochs in which they count are compared.
    """

    def key(line):
        return line.get("val_top1err", 0), line.get("val_loss", line["train_loss"])

    newest = history[-1]
    if "val_loss" not in newest:
        kind = newest.get("with_generated")
        history = [line for line in history if line.get("with_generated") == kind]
    return min(history, key=key)["epoch"]


def publish(run, net, history, save_every):
    """Write the epoch's weights, the log and the curves, which all follow from a saved state."""
    epoch = len(history)
    run.save_weights(net, "last")
    if best_epoch(history) == epoch:
        run.save_weights(net, "best")
    if epoch % save_every == 0:
        run.save_weights(net, epoch)
    run.write_log(history)
    draw_curves(history, run.file("train.jpg"))


def print_epoch(line, epochs, writer=None):
    """Print an epoch's figures in one line, and write them for TensorBoard where asked for."""
    text = f"epoch {line['epoch']}/{epochs}  train loss {line['train_loss']:.4f}"
    text += f" error {line['train_top1err']:.3f}"
    if "val_loss" in line:
        text += f"  val loss {line['val_loss']:.4f} error {line['val_top1err']:.3f}"
    print(f"{text}  {line['images_per_s']:.0f} images/s", flush=True)
    if writer:
        for name in line.keys() - {"epoch"}:
            writer().add_scalar(name, line[name], line["epoch"])
        writer().flush()


def tensorboard_writer(folder):
    """Return a function that gives TensorBoard's writer and makes its file when first called."""
    # TensorBoard imports TensorFlow where it is installed, unless it finds this.
    sys.modules.setdefault("tensorboard.compat.notf", ModuleType("notf"))
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise missing_package("--tensorboard", "tensorboard") from error
    return cache(lambda: SummaryWriter(folder))
