"""The training loop, one for every training script."""

import math
import time
from pathlib import Path

import torch
from tqdm import tqdm

from reid.checkpoint import Run, build_network
from reid.curves import draw_curves
from reid.dataset import fingerprint
from reid.device import arithmetic, autocast, choose_device, place, to_device
from reid.errors import UserError
from reid.files import update_results
from reid.loading import eval_loader, train_loader
from reid.transforms import train_transform, val_transform

BACKBONE_SHARE = 0.2  # of the head's learning rate: the backbone comes trained, the head does not
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
WARM_UP_FROM = 0.1


def train(args, train_samples, val_samples, class_num, loss_function):
    """Train a network and fill its run folder.

    args: options of `reid.options.add_training_options`, `add_run_options`, `add_device_options`.
    train_samples, val_samples: lists of `reid.dataset.Sample`; the second may be empty.
    loss_function: (logits, labels, generated) -> scalar, see `reid.losses`.
    """
    device, parallel_ids = choose_device(args.gpu_ids)
    dtype = arithmetic(device, args.precision, parallel_ids)
    if min(len(train_samples), args.batchsize) < 2 * max(len(parallel_ids), 1):
        raise UserError("--batchsize: batch norm needs two images or more on each GPU")
    run = Run(Path(args.model_dir) / args.name)
    options = vars(args)
    facts = {
        "loss": loss_function.__name__,
        "class_num": class_num,
        "generated": sum(sample.generated for sample in train_samples),
        "dataset": fingerprint(train_samples),
        "device": str(device),
        "arithmetic": str(dtype or torch.float32).removeprefix("torch."),
    }
    if args.resume:
        run.check_same(options, facts)
    torch.manual_seed(args.seed)
    net = build_network(args.use_dense, class_num, "none" if args.resume else args.pretrained)
    net = place(net, device, parallel_ids)
    optimizer = sgd(net, args.lr)
    if args.resume:
        history = run.load_state(net, optimizer, device)
    else:
        history = []
        run.start(options, facts)

    height, width = args.height, args.width
    transform = train_transform(height, width, args.erasing_p)
    batches = train_loader(train_samples, transform, args.batchsize, args.workers, device)
    transform = val_transform(height, width)
    val_batches = eval_loader(val_samples, transform, args.batchsize, args.workers, device)
    print(
        f"{run.path}: {len(train_samples)} images of {class_num} classes, "
        f"{len(val_samples)} held out, epochs {len(history) + 1} to {args.epochs} on {device}"
    )
    try:
        for epoch in range(len(history) + 1, args.epochs + 1):
            # Every random choice of an epoch follows from the seed and the epoch's number, so
            # that a resumed run goes on exactly as an unbroken one.
            torch.manual_seed(args.seed * 1_000_003 + epoch)
            started = time.perf_counter()
            line = {"epoch": epoch, "lr": args.lr * rate_factor(epoch - 1, args)}
            line |= train_epoch(net, batches, loss_function, optimizer, epoch, args, device, dtype)
            if val_samples:
                line |= validate(net, val_batches, device, dtype)
            line["seconds"] = round(time.perf_counter() - started, 2)
            history.append(line)
            save_epoch(run, net, optimizer, history, args.save_every)
            print_epoch(line, args.epochs)
    except BaseException:
        run.abandon()
        raise
    best = history[best_epoch(history) - 1]
    update_results(run.file("results.json"), "train", {"epochs": len(history), "best": best})
    print(f"{run.path}: best epoch {best['epoch']}, weights in net_best.pth and net_last.pth")


