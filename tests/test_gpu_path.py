"""The GPU's path through the code, on a machine without a GPU, by PyTorch's FakeTensorMode.

Its tensors say that they are on `cuda`, and have shapes and types but no numbers: what mixes them
with tensors on the CPU is caught. `Numbers`, on top of it, computes the numbers on the CPU beside
them. So images can be chosen by a mask and counts be read, and results compared with the CPU's. It
also refuses kernels that CUDA has not.

Not to be had this way: backward passes (autograd asks the driver for a stream), so that steps get
made gradients; pinned memory, drivers and what is asked of them; re-ranking's sparse product
(FakeTensorMode has no sparse tensors), so that pairs are multiplied densely here; saving a state
from a device; --compile, DataParallel and NCCL; the digits of CUDA's own
kernels. A training step's numbers stop at the first batch norm, which is cuDNN's.
"""

import contextlib
import copy
from argparse import Namespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import random_sets, save_image
from test_features import crops, lived_in, run_folder
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes as no_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

import evaluate_gan
import re_ranking
import train_lsro
from reid import gan_labels, losses
from reid.checkpoint import Run, load_trained
from reid.dataset import Sample
from reid.device import faster_dtype, to_device
from reid.distributed import BatchKinds, WholeBatchNorm, World
from reid.explain import explain
from reid.features import Embedder, extract, fold_for_inference, view_features
from reid.files import update_results
from reid.learner import Learner
from reid.loading import Batch
from reid.transforms import EvalTransform, TrainTransform, normalise
from reid.weights import build_network

try:
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        FakeTensor,
        FakeTensorMode,
        unset_fake_temporarily,
    )
except ImportError as error:  # they are PyTorch's own, and may be moved
    pytest.skip(f"this PyTorch's FakeTensorMode is another: {error}", allow_module_level=True)

# (Of copying a fake network, for --ema.)
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")

CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)
ALONE = World(0, 1, CARD, [])
SIZE = 64, 32
INTEGERS = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
# Types that CUDA's kernel of an operator does not take, though the CPU's does.
LACKING = {
    "aten::_upsample_bicubic2d_aa": INTEGERS,
    "aten::mm": INTEGERS,
    "aten::addmm": INTEGERS,
    "aten::bmm": INTEGERS,
}


class Numbers(TorchDispatchMode):
    """The numbers of fake tensors, computed on the CPU, where they follow from known ones.

    An operator whose shape or result depends on numbers takes ones (and yes) for unknown ones.
    """

    def __init__(self):
        super().__init__()
        self.known = WeakIdKeyDictionary()

    def of(self, item):
        """Return an operator's argument for the CPU: real numbers, no other device."""
        if isinstance(item, FakeTensor):
            known = self.known.get(item)
            return torch.ones(item.shape, dtype=item.dtype) if known is None else known
        return CPU if isinstance(item, torch.device) and item == CARD else item

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace != "aten":  # a question after the device, a mark for the profiler
            return func(*args, **kwargs)
        tensors = [item for item in tree_leaves((args, kwargs)) if torch.is_tensor(item)]
        fakes = [tensor for tensor in tensors if isinstance(tensor, FakeTensor)]
        devices = {tensor.device for tensor in tensors}
        if CARD in devices:
            check_kernel(func, tensors)
        known = all(fake in self.known for fake in fakes) and has_kernel(func, "CPU")
        try:
            out = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            if len(devices) > 1:
                raise RuntimeError(f"{func}: tensors on more than one device") from None
            known, out = True, None
        if not known:
            for fake in fakes if func._schema.is_mutable else ():
                self.known.pop(fake, None)
            return out
        with unset_fake_temporarily():
            numbers = func(*tree_map(self.of, args), **tree_map(self.of, kwargs))
        if out is None:
            [device] = devices
            out = tree_map(
                lambda x: torch.empty_like(x, device=device) if torch.is_tensor(x) else x, numbers
            )
        for one, its in zip(tree_leaves(out), tree_leaves(numbers), strict=True):
            if isinstance(one, FakeTensor):
                self.known[one] = its
        return out


def has_kernel(func, where):
    return torch._C._dispatch_has_computed_kernel_for_dispatch_key(func.name(), where)


