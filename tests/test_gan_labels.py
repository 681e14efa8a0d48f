"""Rules for generated images from end to end, their share of a batch, their own batch norm."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, call, exit_code, save_image, tiny_network
from PIL import Image
from scipy.io import loadmat
from torch import nn

import test as extraction
import train_baseline
import train_lsro
from model import IMAGENET, ft_net_dense
from reid import losses
from reid.batches import batch_options, check_batchsize, check_data_parallel
from reid.checkpoint import Run
from reid.dataset import Sample, generated_images, labelled_images, training_splits
from reid.distributed import BatchKinds, WholeBatchNorm, World, distribute
from reid.errors import UserError
from reid.gan_labels import Teacher, nearest_centres
from reid.learner import Learner
from reid.loading import Batch, StepSampler, TrainBatches
from reid.weights import load_network

SMALL = f"{TINY} --workers 0".split()
FLAGS = (*SMALL, *"--batchsize 6 --epochs 1 --name r".split())
WORLD = World(0, 1, torch.device("cpu"), [])


@pytest.fixture
def folder(prepared):
    """`prepared` with five generated images."""
    for number in range(5):
        save_image(prepared / "train_new" / "gen_0000" / f"gen_{number}.png", seed=number)
    return prepared


@pytest.fixture
def label_run(folder, tmp_path):
    """A finished run of the baseline, trained at another size; returns its folder's name."""
    flags = ("--data_dir", folder, "--model_dir", tmp_path, *FLAGS, "--height", 96, "--name", "old")
    call(train_baseline.main, *flags)
    return "old"


def train(folder, tmp_path, *flags):
    call(train_lsro.main, "--data_dir", folder, "--model_dir", tmp_path, *FLAGS, *flags)
    return tmp_path / "r"


def teacher(tmp_path, label_run, real=None, **more):
    flags = ["--model_dir", str(tmp_path), "--label_run", label_run, *SMALL]
    args = train_lsro.get_parser().parse_args(flags)
    vars(args).update(more)
    real = real or labelled_images(tmp_path / "market" / "pytorch" / "train_all_new")
    return Teacher(args, real, WORLD)


def test_a_run_on_other_identities_is_refused(label_run, folder, tmp_path):
    """As many classes, but of other people."""
    teacher(tmp_path, label_run)
    for path in (folder / "train_all_new" / "0001").iterdir():
        path.rename(path.with_name("9" + path.name))
    with pytest.raises(UserError, match="its classes are other identities than those here"):
        teacher(tmp_path, label_run)


def test_a_table_of_ranks_follows_its_images(folder, tmp_path):
    """Row by row what the finished network says of that very image, in any order of images."""
    images = generated_images(folder / "train_new" / "gen_0000")
    random.Random(1).shuffle(images)
    torch.manual_seed(0)
    net = ft_net_dense(10).eval()
    nn.init.normal_(net.classifier[0].weight)

    def logits(path):
        """With the pipeline of a single image: of 9/8 of the run's size, the middle."""
        pixels = Image.open(path).resize((36, 108), Image.Resampling.BICUBIC)
        pixels = pixels.crop((2, 6, 34, 102))
        x = (np.asarray(pixels) / 255 - IMAGENET[0]) / IMAGENET[1]
        with torch.no_grad():
            return net(torch.tensor(x, dtype=torch.float32).permute(2, 0, 1)[None])[0]

    # Untrained, it would say nearly the same of all.
    net.classifier[0].bias.data = -torch.stack([logits(s.path) for s in images]).mean(0)
    Run(tmp_path / "run").start({"height": 96, "width": 32}, {})
    Run(tmp_path / "run").save_weights(net, "last")
    ten = [Sample(Path(f"{n:04d}_c1.jpg"), n) for n in range(10)]
    with pytest.raises(UserError, match="--label_run run: its training is not finished"):
        teacher(tmp_path, "run", ten)
    (tmp_path / "run" / "results.json").write_text('{"train": {}}')
    finished = teacher(tmp_path, "run", ten, batchsize=2)
    table = finished.targets("mprl_static", [], images)
    assert len(set(map(tuple, table.tolist()))) == len(images)
    for row, sample in zip(table.tolist(), images, strict=True):
        found = logits(sample.path).tolist()
        assert row == [sum(a <= b for a in found) for b in found]
    probabilities = finished.targets("teacher", [], images)
    expected = torch.stack([logits(s.path).softmax(0) for s in images])
    torch.testing.assert_close(probabilities, expected, atol=1e-4, rtol=0)


