"""Pictures of framed images in rows: an image, and beside it those that are nearest to it.

`draw_rankings` shows queries with the first images of their rankings, `draw_neighbours` generated
images with their nearest training images; both call `draw_sheet`, as search.py does.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from reid.errors import UserError
from reid.files import write_picture
from reid.images import read_image
from reid.mat import EvalSets
from reid.metrics import Relevance, Scores

WIDTH, HEIGHT, FRAME, GAP, TEXT = 64, 128, 4, 6, 18  # pixels
GOOD, WRONG, PLAIN, JUNK, GENERATED = "#2e9e44", "#d62828", "#444444", "#bbbbbb", "#1d6fb8"
TILE, LINE = WIDTH + 2 * FRAME + GAP, HEIGHT + 2 * FRAME + 2 * TEXT + GAP


class Tile(NamedTuple):
    """A framed image: the image as `fitted` returns it, the text below, the frame's colour."""

    picture: Image.Image
    label: str
    colour: str


class Row(NamedTuple):
    """A row of `Tile`s with a title above. The first tile is the one that others are nearest to."""

    title: str
    tiles: list


def draw_sheet(rows: list[Row], path: str | Path, columns: int = 1) -> None:
    """Draw `Row`s into a JPEG, `columns` of them side by side."""
    width = max(len(row.tiles) for row in rows) * TILE + 3 * GAP
    lines = -(-len(rows) // columns)
    sheet = Image.new("RGB", (columns * width, lines * LINE + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(TEXT - 6)
    for number, row in enumerate(rows):
        left, top = GAP + number % columns * width, GAP + number // columns * LINE
        draw.text((left, top), shortened(row.title, font, width - 2 * GAP), fill="black", font=font)
        for position, tile in enumerate(row.tiles):
            sheet.paste(framed(tile.picture, tile.colour), (left, top + TEXT))
            below = left + FRAME, top + TEXT + HEIGHT + 2 * FRAME
            draw.text(below, tile.label, fill="black", font=font)
            left += TILE + (GAP if position == 0 else 0)  # sets the first tile apart
    write_picture(path, lambda file: sheet.save(file, format="jpeg", quality=92))


def draw_rankings(queries: Sequence[int], scores: Scores, sets: EvalSets, path: str | Path) -> None:
    """Draw a row for each of `queries` (indices): the query, then `scores.top`.

    Good images have a green frame, wrong ones a red one; junk is grey and has no rank.
    sets: `reid.mat.EvalSets` with the images' paths.
    """
    relevance = Relevance(sets.gallery)
    draw_sheet([ranking(query, scores, sets, relevance) for query in queries], path)


def ranking(query, scores, sets, relevance):
    """Return the `Row` of a query."""
    good, junk = relevance.of(sets.query.identities[query], sets.query.cameras[query])
    junk = {*junk.tolist(), *relevance.always_junk.tolist()}
    tiles, rank = [Tile(load(sets.data_dir, sets.query.files[query]), "", PLAIN)], 0
    for image in scores.top[query].tolist():
        picture = load(sets.data_dir, sets.gallery.files[image])
        if image in junk:
            tiles.append(Tile(faded(picture), "junk", JUNK))
        else:
            rank += 1
            tiles.append(Tile(picture, str(rank), GOOD if image in good else WRONG))
    return Row(title(query, scores, sets.query), tiles)


def draw_neighbours(groups: list[tuple], path: str | Path) -> None:
    """Draw generated images, framed blue, each beside its nearest training images.

    groups: list of (path of the generated image, paths of the training images, nearest first,
    their distances). A row's title is the generated image's name.
    """
    rows = []
    for generated, real, distances in groups:
        tiles = [Tile(fitted(read_image(generated)), "", GENERATED)]
        for image, distance in zip(real, distances, strict=True):
            tiles.append(Tile(fitted(read_image(image)), f"{distance:.3f}", PLAIN))
        rows.append(Row(generated.name, tiles))
    draw_sheet(rows, path, columns=2)


def title(query, scores, queries):
    """Return the text above a query's row."""
    name = Path(queries.files[query]).name
    first = scores.first_good[query]
    rank = f"first good at rank {first + 1}" if first >= 0 else "no good image"
    return f"{name}   AP {100 * scores.ap[query]:.1f} %, {rank}"


def shortened(text, font, width):
    """Return a text that is at most `width` pixels wide, with its middle cut out if need be."""
    kept, short = len(text), text
    while kept > 2 and font.getlength(short) > width:
        kept -= 1
        short = f"{text[: (kept + 1) // 2]} … {text[len(text) - kept // 2 :]}"
    return short


def load(data_dir, name):
    """Read an image of a prepared dataset and fit it into a tile."""
    path = Path(data_dir) / name
    if not path.is_file():
        raise UserError(f"{path}: no such image; name the `pytorch` folder with --data_dir")
    return fitted(read_image(path))


def fitted(picture: Image.Image) -> Image.Image:
    """Return a picture in a tile's size, undistorted, on grey."""
    scale = min(WIDTH / picture.width, HEIGHT / picture.height)
    size = [max(round(scale * side), 1) for side in picture.size]
    tile = Image.new("RGB", (WIDTH, HEIGHT), "#e4e4e4")
    left, top = (WIDTH - size[0]) // 2, (HEIGHT - size[1]) // 2
    tile.paste(picture.resize(size, Image.Resampling.BICUBIC), (left, top))
    return tile


def framed(picture, colour):
    """Return a picture with a frame around it."""
    frame = Image.new("RGB", (WIDTH + 2 * FRAME, HEIGHT + 2 * FRAME), colour)
    frame.paste(picture, (FRAME, FRAME))
    return frame


def faded(picture):
    """Return a picture in grey, half way to white."""
    grey = picture.convert("L").convert("RGB")
    return Image.blend(grey, Image.new("RGB", grey.size, "white"), 0.5)