def check_kernel(func, tensors):
    """Raise NotImplementedError where CUDA has no kernel for an operator."""
    lacking = LACKING.get(func._schema.name, ())
    compiled = torch.version.cuda is not None  # else no operator has one here
    if (compiled and not has_kernel(func, "CUDA")) or {t.dtype for t in tensors} & {*lacking}:
        raise NotImplementedError(f"{func}: CUDA has no such kernel")


@pytest.fixture(scope="module")
def fakes():
    """Skip where PyTorch's fake tensors on `cuda` need a driver."""
    try:
        with FakeTensorMode(), torch.no_grad():
            image = torch.zeros(1, 1, 2, 2, device=CARD)
            torch.nn.functional.conv2d(image, image).relu()
    except (AssertionError, RuntimeError) as error:
        pytest.skip(f"not with this PyTorch: {error}")


@pytest.fixture
def card(fakes, monkeypatch):
    """A context in which CARD can be computed on; gives the `Numbers`."""
    numbers = Numbers()
    plain_numpy = torch.Tensor.numpy

    def numpy(tensor, **options):
        if tensor.device != CPU:
            raise TypeError(f"can't convert {tensor.device} device type tensor to numpy")
        with unset_fake_temporarily():
            return plain_numpy(numbers.of(tensor), **options)

    def pin_memory(tensor):
        if tensor.device != CPU:
            raise RuntimeError(f"cannot pin a tensor on {tensor.device}")
        return tensor

    monkeypatch.setattr(torch.Tensor, "numpy", numpy)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    # A card of the machine must stay out of this; autocast asks for one, though.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    benchmark, precision = torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision()

    @contextlib.contextmanager
    def mode():
        with FakeTensorMode(allow_non_fake_inputs=True), numbers:
            yield numbers

    yield mode
    torch.backends.cudnn.benchmark = benchmark
    torch.set_float32_matmul_precision(precision)


def without_modes(function):
    """Return a function that runs on the CPU alone, as what comes before the card does.

    (Files can't be read, nor networks be copied, among fake tensors.)
    """

    def run(*args, **options):
        with no_modes():
            return function(*args, **options)

    return run


def on_card(*tensors):
    """Copy tensors to the card."""
    return [tensor.to(CARD) for tensor in tensors]


# --- the method ---------------------------------------------------------------------------------


def test_a_label_left_on_the_cpu_is_caught(card):
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, -1])
    generated = torch.tensor([0, 0, 0, 1])
    with card():
        logits, there, flags = on_card(logits, labels, generated)
        losses.label_rule("lsro")(logits, there, flags)
        with pytest.raises(RuntimeError, match="device"):
            losses.label_rule("lsro")(logits, labels, flags)
        with pytest.raises(RuntimeError, match="device"):
            losses.label_rule("lsro")(logits, there, generated)


def test_a_mean_left_on_the_cpu_is_caught(card, monkeypatch):
    with card():
        [images] = on_card(torch.zeros(2, 8, 4, 3, dtype=torch.uint8))
        normalise(images, (0.5,) * 3, (0.2,) * 3)
        monkeypatch.setattr("reid.transforms.send", lambda tensor, device: tensor)
        with pytest.raises(RuntimeError, match="device"):
            normalise(images, (0.5,) * 3, (0.2,) * 3)


def test_a_mask_left_on_the_cpu_is_caught(card):
    mask = torch.tensor([True, False])
    with card():
        [values] = on_card(torch.ones(2, 3))
        with pytest.raises(RuntimeError, match="device"):
            values[mask]


def test_numpy_on_the_card_is_caught(card):
    with card():
        [values] = on_card(torch.arange(3))
        with pytest.raises(TypeError, match="numpy"):
            values.numpy()
        with pytest.raises(RuntimeError, match="pin"):
            values.pin_memory()
        assert values.cpu().numpy().tolist() == [0, 1, 2]


def test_a_kernel_that_there_is_not_is_caught(card):
    with card():
        [images] = on_card(torch.zeros(2, 3, 8, 4, dtype=torch.uint8))
        bicubic = {"size": (9, 4), "mode": "bicubic", "antialias": True}
        F.interpolate(images.float(), **bicubic)
        with pytest.raises(NotImplementedError):
            F.interpolate(images, **bicubic)