def test_an_image_of_a_batch_finds_its_row(folder):
    """The markers that batches carry, against the files that the table was made from."""
    generated = generated_images(folder / "train_new" / "gen_0000", 4, seed=1)
    samples = labelled_images(folder / "train_new") + generated
    sampler = StepSampler(samples, 6, WORLD)
    batches = TrainBatches(sampler, Plain(), 0, dict(enumerate(range(99))))
    table = losses.FixedTargets()
    table.weights = torch.arange(1, 5)[:, None] * torch.tensor([[0, 1, 0]]) + torch.eye(4, 3).int()
    for batch in batches.epoch(0):
        rows = table(torch.zeros(6, 3, dtype=torch.float64), batch.labels)
        for number, label, made, row in zip(
            batch.numbers, batch.labels.tolist(), batch.generated.tolist(), rows, strict=True
        ):
            if made:
                weights = table.weights[generated.index(samples[number])].double()
                assert torch.equal(row, weights / weights.sum())
            else:
                assert label == samples[number].label


def test_other_views_are_of_the_same_images():
    samples = [Sample(n, 0) for n in range(8)] + [Sample(n, -1, 1) for n in range(8, 12)]
    sampler = StepSampler(samples, 6, WORLD, gan_batch=2)
    for batch in TrainBatches(sampler, Numbered(), 0, list(range(12)), two_views=True).epoch(0):
        made = [n for n in batch.numbers if samples[n].generated]
        assert batch.images.tolist() == [1000 + n for n in batch.numbers]
        assert batch.views.tolist() == [2000 + n for n in made]


def test_the_mean_network_says_what_consistency_teaches():
    args = train_lsro.parse(["--gan_label", "consistency", "--ema", "0.9"])
    net = tiny_network()
    learner = Learner(args, WORLD, net, None, losses.label_rule("consistency"))
    nn.init.normal_(learner.ema.module.classifier[0].weight)  # it is another network by now
    batch = Batch(None, None, torch.tensor([0, 1, 1]), [], torch.randn(2, 3, 64, 32))
    found = learner.predicted_by_mean(batch, torch.zeros(3, 3))
    with torch.no_grad():
        expected = learner.ema.module.eval()(batch.views)
    assert torch.allclose(found[1:], expected)
    assert expected.any()
    assert not found[0].any()


def test_only_real_images_can_be_wrong():
    net = tiny_network()
    nn.init.zeros_(net.classifier[0].weight)
    net.classifier[0].bias.data = torch.tensor([0.0, 1.0, 0.0])  # says 1 of all
    learner = Learner(train_lsro.parse([]), WORLD, net, None, losses.label_rule("lsro"))
    labels = torch.tensor([1, 0, -1, -2])
    batch = Batch(torch.randn(4, 3, 64, 32), labels, (labels < 0).long(), [0, 1, 2, 3])
    _, (wrong, real) = learner.step(batch)
    assert (wrong.item(), real.item()) == (1, 2)


class Plain:
    """A transform for tests of which images a batch has: images are numbers."""

    def draw(self, number, generator):
        return self

    def part(self, part):
        return self

    def crop(self, images, augmentation, device):
        return images

    def finish(self, images, augmentation):
        return torch.tensor(images)


class Numbered(Plain):
    """Each draw has a number, of which its images have a thousand more."""

    def __init__(self, number=0):
        self.number = number

    def draw(self, number, generator):
        self.number += 1
        return Numbered(self.number)

    def finish(self, images, augmentation):
        return torch.tensor(images) + 1000 * augmentation.number


