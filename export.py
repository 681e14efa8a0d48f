"""Export a trained network as one file: ONNX, or torch.export's .pt2.

    python export.py --name ft_ResNet50                      # <run>/features_fp32.onnx
    python export.py --name ft_ResNet50 --precision int8     # 3 times as fast on CPUs
    python export.py --name ft_ResNet50 --format torch

The file computes what test.py stores: an image and its mirror image through the network, their
features added and L2-normalised. Before it is kept, it is compared with PyTorch on images of
--data_dir. Its metadata says which weights and settings it was made of.
"""

import copy
from pathlib import Path

from reid.checkpoint import load_asked
from reid.dataset import check_prepared, eval_images, identity_folders, list_images
from reid.errors import UserError, run
from reid.exporting.agreement import (
    LEAST_COSINE,
    TIES,
    Eager,
    File,
    accuracy,
    agreement,
    agrees,
    spread_out,
)
from reid.exporting.network import metadata, torch_compute, torch_file
from reid.features import Embedder
from reid.files import check_results, check_writable, replacing, sha256, update_results
from reid.options import Parser, add_layer_options, add_results_option, add_run_options, at_least
from reid.provenance import provenance

DATA_DIR = "data/Market-1501-v15.09.15/pytorch"  # what prepare.py made
MODEL_DIR = "model"
NAME = "ft_ResNet50"
SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}


