"""The optimizer, its learning rate over time, and the moving average (EMA) of the weights."""

import math
from argparse import Namespace

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from reid.checkpoint import unwrap

MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
WARM_UP_FROM = 0.1


def sgd(net: nn.Module, lr: float, backbone_lr: float) -> torch.optim.SGD:
    """Make Nesterov SGD: head and classifier at the rate `lr`, the backbone at a fraction of it."""
    head = [p for name, p in net.named_parameters() if is_head(name) and p.requires_grad]
    backbone = [p for name, p in net.named_parameters() if not is_head(name) and p.requires_grad]
    groups = [
        {"params": backbone, "lr": lr * backbone_lr, "full_lr": lr * backbone_lr},
        {"params": head, "lr": lr, "full_lr": lr},
    ]
    return torch.optim.SGD(groups, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True)


def is_head(name: str) -> bool:
    """Tell whether a parameter belongs to the head or the classifier, or is GeM's exponent."""
    return name.removeprefix("module.").startswith(("model.fc.", "classifier.", "pooling."))


def rate_factor(epochs_done: float, args: Namespace) -> float:
    """Return the factor of the learning rate after `epochs_done` epochs, a float."""
    if args.schedule == "cosine":
        factor = 0.5 + 0.5 * math.cos(math.pi * epochs_done / args.epochs)
    else:
        factor = 0.1 ** (math.floor(epochs_done) // args.lr_step)
    if epochs_done < args.warm_epoch:
        factor *= WARM_UP_FROM + (1 - WARM_UP_FROM) * epochs_done / args.warm_epoch
    return factor


def freeze_backbone(optimizer: torch.optim.Optimizer) -> None:
    """Leave the backbone as it is in the next step: neither weights nor momentum move."""
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = None


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Give each group its full rate times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["full_lr"] * factor


def ema(net: nn.Module, decay: float) -> AveragedModel:
    """Copy a network to hold the exponential moving average of its weights and buffers."""
    average = get_ema_multi_avg_fn(decay)

    def update(means, values, number):
        """Move means towards values; whole numbers, such as tables of places, are copied."""
        if means[0].is_floating_point():
            return average(means, values, number)
        for mean, value in zip(means, values, strict=True):
            mean.copy_(value)

    return AveragedModel(unwrap(net), multi_avg_fn=update, use_buffers=True)
