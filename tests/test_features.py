"""Features: folded networks, layers, scales, and the Embedder for other programs."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import call, save_image
from PIL import Image
from scipy.io import loadmat
from torch import nn

import test as extraction
from model import IMAGENET, ft_net, ft_net_dense
from reid.checkpoint import Run
from reid.errors import UserError
from reid.features import Embedder, fold_for_inference, mean_direction
from reid.files import sha256, write_json

CPU = {"device": "cpu", "precision": "fp32"}


def lived_in(net, seed=0):
    """A network with batch norms as training leaves them, none of which is the identity."""
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for values, low, high in [
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.5, 0.5),
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.5, 2),
            ]:
                values.uniform_(low, high, generator=generator)
    return net.eval()


def test_head_by_hand():
    """Linear, batch norm, LeakyReLU 0.1; dropout, which testing leaves out, of a half."""
    head, pooled = lived_in(ft_net(3)).model.fc, torch.randn(4, 2048)
    linear, norm = head[:2]
    out = linear(pooled) - norm.running_mean
    out = out / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
    assert torch.allclose(head(pooled), torch.where(out > 0, out, 0.1 * out), atol=1e-5)
    assert [part.p for part in head if isinstance(part, nn.Dropout)] == [0.5]


def run_folder(path, net, height=64, width=32):
    run = Run(path)
    run.path.mkdir(parents=True)
    run.save_weights(net, "last")
    write_json(run.file("opts.json"), {"options": {"height": height, "width": width}})
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.manual_seed(0)
    return run_folder(tmp_path_factory.mktemp("runs") / "dense", lived_in(ft_net_dense(3)))


def crops(number=5):
    rng = np.random.default_rng(0)
    sizes = [(128, 64), (50, 40), (30, 90), (1, 1), (300, 100)]
    return [rng.integers(0, 256, (*sizes[n % 5], 3), dtype=np.uint8) for n in range(number)]


def by_hand(net, image, size, layer="pool"):
    """An image's feature, step by step: Pillow, torch, no batch, nothing folded."""
    resized = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)) / 255
    pixels = (resized - IMAGENET[0]) / IMAGENET[1]
    pixels = torch.from_numpy(pixels.transpose(2, 0, 1)).float()[None]
    with torch.no_grad():
        pooled = sum(net.feature_maps(view).mean((2, 3)) for view in (pixels, pixels.flip(3)))
        if layer == "bottleneck":
            both = [net.feature_maps(view).mean((2, 3)) for view in (pixels, pixels.flip(3))]
            pooled = sum(net.model.fc(view) for view in both)
    return F.normalize(pooled)[0].numpy()


