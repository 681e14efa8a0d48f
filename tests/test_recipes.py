"""What came after 2018, each by a flag: what it does to network, loss, order of images, weights."""

import argparse
import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, call, save_image

import train_baseline
import train_lsro
from model import GeM, ft_net, ft_net_dense
from reid import losses, optimizer
from reid.checkpoint import Run
from reid.dataset import Sample
from reid.errors import UserError
from reid.loading import identity_order
from reid.options import STRONG, parse_training
from reid.weights import load_network

FLAGS = f"{TINY} --workers 0 --batchsize 6 --epochs 1 --name r".split()


def train(main, prepared, folder, *flags):
    call(main, "--data_dir", prepared, "--model_dir", folder, *FLAGS, *flags)
    return folder / "r"


@pytest.mark.parametrize(
    "flags",
    [
        "--recipe strong --instances 2",
        "--circle 1 --instances 3 --pooling gem",
        "--ema 0.9 --schedule cosine --color_jitter --auto_augment",
    ],
)
def test_trains_with_generated_images_and_loads_again(flags, prepared, tmp_path):
    """Every recipe, with LSRO."""
    for number in range(3):
        save_image(prepared / "train_new" / "gen_0000" / f"gen_{number}.jpg", seed=number)
    run = train(train_lsro.main, prepared, tmp_path, *flags.split())
    line = json.loads((run / "log.jsonl").read_text())
    assert math.isfinite(line["train_loss"])
    assert math.isfinite(line["val_loss"])
    net = load_network(run / "net_last.pth").eval()
    assert net(torch.zeros(2, 3, 64, 32), return_features=True).shape == (2, 96)


VARIANTS = [
    "",
    "--label_smoothing 0.3",
    "--erasing_p 0",
    "--color_jitter",
    "--auto_augment",
    "--backbone_lr 1",
    "--warm_epoch 1",
    "--schedule cosine",
    "--freeze_epochs 1",
    "--instances 2",
    "--instances 2 --triplet 1",
    "--instances 2 --circle 1",
]


@pytest.mark.slow
def test_each_flag_changes_the_training(prepared, tmp_path):
    """An epoch of each, from the same weights: no two end alike."""
    ends = {}
    for number, flags in enumerate(VARIANTS):
        flags = ["--batchsize", "4", *flags.split()]
        run = train(train_baseline.main, prepared, tmp_path / str(number), *flags)
        state = torch.load(run / "net_last.pth", weights_only=True)
        ends[VARIANTS[number]] = state["model.conv1.0.weight"]
    for one, other in itertools.combinations(VARIANTS, 2):
        assert not torch.equal(ends[one], ends[other]), (one, other)


def test_strong_sets_what_was_not_given():
    parser = train_baseline.get_parser()
    args = parse_training(parser, ["--recipe", "strong", "--warm_epoch", "2"])
    assert args.warm_epoch == 2
    others = {name: value for name, value in STRONG.items() if name != "warm_epoch"}
    assert {name: getattr(args, name) for name in others} == others
    plain = parse_training(train_baseline.get_parser(), [])
    assert not any(getattr(plain, name) == value for name, value in STRONG.items())


@pytest.mark.parametrize("network", [ft_net, ft_net_dense])
def test_network_options_survive_a_weights_file(network, tmp_path):
    net = network(5, neck="bnneck", pooling="gem", last_stride=1)
    Run(tmp_path).save_weights(net, "last")
    loaded = load_network(tmp_path / "net_last.pth")
    assert (loaded.bnneck, loaded.last_stride, type(loaded.pooling)) == (True, 1, GeM)
    images = torch.randn(2, 3, 64, 32)
    a, b = net.eval()(images), loaded.eval()(images)
    assert torch.equal(a, b)
    assert loaded.classifier[0].bias is None
    assert not loaded.model.fc[0].bias.requires_grad


@pytest.mark.parametrize("network", [ft_net, ft_net_dense])
def test_last_stride(network):
    images = torch.randn(2, 3, 64, 32)
    for stride, size in [(2, (2, 1)), (1, (4, 2))]:
        maps = network(3, last_stride=stride).eval().feature_maps(images)
        assert maps.shape == (2, network.feature_dim, *size)


def test_feature_maps_are_torchvisions():
    """The reordered DenseNet computes what torchvision's own forward pass computes."""
    net = ft_net_dense(3).double()
    images = torch.randn(2, 3, 64, 32, dtype=torch.float64)
    for mode in (net.train(), net.eval()):
        expected = net.model.features(images)
        assert torch.allclose(mode.feature_maps(images), expected, atol=1e-10)


def test_bnneck_is_a_batch_norm_of_the_pooled_features():
    net = ft_net(3, neck="bnneck").eval()
    images = torch.randn(2, 3, 64, 32)
    _, pooled = net(images, return_both=True)
    assert torch.equal(net(images, return_features=True), pooled)
    neck = net(images, return_features=True, layer="bottleneck")
    assert torch.equal(neck, net.model.fc(pooled))


def test_gem():
    maps = torch.rand(2, 3, 4, 5)
    assert torch.allclose(GeM(p=1.0)(maps), maps.mean(dim=(2, 3)), atol=1e-5)
    by_hand = (maps**3).mean(dim=(2, 3)) ** (1 / 3)
    assert torch.allclose(GeM()(maps), by_hand, atol=1e-5)
    assert torch.allclose(GeM(p=200.0)(maps), maps.amax(dim=(2, 3)), atol=0.03)


