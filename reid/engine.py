"""The training loop, one for every training script, on one process or several (torchrun)."""

import sys
import time
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from reid.checkpoint import Run, build_network, first_line, unwrap, weights_hash
from reid.curves import draw_curves
from reid.dataset import classes_hash, fingerprint, manifest
from reid.device import arithmetic, autocast, device_name, place
from reid.errors import Interrupted, UserError
from reid.files import update_results
from reid.loading import EvalBatches, TrainBatches, read_all, size_in_memory
from reid.losses import MetricLoss, full
from reid.optimiser import freeze_backbone, rate_factor, running_mean, set_rate, sgd
from reid.parallel import Split, distribute, join_world, leave_world
from reid.provenance import command_line
from reid.transforms import TrainTransform, normalise, val_transform

CHECK_EVERY = 50  # steps between looks at a GPU's loss: each look waits for the GPU
SHOW_EVERY = 0.5  # seconds between changes of the progress bar


def train(
    args, train_samples, val_samples, class_num, loss_function, extra_outputs=0, prepare=None
):
    """Train a network and fill its run folder.

    args: options of `reid.options.add_training_options`, `add_run_options`, `add_device_options`,
    `add_speed_options`. train_samples, val_samples: lists of `reid.dataset.Sample`; the second
    may be empty. class_num: identities among them. loss_function: see `reid.losses`.
    extra_outputs: of the network, for classes that are no identities. prepare: called with the
    World when all is checked and before images are read, for work that the loss needs.
    """
    world = join_world(args.gpu_ids)
    run = Run(Path(args.model_dir) / args.name)
    with ExitStack() as stack:
        with world.together():
            dtype = arithmetic(world.device, args.precision, world.gpus)
            facts = check(args, world, dtype, train_samples, class_num, loss_function)
            facts["held_out"] = fingerprint(val_samples)
            facts["classes_sha256"] = classes_hash(train_samples + val_samples)
            if world.first:
                stack.enter_context(run.claimed())
            resuming = args.resume and run.exists()
            if resuming:
                run.check_same(vars(args), facts)
            writer = tensorboard_writer(run.file("tensorboard")) if args.tensorboard else None
            torch.manual_seed(args.seed)
            net = build_network(
                args.use_dense,
                class_num + extra_outputs,
                "none" if resuming and run.has_state() else args.pretrained,
                neck=args.neck,
                pooling=args.pooling,
                last_stride=args.last_stride,
            )
        stack.enter_context(leaving_clean(run, world))
        with world.together():  # and not above: other processes look there whether a run exists
            if world.first and not resuming:
                run.start(vars(args), facts)
        training = Training(args, world, net, dtype, loss_function)
        history = []
        with world.together():
            if resuming:
                history = training.resume(run, facts)
            elif args.resume:
                world.say(f"--resume: there is no run in {run.path} yet; this starts it")
        if not world.agree((resuming, len(history))):
            raise UserError(
                f"--resume: not all processes find the same in {run.path}; it must be on a disk "
                "that all machines share",
                agreed=True,
            )
        if prepare:
            prepare(world)
        with world.together():
            training.read(train_samples, val_samples)
        world.say(
            f"{run.path}: {len(train_samples)} images of {class_num} classes, "
            f"{len(val_samples)} held out, epochs {len(history) + 1} to {args.epochs} on "
            f"{world.size} x {world.device}, {facts['arithmetic']}"
        )
        for epoch in range(len(history) + 1, args.epochs + 1):
            history.append(training.epoch(epoch))
            if world.first:
                run.save_state(training.state(history))
                publish(run, training.measured(), history, args.save_every)
                report(history[-1], args.epochs, writer)
            world.wait()
        leave_world()
        if world.first:
            best = history[best_epoch(history) - 1]
            results = {"epochs": len(history), "best": best}
            update_results(run.file("results.json"), "train", results)
            print(
                f"{run.path}: best epoch {best['epoch']}, weights in net_best.pth and net_last.pth"
            )


