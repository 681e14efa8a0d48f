"""How fast training and extraction are, against the plain way of doing the same.

    python benchmarks/training.py                     # DenseNet-121, the demo's images
    python benchmarks/training.py --backbone resnet50
    python benchmarks/training.py --against plain torchreid  # pip install torchreid
    python benchmarks/training.py --part memory       # peak memory at Market-1501's size

The plain way is `Plain` below, as the 2018 code did it: each image through PIL transforms in
eight loader processes, fp32, NCHW, torchvision's own forward pass, image and mirror extracted one
after the other. torchreid's way is its own loader and training step with the like augmentation, and
its FeatureExtractor, which leaves the mirror out. Same network, batch and image size; all in steady
state, the first steps and the decoding into memory left out. Each measurement is a process of its
own; they take turns, and the table has medians, ranges, and the ratio turn by turn.
"""

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

import train_baseline
from reid import losses
from reid.dataset import labelled_images
from reid.device import choose_device, device_name, dtype_for, set_up, to_device
from reid.distributed import World
from reid.features import extract_batches, fold_for_inference
from reid.learner import Learner
from reid.loading import EvalBatches
from reid.optimizer import sgd
from reid.transforms import EvalTransform
from reid.weights import build_network

DATA_DIR = "data/demo/pytorch"
MARKET_IMAGES = 12_936
WARM_UP = 2  # steps before the clock starts
PARTS = ("loader", "train", "train_fp32", "extract")


def get_parser():
    parser = argparse.ArgumentParser(description="Time training against the plain way.")
    parser.add_argument("--data_dir", default=DATA_DIR, help="what changeIndex.py made")
    parser.add_argument("--backbone", default="densenet121", help="as train_baseline.py's")
    parser.add_argument("--batchsize", type=int, default=32)
    parser.add_argument("--steps", type=int, default=12, help="steps timed in a turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--part", choices=[*PARTS, "memory"], action="append", help="default: all")
    parser.add_argument("--against", nargs="+", choices=[*WAYS][1:], default=["plain"])
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    if args.one:
        print(json.dumps(measure(args, args.part[0], args.one)))
        return
    device, _ = choose_device()
    print(f"{args.backbone}, batch {args.batchsize}, 256x128, on {device} ({device_name(device)})")
    print()
    print("| | way | images/s | ours is faster by | peak GB |")
    print("|---|---|---:|---:|---:|")
    for part in args.part or (*PARTS, "memory"):
        ways = ["ours"] if part == "memory" else ["ours", *args.against]
        turns = [
            {way: child(args, part, way) for way in ways}
            for _ in range(1 if part == "memory" else args.turns)
        ]
        for way in ways:
            rates = [turn[way]["rate"] for turn in turns]
            rate = spread(rates, 0 if min(rates) > 99 else 1)
            ratio = spread([turn["ours"]["rate"] / turn[way]["rate"] for turn in turns], 2)
            peak = max(turn[way]["peak"] for turn in turns)
            ratio = "" if way == "ours" else ratio
            print(f"| {part} | {way} | {rate} | {ratio} | {peak:.2f} |", flush=True)