def test_clusters_from_end_to_end(folder, tmp_path, label_run, monkeypatch):
    """Identities 0 and 1 are dark, 1 and 2 bright; so are the generated images."""
    shades = {"0000": [10, 12, 14], "0001": [11, 240, 245], "0002": [235, 238, 250]}
    real = []
    for label, (name, values) in enumerate(shades.items()):
        for number, shade in enumerate(values):
            path = tmp_path / "toy" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 128), (shade,) * 3).save(path)
            real.append(Sample(path, label))
    generated = []
    for number, shade in enumerate([242, 9, 236]):
        Image.new("RGB", (64, 128), (shade,) * 3).save(tmp_path / f"{number}.png")
        generated.append(Sample(tmp_path / f"{number}.png", -1, 1))
    found = teacher(tmp_path, label_run, clusters=2, seed=5)
    monkeypatch.setattr("reid.features.extract_batches", mean_colour)
    assert found.cluster_table(real, generated).tolist() == [[0, 1, 1], [1, 1, 0], [0, 1, 1]]
    # And trained with, by the network's own features.
    monkeypatch.undo()
    run = train(folder, tmp_path, "--gan_label", "sls", "--label_run", label_run, "--clusters", 2)
    opts = json.loads((run / "opts.json").read_text())
    assert (opts["loss"], opts["options"]["clusters"]) == ("sls", 2)


def mean_colour(net, batches, dtype, label, layer):
    """Instead of a network's features."""
    rows = torch.cat([images.float().mean(dim=(1, 2)) for images in batches])
    return torch.stack([rows[:, 0], 255 - rows[:, 1]], 1).numpy()


def test_k_means_is_the_seeds_alone():
    points = np.random.default_rng(0).normal(size=(300, 8)).astype(np.float32)
    real, generated = points[:200], points[200:]
    first, again = (nearest_centres(real, generated, 5, seed=3) for _ in range(2))
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    centres = np.stack([real[first[0] == n].mean(0) for n in range(5)])
    nearest = ((generated[:, None] - centres) ** 2).sum(2).argmin(1)
    assert (nearest == first[1]).all()
    with pytest.raises(UserError, match="--clusters 3: only 2 real images differ"):
        nearest_centres(np.repeat(real[:2], 4, axis=0), generated, 3, seed=0)


def test_all_in_one_from_training_to_features(folder, tmp_path):
    """One output more than there are identities, which the run folder still counts honestly."""
    run = train(folder, tmp_path, "--gan_label", "all_in_one", "--label_smoothing", 0.1)
    opts, log = ((run / name).read_text() for name in ("opts.json", "log.jsonl"))
    assert (json.loads(opts)["class_num"], json.loads(opts)["loss"]) == (3, "all_in_one")
    assert np.isfinite(json.loads(log)["val_loss"])
    assert load_network(run / "net_last.pth").classifier[0].out_features == 4
    flags = ("--test_dir", folder, "--model_dir", tmp_path, "--name", "r", "--gpu_ids", -1)
    call(extraction.main, *flags, "--workers", 0, "--mat", tmp_path / "r.mat")
    assert loadmat(tmp_path / "r.mat")["query_f"].shape == (3, 96)
    flags = ("--gan_label", "mprl_static", "--label_run", "r", "--name", "other")
    with pytest.raises(UserError, match="--label_run r: its network has 4 classes"):
        train(folder, tmp_path, *flags)
    assert not (tmp_path / "other").exists()


def test_own_classes_are_the_folders_names(folder, tmp_path):
    """Also where identities are left out and the others numbered anew."""
    splits = training_splits(folder, False, num_ids=2, seed=1)
    old = {int(sample.path.parent.name): sample.label for sample in splits.train}
    assert set(old.values()) == {0, 1}
    assert set(old) != {0, 1}
    for label in old:
        for shot in range(2):
            save_image(tmp_path / "made" / f"{label:04d}" / f"{shot}.png", seed=shot)
    made = generated_images(tmp_path / "made")
    table = train_lsro.own_targets(splits, made)
    for row, sample in zip(table, made, strict=True):
        assert row.argmax() == old[int(sample.path.parent.name)]
    assert table.tolist()[0] == pytest.approx([0.95, 0.05])
    flags = ["--gen_dir", tmp_path / "made", "--gan_label", "own", "--num_ids", 2, "--seed", 1]
    assert (train(folder, tmp_path, *flags) / "net_last.pth").exists()


