"""Any backbone: timm's models as networks of ours, from making them to a file for others."""

import copy
import json
import sys

import numpy as np
import pytest
import torch
from conftest import TINY, call, exit_code, run_script
from PIL import Image
from torch import nn

import evaluate
import test as extraction
import train_baseline
from model import IMAGENET, ft_net, make_network
from reid import optimizer
from reid.checkpoint import Run, as_trained, load_trained
from reid.device import to_device
from reid.distributed import WholeDropPath, World
from reid.errors import UserError
from reid.features import Embedder, fold_for_inference
from reid.options import parse_training
from reid.transforms import EvalTransform
from reid.weights import build_network, load_network

timm = pytest.importorskip("timm")
DropPath = timm.layers.DropPath

LITE0, VIT, SWIN = "tf_efficientnet_lite0", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"
ATTO = "convnext_atto"
BACKBONES = ["resnet18", LITE0, "mobilenetv3_small_100", ATTO, VIT, SWIN]
SIZE = (64, 32)
FLAGS = (
    "--gpu_ids -1 --workers 0 --pretrained none --height 64 --width 32 --batchsize 4 "
    "--precision fp32 --epochs 1 --name r"
).split()


def lived_in(net):
    """Give batch norms the statistics of a trained network."""
    generator = torch.Generator().manual_seed(0)
    for norm in net.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.running_mean.normal_(0, 0.1, generator=generator)
            norm.running_var.uniform_(0.5, 2, generator=generator)
    return net.eval()


def centred(features):
    """Features without what all of them share, normalised."""
    features = features - features.mean(0)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


@pytest.fixture(scope="module", autouse=True)
def shallow():
    """Have timm make these with few blocks of each kind, which exporters take minutes less for."""
    fewer = {VIT: {"depth": 2}, SWIN: {"depths": (1, 1, 2, 1)}, ATTO: {"depths": (1, 1, 1, 1)}}
    create = timm.create_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            timm,
            "create_model",
            lambda name, *args, **options: create(name, *args, **fewer.get(name, {}), **options),
        )
        yield


@pytest.fixture(scope="module")
def networks():
    made = {}
    for name in BACKBONES:
        torch.manual_seed(1)  # in int8 some random weights tell images apart no better than chance
        made[name] = lived_in(build_network(name, 3, size=SIZE))
    return made


@pytest.mark.parametrize("name", BACKBONES)
def test_pooled_features_are_timms(name, networks):
    net = networks[name]
    plain = timm.create_model(name, num_classes=0)
    if name in (VIT, SWIN):
        plain.set_input_size(img_size=SIZE)
    weights = {n: v for n, v in net.model.state_dict().items() if not n.startswith("fc.")}
    plain.load_state_dict(weights)
    images = torch.randn(2, 3, *SIZE)
    with torch.inference_mode():
        assert torch.allclose(net(images, return_features=True), plain.eval()(images), atol=1e-6)
        assert net(images, return_features=True, layer="bottleneck").shape == (2, 512)
        assert net(images).shape == (2, 3)


@pytest.mark.parametrize("name", BACKBONES)
def test_a_weights_file_tells_everything(name, networks, tmp_path):
    """Backbone, size, normalisation, head: no word of them in the call."""
    net = networks[name]
    Run(tmp_path).save_weights(net, "last")
    assert all(map(torch.is_tensor, torch.load(tmp_path / "net_last.pth").values()))
    loaded = load_network(tmp_path / "net_last.pth").eval()
    assert (loaded.backbone, loaded.normalisation) == (name, net.normalisation)
    images = torch.randn(2, 3, *SIZE)
    with torch.inference_mode():
        assert torch.equal(net(images), loaded(images))


