"""Pictures of framed images in rows: an image, and beside it those that are nearest to it.

`draw_rankings` shows queries with the first images of their rankings, `draw_neighbours` generated
images with their nearest training images; both call `draw_sheet`, as search.py does. `heat_rows`
stand below a ranking.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from reid.errors import UserError
from reid.files import write_picture
from reid.images import read_image
from reid.mat import EvalSets
from reid.metrics import Relevance, Scores

if TYPE_CHECKING:
    from reid.explain import Explanation  # which takes PyTorch: seconds that others needn't wait

WIDTH, HEIGHT, FRAME, GAP, TEXT = 64, 128, 4, 6, 18  # pixels
GOOD, WRONG, PLAIN, JUNK, GENERATED = "#2e9e44", "#d62828", "#444444", "#bbbbbb", "#1d6fb8"
ADDS, TAKES = (230, 97, 1), (94, 60, 153)  # orange and purple, which the colour-blind tell apart
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


def draw_rankings(
    queries: Sequence[int],
    scores: Scores,
    sets: EvalSets,
    path: str | Path,
    explanations: "list[list[Explanation]] | None" = None,
) -> None:
    """Draw a row for each of `queries` (indices): the query, then `scores.top`.

    Good images have a green frame, wrong ones a red one; junk is grey and has no rank.
    sets: `reid.mat.EvalSets` with the images' paths. explanations: of each query with each of its
    `scores.top`, to be drawn below.
    """
    relevance, rows = Relevance(sets.gallery), []
    scale = largest(explanations or [])
    for number, query in enumerate(queries):
        rows.append(ranking(query, scores, sets, relevance))
        if explanations:
            names = [sets.query.files[query], *sets.gallery.files[scores.top[query]]]
            pictures = [scaled(read_image(sets.data_dir / name)) for name in names]
            rows += heat_rows(pictures, explanations[number], scale)
    draw_sheet(rows, path)


def ranking(query, scores, sets, relevance):
    """Return the `Row` of a query."""
    good, junk = relevance.of(sets.query.identities[query], sets.query.cameras[query])
    junk = {*junk.tolist(), *relevance.always_junk.tolist()}
    tiles, rank = [Tile(fitted(read_image(sets.data_dir / sets.query.files[query])), "", PLAIN)], 0
    for image in scores.top[query].tolist():
        picture = fitted(read_image(sets.data_dir / sets.gallery.files[image]))
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


def largest(explanations: "list[list[Explanation | None]]") -> float:
    """Return the largest cell, up or down, of all heat maps: the scale of their colours."""
    maps = [one.maps for some in explanations for one in some if one]
    return max((float(np.abs(cells).max()) for cells in maps), default=1.0)


def heat_rows(
    pictures: list[Image.Image], explanations: "list[Explanation | None]", scale: float
) -> list[Row]:
    """Return two `Row`s to stand below a ranking, with heat maps of why its images are there.

    pictures: the query, then the images of its ranking, as `scaled` returns them. explanations: of
    the query with each of them; None where there is none. Below each is its sum, which is the
    similarity, and the constant of a batch norm neck. scale: what has the fullest colour.
    """
    titles = (
        "the query: orange cells make it like the image above, purple ones unlike",
        "the image above: orange cells make it like the query, purple ones unlike",
    )
    query, *others = pictures
    rows = []
    for side, heading in enumerate(titles):
        tiles = [Tile(legend(scale), "", PLAIN)]
        for other, why in zip(others, explanations, strict=True):
            picture = other if side else query
            if why is None:
                tiles.append(Tile(centred(faded(picture)), "", PLAIN))
                continue
            constant = f" {why.constants[side]:+.3f}"
            constant = "" if float(constant) == 0 else constant
            label = f"{why.maps[side].sum():.3f}{constant}"
            heat = heated(picture, why.maps[side], scale, why.share)
            tiles.append(Tile(centred(heat), label, PLAIN))
        rows.append(Row(heading, tiles))
    return rows


def heated(picture, cells, scale, share=(1.0, 1.0)):
    """Lay a heat map's cells [h, w] over a picture in pale grey; `scale` is the fullest colour.

    share: the map is of the picture's middle, this fraction of its height and width.
    """
    height, width = (max(1, round(s * n)) for s, n in zip(share, picture.size[::-1], strict=True))
    middle = Image.fromarray(cells / scale).resize((width, height), Image.Resampling.BILINEAR)
    heat = Image.new("F", picture.size)
    heat.paste(middle, ((picture.width - width) // 2, (picture.height - height) // 2))
    heat = np.asarray(heat)[..., None]
    strength, colours = np.abs(heat).clip(max=1), np.where(heat > 0, ADDS, TAKES)
    mixed = (1 - strength) * np.asarray(faded(picture)) + strength * colours
    return Image.fromarray(mixed.round().astype(np.uint8))


def legend(scale):
    """Return a tile with the colours of heat maps, and what they stand for."""
    white = Image.new("RGB", (WIDTH, HEIGHT), "white")
    tile = heated(white, np.linspace(scale, -scale, HEIGHT, dtype=np.float32)[:, None], scale)
    draw, font = ImageDraw.Draw(tile), ImageFont.load_default(TEXT - 6)
    for place, text in ((0.08, f"+{scale:.4f}"), (0.5, "0"), (0.92, f"-{scale:.4f}")):
        draw.text((WIDTH / 2, place * HEIGHT), text, fill="black", font=font, anchor="mm")
    return tile


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


def fitted(picture: Image.Image) -> Image.Image:
    """Return a picture in a tile's size, undistorted, on grey."""
    return centred(scaled(picture))


def scaled(picture: Image.Image, width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """Return a picture resized to touch two sides of a tile of so many pixels, undistorted."""
    scale = min(width / picture.width, height / picture.height)
    size = [max(round(scale * side), 1) for side in picture.size]
    return picture.resize(size, Image.Resampling.BICUBIC)


def picture_of(path: str | Path, width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """Return a file's image as `scaled` does; a white one where the file is gone by now."""
    try:
        return scaled(read_image(path), width, height)
    except UserError:
        return Image.new("RGB", (width, height), "white")


def centred(picture: Image.Image) -> Image.Image:
    """Return a tile, grey around a picture that `scaled` returned."""
    tile = Image.new("RGB", (WIDTH, HEIGHT), "#e4e4e4")
    tile.paste(picture, ((WIDTH - picture.width) // 2, (HEIGHT - picture.height) // 2))
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