@pytest.mark.parametrize("network", [ft_net, ft_net_dense])
@pytest.mark.parametrize("options", [{}, {"neck": "bnneck", "pooling": "gem", "last_stride": 1}])
def test_folding_changes_nothing_but_the_batch_norms(network, options):
    torch.manual_seed(0)
    dtype, near = (torch.float, 1e-4) if options else (torch.double, 1e-9)  # GeM is in fp32
    net = lived_in(network(4, **options)).to(dtype)
    images = torch.randn(2, 3, 64, 32, dtype=dtype)
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    with torch.no_grad():
        before = net(images), net(images, return_features=True)
        net = fold_for_inference(net)
        after = net(images), net(images, return_features=True)
    for one, other in zip(before, after, strict=True):
        assert one.std() > 0
        assert torch.allclose(one, other, rtol=near, atol=near * one.abs().max())
    left = [m for m in net.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    # ResNet-50 has none left; DenseNet-121 those of its 58 layers and 3 transitions that come
    # first, and its last.
    assert len(left) == (0 if network is ft_net else 58 + 3 + 1) + bool(options)
    assert len(norms) > len(left)
    assert not any(p.requires_grad for p in net.parameters())


def test_frozen_weights_are_what_autocast_would_make_of_them():
    torch.manual_seed(0)
    net = lived_in(ft_net_dense(4))
    images = torch.randn(2, 3, 64, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        fold_for_inference(net)
        before = net(images, return_features=True)
        fold_for_inference(net, torch.bfloat16)
        after = net(images, return_features=True)
    assert net.model.features.conv0.weight.dtype == torch.bfloat16
    assert torch.equal(before, after)


def test_layers():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 64, 32)
    plain, bnneck = ft_net_dense(4).eval(), lived_in(ft_net_dense(4, neck="bnneck"))
    with torch.no_grad():
        pooled = plain.pooling(plain.feature_maps(images))
        assert torch.equal(plain(images, return_features=True), pooled)
        assert torch.equal(plain(images, return_features=True, layer="pool"), pooled)
        found = plain(images, return_features=True, layer="bottleneck")
        assert torch.equal(plain.classifier(found), plain(images))
        assert found.shape == (2, plain.dim("bottleneck")) == (2, 512)
        pooled = bnneck(images, return_features=True)
        found = bnneck(images, return_features=True, layer="bottleneck")
        assert torch.equal(pooled, bnneck.pooled(images))
        assert torch.equal(found, bnneck.model.fc(pooled))
        assert not torch.equal(found, pooled)
        with pytest.raises(ValueError, match="layer 'last': expected one of pool, bottleneck"):
            plain(images, return_features=True, layer="last")
    assert bnneck.dim() == bnneck.dim("pool") == plain.dim() == 1024
    assert (ft_net(2).dim(), ft_net(2).dim("bottleneck")) == (2048, 512)


@pytest.mark.parametrize("layer", ["pool", "bottleneck"])
def test_embedder_against_the_plain_way(run, layer):
    net = lived_in(ft_net_dense(3))
    net.load_state_dict(torch.load(run / "net_last.pth"))
    embed = Embedder(run, layer=layer, batchsize=2, **CPU)
    images = crops()
    found = embed(images)
    assert (found.dtype, found.shape) == (np.float32, (5, embed.dim))
    assert np.linalg.norm(found, axis=1) == pytest.approx(1, abs=1e-6)
    for image, feature in zip(images, found, strict=True):
        assert feature == pytest.approx(by_hand(net, image, (36, 72), layer), abs=1e-5)


def test_scales(run):
    net = lived_in(ft_net_dense(3))
    net.load_state_dict(torch.load(run / "net_last.pth"))
    images = crops()
    found = Embedder(run, scales=(1, 0.9), **CPU)(images)
    for image, feature in zip(images, found, strict=True):
        # 72 x 36 and, from the image itself, 65 x 32; each scale counts alike.
        both = by_hand(net, image, (36, 72)) + by_hand(net, image, (32, 65))
        assert feature == pytest.approx(both / np.linalg.norm(both), abs=1e-5)


def test_scales_that_are_too_small(run):
    with pytest.raises(UserError, match=r"--ms 0.5: makes images of 36x18"):
        Embedder(run, scales=(1, 0.5), **CPU)


def test_mean_directions_have_unit_length():
    one, other = np.eye(4, dtype=np.float32)[:2], np.eye(4, dtype=np.float32)[2:]
    assert np.allclose(mean_direction([one, other]), (one + other) / np.sqrt(2))
    assert mean_direction([one]) is one


def test_embedder_takes_lists_arrays_and_views(run):
    embed = Embedder(run, **CPU)
    images = np.stack([crops()[0]] * 3)
    whole = embed(images)
    assert np.allclose(embed(list(images)), whole, atol=1e-6)
    bgr = [np.ascontiguousarray(image[..., ::-1]) for image in images]
    assert np.allclose(embed([image[..., ::-1] for image in bgr]), whole, atol=1e-6)
    assert not np.allclose(embed(bgr), whole, atol=1e-3)
    frame = np.zeros((300, 200, 3), np.uint8)
    frame[50:178, 60:124] = images[0]
    assert np.allclose(embed([frame[50:178, 60:124]]), whole[:1], atol=1e-6)
    assert embed([]).shape == (0, 1024)
    assert (frame[50:178, 60:124] == images[0]).all()


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((8, 8), np.uint8),
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((0, 8, 3), np.uint8),
        np.zeros((8, 8, 3), np.float32),
        None,
        [[1, 2, 3]],
    ],
    ids=str,
)
def test_embedder_refuses(run, image):
    with pytest.raises(ValueError, match=r"image 0: expected uint8 \[H, W, 3\] in RGB"):
        Embedder(run, **CPU)([image])
    with pytest.raises(ValueError, match="image 2: expected"):  # which one of many
        Embedder(run, batchsize=2, **CPU)([*crops(2), image])