@pytest.mark.skipif(torch.version.cuda is None, reason="a PyTorch without CUDA knows no kernel")
def test_an_operator_of_the_cpu_alone_is_caught(card):
    with card():
        [values] = on_card(torch.rand(9))
        values.histc(3)
        with pytest.raises(NotImplementedError):
            torch.histogram(values, 3)


def test_numbers_are_the_cpus(card):
    values = torch.tensor([3.0, -1.0, 2.0, -5.0])

    def compute(values):
        chosen = values[values > 0]
        chosen[chosen.argmax()] += len(chosen)
        return [chosen.tolist(), values.sum().item(), values.nonzero()[:, 0].tolist()]

    with card() as numbers:
        [there] = on_card(values)
        assert compute(there) == compute(values) == [[5.0, 2.0], -1.0, [0, 1, 2, 3]]
        there.mul_(2)
        assert numbers.of(there).tolist() == [6, -2, 4, -10]
        assert values.tolist() == [3, -1, 2, -5]


# --- training -----------------------------------------------------------------------------------


@pytest.fixture
def made_gradients(monkeypatch):
    """Have `backward` give the network of `learner` made gradients; set its `learner`."""
    told = Namespace()

    def backward(loss):
        assert loss.device == CARD
        assert loss.requires_grad
        for parameter in told.learner.net.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.full_like(parameter, 0.1)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    return told


def network(backbone, args=None, **options):
    """A network for seven people, on the CPU; of a recipe, where its args are given."""
    torch.manual_seed(0)
    if args:
        options = {name: getattr(args, name) for name in ("neck", "pooling", "last_stride")}
    with no_modes():
        return build_network(backbone, 7, size=SIZE, **options)


def options_of(flags):
    return train_lsro.parse(["--height", "64", "--width", "32", "--workers", "0", *flags.split()])


def batch(numbers, views=False):
    """Six real and two generated images, of unknown numbers, on the card."""
    images = torch.empty(10, 3, *SIZE, device=CARD)
    numbers.known.pop(images)  # else layers up to the first batch norm would be computed
    labels = torch.tensor([0, 0, 1, 1, 2, 2, -1, -2])
    labels, generated = on_card(labels, (labels < 0).long())
    return Batch(images[:8], labels, generated, list(range(8)), images[8:] if views else None)


def fill(rule, device):
    """Fill a label rule's targets, where they have to be filled."""
    if isinstance(rule.target, losses.FixedTargets):
        rule.target.weights = losses.own_class([3, 5], 7).to(device)
    if isinstance(rule.target, losses.MeanTargets):
        rule.target.logits = torch.linspace(-1, 1, 56).view(8, 7).to(device)


BF16 = torch.bfloat16
NETWORKS = [
    ("resnet50", BF16),
    ("densenet121", BF16),
    ("resnet18", None),
    ("tf_efficientnet_lite0", BF16),
]
RECIPES = ["--recipe original", "--recipe strong --circle 0.5 --ema 0.9"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "backbone", "dtype"),
    [
        *[(recipe, *network) for recipe in RECIPES for network in NETWORKS],
        ("--pooling gem --last_stride 1", "resnet18", BF16),
        ("--freeze_epochs 1 --ema 0.9", "resnet18", BF16),
    ],
)
def test_step(card, made_gradients, recipe, backbone, dtype):
    args = options_of(recipe)
    net = network(backbone, args)
    with card() as numbers:
        learner = Learner(args, ALONE, net, dtype, losses.label_rule("lsro"))
        made_gradients.learner = learner
        learner.net.train()
        loss, counts = learner.step(batch(numbers))
        assert loss.device == CARD
        assert {count.device for count in counts} == {CARD}
        assert [count.tolist() for count in counts][1] == 6
        assert {p.device for p in learner.net.parameters()} == {CARD}
        assert {b.device for b in learner.averaged().buffers()} == {CARD}
        moved = len(learner.optimizer.state)
        moments = [state["momentum_buffer"] for state in learner.optimizer.state.values()]
        assert {moment.device for moment in moments} == {CARD}
        assert moved == sum(p.grad is not None for p in learner.net.parameters()) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", losses.RULES)
