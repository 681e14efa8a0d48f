"""Exported files: the features that test.py stores, the images that Pillow makes, what they say."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call, exit_code, tiny_network
from PIL import Image
from torch import nn

import export
from model import IMAGENET, ft_net, ft_net_dense
from reid.checkpoint import Run, load_trained
from reid.exporting.agreement import Eager, File, agreement, agrees, spread_out
from reid.exporting.network import (
    FeatureExtractor,
    Preprocessing,
    metadata,
    resized,
    torch_compute,
    torch_file,
)
from reid.features import view_features
from reid.files import sha256
from reid.transforms import EvalTransform, normalise

SIZE = 72, 36  # in the network, of images of 64 x 32 in training
OPTIONS = {"neck": "bnneck", "pooling": "gem", "last_stride": 1}
NETWORKS = {
    "resnet": (ft_net, {}, "pool"),
    "resnet, bottleneck": (ft_net, {}, "bottleneck"),
    "resnet, all options": (ft_net, OPTIONS, "bottleneck"),
    "densenet, all options": (ft_net_dense, OPTIONS, "pool"),
}


def network(kind=ft_net, **options):
    """A network whose batch norms have done something, in eval mode."""
    torch.manual_seed(0)
    net = kind(3, **options)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.7, 1.4)
            module.weight.data.uniform_(0.7, 1.4)
            module.bias.data.normal_(std=0.1)
    return net.eval()


def new_run(path, net):
    run = Run(path)
    run.start({"height": 64, "width": 32, "test_size": "enlarged"}, {})
    run.save_weights(net, "last")
    return path


@pytest.fixture
def folder(tmp_path):
    """A run folder `model/small` with a network that is exported in seconds."""
    return new_run(tmp_path / "model" / "small", network(tiny_network))


def random_images(count, height=SIZE[0], width=SIZE[1], seed=0):
    """Noise of different brightness, uint8 [count, height, width, 3]."""
    rng = np.random.default_rng(seed)
    brightest = rng.integers(60, 256, (count, 1, 1, 3))
    return (rng.random((count, height, width, 3)) * brightest).astype(np.uint8)


def check_features(found, expected):
    """The same features, of images that differ by far more than the tolerance."""
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    assert np.abs(expected - expected.mean(axis=0)).max() > 1e-3
    np.testing.assert_allclose(found, expected, atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(NETWORKS)[1:])
def test_onnx_features_are_test_pys(name, tmp_path):
    """ResNet's pooled features are those of `test_fp32_as_a_user`."""
    pytest.importorskip("onnxruntime")
    from reid.exporting.onnx_format import onnx_compute, onnx_file

    kind, options, layer = NETWORKS[name]
    run = new_run(tmp_path / "run", network(kind, **options))
    trained = load_trained(run, layer=layer)
    images = random_images(5)
    expected = Eager(trained).of_batch(list(images))
    facts = metadata(trained, "run", "fp32", "outside")
    path = tmp_path / "a.onnx"
    path.write_bytes(onnx_file(trained, facts))

    compute, written = onnx_compute(path)
    assert written == facts
    assert written["weights_sha256"] == sha256(run / "net_last.pth")
    assert written["network"] == kind.__name__
    assert (written["height"], written["width"], written["colour_order"]) == ("72", "36", "RGB")
    assert int(written["dim"]) == expected.shape[1]
    assert json.loads(written["mean"]) == [0.485, 0.456, 0.406]
    assert written["layer"] == layer
    file = File(compute, written)
    check_features(file.of_batch(list(images)), expected)
    np.testing.assert_allclose(file.of_batch(list(images[:1])), expected[:1], atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("preprocess", ["outside", "inside"])
@pytest.mark.parametrize("size", ["enlarged", "center"])
def test_torch_export_features_are_test_pys(preprocess, size, folder, tmp_path):
    trained = load_trained(folder, test_size=size)
    transform = trained.transform
    assert str(transform) == {"enlarged": "72x36", "center": "64x32 of 72x36"}[size]
    images = random_images(3, *(transform.full if preprocess == "inside" else transform.size))
    resized = [trained.transform.resize(Image.fromarray(i)) for i in images]
    expected = Eager(trained).of_batch(resized if preprocess == "inside" else list(images))
    facts = metadata(trained, "small", "fp32", preprocess)
    path = tmp_path / "a.pt2"
    path.write_bytes(torch_file(trained, facts))

    compute, written = torch_compute(path)
    assert written == facts
    file = File(compute, written)
    check_features(file.of_batch(list(images)), expected)
    np.testing.assert_allclose(file.of_batch(list(images[:1])), expected[:1], atol=2e-6)
    weights = torch.export.load(path).state_dict
    assert not any("classifier" in name or ".fc." in name for name in weights)
    if preprocess == "inside":  # several sizes at once
        originals = [*random_images(2, 200, 40), *random_images(1, 50, 90)]
        pillows = [transform.resize(Image.fromarray(i)) for i in originals]
        pillows = Eager(load_trained(folder, test_size=size)).of_batch(pillows)
        np.testing.assert_allclose(file.of_batch(originals), pillows, atol=5e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_half_precision_is_close(name):
    kind, options, layer = NETWORKS[name]
    images = torch.from_numpy(random_images(3))
    net = network(kind, **options)
    with torch.inference_mode():
        expected = view_features(net, images, None, layer)
        found = FeatureExtractor(net, layer, half=True)(normalise(images, *IMAGENET))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)
    weights = [w for name, w in net.model.named_parameters() if w.dim() == 4]
    assert {weight.dtype for weight in weights} == {torch.float16}


@pytest.fixture(scope="module", params=[SIZE, (80, 40)], ids=["whole", "middle"])
def onnx_preprocessing(request):
    """An ONNX Runtime session of the preprocessing alone, and the transform that it does."""
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    from reid.exporting.onnx_format import onnx_model

    transform = EvalTransform(SIZE, request.param)
    model = onnx_model(Preprocessing(transform, IMAGENET), {"preprocess": "inside"})
    onnx.checker.check_model(model, full_check=True)
    return onnxruntime.InferenceSession(model.SerializeToString()), transform


# Enlarged, shrunk, one of each, the same; Pillow starts with the height in some.
SIZES = [(128, 64), (100, 40), (300, 151), (300, 149), (500, 90), (72, 36), (72, 20), (90, 36)]
SIZES += [(40, 20), (200, 40), (30, 300), (9, 7), (1, 1)]


@pytest.mark.parametrize("height, width", SIZES)
def test_resizing_in_onnx_is_pillows(onnx_preprocessing, height, width):
    images = random_images(2, height, width)
    session, transform = onnx_preprocessing
    found = session.run(None, {"images": images})[0]
    pillows = np.stack([transform.resize(Image.fromarray(i)) for i in images])
    expected = normalise(torch.from_numpy(pillows), *IMAGENET).numpy()
    assert np.abs(found - expected).max() <= 1.01 / 255 / 0.224  # one step of a byte
    assert (np.abs(found - expected) > 1e-5).mean() < 0.01  # and that rarely


@pytest.mark.parametrize("height, width", SIZES)
def test_resizing_in_torch_export_is_pillows(height, width):
    images = random_images(2, height, width)
    found = resized(torch.from_numpy(images), *SIZE).numpy().astype(int)
    expected = np.stack([EvalTransform(SIZE).resize(Image.fromarray(i)) for i in images])
    assert np.abs(found - expected).max() <= 1


def test_norms_as_convolutions_compute_the_same():
    pytest.importorskip("onnxruntime")
    from reid.exporting.int8 import as_convolutions

    images = torch.from_numpy(random_images(2))
    for stride in (1, 2):
        net = network(ft_net_dense, last_stride=stride)
        with torch.inference_mode():
            expected = view_features(net, images, None)
            found = view_features(as_convolutions(net), images, None)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
        kinds = {type(module) for module in net.model.features.modules()}
        assert not kinds & {nn.BatchNorm2d, nn.AvgPool2d}


def test_agreement_counts_what_is_swapped_but_ties():
    # Query 0 finds gallery images of similarities 0.8, 0.6, and a tie with the latter.
    similarities = np.array([0.8, 0.6, 0.600001])

    def features(values):
        rows = [[1, 0], *([v, np.sqrt(1 - v * v)] for v in values)]
        return np.array(rows)

    expected = features(similarities)
    same = agreement(expected, features([0.79, 0.61, 0.6]), 1, 1e-5)
    assert (same["pairs"], same["swapped_pairs"], same["same_first"]) == (2, 0, 1)
    assert agrees(agreement(expected, expected, 1, 1e-5))
    swapped = agreement(expected, features([0.59, 0.6, 0.58]), 1, 1e-5)
    assert (swapped["swapped_pairs"], swapped["same_first"]) == (1, 0)
    assert not agrees(swapped)
    turned = agreement(expected, np.vstack([expected[:3], [[1, 0]]]), 1, 1e-5)
    assert turned["cosine_min"] == pytest.approx(0.600001)
    nothing = np.full_like(expected, np.nan)
    assert not agrees(agreement(expected, nothing, 1, 1e-5))


def test_spread_out():
    assert spread_out(list("abcdef"), 3) == ["a", "c", "e"]
    assert spread_out(list("ab"), 3) == ["a", "b"]


def test_other_features_get_another_file(tmp_path):
    parser = export.get_parser()

    def name(*flags):
        return export.default_output(parser.parse_args(flags), tmp_path / "t.pth").name

    of_weights = ("--weights", "t.pth")
    names = [
        name(*of_weights, *more)
        for more in ([], ["--last_stride", "1"], ["--height", "128"], ["--width", "128"])
    ]
    assert names[0] == "t_features_fp32.onnx"
    assert len({*names}) == 4


def flags(folder, data_dir):
    return ("--name", folder.name, "--model_dir", folder.parent, "--data_dir", data_dir)


@pytest.mark.slow
@pytest.mark.parametrize("size", [None, "64x32 of 80x36"])
def test_fp32_as_a_user(size, folder, prepared, capsys):
    pytest.importorskip("onnxruntime")
    more = ("--test_size", size) if size else ()
    call(export.main, *flags(folder, prepared), "--preprocess", "inside", *more)
    out, err = capsys.readouterr()
    words = "64x32_of_80x36_" if size else ""
    assert (folder / f"features_{words}fp32_inside.onnx").exists()
    assert re.search(r"on 8 images cosine (1.00000|0.99999)\d at the least", out)
    assert "3 queries rank 5 gallery images with 0 of" in out
    assert err == ""


@pytest.mark.slow
def test_int8_as_a_user(folder, prepared, capsys, tmp_path, monkeypatch):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    seen, training_images = [], export.spread_out
    monkeypatch.setattr(export, "spread_out", lambda e, n: seen.append(e) or training_images(e, n))
    results = tmp_path / "results.json"
    call(
        export.main, *flags(folder, prepared), "--precision", "int8", "--json", results,
        "--calibration_images", 4, "--preprocess", "inside", "--test_size", "center",
    )  # fmt: skip
    out, err = capsys.readouterr()
    assert "PyTorch's fp32: Rank@1" in out
    assert err == ""
    assert {Path(path).parent.parent.name for path in seen[0]} == {"train_all"}

    section = json.loads(results.read_text())["export"]
    path = folder / "features_center_int8_inside.onnx"
    assert section["sha256"] == sha256(path)
    assert section["agreement"]["cosine_min"] > 0.99
    assert set(section["accuracy"]) == {"exported", "pytorch_fp32"}
    assert section["metadata"]["precision"] == "int8"
    sides = [section["metadata"][p + s] for p in ("", "resize_") for s in ("height", "width")]
    assert sides == ["64", "32", "72", "36"]
    assert path.stat().st_size < 0.4 * (folder / "net_last.pth").stat().st_size  # that is fp32

    model = onnx.load(path)
    kinds = [node.op_type for node in model.graph.node]
    pooling = kinds.index("ReduceMean")
    assert "QuantizeLinear" not in kinds[pooling:]
    types = {t.name: t.data_type for t in model.graph.initializer if t.name.endswith("_quantized")}
    weights = [kind for name, kind in types.items() if "bias" not in name]
    assert weights == [onnx.TensorProto.INT8] * kinds.count("Conv")


@pytest.mark.slow
def test_fp16_as_a_user(folder, prepared, capsys, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    path = tmp_path / "half.onnx"
    call(
        export.main, *flags(folder, prepared), "--precision", "fp16", "--skip_accuracy",
        "--output", path,
    )  # fmt: skip
    assert "test_resnet in fp16" in capsys.readouterr().out
    model = onnx.load(path)
    ends = [*model.graph.input, *model.graph.output]
    assert {e.type.tensor_type.elem_type for e in ends} == {onnx.TensorProto.FLOAT}
    sizes = {}
    for tensor in model.graph.initializer:
        sizes[tensor.data_type] = sizes.get(tensor.data_type, 0) + int(np.prod(tensor.dims))
    assert sizes[onnx.TensorProto.FLOAT16] > 1000 * sizes.get(onnx.TensorProto.FLOAT, 0)


def fails(folder, capsys, *flags, says):
    """The script ends with one line on standard error, and nothing new in the run folder."""
    before = sorted(folder.parent.rglob("*"))
    assert exit_code(export.main, *flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(says) in line
    assert sorted(folder.parent.rglob("*")) == before


def test_a_file_that_computes_otherwise_is_not_kept(folder, prepared, capsys, monkeypatch):
    def broken(path):
        compute, facts = torch_compute(path)
        return lambda images: compute(images[:, :, ::-1].copy()), facts  # upside down

    monkeypatch.setattr(export, "tools", lambda args: (torch_file, broken))
    fails(folder, capsys, *flags(folder, prepared), "--format", "torch", says="not written")


@pytest.mark.slow
def test_features_that_are_no_numbers_are_not_kept(folder, prepared, capsys, monkeypatch):
    def overflowed(path):
        compute, facts = torch_compute(path)
        return lambda images: compute(images) * np.float32("nan"), facts

    monkeypatch.setattr(export, "tools", lambda args: (torch_file, overflowed))
    good = (*flags(folder, prepared), "--format", "torch", "--precision", "fp16")
    fails(folder, capsys, *good, says="its features are infinite or NaN")


def test_mistakes(folder, prepared, capsys, monkeypatch):
    good = flags(folder, prepared)
    torch_format = (*good, "--format", "torch")
    fails(folder, capsys, *torch_format, "--name", "none", says="none: no such run")
    fails(folder, capsys, *torch_format, "--data_dir", "none", says="none: no such folder")
    fails(folder, capsys, *torch_format, "--output", folder / "a" / "b", says="can't be written")
    fails(folder, capsys, *torch_format, "--which_epoch", "9", says="net_9.pth")
    fails(folder, capsys, *torch_format, "--precision", "int8", says="--precision int8: ONNX only")
    monkeypatch.delitem(sys.modules, "reid.exporting.onnx_format", raising=False)
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # as if it were not installed
    fails(folder, capsys, *good, says="pip install onnx onnxruntime onnxscript")
