"""How weights move: the optimiser, its learning rate over time, a running mean of the weights."""

import math

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from reid.checkpoint import unwrap

BACKBONE_SHARE = 0.2  # of the head's learning rate: the backbone comes trained, the head does not
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
WARM_UP_FROM = 0.1


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
    """Whether a parameter belongs to the head or the classifier."""
    return name.removeprefix("module.").startswith(("model.fc.", "classifier."))


def rate_factor(epochs_done, args):
    """What the learning rate is multiplied with after `epochs_done` (a fraction) epochs."""
    if args.schedule == "cosine":
        factor = 0.5 + 0.5 * math.cos(math.pi * epochs_done / args.epochs)
    else:
        factor = 0.1 ** (math.floor(epochs_done) // args.lr_step)
    if epochs_done < args.warm_epoch:
        factor *= WARM_UP_FROM + (1 - WARM_UP_FROM) * epochs_done / args.warm_epoch
    return factor


def freeze_backbone(optimizer):
    """Leave the backbone as it is in the next step: neither weights nor momentum move."""
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = None


def set_rate(optimizer, factor):
    """Give each group its full rate times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["full_lr"] * factor


def ema(net, decay):
    """A copy of the network to hold the exponential mean of its weights and buffers."""
    return AveragedModel(unwrap(net), multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
