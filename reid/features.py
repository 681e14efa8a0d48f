"""Features of images, extracted with a trained network. (`reid.mat` has the files they go to.)"""

import torch
import torch.nn.functional as F
from tqdm import tqdm

from reid.device import autocast, to_device


@torch.inference_mode()
def extract(net, loader, device, dtype, label):
    """L2-normalised features of a loader's images, float32 [N, D], in the loader's order.

    The features of an image and of its mirror image are added before normalising. `label` names
    the progress bar; `dtype` is autocast's, see `reid.device.arithmetic`.
    """
    net.eval()
    features = []
    with tqdm(total=len(loader.dataset), desc=label, unit="image", disable=None) as bar:
        for images, *_ in loader:
            images = to_device(images, device)
            with autocast(device, dtype):
                both = [net(view, return_features=True) for view in (images, images.flip(3))]
            both = both[0].float() + both[1].float()
            features.append(F.normalize(both).cpu())
            bar.update(len(images))
    return torch.cat(features).numpy()