def get_parser():
    parser = Parser("Export a trained network to ONNX or torch.export, and check it.")
    add_run_options(parser, NAME, MODEL_DIR)
    add_layer_options(parser)

    group = parser.add_argument_group("file")
    group.add_argument(
        "--format",
        choices=list(SUFFIXES),
        default="onnx",
        help="onnx: for ONNX Runtime and what else reads it (opset 18); torch: a .pt2 file for "
        "torch.export.load",
    )
    group.add_argument(
        "--precision",
        choices=["fp32", "fp16", "int8"],
        default="fp32",
        help="precision of weights and computation; input and output keep their types. fp16: half "
        "the size, for GPUs, slow on CPUs; int8: ONNX only, a quarter of the size, for CPUs with "
        "VNNI",
    )
    group.add_argument(
        "--preprocess",
        choices=["outside", "inside"],
        default="outside",
        help="outside: the file takes float32 [N, 3, H, W], RGB, resized and normalised, as most "
        "programs feed networks, so that crops of any sizes go in one batch; inside: it takes "
        "uint8 [N, h, w, 3], RGB, and resizes and normalises itself, crops of one size in a batch",
    )
    group.add_argument(
        "--output",
        metavar="FILE",
        help="file to write (default: in the run folder, e.g. features_fp32.onnx, or with other "
        "flags features_int8_inside.onnx, features_fp32.pt2; with --weights beside that file)",
    )

    group = parser.add_argument_group("checks")
    group.add_argument(
        "--data_dir",
        default=DATA_DIR,
        help="the `pytorch` folder that prepare.py made: query and gallery to check with, int8 "
        "also takes training images",
    )
    group.add_argument(
        "--check_images",
        type=at_least(10),
        default=250,
        help="images to compare with PyTorch on, a fifth of them queries",
    )
    group.add_argument(
        "--calibration_images",
        type=at_least(1),
        default=256,
        help="training images that set int8's ranges of values",
    )
    group.add_argument(
        "--skip_accuracy",
        action="store_true",
        help="fp16 and int8: leave out Rank@1 and mAP, for which all of query and gallery is "
        "extracted twice",
    )
    add_results_option(group)
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    if args.format == "torch" and args.precision == "int8":
        raise UserError("--precision int8: ONNX only; take --format onnx, or fp32 or fp16")
    make, open_file = tools(args)
    run_folder = Path(args.model_dir) / args.name
    trained = load_asked(args)
    source = Path(args.weights) if args.weights else run_folder
    output = Path(args.output or default_output(args, source))
    check_writable(output)
    check_results(args.json)
    data_dir = Path(args.data_dir)
    check_prepared(data_dir)
    query, gallery = (eval_images(data_dir / name) for name in ("query", "gallery"))
    calibration = {}
    if args.precision == "int8":
        calibration["calibration"] = training_images(data_dir, trained, args.calibration_images)

    queries = spread_out(query, args.check_images // 5)
    shown = spread_out(gallery, args.check_images - args.check_images // 5)
    paths = [entry.path for entry in queries + shown]
    facts = metadata(trained, source.name, args.precision, args.preprocess)
    expected = Eager(trained)(paths, "PyTorch")
    score = args.precision != "fp32" and not args.skip_accuracy
    plain = copy.deepcopy(trained.net) if score else None
    content = make(trained, facts, **calibration)  # changes the network

    result = {"file": str(output), "format": args.format, "metadata": facts}
    with replacing(output) as temporary:
        temporary.write_bytes(content)
        compute, written = open_file(temporary)
        file = File(compute, written)
        exported = file(paths, "exported")
        tie = TIES[args.preprocess]
        result["agreement"] = agreement(expected, exported, len(queries), tie)
        if args.precision == "fp32" and not agrees(result["agreement"]):
            raise UserError(
                f"{output}: not written, for it computes otherwise than PyTorch does: "
                f"{say_agreement(result['agreement'])}; fp32 must reach a cosine over "
                f"{LEAST_COSINE} without swapped pairs"
            )
        result |= {"bytes": len(content), "sha256": sha256(temporary)}
        if score:
            pytorch = Embedder(trained._replace(net=plain), precision="fp32")
            result["accuracy"] = {
                name: accuracy(model, query, gallery, data_dir, name)
                for name, model in (("exported", file), ("pytorch_fp32", pytorch))
            }
    print("\n".join(lines(result, query, gallery)))
    if args.json:
        update_results(args.json, "export", result | provenance())


def default_output(args, source):
    """Return the file to write, e.g. features_int8.onnx in the run folder; defaults aren't named.

    Of a weights file the other is named after that, and lies beside it.
    """
    epoch = None if args.which_epoch == "last" else args.which_epoch
    stride = "stride_1" if args.weights and args.last_stride == 1 else None
    inside = None if args.preprocess == "outside" else args.preprocess
    sides = [f"{name}{side}" for name in ("height", "width") if (side := getattr(args, name))]
    words = ["features", epoch, stride, args.which_layer, *sides, args.test_size]
    words += [args.precision, inside]
    name = "_".join(word.replace(" ", "_") for word in words if word) + SUFFIXES[args.format]
    return source.with_name(f"{source.stem}_{name}") if args.weights else source / name


def training_images(data_dir, trained, count):
    """Read images of `train_all`, or of `train`, to calibrate with: list of uint8 [H, W, 3]."""
    split = data_dir / "train_all"
    split = split if split.is_dir() else data_dir / "train"
    paths = [path for folder in identity_folders(split) for path in list_images(folder)]
    return [trained.transform.read(path) for path in spread_out(paths, count)]


def tools(args):
    """Return the functions that make a file's bytes and open a file, of the format asked for."""
    if args.format == "torch":
        return torch_file, torch_compute
    from reid.exporting.onnx_format import onnx_compute, onnx_file

    return onnx_file, onnx_compute


def lines(result, query, gallery):
    """Yield the lines to print of the results."""
    facts = result["metadata"]
    yield (
        f"{result['file']}: {facts['backbone']} in {facts['precision']}, "
        f"{result['bytes'] / 1e6:.1f} MB, input {facts['input_shape']}, "
        f"features float32 [N, {facts['dim']}]"
    )
    yield f"  against PyTorch's fp32: {say_agreement(result['agreement'])}"
    if "accuracy" in result:
        scores = {
            name: f"Rank@1 {100 * s['rank1']:.2f} %, mAP {100 * s['mAP']:.2f} %"
            for name, s in result["accuracy"].items()
        }
        yield (
            f"  {scores['exported']} ({len(query)} queries, {len(gallery)} gallery images); "
            f"PyTorch's fp32: {scores['pytorch_fp32']}"
        )


def say_agreement(measured):
    """Say an `agreement` in words."""
    return (
        f"on {measured['images']} images cosine {measured['cosine_min']:.6f} at the least, "
        f"{measured['cosine_median']:.6f} in the median; {measured['queries']} queries rank "
        f"{measured['gallery']} gallery images with {measured['swapped_pairs']:,} of "
        f"{measured['pairs']:,} pairs swapped, {measured['same_first']} of their first images the "
        "same"
    )


if __name__ == "__main__":
    run(main)
