"""Heat maps: they add up to the similarity, show the right position, and reach the pictures."""

import numpy as np
import pytest
import torch
from conftest import call, exit_code, make_market, save_image
from PIL import Image
from test_features import crops, lived_in, run_folder

import evaluate
import evaluate_rerank
import prepare
import search
import test as extraction
from model import ft_net, ft_net_dense
from reid import pictures, report
from reid.errors import UserError
from reid.explain import explain
from reid.features import Embedder, fold_for_inference, view_features
from reid.mat import load_mat
from reid.weights import build_network

CPU = {"device": "cpu", "precision": "fp32"}
CLASSIC = [
    (backbone, neck, pooling, last_stride)
    for backbone in ("resnet50", "densenet121")
    for neck in ("bottleneck", "bnneck")
    for pooling, last_stride in (("avg", 2), ("gem", 1))
]
OF_TIMM = [
    (backbone, "bnneck", "avg", 2)
    for backbone in ("resnet18", "tf_efficientnet_lite0", "swin_tiny_patch4_window7_224")
]


def noise(height=64, width=32, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    return torch.from_numpy(pixels)


@pytest.mark.parametrize(("backbone", "neck", "pooling", "last_stride"), CLASSIC + OF_TIMM)
def test_cells_sum_to_the_similarity(backbone, neck, pooling, last_stride):
    torch.manual_seed(0)
    options = {"neck": neck, "pooling": pooling, "last_stride": last_stride}
    net = build_network(backbone, 3, size=(64, 32), **options)
    net = fold_for_inference(lived_in(net))
    layer = "bottleneck" if neck == "bnneck" else "pool"
    found = explain(net, noise(), layer=layer)
    one, other = view_features(net, noise(), None, layer)
    assert found.similarity == pytest.approx(float(one @ other), abs=1e-5)
    sums = found.maps.sum(axis=(1, 2)) + found.constants
    assert sums == pytest.approx([found.similarity] * 2, abs=1e-5)
    assert found.maps.shape == ((2, 4, 2) if last_stride == 1 else (2, 2, 1))
    assert (found.constants != 0).all() == (neck == "bnneck")
    assert found.maps.std() > 0


@pytest.mark.parametrize("pooling", ["avg", "gem"])
def test_cells_are_those_of_loops(pooling):
    """Position by position: the share of each in the mean, times the other image's direction."""
    torch.manual_seed(0)
    net = lived_in(build_network("resnet18", 3, size=(96, 64), neck="bnneck", pooling=pooling))
    images = noise(96, 64)
    found = explain(net, images, layer="bottleneck")
    with torch.no_grad():
        views = [net_input(net, image) for image in (*images, *images.flip(2))]
        maps = torch.cat([net.feature_maps(view) for view in views]).double().numpy()
    norm, p = net.model.fc[0], net.pooling.p.item() if pooling == "gem" else 1.0
    scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().double().numpy()
    shift = (norm.bias - norm.running_mean * torch.from_numpy(scale)).detach().numpy()
    powers = maps.clip(min=1e-6 if p > 1 else None) ** p
    pooled = powers.mean(axis=(2, 3)) ** (1 / p)
    features = [scale * (pooled[n] + pooled[n + 2]) + 2 * shift for n in range(2)]
    lengths = [np.linalg.norm(feature) for feature in features]
    for image, other in ((0, 1), (1, 0)):
        direction = features[other] / lengths[other]
        for row in range(3):
            for column in range(2):
                cell = 0.0
                for view, place in ((image, column), (image + 2, 1 - column)):
                    part = powers[view][:, row, place] / 6 * pooled[view] ** (1 - p)
                    cell += (scale * part) @ direction / lengths[image]
                assert found.maps[image, row, column] == pytest.approx(cell, abs=1e-5)
        constant = 2 * shift @ direction / lengths[image]
        assert found.constants[image] == pytest.approx(constant, abs=1e-5)


def net_input(net, image):
    """One image, uint8 [H, W, 3], normalised by hand."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in net.normalisation)
    return ((image.permute(2, 0, 1) / 255 - mean) / std)[None]


def test_a_mirrored_image_has_the_mirrored_map():
    torch.manual_seed(0)
    net = lived_in(ft_net(3))
    images = noise(64, 96)
    plain = explain(net, images)
    turned = explain(net, torch.stack([images[0].flip(1), images[1]]))
    np.testing.assert_allclose(turned.maps[0], plain.maps[0][:, ::-1], atol=1e-5)
    np.testing.assert_allclose(turned.maps[1], plain.maps[1], atol=1e-5)


@pytest.mark.parametrize(
    ("backbone", "neck", "layer"),
    [
        ("vit_tiny_patch16_224", "bnneck", "pool"),  # a class token
        ("convnext_atto", "bnneck", "pool"),  # a norm after pooling
        ("mobilenetv3_small_100", "bnneck", "pool"),  # a layer after pooling
        ("resnet18", "bottleneck", "bottleneck"),  # a rectified linear layer
    ],
)
def test_features_that_are_no_sums_over_places(backbone, neck, layer):
    net = lived_in(build_network(backbone, 3, size=(64, 32), neck=neck))
    with pytest.raises(ValueError, match=rf"^{backbone}: its .* no mean"):
        explain(net, noise(), layer=layer)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.manual_seed(0)
    return run_folder(tmp_path_factory.mktemp("runs") / "dense", lived_in(ft_net_dense(3)))


def test_embedder_explains_arrays_and_files(run, tmp_path):
    embed = Embedder(run, **CPU)
    one, other = crops(2)
    found = embed.explain(one, other)
    features = embed([one, other])
    assert found.similarity == pytest.approx(float(features[0] @ features[1]), abs=1e-5)
    paths = tmp_path / "a.png", tmp_path / "b.png"
    for path, image in zip(paths, (one, other), strict=True):
        Image.fromarray(image).save(path)
    again = embed.explain(str(paths[0]), paths[1])
    np.testing.assert_array_equal(again.maps, found.maps)
    assert found.share == (1, 1)
    middle = Embedder(run, test_size="64x32 of 80x36", **CPU).explain(one, other)
    assert middle.share == (64 / 80, 32 / 36)
    with pytest.raises(ValueError, match="image 1: expected uint8"):
        embed.explain(one, np.zeros(3))
    with pytest.raises(UserError, match="--ms: heat maps are of one scale"):
        Embedder(run, scales=(1, 0.95), **CPU).explain(one, other)
    with pytest.raises(UserError, match="no mean over positions; so no map adds up"):
        Embedder(run, layer="bottleneck", **CPU).explain(one, other)


# --- in pictures --------------------------------------------------------------------------------


def test_a_map_lies_on_the_image_not_on_the_grey_around_it():
    wide = Image.new("RGB", (64, 32), "#808080")
    cells = np.array([[0.5, -1.0]], np.float32)
    heat = pictures.centred(pictures.heated(pictures.scaled(wide), cells, 1.0))
    assert heat.getpixel((5, 5)) == heat.getpixel((60, 120)) == (0xE4, 0xE4, 0xE4)
    assert heat.getpixel((63, 64)) == pictures.TAKES  # the fullest colour
    red, _, blue = heat.getpixel((1, 64))
    assert red > blue  # orange, half


def test_a_map_of_the_middle_lies_on_the_middle():
    white = Image.new("RGB", (60, 120), "white")
    heat = pictures.heated(white, np.ones((4, 2), np.float32), 1.0, share=(0.5, 0.8))
    coloured = (np.asarray(heat) == pictures.ADDS).all(axis=2)
    expected = np.zeros((120, 60), bool)
    expected[30:90, 6:54] = True
    np.testing.assert_array_equal(coloured, expected)


def test_search_draws_both_images_of_each_pair(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in range(4):
        save_image(tmp_path / "crops" / f"{number}.png", seed=number, size=(40, 90))
    save_image(tmp_path / "query.png", seed=9, size=(60, 60))
    flags = ("--query", "query.png", "crops/0.png", "--gallery", "crops", "--top", 3)
    of_run = ("--model_dir", run.parent, "--name", run.name, "--gpu_ids", "-1")
    heights = []
    for more in ((), ("--explain",)):
        call(search.main, *flags, *of_run, *more, "--output", "found.jpg")
        with Image.open("found.jpg") as picture:
            heights.append((picture.height - pictures.GAP) / pictures.LINE)
    assert heights == [2, 6]
    capsys.readouterr()
    wrong = ("--explain", "--which_layer", "bottleneck", "--output", "other.jpg")
    assert exit_code(search.main, *flags, *of_run, *wrong) == 2
    err = capsys.readouterr().err
    assert "its bottleneck layer is no mean over positions" in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "other.jpg").exists()


@pytest.fixture
def scored(run, tmp_path, monkeypatch):
    """A .mat of a tiny prepared dataset by the run; the current folder is tmp_path."""
    monkeypatch.chdir(tmp_path)
    make_market(tmp_path / "raw")
    call(prepare.main, "--download_path", tmp_path / "raw")
    flags = ("--data_dir", tmp_path / "raw" / "pytorch", "--workers", 0, "--gpu_ids", "-1")
    call(extraction.main, "--model_dir", run.parent, "--name", run.name, *flags)
    return tmp_path / "pytorch_result.mat"


@pytest.mark.parametrize("script", [evaluate, evaluate_rerank])
def test_evaluation_draws_them_below_the_shown_rankings(script, scored, monkeypatch):
    seen = []
    draw = pictures.heat_rows
    monkeypatch.setattr(pictures, "heat_rows", lambda *a: seen.append(a) or draw(*a))
    call(script.main, scored, "--show", 2, "--explain")
    name = (
        "pytorch_result_rankings.jpg"
        if script is evaluate
        else "pytorch_result_rerank_rankings.jpg"
    )
    with Image.open(scored.parent / name) as picture:
        assert picture.height == 6 * pictures.LINE + pictures.GAP
    assert len(seen) == 2
    for images, explanations, scale in seen:
        assert len(images) == len(explanations) + 1
        assert all(abs(one.maps).max() <= scale for one in explanations)


@pytest.mark.parametrize("more", [("--ms", "0.9"), ("--test_size", "64x64 of 80x70")])
def test_evaluation_explains_what_was_extracted(more, scored, run, tmp_path):
    flags = ("--data_dir", tmp_path / "raw" / "pytorch", "--workers", 0, "--gpu_ids", "-1")
    of_run = ("--model_dir", run.parent, "--name", run.name, "--mat", "other.mat")
    call(extraction.main, *flags, *of_run, *more)
    sets = load_mat("other.mat")
    args = evaluate.get_parser().parse_args(["other.mat", "--show", "1", "--explain"])
    why = report.explainer(args, sets).explain(
        *(sets.data_dir / images.files[0] for images in sets[:2])
    )
    expected = float(sets.query.features[0] @ sets.gallery.features[0])
    assert why.similarity == pytest.approx(expected, abs=1e-5)


def test_what_evaluation_cannot_explain(scored, run, tmp_path, capsys):
    assert exit_code(evaluate.main, scored, "--explain") == 2
    assert "--explain: goes with pictures; add --show or --show_names" in capsys.readouterr().err
    assert exit_code(evaluate.main, scored, "--show", 200, "--explain") == 2
    assert "a picture has room for 100 queries" in capsys.readouterr().err
    flags = ("--data_dir", tmp_path / "raw" / "pytorch", "--workers", 0, "--gpu_ids", "-1")
    of_run = ("--model_dir", run.parent, "--name", run.name, "--mat", "other.mat")
    for more, says in (
        (("--ms", "1,0.9"), "other.mat was made with --ms of 2 scales"),
        (("--which_layer", "bottleneck"), "its bottleneck layer is no mean over positions"),
    ):
        call(extraction.main, *flags, *of_run, *more)
        capsys.readouterr()
        assert exit_code(evaluate.main, "other.mat", "--show", 1, "--explain") == 2
        assert says in capsys.readouterr().err
    assert not list(tmp_path.glob("*.jpg"))