def check(args, world, dtype, train_samples, class_num, loss_function):
    """The facts that opts.json holds beside the options.

    Raises UserError where images and options don't go together.
    """
    generated = sum(sample.generated for sample in train_samples)
    check_split(args, world)
    check_batchsize(args, world, len(train_samples) - generated + (args.gan_batch or generated))
    return {
        "loss": loss_function.__name__,
        "class_num": class_num,
        "generated": generated,
        "dataset": fingerprint(train_samples),
        "gan_manifest": manifest(train_samples),
        "pretrained_sha256": weights_hash(args.pretrained),
        "device": str(world.device),
        "device_name": device_name(world.device),
        "processes": world.size,
        "threads": torch.get_num_threads(),
        "arithmetic": str(dtype or torch.float32).removeprefix("torch."),
    }


class Training:
    """A network in training: its optimiser, its loss, and this process's share of the data."""

    def __init__(self, args, world, net, dtype, loss_function):
        self.args, self.world, self.dtype = args, world, dtype
        self.loss_function = loss_function
        self.metric_loss = MetricLoss(args.triplet, args.circle) if comparing(args) else None
        net = place(net, world.device)
        self.mean = running_mean(net, args.ema) if args.ema else None
        self.split = Split(world) if args.split_bn else None
        self.net = distribute(net, world, self.split)
        self.optimizer = sgd(self.net, args.lr)
        if args.compile:
            self.net.compile()

    def measured(self):
        """The network whose weights are saved and validated."""
        return self.mean.module if self.mean else unwrap(self.net)

    def read(self, train_samples, val_samples):
        """Set up the batches, decoding the images into memory where they are to be kept there."""
        args, world = self.args, self.world
        size = args.height, args.width
        transform = TrainTransform(*size, args.erasing_p, args.color_jitter, args.auto_augment)
        held_out = world.share(val_samples)
        paths = [sample.path for sample in train_samples]
        cache = read_all(paths, transform.read, args.workers, args.cache, "reading images")
        to_validate = val_transform(*size)
        val_paths, val_cache = [sample.path for sample in held_out], None
        if cache is not None:
            val_cache = read_all(val_paths, to_validate.read, args.workers, "ram", "held out")
            total = size_in_memory(cache) + size_in_memory(val_cache)
            world.say(f"images decoded into memory: {total:.2f} GB")
        self.batches = TrainBatches(
            train_samples,
            transform,
            args.batchsize,
            args.workers,
            cache,
            world,
            args.instances,
            args.gan_batch or 0,
        )
        self.val_labels = torch.tensor([sample.label for sample in held_out])
        self.val_images = len(val_samples)
        self.has_generated = any(sample.generated for sample in train_samples)
        self.val_batches = EvalBatches(
            val_paths, to_validate, args.batchsize, args.workers, world.device, val_cache
        )

    def epoch(self, number):
        """One pass over the training images, and validation: the epoch's line in the log."""
        # Every random choice of an epoch follows from the seed and the epoch's number, so that a
        # resumed run goes on exactly as an unbroken one.
        seed = self.args.seed * 1_000_003 + number
        torch.manual_seed(seed)
        self.net.train()
        if number <= self.args.freeze_epochs:
            unwrap(self.net).backbone_eval()
        started = time.perf_counter()
        totals = torch.zeros(3, device=self.world.device)  # loss, errors, real images
        seen = []
        images = len(self.batches) * self.batches.batchsize
        with self.bar(number, images) as bar:
            for step, batch in enumerate(self.batches.epoch(seed)):
                set_rate(
                    self.optimizer, rate_factor(number - 1 + step / len(self.batches), self.args)
                )
                losses, errors = self.step(batch, number)
                totals += torch.stack([losses, *errors])
                seen.append((losses, batch.numbers))
                if len(seen) == CHECK_EVERY or self.world.device.type == "cpu":
                    self.check(seen, number)
                bar.update(self.batches.batchsize)
                self.show(bar, losses, started, number, images)
            self.check(seen, number)
        loss, wrong, real = self.totals(totals)
        seconds = time.perf_counter() - started
        line = {
            "epoch": number,
            "lr": self.args.lr * rate_factor(number - 1, self.args),
            "train_loss": round(loss / len(self.batches), 5),
            "train_top1err": round(wrong / max(real, 1), 5),
            "images_per_s": round(images / seconds, 1),
        }
        if self.has_generated:
            line["with_generated"] = number > self.args.gan_start
        if self.val_images:
            line |= self.validate()
        return line | {"seconds": round(time.perf_counter() - started, 2)}

    def step(self, batch, epoch=1):
        """Learn from a batch: its mean loss over all processes; errors and number of real images
        of this process's share.
        """
        if self.split:
            self.split.tell(batch.generated)
        with autocast(self.world.device, self.dtype):
            logits, features = self.net(batch.images, return_both=True)
        loss = self.loss_function(
            logits, batch.labels, batch.generated, self.args.label_smoothing, epoch
        )
        if self.metric_loss:
            shares = full(features), batch.labels, batch.generated
            loss = loss + self.metric_loss(*map(self.world.gather, shares))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if epoch <= self.args.freeze_epochs:
            freeze_backbone(self.optimizer)
        self.optimizer.step()
        if self.mean:
            self.mean.update_parameters(unwrap(self.net))
        real = batch.generated == 0
        wrong = (logits.argmax(1) != batch.labels) & real
        return self.world.sum(loss.detach()) / self.world.size, (wrong.sum(), real.sum())

    def totals(self, sums):
        """An epoch's loss, errors and real images over all processes, as numbers."""
        loss = sums[0].item()  # is over all processes already
        return loss, *self.world.sum(sums[1:]).tolist()

    @torch.inference_mode()
    def validate(self):
        """Mean cross-entropy and top-1 error over the held-out images."""
        net = self.measured().eval()
        sums = torch.zeros(2, device=self.world.device)
        labels, done = self.val_labels.to(self.world.device), 0
        with self.world.together():
            for images in self.val_batches:
                expected = labels[done : done + len(images)]
                done += len(images)
                with autocast(self.world.device, self.dtype):
                    logits = net(normalise(images)).float()
                sums[0] += F.cross_entropy(logits, expected, reduction="sum")
                sums[1] += (logits.argmax(1) != expected).sum()
        loss, wrong = (self.world.sum(sums) / self.val_images).tolist()
        return {"val_loss": round(loss, 5), "val_top1err": round(wrong, 5)}

    def check(self, seen, number):
        """Raise UserError with the files of the first batch whose loss is no number."""
        losses = torch.stack([loss for loss, _ in seen]).isfinite().tolist() if seen else []
        for fine, (_, numbers) in zip(losses, seen, strict=True):
            if not fine:
                names = ", ".join(self.batches.samples[n].path.name for n in numbers)
                raise UserError(
                    f"epoch {number}: the loss is no longer a number; lower --lr, or look at this "
                    f"batch's images: {names}"
                )
        seen.clear()

    def bar(self, number, images):
        """An epoch's progress bar, on a terminal and in the first process only."""
        return tqdm(
            total=images,
            desc=f"epoch {number}/{self.args.epochs}",
            unit=" images",
            unit_scale=True,
            disable=None if self.world.first else True,
            leave=False,
        )

    def show(self, bar, loss, started, number, images):
        """Write the loss and the time left of the whole training beside the bar."""
        now = time.perf_counter()
        if bar.disable or now - getattr(bar, "shown", 0) < SHOW_EVERY:
            return
        bar.shown = now
        epochs = (self.args.epochs - number) + 1 - bar.n / images
        left = tqdm.format_interval(epochs * images * (now - started) / bar.n)
        bar.set_postfix_str(f"loss {loss.item():.3f}, all epochs in {left}")

    def state(self, history):
        """What `resume` needs."""
        return {
            "net": unwrap(self.net).state_dict(),
            "mean": self.mean.state_dict() if self.mean else None,
            "optimizer": self.optimizer.state_dict(),
            "history": history,
        }

    def resume(self, run, facts):
        """Go back to what the run saved last; returns its history. Says what differs from then."""
        threads = run.opts().get("threads", facts["threads"])
        if self.world.device.type == "cpu" and threads != facts["threads"]:
            self.world.say(
                f"--resume: with {facts['threads']} threads, not {threads}: the last bits differ"
            )
        state = run.load_state(self.world.device)
        if state is None:  # stopped in its first epoch
            return []
        rates = [group["full_lr"] for group in self.optimizer.param_groups]
        try:
            unwrap(self.net).load_state_dict(state["net"])
            if self.mean:
                self.mean.load_state_dict(state["mean"])
            self.optimizer.load_state_dict(state["optimizer"])
            before, epochs = self.optimizer.param_groups[-1]["full_lr"], len(state["history"])
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                f"{run.path}: its state is not this run's ({first_line(error)}); start anew"
            ) from error
        if before != self.args.lr:
            self.world.say(f"--lr: {before} up to epoch {epochs}, {self.args.lr} from there on")
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["full_lr"] = rate
        if facts["generated"]:  # runs of older versions don't say
            for line in state["history"]:
                line.setdefault("with_generated", line["epoch"] > self.args.gan_start)
        if self.world.first:  # a kill may have come between the state and what follows from it
            publish(run, self.measured(), state["history"], self.args.save_every)
        return state["history"]