@pytest.mark.parametrize(
    "images", ["a.jpg", Path("a.jpg"), [np.zeros((8, 8, 3), np.uint8), "a.jpg"]], ids=str
)
def test_embedder_takes_arrays_or_paths_in_a_list(run, images):
    with pytest.raises(ValueError, match="a list of arrays or a list of paths"):
        Embedder(run, **CPU)(images)


@pytest.mark.parametrize(
    "wrong", [{"layer": "pol"}, {"precision": "fp16"}, {"batchsize": 0}, {"scales": (20,)}]
)
def test_embedder_refuses_settings(run, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Embedder(run, **(CPU | wrong))


@pytest.mark.slow
def test_embedder_from_many_threads_at_once(run):
    embed = Embedder(run, **CPU)
    images = crops(20)
    alone = [embed(images[n : n + 3]) for n in range(17)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(embed, [images[n : n + 3] for n in range(17)]))
    for one, other in zip(alone, found, strict=True):
        assert np.allclose(one, other, atol=1e-6)


def test_two_embedders_and_a_training_program_beside_them(run, tmp_path):
    """Nothing of the process is changed: random numbers, gradients, torch's settings."""

    def settings():
        return (
            torch.get_rng_state().tolist(),
            np.random.get_state()[1].tolist(),
            torch.is_grad_enabled(),
            torch.get_num_threads(),
            torch.get_float32_matmul_precision(),
            torch.backends.cudnn.benchmark,
            torch.get_default_dtype(),
            torch.is_autocast_enabled("cpu"),
        )

    other = run_folder(tmp_path / "other", lived_in(ft_net(3), seed=1), height=32)
    before = settings()
    one, two = Embedder(run, **CPU), Embedder(other, device="cpu", precision="bf16")
    first = one(crops())
    assert two(crops()).shape == (5, 2048)
    assert np.array_equal(one(crops()), first)
    assert settings() == before
    weight = torch.ones(2, requires_grad=True)
    (weight * torch.from_numpy(first[:2, 0])).sum().backward()  # no inference tensor
    assert weight.grad is not None


def test_embedder_without_a_run(tmp_path):
    with pytest.raises(UserError, match="no such run"):
        Embedder(tmp_path / "none")


def test_script_and_embedder_give_the_same_features(run, prepared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--model_dir", run.parent, "--name", run.name, "--test_dir", prepared]
    flags += ["--gpu_ids", "-1", "--precision", "fp32", "--workers", 0]
    for more, kind in [
        ([], {}),
        (["--ms", "1,0.9"], {"scales": (0.9, 1)}),
        (["--which_layer", "bottleneck", "--val"], {"layer": "bottleneck"}),
    ]:
        call(extraction.main, *flags, *more)
        content = loadmat("pytorch_result.mat")
        embed = Embedder(run, **kind, **CPU)
        for name in ("query", "gallery"):
            files = [prepared / file.rstrip() for file in content[f"{name}_files"]]
            images = [np.asarray(Image.open(file).convert("RGB")) for file in files]
            assert content[f"{name}_f"] == pytest.approx(embed(images), abs=2e-5)
        source = json.loads(str(content["source"][0]))
        split = "val" if "--val" in more else "query"
        where = {"run": str(run), "run_from_mat": os.path.relpath(run, tmp_path)}
        where["data_from_mat"] = os.path.relpath(prepared, tmp_path)
        assert len(source.pop("images")) == 64  # a hash
        assert source == {**where, "split": split, "arithmetic": "float32", **embed.made_by}
        assert {file.split("/")[0] for file in content["query_files"]} == {split}
    assert source["weights_sha256"] == sha256(run / "net_last.pth")


def test_reading_a_file_equals_its_pixels(run, tmp_path):
    embed = Embedder(run, **CPU)
    path = save_image(tmp_path / "a.png")
    pixels = np.asarray(Image.open(path))
    assert np.allclose(embed([path]), embed([pixels]), atol=1e-6)
