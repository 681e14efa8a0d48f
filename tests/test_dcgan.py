"""DCGAN-tensorflow as a user runs it: processes that are started in its folder.

Its model.py has the name of the root's, so nothing of it is imported here. TensorFlow takes
seconds to start: few processes, each of which shows a lot.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence

FOLDER = Path(__file__).resolve().parents[1] / "DCGAN-tensorflow"
NETWORK = ["--output_height=32", "--output_width=16", "--gf_dim=4", "--df_dim=4", "--z_dim=6"]


def call(*args, backend="tensorflow"):
    """One Python process in DCGAN-tensorflow; paths and numbers become strings."""
    return subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=FOLDER,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"KERAS_BACKEND": backend, "CUDA_VISIBLE_DEVICES": ""},
    )


def succeed(*args, backend="tensorflow"):
    done = call(*args, backend=backend)
    assert done.returncode == 0, done.stderr
    return done


def tree(folder):
    """Every path in `folder` with what it holds."""
    return {p: p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def draw_people(folder, n, size=(32, 64)):
    """n images with a dark upright block on a light ground, as Market-1501 names them."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(n):
        image = np.full((size[1], size[0], 3), 200, np.uint8)
        image[size[1] // 8 :, size[0] // 4 : size[0] * 3 // 4] = rng.integers(0, 120, 3)
        Image.fromarray(image).save(folder / f"{i:04d}_c1s1_000151_00.jpg", quality=95)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A dataset of 20 images (12 directly, 8 one level deep) and a run of two epochs on it."""
    place = tmp_path_factory.mktemp("dcgan")
    draw_people(place / "data/people", 12)
    draw_people(place / "data/people/0002", 8)
    draw_people(place / "data/people/gen_0000", 5)  # generated images: not to be trained on
    done = succeed(
        "main.py",
        "--train",
        "True",
        "--epoch",
        2,
        "--save_every",
        1,
        "--batch_size",
        4,
        *NETWORK,
        *paths(place),
    )
    # After ten steps the samples are alike still, and that is all it complains of.
    assert done.stderr.startswith("warning: epoch 2: samples have 0.0")
    assert len(done.stderr.splitlines()) == 1
    first = done.stdout.splitlines()[0]
    assert first.startswith("train: 20 images as 32x16, epochs 1..2, batch 4, generator ")
    return place


def paths(place, checkpoint="checkpoint", dataset="people"):
    return [
        "--data_dir",
        place / "data",
        "--dataset",
        dataset,
        "--checkpoint_dir",
        place / checkpoint,
        "--sample_dir",
        place / f"samples_{checkpoint}",
    ]


def log(place, checkpoint="checkpoint"):
    lines = (place / checkpoint / "people/log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_train_resume_generate(place):
    run = place / "checkpoint/people"
    assert [line["epoch"] for line in log(place)] == [1, 2]
    assert set(log(place)[0]) == {"epoch", "d_loss", "g_loss", "diversity", "seconds"}
    assert np.isfinite([line["d_loss"] + line["g_loss"] for line in log(place)]).all()
    options = json.loads((run / "options.json").read_text())
    assert (options["output_height"], options["output_width"], options["gf_dim"]) == (32, 16, 4)
    samples = sorted((place / "samples_checkpoint").iterdir())
    assert [file.name for file in samples] == ["train_0001.png", "train_0002.png"]
    assert Image.open(samples[0]).size == (8 * (16 + 2) + 2, 8 * (32 + 2) + 2)

    # Goes on at epoch 3 with the run's own sizes, then generates; line 4 was written by a run
    # that was killed before its checkpoint.
    with (run / "log.jsonl").open("a") as file:
        file.write('{"epoch": 3, "d_loss": 9, "g_loss": 9, "diversity": 9, "seconds": 9}\n{"epo')
    done = succeed(
        "main.py",
        "--train",
        "--epoch",
        3,
        "--options",
        5,
        "--sample_size",
        70,
        "--output_path",
        place / "made",
        *paths(place),
    )
    assert "epochs 3..3" in done.stdout and "\ngenerate: 70 single images, 32x16" in done.stdout
    assert [line["epoch"] for line in log(place)] == [1, 2, 3] and log(place)[-1]["seconds"] != 9
    *made, manifest = sorted((place / "made").iterdir())
    assert [file.name for file in made] == [f"gen_{i:05d}.png" for i in range(70)]
    assert {(Image.open(f).size, Image.open(f).mode) for f in made} == {((16, 32), "RGB")}
    about = json.loads(manifest.read_text())
    assert [about[key] for key in ("count", "seed", "height", "width")] == [70, 0, 32, 16]
    assert (about["epochs"], about["backend"]) == (3, "tensorflow")
    content = (run / "ckpt-0003.npz").read_bytes()
    assert about["checkpoint_sha256"] == hashlib.sha256(content).hexdigest()
    assert sorted(p.name for p in run.glob("ckpt*")) == ["ckpt-0002.npz", "ckpt-0003.npz"]

    # Exactly what an uninterrupted run of three epochs arrives at; done twice changes nothing.
    straight = ["--train", "--epoch", 3, "--batch_size", 4, *NETWORK, *paths(place, "straight")]
    done = succeed(
        "-c", "import main, sys; main.main(sys.argv[1:]); main.main(sys.argv[1:])", *straight
    )
    assert "train: nothing to do" in done.stdout.splitlines()[-1]
    assert [line["epoch"] for line in log(place, "straight")] == [1, 2, 3]
    one, two = (
        dict(np.load(place / f"{name}/people/ckpt-0003.npz")) for name in ("checkpoint", "straight")
    )
    for name in one:
        np.testing.assert_allclose(one[name], two[name], rtol=1e-4, atol=1e-6, err_msg=name)
    for a, b in zip(log(place), log(place, "straight"), strict=True):
        assert a["d_loss"] == pytest.approx(b["d_loss"], rel=1e-4)
        assert a["g_loss"] == pytest.approx(b["g_loss"], rel=1e-4)


def test_interrupt_saves(place):
    args = [
        "main.py",
        "--train",
        "--epoch",
        10000,
        "--batch_size",
        64,
        *NETWORK,
        *paths(place, "interrupted"),
    ]
    with subprocess.Popen(
        [sys.executable, *map(str, args)],
        cwd=FOLDER,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout.readline().startswith("only 20 images: --batch_size 64 becomes 20")
        while not process.stdout.readline().startswith("epoch 3/"):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.startswith("stopped in epoch") and len(stderr.splitlines()) == 1
    done = len(log(place, "interrupted"))
    assert (place / f"interrupted/people/ckpt-{done:04d}.npz").is_file()


INSIDE = """
import contextlib, io, shutil, signal, sys
from pathlib import Path
import numpy as np
import main, sampling, training, utils, watch
from errors import Interrupted, UserError
from PIL import Image

place, *where = sys.argv[1:]
place = Path(place)

def run(*args):
    main.main([*map(str, args), *where])

# Options 0..4, each into a folder of its own.
for option in range(5):
    run("--options", option, "--sample_size", 10, "--sample_dir", place / f"option{option}")
# The same seed gives the same bytes, whatever else differs; another seed others.
run("--options", 5, "--sample_size", 7, "--seed", 3, "--output_path", place / "seven")
run("--options=5", "--sample_size=90", "--seed=3", "--batch_size=5", "--output_path",
    place / "ninety")
run("--options", 5, "--sample_size", 7, "--seed", 4, "--output_path", place / "other")

import augment, checkpoint, model  # TensorFlow is up by now
gan = model.DCGAN(32, 16, z_dim=6, gf_dim=4, df_dim=4, learning_rate=0.25, ema=0.999)
main.restore(gan, checkpoint.numbered(place / "checkpoint/people")[-1])
assert gan.epochs >= 2 and gan.batches == 0
assert float(gan.d_optimizer.learning_rate) == 0.25
assert int(gan.g_optimizer.iterations) == 2 * int(gan.d_optimizer.iterations) == 2 * gan.steps > 0

# Sampling uses the moving averages: an image does not depend on the others of its batch.
z = gan.noise(64, 0)
alone = gan.generate(np.concatenate([z[:1], np.ones((63, 6), "f")]))[0]
assert np.array_equal(gan.generate(z)[0], alone)
batch = utils.to_uint8(gan.average(z, training=True).numpy())[0]
assert not np.array_equal(batch, alone)

# The average of the generator's weights, with which images are made: its decay rises with the
# steps, and batch norm's averages belong to it.
young = model.DCGAN(32, 16, z_dim=6, gf_dim=4, df_dim=4, ema=0.15)
means, real = [w.numpy() for w in young.average.weights], np.zeros((4, 32, 16, 3), np.uint8)
for decay in (1 / 10, 0.15, 0.15):  # of steps 0, 1 (2 / 11 is above 0.15) and 2
    young.train_step(real)
    newest = [w.numpy() for w in young.generator.weights]
    means = [decay * mean + (1 - decay) * new for mean, new in zip(means, newest)]
for mean, weight in zip(means, young.average.weights):
    np.testing.assert_allclose(mean, weight.numpy(), atol=1e-6)
assert max(abs(m - n).max() for m, n in zip(means, newest)) > 1e-4

# Networks of full width, as the papers used them.
g, d = model.build_generator(128, 64), model.build_discriminator(128, 64)
sizes = [layer.output.shape[1:] for layer in g.layers if "transpose" in layer.name]
assert sizes == [(16, 8, 256), (32, 16, 128), (64, 32, 64), (128, 64, 3)], sizes
sizes = [layer.output.shape[1:] for layer in d.layers if layer.name.startswith("conv2d")]
assert sizes == [(64, 32, 64), (32, 16, 128), (16, 8, 256), (8, 4, 512)], sizes
kernels = 25 * (512 * 256 + 256 * 128 + 128 * 64)
norms = lambda *channels: 4 * sum(channels)
assert g.count_params() == 101 * 8 * 4 * 512 + kernels + 25 * 64 * 3 + 3 + norms(512, 256, 128, 64)
assert d.count_params() == (25 * 3 + 1) * 64 + kernels + norms(128, 256, 512) + 8 * 4 * 512 + 1
norm = next(layer for layer in g.layers if "batch_norm" in layer.name)
assert (norm.momentum, norm.epsilon) == (0.9, 1e-5)
assert abs(np.std(g.layers[0].kernel) - 0.02) < 1e-3

# Pixels map linearly to [-1, 1]: a pale image stays pale, through the file and back.
pale = np.linspace(100, 140, 32 * 16 * 3).round().reshape(32, 16, 3).astype(np.uint8)
Image.fromarray(pale).save(place / "pale.png")
read = utils.load_images([place / "pale.png"], 32, 16)
assert np.array_equal(read[0], pale)
every = np.arange(256, dtype=np.float32)
assert np.array_equal(utils.to_uint8(utils.to_signed(every)), every)
assert utils.to_signed(every)[[0, 255]].tolist() == [-1, 1]
# A set that is too large for memory goes through a file and is the same.
utils.MEMORY_LIMIT = 0
assert np.array_equal(utils.load_images([place / "pale.png"], 32, 16), read)
# --crop takes the middle.
framed = np.zeros((60, 40, 3), np.uint8)
framed[14:46, 12:28] = pale
Image.fromarray(framed).save(place / "framed.png")
assert np.array_equal(utils.read_resized(place / "framed.png", 32, 16, crop=(32, 16)), pale)

# The batches of an epoch: every image once, others in the next epoch, and `skip` leaves off
# the first ones.
images = np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1).repeat(3, -1)
def seen(epoch, skip=0):
    return [b[:, 0, 0, 0].tolist() for b in training.batches(images, 5, 0, epoch, skip)]