def comparing(args):
    """Whether the recipe has a loss that compares images of a batch."""
    return args.triplet > 0 or args.circle > 0


def check_split(args, world):
    """Raise UserError where batch norm would not see real and generated images as it should."""
    for flag in ("split_bn", "gan_batch"):  # of the latter one GPU would get more than others
        if getattr(args, flag) and world.gpus:
            raise UserError(
                f"--{flag}: DataParallel can't; start one process a GPU: "
                f"torchrun --nproc_per_node {len(world.gpus)}"
            )


def check_batchsize(args, world, images):
    """Raise UserError where batches can't be shared out, or hold too few images for batch norm.

    images: of which a batch can be made.
    """
    real = args.batchsize - (args.gan_batch or 0)
    parts, batchsize = max(world.size, len(world.gpus)), min(args.batchsize, images)
    if batchsize % parts:
        raise UserError(f"--batchsize: {batchsize} images can't be shared among {parts}")
    if batchsize < 2 * len(world.gpus) or batchsize < 2:
        raise UserError("--batchsize: batch norm needs two images or more, on each GPU of its own")
    if args.instances and real % args.instances:
        raise UserError(f"--instances: {real} images a batch are no multiple of it")
    if comparing(args) and args.instances < 2:
        raise UserError("--triplet and --circle compare images of an identity: add --instances 4")
    if world.gpus:
        print(
            f"warning: DataParallel: batch norm sees 1/{parts} of each batch, which cost the 2018 "
            f"code 8 points of Rank@1 on three GPUs; torchrun --nproc_per_node {parts} does not",
            file=sys.stderr,
        )


