"""Make generated images the size of the training images: JPEGs of 64x128 in a folder gen_0000.

    python resizeImage.py --input_path generated \\
        --output_path ../data/Market-1501-v15.09.15/pytorch/train_new/gen_0000
"""

import json
import sys
from pathlib import Path

import utils

# Edit these, or pass the flag of the same name.
INPUT_PATH = "./generated"
OUTPUT_PATH = "../data/Market-1501-v15.09.15/pytorch/train_new/gen_0000"
WIDTH = 64
HEIGHT = 128
QUALITY = 95


def get_parser() -> utils.Parser:
    """All flags with their defaults."""
    p = utils.Parser(description=__doc__.split("\n")[0])
    size = utils.at_least(1)
    for name, default, kind, text in (
        ("input_path", INPUT_PATH, str, "folder of generated images"),
        (
            "output_path",
            OUTPUT_PATH,
            str,
            "folder to make, empty or new; this is where train_lsro.py looks",
        ),
        ("width", WIDTH, size, "in pixels"),
        ("height", HEIGHT, size, "in pixels"),
        ("quality", QUALITY, size, "of the JPEGs, up to 100"),
    ):
        p.add_argument(f"--{name}", type=kind, default=default, help=f"{text} (default: {default})")
    return p


def main(argv: list[str] | None = None) -> None:
    """Write every image of --input_path as a JPEG of the same name to --output_path.

    The manifest.json of the images, if they have one, goes with them.
    """
    args = get_parser().parse_args(argv)
    if args.quality > 100:
        utils.fail(f"--quality: from 1 to 100, not {args.quality}")
    output = Path(args.output_path)
    paths = utils.find_images(Path(args.input_path), flag="--input_path")
    stems = {}
    for path in paths:
        if stems.setdefault(path.stem, path) != path:
            utils.fail(
                f"--input_path: {stems[path.stem]} and {path} would both become "
                f"{path.stem}.jpg; rename one"
            )
    utils.check_writable(output, "--output_path", new=True)
    try:
        with utils.new_folder(output) as folder:

            def resize(path: Path) -> None:
                image = utils.read_image(path, args.height, args.width)
                image.save(folder / f"{path.stem}.jpg", quality=args.quality)

            utils.in_threads(resize, paths, "resizing")
            write_manifest(args, folder, len(paths))
    except OSError as problem:
        utils.fail(problem)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(130) from None
    print(f"{len(paths)} images of {args.width}x{args.height} in {output}")


def write_manifest(args, folder: Path, count: int) -> None:
    """Say in `folder` what these images are: what main.py said of them, and what was done here."""
    source = Path(args.input_path) / utils.MANIFEST
    try:
        generated = json.loads(source.read_text()) if source.exists() else None
    except ValueError as problem:
        utils.fail(f"--input_path: {source} is no JSON ({problem}); delete it")
    sizes = {"count": count, "height": args.height, "width": args.width, "quality": args.quality}
    manifest = sizes | {"command": utils.command_line(), "generated": generated}
    (folder / utils.MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


if __name__ == "__main__":
    main()