def test_options_survive_a_weights_file(tmp_path):
    net = build_network(LITE0, 3, size=SIZE, neck="bnneck", pooling="gem", last_stride=1).eval()
    Run(tmp_path).save_weights(net, "last")
    loaded = load_network(tmp_path / "net_last.pth").eval()
    assert (loaded.bnneck, loaded.last_stride) == (True, 1)
    images = torch.randn(2, 3, *SIZE)
    assert net.feature_maps(images).shape == (2, 1280, 4, 2)
    by_hand = net.feature_maps(images).clamp(min=1e-6).pow(3).mean(dim=(2, 3)).pow(1 / 3)
    assert torch.allclose(net(images, return_features=True, layer="pool"), by_hand, atol=1e-5)
    assert torch.equal(net(images), loaded(images))


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        (VIT, {"pooling": "gem"}, "--pooling gem: .* has no feature maps"),
        (VIT, {"last_stride": 1}, "--last_stride 1: .* can't keep"),
        ("mobilenetv3_small_100", {"last_stride": 1}, "--last_stride 1: .* can't keep"),
        ("levit_128s", {}, "--backbone levit_128s: takes images of 224x224 only"),
        ("resnet19", {}, "--backbone resnet19: not .* similar are .*resnet18"),
        ("resnet18.no_such_tag", {}, "--backbone resnet18.no_such_tag: "),
    ],
)
def test_what_a_backbone_can_not(name, options, says):
    with pytest.raises(UserError, match=says):
        build_network(name, 3, size=SIZE, **options)


def test_sizes_that_would_cut_an_image(networks):
    with pytest.raises(ValueError, match="only multiples of 16x16"):
        networks[VIT].set_size(72, 36)


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="--backbone resnet18: needs timm; pip install timm"):
        build_network("resnet18", 3)
    build_network("densenet121", 3)


def test_imagenet_weights_that_cannot_be_downloaded(monkeypatch):
    create = timm.create_model

    def offline(name, pretrained=False, **options):
        if pretrained:
            raise OSError("no route to host")
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UserError, match=r"--pretrained imagenet: .*--pretrained FILE .* none"):
        build_network("resnet18", 3, "imagenet")


@pytest.mark.parametrize("name", ["resnet18", LITE0, "mobilenetv3_small_100", "resnetv2_50"])
def test_folding_changes_no_feature(name):
    net = lived_in(build_network(name, 3, size=SIZE))
    images = torch.randn(2, 3, *SIZE)
    with torch.inference_mode():
        expected = net(images, return_features=True)
        folded = fold_for_inference(net)(images, return_features=True)
    assert torch.allclose(folded, expected, atol=1e-5 * expected.abs().max())
    left = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(left) == (
        17 if name == "resnetv2_50" else 0
    )  # those that stand before a convolution


def test_nothing_is_folded_where_the_order_deceives(monkeypatch):
    net = lived_in(build_network("resnet18", 3, size=SIZE))
    block = net.model.layer1[0]
    block.bn1, block.bn2 = block.bn2, block.bn1  # as registered, but used the other way round
    forward = type(block).forward

    def swapped(self, x):
        self.bn1, self.bn2 = self.bn2, self.bn1
        try:
            return forward(self, x)
        finally:
            self.bn1, self.bn2 = self.bn2, self.bn1

    monkeypatch.setattr(type(block), "forward", swapped)
    images = torch.randn(2, 3, *SIZE)
    expected = net(images, return_features=True)
    assert torch.equal(fold_for_inference(net)(images, return_features=True), expected)
    assert any(isinstance(m, nn.BatchNorm2d) for m in net.modules())


def test_strided_convolutions_of_few_channels_compute_the_same():
    """The layer whose gradients make PyTorch crash in channels_last, without its stride."""
    images = torch.randn(2, 3, 31, 20)
    for stride in (2, (3, 1)):
        plain = nn.Conv2d(3, 5, 1, stride)
        moved = to_device(copy.deepcopy(plain), torch.device("cpu"))
        torch.testing.assert_close(moved(images), plain(images))
        assert moved.stride == (1, 1)
        again = to_device(copy.deepcopy(moved), torch.device("cpu"))
        torch.testing.assert_close(again(images), plain(images))


@pytest.mark.slow
def test_a_backbone_with_such_convolutions_trains(prepared, tmp_path):
    flags = f"{TINY} --backbone mobileone_s0 --batchsize 4 --epochs 1 --workers 0 --train_all"
    where = ("--data_dir", prepared, "--model_dir", tmp_path)
    code, _, err = run_script("train_baseline.py", *where, *flags.split())
    assert (code, err) == (0, "")


