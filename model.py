"""The re-ID networks: ft_net (ResNet-50), ft_net_dense (DenseNet-121), ft_net_timm (any of timm's).

Each is a backbone to its pooled feature, then the bottleneck head, then the classifier:

    image [B, 3, H, W] -> pooled feature [B, D], D = 2048 for ResNet-50, 1024 for DenseNet-121
                       -> Linear 512, BatchNorm1d, LeakyReLU 0.1, Dropout 0.5 -> Linear K

Parameter names and shapes of the first two are those of the 2018 Person-reid-GAN-pytorch, so that
its weights load.

    net = ft_net_dense(751)
    logits = net(images)                           # [B, 751], for training
    features = net(images, return_features=True)   # [B, 1024], for testing
"""

import difflib
import json
import warnings

import torch
from torch import Tensor, nn
from torchvision import models

BOTTLENECK_DIM = 512
LAYERS = ("pool", "bottleneck")
BF16_ERROR = 0.01  # how far, of the largest number in a feature, bf16 may move one
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and deviation of its pixels


class ReIDNet(nn.Module):
    """The parts that all networks have: images [B, 3, H, W] to logits or, in testing, features.

    Subclasses have `backbone`, its name; `feature_dim`, the numbers of a pooled feature;
    `normalisation`, the mean and deviation of the pixels (each three numbers, of values from 0 to
    1) that images are normalised with; `any_size`, whether one network takes images of all sizes;
    `classic`, whether it is one of the two whose layers are known here.

    neck: "bottleneck" as above, or "bnneck" (Luo et al. 2019, "Bag of Tricks"): one batch norm
        between the pooled feature and a classifier without bias.
    pooling: "avg", or "gem" (Radenovic et al. 2018), the generalised mean with a learnt exponent.
    last_stride: 2, or 1 to keep the last stage's feature maps at twice the size (Sun et al. 2018).
    """

    normalisation = IMAGENET
    any_size = True
    classic = True

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
        layer: str = "pool",
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits [B, class_num]; or the features for testing [B, dim(layer)]; or, for losses
        that compare features, both logits and pooled features.

        layer: of the features for testing, one of LAYERS: "pool", the pooled ones, or
        "bottleneck", what the classifier sees.
        """
        pooled = self.pooled(images)
        if return_features:
            return pooled if is_pool(layer) else self.model.fc(pooled)
        logits = self.classifier(self.model.fc(pooled))
        return (logits, pooled) if return_both else logits

    def pooled(self, images: Tensor) -> Tensor:
        """Return the pooled features [B, feature_dim]."""
        return self.pool(self.feature_maps(images))

    def pool(self, maps: Tensor) -> Tensor:
        """Return the pooled features of what `feature_maps` returned."""
        return self.pooling(maps)

    def positions(self, images: Tensor) -> Tensor:
        """Return float32 [B, feature_dim, h, w], whose means over h and w are the pooled features.

        Raises ValueError where pooled features are no such means, as of a ViT's class token.
        """
        maps = self.feature_maps(images)
        grid = self.grid(maps)
        positions = None if grid is None else self.pooling.parts(grid.float())
        pooled = self.pool(maps).float()
        if positions is None or positions.shape[:2] != pooled.shape or not near(positions, pooled):
            raise ValueError(f"{self.backbone}: its pooled features are no means over positions")
        return positions

    def grid(self, maps):
        """Return what `feature_maps` returned as [B, C, h, w]; None where it is no such map."""
        return maps

    def set_size(self, height: int, width: int) -> None:
        """Make the network ready for images of this size in pixels.

        Raises ValueError where it can't take them.
        """

    def backbone_eval(self) -> None:
        """Put the backbone in evaluation mode, so that its batch norms stay as they are."""
        for name, part in self.model.named_children():
            if name != "fc":
                part.eval()

    def dim(self, layer: str = "pool") -> int:
        """Return how many numbers a feature for testing has."""
        return self.feature_dim if self.bnneck or is_pool(layer) else BOTTLENECK_DIM


class ft_net(ReIDNet):
    """ResNet-50 for `class_num` identities; features of 2048 numbers.

    `pretrained` fills the backbone: None (random) or "imagenet" (torchvision's weights, downloaded
    on first use). `reid.weights` fills it from a file.
    """

    backbone = "resnet50"
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

    def feature_maps(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, 2048, H / 32, W / 32]."""
        net = self.model
        x = net.maxpool(net.relu(net.bn1(net.conv1(images))))
        return net.layer4(net.layer3(net.layer2(net.layer1(x))))


class ft_net_dense(ReIDNet):
    """DenseNet-121 for `class_num` identities; features of 1024 numbers. Used like `ft_net`."""

    backbone = "densenet121"
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


