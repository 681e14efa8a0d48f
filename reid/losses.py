"""Losses. Over logits: one interface, (logits, labels, generated, smoothing=0) -> scalar.

logits: [B, K], any floating type; labels: int [B], the class of each real image (of a generated
one it is a marker and never read); generated: [B], 1 where a GAN made the image, 0 where it is
real. Each loss is the mean over the batch. smoothing (Szegedy et al. 2016): the share of a real
image's target that is spread evenly over all classes.

Over features: `MetricLoss`.
"""

import torch
import torch.nn.functional as F

from reid.errors import UserError

TRIPLET_MARGIN = 0.3  # Hermans et al. 2017; Luo et al. 2019
CIRCLE_MARGIN, CIRCLE_SCALE = 0.25, 128  # Sun et al. 2020, section 4.1, for re-ID


def cross_entropy(logits, labels, generated, smoothing=0.0):
    """Cross-entropy over real images, the baseline's loss."""
    return F.cross_entropy(full(logits), labels, label_smoothing=smoothing)


def lsro(logits, labels, generated, smoothing=0.0):
    """Label smoothing regularisation for outliers (Zheng et al., ICCV 2017, equation 6).

    A real image has its class as the target, a generated one the uniform distribution over all:
    -(1 - z) log p(y) - z / K sum_k log p(k), with z = 1 for generated images.
    """
    log_p = F.log_softmax(full(logits), dim=1)
    generated = generated.bool()
    # The marker is no class, so it is swapped for any valid one before the look-up.
    real_loss = -log_p.gather(1, labels.masked_fill(generated, 0)[:, None])[:, 0]
    even_loss = -log_p.mean(dim=1)
    real_loss = (1 - smoothing) * real_loss + smoothing * even_loss
    return torch.where(generated, even_loss, real_loss).mean()


def full(x):
    """At least in fp32: bf16 has not the digits for a loss."""
    return x if x.dtype == torch.float64 else x.float()


class MetricLoss:
    """Losses that compare features of real images, weighted: (features, labels, generated).

    triplet: weight of the triplet loss with the hardest positive and negative of the batch
        (Hermans et al. 2017), over Euclidean distances.
    circle: weight of the circle loss (Sun et al. 2020), over cosine similarities.
    Both come from pytorch-metric-learning. features: [B, D]; the others as above.
    """

    def __init__(self, triplet=0.0, circle=0.0):
        try:
            from pytorch_metric_learning import distances, losses, miners
        except ImportError:
            raise UserError(
                "--triplet and --circle need a package: pip install pytorch-metric-learning"
            ) from None
        distance = distances.LpDistance(normalize_embeddings=False)
        self.miner = miners.BatchHardMiner(distance=distance)
        self.triplet = losses.TripletMarginLoss(margin=TRIPLET_MARGIN, distance=distance)
        self.circle = losses.CircleLoss(m=CIRCLE_MARGIN, gamma=CIRCLE_SCALE)
        self.weights = triplet, circle

    def __call__(self, features, labels, generated):
        real = generated == 0
        features, labels = full(features)[real], labels[real]
        triplet, circle = self.weights
        loss = features.sum() * 0  # a batch may have nothing to compare
        if triplet and len(features):
            loss = loss + triplet * self.triplet(features, labels, self.miner(features, labels))
        if circle and len(features):
            loss = loss + circle * self.circle(features, labels)
        return loss