def test_smoothing_is_for_real_images():
    logits = torch.randn(6, 5, requires_grad=True)
    labels = torch.tensor([0, 1, -1, 3, -1, 4])
    generated = (labels < 0).int()
    real = labels >= 0
    smooth = F.cross_entropy(logits[real], labels[real], label_smoothing=0.1, reduction="sum")
    even = -F.log_softmax(logits[~real], 1).mean(1).sum()
    expected = (smooth + even) / 6
    assert torch.allclose(losses.label_rule("lsro")(logits, labels, generated, 0.1), expected)
    assert torch.allclose(
        losses.cross_entropy(logits[real], labels[real], generated[real], 0.1), smooth / 4
    )


def test_batch_hard_triplet_by_hand():
    torch.manual_seed(0)
    features = torch.randn(8, 4, requires_grad=True)
    labels = torch.tensor([0, 0, 1, 1, 2, 2, -1, -1])
    generated = (labels < 0).int()
    real = features[:6]
    distances = torch.cdist(real, real)
    same = labels[:6, None] == labels[None, :6]
    hardest = distances.masked_fill(~same, 0).amax(1)
    nearest = distances.masked_fill(same, 1e9).amin(1)
    terms = (hardest - nearest + 0.3).clamp(min=0)
    expected = 2 * terms[terms > 0].mean()  # over the triplets that are still to learn
    found = losses.MetricLoss(triplet=2.0)(features, labels, generated)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    found.backward()
    assert (features.grad[6:] == 0).all()
    only_generated = losses.MetricLoss(triplet=1.0, circle=1.0)(
        features[6:], labels[6:], generated[6:]
    )
    assert only_generated.item() == 0


def test_circle_loss_by_hand():
    torch.manual_seed(0)
    features = F.normalize(torch.randn(6, 4))
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    m, scale = 0.25, 128  # Sun et al. 2020
    terms = []
    for i in range(6):
        s = features @ features[i]
        positive = [s[j] for j in range(6) if labels[j] == labels[i] and j != i]
        negative = [s[j] for j in range(6) if labels[j] != labels[i]]
        p = torch.stack([-scale * max(1 + m - x, 0) * (x - (1 - m)) for x in positive])
        n = torch.stack([scale * max(x + m, 0) * (x - m) for x in negative])
        terms.append(F.softplus(torch.logsumexp(p, 0) + torch.logsumexp(n, 0)))
    found = losses.MetricLoss(circle=2.0)(features, labels, torch.zeros(6))
    assert found.item() == pytest.approx(2 * torch.stack(terms).mean().item(), rel=1e-3)


def test_pk_sampling():
    labels = [0] * 5 + [1] * 4 + [2] * 1 + [-1] * 6
    samples = [Sample(None, label, int(label < 0)) for label in labels]
    order = identity_order(samples, 4, torch.Generator().manual_seed(0)).tolist()
    groups = [order[n : n + 4] for n in range(0, len(order), 4)]
    assert len(groups) == 2 + 1 + 1 + 2
    for group in groups:
        assert len({labels[n] for n in group}) == 1
    assert set(order) == set(range(16))  # each image comes
    again = identity_order(samples, 4, torch.Generator().manual_seed(0)).tolist()
    other = identity_order(samples, 4, torch.Generator().manual_seed(1)).tolist()
    assert order == again != other


def test_running_mean_of_weights():
    net = torch.nn.Linear(1, 1)
    mean = optimizer.ema(net, 0.9)
    expected = None
    for value in (1.0, 2.0, 5.0):
        torch.nn.init.constant_(net.weight, value)
        mean.update_parameters(net)
        expected = value if expected is None else 0.9 * expected + 0.1 * value
    assert mean.module.weight.item() == pytest.approx(expected)


def test_running_mean_is_what_is_saved(prepared, tmp_path):
    """Of one step in each of two epochs: the first is copied, the second enters by a quarter."""
    flags = ("--ema", "0.75", "--batchsize", "9", "--train_all", "--epochs", "2")
    run = train(train_baseline.main, prepared, tmp_path, *flags)
    first, second = (
        torch.load(run / f"{name}.pth", weights_only=True)["net"]
        for name in ("state_previous", "state")
    )
    saved = torch.load(run / "net_last.pth", weights_only=True)
    name = "classifier.0.weight"
    torch.testing.assert_close(saved[name], 0.75 * first[name] + 0.25 * second[name])
    assert not torch.allclose(saved[name], second[name])


def test_cosine():
    args = argparse.Namespace(schedule="cosine", epochs=100, warm_epoch=10)
    factors = [optimizer.rate_factor(epoch, args) for epoch in range(101)]
    assert factors[50] == pytest.approx(0.5)
    assert factors[100] == pytest.approx(0)
    assert factors[0] == pytest.approx(0.1)
    assert factors[10:] == sorted(factors[10:], reverse=True)


def test_flags_that_need_others(prepared, tmp_path):
    for flags, says in [
        (("--triplet", "1"), "add --instances 4"),
        (("--instances", "4"), "no multiple"),
        (("--batchsize", "2", "--instances", "1", "--circle", "1"), "add --instances 4"),
    ]:
        with pytest.raises(UserError, match=says):
            train(train_baseline.main, prepared, tmp_path, *flags)


def test_metric_losses_say_what_they_need(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pytorch_metric_learning", None)
    with pytest.raises(UserError, match="pip install pytorch-metric-learning"):
        losses.MetricLoss(triplet=1.0)


def test_cosine_can_not_be_resumed_with_other_epochs(prepared, tmp_path):
    train(train_baseline.main, prepared, tmp_path, "--schedule", "cosine")
    with pytest.raises(UserError, match="was started with --epochs 1, not 2"):
        train(
            train_baseline.main, prepared, tmp_path,
            "--schedule", "cosine", "--resume", "--epochs", "2",
        )  # fmt: skip