RESUMED = {
    "mprl_static": ("--label_run", "old", "--gan_batch", 2, "--split_bn"),
    "teacher": ("--label_run", "old", "--on_top"),
    "consistency": ("--ema", 0.9),
}


@pytest.mark.parametrize("rule", RESUMED)
def test_resumed_run_is_bit_identical(rule, folder, tmp_path, label_run):
    flags = ("--gan_label", rule, *RESUMED[rule])
    run = train(folder, tmp_path, *flags, "--epochs", 2)
    whole = torch.load(run / "net_last.pth", weights_only=True)
    shutil.rmtree(run)
    train(folder, tmp_path, *flags)
    train(folder, tmp_path, *flags, "--epochs", 2, "--resume")
    cut = torch.load(run / "net_last.pth", weights_only=True)
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


@pytest.mark.slow
def test_resumed_static_run_is_of_the_same_rule(folder, tmp_path, label_run):
    rule = ("--gan_label", "mprl_static", "--label_run", label_run, "--gan_batch", 2, "--split_bn")
    train(folder, tmp_path, *rule)
    for other in (("--gan_label", "lsro"), ("--gan_label", "mprl_static", "--gan_weight", 2)):
        flags = (*rule[2:], *other) if "mprl_static" in other else (*rule[4:], *other)
        with pytest.raises(UserError, match="--resume"):
            train(folder, tmp_path, *flags, "--epochs", 3, "--resume")
    torch.manual_seed(9)
    torch.save(tiny_network().state_dict(), tmp_path / label_run / "net_last.pth")
    with pytest.raises(UserError, match="r was trained by another --label_run"):
        train(folder, tmp_path, *rule, "--epochs", 3, "--resume")


@pytest.mark.parametrize("instances", [0, 2])
def test_generated_images_in_every_batch(instances):
    samples = [Sample(n, n % 4) for n in range(40)] + [Sample(n, -1, 1) for n in range(40, 47)]
    random.Random(0).shuffle(samples)
    worlds = [World(rank, 2, torch.device("cpu"), []) for rank in range(2)]
    cache = list(range(len(samples)))
    first, second = (
        TrainBatches(StepSampler(samples, 10, world, instances, gan_batch=4), Plain(), 0, cache)
        for world in worlds
    )
    epochs = []
    for seed in (1, 2):
        seen = []
        for a, b in zip(first.epoch(seed), second.epoch(seed), strict=True):
            generated = torch.cat([a.generated, b.generated])
            assert generated.sum() == 4
            assert a.numbers == b.numbers == torch.cat([a.images, b.images]).tolist()
            assert [samples[n].generated for n in a.numbers] == generated.tolist()
            real = [samples[n].label for n in a.numbers if not samples[n].generated]
            if instances:
                assert real[::2] == real[1::2]
            seen += a.numbers
        assert len(seen) == len(first.sampler) * 10 == 6 * 10
        made = [n for n in seen if samples[n].generated]
        assert all(len(set(made[n : n + 7])) == 7 for n in (0, 7, 14))  # pass after pass
        assert made[:7] != made[7:14]
        real = [n for n in seen if not samples[n].generated]
        assert len(real) == len(set(real)) == 36
        epochs.append(seen)
    assert epochs[0] != epochs[1]
    again = [n for batch in first.epoch(1) for n in batch.numbers]
    assert again == epochs[0]


def test_real_images_weigh_on_top_as_in_the_baseline(folder, tmp_path):
    """Where generated ones weigh nothing, the loss is the baseline's, not a part of it."""
    losses = {}
    for name, flags in {
        "none": ("--num_generated", 0),
        "top": ("--on_top", "--gan_batch", 12, "--gan_weight", 0),
        "among": ("--gan_batch", 4, "--gan_weight", 0),
        "counted": ("--gan_batch", 4),
        "later": ("--gan_batch", 4, "--gan_start", 1, "--epochs", 2),
    }.items():
        train(folder, tmp_path, *flags, "--lr", 1e-9, "--name", name)
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
        losses[name] = [json.loads(line)["train_loss"] for line in lines]
    [none] = losses["none"]
    assert losses["top"] == pytest.approx([none], rel=0.2)
    assert losses["among"] == pytest.approx([none / 3], rel=0.2)
    assert losses["counted"] == pytest.approx([none], rel=0.2)  # untrained, all are as uncertain
    assert losses["later"] == pytest.approx([none / 3, none], rel=0.2)