def test_label_rules(card, rule, dtype):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 7, generator=generator).to(dtype)
    labels = torch.tensor([0, 0, 1, 1, 2, 2, -1, -2])
    here, there = losses.label_rule(rule, weight=0.5), losses.label_rule(rule, weight=0.5)
    fill(here, CPU)
    expected = here(logits, labels, (labels < 0).long(), 0.1)
    with card() as numbers:
        fill(there, CARD)
        logits, labels = on_card(logits, labels)
        loss = there(logits, labels, (labels < 0).long(), 0.1)
        assert loss.device == CARD
        assert numbers.of(loss) == pytest.approx(float(expected), rel=1e-5)


def test_cross_entropy(card):
    logits, labels = torch.randn(8, 7), torch.arange(8) % 7
    expected = float(losses.cross_entropy(logits, labels, torch.zeros(8), 0.1))
    with card() as numbers:
        loss = losses.cross_entropy(*on_card(logits, labels, torch.zeros(8)), 0.1)
        assert loss.device == CARD
        assert numbers.of(loss) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss", [{"triplet": 1.0}, {"circle": 1.0}])
def test_losses_over_features(card, loss):
    features = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 0, 1, 1, 2, 2, -1, -2])
    metric = losses.MetricLoss(**loss)
    expected = float(metric(features, labels, (labels < 0).long()))
    with card() as numbers:
        features, labels = on_card(features, labels)
        found = metric(features, labels, (labels < 0).long())
        assert found.device == CARD
        assert numbers.of(found) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["--recipe original", "--recipe strong"])
def test_step_with_targets_of_the_mean_network(card, made_gradients, recipe):
    args = options_of(f"{recipe} --gan_label consistency --ema 0.9")
    with card() as numbers:
        learner = Learner(
            args, ALONE, network("resnet18", args), BF16, losses.label_rule("consistency")
        )
        made_gradients.learner = learner
        learner.net.train()
        loss, _ = learner.step(batch(numbers, views=True))
        assert loss.device == CARD
        assert learner.mean_targets.logits.device == CARD


@pytest.mark.slow
@pytest.mark.parametrize(("backbone", "dtype"), NETWORKS[1:])
def test_step_with_split_batch_norm(card, made_gradients, backbone, dtype):
    args = options_of("--split_bn --gan_batch 2 --num_generated 2")
    with card() as numbers:
        learner = Learner(args, ALONE, network(backbone), dtype, losses.label_rule("lsro"))
        made_gradients.learner = learner
        learner.net.train()
        loss, _ = learner.step(batch(numbers))
        assert loss.device == CARD
        assert {b.device for b in learner.net.buffers()} == {CARD}


def test_split_batch_norm_has_the_cpus_numbers(card):
    generated = torch.tensor([0, 0, 1, 0, 1])
    values = torch.randn(5, 3, 4, 2, generator=torch.Generator().manual_seed(0))

    def normalised(norm, device):
        split = BatchKinds(ALONE._replace(device=device))
        norm = WholeBatchNorm(norm.to(device), split.world, split)
        split.tell(generated.to(device))
        return norm(values.to(device)), norm.running_var

    with torch.no_grad():
        expected = normalised(torch.nn.BatchNorm2d(3), CPU)
        norm = torch.nn.BatchNorm2d(3)
        with card() as numbers:
            found = normalised(norm, CARD)
            for one, other in zip(found, expected, strict=True):
                assert one.device == CARD
                assert torch.allclose(numbers.of(one), other, atol=1e-6)


# --- images -------------------------------------------------------------------------------------


def pictures(folder, number=6, size=(40, 70)):
    """Paths of images of one size, in folders of three people."""
    return [save_image(folder / str(n % 3) / f"{n}.png", n, size) for n in range(number)]


