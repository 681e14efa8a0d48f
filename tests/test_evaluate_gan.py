"""evaluate_gan.py: the measures against closed forms and loops, copies, a whole run, mistakes."""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call, exit_code, save_image
from PIL import Image
from scipy.linalg import sqrtm

import evaluate_gan
import reid
from model import ft_net_dense
from reid import gan_metrics, pictures
from reid.checkpoint import Run

CPU = ("--gpu_ids", "-1", "--workers", "0")


def gaussian(count, deviations, mean=0.0, seed=0):
    """Samples [count, D] whose sample mean and covariance are exactly these."""
    x = np.random.default_rng(seed).normal(size=(count, len(deviations)))
    x -= x.mean(axis=0)
    x = np.linalg.qr(x)[0] * np.sqrt(count - 1)  # white
    return x * deviations + mean


def unit(count, dim, seed):
    x = np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def distances(a, b):
    return np.array([[np.sqrt(((x - y) ** 2).sum()) for y in b] for x in a.astype(np.float64)])


def test_frechet_distance_has_the_closed_form():
    s, t = np.array([1.0, 2.0, 0.5]), np.array([3.0, 0.1, 0.5])
    a, b = gaussian(50, s), gaussian(80, t, mean=[1, -2, 0], seed=1)
    expected = 5 + ((s - t) ** 2).sum()
    assert gan_metrics.frechet_distance(a, b) == pytest.approx(expected)
    assert gan_metrics.frechet_distance(b, a) == pytest.approx(expected)
    assert gan_metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-12)
    assert gan_metrics.frechet_distance(a, a + 2) == pytest.approx(3 * 4)


@pytest.mark.parametrize("count", [60, 7])  # 7: covariances without full rank
def test_frechet_distance_is_that_of_the_matrix_root(count):
    a, b = unit(count, 12, seed=0), unit(count + 1, 12, seed=1) * 1.5
    covariances = [np.cov(x.T.astype(np.float64)) for x in (a, b)]
    root = sqrtm(covariances[0] @ covariances[1]).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(sum(covariances) - 2 * root)
    assert gan_metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-4)


def test_measures_are_those_of_loops(capsys):
    k = 2
    real, generated = unit(9, 3, seed=0), unit(8, 3, seed=1) / 2
    generated[:4] += 1  # some are in reach, some not
    found = gan_metrics.measures(real, generated, k)
    far = distances(real, generated)
    reach, reach_generated = (np.sort(distances(x, x))[:, k] for x in (real, generated))
    inside = [[far[i, j] < reach[i] for j in range(8)] for i in range(9)]
    assert found["precision"] == np.mean([any(row[j] for row in inside) for j in range(8)])
    assert found["density"] == pytest.approx(np.sum(inside) / (k * 8))
    assert found["coverage"] == np.mean([any(row) for row in inside])
    assert found["recall"] == np.mean([any(far[i] < reach_generated) for i in range(9)])
    assert 0 < found["recall"] < 1
    assert 0 < found["precision"] < 1
    assert capsys.readouterr().out == ""  # prdc's own lines


def test_comparisons_are_of_the_numbers_they_say():
    real, generated = unit(41, 6, seed=0), unit(15, 6, seed=1)
    rows = gan_metrics.compare(real, generated, 3, seed=0)
    assert [(r["compared"], r["images"], r["real"]) for r in rows] == [
        ("generated", 15, 41),
        ("generated", 15, 15),
        ("other real", 15, 15),
    ]
    whole = gan_metrics.measures(real, generated, 3)
    assert {name: rows[0][name] for name in whole} == pytest.approx(whole)


def test_halves_of_the_real_images_share_none(monkeypatch):
    seen = []
    monkeypatch.setattr(gan_metrics, "measures", lambda a, b, k: seen.append((a, b)) or {})
    real, generated = np.arange(41), np.arange(100, 130)
    gan_metrics.compare(real, generated, 3, seed=0)
    gan_metrics.compare(real, generated, 3, seed=1)
    (some, fewer), (again, others) = seen[1:3]
    assert some.tolist() == again.tolist()
    assert len(set(some) | set(others)) == len(some) + len(others) == 40
    assert len(set(fewer)) == 20
    assert set(some) != set(seen[4][0])  # the seed chooses


