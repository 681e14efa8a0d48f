"""int8 for ONNX Runtime: the operators to quantise, and a network rewritten to make them fast.

Static quantisation in QDQ format: uint8 activations, asymmetric, with ranges from the smallest to
the largest value that real training images give; int8 weights, symmetric, a scale a channel. These
are the forms that x86's VNNI instructions multiply. The head after the pooling of maps stays fp32;
of networks that pool tokens (ViT) everything is quantised.
"""

import tempfile
from pathlib import Path

import numpy as np
import onnx
import torch
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)
from torch import nn
from tqdm import tqdm

from reid.exporting.network import INPUT, network_input, quiet

BATCH = 32  # images in a step of the calibration
# All of these, or values would go to fp32 and back between two of them.
OPERATORS = ("Conv", "Relu", "Clip", "MaxPool", "Concat", "Add", "MatMul", "Gemm")
POOLING = "ReduceMean"  # of feature maps: the last one in a graph; those before weigh channels


def as_convolutions(net: nn.Module) -> nn.Module:
    """Put depthwise convolutions in place of norms and average pooling, in place.

    Norms that stand before a ReLU, DenseNet's, can't be folded; in fp32 between integer
    convolutions they would take a third of the time. A weight alone in its channel is exact in
    int8. Takes nothing from a network without such layers. Not for timm's networks, whose norms may
    have an activation inside. Returns the network.
    """
    for parent in list(net.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, nn.BatchNorm2d):
                setattr(parent, name, norm_as_convolution(layer))
            elif isinstance(layer, nn.AvgPool2d):  # model.py has it before the convolution
                setattr(parent, name, average_as_convolution(layer, parent.conv.in_channels))
    return net


def norm_as_convolution(norm):
    """Convert a batch norm in eval mode to a 1 x 1 convolution."""
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    shift = norm.bias - norm.running_mean * scale
    return single_channels(scale[:, None, None, None], shift)


def average_as_convolution(pool, channels):
    """Convert an average over squares to a convolution."""
    size = pool.kernel_size
    weight = torch.full((channels, 1, size, size), 1 / size**2)
    return single_channels(weight, None, pool.stride)


def single_channels(weight, bias, stride=1):
    """Make a convolution of each channel by itself. weight [C, 1, k, k], bias [C] or None."""
    channels, _, *kernel = weight.shape
    layer = nn.Conv2d(channels, channels, kernel, stride, groups=channels, bias=bias is not None)
    layer.weight.data = weight.detach().clone()
    if bias is not None:
        layer.bias.data = bias.detach().clone()
    return layer.requires_grad_(False)


def quantised(model: onnx.ModelProto, images: list[np.ndarray], facts: dict) -> onnx.ModelProto:
    """Quantise an fp32 ModelProto to int8.

    images: resized training images uint8 [H, W, 3] to take the activations' ranges from. facts: the
    file's `metadata`.
    """
    with tempfile.TemporaryDirectory() as folder, quiet():
        path = Path(folder) / "int8.onnx"
        quantize_static(
            model,
            path,
            Calibration(images, facts),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(OPERATORS),
            nodes_to_quantize=backbone_nodes(model),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return onnx.load(path)


def backbone_nodes(model):
    """Return the names of the nodes to quantise, those before the pooling; of tokens, all."""
    nodes = list(model.graph.node)
    pools = [number for number, node in enumerate(nodes) if node.op_type == POOLING]
    end = pools[-1] if pools else len(nodes)
    return [node.name for node in nodes[:end] if node.op_type in OPERATORS]


class Calibration(CalibrationDataReader):
    """Training images in batches, as ONNX Runtime's quantisation asks for them."""

    def __init__(self, images, facts):
        starts = range(0, len(images), BATCH)
        bar = tqdm(starts, "calibration", unit="batch", disable=None, leave=False)
        self.batches = ({INPUT: network_input(images[n : n + BATCH], facts)} for n in bar)

    def get_next(self):
        """Return the next batch; None at the end."""
        return next(self.batches, None)
