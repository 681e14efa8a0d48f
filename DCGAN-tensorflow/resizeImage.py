"""Scale generated images to the size of the training images: JPEGs of 128x64 in gen_0000.

    python resizeImage.py --input_path generated \\
        --output_path ../data/Market-1501-v15.09.15/pytorch/train_new/gen_0000
"""

import argparse
from pathlib import Path

import utils
from errors import UserError, run
from files import check_writable, new_folder, read_json, write_json

# Edit these, or pass the flag of the same name.
INPUT_PATH = "./generated"
OUTPUT_PATH = "../data/Market-1501-v15.09.15/pytorch/train_new/gen_0000"
WIDTH = 64
HEIGHT = 128
QUALITY = 95


def get_parser() -> utils.Parser:
    """Return the parser of all flags."""
    parser = utils.Parser(description=__doc__.split("\n")[0])
    size = utils.whole(1, bits=16)  # the JPEG format has no larger sizes
    for name, default, kind, text in (
        ("input_path", INPUT_PATH, utils.nonempty, "folder of generated images"),
        (
            "output_path",
            OUTPUT_PATH,
            utils.nonempty,
            "a new or empty folder for the JPEGs; train_lsro.py reads them from the default",
        ),
        ("width", WIDTH, size, "width of the JPEGs in pixels"),
        ("height", HEIGHT, size, "height of the JPEGs in pixels"),
        ("quality", QUALITY, size, "quality of the JPEGs, from 1 to 100"),
    ):
        parser.add_argument(
            f"--{name}", type=kind, default=default, help=f"{text} (default: {default})"
        )
    return parser


def main(argv: list[str] | None = None) -> None:
    """Write every image of --input_path as a JPEG of the same name to --output_path.

    If the images have a manifest.json, the one that is written with the JPEGs repeats it.
    """
    args = get_parser().parse_args(argv)
    if args.quality > 100:
        raise UserError(f"--quality: from 1 to 100, not {args.quality}")
    output = Path(args.output_path)
    paths = utils.find_images(Path(args.input_path), "--input_path", generated=True)
    stems = {}
    for path in paths:
        if stems.setdefault(path.stem, path) != path:
            raise UserError(
                f"--input_path: {stems[path.stem]} and {path} would both become "
                f"{path.stem}.jpg; rename one"
            )
    check_writable(output, "--output_path", new=True)
    manifest = build_manifest(args, len(paths))
    with new_folder(output) as folder:

        def resize(path: Path) -> None:
            image = utils.read_resized(path, args.height, args.width)
            target = folder / f"{path.stem}.jpg"
            utils.write_image(target, image, "JPEG", quality=args.quality)

        utils.in_threads(resize, paths, "resizing")
        write_json(folder / utils.MANIFEST, manifest)
    print(f"{len(paths)} images of {args.height}x{args.width} in {output}")


def build_manifest(args: argparse.Namespace, count: int) -> dict:
    """Return the manifest of the JPEGs, which holds that of the generated images."""
    source = Path(args.input_path) / utils.MANIFEST
    generated = read_json(source, "delete it") if source.exists() else None
    sizes = {"count": count, "height": args.height, "width": args.width, "quality": args.quality}
    return sizes | {"command": utils.command_line(), "generated": generated}


if __name__ == "__main__":
    run(main)
