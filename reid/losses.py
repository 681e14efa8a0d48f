"""Losses, of two kinds.

Over logits, with one interface: (logits, labels, generated, smoothing=0, epoch=1) -> scalar.
logits: [B, K], any floating type; labels: int [B], the class of each real image; of generated
image number n it is the marker -1 - n, which no loss reads as a class; generated: [B], 1 where a
GAN made the image, 0 where it is real. Each loss is the mean over the batch. smoothing (Szegedy et
al. 2016): the fraction of a real image's target that is spread evenly over all identities. epoch:
from 1, for losses in which generated images count from some epoch on.
`cross_entropy` is the baseline's; a `LabelRule` decides what generated images are taught.

Over features: `MetricLoss`, which compares the images of a batch.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from reid.errors import missing_package

TRIPLET_MARGIN = 0.3  # Hermans et al. 2017; Luo et al. 2019
CIRCLE_MARGIN, CIRCLE_SCALE = 0.25, 128  # Sun et al. 2020, section 4.1, for re-ID
OWN_SMOOTHING = 0.1  # of generated images that have a class; Zhong et al. 2018


def cross_entropy(
    logits: Tensor, labels: Tensor, generated: Tensor, smoothing: float = 0.0, epoch: int = 1
) -> Tensor:
    """Return the cross-entropy over real images, the baseline's loss."""
    return F.cross_entropy(at_least_fp32(logits), labels, label_smoothing=smoothing)


class LabelRule:
    """Cross-entropy with a rule for generated images: the mean over the batch of

        -log p(y)               for a real image of class y
        -w sum_k q_k log p(k)   for a generated one, q = its row of target(logits, labels)

    name: the rule's, which a resumed run must share. target: function of detached logits [B, K] and
    labels [B] that returns q [B, K]; rows of real images are finite and not read. weight: w, which
    is 0 up to epoch `start`. extra: number of last outputs of the network that are no identities.
    """

    def __init__(
        self,
        name: str,
        target: Callable[[Tensor, Tensor], Tensor],
        weight: float = 1.0,
        start: int = 0,
        extra: int = 0,
    ):
        self.__name__ = name
        self.target, self.weight, self.start, self.extra = target, weight, start, extra

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        generated: Tensor,
        smoothing: float = 0.0,
        epoch: int = 1,
    ) -> Tensor:
        logits = at_least_fp32(logits)
        log_p = F.log_softmax(logits, dim=1)
        generated = generated.bool()
        # The marker is no class, so it is swapped for any valid one before the look-up.
        real_loss = -log_p.gather(1, labels.masked_fill(generated, 0)[:, None])[:, 0]
        even_loss = -log_p[:, : log_p.shape[1] - self.extra].mean(dim=1)
        real_loss = (1 - smoothing) * real_loss + smoothing * even_loss
        weight = self.weight if epoch > self.start else 0.0
        generated_loss = -weight * (self.target(logits.detach(), labels) * log_p).sum(dim=1)
        return torch.where(generated, generated_loss, real_loss).mean()


def label_rule(name: str, weight: float = 1.0, start: int = 0) -> LabelRule:
    """Return the `LabelRule` of that name.

    lsro: uniform (Zheng et al., ICCV 2017, equation 6). all_in_one: one class more than there are
    identities (Salimans et al. 2016). pseudo: the network's current arg-max (Lee 2013).
    mprl_dynamic, mprl_static: in proportion to the rank of the predicted probability, of the
    network as it is or of a finished run's (Huang et al. 2018, multi-pseudo regularised label).
    sls: uniform over the identities in the image's cluster of a finished run's features (Ainam et
    al. 2018, sparse label smoothing). teacher: the probabilities that a finished run predicts
    (Zheng et al. 2019, "Joint Discriminative and Generative Learning", section 3.2).
    consistency: those that the running mean of the weights predicts for another view of the image
    (Tarvainen and Valpola 2017, "Mean teachers are better role models"). own: the class that the
    image was generated for, smoothed by 0.1 (Zhong et al. 2018, "Camera Style Adaptation").

    mprl_static, sls, teacher and own have a `FixedTargets`, to be filled before training;
    consistency has a `MeanTargets`, to be filled in each step.
    """
    target = RULES[name]
    if isinstance(target, type):  # it has to be filled
        target = target()
    extra = 1 if target is last_class else 0
    return LabelRule(name, target, weight, start, extra)


# --- targets of generated images ----------------------------------------------------------------


