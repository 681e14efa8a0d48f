"""`*_rankings.jpg`: queries and the first places of their rankings, to see what goes wrong."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from reid.dataset import read_image
from reid.errors import UserError
from reid.files import replacing
from reid.metrics import Relevance

WIDTH, HEIGHT, FRAME, GAP, TEXT = 64, 128, 4, 6, 18  # pixels
GOOD, WRONG, PLAIN = "#2e9e44", "#d62828", "#444444"


def draw_rankings(queries, scores, sets, path):
    """Draw a row for each of `queries` (indices): the query, then `scores.top`.

    Good images have a green frame, wrong ones a red one; junk is grey and has no rank.
    sets: `reid.mat.TestSets` with the images' paths.
    """
    cell, row = WIDTH + 2 * FRAME + GAP, HEIGHT + 2 * FRAME + 2 * TEXT + GAP
    columns = 1 + scores.top.shape[1]
    sheet = Image.new("RGB", (columns * cell + 3 * GAP, len(queries) * row + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(TEXT - 6)
    relevance = Relevance(sets.gallery)
    for line, query in enumerate(queries):
        top = GAP + line * row
        draw.text((GAP, top), title(query, scores, sets.query), fill="black", font=font)
        picture = framed(load(sets.data_dir, sets.query.files[query]), PLAIN)
        sheet.paste(picture, (GAP, top + TEXT))
        good, junk = relevance.of(sets.query.identities[query], sets.query.cameras[query])
        junk = {*junk.tolist(), *relevance.always_junk.tolist()}
        rank = 0
        for place, image in enumerate(scores.top[query].tolist(), start=1):
            picture = load(sets.data_dir, sets.gallery.files[image])
            if image in junk:
                picture, label = framed(faded(picture), "#bbbbbb"), "junk"
            else:
                rank += 1
                picture, label = framed(picture, GOOD if image in good else WRONG), str(rank)
            left = 2 * GAP + place * cell
            sheet.paste(picture, (left, top + TEXT))
            draw.text((left + FRAME, top + TEXT + picture.height), label, fill="black", font=font)
    with replacing(path) as temporary:
        sheet.save(temporary, format="jpeg", quality=92)


def title(query, scores, queries):
    """What is written above a query's row."""
    name = Path(queries.files[query]).name
    first = scores.first_good[query]
    found = f"first good at rank {first + 1}" if first >= 0 else "no good image"
    return f"{name}   AP {100 * scores.ap[query]:.1f} %, {found}"


def load(data_dir, name):
    path = Path(data_dir) / name
    if not path.is_file():
        raise UserError(f"{path}: no such image; name the `pytorch` folder with --data_dir")
    return read_image(path).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


def framed(picture, colour):
    frame = Image.new("RGB", (WIDTH + 2 * FRAME, HEIGHT + 2 * FRAME), colour)
    frame.paste(picture, (FRAME, FRAME))
    return frame


def faded(picture):
    """Grey, half way to white."""
    grey = picture.convert("L").convert("RGB")
    return Image.blend(grey, Image.new("RGB", grey.size, "white"), 0.5)
