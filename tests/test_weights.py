"""Weights of other codes: the layouts of their files, features of them, files that are refused."""

import argparse
import re
from functools import cache

import numpy as np
import pytest
import torch
from conftest import call, exit_code
from torch import nn
from torchvision import models

import export
import search
import test as extraction
from reid.checkpoint import load_weights
from reid.errors import UserError
from reid.exporting.agreement import File
from reid.exporting.network import torch_compute
from reid.mat import load_mat
from reid.weights import build_network, flat, foreign_network

timm = pytest.importorskip("timm")
safetensors = pytest.importorskip("safetensors.torch")
SIZE = 64, 32
IMAGES = torch.randn(2, 3, *SIZE)
VIT = "vit_tiny_patch16_224"
# Of each code: the key that its weights lie under, its neck, its exponent of GeM, what is no
# backbone in its files or how that begins.
CODES = {
    "torchvision": (None, None, 1, "fc (2)"),
    "layumi": (None, None, 1, "model.fc (2), classifier.add_block.0 (2), classifier.add_block.1"),
    "torchreid": ("state_dict", None, 1, "classifier (2)"),
    "fast-reid": ("model", "heads.bottleneck.0", 2.5, "pixel_mean, pixel_std, heads.pool_layer"),
    "strong-baseline": (None, "bottleneck", 1, "bottleneck (4), classifier"),
    "cluster-contrast": ("state_dict", "module.feat_bn", 3.5, "gap"),
    "MoCo": ("state_dict", None, 1, "queue, queue_ptr, encoder_q.fc.0 (2), encoder_q.fc.2 (2)"),
    "DINO": (None, None, 1, "student.module.backbone.conv1, student.module.backbone.bn1 (4)"),
}


def norm(name, dim):
    """A batch norm's tensors."""
    scales = {f"{name}.weight": torch.rand(dim) + 0.5, f"{name}.running_var": torch.rand(dim) + 0.5}
    means = {f"{name}.bias": torch.randn(dim) / 10, f"{name}.running_mean": torch.randn(dim) / 10}
    return scales | means | {f"{name}.num_batches_tracked": torch.tensor(7)}


def linear(name, rows, columns):
    return {f"{name}.weight": torch.randn(rows, columns), f"{name}.bias": torch.randn(rows)}


def under(prefix, weights):
    return {prefix + name: value for name, value in weights.items()}


@cache
def resnet(name="resnet18", last_stride=2):
    """A network of torchvision with random weights and statistics."""
    net = getattr(models, name)().eval()
    for place, part in net.named_modules():
        if isinstance(part, nn.BatchNorm2d):
            net.load_state_dict(norm(place, part.num_features), strict=False)
    if last_stride == 1:
        for layer in net.layer4[0].modules():
            if isinstance(layer, nn.Conv2d):
                layer.stride = (1, 1)
    return net


def body(net):
    """The weights of a ResNet without its classifier."""
    return {name: value for name, value in net.state_dict().items() if not name.startswith("fc.")}


def numbered(weights):
    """The names that a ResNet's parts have as children of an nn.Sequential."""
    places = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
    parts = [(name.partition("."), value) for name, value in weights.items()]
    return {f"{places[first]}.{rest}": value for (first, _, rest), value in parts}


def stored_by(code, net):
    """The tensors of a ResNet in a file of another code."""
    base, dim = body(net), net.fc.in_features
    twin, classifier = {n: v + 1 for n, v in base.items()}, linear("classifier", 7, dim)
    if code == "torchvision":
        return net.state_dict()
    if code == "layumi":
        block = linear("add_block.0", 512, dim) | norm("add_block.1", 512)
        head = block | linear("classifier.0", 7, 512)
        return under("model.", net.state_dict()) | under("classifier.", head)
    if code == "torchreid":
        return under("module.", base | classifier)
    if code == "fast-reid":
        pixels = {"pixel_mean": torch.ones(1, 3, 1, 1), "pixel_std": torch.ones(1, 3, 1, 1)}
        head = {"pool_layer.p": torch.tensor([2.5])} | norm("bottleneck.0", dim) | classifier
        return pixels | under("backbone.", base) | under("heads.", head)
    if code == "strong-baseline":
        return under("base.", base) | norm("bottleneck", dim) | classifier
    if code == "cluster-contrast":
        head = {"gap.p": torch.tensor([3.5])} | norm("feat_bn", dim)
        return under("module.", under("base.", numbered(base)) | head)
    if code == "MoCo":
        queue = {"queue": torch.randn(8, 16), "queue_ptr": torch.zeros(1).long()}
        head = linear("fc.0", dim, dim) | linear("fc.2", 8, dim)
        encoders = under("encoder_q.", base | head) | under("encoder_k.", twin | head)
        return under("module.", queue | encoders)
    student, head = under("module.backbone.", twin), linear("head.mlp.0", 8, dim)
    teacher = under("backbone.", base)  # of a ViT; a ResNet's has `module.`, too
    return {"student": student | head, "teacher": teacher | head, "loss": {"center": torch.ones(8)}}


