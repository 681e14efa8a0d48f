"""Measure a GAN's images in the feature space of a trained re-ID network, without Inception.

    python evaluate_gan.py --data_dir data/Market-1501-v15.09.15/pytorch --name ft_ResNet50

Are the generated images like the real ones? Prints Frechet distance, precision, recall, density and
coverage three times: of all images; of fewer; and, in that number, between two halves of the real
images. (These show the same people, so only images of these very people could score as well.) The
distance is between L2-normalised features: compare it with others of the same run, not with
published FIDs. Don't read precision alone: one real image far from all others lets everything near
it pass (a weak network gives noise 1.0); coverage sees through that.

Are they copies? Their distances to the nearest training image are compared with two yardsticks:
  - those of photographs of other people (`query`), which nobody can have copied (the idea of
    Meehan et al. 2020, "A Non-Parametric Test to Detect Data-Copying in Generative Models");
  - those of training images to the nearest other training image, mostly the next frame of the
    same walk: what is nearer than these is the same picture up to small changes of pixels.
The closest 1 % of each set a limit, and the fraction of generated images within it is printed:
about 1 % or less is no sign of copies. An exact copy is at distance 0 in any feature space. A small
distance alone is no proof, since features ignore much and blurred images come near to many: look at
the picture, too, which shows 16 generated images, each beside its nearest training images.

Which of them are worth training on? `--keep 5000 --keep_dir FOLDER` links those into a new folder
that lie near a real image and far from each other, for train_lsro.py --gen_dir.

Use a run that was trained without these generated images: train_lsro.py teaches a network to
tell them from real ones.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from reid.checkpoint import as_trained, load_trained
from reid.dataset import (
    GENERATED_FOLDER,
    check_prepared,
    generated_folder,
    generated_images,
    identity_folders,
    list_images,
    manifest,
)
from reid.device import dtype_name
from reid.distributed import join_world, leave_world
from reid.errors import UserError, run
from reid.features import agreed_dtype, eval_transforms, extract, ready
from reid.files import (
    check_results,
    check_writable,
    link,
    new_folder,
    sha256,
    update_results,
)
from reid.images import is_image
from reid.options import (
    HEIGHT,
    WIDTH,
    Parser,
    add_backbone_options,
    add_device_options,
    add_results_option,
    add_run_options,
    at_least,
    seed,
)
from reid.pictures import draw_neighbours
from reid.provenance import provenance
from reid.weights import build_network

DATA_DIR = "data/Market-1501-v15.09.15/pytorch"  # what prepare.py and changeIndex.py made
REAL_DIR = None  # training images; None: <data_dir>/train_all_new
GEN_DIR = None  # generated images; None: <data_dir>/train_new/gen_0000
HELD_OUT_DIR = None  # images of people not in training; None: <data_dir>/query
MODEL_DIR = "model"
NAME = "ft_ResNet50"
OUTPUT = "gan_neighbours.jpg"

SHOWN, NEIGHBOURS = 16, 5  # generated images in the picture, real ones beside each
LABEL = 36  # width in characters of a printed row's name
NEAREST_ROWS = {
    "generated": "generated",
    "held_out": "of other people",
    "real": "real, without itself",
}


class Images(NamedTuple):
    """Paths of the images that are compared."""

    real: list
    generated: list
    held_out: list


def get_parser():
    parser = Parser("Compare generated with real images in a re-ID network's feature space.")
    group = parser.add_argument_group("images")
    group.add_argument(
        "--data_dir", default=DATA_DIR, help="the `pytorch` folder that prepare.py made"
    )
    group.add_argument(
        "--real_dir",
        default=REAL_DIR,
        help="folder of training images, directly in it or in a folder per identity (default: "
        "<data_dir>/train_all_new)",
    )
    group.add_argument(
        "--gen_dir",
        default=GEN_DIR,
        help=f"folder of generated images (default: <data_dir>/train_new/{GENERATED_FOLDER})",
    )
    group.add_argument(
        "--held_out_dir",
        default=HELD_OUT_DIR,
        help="folder, like --real_dir, of real images of people that are not in training "
        "(default: <data_dir>/query)",
    )
    group.add_argument(
        "--max_images",
        type=at_least(1),
        default=10000,
        help="largest number of images of each kind to compare, chosen by the seed; memory grows "
        "with its square: 10,000 take 1.5 GB. The nearest are searched among all training images",
    )
    group.add_argument("--seed", type=seed, default=0, help="seed of every random choice")

    add_run_options(parser, NAME, MODEL_DIR)
    group = parser.add_argument_group("features")
    group.add_argument(
        "--which_epoch", default="last", help="last, best, or the number of a saved epoch"
    )
    group.add_argument(
        "--pretrained",
        default="none",
        metavar="{imagenet,none,FILE}",
        help="take features not of the run (none) but of --backbone's ImageNet weights (downloaded "
        "on first use), or of a weights file with such a backbone, at 256x128",
    )
    add_backbone_options(group, None)
    group.add_argument("--batchsize", type=at_least(1), default=64, help="images in a batch")
    group.add_argument(
        "--nearest_k",
        type=at_least(1),
        default=5,
        help="k: an image's surroundings reach to its k-th nearest neighbour, for precision, "
        "recall, density and coverage",
    )

    group = parser.add_argument_group("output")
    group.add_argument("--output", default=OUTPUT, help="the picture, a JPEG")
    group.add_argument(
        "--keep",
        type=at_least(1),
        metavar="N",
        help="put N of the generated images that are compared into --keep_dir: those near a real "
        "one and far from each other (after Jiang et al. 2021; default: none)",
    )
    group.add_argument(
        "--keep_dir", metavar="FOLDER", help="new folder for them, of hard links (default: none)"
    )
    add_results_option(group)
    add_device_options(parser)
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    from reid import gan_metrics  # scikit-learn: a second that --help needn't wait

    world = join_world(args.gpu_ids)
    with world.together():
        check_writable(args.output)
        check_results(args.json)
        images, facts = find_images(args, gan_metrics.smallest_set(args.nearest_k))
        check_keep(args, images)
    features, source = features_of(images, args, world)
    leave_world()
    if not world.first:
        return
    real, generated, held_out = features

    # Copies are looked for among all real images: one that is not compared may have been copied.
    distances, neighbours = gan_metrics.nearest(real, generated, NEIGHBOURS)
    to_nearest = (
        distances[:, 0],
        gan_metrics.nearest(real, held_out)[0][:, 0],
        gan_metrics.nearest(real)[0][:, 0],
    )
    compared = real[chosen(len(real), args)]
    measured = {
        "comparisons": gan_metrics.compare(compared, generated, args.nearest_k, args.seed),
        "nearest_real": gan_metrics.copying(*to_nearest),
    }
    print("\n".join(lines(measured, facts, real.shape[1])))

    shown = np.random.default_rng(args.seed).permutation(len(generated))[:SHOWN]
    groups = [
        (images.generated[n], [images.real[m] for m in neighbours[n]], distances[n])
        for n in sorted(shown)
    ]
    draw_neighbours(groups, args.output)
    print(f"generated images beside their nearest real ones: {args.output}")
    if args.keep:
        best = gan_metrics.pick(generated, to_nearest[0], args.keep)
        keep([images.generated[n] for n in best], args)
    if args.json:
        settings = {"nearest_k": args.nearest_k, "seed": args.seed, "picture": args.output}
        settings |= {"keep": args.keep, "keep_dir": args.keep_dir}
        section = {**measured, "images": facts, "features": source, **settings, **provenance()}
        update_results(args.json, "evaluate_gan", section)


def find_images(args, smallest):
    """Return the Images to compare, and a dict of their folders and numbers.

    Raises UserError where there are fewer generated images than `smallest`, or fewer real ones than
    twice that.
    """
    data_dir = Path(args.data_dir)
    if None in (args.real_dir, args.gen_dir, args.held_out_dir):
        check_prepared(data_dir)
    gen_dir = generated_folder(args)
    real_dir = Path(args.real_dir or data_dir / "train_all_new")
    held_out_dir = Path(args.held_out_dir or data_dir / "query")
    samples = generated_images(gen_dir)
    real, held_out = real_images(real_dir), real_images(held_out_dir)
    for kind, folder, paths, least in (
        ("generated", gen_dir, samples, smallest),
        ("real", real_dir, real, 2 * smallest),
    ):
        if min(len(paths), args.max_images) < least:
            culprit = folder if len(paths) < least else f"--max_images {args.max_images}"
            raise UserError(
                f"{culprit}: too few images; --nearest_k {args.nearest_k} takes {least} or more "
                f"{kind} ones"
            )
    images = Images(
        real,
        [samples[n].path for n in chosen(len(samples), args)],
        [held_out[n] for n in chosen(len(held_out), args)],
    )
    folders = {"real": real_dir, "generated": gen_dir, "held_out": held_out_dir}
    facts = {
        name: {"folder": str(folder), "images": len(getattr(images, name))}
        for name, folder in folders.items()
    }
    facts["generated"] |= {"of": len(samples), "manifest": manifest(samples)}
    return images, facts


def check_keep(args, images):
    """Raise UserError where --keep asks for too many, or --keep_dir is no new folder."""
    if bool(args.keep) != bool(args.keep_dir):
        raise UserError("--keep and --keep_dir: one needs the other; give both, or neither")
    if not args.keep:
        return
    if args.keep > len(images.generated):
        raise UserError(
            f"--keep {args.keep}: only {len(images.generated)} generated images are compared; "
            "lower it, or raise --max_images"
        )
    if Path(args.keep_dir).exists():
        raise UserError(f"--keep_dir {args.keep_dir}: is there already; name a new folder")
    there = next(parent for parent in Path(args.keep_dir).absolute().parents if parent.exists())
    check_writable(there / Path(args.keep_dir).name)


def keep(images, args):
    """Link generated images into the new folder --keep_dir, at the same places as in theirs."""
    source = generated_folder(args)
    with new_folder(args.keep_dir) as temporary:
        for image in images:
            name = temporary / image.relative_to(source)
            name.parent.mkdir(parents=True, exist_ok=True)
            link(image, name)
    print(f"{len(images)} images near real ones and far from each other: {args.keep_dir}")


def real_images(folder):
    """Return the images in a folder, or where it has none those in its folders of identities."""
    if folder.is_dir() and any(map(is_image, folder.iterdir())):
        return list_images(folder)
    return [path for identity in identity_folders(folder) for path in list_images(identity)]


def chosen(count, args):
    """Choose `--max_images` of `count` images by the seed: sorted indices."""
    order = np.random.default_rng(args.seed).permutation(count)
    return np.sort(order[: args.max_images])


def features_of(images, args, world):
    """Return features of all Images, a list of [N, D], and a dict of what made them.

    The first process alone has the features.
    """
    with world.together():
        trained, source = feature_space(args)
    dtype = agreed_dtype(trained, world, args.precision, args.batchsize)
    source["arithmetic"] = dtype_name(dtype)
    world.say(
        f"features of {source['weights']}: {source['backbone']}, {trained.transform}, on "
        f"{world.device}"
    )
    net = ready(trained.net, dtype, world)
    transforms = eval_transforms(trained)
    options = {"dtype": dtype, "batchsize": args.batchsize, "workers": args.workers}
    features = [
        extract(net, paths, transforms, world, label=name, layer=trained.layer, **options)
        for name, paths in images._asdict().items()
    ]
    return features, source


def feature_space(args):
    """Return the network as a `Trained`, and a dict of what it is."""
    if args.pretrained == "none":
        run_folder = Path(args.model_dir) / args.name
        trained = load_trained(run_folder, args.which_epoch, args.backbone)
    else:
        net = build_network(args.backbone or "resnet50", 1, args.pretrained)
        trained = as_trained(net, Path(args.pretrained), HEIGHT, WIDTH)
    source = {
        "weights": str(trained.weights),
        "sha256": None if args.pretrained == "imagenet" else sha256(trained.weights),
        "backbone": trained.net.backbone,
        "size": str(trained.transform),
        "layer": trained.layer,
    }
    return trained, source


def lines(measured, facts, dim):
    """Yield the lines of two tables. dim: numbers in a feature."""
    columns = {"frechet": "Frechet distance"}
    columns |= {name: name for name in ("precision", "recall", "density", "coverage")}
    yield f"{'':{LABEL}}" + "".join(f"  {title}" for title in columns.values())
    for row in measured["comparisons"]:
        label = f"{row['images']} {row['compared']} against {row['real']} real"
        cells = (f"  {row[name]:{len(title)}.4f}" for name, title in columns.items())
        yield f"{label:{LABEL}}" + "".join(cells)
    if (fewest := measured["comparisons"][-1]["images"]) <= dim:
        yield (
            f"  {fewest} images are too few for {dim} dimensions: Frechet distances are too large, "
            "as that of real images shows"
        )
    title = f"to the nearest of {facts['real']['images']} real"
    yield f"{title:{LABEL}}  median  closest 1 %  generated within that"
    for name, label in NEAREST_ROWS.items():
        row = measured["nearest_real"][name]
        within = row.get("generated_within")
        label = f"{facts[name]['images']} {label}"
        cells = f"{row['median']:8.4f}{row['closest']:13.4f}"
        yield f"{label:{LABEL}}{cells}" + ("" if within is None else f"{within:23.2%}")


if __name__ == "__main__":
    run(main, torchrun=True)
