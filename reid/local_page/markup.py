"""HTML of the page: rankings, pairs with heat maps, sentences. Images are part of it, as JPEGs."""

import base64
import os
from html import escape
from typing import TYPE_CHECKING

from PIL import Image

from reid.errors import printable
from reid.files import encoded
from reid.local_page.finding import CAMERA, ITSELF, OUTSIDE, Crop, Ranking
from reid.pictures import heated, largest, legend
from reid.verification import FEWEST, KNOWN_PEOPLE, rate_at

if TYPE_CHECKING:
    from reid.explain import Explanation

TITLE = "Find the same person"
REASONS = {
    ITSELF: "The same file lies in the gallery; it is left out.",
    CAMERA: "{:,} of the most similar images are of the crop's own camera; they are left out.",
    OUTSIDE: "{:,} images lie outside of the gallery's folders, or are links to there; left out.",
}
ONE = {
    CAMERA: "One of the most similar images is of the crop's own camera; it is left out.",
    OUTSIDE: "One image lies outside of the gallery's folders, or is a link to there; left out.",
}

# Colours are the theme's, so that they follow the browser into the dark. Green is never the only
# sign of the same person: the words stand there, too.
CSS = """
#head, #crop, #rate, #summary, #ranking, #pair { padding: 0; }
.gradio-container { max-width: 1180px !important; margin: 0 auto !important; }
#head h1 { font-size: 1.7rem; font-weight: 650; margin: 0.4rem 0 0.1rem; }
#head p, .note { color: var(--body-text-color-subdued); margin: 0 0 0.4rem; }
#crop figure { display: flex; gap: 0.9rem; align-items: center; margin: 0; }
#crop img { height: 144px; border-radius: 8px; }
#crop figcaption { overflow-wrap: anywhere; font-size: 0.9rem; }
#crop strong { display: block; font-weight: 600; }
#crop a { display: none; }
.problem { border-left: 4px solid #d62828; padding: 0.5rem 0.8rem; margin: 0;
  overflow-wrap: anywhere; background: var(--background-fill-secondary); }
.start { padding: 3.5rem 1rem; text-align: center; border-radius: 10px;
  color: var(--body-text-color-subdued); background: var(--background-fill-secondary); }
.summary { font-size: 1.1rem; font-weight: 600; margin: 0 0 0.3rem; }
.places { list-style: none; margin: 0.6rem 0 0; padding: 0; display: grid; gap: 10px;
  grid-template-columns: repeat(auto-fill, minmax(112px, 1fr)); }
.places li { margin: 0; padding: 0; }
.places button { width: 100%; height: 100%; padding: 7px 7px 9px; border-radius: 10px;
  border: 3px solid var(--border-color-primary); background: var(--background-fill-primary);
  color: var(--body-text-color); text-align: left; cursor: pointer; display: flex;
  flex-direction: column; font: inherit; }
.places button.same { border-color: #2e9e44; }
.places button:hover { background: var(--background-fill-secondary); }
.places button:focus-visible { outline: 3px solid var(--color-accent); outline-offset: 2px; }
.places button[aria-pressed="true"] { background: var(--color-accent-soft);
  box-shadow: 0 0 0 3px var(--color-accent); }
.places .frame { display: flex; height: 190px; justify-content: center; align-items: center; }
.places img { max-width: 100%; max-height: 100%; border-radius: 5px; }
.places .line { display: flex; justify-content: space-between; margin-top: 7px; }
.places .line b { font-weight: 650; font-variant-numeric: tabular-nums; }
.places .file, .places .verdict { font-size: 0.78rem; line-height: 1.3; }
.places .file { color: var(--body-text-color-subdued); overflow-wrap: anywhere; }
.places .verdict { min-height: 1.3em; font-weight: 600; color: #23803a; }
.dark .places .verdict { color: #6fd285; }
.pair h2 { font-size: 1.1rem; font-weight: 600; margin: 1rem 0 0.3rem; }
.pair .maps { display: flex; flex-wrap: wrap; gap: 14px; margin-top: 0.6rem; }
.pair figure { margin: 0; width: 112px; }
.pair img { width: 112px; height: 200px; object-fit: contain; border-radius: 6px;
  background: var(--background-fill-secondary); }
.pair figcaption { font-size: 0.82rem; line-height: 1.35; overflow-wrap: anywhere;
  color: var(--body-text-color-subdued); margin-top: 4px; }
@media (max-width: 480px) {
  #crop a { display: block; margin-top: 0.5rem; text-align: left; }
  .places { grid-template-columns: repeat(2, 1fr); }
  .pair .maps { display: grid; grid-template-columns: repeat(2, 1fr); }
  .pair figure, .pair img { width: 100%; }
}
"""