@pytest.mark.parametrize("colours", [False, True])
def test_augmentation_has_the_cpus_numbers(card, colours):
    """Crop, flip, colours, normalise and erase; colours to 1 of 255 and its effects."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (72, 36, 3), dtype=np.uint8) for _ in range(6)]
    transform = TrainTransform(*SIZE, ((0.5,) * 3, (0.2,) * 3), 0.8, color_jitter=colours)
    drawn = transform.draw(6, torch.Generator().manual_seed(0))
    assert drawn.erased.any()
    cropped = transform.crop(images, drawn)
    expected = transform.finish(cropped, drawn)
    with card() as numbers:
        there = transform.crop(images, drawn, CARD)
        assert there.device == CARD
        assert torch.equal(numbers.of(there), cropped)
        found = transform.finish(there, drawn)
        assert found.device == CARD
        apart = (numbers.of(found) - expected).abs()
        assert apart.mean() < (1 / 255 if colours else 1e-6)
        assert apart.max() < (0.2 if colours else 1e-5)  # 1 of 255 is 0.02 here


def samples(folder):
    real = [Sample(path, n % 3) for n, path in enumerate(pictures(folder / "real", 12))]
    return real, [Sample(path, 0, 1) for path in pictures(folder / "made", 6)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        "--batchsize 6 --gan_batch 2 --split_bn --cache ram",
        "--batchsize 8 --recipe strong --instances 2 --color_jitter --ema 0.9 --cache off",
    ],
)
def test_epoch(card, made_gradients, tmp_path, flags):
    """Batches from files, steps, sums and validation, as `Training.run` has them done."""
    args = options_of(f"{flags} --num_generated 6")
    real, generated = samples(tmp_path)
    with card():
        learner = Learner(args, ALONE, network("resnet18", args), None, losses.label_rule("lsro"))
        made_gradients.learner = learner
        learner.read(real + generated, real[:4])
        line = learner.epoch(1)
        state = learner.state()["net"]
        devices = {v.device for name, v in state.items() if name != "_extra_state"}
    assert devices == {CARD}
    assert {"train_loss", "val_loss", "with_generated"} <= line.keys()


# --- features -----------------------------------------------------------------------------------


FEATURES = [
    ("resnet50", {}),
    ("densenet121", {"neck": "bnneck", "pooling": "gem", "last_stride": 1}),
    ("resnet18", {"neck": "bnneck"}),
    ("tf_efficientnet_lite0", {}),
]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, BF16])
@pytest.mark.parametrize(("backbone", "options"), FEATURES)
def test_extraction_has_the_cpus_numbers(card, tmp_path, backbone, options, dtype):
    paths, transforms = pictures(tmp_path, 3), [EvalTransform(SIZE)]
    how = {"batchsize": 2, "workers": 0, "label": ""}
    net = fold_for_inference(lived_in(network(backbone, **options)))
    expected = extract(net, paths, transforms, ALONE._replace(device=CPU), dtype=None, **how)
    net = fold_for_inference(net, dtype)
    with card(), torch.backends.cudnn.flags(enabled=False):  # the CPU can't compute cuDNN's norms
        net = to_device(net, CARD)
        found = extract(net, paths, transforms, ALONE, dtype=dtype, **how)
        features = view_features(net, *on_card(torch.zeros(2, *SIZE, 3, dtype=torch.uint8)), dtype)
        assert (features.device, features.dtype) == (CARD, torch.float32)
    assert np.abs(found - expected).max() < (0.05 if dtype else 1e-4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder of a small network that its folding leaves without batch norm."""
    net = network("resnet18")
    return run_folder(tmp_path_factory.mktemp("runs") / "small", lived_in(net))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_embedder_has_the_cpus_numbers(card, monkeypatch, trained, tmp_path, precision):
    paths, images = pictures(tmp_path, 3), crops()
    here = Embedder(trained, device="cpu", precision="fp32", scales=(1, 1.1))
    expected = here(paths), here(images)
    loaded = load_trained(trained)
    monkeypatch.setattr("reid.features.fold_for_inference", without_modes(fold_for_inference))
    with card():
        there = Embedder(loaded, device=CARD, precision=precision, scales=(1, 1.1), batchsize=2)
        found = there(paths), there(images)
        assert {p.device for p in there.net.parameters()} == {CARD}
    for one, other in zip(found, expected, strict=True):
        assert np.abs(one - other).max() < (1e-4 if precision == "fp32" else 0.05)


@pytest.mark.parametrize("neck", ["bottleneck", "bnneck"])
def test_heat_maps_have_the_cpus_numbers(card, neck):
    net = fold_for_inference(lived_in(network("resnet18", neck=neck)))
    images = torch.from_numpy(np.stack([crop[:64, :32] for crop in crops() if len(crop) > 100]))
    layer = {"layer": "bottleneck" if neck == "bnneck" else "pool"}
    expected = explain(net, images, **layer)
    with card():
        found = explain(to_device(net, CARD), *on_card(images), **layer)
    assert found.similarity == pytest.approx(expected.similarity, abs=1e-5)
    assert found.maps == pytest.approx(expected.maps, abs=1e-5)
    assert found.constants == pytest.approx(expected.constants, abs=1e-5)