def test_defaults_of_the_rules():
    found = [train_lsro.parse(["--gan_label", rule]) for rule in ("lsro", "pseudo")]
    assert [(args.gan_weight, args.gan_start) for args in found] == [(1.0, 0), (0.1, 20)]


@pytest.mark.parametrize("instances", [0, 2])
def test_generated_images_on_top_leave_the_baselines_batches(instances):
    real = [Sample(n, n % 4) for n in range(41)]
    made = [Sample(n, -1, 1) for n in range(41, 90)]
    baseline = StepSampler(real, 10, WORLD, instances)
    baseline.set_epoch(1)
    args = train_lsro.get_parser().parse_args(["--batchsize", "10", "--on_top"])
    for asked, wanted in [(None, 12), (3, 3), (20, 20)]:  # 49 to 41
        args.gan_batch = asked
        batches = batch_options(args, real + made)
        assert (batches.batchsize, batches.gan_batch) == (10 + wanted, wanted)
        sampler = StepSampler(real + made, batches.batchsize, WORLD, instances, wanted)
        sampler.set_epoch(1)
        assert sampler.steps[:, :10].equal(baseline.steps)
        assert (sampler.steps[:, 10:] > 40).all()
    assert (args.batchsize, args.gan_batch) == (10, 20)  # as typed, for opts.json
    args.on_top = False
    assert batch_options(args, real) is args


@pytest.mark.parametrize("shape", [(8, 3, 5, 4), (8, 3)])
def test_split_batch_norm_is_two_batch_norms(shape):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    generated = torch.tensor([0, 1, 1, 0, 1, 0, 0, 0])
    kind = nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d
    norm, of_real, of_generated = (kind(3).double() for _ in range(3))
    for other in (norm, of_real, of_generated):
        nn.init.constant_(other.weight, 1.5)
        nn.init.constant_(other.bias, 0.3)
    split = BatchKinds(WORLD)
    ours = WholeBatchNorm(norm, WORLD, split)
    weights = torch.randn(shape, dtype=torch.float64)
    expected = torch.empty_like(x)
    expected[generated == 0] = of_real(x[generated == 0])
    expected[generated == 1] = of_generated(x[generated == 1])
    wanted = torch.autograd.grad((expected * weights).sum(), [x, of_real.bias, of_generated.bias])
    split.tell(generated)
    found = ours(x)
    assert torch.allclose(found, expected)
    gradient, bias = torch.autograd.grad((found * weights).sum(), [x, ours.bias])
    assert torch.allclose(gradient, wanted[0])
    assert torch.allclose(bias, wanted[1] + wanted[2])  # shared
    for name, value in of_real.state_dict().items():  # what testing sees is of the real ones
        assert torch.allclose(ours.state_dict()[name], value), name
    assert torch.allclose(ours.eval()(x), of_real.eval()(x))


def test_split_batch_norm_of_small_groups():
    """One real image, or none, teaches the running statistics nothing; no output is lost."""
    split = BatchKinds(WORLD)
    ours, plain = WholeBatchNorm(nn.BatchNorm1d(3), WORLD, split), nn.BatchNorm1d(3)
    x = torch.randn(4, 3, requires_grad=True)
    for generated in ([1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 0]):
        split.tell(torch.tensor(generated))
        found = ours(x)
        found.square().sum().backward()
        assert found.isfinite().all()
        assert x.grad.isfinite().all()
        if sum(generated) in (0, 4):  # one group is all
            assert torch.allclose(found, plain(x), atol=1e-6)
        if sum(generated):
            assert torch.equal(ours.running_mean, torch.zeros(3))
            assert torch.equal(ours.running_var, torch.ones(3))
    assert torch.allclose(ours.running_var, 0.9 + 0.1 * x.detach().var(0))


