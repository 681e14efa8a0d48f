"""Weights in and out: prefixes, class counts, other networks, backbones for --pretrained."""

import re

import pytest
import torch
from torchvision import models

from model import ft_net, ft_net_dense
from reid.checkpoint import Run
from reid.errors import UserError
from reid.weights import build_network, load_network


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("network", [ft_net, ft_net_dense])
def test_round_trip_with_another_class_count(network, tmp_path):
    net = network(13)
    Run(tmp_path).save_weights(net, "last")
    loaded = load_network(tmp_path / "net_last.pth")
    assert type(loaded) is network
    assert same(net, loaded)


def test_data_parallel_prefix_is_neither_written_nor_needed(tmp_path):
    net = ft_net(5)
    Run(tmp_path).save_weights(torch.nn.DataParallel(net), "last")
    net.cpu()  # DataParallel moved it where there is a GPU
    assert same(net, load_network(tmp_path / "net_last.pth"))
    prefixed = {f"module.{name}": value for name, value in net.state_dict().items()}
    torch.save(prefixed, tmp_path / "original.pth")
    assert same(net, load_network(tmp_path / "original.pth"))


@pytest.mark.parametrize("name", ["state_dict", "model"])
def test_weights_beside_other_things(name, tmp_path):
    """As other codes save them: with the epoch and the optimiser's state."""
    net = ft_net_dense(5)
    content = {name: net.state_dict(), "epoch": 3, "optimizer": {"state": {}}}
    torch.save(content, tmp_path / "others.pth")
    assert same(net, load_network(tmp_path / "others.pth"))
    torch.save({"epoch": 3}, tmp_path / "others.pth")
    with pytest.raises(UserError, match="holds no plain state_dict"):
        load_network(tmp_path / "others.pth")


def test_features_are_pooled_and_independent_of_the_head():
    for network, dim in [(ft_net, 2048), (ft_net_dense, 1024)]:
        net = network(4).eval()
        images = torch.randn(2, 3, 64, 32)
        with torch.inference_mode():
            features = net(images, return_features=True)
            net.model.fc[0].weight.zero_()
            assert features.shape == (2, dim)
            assert torch.equal(features, net(images, return_features=True))
            assert net(images).shape == (2, 4)


def test_dense_features_follow_the_batch_norm_directly():
    net = ft_net_dense(4).eval()
    with torch.inference_mode():
        assert (net(torch.randn(2, 3, 64, 32), return_features=True) < 0).any()


def test_start_of_head_and_classifier():
    torch.manual_seed(0)
    net = ft_net(751)
    assert net.classifier[0].weight.std().item() == pytest.approx(0.001, rel=0.02)
    # Kaiming, fan_out 512: sqrt(2 / 512)
    assert net.model.fc[0].weight.std().item() == pytest.approx((2 / 512) ** 0.5, rel=0.02)
    assert net.classifier[0].bias.abs().max() == net.model.fc[0].bias.abs().max() == 0


@pytest.mark.parametrize(
    ("network", "torchvision_net"), [(ft_net, models.resnet50), (ft_net_dense, models.densenet121)]
)
def test_pretrained_file_of_torchvision(network, torchvision_net, tmp_path):
    source = torchvision_net().state_dict()
    # As torchvision's own files for DenseNet name them.
    file = {re.sub(r"(norm|conv)([12])\.", r"\1.\2.", k): v for k, v in source.items()}
    file = source if network is ft_net else file
    torch.save(file, tmp_path / "weights.pth")
    net = build_network(network.backbone, 7, tmp_path / "weights.pth")
    for name, value in net.model.state_dict().items():
        if not name.startswith(("fc.", "classifier.")):
            assert torch.equal(value, source[name]), name


def test_pretrained_file_of_a_run_with_other_classes(tmp_path):
    source = ft_net(5)
    Run(tmp_path).save_weights(source, "last")
    net = build_network("resnet50", 9, tmp_path / "net_last.pth")
    assert torch.equal(net.model.layer4[0].conv1.weight, source.model.layer4[0].conv1.weight)
    assert not torch.equal(net.model.fc[0].weight, source.model.fc[0].weight)


def test_pretrained_file_of_another_network(tmp_path):
    torch.save(models.resnet18().state_dict(), tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"weights\.pth: not the weights of a resnet50 backbone"):
        build_network("resnet50", 9, tmp_path / "weights.pth")


def test_imagenet_weights_that_cannot_be_downloaded(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(UserError, match=r"--pretrained imagenet: .*--pretrained FILE .* none"):
        build_network("densenet121", 9, "imagenet")


def test_weights_of_another_network_than_expected(tmp_path):
    Run(tmp_path).save_weights(ft_net(3), "last")
    with pytest.raises(UserError, match="holds a ResNet-50, not the expected DenseNet-121"):
        load_network(tmp_path / "net_last.pth", backbone="densenet121")
    torch.save(models.resnet18().state_dict(), tmp_path / "net_1.pth")
    with pytest.raises(UserError, match="not the weights of a network of this code"):
        load_network(tmp_path / "net_1.pth")


@pytest.mark.parametrize("content", [b"", b"not a zip file", None])
def test_damaged_weights(content, tmp_path):
    path = tmp_path / "net_last.pth"
    if content is None:  # truncated
        Run(tmp_path).save_weights(ft_net(3), "last")
        content = path.read_bytes()[: path.stat().st_size // 2]
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"net_last\.pth: not a readable"):
        load_network(path)


def test_weights_that_the_system_refuses_are_not_called_damaged(tmp_path, monkeypatch):
    def refused(*args, **kwargs):
        raise PermissionError(13, "Permission denied", "net_last.pth")

    (tmp_path / "net_last.pth").touch()
    monkeypatch.setattr(torch, "load", refused)
    with pytest.raises(PermissionError):
        load_network(tmp_path / "net_last.pth")
