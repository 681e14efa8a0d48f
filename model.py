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
from torch import Tensor, nn
from torchvision import models

BOTTLENECK_DIM = 512
LAYERS = ("pool", "bottleneck")


class ReIDNet(nn.Module):
    """The parts that both networks have: images [B, 3, H, W] to logits or, in testing, features.

    neck: "bottleneck" as above, or "bnneck" (Luo et al. 2019, "Bag of Tricks"): one batch norm
        between the pooled feature and a classifier without bias.
    pooling: "avg", or "gem" (Radenovic et al. 2018), the generalised mean with a learnt exponent.
    last_stride: 2, or 1 to keep the last stage's feature maps at twice the size (Sun et al. 2018).
    """

    def _add_head(self, class_num, neck, pooling, last_stride):
        bnneck = neck == "bnneck"
        self.model.fc = (
            batch_norm_neck(self.feature_dim) if bnneck else bottleneck(self.feature_dim)
        )
        dim = self.feature_dim if bnneck else BOTTLENECK_DIM
        self.classifier = classifier(class_num, dim, bias=not bnneck)
        self.bnneck = bnneck
        self.pooling = GeM() if pooling == "gem" else GlobalAverage()
        self.last_stride = last_stride
        if last_stride == 1:  # no weight shows it, so that a weights file would not tell
            self.register_buffer("stride_1", torch.ones(()))

    def forward(
        self,
        images: Tensor,
        return_features: bool = False,
        return_both: bool = False,
        layer: str | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits [B, class_num]; or the features for testing [B, dim(layer)]; or, for losses
        that compare features, both logits and pooled features.

        layer: of the features for testing, one of LAYERS: "pool", the pooled ones, or
        "bottleneck", what the classifier sees. None takes the usual one: pooled, with bnneck after
        its batch norm.
        """
        pooled = self.pooling(self.feature_maps(images))
        if return_features:
            return pooled if self.eval_layer(layer) == "pool" else self.model.fc(pooled)
        logits = self.classifier(self.model.fc(pooled))
        return (logits, pooled) if return_both else logits

    def backbone_eval(self) -> None:
        """Put the backbone in evaluation mode, so that its batch norms stay as they are."""
        for name, part in self.model.named_children():
            if name != "fc":
                part.eval()

    def eval_layer(self, layer: str | None = None) -> str:
        """Return the layer of the features for testing: the named one, or the usual one."""
        if layer not in (None, *LAYERS):
            raise ValueError(f"layer {layer!r}: expected one of {', '.join(LAYERS)}, or None")
        return layer or ("bottleneck" if self.bnneck else "pool")

    def dim(self, layer: str | None = None) -> int:
        """Return how many numbers a feature for testing has."""
        wide = self.bnneck or self.eval_layer(layer) == "pool"
        return self.feature_dim if wide else BOTTLENECK_DIM


class ft_net(ReIDNet):
    """ResNet-50 for `class_num` identities; features of 2048 numbers.

    `pretrained` fills the backbone: None (random), "imagenet" (torchvision's weights, downloaded
    on first use) or a weights file; see `load_backbone`.
    """

    feature_dim = 2048

    def __init__(
        self,
        class_num: int,
        pretrained: str | None = None,
        neck: str = "bottleneck",
        pooling: str = "avg",
        last_stride: int = 2,
    ):
        super().__init__()
        self.model = models.resnet50(weights=_imagenet(pretrained, models.ResNet50_Weights))
        self._add_head(class_num, neck, pooling, last_stride)
        if last_stride == 1:
            block = self.model.layer4[0]
            block.conv2.stride = block.downsample[0].stride = (1, 1)
        if pretrained not in (None, "imagenet"):
            load_backbone(self, pretrained)

    def feature_maps(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, 2048, H / 32, W / 32]."""
        net = self.model
        x = net.maxpool(net.relu(net.bn1(net.conv1(images))))
        return net.layer4(net.layer3(net.layer2(net.layer1(x))))


class ft_net_dense(ReIDNet):
    """DenseNet-121 for `class_num` identities; features of 1024 numbers. Used like `ft_net`."""

    feature_dim = 1024

    def __init__(
        self,
        class_num: int,
        pretrained: str | None = None,
        neck: str = "bottleneck",
        pooling: str = "avg",
        last_stride: int = 2,
    ):
        super().__init__()
        self.model = models.densenet121(weights=_imagenet(pretrained, models.DenseNet121_Weights))
        # DenseNet's own ImageNet classifier is never used; it stays because the original's files
        # hold it. Without gradients, neither weight decay nor an optimiser's state touches it.
        self.model.classifier.requires_grad_(False)
        self._add_head(class_num, neck, pooling, last_stride)
        if pretrained not in (None, "imagenet"):
            load_backbone(self, pretrained)

    def feature_maps(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, 1024, H / 32, W / 32].

        torchvision's layers in an order that computes the same with less work: a dense layer's
        input is joined once, not by each layer anew, and a transition averages 2 x 2 pixels
        before its 1 x 1 convolution, which commutes with averaging, so on a quarter of the pixels.
        As in the original, pooling follows the last batch norm directly (torchvision's classifier
        has a ReLU between the two).
        """
        x = images
        for name, part in self.model.features.named_children():
            if name.startswith("denseblock"):
                for layer in part.values():
                    x = torch.cat([x, dense_layer(layer, x)], dim=1)
            elif name.startswith("transition"):
                x = part.relu(part.norm(x))
                if not (name == "transition3" and self.last_stride == 1):
                    x = part.pool(x)
                x = part.conv(x)
            else:
                x = part(x)
        return x


def dense_layer(layer, x):
    """Compute the 32 new channels of one of torchvision's dense layers."""
    return layer.conv2(layer.relu2(layer.norm2(layer.conv1(layer.relu1(layer.norm1(x))))))


class GlobalAverage(nn.Module):
    """The mean over height and width: [B, C, H, W] -> [B, C]."""

    def forward(self, maps):
        return maps.mean(dim=(2, 3))


class GeM(nn.Module):
    """The generalised mean over height and width, (mean x^p)^(1/p): [B, C, H, W] -> [B, C].

    p is learnt, from 3. Negative values count as (nearly) zero.
    """

    def __init__(self, p=3.0, smallest=1e-6):
        super().__init__()
        self.p = nn.Parameter(torch.tensor(p))
        self.smallest = smallest

    def forward(self, maps):
        # Powers in fp32: bf16 has not the digits.
        return maps.float().clamp(min=self.smallest).pow(self.p).mean(dim=(2, 3)).pow(1 / self.p)


def bottleneck(in_dim: int) -> nn.Sequential:
    """Build the head between pooled features and classifier: [B, in_dim] -> [B, 512]."""
    linear, norm = nn.Linear(in_dim, BOTTLENECK_DIM), nn.BatchNorm1d(BOTTLENECK_DIM)
    nn.init.kaiming_normal_(linear.weight, mode="fan_out")
    nn.init.zeros_(linear.bias)
    nn.init.normal_(norm.weight, mean=1.0, std=0.02)
    return nn.Sequential(linear, norm, nn.LeakyReLU(0.1), nn.Dropout(0.5))


def batch_norm_neck(in_dim: int) -> nn.Sequential:
    """Build a BNNeck, batch norm whose shift stays 0: [B, in_dim] -> [B, in_dim]."""
    norm = nn.BatchNorm1d(in_dim)
    norm.bias.requires_grad_(False)
    return nn.Sequential(norm)


def classifier(class_num: int, in_dim: int = BOTTLENECK_DIM, bias: bool = True) -> nn.Sequential:
    """Build a linear layer to `class_num` logits, near zero so that training begins even."""
    linear = nn.Linear(in_dim, class_num, bias=bias)
    nn.init.normal_(linear.weight, std=0.001)
    if bias:
        nn.init.zeros_(linear.bias)
    return nn.Sequential(linear)


def options_of(weights: dict) -> dict:
    """Return the keyword arguments that a network was made with, as its state_dict shows them."""
    return {
        "neck": "bottleneck" if weights["model.fc.0.weight"].dim() == 2 else "bnneck",
        "pooling": "gem" if "pooling.p" in weights else "avg",
        "last_stride": 1 if "stride_1" in weights else 2,
    }


def load_backbone(net: ReIDNet, path: str | Path) -> None:
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


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read the state_dict in a weights file, on the CPU, without a `module.` prefix.

    Takes files that hold it beside other things, too, as "state_dict" or "model". Raises
    ValueError for a file that is missing, damaged, or holds something else.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such weights file")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise ValueError(f"{path}: not a readable PyTorch weights file") from error
    for name in ("state_dict", "model"):  # other codes keep epoch and optimiser beside them
        if isinstance(weights, dict) and isinstance(weights.get(name), dict):
            weights = weights[name]
    if (
        not isinstance(weights, dict)
        or not weights
        or not all(torch.is_tensor(v) for v in weights.values())
    ):
        raise ValueError(f"{path}: holds no plain state_dict")
    return {name.removeprefix("module."): value for name, value in weights.items()}


def _imagenet(pretrained, weights):
    return weights.IMAGENET1K_V1 if pretrained == "imagenet" else None