class ft_net_timm(ReIDNet):
    """Any model of timm (Wightman 2019) for `class_num` identities. Used like `ft_net`.

    backbone: its name there, with or without the tag of a set of weights. The pooled feature is
    what timm feeds to its own classifier. Models made for one size of images (ViT, Swin) have that
    size until `set_size` is called.
    Raises ImportError without timm, ValueError for a name, a pooling or a last_stride that timm
    does not have, another error where `pretrained` weights can't be had.
    """

    classic = False

    def __init__(
        self,
        class_num: int,
        backbone: str,
        pretrained: str | None = None,
        neck: str = "bottleneck",
        pooling: str = "avg",
        last_stride: int = 2,
    ):
        super().__init__()
        self.backbone = backbone
        self.model = timm_model(backbone, pretrained == "imagenet", last_stride)
        config = self.model.pretrained_cfg
        self.normalisation = tuple(config["mean"]), tuple(config["std"])
        self.any_size = not config.get("fixed_input_size", False)
        self.size = None if self.any_size else config["input_size"][1:]
        maps, pooled = self.try_out(*config["input_size"][1:])
        if pooling == "gem" and not (torch.is_tensor(maps) and maps.dim() == 4):
            raise ValueError(f"--pooling gem: {backbone} has no feature maps; take avg")
        self.feature_dim = pooled.shape[1]
        self._add_head(class_num, neck, pooling, last_stride)

    def feature_maps(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> what timm pools: maps [B, C, H / 32, W / 32], or tokens [B, N, C]."""
        maps = self.model.forward_features(images)
        return maps.permute(0, 3, 1, 2) if self.channels_are_last() else maps

    def grid(self, maps):
        """Return maps, or tokens without class token, as [B, C, h, w]; None where they are none."""
        if maps.dim() == 4:
            return maps
        first = getattr(self.model, "num_prefix_tokens", 0)
        sides = getattr(getattr(self.model, "patch_embed", None), "grid_size", (0, 0))
        if maps.dim() != 3 or maps.shape[1] - first != sides[0] * sides[1]:
            return None
        return maps[:, first:].transpose(1, 2).unflatten(2, sides)

    def channels_are_last(self):
        """Tell whether timm's maps are [B, H, W, C]."""
        return getattr(self.model, "output_fmt", "NCHW") == "NHWC"

    def pool(self, maps: Tensor) -> Tensor:
        """Return the pooled features of maps or tokens: timm's, or those of GeM."""
        if isinstance(self.pooling, GeM):  # timm's pooling then finds one pixel
            maps = self.pooling(maps)[:, :, None, None].to(maps.dtype)
        if self.channels_are_last():
            maps = maps.permute(0, 2, 3, 1)
        return self.model.forward_head(maps, pre_logits=True)

    def set_size(self, height: int, width: int) -> None:
        """Make the network ready for images of this size, in place: position codes are resampled.

        Raises ValueError where it can't take them.
        """
        if not self.any_size and (height, width) != tuple(self.size):
            if not hasattr(self.model, "set_input_size"):
                size = "x".join(map(str, self.size))
                raise ValueError(f"{self.backbone}: takes images of {size} only")
            patch = getattr(getattr(self.model, "patch_embed", None), "patch_size", 1)
            patch = (patch, patch) if isinstance(patch, int) else patch
            if height % patch[0] or width % patch[1]:  # timm would cut off what is left over
                raise ValueError(
                    f"{self.backbone}: can't take images of {height}x{width}, only multiples of "
                    f"{patch[0]}x{patch[1]}"
                )
            try:
                with warnings.catch_warnings(action="ignore"):  # of how timm calls PyTorch
                    self.model.set_input_size(img_size=(height, width))
            except Exception as error:
                raise self.refusal(height, width, error) from error
            self.size = height, width
        try:
            self.try_out(height, width)
        except Exception as error:  # each of timm's models has its own
            raise self.refusal(height, width, error) from error

    def refusal(self, height, width, error):
        """Return the ValueError of a size that timm can't take."""
        why = str(error).partition("\n")[0] or type(error).__name__
        return ValueError(f"{self.backbone}: can't take images of {height}x{width} ({why})")

    @torch.no_grad()
    def try_out(self, height, width):
        """Return feature maps and pooled feature of a black image, and keep the size in mind."""
        self.tried = height, width
        training, weight = self.model.training, next(self.model.parameters())
        self.model.eval()
        image = torch.zeros(1, 3, height, width, device=weight.device, dtype=weight.dtype)
        maps = self.model.forward_features(image)
        pooled = self.model.forward_head(maps, pre_logits=True)
        self.model.train(training)
        return maps, pooled

    def get_extra_state(self) -> Tensor:
        """Return what a weights file must tell beside the weights, as text in bytes."""
        mean, std = self.normalisation
        facts = {"backbone": self.backbone, "size": self.size, "mean": mean, "std": std}
        return torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Take over the normalisation from a weights file; the rest is in `options_of`."""
        facts = extra_facts(state)
        self.normalisation = tuple(facts["mean"]), tuple(facts["std"])


def extra_facts(state):
    """Read the text in bytes of `ft_net_timm.get_extra_state`."""
    return json.loads(bytes(state.tolist()))


def timm_model(name, pretrained, last_stride):
    """Make a model of timm without its classifier."""
    import timm

    if not timm.is_model(name):
        base = name.partition(".")[0]
        similar = difflib.get_close_matches(base, timm.list_models(), cutoff=0.7)
        similar = similar or timm.list_models(f"*{base}*")[:3]
        hint = f"; similar are {', '.join(similar)}" if similar else ""
        raise ValueError(f"{name}: not resnet50, densenet121 or a model of timm's{hint}")
    options = {"output_stride": 16} if last_stride == 1 else {}
    try:
        net = timm.create_model(name, pretrained, num_classes=0, **options)
    except (AssertionError, NotImplementedError, TypeError) as error:
        if not options:
            raise
        raise ValueError(
            f"--last_stride 1: {name} can't keep its last stage's resolution; take 2"
        ) from error
    except RuntimeError as error:  # a tag that timm does not know
        raise error if pretrained else ValueError(f"{name}: {error}") from error
    if last_stride == 1:  # timm also spreads the last stage's kernels, which re-ID does not
        with torch.device("meta"):
            plain = timm.create_model(name, num_classes=0)
        for layer, usual in zip(net.modules(), plain.modules(), strict=True):
            if isinstance(layer, nn.Conv2d) and layer.dilation != usual.dilation:
                layer.dilation = usual.dilation
                if any(layer.padding):  # else it is worked out from each image
                    reach = zip(layer.dilation, layer.kernel_size, strict=True)
                    layer.padding = tuple(gap * (side - 1) // 2 for gap, side in reach)
    return net


def dense_layer(layer, x):
    """Compute the 32 new channels of one of torchvision's dense layers."""
    return layer.conv2(layer.relu2(layer.norm2(layer.conv1(layer.relu1(layer.norm1(x))))))


def is_pool(layer):
    """Tell whether a layer is the pooled one. Raises ValueError where it is none of LAYERS."""
    if layer not in LAYERS:
        raise ValueError(f"layer {layer!r}: expected one of {', '.join(LAYERS)}")
    return layer == "pool"


def near(positions, pooled):
    """Tell whether positions [B, D, h, w] have the means [B, D], but for rounding."""
    return (positions.mean(dim=(2, 3)) - pooled).abs().max() <= BF16_ERROR * pooled.abs().max()


class GlobalAverage(nn.Module):
    """The mean over height and width: [B, C, H, W] -> [B, C]."""

    def forward(self, maps):
        return maps.mean(dim=(2, 3))

    def parts(self, maps):
        """Return maps, of the same shape, whose mean is what is returned for `maps`."""
        return maps


class GeM(nn.Module):
    """The generalised mean over height and width, (mean x^p)^(1/p): [B, C, H, W] -> [B, C].

    p is learnt, from 3. Negative values count as (nearly) zero.
    """

    def __init__(self, p=3.0, smallest=1e-6):
        super().__init__()
        self.p = nn.Parameter(torch.tensor(p))
        self.smallest = smallest

    def forward(self, maps):
        return self.powers(maps).mean(dim=(2, 3)).pow(1 / self.p)

    def powers(self, maps):
        """Return x^p, in fp32: bf16 has not the digits."""
        return maps.float().clamp(min=self.smallest).pow(self.p)

    def parts(self, maps):
        """Return maps, of the same shape, whose mean is the generalised mean of `maps`.

        Each position has its share in the mean of powers m: (x^p / m) m^(1/p).
        """
        powers = self.powers(maps)
        return powers * powers.mean(dim=(2, 3), keepdim=True).pow(1 / self.p - 1)


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


def _imagenet(pretrained, weights):
    return weights.IMAGENET1K_V1 if pretrained == "imagenet" else None


def make_network(
    backbone: str, class_num: int, pretrained: str | None = None, **options
) -> ReIDNet:
    """Make the network with a backbone: "resnet50", "densenet121" or the name of a timm model.

    pretrained, options (neck, pooling, last_stride): those of `ft_net`.
    """
    if backbone in CLASSIC:
        return CLASSIC[backbone](class_num, pretrained, **options)
    return ft_net_timm(class_num, backbone, pretrained, **options)


def options_of(weights: dict[str, Tensor]) -> dict:
    """Return the keyword arguments of `make_network` that a network was made with.

    weights: its state_dict, which shows them. Raises KeyError where it is no ReIDNet's.
    """
    if "_extra_state" in weights:
        backbone = extra_facts(weights["_extra_state"])["backbone"]
    else:
        dense = any(name.startswith("model.features.") for name in weights)
        backbone = (ft_net_dense if dense else ft_net).backbone
    return {
        "backbone": backbone,
        "class_num": len(weights["classifier.0.weight"]),
        "neck": "bottleneck" if weights["model.fc.0.weight"].dim() == 2 else "bnneck",
        "pooling": "gem" if "pooling.p" in weights else "avg",
        "last_stride": 1 if "stride_1" in weights else 2,
    }


def fixed_size(weights: dict[str, Tensor]) -> list[int] | None:
    """Return the height and width that a network's state_dict is tied to; None where it is not."""
    return extra_facts(weights["_extra_state"])["size"] if "_extra_state" in weights else None


CLASSIC = {network.backbone: network for network in (ft_net, ft_net_dense)}
