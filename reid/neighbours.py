"""`gan_neighbours.jpg`: generated images beside their nearest real ones, to see what is copied."""

from PIL import Image, ImageDraw, ImageFont

from reid.files import write_picture
from reid.images import read_image
from reid.rankings import FRAME, GAP, HEIGHT, PLAIN, TEXT, WIDTH, framed

COLUMNS = 2  # of groups: a generated image and its real ones
GENERATED = "#1d6fb8"
CELL, ROW = WIDTH + 2 * FRAME + GAP, HEIGHT + 2 * FRAME + 2 * TEXT + GAP


def draw_neighbours(groups, path):
    """Draw a JPEG of groups: the generated image, framed blue, then real ones, nearest first.

    groups: list of (path of the generated image, paths of the real ones, their distances); all
    of one length. Above a group stands its generated image's name, under a real one its distance.
    """
    width = (1 + len(groups[0][1])) * CELL + 5 * GAP
    rows = -(-len(groups) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * width, rows * ROW + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(TEXT - 6)
    for number, (generated, real, distances) in enumerate(groups):
        left, top = GAP + number % COLUMNS * width, GAP + number // COLUMNS * ROW
        draw.text((left, top), generated.name, fill="black", font=font)
        sheet.paste(framed(thumbnail(generated), GENERATED), (left, top + TEXT))
        for image, distance in zip(real, distances, strict=True):
            left += CELL
            sheet.paste(framed(thumbnail(image), PLAIN), (left + GAP, top + TEXT))
            below = left + GAP + FRAME, top + TEXT + HEIGHT + 2 * FRAME
            draw.text(below, f"{distance:.3f}", fill="black", font=font)
    write_picture(path, lambda file: sheet.save(file, format="jpeg", quality=92))


def thumbnail(path):
    return read_image(path).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
