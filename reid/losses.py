"""Losses over real and generated images, one interface: (logits, labels, generated) -> scalar.

logits: [B, K], any floating type; labels: int [B], the class of each real image (of a generated
one it is a marker and never read); generated: [B], 1 where a GAN made the image, 0 where it is
real. Each loss is the mean over the batch.
"""

import torch
import torch.nn.functional as F


def cross_entropy(logits, labels, generated):
    """Cross-entropy over real images, the baseline's loss."""
    return F.cross_entropy(logits.float(), labels)


def lsro(logits, labels, generated):
    """Label smoothing regularisation for outliers (Zheng et al., ICCV 2017, equation 6).

    A real image has its class as the target, a generated one the uniform distribution over all:
    -(1 - z) log p(y) - z / K sum_k log p(k), with z = 1 for generated images.
    """
    log_p = F.log_softmax(logits.float() if logits.dtype != torch.float64 else logits, dim=1)
    generated = generated.bool()
    # The marker is no class, so it is swapped for any valid one before the look-up.
    real_loss = -log_p.gather(1, labels.masked_fill(generated, 0)[:, None])[:, 0]
    return torch.where(generated, -log_p.mean(dim=1), real_loss).mean()