def save(path, tensors, wrapper=None, **beside):
    """Write a file as other codes do: with epoch and optimiser, if under a key."""
    if path.suffix == ".safetensors":
        safetensors.save_file({name: value.clone() for name, value in flat(tensors)}, path)
        return path
    state = {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
    others = {"epoch": 60, "optimizer": state, **beside}
    torch.save({wrapper: tensors, **others} if wrapper else tensors, path)
    return path


def check_same(net, weights):
    """Check that a network's backbone has these weights."""
    for name, value in net.model.state_dict().items():
        if not name.startswith("fc.") and not name.endswith("num_batches_tracked"):
            assert torch.equal(value, weights[name]), name


def check_features(trained, pooled, weights=None, neck=None):
    """Compare features with pooled ones, and with those after a neck where there is one."""
    words = ("running_mean", "running_var", "weight", "bias")
    values = [weights[f"{neck}.{word}"] for word in words] if neck else []
    usual = nn.functional.batch_norm(pooled, *values) if neck else pooled
    for layer, expected in [("pool", pooled), (trained.layer, usual)]:
        with torch.no_grad():
            found = trained.net.eval()(IMAGES, return_features=True, layer=layer)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def refusal(path, backbone="resnet18", size=SIZE):
    """The one line with which --pretrained and --weights refuse a file."""
    with pytest.raises(UserError) as error:
        build_network(backbone, 5, path, size)
    with pytest.raises(UserError) as again:
        foreign_network(path, backbone, 2, size)
    assert str(error.value).removeprefix("--pretrained ") == str(again.value)
    assert str(again.value).startswith(f"{path}: ") and "\n" not in str(again.value)
    return str(again.value)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("code", CODES)
def test_backbone_of(code, suffix, tmp_path, capsys):
    wrapper, _, _, left_out = CODES[code]
    path = save(tmp_path / f"w{suffix}", stored_by(code, resnet()), wrapper)
    if (code, suffix) == ("cluster-contrast", ".safetensors"):  # other names, and those sorted
        refusal(path)
        return
    check_same(build_network("resnet18", 5, path, SIZE), body(resnet()))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{path}: left out {left_out if suffix == '.pth' else ''}")


@pytest.mark.parametrize(
    ("code", "backbone", "last_stride"),
    [
        ("torchvision", "resnet18", 2),
        ("torchreid", "resnet18", 2),
        ("layumi", "resnet50", 2),
        ("strong-baseline", "resnet18", 2),
        ("strong-baseline", "resnet50", 1),
        ("strong-baseline", "resnet18", 1),
        pytest.param("fast-reid", "resnet18", 2),
        pytest.param("fast-reid", "resnet50", 1),
        pytest.param("cluster-contrast", "resnet50", 1),
        pytest.param("MoCo", "resnet18", 2),
        pytest.param("DINO", "resnet18", 2),
        pytest.param("layumi", "resnet18", 2),
    ],
)
def test_features_of(code, backbone, last_stride, tmp_path, capsys):
    """Those of --weights are the other code's: pooled, by GeM if it does so, after its neck."""
    net, (wrapper, neck, p, _) = resnet(backbone, last_stride), CODES[code]
    tensors = stored_by(code, net)
    trained = load_weights(save(tmp_path / "w.pt", tensors, wrapper), backbone, last_stride, *SIZE)
    maps = nn.Sequential(*list(net.children())[:-2])(IMAGES).detach()
    check_features(trained, maps.clamp(1e-6).pow(p).mean((2, 3)).pow(1 / p), tensors, neck)
    lines = capsys.readouterr().out
    assert (f"w.pt: pooled by GeM, with the exponent {p:.2f} of " in lines) is (p > 1)
    assert ("w.pt: features after the batch norm " in lines) is bool(neck)


@pytest.mark.parametrize("new", [r"\1\2.", r"\1.\2."])
def test_features_of_densenet(new, tmp_path, capsys):
    """Also with the names `norm.1` of torchvision's own files."""
    net = models.densenet121().eval()
    weights = {re.sub(r"(norm|conv)([12])\.", new, n): v for n, v in net.state_dict().items()}
    path = save(tmp_path / "w.pth", under("module.", weights), "state_dict")
    trained = load_weights(path, "densenet121", 2, *SIZE)
    check_features(trained, net.features(IMAGES).mean((2, 3)).detach())
    assert capsys.readouterr().out == f"{path}: left out: classifier (2)\n"


@pytest.mark.parametrize(("name", "head"), [(VIT, "head"), ("convnext_atto", "head.fc")])
def test_features_of_timm(name, head, tmp_path, capsys):
    """At another size of images, position codes are as timm resamples them."""
    net = timm.create_model(name).eval()
    path = save(tmp_path / "w.safetensors", net.state_dict())
    check_same(build_network(name, 5, path, (224, 224)), net.state_dict())
    assert capsys.readouterr().out == f"{path}: left out {head} (2)\n"
    if name == VIT:
        net.set_input_size(img_size=SIZE)
    pooled = net.forward_head(net.forward_features(IMAGES), pre_logits=True).detach()
    check_features(load_weights(path, name, 2, *SIZE), pooled)


def test_features_of_transreid(tmp_path, capsys):
    """Its position codes are of its own size of images; its first neck is that of the whole."""
    net = timm.create_model(VIT, img_size=SIZE, num_classes=0).eval()
    base = net.state_dict() | {"sie_embed": torch.randn(6, 1, 192)} | linear("fc", 9, 192)
    necks = norm("bottleneck", 192) | norm("bottleneck_1", 192) | norm("bottleneck_2", 192)
    path = save(tmp_path / "w.pth", under("base.", base) | necks)
    pooled = net.forward_features(IMAGES)[:, 0].detach()
    check_features(load_weights(path, VIT, 2, *SIZE), pooled, necks, "bottleneck")
    assert "base.fc (2), bottleneck_1 (4), bottleneck_2 (4)" in capsys.readouterr().out
    assert "base.pos_embed is (1, 9, 192), not (1, 197, 192)" in refusal(path, VIT, (128, 64))


def test_exponent_beside_the_backbone(tmp_path):
    both = {"module.encoder_q.p": torch.ones(1) * 2, "module.encoder_k.p": torch.ones(1) * 4}
    path = save(tmp_path / "w.pth", stored_by("MoCo", resnet()) | both)
    assert foreign_network(path, "resnet18", 2, SIZE)[0].pooling.p == 2


# --- refused files ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("holds", "backbone"),
    [
        ("resnet50", "resnet18"),
        ("densenet121", "resnet18"),
        ("resnet18", VIT),
        # It has all names of the other, and more.
        ("resnet34", "resnet18"),
    ],
)
def test_another_architecture(holds, backbone, tmp_path):
    path = save(tmp_path / "w.pth", getattr(models, holds)().state_dict())
    assert f"not the weights of a {backbone} backbone" in refusal(path, backbone)


