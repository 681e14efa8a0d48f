"""What a finished run says of generated images: the tables of the label rules mprl_static and sls.

A table is made once, before training; several processes share the work and come to the same.
Images are seen as in validation, at the size that the finished run was trained on, in fp32.
"""

from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from reid.checkpoint import Run, load_network
from reid.dataset import classes_hash
from reid.device import place
from reid.errors import UserError
from reid.features import extract
from reid.files import read_results
from reid.loading import EvalBatches
from reid.losses import ranks
from reid.transforms import normalise, val_transform

NEED_A_RUN = ("mprl_static", "sls")  # the rules that take their table from one
STARTS = 10  # of k-means, the best of which counts


def label_run(args):
    """Path of the weights of the run that --label_run names: net_last.pth.

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


class Describer:
    """A finished run's network, and the images it is shown.

    args: options of train_lsro.py; class_num, real: K and the Samples of the identities that the
    network must have been trained on.
    """

    def __init__(self, args, class_num, real, world):
        weights = label_run(args)
        net = load_network(weights)
        outputs = net.classifier[0].out_features
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
        self.transform = val_transform(options.get("height", 256), options.get("width", 128))
        self.net = place(net, world.device).eval()
        self.args, self.class_num, self.world = args, class_num, world

    def rank_table(self, generated):
        """For mprl_static: ranks of the probabilities predicted for Samples, int32 [N, K]."""
        images = self.batches(generated)
        quiet = None if self.world.first else True
        found = [torch.empty(0, self.class_num, dtype=torch.int)]
        bar = tqdm(total=len(images.paths), desc="ranks", disable=quiet)
        with self.world.together(), torch.no_grad(), bar:
            for batch in images:
                found.append(ranks(self.net(normalise(batch))).int().cpu())
                bar.update(len(batch))
        return self.whole(torch.cat(found), len(generated))

    def cluster_table(self, real, generated):
        """For sls: 1 at each identity with an image in the Sample's cluster, uint8 [N, K]."""
        both = [self.features(real, "real"), self.features(generated, "generated")]
        table = torch.zeros(len(generated), self.class_num, dtype=torch.uint8)
        with self.world.together():
            if self.world.first:  # another machine might round, and decide, otherwise
                members = torch.zeros(self.args.clusters, self.class_num, dtype=torch.uint8)
                of_real, of_generated = nearest_centres(*both, self.args.clusters, self.args.seed)
                members[of_real, [sample.label for sample in real]] = 1
                table = members[of_generated]
        return self.world.sum(table.to(self.world.device))

    def features(self, samples, label):
        """L2-normalised features as `reid.features` has them: an array, float32 [N, D]."""
        label = label if self.world.first else None
        with self.world.together():
            share = extract(self.net, self.batches(samples), None, label)
        return self.whole(torch.from_numpy(share), len(samples)).cpu().numpy()

    def batches(self, samples):
        """This process's share of the images."""
        paths = [sample.path for sample in self.world.share(samples)]
        size, workers = self.args.batchsize, self.args.workers
        return EvalBatches(paths, self.transform, size, workers, self.world.device)

    def whole(self, share, number):
        """All `number` rows, on the device, from each process's share of them."""
        rows = self.world.share(range(number))
        whole = torch.zeros(number, share.shape[1], dtype=share.dtype, device=self.world.device)
        whole[rows.start : rows.stop] = share.to(self.world.device)
        return self.world.sum(whole)


def nearest_centres(real, generated, clusters, seed):
    """k-means over rows of `real` [R, D]: the nearest centre of each row, and of `generated`'s."""
    try:
        from sklearn.cluster import KMeans
        from threadpoolctl import threadpool_limits
    except ImportError:
        raise UserError("--gan_label sls needs a package: pip install scikit-learn") from None
    different = len(np.unique(real, axis=0))
    if clusters > different:
        raise UserError(f"--clusters {clusters}: only {different} real images differ; lower it")
    with threadpool_limits(1):  # threads add up in any order, which shows in the last digits
        means = KMeans(clusters, n_init=STARTS, random_state=seed).fit(real)
        return means.predict(real), means.predict(generated)
