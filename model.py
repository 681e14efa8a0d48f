"""The two re-ID networks: ft_net (ResNet-50) and ft_net_dense (DenseNet-121).

Each is a backbone to its global average pooling, then the bottleneck head, then the classifier:

    image [B, 3, H, W] -> pooled feature [B, 2048 or 1024]
                       -> Linear 512, BatchNorm1d, LeakyReLU 0.1, Dropout 0.5 -> Linear K

Parameter names and shapes are those of the 2018 Person-reid-GAN-pytorch, so that its weights load.

    net = ft_net_dense(751)
    logits = net(images)                           # [B, 751], for training
    features = net(images, return_features=True)   # [B, 1024], for testing
"""

import re
from pathlib import Path

import torch
from torch import nn
from torchvision import models

BOTTLENECK_DIM = 512


class ReIDNet(nn.Module):
    """What both networks share: images [B, 3, H, W] to logits or, for testing, to features."""

    def forward(self, images, return_features=False):
        """Logits [B, class_num], or the pooled features [B, feature_dim]."""
        features = self.pool(images)
        if return_features:
            return features
        return self.classifier(self.model.fc(features))


class ft_net(ReIDNet):
    """ResNet-50 for `class_num` identities; features of 2048 numbers.

    `pretrained` fills the backbone: None (random), "imagenet" (torchvision's weights, downloaded
    on first use) or a weights file; see `load_backbone`.
    """

    feature_dim = 2048

    def __init__(self, class_num, pretrained=None):
        super().__init__()
        self.model = models.resnet50(weights=_imagenet(pretrained, models.ResNet50_Weights))
        self.model.fc = bottleneck(self.feature_dim)
        self.classifier = classifier(class_num)
        if pretrained not in (None, "imagenet"):
            load_backbone(self, pretrained)

    def pool(self, images):
        """Global-average-pooled feature maps: [B, 3, H, W] -> [B, 2048]."""
        net = self.model
        x = net.maxpool(net.relu(net.bn1(net.conv1(images))))
        x = net.layer4(net.layer3(net.layer2(net.layer1(x))))
        return net.avgpool(x).flatten(1)


class ft_net_dense(ReIDNet):
    """DenseNet-121 for `class_num` identities; features of 1024 numbers. Used like `ft_net`."""

    feature_dim = 1024

    def __init__(self, class_num, pretrained=None):
        super().__init__()
        self.model = models.densenet121(weights=_imagenet(pretrained, models.DenseNet121_Weights))
        # DenseNet's own ImageNet classifier is never used; it stays because the original's files
        # hold it. Without gradients, neither weight decay nor an optimiser's state touches it.
        self.model.classifier.requires_grad_(False)
        self.model.fc = bottleneck(self.feature_dim)
        self.classifier = classifier(class_num)
        if pretrained not in (None, "imagenet"):
            load_backbone(self, pretrained)

    def pool(self, images):
        """Global-average-pooled feature maps: [B, 3, H, W] -> [B, 1024].

        As in the original, pooling follows the last batch norm directly (torchvision's classifier
        has a ReLU between the two).
        """
        return self.model.features(images).mean(dim=(2, 3))


def bottleneck(in_dim):
    """The head between pooled features and classifier: [B, in_dim] -> [B, 512]."""
    linear, norm = nn.Linear(in_dim, BOTTLENECK_DIM), nn.BatchNorm1d(BOTTLENECK_DIM)
    nn.init.kaiming_normal_(linear.weight, mode="fan_out")
    nn.init.zeros_(linear.bias)
    nn.init.normal_(norm.weight, mean=1.0, std=0.02)
    return nn.Sequential(linear, norm, nn.LeakyReLU(0.1), nn.Dropout(0.5))


def classifier(class_num):
    """Linear layer to `class_num` logits, started near zero so that training begins even."""
    linear = nn.Linear(BOTTLENECK_DIM, class_num)
    nn.init.normal_(linear.weight, std=0.001)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(linear)


def load_backbone(net, path):
    """Fill the backbone of `net` from a file: torchvision's weights for it, or a `net_*.pth`.

    Head and classifier keep their start values. Raises ValueError where the file is no weights
    file, or holds another network's weights.
    """
    weights = read_weights(path)
    if any(name.startswith("model.") for name in weights):  # a re-ID checkpoint
        weights = {
            name.removeprefix("model."): value
            for name, value in weights.items()
            if name.startswith("model.")
        }
    weights = {name: value for name, value in weights.items() if not name.startswith("fc.")}
    # DenseNet files as torchvision serves them say "norm.1", its modules are called "norm1".
    weights = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", name): value
        for name, value in weights.items()
    }
    wanted = {
        name: value for name, value in net.model.state_dict().items() if not name.startswith("fc.")
    }
    # Files older than PyTorch 0.4.1 lack these counters, which nothing here reads.
    missing = [name for name in wanted.keys() - weights.keys() if "num_batches" not in name]
    wrong = [
        name for name in wanted.keys() & weights.keys() if wanted[name].shape != weights[name].shape
    ]
    extra = weights.keys() - wanted.keys()
    if missing or wrong or extra:
        raise ValueError(f"{path}: not the weights of a {type(net.model).__name__} backbone")
    net.model.load_state_dict(weights, strict=False)


def read_weights(path):
    """The state_dict in a weights file, on the CPU, without DataParallel's `module.` prefix.

    Raises ValueError for a file that is missing, damaged, or holds something else.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such weights file")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise ValueError(f"{path}: not a readable PyTorch weights file") from error
    if not isinstance(weights, dict) or not all(torch.is_tensor(v) for v in weights.values()):
        raise ValueError(f"{path}: holds no plain state_dict")
    return {name.removeprefix("module."): value for name, value in weights.items()}


def _imagenet(pretrained, weights):
    return weights.IMAGENET1K_V1 if pretrained == "imagenet" else None