assert sorted(sum(seen(1), [])) == list(range(10)) and seen(1) != seen(2)
assert seen(1, skip=1) == seen(1)[1:]

# Augmentation, image by image in plain loops. Pixel (y, x) comes from where it was before.
rng = np.random.default_rng(0)
policy = ("flip", "color", "translation", "cutout")
shape = (40, 32, 16, 3)
before = rng.uniform(-1, 1, shape).astype(np.float32)
plan = augment.draw(policy, *shape[:3], rng)
after = augment.apply(before, plan).numpy()
pixels = plan["pixels"].reshape(shape[:3]) - np.arange(40)[:, None, None] * 32 * 16
shifts, flips, cut = set(), set(), []
for image, result, (brightness, saturation, contrast), source, mask in zip(
    before, after, plan["color"], pixels, plan["mask"][..., 0]
):
    image = image + brightness
    grey = image.mean(axis=2, keepdims=True)
    image = grey + (image - grey) * saturation
    image = image.mean() + (image - image.mean()) * contrast
    for y in range(32):
        for x in range(16):
            expected = mask[y, x] * image[source[y, x] // 16, source[y, x] % 16]
            np.testing.assert_allclose(result[y, x], expected, atol=1e-5)
    assert set(np.unique(mask)) <= {0, 1}
    rows, columns = np.diff(source[:, 8] // 16), np.diff(source[16] % 16)
    assert set(rows) <= {0, 1} and set(columns) in ({0, 1}, {1}, {0, -1}, {-1})
    flips.add(-1 in columns)
    shifts.add(source[16, 8] // 16 - 16)
    cut.append(1 - mask.mean())
assert flips == {False, True} and shifts == set(range(-4, 5))
assert 0.05 < min(cut) < max(cut) < 0.6  # a quarter, less at the border, and what was shifted in
assert augment.draw((), *shape[:3], rng) == {}
only = augment.draw(("cutout",), *shape[:3], rng)
assert only.keys() == {"mask"}
assert np.array_equal(augment.apply(before, only), before * only["mask"])

# The collapse watch. Noise on a few figures is no diversity, and a shift of a pixel hardly any.
people = rng.integers(0, 256, (64, 4, 2, 3)).repeat(8, 1).repeat(8, 2).astype(np.uint8)
three = people[np.arange(64) % 3] // 2 + rng.integers(0, 60, (64, 32, 16, 3)).astype(np.uint8)
whole = watch.diversity(people)
assert whole > 0.1 and watch.diversity(three) < 0.2 * whole
by_hand = people[:, ::8, ::8].reshape(64, -1) / 255
gaps = [
    np.sqrt(((a - b) ** 2).mean())
    for i, a in enumerate(by_hand) for j, b in enumerate(by_hand) if i != j
]
nearest = np.reshape(gaps, (64, 63)).min(axis=1).mean()
assert abs(whole - nearest) < 1e-6

class Collapsing:
    epochs = batches = steps = 0
    loss = 1.0
    def noise(self, n, rng): return np.zeros((n, 6))
    def generate(self, z): return (people if self.epochs <= 2 else three)[np.arange(len(z)) % 64]
    def train_step(self, real): return self.loss, 1.0
    def state(self): return {"done": np.array([0, self.epochs, 0])}

args = main.get_parser().parse_args(["--train", "--save_every", "1", "--epoch", "6"])
args.batch_size, args.seed, args.sample_dir = 64, 0, place / "watched_samples"
watched = place / "watched"
log = training.start_log(watched, {}, 1)
stderr = io.StringIO()
with contextlib.redirect_stderr(stderr):
    training.train(Collapsing(), people, args, watched, log)
lines = stderr.getvalue().splitlines()
assert len(lines) == 4 and all("diversity (a collapse?)" in line for line in lines)
assert checkpoint.load(watched / "healthy.npz")[0]["done"].tolist() == [0, 2, 0]
assert [path.name for path in checkpoint.numbered(watched)] == ["ckpt-0005.npz", "ckpt-0006.npz"]
assert ["warning" in line for line in log.read_text().splitlines()] == [False] * 2 + [True] * 4
# A loss or a weight that is no number ends the training and leaves its checkpoints.
class NoLoss(Collapsing):
    loss = np.nan
class NoWeight(Collapsing):
    def state(self): return {"done": np.array([0, 0, 0]), "weight": np.array([1, np.inf])}
kept = [path.read_bytes() for path in sorted(watched.glob("*.npz"))]
for broken in (NoLoss(), NoWeight()):
    try:
        training.train(broken, people, args, watched, log)
        raise AssertionError("went on with NaN")
    except UserError as error:
        assert "is no number any more" in str(error)
assert [path.read_bytes() for path in sorted(watched.glob("*.npz"))] == kept
# A new run in a folder whose checkpoints were deleted has no healthy one; what never was
# varied is said at the end.
for path in checkpoint.numbered(watched):
    path.unlink()
training.start_log(watched, {}, 1)
assert not (watched / "healthy.npz").exists()
never = Collapsing()
never.generate = lambda z: three[np.arange(len(z)) % 64]
stderr = io.StringIO()
with contextlib.redirect_stderr(stderr):
    training.train(never, people, args, watched, log)
assert "(a collapse?); train longer" in stderr.getvalue()
assert len(stderr.getvalue().splitlines()) == 1
assert not (watched / "healthy.npz").exists()

# Stopped in the middle of an epoch and gone on with, a run ends where an unbroken one does.
args.epoch, args.batch_size = 3, 4
def run_on(name, stop_at=None):
    gan = model.DCGAN(32, 16, z_dim=6, gf_dim=4, df_dim=4, ema=0.9, policy=("flip",))
    folder = place / name
    if checkpoint.numbered(folder):
        main.restore(gan, checkpoint.numbered(folder)[-1])
    step = gan.train_step
    def stopped_step(real):
        if gan.steps == stop_at:
            signal.raise_signal(signal.SIGINT)
        return step(real)
    gan.train_step = stopped_step
    log = training.start_log(folder, {}, gan.epochs + 1)
    try:
        training.train(gan, people[:20], args, folder, log)
    except Interrupted as end:
        assert str(end).startswith("stopped in epoch") and stop_at
    return checkpoint.load(checkpoint.numbered(folder)[-1])[0]
assert run_on("broken", stop_at=6)["done"].tolist() == [7, 1, 2]  # steps, epochs, batches
broken, unbroken = run_on("broken"), run_on("unbroken")
assert broken["done"].tolist() == [15, 3, 0]
for name in unbroken:
    np.testing.assert_allclose(broken[name], unbroken[name], rtol=1e-5, atol=1e-8, err_msg=name)

# A damaged checkpoint is one line; so is one of another network.
shutil.copytree(place / "checkpoint", place / "damaged")
for file in (place / "damaged/people").glob("*.npz"):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
try:
    run("--options", 5, "--checkpoint_dir", place / "damaged", "--output_path", place / "no")
    raise AssertionError("loaded a damaged checkpoint")
except UserError as error:
    assert "cannot load" in str(error)
assert not (place / "no").exists()
"""

# Both backends from the same state and batch: in Adam's momentums are the gradients. The tiny
# rate keeps the second generator step comparable.
ONE_STEP = """
import sys
from pathlib import Path
import numpy as np
import checkpoint, main

main.start_backend()
import model

start, out, policy = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
images = np.random.default_rng(1).integers(0, 256, (16, 32, 16, 3), dtype=np.uint8)
for spectral in (False, True):
    gan = model.DCGAN(32, 16, z_dim=6, gf_dim=8, df_dim=8, ema=0.9, learning_rate=1e-6,
                      spectral_norm=spectral, policy=tuple(policy.split(",")))
    name = f"{spectral}.npz"
    if (start / name).exists():
        main.restore(gan, start / name)
    else:
        np.savez(start / name, **gan.state())
    losses = [float(loss) for loss in gan.train_step(images)]
    np.savez(out / name, losses=losses, **gan.state(), images=gan.generate(gan.noise(3, 0)))
# The norm that kernels are divided by becomes their largest singular value.
for _ in range(30):
    gan.train_step(images)
layer = gan.discriminator.layers[2]
kernel, u = map(model.ops.convert_to_numpy, (layer.kernel, layer.u))
matrix = kernel.reshape(-1, 16)
v = u @ matrix.T
assert abs(np.linalg.norm(v) / np.linalg.svd(matrix)[1][0] - 1) < 0.02
"""


def test_backends_compute_the_same(tmp_path):
    for backend in ("tensorflow", "torch"):
        (tmp_path / backend).mkdir()
        where = tmp_path, tmp_path / backend, "flip,color,translation,cutout"
        succeed("-c", ONE_STEP, *where, backend=backend)
    for name in ("False.npz", "True.npz"):
        one, two = (np.load(tmp_path / backend / name) for backend in ("tensorflow", "torch"))
        start = np.load(tmp_path / name)
        assert set(one) == set(two) == {*start, "losses", "images"}
        assert abs(one["images"].astype(int) - two["images"]).max() <= 1
        moved = 0
        for key in set(one) - {"images"}:
            scale = max(abs(one[key]).max(), 1e-6)
            np.testing.assert_allclose(one[key], two[key], atol=2e-4 * scale, err_msg=key)
            moved += key in start and (one[key] != start[key]).any()
        assert moved > 50  # momentums, weights, averages, statistics


def test_torch_trains_and_tensorflow_generates(place):
    """One run, two backends, with everything that is off by default."""
    where = paths(place, "torch")
    flags = ["--spectral_norm", "--augment", "flip,color", "--precision", "bf16", "--batch_size", 8]
    without = "import sys; sys.modules['tensorflow'] = None; import errors, main; "
    without += "errors.run(main.main)"
    train = ["-c", without, "--train", *where]
    done = succeed(*train, "--epoch", 1, *NETWORK, *flags, backend="torch")
    assert "torch, CPU, bf16" in done.stdout and len(done.stderr.splitlines()) <= 1
    succeed(*train, "--epoch", 2, backend="torch")
    done = call(*train, "--xla", backend="torch")
    assert done.returncode == 2 and done.stderr.startswith("error: --xla: only TensorFlow has it")
    made = place / "by_tensorflow"
    succeed("main.py", "--options", 5, "--sample_size", 3, *where, "--output_path", made)
    assert len(list(made.glob("*.png"))) == 3
    options = json.loads((place / "torch/people/options.json").read_text())
    assert (options["spectral_norm"], options["augment"], options["precision"]) == (
        True,
        "flip,color",
        "bf16",
    )
    state = np.load(place / "torch/people/ckpt-0002.npz")
    assert {state[key].dtype for key in state if key.startswith("gen")} == {np.dtype(np.float32)}
    assert len(log(place, "torch")) == 2


def test_options_and_networks(place):
    where = paths(place)
    where.remove("--sample_dir")
    # --checkpoint_dir first, so that INSIDE can name another one after it
    code = INSIDE.replace(
        "main.main([*map(str, args), *where])", "main.main([*where, *map(str, args)])"
    )
    succeed("-c", code, place, *where[:-1])
    names = {
        option: sorted(file.name for file in (place / f"option{option}").iterdir())
        for option in range(5)
    }
    dimensions = range(6)
    assert names[0] == ["grid.png"] and names[4] == ["sweeps.gif"]
    assert names[1] == [f"sweep_{d:03d}.png" for d in dimensions]
    assert names[3] == [f"sweep_{d:03d}.gif" for d in dimensions]
    assert names[2] and set(names[2]) <= set(names[3])
    assert Image.open(place / "option0/grid.png").size == (4 * 18 + 2, 3 * 34 + 2)
    assert Image.open(place / "option1/sweep_000.png").size == (8 * 18 + 2, 8 * 34 + 2)
    gif = ImageSequence.Iterator(Image.open(place / "option3/sweep_000.gif"))
    assert sum(frame.info["duration"] for frame in gif) == 14 * 120  # 8 forth, 6 back
    assert Image.open(place / "option4/sweeps.gif").size == (3 * 18 + 2, 2 * 34 + 2)

    seven, other, ninety = (
        sorted((place / name).glob("*.png")) for name in ("seven", "other", "ninety")
    )
    assert (len(seven), len(other), len(ninety)) == (7, 7, 90)
    contents = [file.read_bytes() for file in seven]
    assert contents == [file.read_bytes() for file in ninety[:7]]
    assert len(set(contents)) > 1
    assert contents != [file.read_bytes() for file in other]


def test_resize(tmp_path):
    draw_people(tmp_path / "made", 9, size=(16, 32))
    Image.new("L", (20, 20), 77).save(tmp_path / "made/grey.png")
    done = succeed(
        "resizeImage.py",
        "--input_path",
        tmp_path / "made",
        "--output_path",
        tmp_path / "new/gen_0000",
    )
    assert done.stdout.startswith("10 images of 64x128 in ") and done.stderr == ""
    files = sorted((tmp_path / "new/gen_0000").glob("*.jpg"))
    assert [f.stem for f in files] == sorted(f.stem for f in (tmp_path / "made").iterdir())
    assert {(f.suffix, Image.open(f).format, Image.open(f).size) for f in files} == {
        (".jpg", "JPEG", (64, 128))
    }
    assert abs(np.asarray(Image.open(files[-1])).astype(int) - 77).max() <= 1
    about = json.loads((tmp_path / "new/gen_0000/manifest.json").read_text())
    assert [about[key] for key in ("count", "height", "width", "generated")] == [10, 128, 64, None]
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["gen_0000"]  # nothing temporary

    succeed(
        "resizeImage.py",
        "--input_path",
        tmp_path / "made",
        "--output_path",
        tmp_path / "small",
        "--width",
        24,
        "--height",
        40,
        "--quality",
        50,
    )
    assert Image.open(tmp_path / "small/grey.jpg").size == (24, 40)


def test_help():
    for script, flags in (
        ("main.py", "--dataset --gf_dim --sample_dir 0.0002"),
        ("resizeImage.py", "--input_path 128"),
    ):
        done = succeed(script, "--help")
        assert all(flag in done.stdout for flag in flags.split()) and "default: " in done.stdout
    done = succeed("-X", "importtime", "main.py", "--help")
    assert "tensorflow" not in done.stderr and "torch" not in done.stderr


TRAIN = ["main.py", "--train", *NETWORK]
RESIZE = ["resizeImage.py"]
# (arguments, words of the error); {} is the folder of `bad_place`, {place} the trained one
BAD = [
    (["main.py"], "nothing to do: pass --train"),
    ([*TRAIN, "--dataset", "nobody"], "no folder {}/data/nobody"),
    ([*TRAIN, "--dataset", "empty"], "--dataset: no image in {}/data/empty"),
    ([*TRAIN, "--train_size", "1"], "--dataset: only one image to train on in {}/data/good"),
    ([*TRAIN, "--input_fname_pattern", "*.bmp"], "--input_fname_pattern: none of the 4 images"),
    ([*TRAIN, "--dataset", "damaged"], "{}/data/damaged/b.jpg: can't be read as an image"),
    ([*TRAIN, "--output_width", "20"], "--output_width 20: heights and widths must be multiples"),
    ([*TRAIN, "--sample_size", "0"], "--sample_size: must be 1 or more"),
    ([*TRAIN, "--options", "6"], "--options: invalid choice"),
    ([*TRAIN, "--out", "x"], "unrecognized arguments: --out"),
    ([*TRAIN, "--crop", "maybe"], "--crop: True or False"),
    ([*TRAIN, "--learning_rate", "0"], "--learning_rate must be above 0"),
    ([*TRAIN, "--ema", "1"], "--ema from 0 to below 1"),
    ([*TRAIN, "--augment", "flip,rotate"], "--augment: invalid policy value: 'flip,rotate'"),
    ([*TRAIN, "--precision", "fp16"], "--precision: invalid choice"),
    ([*TRAIN, "--checkpoint_dir", "{}/file"], "--checkpoint_dir: cannot write to {}/file"),
    ([*TRAIN, "--sample_dir", "{}/file/in"], "--sample_dir: cannot write to {}/file/in"),
    ([*TRAIN, "--options", "5", "--output_path", "{}/data/good"], "already holds files"),
    (["main.py", "--options", "5"], "no checkpoint in {}/checkpoint/good"),
    (
        [
            "main.py",
            "--options",
            "5",
            "--dataset",
            "people",
            "--checkpoint_dir",
            "{place}/checkpoint",
            "--output_height",
            "64",
        ],
        "--output_height 64: the checkpoint in",
    ),
    (
        [
            "main.py",
            "--options",
            "5",
            "--dataset",
            "people",
            "--checkpoint_dir",
            "{place}/checkpoint",
            "--output_path",
            "{}/file",
        ],
        "--output_path: cannot write to {}/file",
    ),
    (
        [
            "main.py",
            "--train",
            "--seed",
            "1",
            "--dataset",
            "people",
            "--checkpoint_dir",
            "{place}/checkpoint",
        ],
        "--seed 1: the checkpoint in",
    ),
    (
        ["main.py", "--train", "--dataset", "people", "--checkpoint_dir", "{place}/checkpoint"],
        "goes on with other images than those it was started with (20 of {place}/data/people)",
    ),
    ([*RESIZE, "--input_path", "{}/none"], "--input_path: there is no folder {}/none"),
    ([*RESIZE, "--input_path", "{}/data/empty"], "--input_path: no image in {}/data/empty"),
    ([*RESIZE, "--input_path", "{}/data/damaged"], "data/damaged/b.jpg: can't be read as an image"),
    ([*RESIZE, "--input_path", "{}/data/twins"], "would both become 0000_c1s1_000151_00.jpg"),
    (
        [*RESIZE, "--input_path", "{}/data/good", "--output_path", "{}/data/good"],
        "--output_path: {}/data/good already holds files",
    ),
    (
        [*RESIZE, "--input_path", "{}/data/good", "--output_path", "{}/file"],
        "--output_path: cannot write",
    ),
    ([*RESIZE, "--input_path", "{}/data/good", "--height", "0"], "--height: must be 1 or more"),
    ([*RESIZE, "--input_path", "{}/data/good", "--quality", "101"], "--quality: from 1 to 100"),
]


@pytest.fixture(scope="module")
def bad_place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    for name in ("good", "damaged", "twins", "people"):
        draw_people(folder / "data" / name, 4)
    whole = (folder / "data/good/0000_c1s1_000151_00.jpg").read_bytes()
    (folder / "data/damaged/b.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    Image.new("RGB", (8, 8)).save(folder / "data/twins/0000_c1s1_000151_00.png")
    (folder / "data/empty").mkdir()
    (folder / "file").write_text("in the way")
    return folder


@pytest.mark.parametrize(("args", "message"), BAD, ids=[" ".join(a[:1] + a[-2:]) for a, _ in BAD])
def test_bad_input(place, bad_place, args, message):
    args, message = (
        [text.replace("{}", str(bad_place)).replace("{place}", str(place)) for text in texts]
        for texts in (args, [message])
    )
    known = (
        ["--output_path", bad_place / "out"]
        if args[0] != "main.py"
        else [
            "--data_dir",
            bad_place / "data",
            "--dataset",
            "good",
            "--checkpoint_dir",
            bad_place / "checkpoint",
            "--sample_dir",
            bad_place / "samples",
            "--output_path",
            bad_place / "out",
        ]
    )
    before = tree(bad_place), tree(place)
    done = call(args[0], *known, *args[1:])
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ")
    assert message[0] in done.stderr
    assert (tree(bad_place), tree(place)) == before
