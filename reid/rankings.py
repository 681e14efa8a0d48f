"""Pictures of rankings: a row for each query, it and its first places, to see what goes wrong."""

from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from reid.errors import UserError
from reid.files import write_picture
from reid.images import read_image
from reid.metrics import Relevance

WIDTH, HEIGHT, FRAME, GAP, TEXT = 64, 128, 4, 6, 18  # pixels
GOOD, WRONG, PLAIN, JUNK = "#2e9e44", "#d62828", "#444444", "#bbbbbb"


class Cell(NamedTuple):
    """A picture in a row, `fitted`; what stands under it; the colour of its frame."""

    picture: Image.Image
    label: str
    colour: str


class Row(NamedTuple):
    """A query: what stands above it, its picture, `fitted`, and the `Cell`s of its first places."""

    title: str
    query: Image.Image
    cells: list


def draw_rankings(queries, scores, sets, path):
    """Draw a row for each of `queries` (indices): the query, then `scores.top`.

    Good images have a green frame, wrong ones a red one; junk is grey and has no rank.
    sets: `reid.mat.TestSets` with the images' paths.
    """
    relevance = Relevance(sets.gallery)
    draw_sheet([ranking(query, scores, sets, relevance) for query in queries], path)


def ranking(query, scores, sets, relevance):
    """The Row of a query."""
    good, junk = relevance.of(sets.query.identities[query], sets.query.cameras[query])
    junk = {*junk.tolist(), *relevance.always_junk.tolist()}
    cells, rank = [], 0
    for image in scores.top[query].tolist():
        picture = load(sets.data_dir, sets.gallery.files[image])
        if image in junk:
            cells.append(Cell(faded(picture), "junk", JUNK))
        else:
            rank += 1
            cells.append(Cell(picture, str(rank), GOOD if image in good else WRONG))
    picture = load(sets.data_dir, sets.query.files[query])
    return Row(title(query, scores, sets.query), picture, cells)


def draw_sheet(rows, path):
    """Write a JPEG of `rows`, a list of Row."""
    cell, height = WIDTH + 2 * FRAME + GAP, HEIGHT + 2 * FRAME + 2 * TEXT + GAP
    columns = 1 + max(len(row.cells) for row in rows)
    size = columns * cell + 3 * GAP, len(rows) * height + GAP
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(TEXT - 6)
    for line, row in enumerate(rows):
        top = GAP + line * height
        draw.text((GAP, top), cut(row.title, font, size[0] - 2 * GAP), fill="black", font=font)
        sheet.paste(framed(row.query, PLAIN), (GAP, top + TEXT))
        for place, (picture, label, colour) in enumerate(row.cells, start=1):
            left = 2 * GAP + place * cell
            sheet.paste(framed(picture, colour), (left, top + TEXT))
            below = left + FRAME, top + TEXT + HEIGHT + 2 * FRAME
            draw.text(below, label, fill="black", font=font)
    write_picture(path, lambda file: sheet.save(file, format="jpeg", quality=92))


def title(query, scores, queries):
    """What is written above a query's row."""
    name = Path(queries.files[query]).name
    first = scores.first_good[query]
    found = f"first good at rank {first + 1}" if first >= 0 else "no good image"
    return f"{name}   AP {100 * scores.ap[query]:.1f} %, {found}"


def cut(text, font, width):
    """Text that is no wider than `width` pixels, its middle left out where it must be."""
    if font.getlength(text) <= width:
        return text
    kept = len(text)
    while kept > 2 and font.getlength(shortened(text, kept)) > width:
        kept -= 1
    return shortened(text, kept)


def shortened(text, kept):
    return f"{text[: (kept + 1) // 2]} … {text[len(text) - kept // 2 :]}"


def load(data_dir, name):
    path = Path(data_dir) / name
    if not path.is_file():
        raise UserError(f"{path}: no such image; name the `pytorch` folder with --data_dir")
    return fitted(read_image(path))


def fitted(picture):
    """A picture in a cell's size, undistorted, on grey."""
    scale = min(WIDTH / picture.width, HEIGHT / picture.height)
    size = [max(round(scale * side), 1) for side in picture.size]
    cell = Image.new("RGB", (WIDTH, HEIGHT), "#e4e4e4")
    left, top = (WIDTH - size[0]) // 2, (HEIGHT - size[1]) // 2
    cell.paste(picture.resize(size, Image.Resampling.BICUBIC), (left, top))
    return cell


def framed(picture, colour):
    frame = Image.new("RGB", (WIDTH + 2 * FRAME, HEIGHT + 2 * FRAME), colour)
    frame.paste(picture, (FRAME, FRAME))
    return frame


def faded(picture):
    """Grey, half way to white."""
    grey = picture.convert("L").convert("RGB")
    return Image.blend(grey, Image.new("RGB", grey.size, "white"), 0.5)