@pytest.mark.parametrize("missing", [False, True])
def test_one_tensor_amiss(missing, tmp_path):
    name, weights = "base.layer3.0.conv2.weight", under("base.", body(resnet()))
    weights[name] = torch.ones(1)
    if missing:
        del weights[name]
    said = f"it has no {name}" if missing else f"{name} is (1,), not (256, 256, 3, 3)"
    assert said in refusal(save(tmp_path / "w.pth", weights))


def test_layers_beside_the_backbone(tmp_path):
    """Non-local blocks, as fast-reid has them: without these its features would be others."""
    more = {"backbone.NL_2.0.g.weight": torch.ones(4, 256, 1, 1)}
    path = save(tmp_path / "w.pth", stored_by("fast-reid", resnet()) | more)
    assert "it has also backbone.NL_2.0.g.weight" in refusal(path)


def test_our_own_file_tells_its_network(tmp_path, capsys):
    """Stride, neck and backbone, without a run folder."""
    net = build_network("tf_efficientnet_lite0", 3, size=SIZE, neck="bnneck", last_stride=1).eval()
    trained = load_weights(save(tmp_path / "net.pth", net.state_dict()), height=64, width=32)
    assert capsys.readouterr().out == ""
    assert trained.net.backbone == "tf_efficientnet_lite0"
    assert str(trained.transform) == "64x32 of 72x36"  # what is usual
    with torch.no_grad():
        expected = net(IMAGES, return_features=True)
        assert torch.equal(trained.net.eval()(IMAGES, return_features=True), expected)
    build_network("tf_efficientnet_lite0", 3, tmp_path / "net.pth", SIZE)
    assert "_extra_state" not in capsys.readouterr().out
    trained = load_weights(tmp_path / "net.pth")
    assert (trained.height, trained.width) == (256, 128)
    assert (
        "doesn't tell the size of its training images; taken for 256x128" in capsys.readouterr().out
    )
    with pytest.raises(
        UserError, match="holds a tf_efficientnet_lite0, not the expected ResNet-50"
    ):
        load_weights(tmp_path / "net.pth", "resnet50")


