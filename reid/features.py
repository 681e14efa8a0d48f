"""Features of images, extracted with a trained network. (`reid.mat` has the files they go to.)"""

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from reid.device import autocast
from reid.transforms import normalise


@torch.inference_mode()
def extract(net, batches, device, dtype, label):
    """L2-normalised features of the images in `batches`, float32 [N, D], in their order.

    batches: `reid.loading.EvalBatches`. The features of an image and of its mirror image are
    added before normalising. `label` names the progress bar, None: no bar; `dtype` is
    autocast's, see `reid.device.arithmetic`.
    """
    net.eval()
    features = []
    quiet = label is None or None
    with tqdm(total=len(batches.paths), desc=label, unit="image", disable=quiet) as bar:
        for images in batches:
            views = torch.cat([images, images.flip(2)])
            with autocast(device, dtype):
                both = net(normalise(views), return_features=True).float().chunk(2)
            features.append(F.normalize(both[0] + both[1]).cpu())
            bar.update(len(images))
    if not features:  # more processes than images
        return np.empty((0, net.feature_dim), np.float32)
    return torch.cat(features).numpy()