def test_split_network_keeps_names_and_shapes():
    net, plain = (ft_net_dense(3, neck=neck) for neck in ("bottleneck", "bottleneck"))
    split = distribute(net, WORLD, BatchKinds(WORLD))
    assert not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in split.modules())
    assert [(name, value.shape) for name, value in split.state_dict().items()] == [
        (name, value.shape) for name, value in plain.state_dict().items()
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        "--gan_label mprl_dynamic --ema 0.5 --gan_batch 2",
        "--gan_label pseudo --gan_start 0 --precision bf16",
        "--gan_batch 3 --instances 3 --triplet 1 --neck bnneck",
    ],
)
def test_split_batch_norm_trains_and_validates(flags, folder, tmp_path):
    run = train(folder, tmp_path, "--split_bn", *flags.split())
    log = json.loads((run / "log.jsonl").read_text())
    assert np.isfinite([log["train_loss"], log["val_loss"]]).all()
    net = load_network(run / "net_last.pth").eval()
    assert net(torch.zeros(1, 3, 64, 32)).isfinite().all()


def test_flags_of_data_parallel_and_batches():
    args = train_lsro.get_parser().parse_args(["--split_bn"])
    two = World(0, 1, torch.device("cuda", 0), [0, 1])
    with pytest.raises(UserError, match=r"--split_bn: DataParallel can't.*--nproc_per_node 2"):
        check_data_parallel(args, two)
    args.batchsize, args.gan_batch, args.instances = 8, 3, 4
    images = [Sample(Path("a.jpg"), 0)] * 100
    with pytest.raises(UserError, match="--instances: 5 images a batch are no multiple"):
        check_batchsize(args, WORLD, images)
    args.gan_batch = 4
    check_batchsize(args, WORLD, images)


def test_mistakes(folder, tmp_path, capsys):
    """One line, exit code 2, no run folder."""
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "net_last.pth").write_bytes(b"damaged")
    static = ("--gan_label", "mprl_static")
    cases = [
        (static, "--gan_label mprl_static: name a finished run with --label_run"),
        ((*static, "--label_run", "none"), "--label_run none: no such file as"),
        ((*static, "--label_run", "damaged"), "net_last.pth: not a readable"),
        (("--label_run", "damaged"), "--label_run: --gan_label lsro does not use it"),
        ((*static, "--label_run", "damaged", "--num_generated", 0), "no generated images"),
        (("--gan_batch", 2, "--num_generated", 0), "--gan_batch: there are no generated"),
        (("--on_top", "--num_generated", 0), "--on_top: there are no generated"),
        (("--gan_batch", 6), "--gan_batch 6: leaves no real images in a --batchsize of 6"),
        (("--gan_batch", 0), "--gan_batch: 0 is under 1"),
        (("--gan_weight", -1), "--gan_weight: -1 is under 0"),
        (("--gan_label", "consistency"), "compares with mean weights; add --ema 0.999"),
        (("--gan_label", "own"), "gen_0000: --gan_label own takes images in folders named after"),
        (("--gan_label", "own", "--num_generated", 0), "--gan_label own: there are no generated"),
        (("--num_generated", "x3"), "--num_generated: invalid amount value: 'x3'"),
        (("--num_generated", 6), "--num_generated 6: only 5 images"),
        (("--num_generated", "0.01x"), "--num_generated 0.01x: that is not one image"),
        (("--num_generated", f"{10**310}x"), "--num_generated: invalid amount value"),
    ]
    image = folder / "train_new" / "gen_0000" / "gen_3.png"

    def check(flags, says):
        flags = ("--data_dir", folder, "--model_dir", tmp_path, *FLAGS, *flags)
        assert exit_code(train_lsro.main, *flags) == 2, says
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert says in lines[0]
        assert not (tmp_path / "r").exists()

    for case in cases:
        check(*case)
    image.write_bytes(image.read_bytes()[:300])
    check((), "gen_3.png: can't be read as an image")
    image.unlink()
    image.symlink_to("nowhere.png")
    check((), "gen_3.png: is a broken link; replace it")