def test_two_copies(tmp_path):
    path = save(tmp_path / "w.pth", under("a.", body(resnet())) | under("b.", body(resnet())))
    assert "2 of them begin at a.conv1.weight, b.conv1.weight; save one alone" in refusal(path)


def test_half_of_the_preferred_copy(tmp_path):
    whole = body(resnet())
    half = {name: value for name, value in whole.items() if not name.startswith("layer4")}
    refusal(save(tmp_path / "w.pth", under("student.", whole) | under("teacher.", half)))


@pytest.mark.parametrize("rename", [dict, numbered])
def test_counters_may_be_missing(rename, tmp_path):
    weights = {n: v for n, v in body(resnet()).items() if not n.endswith("num_batches_tracked")}
    path = save(tmp_path / "w.pth", rename(weights))
    check_same(build_network("resnet18", 5, path, SIZE), weights)


def exchanged(weights, one, other):
    """Let the names that begin with `one` and with `other` change places."""
    some, others = ([n for n in weights if n.startswith(begin)] for begin in (one, other))
    places = dict(zip(some + others, others + some, strict=True))
    return {name: weights[name] for name in (places.get(n, n) for n in weights)}


def test_order_does_not_matter_to_names(tmp_path):
    path = save(tmp_path / "w.pth", exchanged(body(resnet()), "layer1.0.", "layer1.1."))
    check_same(build_network("resnet18", 5, path, SIZE), body(resnet()))


@pytest.mark.parametrize(
    "places",
    [
        ("4.0.conv1", "5.0.conv1"),
        ("4.0.bn1.weight", "4.0.bn1.bias"),
        ("4.0.", "4.1."),  # same shapes, but the numbers tell
    ],
)
def test_other_names_in_another_order(places, tmp_path):
    refusal(save(tmp_path / "w.pth", exchanged(numbered(body(resnet())), *places)))


def in_other_words(weights):
    """The names of an EfficientNet's parts in a code that counts its blocks in one row."""
    renamed, blocks = {}, []
    for name, value in weights.items():
        first, *rest = name.split(".")
        if first == "blocks":
            block = rest[:2]
            blocks += [block] if block not in blocks else []
            rest = [str(blocks.index(block)), f"_{rest[2]}", *rest[3:]]
        renamed[".".join([f"_{first}", *rest])] = value
    return renamed


def test_all_names_differ(tmp_path, capsys):
    torch.manual_seed(0)
    weights = timm.create_model("tf_efficientnet_lite0").state_dict()
    theirs = in_other_words(weights)
    assert not theirs.keys() & weights.keys()
    path = save(tmp_path / "w.pth", theirs)
    check_same(build_network("tf_efficientnet_lite0", 5, path, SIZE), weights)
    assert capsys.readouterr().out.endswith("left out _classifier (2)\n")
    # Two blocks of the same shapes.
    assert [theirs[f"_blocks.{n}._conv_dw.weight"].shape[0] for n in (6, 7)] == [480, 480]
    swapped = exchanged(theirs, "_blocks.6.", "_blocks.7.")
    refusal(save(tmp_path / "w.pth", swapped), "tf_efficientnet_lite0")
    refusal(
        save(tmp_path / "w.pth", theirs | {"_blocks.16._conv_dw.weight": torch.ones(1)}),
        "tf_efficientnet_lite0",
    )