def test_nearest_are_those_of_loops():
    real, images = unit(30, 5, seed=0), unit(12, 5, seed=1)
    far = distances(images, real)
    found, numbers = gan_metrics.nearest(real, images, 4)
    assert (numbers == np.argsort(far)[:, :4]).all()
    np.testing.assert_allclose(found, np.sort(far)[:, :4], atol=1e-6)
    real = np.concatenate([real, real[:1]])  # a file that is there twice
    alone, _ = gan_metrics.nearest(real)
    np.testing.assert_allclose(alone[:, 0], np.sort(distances(real, real))[:, 1], atol=1e-6)
    assert alone[0, 0] < 1e-6


def test_copies_are_within_both_limits_and_others_are_not():
    real, held_out, others = unit(400, 16, seed=0), unit(300, 16, seed=1), unit(300, 16, seed=2)
    noise = np.random.default_rng(3).normal(scale=1e-3, size=(300, 16))
    yardsticks = [gan_metrics.nearest(real, x)[0][:, 0] for x in (held_out, None)]

    def within(images):
        found = gan_metrics.copying(gan_metrics.nearest(real, images)[0][:, 0], *yardsticks)
        return [found[name]["generated_within"] for name in ("held_out", "real")]

    found = gan_metrics.copying(*[np.arange(1001.0) + n for n in range(3)])
    assert [row["closest"] for row in found.values()] == [10, 11, 12]  # one in a hundred
    assert within(real[:300] + noise) == [1, 1]
    assert within(real[:300]) == [1, 1]
    assert max(within(others)) < 0.05
    mixed = np.concatenate([real[:75] + noise[:75], others[:225]])
    assert within(mixed) == pytest.approx([0.25, 0.25], abs=0.05)


def test_picked_are_near_real_images_and_far_from_each_other():
    """Of nine points on a line, six are nearest to a real one; of these, four by hand."""
    places = np.array([0.0, 0.1, 1.0, 1.05, 2.0, 3.0, 8.0, 9.0, 7.0])
    angles = places / 10  # on a circle, where features lie
    generated = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    to_nearest = np.array([0.0, 0.1, 0.2, 0.15, 0.3, 0.4, 8.0, 9.0, 7.0])
    # 0 is nearest to a real image, 3.0 farthest from it, then 1.05 (from 0 and from 3.0), then 2.0
    assert gan_metrics.pick(generated, to_nearest, 4).tolist() == [0, 3, 4, 5]
    assert gan_metrics.pick(generated, to_nearest, 9).tolist() == list(range(9))
    twice = np.repeat(generated[:3], 2, axis=0)
    assert gan_metrics.pick(twice, np.zeros(6), 6).tolist() == list(range(6))


def colour(number):
    return (20 + 20 * (number % 11), 230 - 18 * (number % 12), 60 + 9 * number)


def test_picture_shows_the_generated_image_and_its_real_ones(tmp_path):
    paths = []
    for number in range(12):
        paths.append(tmp_path / f"{number}.png")
        Image.new("RGB", (16, 32), colour(number)).save(paths[-1])
    groups = [(paths[n], [paths[n + 3], paths[n + 6]], [0.1, 0.25]) for n in range(3)]
    pictures.draw_neighbours(groups, tmp_path / "sheet.jpg")
    width, row = 3 * pictures.TILE + 3 * pictures.GAP, pictures.LINE
    with Image.open(tmp_path / "sheet.jpg") as picture:
        assert picture.size == (2 * width, 2 * row + pictures.GAP)
        for n, column, line in [(0, 0, 0), (1, 1, 0), (2, 0, 1)]:
            for place, image in enumerate([n, n + 3, n + 6]):
                x, y = column * width + 45 + place * pictures.TILE, line * row + 90
                difference = np.subtract(picture.getpixel((x, y)), colour(image))
                assert abs(difference).max() < 15


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """`model` with the run `random`, of an untrained network of 72x36 images."""
    folder = tmp_path_factory.mktemp("runs") / "model"
    trained = Run(folder / "random")
    trained.start({"height": 64, "width": 32, "use_dense": True}, {})
    torch.manual_seed(0)
    trained.save_weights(ft_net_dense(3), "last")
    return folder