def spread(values, digits):
    """Median (smallest to largest)."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def child(args, part, one):
    """One measurement, as a process of its own."""
    flags = ["--data_dir", args.data_dir, "--batchsize", str(args.batchsize)]
    flags += ["--backbone", args.backbone, "--steps", str(args.steps)]
    command = [sys.executable, __file__, *flags, "--part", part, "--one", one]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(args, part, one):
    """Images a second, and the process's peak memory in GB."""
    device, _ = choose_device()
    samples = labelled_images(Path(args.data_dir) / "train_new")
    classes = len({sample.label for sample in samples})
    steps = args.steps * (20 if part == "loader" else 1)
    wanted = MARKET_IMAGES if part == "memory" else args.batchsize * (steps + WARM_UP)
    samples = (samples * (wanted // len(samples) + 1))[:wanted]
    torch.manual_seed(0)
    random.seed(0)
    way = WAYS[one](args, device, classes, samples)
    if part == "extract":
        rate = extraction_rate(way, samples, args.batchsize)
    else:
        batches = way.load() if part == "loader" else way.train(fp32=part == "train_fp32")
        rate = rate_of(batches, steps, device)
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    peak = next((int(line.split()[1]) / 1e6 for line in lines if line.startswith("VmHWM")), 0)
    return {"rate": rate, "peak": peak}


def rate_of(batches, steps, device):
    """Images a second over `steps` steps, each of which yields its number of images."""
    images = 0
    for step, number in enumerate(batches, start=1 - WARM_UP):
        if step > 0:
            images += number
        if step in (0, steps) and device.type == "cuda":
            torch.cuda.synchronize()
        if step == 0:
            started = time.perf_counter()
        if step == steps:
            break
    return images / (time.perf_counter() - started)


def extraction_rate(way, samples, batchsize):
    """Images a second of extracting features from all but a first few images."""
    paths, few = [sample.path for sample in samples], WARM_UP * batchsize
    way.extract(paths[:few])
    started = time.perf_counter()
    way.extract(paths[few:])
    return (len(paths) - few) / (time.perf_counter() - started)


class Ours:
    """The project's own code, part by part."""

    def __init__(self, args, device, classes, samples):
        set_up(device)
        flags = ["--pretrained", "none", "--cache", "ram", "--batchsize", str(args.batchsize)]
        self.options = train_baseline.get_parser().parse_args(flags)
        self.world = World(0, 1, device, [])
        self.net = network(args, classes)
        self.samples, self.batchsize = samples, args.batchsize

    def training(self, precision):
        dtype = dtype_for(self.world.device, precision)
        training = Learner(self.options, self.world, self.net, dtype, losses.cross_entropy)
        training.read(self.samples, [])
        training.net.train()
        return training

    def load(self):
        for batch in self.training("auto").batches.epoch(0):
            yield len(batch.images)

    def train(self, fp32):
        training = self.training("fp32" if fp32 else "auto")
        for batch in training.batches.epoch(0):
            training.step(batch)
            yield len(batch.images)

    def extract(self, paths):
        device = self.world.device
        size = (288, 144) if self.net.classic else (256, 128)
        batches = EvalBatches(paths, EvalTransform(size), self.batchsize, 2, device)
        dtype = dtype_for(device)
        net = to_device(fold_for_inference(self.net, dtype), device)
        extract_batches(net, batches, dtype, label=None)


class Plain:
    """The plain way."""

    def __init__(self, args, device, classes, samples):
        self.device, self.samples, self.batchsize = device, samples, args.batchsize
        self.net = network(args, classes).to(device)

    def load(self):
        for images, _ in self.loader(self.samples, TRAIN, shuffle=True):
            yield len(images.to(self.device))

    def train(self, fp32):
        optimizer = sgd(self.net, 0.05, 0.2)
        self.net.train()
        running_loss = 0.0
        for images, labels in self.loader(self.samples, TRAIN, shuffle=True):
            images, labels = images.to(self.device), labels.to(self.device)
            optimizer.zero_grad()
            logits = self.net.classifier(self.net.model.fc(self.features(images)))
            loss = F.cross_entropy(logits, labels)
            loss.backward()
            optimizer.step()
            running_loss += loss.item()
            yield len(images)

    def extract(self, paths):
        self.net.eval()
        with torch.no_grad():
            for images, _ in self.loader([(path, 0) for path in paths], TEST, shuffle=False):
                both = [self.features(view.to(self.device)) for view in (images, images.flip(3))]
                F.normalize(both[0] + both[1]).cpu()

    def features(self, images):
        """Pooled features, by torchvision's or timm's own forward pass."""
        net = self.net.model
        if self.net.backbone == "densenet121":
            return net.features(images).mean(dim=(2, 3))
        if self.net.backbone != "resnet50":
            return self.net.pooled(images)
        x = net.maxpool(net.relu(net.bn1(net.conv1(images))))
        return net.avgpool(net.layer4(net.layer3(net.layer2(net.layer1(x))))).flatten(1)

    def loader(self, entries, transform, shuffle):
        dataset = PlainImages(entries, transform)
        return DataLoader(dataset, self.batchsize, shuffle, num_workers=8, drop_last=shuffle)


class Torchreid:
    """torchreid 0.2, as its documentation trains and extracts."""

    def __init__(self, args, device, classes, samples):
        import torchreid

        # Its dataset is a list of (path, identity, camera); one image will do to test on.
        images = [(str(sample.path), sample.label, 0) for sample in samples]

        class Images(torchreid.data.ImageDataset):
            def __init__(self, root="", **more):
                super().__init__(images, images[:1], images[:1], **more)

        torchreid.data.register_image_dataset("benchmark", Images)
        self.torchreid, self.backbone, self.device = torchreid, args.backbone, device
        self.classes, self.batchsize = classes, args.batchsize

    def load(self):
        for batch in self.images().train_loader:
            yield len(batch["img"].to(self.device))

    def images(self):
        return self.torchreid.data.ImageDataManager(
            sources="benchmark",
            transforms=["random_flip", "random_crop", "random_erase"],
            batch_size_train=self.batchsize,
            use_gpu=self.device.type == "cuda",
        )

    def train(self, fp32):
        on_gpu = self.device.type == "cuda"
        net = self.torchreid.models.build_model(
            self.backbone, self.classes, pretrained=False, use_gpu=on_gpu
        ).to(self.device)
        images = self.images()
        optimizer = self.torchreid.optim.build_optimizer(net, optim="sgd", lr=0.05)
        engine = self.torchreid.engine.ImageSoftmaxEngine(
            images, net, optimizer, use_gpu=on_gpu, label_smooth=False
        )
        engine.set_model_mode("train")
        for batch in images.train_loader:
            engine.forward_backward(batch)
            yield len(batch["img"])

    def extract(self, paths):
        net = self.torchreid.models.build_model(self.backbone, self.classes, pretrained=False)
        with tempfile.NamedTemporaryFile(suffix=".pth") as weights:  # else it downloads some
            torch.save({"state_dict": net.state_dict()}, weights.name)
            extractor = self.torchreid.utils.FeatureExtractor(
                self.backbone, weights.name, (288, 144), device=str(self.device), verbose=False
            )
        for start in range(0, len(paths), self.batchsize):
            extractor([str(path) for path in paths[start : start + self.batchsize]])


class PlainImages(Dataset):
    """One image at a time, through PIL."""

    def __init__(self, entries, transform):
        self.entries, self.transform = entries, transform

    def __len__(self):
        return len(self.entries)

    def __getitem__(self, index):
        path, label, *_ = self.entries[index]
        return self.transform(Image.open(path).convert("RGB")), label


def erase(image):
    """Random erasing of one image, drawing rectangles until one fits."""
    _, height, width = image.shape
    if random.random() > 0.8:
        return image
    while True:
        area, aspect = random.uniform(0.02, 0.4) * height * width, random.uniform(0.3, 1 / 0.3)
        tall, wide = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if tall < height and wide < width:
            top, left = random.randint(0, height - tall), random.randint(0, width - wide)
            fill = torch.tensor([0.4914, 0.4822, 0.4465])[:, None, None]
            image[:, top : top + tall, left : left + wide] = fill
            return image


NORMALISE = [
    transforms.ToTensor(),
    transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
]
BICUBIC = transforms.InterpolationMode.BICUBIC
TRAIN = transforms.Compose(
    [
        transforms.Resize((288, 144), interpolation=BICUBIC),
        transforms.RandomCrop((256, 128)),
        transforms.RandomHorizontalFlip(),
        *NORMALISE,
        transforms.Lambda(erase),
    ]
)
TEST = transforms.Compose([transforms.Resize((288, 144), interpolation=BICUBIC), *NORMALISE])


WAYS = {"ours": Ours, "plain": Plain, "torchreid": Torchreid}


def network(args, classes):
    """The network both ways train."""
    return build_network(args.backbone, classes)


if __name__ == "__main__":
    main()