# The pressed button is marked here: were the ranking drawn anew, the keyboard would lose its place.
CHOOSING = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('button[data-place]');
  if (!button) return;
  for (const other of element.querySelectorAll('button[data-place]'))
    other.setAttribute('aria-pressed', String(other === button));
  trigger('click', {place: Number(button.dataset.place)});
});
"""
# Screen readers say what changes in such an element.
POLITE = "element.setAttribute('aria-live', 'polite');"
# On a phone the heat maps lie far below the image that was chosen.
COMING_INTO_VIEW = f"""{POLITE}
watch('value', () => {{
  if (element.querySelector('img'))
    requestAnimationFrame(() => element.scrollIntoView({{block: 'nearest'}}));
}});
"""

RERANK = "Order by shared neighbours (k-reciprocal re-ranking) among the most similar images."
START = '<p class="start">The images most like your crop will be listed here.</p>'


def header(name: str, number: int) -> str:
    """Return the title, and below it the run's name and the number of images."""
    return (
        f"<h1>{TITLE}</h1><p>{number:,} images, compared by the network {escape(name)}. Nothing "
        "leaves this computer; uploaded files are deleted.</p>"
    )


def problem(message: object) -> str:
    """Return the sentence for what went wrong."""
    return f'<p class="problem" role="alert">{escape(printable(message))}</p>'


def camera_text(camera: int | None) -> str:
    """Return what the box that leaves out a camera says of it."""
    if camera is None:
        return "Only for crops whose file name tells it, as 0002_c1s1_000451_03.jpg does."
    return f"Camera {camera}, as the crop's file name says."


def crop_card(crop: Crop) -> str:
    """Return the uploaded crop with its name and camera."""
    camera = "no camera in its name" if crop.camera is None else f"camera {crop.camera}"
    name = escape(printable(crop.name))
    return (
        f'<figure><img src="{as_url(crop.picture)}" alt="your crop">'
        f"<figcaption><strong>{name}</strong>{camera}"
        '<a href="#summary">See the ranking</a></figcaption></figure>'
    )


def summary(ranking: Ranking, threshold: float, reranked: bool) -> str:
    """Return the sentences above a ranking: how many are the same person, what was left out."""
    if not ranking.places:
        return problem("No image is left to be shown.") + notes(ranking)
    same = sum(place.hit.similarity >= threshold for place in ranking.places)
    first = f"the first {len(ranking.places)}"
    order = "Re-ranked" if reranked else "Most similar first"
    return (
        f'<p class="summary">{same or "None"} of {first} marked as the same person</p>'
        f'<p class="note">{order}. Choose an image to see what makes it alike.</p>{notes(ranking)}'
    )


def ranking_list(ranking: Ranking, threshold: float, chosen: int | None) -> str:
    """Return a ranking as a list of buttons, the image at place `chosen` pressed."""
    items = "".join(
        item(number, place, threshold, number == chosen)
        for number, place in enumerate(ranking.places)
    )
    return f'<ol class="places">{items}</ol>'


