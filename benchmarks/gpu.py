"""What a GPU should show: the CPU's results, and how fast and how well used it is.

    python benchmarks/gpu.py                 # on a GPU, within 8 minutes
    python benchmarks/gpu.py --device cpu    # tiny sizes: shows that it runs, no more
    python benchmarks/gpu.py --row "train ResNet-50, batch 32"

Needs no dataset, TensorFlow or network. Each row of the table is a process of its own: what fails
or takes too long is a row that says so. Rows are printed and written to --json as they come, so it
may be stopped at any time.

The first rows compare the device with the CPU: the largest difference found and the one allowed.
Training steps are compared in fp64, because a network of fifty layers makes a hundredth of what
fp32 rounds away; features in fp32 with TF32 off. The others are rates once all is warm; "used" is
the arithmetic done, counted by PyTorch's FlopCounterMode, over what the card reaches in a large
bf16 matrix product. Peak memory is that of PyTorch's allocator.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import train_baseline
import train_lsro
from re_ranking import rerank
from reid import losses
from reid.dataset import Sample
from reid.device import device_name, dtype_for, faster_dtype, set_up, to_device
from reid.distributed import World, join_world, leave_world
from reid.features import extract_batches, fold_for_inference, view_features
from reid.learner import Learner
from reid.loading import Batch, EvalBatches
from reid.options import parse_training
from reid.transforms import EvalTransform, TrainTransform, enlarged
from reid.weights import build_network

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 150  # seconds a row may take
CPU = torch.device("cpu")
CLASSES = 751  # Market-1501's
# query, gallery, dimensions
MARKET, MSMT17 = (3368, 19732, 2048), (11659, 82161, 2048)


def get_parser():
    parser = argparse.ArgumentParser(description="Compare a GPU with the CPU, and time it.")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--minutes", type=float, default=8, help="begin no row after these")
    parser.add_argument("--json", default="gpu.json", help="the table's numbers")
    parser.add_argument("--row", action="append", metavar="NAME", help="some rows alone")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no GPU here: --device cpu shows that this runs, at tiny sizes")
    device = torch.device(args.device, 0) if args.device == "cuda" else CPU
    setting = Setting(device, args.folder)
    if args.one:
        print(json.dumps(setting.measure(args.one)))
        return
    for name in args.row or ():
        if name not in setting.rows:
            sys.exit(f"--row {name}: expected one of {', '.join(setting.rows)}")
    started = time.monotonic()
    facts = {
        "device": device_name(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
    }
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print("\n| | found | used | peak GB | |\n|---|---|---:|---:|---|")
    with tempfile.TemporaryDirectory() as folder:
        make_images(Path(folder), setting.images)
        rows, peak = {}, None
        for name in args.row or setting.rows:
            if time.monotonic() - started > 60 * args.minutes:
                row = {"found": "no time left", "fine": False}
            else:
                row = child(args, name, folder)
            peak = row.get("flops") if name == setting.first else peak
            if peak and "flops" in row:
                row["used"] = row["flops"] / peak
            rows[name] = row
            print(as_line(name, row), flush=True)
            Path(args.json).write_text(json.dumps({**facts, "rows": rows}, indent=1))
    print(f"\n{time.monotonic() - started:.0f} s; {args.json}")
    if not all(row["fine"] for row in rows.values()):
        sys.exit(1)


def child(args, name, folder):
    """Return the row of that name, measured by a process of its own."""
    command = [sys.executable, __file__, "--device", args.device, "--folder", folder, "--one", name]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = time.monotonic()
    process = subprocess.Popen(command, **pipes, start_new_session=True)
    try:
        out, err = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return {"found": f"not done after {LIMIT} s", "fine": False}
    finally:
        with suppress(ProcessLookupError):  # what it has started must not run on
            os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        lines = err.strip().splitlines() or [f"exit status {process.returncode}"]
        print(err[-3000:], file=sys.stderr)
        return {"found": lines[-1][:200], "fine": False}
    return json.loads(out.splitlines()[-1]) | {"seconds": time.monotonic() - started}


def as_line(name, row):
    """Return a row of the table."""
    used = f"{row['used']:.0%}" if "used" in row else ""
    peak = f"{row['peak']:.2f}" if row.get("peak") else ""
    return f"| {name} | {row['found']} | {used} | {peak} | {'' if row['fine'] else 'FAILED'} |"


def make_images(folder, number):
    """Write JPEGs of 64x128 with some structure in them."""
    rng = np.random.default_rng(0)
    for image in range(number):
        coarse = Image.fromarray(rng.integers(256, size=(16, 8, 3), dtype=np.uint8))
        coarse.resize((64, 128), Image.Resampling.BICUBIC).save(folder / f"{image:05d}.jpg")


class Setting:
    """The device, the sizes to measure at, and the rows to measure."""

    def __init__(self, device, folder):
        self.device, self.folder = device, folder
        full = device.type == "cuda"
        self.size = (256, 128) if full else (64, 32)
        self.steps = 30 if full else 2
        self.images = 2048 if full else 64
        self.first = "matrix product, bf16" if full else "matrix product"
        names = {"resnet50": "ResNet-50", "densenet121": "DenseNet-121"}
        trainings = [("resnet50", 32), ("densenet121", 32), ("resnet50", 256)]
        if not full:
            trainings = [("resnet50", 8)]
            names = {"resnet50": names["resnet50"]}
        self.rows = {self.first: self.matrix_product}
        for recipe in ("original", "strong"):
            self.rows[f"training step, {recipe}"] = partial(self.step, recipe=recipe)
        self.rows |= {
            "training step, --split_bn": partial(self.step, split=True),
            "training step of two processes": self.two_processes,
            "label rules": self.label_rules,
            "augmentation": self.augmentation,
            "features": self.features,
            "features in bf16": partial(self.features, dtype=torch.bfloat16),
            "re-ranking": self.re_ranking,
            "batches alone": self.batches,
        }
        for backbone, batchsize in trainings:
            name = f"train {names[backbone]}, batch {batchsize}"
            self.rows[name] = partial(self.train, backbone, batchsize)
        if full:
            self.rows["train ResNet-50, batch 64, strong"] = partial(
                self.train, "resnet50", 64, flags=["--recipe", "strong"]
            )
            self.rows["train ResNet-50, batch 32, --compile"] = partial(
                self.train, "resnet50", 32, flags=["--compile"]
            )
        for backbone, name in names.items():
            self.rows[f"extract {name}"] = partial(self.extract, backbone)
        sizes = {"Market-1501": MARKET, "MSMT17": MSMT17} if full else {"tiny": (50, 400, 64)}
        for name, size in sizes.items():
            self.rows[f"re-rank {name}"] = partial(self.re_rank, *size)
        self.rows["train the DCGAN, 128x64, batch 64"] = self.gan
        self.backbone = "resnet50" if full else "resnet18"
        self.rows["the scripts, one after the other"] = self.scripts

    def measure(self, name):
        """Return the row of that name, with the peak of the device's memory."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        row = self.rows[name]()
        if self.device.type == "cuda":
            row["peak"] = torch.cuda.max_memory_allocated() / 1e9
        return {"fine": True} | row

    # --- what a row needs -----------------------------------------------------------------------

    def world(self, device=None):
        return World(0, 1, device or self.device, [])

    def samples(self):
        """Return the made-up images, four of an identity."""
        paths = sorted(self.folder.glob("*.jpg"))
        return [Sample(path, number // 4 % CLASSES) for number, path in enumerate(paths)]

    def learner(self, world, flags=(), backbone="resnet50", rule=None, kind=None, dtype=None):
        """Return a `Learner` with weights drawn by a seed; kind: the dtype of its numbers."""
        script = train_lsro if rule else train_baseline
        flags = ["--backbone", backbone, "--pretrained", "none", "--cache", "ram", *flags]
        size = ["--height", str(self.size[0]), "--width", str(self.size[1])]
        args = parse_training(script.get_parser(), [*flags, *size])
        torch.manual_seed(0)
        options = {"neck": args.neck, "pooling": args.pooling, "last_stride": args.last_stride}
        net = build_network(backbone, CLASSES, "none", self.size, **options)
        function = losses.label_rule(rule) if rule else losses.cross_entropy
        return Learner(args, world, net.to(kind), dtype, function)

    def batch(self, device, number=16):
        """Return a batch of random images, every fourth of them generated."""
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(number, 3, *self.size, generator=generator)
        generated = (torch.arange(number) % 4 == 3).long()
        labels = torch.where(generated == 1, -generated.cumsum(0), torch.arange(number) // 8)
        return Batch(
            images.to(device), labels.to(device), generated.to(device), list(range(number))
        )

    def synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    # --- the same as on the CPU -----------------------------------------------------------------

    def one_step(self, world, **options):
        """Return a step's loss and the gradient as one vector, on the CPU."""
        learner = self.learner(world, kind=torch.float64, **options)
        learner.net.train()
        for part in learner.net.modules():
            if "Dropout" in type(part).__name__:
                part.p = 0.0  # its mask is another one on each device
        batch = self.batch(world.device)
        batch = batch._replace(images=batch.images.double())
        shard = Batch(*(world.shard(part) for part in batch[:3]), batch.numbers)
        if not options.get("rule"):  # the baseline sees no generated images
            shard = shard._replace(
                labels=shard.labels.clamp(min=0), generated=torch.zeros_like(shard.generated)
            )
        loss, _ = learner.step(shard)
        gradients = [p.grad for p in learner.net.parameters() if p.grad is not None]
        return loss.item(), torch.cat([gradient.flatten() for gradient in gradients]).cpu()

    def step(self, recipe="original", split=False):
        """Compare a step's loss and gradient with the CPU's."""
        options = {"flags": ["--recipe", recipe]}
        if split:
            options = {"flags": ["--split_bn"], "rule": "lsro"}
        return compared_steps(
            self.one_step(self.world(), **options), self.one_step(self.world(CPU), **options)
        )

    def two_processes(self):
        """Compare a step of two processes, which share the device by gloo, with one's."""
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            launch += ["--nproc_per_node", "2"]
            again = ["--device", self.device.type, "--folder", str(self.folder)]
            again += ["--one", "training step of two processes"]
            command = [*launch, __file__, *again]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            return json.loads(
                next(line for line in done.stdout.splitlines() if line.startswith("{"))
            )
        world = join_world("0" if self.device.type == "cuda" else "-1")
        shared = self.one_step(world, flags=["--recipe", "strong"])
        leave_world()
        if not world.first:
            sys.exit()
        return compared_steps(shared, self.one_step(self.world(), flags=["--recipe", "strong"]))

    def label_rules(self):
        """Compare every label rule's loss and gradient with the CPU's."""
        exact_fp32()
        worst = 0.0
        for name in losses.RULES:
            found = []
            for device in (CPU, self.device):
                rule = losses.label_rule(name)
                table = torch.randint(1, 9, (16, CLASSES), generator=seeded(2)).to(device)
                if isinstance(rule.target, losses.FixedTargets):
                    rule.target.weights = table
                if isinstance(rule.target, losses.MeanTargets):
                    rule.target.logits = table.float()
                logits = torch.randn(16, CLASSES, generator=seeded(3)).to(device).requires_grad_()
                batch = self.batch(device)
                rule(logits, batch.labels, batch.generated, 0.1).backward()
                found.append(logits.grad.cpu())
            worst = max(worst, relative(*found))
        return difference(worst, 1e-5, f"{len(losses.RULES)} rules, gradient")

    def augmentation(self):
        """Compare augmented images with the CPU's."""
        samples = self.samples()[:64]
        plain = ((0.0,) * 3, (1.0,) * 3)
        transform = TrainTransform(*self.size, plain, 0.5)
        arrays = [transform.read(sample.path) for sample in samples]
        drawn = transform.draw(len(samples), seeded(4))
        images = [
            transform.finish(transform.crop(arrays, drawn, device), drawn).cpu()
            for device in (CPU, self.device)
        ]
        worst = 255 * (images[0] - images[1]).abs().max().item()
        return difference(worst, 0.01, "grey levels of 255")

    def features(self, dtype=None):
        """Compare a network's features with the CPU's."""
        found = []
        images = torch.randint(256, (32, *self.size, 3), generator=seeded(5), dtype=torch.uint8)
        for device, kind in ((CPU, None), (self.device, dtype)):
            torch.manual_seed(0)
            net = build_network("resnet50", CLASSES, "none", self.size)
            net = to_device(fold_for_inference(net, kind), device)
            exact_fp32()
            with torch.inference_mode():
                found.append(view_features(net, images.to(device), kind).cpu().double())
        worst = 1 - (found[0] * found[1]).sum(1).min().item()
        return difference(abs(worst), 1e-2 if dtype else 1e-5, "1 - cosine")

    def re_ranking(self):
        """Compare re-ranked distances with the CPU's."""
        query, gallery = made_up_features(60, 1000, 64)
        found = [
            np.concatenate(list(rerank(query, gallery, device=device)))
            for device in (CPU, self.device)
        ]
        return difference(float(np.abs(found[0] - found[1]).max()), 1e-5, "of a distance")

    # --- how fast -------------------------------------------------------------------------------

    def matrix_product(self):
        """Measure the card's rate: the best of ten products."""
        size = 8192 if self.device.type == "cuda" else 1024
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        a, b = (torch.randn(size, size, device=self.device, dtype=dtype) for _ in range(2))
        times = []
        for _ in range(13):
            self.synchronize()
            started = time.perf_counter()
            a @ b
            self.synchronize()
            times.append(time.perf_counter() - started)
        rate = 2 * size**3 / min(times[3:])
        return {"found": f"{rate / 1e12:.3g} TFLOP/s", "flops": rate}

    def opened(self, backbone, batchsize, flags=()):
        """Return a `Learner` with the made-up images read, in the arithmetic that is faster."""
        flags = ["--batchsize", str(batchsize), "--warm_epoch", "0", *flags]
        world = self.world()
        net = build_network(backbone, CLASSES, "none", self.size)
        set_up(self.device)
        dtype = faster_dtype(net, self.device, self.size, batchsize, training=True)
        learner = self.learner(world, flags, backbone, dtype=dtype)
        learner.read(self.samples(), [])
        learner.net.train()
        if self.device.type == "cuda":  # the trial of both took more memory than the training will
            torch.cuda.reset_peak_memory_stats()
        return learner

    def endless(self, learner):
        """Yield batches of epoch after epoch."""
        epoch = 0
        while True:
            yield from learner.batches.epoch(epoch)
            epoch += 1

    def rate(self, batches, work, warm_up):
        """Return images a second of doing `work` for each batch, in steady state."""
        for batch in islice(batches, warm_up):
            work(batch)
        self.synchronize()
        started, images = time.perf_counter(), 0
        for batch in islice(batches, self.steps):
            work(batch)
            images += len(batch.images)
        self.synchronize()
        return images / (time.perf_counter() - started)

    def batches(self):
        """Measure how fast batches come to the device, cropped and erased, with no network."""
        learner = self.opened("resnet50", 64 if self.device.type == "cuda" else 8)
        rate = self.rate(self.endless(learner), lambda batch: None, 2)
        return {"found": f"{rate:,.0f} images/s"}

    def train(self, backbone, batchsize, flags=()):
        """Measure training as train_baseline.py does it, batches made on the way."""
        learner = self.opened(backbone, batchsize, flags)
        flops = self.flops(backbone, learner.args)
        rate = self.rate(self.endless(learner), learner.step, 10 if self.steps > 2 else 1)
        kind = str(learner.dtype or torch.float32).removeprefix("torch.")
        return {"found": f"{rate:,.0f} images/s, {kind}", "flops": rate * flops}

    def flops(self, backbone, options):
        """Return the operations of training on an image."""
        choices = {"neck": options.neck, "last_stride": options.last_stride}
        net = build_network(backbone, CLASSES, "none", self.size, **choices).to(self.device)
        images = torch.zeros(4, 3, *self.size, device=self.device)
        with FlopCounterMode(display=False) as counter:
            net(images).sum().backward()
        return counter.get_total_flops() / 4

    def extract(self, backbone):
        """Measure extraction as test.py does it, images decoded by processes on the way."""
        set_up(self.device)
        dtype = dtype_for(self.device)
        size = enlarged(*self.size)
        transform, paths = EvalTransform(size), [sample.path for sample in self.samples()]
        arrays = [transform.read(path) for path in paths]
        net = to_device(build_network(backbone, CLASSES, "none", self.size), self.device).eval()
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            view_features(net, torch.from_numpy(arrays[0])[None].to(self.device), None)
        net = to_device(fold_for_inference(net, dtype), self.device)
        rates = {}
        for name, cache in (("decoding", None), ("decoded", arrays)):
            workers = min(8, os.cpu_count() or 1)
            batches = EvalBatches(paths, transform, 64, workers, self.device, cache)
            first = EvalBatches(paths[:64], transform, 64, 0, self.device)
            extract_batches(net, first, dtype, None)
            started = time.perf_counter()
            extract_batches(net, batches, dtype, None)
            rates[name] = len(paths) / (time.perf_counter() - started)
        found = ", ".join(f"{rate:,.0f} images/s {name}" for name, rate in rates.items())
        return {"found": found, "flops": rates["decoded"] * counter.get_total_flops()}

    def re_rank(self, queries, gallery, dim):
        """Measure re-ranking of made-up features."""
        query_f, gallery_f = made_up_features(queries, gallery, dim)
        if self.device.type == "cuda":
            torch.zeros(1, device=self.device)
        started = time.perf_counter()
        for _ in rerank(query_f, gallery_f, device=self.device):
            pass
        return {"found": f"{time.perf_counter() - started:.2f} s"}

    def gan(self):
        """Measure the DCGAN's training step in Keras with PyTorch behind it."""
        os.environ["KERAS_BACKEND"] = "torch"
        sys.path.insert(0, str(ROOT / "DCGAN-tensorflow"))
        for name in ("model", "main"):
            sys.modules.pop(name, None)  # the folder has modules of the same names
        import main
        import utils

        found = main.start_backend()
        from model import DCGAN

        kind = "bf16" if found == "GPU" and utils.computes_bf16("GPU") else "fp32"
        height, width, batchsize = (128, 64, 64) if found == "GPU" else (32, 16, 8)
        gan = DCGAN(height, width, precision=kind, ema=0.999)
        rng = np.random.default_rng(0)
        real = rng.integers(256, size=(batchsize, height, width, 3), dtype=np.uint8)
        for _ in range(3):
            gan.train_step(real)
        self.synchronize()
        started = time.perf_counter()
        for _ in range(self.steps):
            losses = gan.train_step(real)
        float(losses[0])
        self.synchronize()
        rate = self.steps * batchsize / (time.perf_counter() - started)
        return {"found": f"{rate:,.0f} images/s, {kind}"}

    def scripts(self):
        """Run the scripts as a user would, on the rendered dataset."""
        data, model = self.folder / "demo", ["--model_dir", str(self.folder / "model")]
        data_dir, mat = ["--data_dir", str(data / "pytorch")], str(self.folder / "a.mat")
        height, width = map(str, self.size)
        training = [*data_dir, *model, "--backbone", self.backbone, "--pretrained", "none"]
        training += ["--height", height, "--width", width, "--batchsize", "32", "--epochs", "2"]
        unlabelled = ["--gen_dir", str(data / "gt_bbox"), "--num_generated", "400"]
        run = [*model, "--name", "a"]
        commands = [
            ["synthetic_market.py", "--output_dir", data],
            ["prepare.py", "--download_path", data],
            ["changeIndex.py", *data_dir],
            ["train_baseline.py", *training, "--recipe", "strong", "--ema", "0.99", "--name", "a"],
            ["train_lsro.py", *training, *unlabelled, "--split_bn", "--name", "b"],
            ["train_lsro.py", *training, *unlabelled, "--gan_label", "consistency"]
            + ["--ema", "0.99", "--name", "c"],
            ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
            + ["train_baseline.py", *training, "--color_jitter", "--name", "d"],
            ["test.py", *data_dir, *run, "--mat", mat],
            ["evaluate.py", mat],
            ["evaluate_rerank.py", mat],
            ["test.py", *data_dir, *run, "--val", "--mat", self.folder / "val.mat"],
            ["evaluate.py", self.folder / "val.mat", "--calibrate", "0.01"],
            ["search.py", *run, "--gallery", data / "bounding_box_test", "--rerank"]
            + ["--output", self.folder / "search.jpg", "--query"],
            ["evaluate_gan.py", *data_dir, *run, *unlabelled[:2]]
            + ["--output", self.folder / "gan.jpg"],
            ["export.py", *run, *data_dir, "--format", "torch", "--output", self.folder / "a.pt2"],
        ]
        started = time.perf_counter()
        for command in commands:
            if command[-1] == "--query":  # there are none before the dataset is rendered
                command += sorted((data / "query").glob("*.jpg"))[:2]
            words = [sys.executable, *map(str, command)]
            done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{' '.join(map(str, command))}: {done.stderr[-1500:]}")
        seconds = time.perf_counter() - started
        return {"found": f"{len(commands)} commands in {seconds:.0f} s"}


def compared_steps(found, expected):
    """Return the row that compares two steps' losses and gradients."""
    worst = max(abs(found[0] - expected[0]) / abs(expected[0]), relative(found[1], expected[1]))
    return difference(worst, 1e-6, "loss and gradient")


def difference(found, allowed, what):
    """Return the row of a difference to the CPU."""
    text = f"{found:.1e}, allowed {allowed:g} ({what})"
    return {"found": text, "difference": found, "allowed": allowed, "fine": found <= allowed}


def relative(a, b):
    """Return the length of a difference over that of a vector."""
    return float((a - b).norm() / b.norm())


def seeded(number):
    return torch.Generator().manual_seed(number)


def exact_fp32():
    """Have fp32 computed as such: no TF32, no search for faster kernels."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False


def made_up_features(queries, gallery, dim):
    """Return features of people, some 20 images each, float32 [N, dim], L2-normalised."""
    rng = np.random.default_rng(0)
    people = rng.standard_normal(((queries + gallery) // 20 + 1, dim), dtype=np.float32)
    sets = []
    for number in (queries, gallery):
        features = people[rng.integers(len(people), size=number)]
        features += 1.5 * rng.standard_normal(features.shape, dtype=np.float32)
        sets.append(features / np.linalg.norm(features, axis=1, keepdims=True))
    return sets


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