def train_epoch(net, batches, loss_function, optimizer, epoch, args, device, dtype):
    """One pass over the training images; returns mean loss and, of real images, top-1 error."""
    net.train()
    loss_sum = torch.zeros((), device=device)
    wrong, real = torch.zeros((2,), device=device)
    steps = len(batches)
    bar = tqdm(
        batches, desc=f"epoch {epoch}/{args.epochs}", unit="batch", disable=None, leave=False
    )
    started = time.perf_counter()
    for step, (images, labels, generated) in enumerate(bar):
        set_rate(optimizer, rate_factor(epoch - 1 + step / steps, args))
        images, labels, generated = (
            to_device(images, device),
            labels.to(device),
            generated.to(device),
        )
        with autocast(device, dtype):
            logits = net(images)
        loss = loss_function(logits, labels, generated)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        loss_sum += loss.detach()
        is_real = generated == 0
        wrong += ((logits.argmax(1) != labels) & is_real).sum()
        real += is_real.sum()
    loss = loss_sum.item() / steps  # waits for the GPU, so before the clock is read
    seconds = time.perf_counter() - started
    return {
        "train_loss": round(loss, 5),
        "train_top1err": round(wrong.item() / max(real.item(), 1), 5),
        "images_per_s": round(steps * batches.batch_size / seconds, 1),
    }


@torch.inference_mode()
def validate(net, batches, device, dtype):
    """Mean cross-entropy and top-1 error over the held-out images."""
    net.eval()
    loss_sum = wrong = 0.0
    for images, labels, _ in batches:
        labels = labels.to(device)
        with autocast(device, dtype):
            logits = net(to_device(images, device))
        loss_sum += torch.nn.functional.cross_entropy(
            logits.float(), labels, reduction="sum"
        ).item()
        wrong += (logits.argmax(1) != labels).sum().item()
    images = len(batches.dataset)
    return {"val_loss": round(loss_sum / images, 5), "val_top1err": round(wrong / images, 5)}


def sgd(net, lr):
    """Nesterov SGD with the head's and classifier's rate at `lr`, the backbone's at a fifth."""
    head = [p for name, p in net.named_parameters() if is_head(name) and p.requires_grad]
    backbone = [p for name, p in net.named_parameters() if not is_head(name) and p.requires_grad]
    groups = [
        {"params": backbone, "lr": lr * BACKBONE_SHARE, "full_lr": lr * BACKBONE_SHARE},
        {"params": head, "lr": lr, "full_lr": lr},
    ]
    return torch.optim.SGD(groups, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True)


def is_head(name):
    """Whether a parameter belongs to the bottleneck head or the classifier."""
    return name.removeprefix("module.").startswith(("model.fc.", "classifier."))


def rate_factor(epochs_done, args):
    """What the learning rate is multiplied with after `epochs_done` (a fraction) epochs."""
    factor = 0.1 ** (math.floor(epochs_done) // args.lr_step)
    if epochs_done < args.warm_epoch:
        factor *= WARM_UP_FROM + (1 - WARM_UP_FROM) * epochs_done / args.warm_epoch
    return factor


def set_rate(optimizer, factor):
    """Give each group its full rate times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["full_lr"] * factor


def best_epoch(history):
    """The epoch with the lowest validation error, then loss; with none held out, training loss."""

    def key(line):
        return line.get("val_top1err", 0), line.get("val_loss", line["train_loss"])

    return min(history, key=key)["epoch"]


def save_epoch(run, net, optimizer, history, save_every):
    """Write an epoch's weights, log and curves; last, what resumption needs."""
    epoch = len(history)
    run.save_weights(net, "last")
    if best_epoch(history) == epoch:
        run.save_weights(net, "best")
    if epoch % save_every == 0:
        run.save_weights(net, epoch)
    run.write_log(history)
    draw_curves(history, run.file("train.jpg"))
    run.save_state(net, optimizer, history)


def print_epoch(line, epochs):
    """The epoch's figures in one line."""
    text = f"epoch {line['epoch']}/{epochs}  train loss {line['train_loss']:.4f}"
    text += f" error {line['train_top1err']:.3f}"
    if "val_loss" in line:
        text += f"  val loss {line['val_loss']:.4f} error {line['val_top1err']:.3f}"
    print(f"{text}  {line['images_per_s']:.0f} images/s", flush=True)
