"""How fast a training step of the DCGAN is, against the step as the original code ran it.

    python benchmarks/gan.py                       # 64x64, 128x64, 128x128; both backends
    python benchmarks/gan.py --sizes 64x64 --turns 5

The original's way is `original` below, in TensorFlow and fp32: each batch is read and resized by
Python at every step; the discriminator's update and the two of the generator are three calls that
share nothing, and the losses that are printed come from three more forward passes. Same networks,
same batch, full width. Counted by operations, what is computed twice there is 1.37 times what is
computed here. Each measurement is a process of its own, in steady state; they take turns, and the
table has medians, ranges, and the ratio turn by turn. Averaging the weights (--ema) is included.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "DCGAN-tensorflow"
DATASET = ROOT / "data/demo/bounding_box_train"
SIZES = ["64x64", "128x64", "128x128"]
WARM_UP = 2  # steps before the clock starts
WAYS = {
    "original": ("tensorflow", "fp32"),
    "TensorFlow, fp32": ("tensorflow", "fp32"),
    "TensorFlow, bf16": ("tensorflow", "bf16"),
    "PyTorch, fp32": ("torch", "fp32"),
    "PyTorch, bf16": ("torch", "bf16"),
}


def get_parser():
    parser = argparse.ArgumentParser(description="Time the DCGAN's training step.")
    parser.add_argument("--dataset", default=DATASET, help="a folder of images")
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="HxW")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5, help="steps timed in a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    if args.one:
        print(json.dumps(measure(args, args.one)))
        return
    print(f"batch {args.batch_size}, {os.cpu_count()} CPU cores, seconds a step\n")
    print("| size | | seconds | times as fast as the original |")
    print("|---|---|---:|---:|")
    for size in args.sizes:
        turns = [{way: child(args, size, way) for way in args.ways} for _ in range(args.turns)]
        for way in args.ways:
            cells = [size, way, spread([turn[way] for turn in turns])]
            if "original" in args.ways:
                cells.append(spread([turn["original"] / turn[way] for turn in turns]))
            print(f"| {' | '.join(cells)} |", flush=True)


def spread(values):
    """Median (smallest to largest)."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def child(args, size, way):
    """One measurement, as a process of its own."""
    flags = ["--dataset", str(Path(args.dataset).resolve()), "--sizes", size, "--one", way]
    flags += ["--batch_size", str(args.batch_size), "--steps", str(args.steps)]
    done = subprocess.run(
        [sys.executable, __file__, *flags],
        cwd=FOLDER,
        env=os.environ | {"KERAS_BACKEND": WAYS[way][0]},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def measure(args, way):
    """Seconds a step."""
    sys.path.insert(0, str(FOLDER))
    import main
    import utils

    device = main.start_backend()
    if WAYS[way][1] == "bf16" and not utils.computes_bf16(device):
        print("warning: no bf16 arithmetic in this hardware", file=sys.stderr)
    from model import DCGAN

    height, width = map(int, args.sizes[0].split("x"))
    gan = DCGAN(height, width, precision=WAYS[way][1], ema=0 if way == "original" else 0.999)
    count = args.batch_size * (args.steps + WARM_UP)
    paths = utils.find_images(Path(args.dataset), "--dataset")
    paths = (paths * (count // len(paths) + 1))[:count]
    steps = (original if way == "original" else ours)(gan, paths, args.batch_size)
    for step, _ in enumerate(steps, start=1 - WARM_UP):
        if step == 0:
            started = time.perf_counter()
    return (time.perf_counter() - started) / args.steps


def ours(gan, paths, batch_size):
    """The project's own step, a yield each."""
    import training
    import utils

    images = utils.load_images(paths, gan.height, gan.width)
    for real in training.batches(images, batch_size, 0, 1):
        yield [float(loss) for loss in gan.train_step(real)]


def original(gan, paths, batch_size):
    """The step as TensorFlow 1's session ran it, a yield each."""
    import numpy as np
    import tensorflow as tf
    from PIL import Image
    from tensorflow.nn import softplus

    generator, discriminator = gan.generator, gan.discriminator

    def on_fake(z):
        return discriminator(generator(z, training=True), training=True)

    def on_real(real):
        return discriminator(real, training=True)

    @tf.function
    def update_discriminator(real, z):
        fake = generator(z, training=True)
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(softplus(-on_real(real)))
            loss += tf.reduce_mean(softplus(discriminator(fake, training=True)))
        weights = discriminator.trainable_variables
        gan.d_optimizer.apply(tape.gradient(loss, weights), weights)

    @tf.function
    def update_generator(z):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(softplus(-on_fake(z)))
        weights = generator.trainable_variables
        gan.g_optimizer.apply(tape.gradient(loss, weights), weights)

    loss_on_fake = tf.function(lambda z: tf.reduce_mean(softplus(on_fake(z))))
    loss_on_real = tf.function(lambda real: tf.reduce_mean(softplus(-on_real(real))))
    generator_loss = tf.function(lambda z: tf.reduce_mean(softplus(-on_fake(z))))

    for start in range(0, len(paths), batch_size):
        images = [Image.open(path) for path in paths[start : start + batch_size]]
        images = [
            image.resize((gan.width, gan.height), Image.Resampling.BICUBIC) for image in images
        ]
        real = np.stack([np.asarray(image) for image in images]).astype(np.float32) / 127.5 - 1
        z = gan.noise(batch_size, start)
        update_discriminator(real, z)
        update_generator(z)
        update_generator(z)
        yield float(loss_on_fake(z)) + float(loss_on_real(real)), float(generator_loss(z))


if __name__ == "__main__":
    main()