def test_patches_whose_size_is_one_number():
    net = build_network("efficientvit_m0", 3, size=(64, 32))
    assert net.size == (64, 32)
    with pytest.raises(UserError, match="only multiples of 16x16"):
        build_network("efficientvit_m0", 3, size=(64, 40))


@pytest.mark.slow
@pytest.mark.parametrize("name", [LITE0, VIT])
def test_from_training_to_scores(name, prepared, tmp_path, monkeypatch, capsys):
    """Training, resuming, extraction, Embedder: one backbone, one normalisation, one size."""
    monkeypatch.chdir(tmp_path)
    flags = ["--data_dir", prepared, "--model_dir", tmp_path, *FLAGS, "--backbone", name]
    call(train_baseline.main, *flags, "--ema", "0.9")
    call(train_baseline.main, *flags, "--ema", "0.9", "--epochs", 2, "--resume")
    opts = json.loads((tmp_path / "r" / "opts.json").read_text())
    assert opts["options"]["backbone"] == name
    assert opts["mean"] == opts["std"] == [0.5] * 3
    with pytest.raises(UserError, match=f"was started with --backbone {name}, not resnet18"):
        call(train_baseline.main, *flags[:-1], "resnet18", "--resume")
    capsys.readouterr()
    test = ["--data_dir", prepared, "--model_dir", tmp_path, "--name", "r", "--gpu_ids", "-1"]
    call(extraction.main, *test)
    assert f"{name}, trained at 64x32, layer pool at 64x32 of 72x36, on" in capsys.readouterr().out
    call(evaluate.main, "pytorch_result.mat")
    assert exit_code(extraction.main, *test, "--backbone", "resnet18") == 2
    assert f"holds a {name}, not the expected resnet18" in capsys.readouterr().err
    if name == VIT:
        assert exit_code(extraction.main, *test, "--ms", "1,0.5") == 2
        assert "images of one size" in capsys.readouterr().err

    crop = np.random.default_rng(0).integers(0, 256, (100, 40, 3), dtype=np.uint8)
    found = Embedder(tmp_path / "r", device="cpu")([crop])
    net = load_network(tmp_path / "r" / "net_last.pth").eval()
    resized = Image.fromarray(crop).resize((36, 72), Image.Resampling.BICUBIC)
    resized = resized.crop((2, 4, 34, 68))
    image = torch.from_numpy(np.asarray(resized) / 127.5 - 1).float().permute(2, 0, 1)[None]
    with torch.inference_mode():
        both = net(torch.cat([image, image.flip(3)]), return_features=True).sum(0)
    np.testing.assert_allclose(found[0], nn.functional.normalize(both, dim=0), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKBONES)
def test_exports(name, networks, tmp_path):
    """ONNX in fp32, int8 and, of one, fp16, and torch.export, against PyTorch."""
    pytest.importorskip("onnxruntime")
    from onnx import helper, load_from_string

    from reid.exporting.agreement import Eager, File
    from reid.exporting.int8 import quantised
    from reid.exporting.network import metadata, torch_compute, torch_file
    from reid.exporting.onnx_format import onnx_compute, onnx_file

    def trained(precision):
        found = load_trained(tmp_path, height=SIZE[0], width=SIZE[1])
        return found, metadata(found, "r", precision, "outside")

    Run(tmp_path).save_weights(networks[name], "last")
    images = list(np.random.default_rng(0).integers(0, 256, (8, *SIZE, 3), dtype=np.uint8))
    net, facts = trained("fp32")
    assert facts["backbone"] == name
    assert json.loads(facts["mean"]) == list(net.net.normalisation[0])
    expected = Eager(net).of_batch(images)
    files = {"fp32": onnx_file(*trained("fp32")), "torch": torch_file(*trained("fp32"))}
    # Of the file above, as onnx_file does it: making another one takes some ten seconds.
    model = quantised(load_from_string(files["fp32"]), images, facts)
    helper.set_model_props(model, facts | {"precision": "int8"})
    files["int8"] = model.SerializeToString()
    if name == VIT:
        files["fp16"] = onnx_file(*trained("fp16"))
    least = {"fp32": 0.99999, "torch": 0.99999, "int8": 0.8, "fp16": 0.9999}
    for kind, content in files.items():
        path = tmp_path / kind
        path.write_bytes(content)
        load = torch_compute if kind == "torch" else onnx_compute
        found = File(*load(path)).of_batch(images)
        assert (found * expected).sum(1).min() > least[kind], kind
        if kind == "int8":  # each is more like its own image's than like another's
            assert (centred(found) @ centred(expected).T).argmax(1).tolist() == list(range(8))