@pytest.fixture
def data(tmp_path, trained):
    """A tiny prepared dataset of 16 real, 4 held-out and 18 generated images, 4 of them copies."""
    data = tmp_path / "pytorch"
    for number in range(16):
        name = f"{number // 4:04d}/{number:04d}_c1.jpg"
        save_image(data / "train_all_new" / name, number, (32, 64))
    for number in range(4):
        save_image(data / "query" / f"{number:04d}" / f"{number:04d}_c1.jpg", 50 + number, (32, 64))
    gen = data / "train_new" / "gen_0000"
    for number in range(18):
        save_image(gen / f"gen_{number:02d}.jpg", 100 + number, (20, 50))
    for number, image in enumerate(sorted((data / "train_all_new").glob("*/*.jpg"))[::4]):
        shutil.copy(image, gen / f"gen_{number:02d}.jpg")
    return data


@pytest.fixture
def flags(data, trained):
    return ("--data_dir", data, "--model_dir", trained, "--name", "random", "--nearest_k", 3, *CPU)


def test_a_whole_run(data, flags, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gen = data / "train_new" / "gen_0000"
    (gen / "manifest.json").write_text("{}")
    (tmp_path / "results.json").write_text('{"train": {"epochs": 1}}')
    call(evaluate_gan.main, *flags, "--json", "results.json")
    out = capsys.readouterr().out
    rows = out.splitlines()
    assert "densenet121, 72x36, on cpu" in rows[0]
    assert rows[2].startswith("18 generated against 16 real ")
    assert rows[3].startswith("8 generated against 8 real ")
    assert rows[4].startswith("8 other real against 8 real ")
    assert "8 images are too few for 1024 dimensions" in out
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["train"] == {"epochs": 1}
    found = results["evaluate_gan"]
    weights = (trained / "random" / "net_last.pth").read_bytes()
    assert found["features"]["sha256"] == hashlib.sha256(weights).hexdigest()
    assert found["images"]["generated"]["of"] == 18
    assert found["images"]["generated"]["manifest"]["path"] == str(gen / "manifest.json")
    for row, line in zip(found["comparisons"], rows[2:5], strict=True):
        printed = list(map(float, line.split()[-5:]))
        names = ("frechet", "precision", "recall", "density", "coverage")
        assert printed == pytest.approx([row[name] for name in names], abs=1e-4)
    nearest = found["nearest_real"]
    assert nearest["held_out"]["generated_within"] >= 4 / 18
    assert nearest["real"]["generated_within"] >= 4 / 18
    assert nearest["generated"]["closest"] < 0.01 < nearest["real"]["closest"]
    assert {"command", "versions", "git"} <= found.keys()
    with Image.open(tmp_path / "gan_neighbours.jpg") as picture:
        width = 6 * pictures.TILE + 3 * pictures.GAP
        assert picture.size == (2 * width, 8 * pictures.LINE + pictures.GAP)


def test_kept_images_lie_in_a_new_folder_where_they_lay(data, flags, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gen = data / "train_new" / "gen_0000"
    (gen / "deeper").mkdir()
    for image in sorted(gen.glob("*.jpg"))[:9]:
        image.rename(gen / "deeper" / image.name)
    call(evaluate_gan.main, *flags, "--keep", 7, "--keep_dir", "new/kept", "--json", "numbers.json")
    assert "7 images near real ones and far from each other: new/kept" in capsys.readouterr().out
    kept = {path.relative_to("new/kept") for path in Path("new/kept").rglob("*.jpg")}
    assert len(kept) == 7
    for image in kept:
        assert (tmp_path / "new/kept" / image).samefile(gen / image)
    again = ("--keep", 7, "--keep_dir", "again")
    call(evaluate_gan.main, *flags, *again)
    assert kept == {path.relative_to("again") for path in Path("again").rglob("*.jpg")}
    found = json.loads((tmp_path / "numbers.json").read_text())["evaluate_gan"]
    assert (found["keep"], found["keep_dir"]) == (7, "new/kept")


@pytest.mark.slow
def test_max_images_and_folders_by_flag(flags, data, trained, tmp_path, capsys):
    """Neighbours are searched among all training images, whatever is compared."""
    flat = tmp_path / "flat"
    flat.mkdir()
    for image in (data / "train_all_new").glob("*/*.jpg"):
        shutil.copy(image, flat)
    places = ("--real_dir", flat, "--gen_dir", flat, "--held_out_dir", data / "query")
    numbers = ("--max_images", 10, "--nearest_k", 2, "--output", tmp_path / "sheet.jpg")
    path = tmp_path / "numbers.json"
    backbone = ("--pretrained", trained / "random" / "net_last.pth", "--use_dense")
    nowhere = ("--data_dir", tmp_path / "nowhere", "--name", "none")
    call(evaluate_gan.main, *flags, *nowhere, *backbone, *places, *numbers, "--json", path)
    out = capsys.readouterr().out
    assert "10 generated against 10 real" in out
    assert "to the nearest of 16 real" in out
    found = json.loads(path.read_text())["evaluate_gan"]
    assert found["features"]["size"] == "288x144"
    assert found["nearest_real"]["real"]["generated_within"] == 1  # all are copies
    assert found["nearest_real"]["generated"]["median"] < 0.01


def test_mistakes(flags, data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gen = data / "train_new" / "gen_0000"
    empty = tmp_path / "empty"
    empty.mkdir()
    damaged = save_image(tmp_path / "damaged" / "a_0.jpg")
    for number in range(1, 5):
        save_image(tmp_path / "damaged" / f"a_{number}.jpg")
    damaged.write_bytes(damaged.read_bytes()[:500])
    before = sorted(tmp_path.rglob("*"))
    cases = [
        (("--gen_dir", empty), f"{empty}: no images in it"),
        (("--gen_dir", tmp_path / "damaged"), f"{damaged}: can't be read as an image"),
        (("--data_dir", tmp_path / "no"), "no: no such folder; name the prepared dataset with"),
        (("--data_dir", data.parent), f"not prepared itself; name {data}"),
        (("--name", "none"), "none: no such run; check its name"),
        (("--which_epoch", "9"), "--which_epoch can be last"),
        (("--nearest_k", 17), f"{gen}: too few images; --nearest_k 17 takes 19 or more generated"),
        (("--nearest_k", 7), "train_all_new: too few images; --nearest_k 7 takes 18 or more real"),
        (("--max_images", 9), "--max_images 9: too few images; --nearest_k 3 takes 10 or more"),
        (("--output", tmp_path / "no" / "a.jpg"), "a.jpg: can't be written"),
        (("--output", empty), "empty: is a folder; name a file"),
        (("--json", damaged), "a_0.jpg: not text in UTF-8"),
        (("--pretrained", tmp_path / "no.pth"), "no.pth: no such weights file"),
        (("--keep", 3), "--keep and --keep_dir: one needs the other"),
        (("--keep_dir", tmp_path / "new"), "--keep and --keep_dir: one needs the other"),
        (("--keep", 19, "--keep_dir", tmp_path / "new"), "--keep 19: only 18 generated images"),
        (("--keep", 3, "--keep_dir", empty), f"--keep_dir {empty}: is there already"),
        (("--keep", 3, "--keep_dir", f"{__file__}/new"), "new: can't be written"),
    ]
    for wrong, says in cases:
        repeated = ("--nearest_k", 3) if "--gen_dir" in wrong else ()
        assert exit_code(evaluate_gan.main, *flags, *repeated, *wrong) == 2
        lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error")]
        assert len(lines) == 1
        assert says in lines[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_features_that_are_no_numbers(flags, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(trained, tmp_path / "model")
    net = ft_net_dense(3)
    net.model.features.conv0.weight.data[0] = float("nan")
    Run(folder / "random").save_weights(net, "last")
    assert exit_code(evaluate_gan.main, *flags, "--model_dir", folder) == 2
    assert "its features are infinite or NaN; take a higher" in capsys.readouterr().err


def test_imagenet_weights_that_cannot_be_downloaded(flags, monkeypatch, tmp_path, capsys):
    def refused(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refused)
    assert exit_code(evaluate_gan.main, *flags, "--pretrained", "imagenet") == 2
    error = capsys.readouterr().err
    assert "--pretrained imagenet: the weights of resnet50 can't be had (no route" in error
    assert not list(tmp_path.glob("*.jpg"))


def test_packages_not_installed(flags, monkeypatch, capsys):
    monkeypatch.delattr(reid, "gan_metrics")
    monkeypatch.delitem(sys.modules, "reid.gan_metrics")
    monkeypatch.setitem(sys.modules, "prdc", None)
    assert exit_code(evaluate_gan.main, *flags) == 2
    assert (
        "evaluate_gan.py: needs prdc and scikit-learn; pip install prdc scikit-learn"
        in capsys.readouterr().err
    )
