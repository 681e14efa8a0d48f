"""Extract the features of query and gallery with a trained network: writes `pytorch_result.mat`.

    python test.py --name ft_ResNet50 --which_epoch best --test_dir data/Market/pytorch
    python test.py --name ft_ResNet50 --val --mat val.mat    # for evaluate.py --calibrate
    python test.py --weights theirs.pth --last_stride 1      # the weights of another code

Which network it is, how many classes it has, and the size of its images are read from the run
folder; nothing needs to be repeated here. (The project's tests are in tests/.)
"""

import os
from contextlib import suppress
from pathlib import Path

from reid.checkpoint import load_asked
from reid.dataset import (
    check_cameras,
    check_copies,
    check_prepared,
    eval_fingerprint,
    eval_images,
    has_no_train,
)
from reid.device import dtype_name
from reid.distributed import join_world, leave_world
from reid.errors import UserError, run
from reid.features import (
    agreed_dtype,
    eval_transforms,
    extract,
    made_by,
    ready,
)
from reid.files import check_writable
from reid.mat import EvalSets, check_storable, feature_set, save_mat
from reid.options import (
    Parser,
    add_device_options,
    add_feature_options,
    add_run_options,
    at_least,
)

DATA_DIR = "data/Market-1501-v15.09.15/pytorch"  # what prepare.py made
MODEL_DIR = "model"
NAME = "ft_ResNet50"
MAT = "pytorch_result.mat"


def get_parser():
    parser = Parser("Extract features of query and gallery into a .mat file.")
    add_run_options(parser, NAME, MODEL_DIR)
    parser.add_argument(
        "--data_dir",
        "--test_dir",
        default=DATA_DIR,
        help="the `pytorch` folder that prepare.py made; both flags mean the same",
    )
    parser.add_argument("--mat", default=MAT, help="file to write")
    others = parser.add_mutually_exclusive_group()
    others.add_argument(
        "--multi",
        action="store_true",
        help="also extract `multi-query`: evaluate.py then scores multi-query, too",
    )
    others.add_argument(
        "--val",
        action="store_true",
        help="the validation data in place of the test data: `val` as query, `train` as gallery",
    )
    parser.add_argument(
        "--batchsize", type=at_least(1), default=64, help="number of images in a batch"
    )
    add_feature_options(parser)
    add_device_options(parser)
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    world = join_world(args.gpu_ids)
    data_dir, run_folder = Path(args.data_dir), Path(args.model_dir) / args.name
    with world.together():
        check_writable(args.mat)
        splits = find_images(data_dir, args)
        trained = load_asked(args)
        transforms = eval_transforms(trained, args.ms)
        check_storable(args.mat, data_dir.resolve(), splits, trained.net.dim(trained.layer))
    dtype = agreed_dtype(trained, world, args.precision, args.batchsize)
    world.say(
        f"{trained.weights}: {trained.net.backbone}, trained at {trained.height}x{trained.width}, "
        f"layer {trained.layer} at {trained.transform}, on {world.device} in "
        f"{dtype_name(dtype)}"
    )
    source = locations(None if args.weights else run_folder, data_dir, args.mat)
    source |= {"split": next(iter(splits)), "images": eval_fingerprint(splits)}
    source |= {"arithmetic": dtype_name(dtype)}
    source |= made_by(trained, args.ms)
    net = ready(trained.net, dtype, world)

    sets = []
    for name, entries in splits.items():
        features = extract(
            net,
            [entry.path for entry in entries],
            transforms,
            world,
            dtype=dtype,
            batchsize=args.batchsize,
            workers=args.workers,
            label=name,
            layer=trained.layer,
        )
        if world.first:
            sets.append(feature_set(features, entries, data_dir))
    leave_world()
    if not world.first:
        return
    query, gallery, multi = sets if args.multi else (*sets, None)
    save_mat(args.mat, EvalSets(query, gallery, multi, data_dir.resolve(), source))
    counts = ", ".join(f"{len(entries)} {name}" for name, entries in splits.items())
    print(f"{args.mat}: {counts} images")


def find_images(data_dir, args):
    """Return {split: EvalImages} of the splits that the flags ask for, queries first.

    Raises UserError where their names, or their pictures, would make the scores untrue.
    """
    check_prepared(data_dir)
    if args.multi and not (data_dir / "multi-query").is_dir():
        raise UserError(
            f"--multi: {data_dir} has no multi-query images, which only Market-1501 brings along "
            "(gt_bbox); leave it out"
        )
    if args.val and has_no_train(data_dir):
        raise UserError(
            f"--val: {data_dir} has one image of each training identity, and so no train; leave it "
            "out"
        )
    names = ["val", "train"] if args.val else ["query", "gallery"]
    names += ["multi-query"] if args.multi else []
    splits = {name: eval_images(data_dir / name) for name in names}
    check_cameras(data_dir, [image for images in splits.values() for image in images])
    if not args.val:
        check_copies(splits["query"], splits["gallery"])
    return splits


def locations(run_folder, data_dir, mat):
    """Return the paths of the run folder, if any, and of the images, as seen from the .mat file."""
    here = Path(mat).resolve().parent
    paths = {"run": str(run_folder.resolve())} if run_folder else {}
    with suppress(ValueError):  # on Windows there is none to another drive
        if run_folder:
            paths["run_from_mat"] = os.path.relpath(run_folder.resolve(), here)
        paths["data_from_mat"] = os.path.relpath(data_dir.resolve(), here)
    return paths


if __name__ == "__main__":
    run(main, torchrun=True)