def uniform(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the same probability for all classes."""
    return torch.full_like(logits, 1 / logits.shape[1])


def last_class(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the last output, a class of its own for all that is generated."""
    return one_hot(torch.full_like(labels, logits.shape[1] - 1), logits)


def most_probable(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the class that the network holds most probable now."""
    return one_hot(logits.argmax(dim=1), logits)


def by_rank(logits: Tensor, labels: Tensor) -> Tensor:
    """Return probabilities in proportion to the rank of those that the network predicts now."""
    return distributions(ranks(logits), logits)


class FixedTargets:
    """Targets that are fixed before training: a distribution for each generated image.

    weights: [N, K], on the logits' device; row n, over its sum, is image n's.
    """

    weights = None

    def __call__(self, logits, labels):
        return distributions(self.weights[(-1 - labels).clamp(min=0)], logits)


class MeanTargets:
    """Targets that the running mean of the weights predicts in each step.

    logits: [B, K], of the mean network for other views of the batch's images.
    """

    logits = None

    def __call__(self, logits, labels):
        return self.logits.to(logits.dtype).softmax(dim=1)


# The target function of each label rule, or the class of one that has to be filled.
RULES = {
    "lsro": uniform,
    "all_in_one": last_class,
    "pseudo": most_probable,
    "mprl_static": FixedTargets,
    "mprl_dynamic": by_rank,
    "sls": FixedTargets,
    "teacher": FixedTargets,
    "consistency": MeanTargets,
    "own": FixedTargets,
}


def needs_a_run(rule: str) -> bool:
    """Tell whether a finished run decides the targets of a label rule."""
    return rule in ("mprl_static", "sls", "teacher")


def own_class(classes: Sequence[int], class_num: int) -> Tensor:
    """Return weights of `FixedTargets` by the rule `own`, of N images' classes: float32 [N, K]."""
    rows = F.one_hot(torch.as_tensor(classes, dtype=torch.long), class_num)
    return (1 - OWN_SMOOTHING) * rows + OWN_SMOOTHING / class_num


def ranks(logits: Tensor) -> Tensor:
    """Rank the classes: int64 [B, K], 1 for the least probable, K for the most.

    Of two equal ones the lower class number has the lower rank.
    """
    return logits.argsort(dim=1, stable=True).argsort(dim=1) + 1


def distributions(weights, like):
    """Scale rows of weights [B, K] to sums of 1, in the type of the tensor `like`."""
    weights = weights.to(like.dtype)
    return weights / weights.sum(dim=1, keepdim=True)


def one_hot(classes, like):
    """Return rows [B, K] with a 1 at `classes` [B], of the shape and type of the tensor `like`."""
    return torch.zeros_like(like).scatter_(1, classes[:, None], 1)


def at_least_fp32(x: Tensor) -> Tensor:
    """Convert a tensor to fp32 unless it is fp64: bf16 has not the digits for a loss."""
    return x if x.dtype == torch.float64 else x.float()


# --- losses over features -----------------------------------------------------------------------


class MetricLoss:
    """A weighted sum of losses that compare features of real images: (features, labels, generated).

    triplet: weight of the triplet loss with the hardest positive and negative of the batch
        (Hermans et al. 2017), over Euclidean distances; its mean is over the triplets that still
        violate the margin, not over all.
    circle: weight of the circle loss (Sun et al. 2020), over cosine similarities.
    Both come from pytorch-metric-learning. features: [B, D]; the others as above.
    """

    def __init__(self, triplet: float = 0.0, circle: float = 0.0):
        try:
            from pytorch_metric_learning import distances, losses, miners
        except ImportError as error:
            flags = "--triplet and --circle"
            raise missing_package(flags, "pytorch-metric-learning") from error
        distance = distances.LpDistance(normalize_embeddings=False)
        self.miner = miners.BatchHardMiner(distance=distance)
        self.triplet = losses.TripletMarginLoss(margin=TRIPLET_MARGIN, distance=distance)
        self.circle = losses.CircleLoss(m=CIRCLE_MARGIN, gamma=CIRCLE_SCALE)
        self.weights = triplet, circle

    def __call__(self, features: Tensor, labels: Tensor, generated: Tensor) -> Tensor:
        real = generated == 0
        features, labels = at_least_fp32(features)[real], labels[real]
        triplet, circle = self.weights
        loss = features.sum() * 0  # a batch may have nothing to compare
        if triplet and len(features):
            loss = loss + triplet * self.triplet(features, labels, self.miner(features, labels))
        if circle and len(features):
            loss = loss + circle * self.circle(features, labels)
        return loss