@contextmanager
def leaving_clean(run, world):
    """Training inside is ended by Ctrl-C and SIGTERM with a word on how to go on.

    What fails before the first epoch is saved leaves no run.
    """
    try:
        yield
    except KeyboardInterrupt:
        command = command_line().removesuffix(" --resume")
        raise Interrupted(
            f"stopped; all whole epochs are saved in {run.path}; go on with: {command} --resume"
        ) from None
    except Exception:
        if world.first:
            run.abandon()
        raise


def best_epoch(history):
    """The epoch with the lowest validation error, then loss; with none held out, training loss.

    That loss is another one once generated images count in it: only epochs of the newest kind are
    compared then.
    """

    def key(line):
        return line.get("val_top1err", 0), line.get("val_loss", line["train_loss"])

    newest = history[-1]
    if "val_loss" not in newest:
        kind = newest.get("with_generated")
        history = [line for line in history if line.get("with_generated") == kind]
    return min(history, key=key)["epoch"]


def publish(run, net, history, save_every):
    """Write what follows from a saved state: the epoch's weights, the log, the curves."""
    epoch = len(history)
    run.save_weights(net, "last")
    if best_epoch(history) == epoch:
        run.save_weights(net, "best")
    if epoch % save_every == 0:
        run.save_weights(net, epoch)
    run.write_log(history)
    draw_curves(history, run.file("train.jpg"))


def report(line, epochs, writer=None):
    """The epoch's figures: in one line, and for TensorBoard where asked for."""
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
    """A function that gives TensorBoard's writer; its file begins when it is first called."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs a package: pip install tensorboard") from None
    return cache(lambda: SummaryWriter(folder))