def test_stochastic_depth_has_the_whole_batchs_mask():
    path, features, parts = DropPath(0.5).train(), torch.randn(6, 4), []
    torch.manual_seed(0)
    whole = path(features)
    for rank in range(2):
        torch.manual_seed(0)
        world = World(rank, 2, torch.device("cpu"), [])
        parts.append(WholeDropPath(path, world).train()(world.shard(features)))
    assert torch.equal(torch.cat(parts), whole)
    assert 0 < (whole == 0).all(1).sum() < 6


def test_test_sizes(tmp_path):
    """By flag, else as found on held-out people, else as told in training, else as is usual."""
    run = Run(tmp_path / "r")
    run.start({"height": 64, "width": 32, "test_size": None, "backbone": "resnet50"}, {})
    run.save_weights(ft_net(3), "last")

    def size(**asked):
        return load_trained(run.path, **asked).transform.size

    assert size() == (72, 36)
    opts = json.loads(run.file("opts.json").read_text())
    opts["options"]["test_size"] = "same"
    run.file("opts.json").write_text(json.dumps(opts))
    assert size() == (64, 32)
    found = {"layer": "bottleneck", "test_size": "96x48"}
    run.save_testing(found)
    assert size() == (96, 48)
    assert load_trained(run.path).layer == "bottleneck"
    assert load_trained(run.path, layer="pool").layer == "pool"
    assert size(test_size="enlarged") == (72, 36)
    for given, read in (("center", "64x32 of 72x36"), ("50x40 of 60x50", "50x40 of 60x50")):
        transform = load_trained(run.path, test_size=given).transform
        assert str(transform) == read
        assert str(load_trained(run.path, test_size=read).transform) == read
    strange = ("64x32 of 63x32", "64x32 of 64x31", "64x32 of 72", "64x32 of", "64x32of72x36")
    for wrong in ("31x64", "big", "64", "64x", "0x0", 5, None, [], *strange):
        with pytest.raises(UserError, match="--test_size"):
            parse_training(train_baseline.get_parser(), ["--test_size", str(wrong)])
        run.save_testing(found | {"test_size": wrong})
        with pytest.raises(UserError, match=r"testing\.json: .*restore or delete it"):
            size()
    run.save_testing(found | {"layer": "last"})
    with pytest.raises(UserError, match=r"testing\.json: its layer is 'last'"):
        size()


def test_the_two_old_names():
    def backbone(*flags):
        return parse_training(train_baseline.get_parser(), flags).backbone

    assert backbone() == "resnet50"
    assert backbone("--use_dense") == "densenet121"
    assert backbone("--backbone", LITE0) == LITE0
    with pytest.raises(UserError, match="not allowed with"):
        backbone("--use_dense", "--backbone", LITE0)