@pytest.mark.parametrize("beside", [argparse.Namespace(lr=0.1), np.float64(0.5), np.float32(1)])
def test_numbers_and_options_beside_weights(beside, tmp_path):
    """As DINO and torchreid keep them; they can do nothing."""
    path = save(tmp_path / "w.pth", body(resnet()), "state_dict", best=beside)
    check_same(build_network("resnet18", 5, path, SIZE), body(resnet()))


def test_python_objects(tmp_path):
    path = save(tmp_path / "w.pth", body(resnet()), "state_dict", best=nn.ReLU())
    assert "holds Python objects beside its weights" in (line := refusal(path))
    assert f"torch.save(torch.load({str(path)!r}, weights_only=False)['state_dict'], " in line


@pytest.mark.filterwarnings("ignore")  # scripting is on its way out
def test_torchscript(tmp_path):
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "w.pt")
    assert "or the .state_dict() of a whole network" in refusal(tmp_path / "w.pt")


@pytest.mark.parametrize("content", [b"", b"no header", None])
def test_damaged_safetensors(content, tmp_path):
    path = save(tmp_path / "w.safetensors", linear("fc", 9, 9))
    path.write_bytes(path.read_bytes()[:-9] if content is None else content)
    assert refusal(path).startswith(f"{path}: not a readable safetensors file; copy it again")


def test_size_that_a_backbone_cannot_take(tmp_path):
    path = save(tmp_path / "w.pth", timm.create_model(VIT).state_dict())
    with pytest.raises(UserError, match="can't take images of 60x33"):
        build_network(VIT, 5, path, (60, 33))


def test_tensor_without_a_module_of_its_own(tmp_path, capsys):
    weights = under("base.", body(resnet()) | {"extra": torch.ones(1)})
    build_network("resnet18", 5, save(tmp_path / "w.pth", weights), SIZE)
    assert capsys.readouterr().out.endswith("left out base.extra\n")


# --- scripts ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_scripts_take_features_of_other_codes(prepared, tmp_path, monkeypatch, capsys):
    """test.py, search.py and export.py with --weights: no run folder, the features of the file."""
    monkeypatch.chdir(tmp_path)
    net, tensors = resnet(), stored_by("strong-baseline", resnet())
    path = save(tmp_path / "theirs.pth", tensors)
    flags = ["--weights", path, "--backbone", "resnet18", "--height", 64, "--width", 32]
    call(extraction.main, "--data_dir", prepared, *flags, "--gpu_ids", "-1")
    out = capsys.readouterr().out
    assert f"{path}: left out: classifier (2)" in out
    assert "resnet18, trained at 64x32, layer bottleneck at 64x32" in out
    query = load_mat("pytorch_result.mat").query
    assert query.features.shape[1] == net.fc.in_features
    images = [prepared / file for file in query.files]
    call(
        search.main,
        "--query",
        images[0],
        "--gallery",
        prepared / "query",
        *flags,
        "--gpu_ids",
        "-1",
    )
    assert "features of 512 numbers" in capsys.readouterr().out
    call(export.main, "--data_dir", prepared, *flags, "--format", "torch", "--check_images", 10)
    capsys.readouterr()
    file = File(*torch_compute(tmp_path / "theirs_features_height64_width32_fp32.pt2"))
    np.testing.assert_allclose(file(images), query.features, atol=1e-4)
    assert exit_code(extraction.main, *flags[:2], "--data_dir", prepared, "--backbone", "vit") == 2
    assert "--backbone vit: not resnet50, densenet121 or" in capsys.readouterr().err
    assert exit_code(extraction.main, *flags[:2], "--data_dir", prepared) == 2
    assert "not the weights of a resnet50 backbone" in capsys.readouterr().err


def test_a_layer_that_a_file_does_not_have(tmp_path):
    path = save(tmp_path / "w.pth", resnet().state_dict())
    with pytest.raises(UserError, match=r"--which_layer bottleneck: .* has no batch norm neck"):
        load_weights(path, "resnet18", 2, *SIZE, layer="bottleneck")