@pytest.mark.slow
def test_the_faster_arithmetic_is_tried_on_the_card(card, monkeypatch):
    """As --precision auto does, for testing and for training."""
    waited_for = set()
    monkeypatch.setattr(torch.cuda, "synchronize", waited_for.add)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.zeros(16))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: None)
    monkeypatch.setattr("reid.device.TRIAL_IMAGES", (2, 2))
    monkeypatch.setattr("reid.device.copy", Namespace(deepcopy=without_modes(copy.deepcopy)))
    net = network("resnet18")
    with card():
        for training in (False, True):
            assert faster_dtype(net, CARD, SIZE, 2, training) in (None, BF16)
    assert waited_for == {CARD}


# --- scripts that measure -----------------------------------------------------------------------


@pytest.mark.slow
def test_features_of_generated_images_are_the_cpus(card, monkeypatch, trained, tmp_path):
    args = evaluate_gan.get_parser().parse_args(["--workers", "0", "--precision", "fp32"])
    args.model_dir, args.name = trained.parent, trained.name
    paths = pictures(tmp_path)
    images = evaluate_gan.Images(paths[:3], paths[3:5], paths[5:])
    expected, _ = evaluate_gan.features_of(images, args, ALONE._replace(device=CPU))
    monkeypatch.setattr("reid.features.fold_for_inference", without_modes(fold_for_inference))
    monkeypatch.setattr(evaluate_gan, "feature_space", without_modes(evaluate_gan.feature_space))
    with card():
        found, source = evaluate_gan.features_of(images, args, ALONE)
    assert source["arithmetic"] == "float32"
    for one, other in zip(found, expected, strict=True):
        assert np.abs(one - other).max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["mprl_static", "teacher", "sls"])
def test_targets_of_a_finished_run(card, monkeypatch, trained, tmp_path, rule):
    args = Namespace(
        model_dir=trained.parent, label_run=trained.name, batchsize=4, workers=0, clusters=2, seed=0
    )
    update_results(Run(trained).file("results.json"), "train", {})
    real = [Sample(path, n) for n, path in enumerate(pictures(tmp_path / "real", 7))]
    generated = [Sample(path, 0, 1) for path in pictures(tmp_path / "made", 3)]
    here = gan_labels.Teacher(args, real, ALONE._replace(device=CPU))
    expected = here.targets(rule, real, generated)
    monkeypatch.setattr(gan_labels, "load_network", without_modes(gan_labels.load_network))
    with card():
        teacher = gan_labels.Teacher(args, real, ALONE)
        targets = teacher.targets(rule, real, generated)
        assert targets.device == CARD
        assert targets.dtype == expected.dtype
        assert targets.shape == expected.shape == (3, 7)


class DenseFeatures(re_ranking.Features):
    """Features whose pairs are multiplied densely: FakeTensorMode has no sparse tensors."""

    def pairs(self, start, starts, columns):
        rows = start + re_ranking.row_numbers(starts)
        return (self.features[rows] * self.features[columns]).sum(1)


@pytest.mark.parametrize("keep", [False, True])
def test_re_ranking_of_features_has_the_cpus_numbers(card, monkeypatch, keep):
    sets = random_sets(dim=8)
    features = sets.query.features, sets.gallery.features
    plan = re_ranking.Plan(32, keep, 0.0)
    expected = np.concatenate(list(re_ranking.rerank(*features, 10, 3, 0.3, plan)))
    monkeypatch.setattr(re_ranking, "Features", DenseFeatures)
    with card():
        found = np.concatenate(list(re_ranking.rerank(*features, 10, 3, 0.3, plan, CARD)))
    assert np.abs(found - expected).max() < 1e-5


def test_re_ranking_of_matrices_has_the_cpus_numbers(card):
    sets = random_sets(dim=8)
    q, g = (torch.from_numpy(part.features) for part in (sets.query, sets.gallery))
    matrices = q @ g.T, q @ q.T, g @ g.T
    expected = re_ranking.re_ranking(*matrices, 10, 3)
    with card():
        found = re_ranking.re_ranking(*on_card(*matrices), 10, 3)
    assert np.abs(found - expected).max() < 1e-5