@pytest.mark.slow
def test_the_faster_arithmetic_is_taken(monkeypatch, prepared, tmp_path, capsys):
    """By a trial of the network, which stays as it is; a resumed run keeps its own."""
    from reid import device, engine

    monkeypatch.setattr(device, "computes_bf16", lambda device: True)
    net = build_network("resnet18", 3, size=SIZE)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    seconds = {torch.bfloat16: 2.0, None: 1.0}
    monkeypatch.setattr(device, "seconds_of_step", lambda n, i, dtype, t: seconds[dtype])
    cpu = torch.device("cpu")
    assert device.faster_dtype(net, cpu, SIZE, 2) is None
    seconds[None] = 3.0
    assert device.faster_dtype(net, cpu, SIZE, 2) == torch.bfloat16
    monkeypatch.undo()
    assert device.faster_dtype(net, cpu, SIZE, 2, training=True) in (torch.bfloat16, None)
    after = net.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)

    monkeypatch.setattr(device, "computes_bf16", lambda device: True)
    monkeypatch.setattr(engine, "faster_dtype", lambda *args, **kwargs: torch.bfloat16)
    flags = ["--data_dir", prepared, "--model_dir", tmp_path, *FLAGS, "--backbone", LITE0]
    flags[flags.index("fp32")] = "auto"
    call(train_baseline.main, *flags)
    assert "bfloat16 is the faster arithmetic" in capsys.readouterr().out
    monkeypatch.setattr(engine, "faster_dtype", lambda *args, **kwargs: None)
    call(train_baseline.main, *flags, "--epochs", 2, "--resume")
    assert "epochs 2 to 2 on 1 x cpu, bfloat16" in capsys.readouterr().out


def test_embedder_takes_a_loaded_network(tmp_path):
    net = build_network(LITE0, 3, size=SIZE)
    Run(tmp_path).save_weights(net, "last")
    trained = as_trained(net, tmp_path / "net_last.pth", *SIZE)
    crop = np.random.default_rng(0).integers(0, 256, (70, 40, 3), dtype=np.uint8)
    expected = Embedder(tmp_path, device="cpu", test_size="64x32 of 72x36")([crop])
    np.testing.assert_allclose(Embedder(trained, device="cpu")([crop]), expected, atol=1e-6)


def test_normalisation_of_the_two_classic_ones_is_imagenets():
    assert make_network("resnet50", 2).normalisation == IMAGENET
    assert EvalTransform((64, 32)).scaled(1).size == (64, 32)


def test_the_average_copies_whole_numbers():
    """Swin's table of relative positions is a buffer of integers, which a mean would round down."""
    net = build_network(SWIN, 3, size=SIZE)
    tables = [m.relative_position_index.clone() for m in net.modules() if is_attention(m)]
    mean = optimizer.ema(net, 0.9)
    for _ in range(3):
        mean.update_parameters(net)
    after = [m.relative_position_index for m in mean.modules() if is_attention(m)]
    assert len(tables) == len(after) > 0
    assert all(map(torch.equal, tables, after))


def is_attention(module):
    return hasattr(module, "relative_position_index")


def test_a_size_that_testing_could_not_take_ends_training_at_once(prepared, tmp_path):
    flags = ["--data_dir", prepared, "--model_dir", tmp_path, *FLAGS, "--backbone", VIT]
    with pytest.raises(UserError, match="can't take images of 100x50"):
        call(train_baseline.main, *flags, "--test_size", "100x50")
    assert not (tmp_path / "r").exists()


def test_last_stride_keeps_kernels_as_they_are():
    """timm would also dilate the last stage's; ResNet's own way has one stride less."""
    net = build_network("resnet18", 3, size=SIZE, last_stride=1)
    plain = build_network("resnet18", 3, size=SIZE)
    convolutions = [
        [layer for layer in one.modules() if isinstance(layer, nn.Conv2d)] for one in (net, plain)
    ]
    changed = [
        (a.stride, b.stride)
        for a, b in zip(*convolutions, strict=True)
        if (a.stride, a.padding, a.dilation) != (b.stride, b.padding, b.dilation)
    ]
    assert changed == [((1, 1), (2, 2))] * 2  # a convolution and the shortcut beside it


def test_an_embedder_does_not_set_up_the_process(monkeypatch, tmp_path):
    """Its trial of bf16 neither: it may run in another program."""
    from reid import device

    monkeypatch.setattr(device, "computes_bf16", lambda device: True)
    monkeypatch.setattr(device, "set_up", lambda device: pytest.fail("set up"))
    Run(tmp_path).save_weights(build_network("resnet18", 3, size=SIZE), "last")
    Embedder(tmp_path, device="cpu", test_size="64x32")
    trained = load_trained(tmp_path, test_size="64x32")
    with pytest.raises(ValueError, match="those of the loaded network"):
        Embedder(trained, device="cpu", layer="pool")
