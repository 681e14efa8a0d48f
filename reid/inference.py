"""A trained network made ready to be used: batch norm folded into the weights, these cast once."""

from itertools import pairwise

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

FUSIONS = {
    (nn.Conv2d, nn.BatchNorm2d): fuse_conv_bn_eval,
    (nn.Linear, nn.BatchNorm1d): fuse_linear_bn_eval,
}


def frozen(net, dtype=None):
    """Make a network ready for inference, in place: the same outputs, but for rounding.

    dtype: autocast's (`reid.device.arithmetic`); what autocast would cast anew for each batch, the
    weights of convolutions and linear layers, is cast now. Returns the network.
    """
    net.eval().requires_grad_(False)
    fold_batch_norms(net)
    if dtype is not None:
        for module in net.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.to(dtype)
    return net


def fold_batch_norms(net):
    """Multiply each batch norm into the layer before it, in place.

    In torchvision's ResNet and DenseNet, and in our heads, a norm that is registered right after
    a layer also takes its input from there. DenseNet's norms that stand before a ReLU and its
    convolution can't be folded, and stay.
    """
    for parent in list(net.modules()):
        for (name, layer), (norm_name, norm) in pairwise(list(parent.named_children())):
            fuse = FUSIONS.get((type(layer), type(norm)))
            if fuse:
                setattr(parent, name, fuse(layer, norm))
                setattr(parent, norm_name, nn.Identity())