def item(number, place, threshold, pressed):
    """Return one place of a ranking."""
    hit = place.hit
    same = hit.similarity >= threshold
    name = escape(printable(os.path.basename(hit.path)))
    return (
        f'<li><button type="button" data-place="{number}" class="{"same" if same else "other"}" '
        f'aria-pressed="{str(pressed).lower()}">'
        f'<span class="frame"><img src="{as_url(place.picture)}" alt="rank {number + 1}"></span>'
        f'<span class="line"><span aria-hidden="true">{number + 1}</span>'
        f"<b>{hit.similarity:.3f}</b></span>"
        f'<span class="verdict">{"same person" if same else ""}</span>'
        f'<span class="file">{name}</span></button></li>'
    )


def notes(ranking):
    """Return sentences of what was left out of a ranking."""
    lines = []
    for reason, number in ranking.left_out.items():
        text = (ONE if number == 1 else REASONS).get(reason, REASONS[reason])
        lines.append(f'<p class="note">{text.format(number)}</p>')
    return "".join(lines)


def rate_text(stored: dict | None, threshold: float) -> str:
    """Return how often two people reach a threshold, by what `stored_threshold` returned."""
    if stored is None:
        return (
            "How often two people are taken for one is unknown: no threshold is calibrated for "
            "this network (evaluate.py --calibrate)."
        )
    false, true = rate_at(stored, threshold), rate_at(stored, threshold, "true_match")
    if false is None:
        return (
            "How often two people are taken for one here is unknown: only the rate at "
            f"{stored['threshold']:.4f} is stored. Calibrate again to have it for others."
        )
    number = stored["impostors"]
    if false * number < FEWEST:
        share = f"Under {100 * FEWEST / number:.2g} %"
    else:
        share = f"{100 * false:.3g} %"
    text = f"{share} of image pairs of different people reach this "
    text += f"(false-match rate, of {number:,} pairs)"
    text += "" if true is None else f", and {100 * true:.3g} % of image pairs of the same person"
    known = f" These are rates {KNOWN_PEOPLE}." if stored.get("queries") == "val" else ""
    return f"{text}.{known}"


def pair(crop: Crop, ranking: Ranking, number: int, why: "Explanation") -> str:
    """Return a crop and the image at a place, and the heat maps of what makes them alike."""
    place, scale = ranking.places[number], largest([[why]])
    rank, name = number + 1, printable(os.path.basename(place.hit.path))
    sums = [f"{cells.sum():+.3f}" for cells in why.maps]
    constants = [f"{constant:+.3f}" for constant in why.constants]
    rests = [f", {text} of no place" if float(text) else "" for text in constants]
    figures = [
        (crop.picture, "your crop", f"Your crop: {crop.name}"),
        (
            heated(crop.picture, why.maps[0], scale, why.share),
            f"heat map of your crop, sum {sums[0]}",
            f"Where your crop is like it: {sums[0]} in all{rests[0]}",
        ),
        (place.picture, f"the image at rank {rank}", f"Rank {rank}: {name}"),
        (
            heated(place.picture, why.maps[1], scale, why.share),
            f"heat map of the image at rank {rank}, sum {sums[1]}",
            f"Where it is like your crop: {sums[1]} in all{rests[1]}",
        ),
        (legend(scale), "scale of colours, from purple over white to orange", "Colours of a cell"),
    ]
    drawn = "".join(
        f'<figure><img src="{as_url(image)}" alt="{escape(alt)}">'
        f"<figcaption>{escape(printable(caption))}</figcaption></figure>"
        for image, alt, caption in figures
    )
    return (
        f'<section class="pair"><h2>Why rank {rank} is at {why.similarity:.3f}</h2>'
        '<p class="note">Orange cells make the two alike, purple ones unlike. The cells of either '
        "map add up to the similarity, with what belongs to none of them.</p>"
        f'<div class="maps">{drawn}</div></section>'
    )


def as_url(image: Image.Image) -> str:
    """Return an image as the address of its own data."""
    content = encoded(lambda file: image.save(file, "JPEG", quality=90))
    return f"data:image/jpeg;base64,{base64.b64encode(content).decode()}"
