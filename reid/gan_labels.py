"""A finished run as teacher of generated images: targets of mprl_static, sls and teacher.

(All label rules are in `reid.losses`.) These targets are computed once, before training; several
processes share the work, and come to the same but for rounding.
Images are seen at the size that the finished run was trained on, people as large as it saw them in
training (the middle of the enlarged image), without autocast.
"""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from reid.checkpoint import Run
from reid.dataset import Sample, classes_hash, count_classes
from reid.device import to_device
from reid.distributed import World
from reid.errors import UserError, missing_package
from reid.features import extract
from reid.files import read_results
from reid.loading import EvalBatches
from reid.losses import ranks
from reid.options import HEIGHT, WIDTH
from reid.transforms import normalise, transform_for_testing
from reid.weights import load_network

STARTS = 10  # of k-means, the best of which counts


def label_weights(args: Namespace) -> Path:
    """Return the path of the weights of the run that --label_run names: net_last.pth.

    Raises UserError where there is none, or its training is not finished.
    """
    run = Run(Path(args.model_dir) / args.label_run)
    weights = run.file("net_last.pth")
    if not weights.exists():
        raise UserError(
            f"--label_run {args.label_run}: no such file as {weights}; name a finished run"
        )
    if run.opts() and "train" not in read_results(run.file("results.json")):
        raise UserError(f"--label_run {args.label_run}: its training is not finished; --resume it")
    return weights


class Teacher:
    """A finished run's network, which decides the targets of generated images.

    args: options of train_lsro.py; real: the Samples of the identities that the network must have
    been trained on. Raises UserError where it was trained on others.
    """

    def __init__(self, args: Namespace, real: list[Sample], world: World):
        weights = label_weights(args)
        net = load_network(weights)
        outputs, class_num = net.classifier[0].out_features, count_classes(real)
        if outputs != class_num:
            raise UserError(
                f"--label_run {args.label_run}: its network has {outputs} classes, the images "
                f"here {class_num}; name a run on the same identities"
            )
        opts = Run(weights.parent).opts()
        classes = classes_hash(real)
        if opts.get("classes_sha256", classes) != classes:  # runs of older versions don't say
            raise UserError(
                f"--label_run {args.label_run}: its classes are other identities than those here; "
                "name a run on the same"
            )
        options = opts.get("options", {})
        size = options.get("height", HEIGHT), options.get("width", WIDTH)
        self.transform = transform_for_testing("center", *size)
        self.net = to_device(net, world.device).eval()
        self.args, self.class_num, self.world = args, class_num, world

    def targets(self, rule: str, real: list[Sample], generated: list[Sample]) -> Tensor:
        """Return the targets' weights by a rule's name: [N, K], see `losses.FixedTargets`."""
        if rule == "mprl_static":
            return self.predicted(generated, lambda logits: ranks(logits).int())
        if rule == "teacher":
            return self.predicted(generated, lambda logits: logits.softmax(dim=1))
        if rule == "sls":
            return self.cluster_table(real, generated)
        raise ValueError(f"rule {rule!r}: a Teacher has no targets for it")

    def predicted(self, generated: list[Sample], of_logits: Callable) -> Tensor:
        """Return what `of_logits` makes of the logits [N, K] that it predicts for Samples."""
        args, world = self.args, self.world
        paths = [sample.path for sample in world.shard(generated)]
        images = EvalBatches(paths, self.transform, args.batchsize, args.workers, world.device)
        # The first has type and width also where this process has no images.
        rows = [of_logits(torch.empty(0, self.class_num))]
        quiet = None if world.first else True
        bar = tqdm(total=len(paths), desc="targets", unit="image", disable=quiet)
        with world.together(), torch.no_grad(), bar:
            for batch in images:
                logits = self.net(normalise(batch, *self.net.normalisation))
                rows.append(of_logits(logits).cpu())
                bar.update(len(batch))
        return world.gather_rows(torch.cat(rows).to(world.device), len(generated))

    def cluster_table(self, real: list[Sample], generated: list[Sample]) -> Tensor:
        """Return, for sls, 1 at each identity with an image in the image's cluster: uint8 [N, K].

        real, generated: Samples.
        """
        features = [self.features(real, "real"), self.features(generated, "generated")]
        table = torch.zeros(len(generated), self.class_num, dtype=torch.uint8)
        with self.world.together():
            if self.world.first:  # another machine might round, and decide, otherwise
                members = torch.zeros(self.args.clusters, self.class_num, dtype=torch.uint8)
                clusters = nearest_centres(*features, self.args.clusters, self.args.seed)
                members[clusters[0], [sample.label for sample in real]] = 1
                table = members[clusters[1]]
        return self.world.sum(table.to(self.world.device))

    def features(self, samples, label):
        """Extract the features of Samples: float32 [N, D] in the first process, else None."""
        return extract(
            self.net,
            [sample.path for sample in samples],
            [self.transform],
            self.world,
            dtype=None,
            batchsize=self.args.batchsize,
            workers=self.args.workers,
            label=label,
        )


def nearest_centres(
    real: np.ndarray, generated: np.ndarray, clusters: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Cluster rows of `real` [R, D] by k-means.

    Returns the number of the nearest centre of each row, and of each row of `generated`.
    """
    try:
        from sklearn.cluster import KMeans
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise missing_package("--gan_label sls", "scikit-learn") from error
    different = len(np.unique(real, axis=0))
    if clusters > different:
        raise UserError(f"--clusters {clusters}: only {different} real images differ; lower it")
    with threadpool_limits(1):  # threads add up in any order, which shows in the last digits
        means = KMeans(clusters, n_init=STARTS, random_state=seed).fit(real)
        return means.predict(real), means.predict(generated)
