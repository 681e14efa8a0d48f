"""Training from start to end, for every training script: checks, the run folder, epoch by epoch."""

import copy
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

from reid.batches import batch_options, check_balance, check_batchsize, check_data_parallel
from reid.checkpoint import Run, weights_hash
from reid.curves import draw_curves
from reid.dataset import (
    Splits,
    classes_hash,
    count_classes,
    datasets_read,
    fingerprint,
    manifest,
    prepared_folders,
    prepared_hash,
)
from reid.device import computes_bf16, device_name, dtype_for, dtype_name, faster_dtype
from reid.distributed import World, leave_world
from reid.errors import Interrupted, UserError, first_line, missing_package, say
from reid.files import sha256, update_results
from reid.gan_labels import label_weights
from reid.learner import Learner
from reid.provenance import command_line
from reid.selection import choose_testing, queries_and_gallery
from reid.transforms import transform_for_testing
from reid.weights import as_user_errors, build_network


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
