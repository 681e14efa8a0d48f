"""Show a page in the browser: drop a crop of a person, see the gallery ranked by likeness, and why.

    python page.py --name ft_ResNet50 --index crops.index --gallery crops
    python page.py --name ft_ResNet50 --index crops.index      # the crops that the index holds

Then open http://127.0.0.1:7860. Only this computer can: the page asks nothing of any other, and
deletes what is uploaded. It searches as search.py does. (Gradio: Abid et al., "Gradio:
Hassle-Free Sharing and Testing of ML Models in the Wild", 2019; an optional dependency.)
"""

import os
import socket
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from reid.errors import UserError, missing_package, run
from reid.local_page import markup
from reid.local_page.finding import MOST_BYTES, Crop, Finder, Ranking
from reid.options import (
    Parser,
    add_device_options,
    add_feature_options,
    add_run_options,
    at_least,
    number,
)
from search import bring_up_to_date, check_searched, load_embedder, usable_threshold

MODEL_DIR = "model"
NAME = "ft_ResNet50"

HOST, PORT = "127.0.0.1", 7860
NO_THRESHOLD = 1.0  # where none is calibrated: only copies of the crop reach it
DIGITS = 3  # of a similarity on the slider: more would make it long to walk with arrow keys
UPLOADS_KEPT = 300  # seconds; uploads of the same file by several pages are one file
AT_ONCE = 4  # searches; more wait for their turn
IDLE = 3600  # seconds after which a page that was closed is forgotten
SESSIONS = 100  # open pages whose rankings are kept in memory


class View(NamedTuple):
    """What one open page shows: a crop and its ranking."""

    crop: Crop
    ranking: Ranking
    reranked: bool


def get_parser():
    parser = Parser("Search a gallery of crops in the browser, on this computer alone.")
    add_run_options(parser, NAME, MODEL_DIR)
    parser.add_argument(
        "--gallery",
        metavar="FOLDER",
        help="folder of crops to search, as for search.py; new and changed ones are extracted "
        "first (default: the crops that --index holds)",
    )
    parser.add_argument(
        "--index",
        metavar="FILE",
        help="file that keeps the features, as for search.py (default: a temporary file)",
    )
    parser.add_argument(
        "--top", type=number(int, least=1, most=100), default=12, help="images in a ranking"
    )
    parser.add_argument(
        "--candidates",
        type=at_least(1),
        default=1000,
        help="how many of the most similar images re-ranking re-orders",
    )
    parser.add_argument(
        "--port",
        type=number(int, least=1, most=65535),
        default=PORT,
        help=f"port of {HOST} to serve the page at",
    )
    parser.add_argument("--batchsize", type=at_least(1), default=64, help="images in a batch")
    add_feature_options(parser)
    add_device_options(parser, torchrun=False)
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    # Holds uploads, and the index where none is named.
    with tempfile.TemporaryDirectory(prefix="page-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        gradio = import_gradio(folder / "uploads")
        device = check_searched(args)
        check_port(args.port)
        embed = load_embedder(args, device)
        stored = usable_threshold(args, Path(args.model_dir) / args.name, embed)
        index = args.index or folder / "gallery.index"
        finder = Finder(embed, index, args.top, args.candidates)
        size = fill(finder, args)
        title = args.weights or args.name
        serve(gradio, build(gradio, finder, stored, markup.header(title, size)), args.port)


def import_gradio(uploads):
    """Return the module, told to report nothing to anybody and to keep uploads in a folder.

    Raises UserError where it is not installed.
    """
    # Its variables could share the page with the world, or hand out other folders.
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:
        del os.environ[name]
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(uploads)}
    os.environ["HF_HUB_OFFLINE"] = "1"
    # Gradio asks its own server whether it is there; no proxy could answer that.
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = HOST
    try:
        import gradio
    except ImportError as error:
        raise missing_package("page.py", "gradio") from error
    return gradio


def check_port(port):
    """Raise UserError unless the page can be served at this port."""
    with socket.socket() as trial:
        if os.name != "nt":  # there, it would share a port that is in use
            # As the server does: a port whose last connections are still closing is free.
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((HOST, port))
        except OSError as error:
            raise UserError(f"--port {port}: {error.strerror}; name another") from error


def fill(finder, args):
    """Bring the index up to date. Returns how many images it has."""
    with finder.open_gallery() as gallery:
        bring_up_to_date(gallery, finder.embed, args)
        if not gallery.roots():
            raise UserError(f"{args.index}: of an older version; name its folder with --gallery")
        return len(gallery)


# --- the page -----------------------------------------------------------------------------------


def build(gradio, finder, stored, header):
    """Return the page as Gradio's Blocks. stored: of the threshold, or None; header: HTML."""
    actions = Actions(gradio, finder, stored)
    start = NO_THRESHOLD if stored is None else round(stored["threshold"], DIGITS)

    def choose(view, event: gradio.EventData):
        return actions.explain(view, event._data)

    with gradio.Blocks(
        title=markup.TITLE, analytics_enabled=False, delete_cache=(60, UPLOADS_KEPT)
    ) as page:
        view = gradio.State(None, time_to_live=IDLE)
        # Not in the view: maps that come after another search would bring the old one back.
        chosen = gradio.State(None, time_to_live=IDLE)
        gradio.HTML(header, elem_id="head")
        with gradio.Row():
            with gradio.Column(scale=1, min_width=300):
                controls = add_controls(gradio, actions, start)
                upload, card, rerank, other_cameras, threshold, rate = controls
            with gradio.Column(scale=3, min_width=320):
                summary = gradio.HTML(markup.START, elem_id="summary", js_on_load=markup.POLITE)
                ranking = gradio.HTML(elem_id="ranking", js_on_load=markup.CHOOSING)
                pair = gradio.HTML(elem_id="pair", js_on_load=markup.COMING_INTO_VIEW)
        upload.upload(
            actions.upload,
            [upload, rerank, other_cameras, threshold],
            [upload, card, other_cameras, view, chosen, summary, ranking, pair],
            api_visibility="private",
        )
        for box in (rerank, other_cameras):
            box.input(
                actions.search,
                [rerank, other_cameras, threshold, view],
                [view, chosen, summary, ranking, pair],
                api_visibility="private",
            )
        threshold.change(
            actions.mark,
            [threshold, view, chosen],
            [summary, ranking, rate],
            trigger_mode="always_last",
            show_progress="hidden",
            api_visibility="private",
        )
        ranking.click(choose, [view], [chosen, pair], api_visibility="private")
    return page.queue(default_concurrency_limit=AT_ONCE, max_size=10 * AT_ONCE)


def add_controls(gradio, actions, start):
    """Add the place to drop a crop, and what one can choose, from top to bottom. Returns them."""
    upload = gradio.File(
        label="A crop of a person",
        file_types=["image"],
        height=150,
        elem_id="upload",
    )
    refuse_addresses(upload)
    card = gradio.HTML(elem_id="crop", js_on_load=markup.POLITE)
    rerank = gradio.Checkbox(label="Re-rank", info=markup.RERANK)
    other_cameras = gradio.Checkbox(
        label="Leave out the crop's own camera",
        info=markup.camera_text(None),
        interactive=False,
    )
    threshold = gradio.Slider(
        min(0.0, start),
        1.0,
        value=start,
        step=10**-DIGITS,
        label="Same person from this similarity on",
        elem_id="threshold",
    )
    rate = gradio.HTML(actions.rate(start), elem_id="rate", js_on_load=markup.POLITE)
    return upload, card, rerank, other_cameras, threshold, rate


class Actions:
    """What the page's controls do: each method takes their values, and returns what is shown.

    A UserError becomes a sentence on the page.
    """

    def __init__(self, gradio, finder, stored):
        self.gradio, self.finder, self.stored = gradio, finder, stored

    def upload(self, path, rerank, other_cameras, threshold):
        """Read an uploaded file and search for it; the place to drop files is empty again."""
        try:
            crop = self.finder.read(path)
            found = self.finder.rank(crop, rerank, other_cameras)
        except UserError as error:
            return None, "", self.camera_box(None), None, None, markup.problem(error), "", ""
        view, box = View(crop, found, rerank), self.camera_box(crop.camera)
        return None, markup.crop_card(crop), box, view, None, *self.shown(view, threshold), ""

    def camera_box(self, camera):
        """Return what changes of the box that leaves out a camera: a number, or None."""
        return self.gradio.update(interactive=camera is not None, info=markup.camera_text(camera))

    def search(self, rerank, other_cameras, threshold, view):
        """Search for the same crop in another way."""
        if view is None:
            return None, None, markup.START, "", ""
        try:
            found = self.finder.rank(view.crop, rerank, other_cameras)
        except UserError as error:
            return view, None, markup.problem(error), "", ""
        view = View(view.crop, found, rerank)
        return view, None, *self.shown(view, threshold), ""

    def mark(self, threshold, view, chosen):
        """Mark the same person at another threshold, and say how often that is wrong."""
        same = [self.gradio.skip()] * 2 if view is None else self.shown(view, threshold, chosen)
        return *same, self.rate(threshold)

    def explain(self, view, event):
        """Show the heat maps of the place in `event`, as a browser sends it: of any content."""
        number = event.get("place") if isinstance(event, dict) else None
        if view is None or number not in range(len(view.ranking.places)):
            return None, markup.problem("There is no such image in the ranking.")
        number = int(number)
        try:
            why = self.finder.explain(view.crop, view.ranking.places[number])
        except UserError as error:
            return None, markup.problem(error)
        return number, markup.pair(view.crop, view.ranking, number, why)

    def shown(self, view, threshold, chosen=None):
        """Return a view's summary and ranking as HTML, the image at place `chosen` pressed."""
        threshold = self.exact(threshold)
        return (
            markup.summary(view.ranking, threshold, view.reranked),
            markup.ranking_list(view.ranking, threshold, chosen),
        )

    def rate(self, threshold):
        """Return how often two people reach a threshold, as HTML."""
        return f'<p class="note">{markup.rate_text(self.stored, self.exact(threshold))}</p>'

    def exact(self, threshold):
        """Return the stored threshold where the slider stands at it, which has fewer digits."""
        stored = self.stored and self.stored["threshold"]
        near = stored is not None and abs(threshold - stored) <= 0.5 * 10**-DIGITS
        return stored if near else threshold


def refuse_addresses(component):
    """Have a component take uploaded files alone: Gradio would fetch what lies at a web address."""
    keep = component.async_move_resource_to_block_cache

    async def checked(path):
        if path is not None and "://" in str(path):
            raise ValueError("a web address is no uploaded file")
        return await keep(path)

    component.async_move_resource_to_block_cache = checked


def serve(gradio, page, port):
    """Serve the page on this computer until Ctrl-C."""
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    # A web site whose name leads to this computer could else read the page in a visitor's browser.
    own_name = Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    page.launch(
        server_name=HOST,
        server_port=port,
        share=False,
        inbrowser=False,
        quiet=True,
        prevent_thread_lock=True,
        allowed_paths=[],
        max_file_size=MOST_BYTES,
        state_session_capacity=SESSIONS,
        enable_monitoring=False,
        run_history=False,
        mcp_server=False,
        pwa=False,
        ssr_mode=False,
        footer_links=[],
        app_kwargs={"middleware": [own_name]},
        theme=theme(gradio),
        css=markup.CSS,
    )
    print(f"http://{HOST}:{port} has the page; Ctrl-C ends it", flush=True)
    # Not closed at the end: that would wait five seconds for a thread which ends with the process.
    while True:
        time.sleep(1)  # Windows has Ctrl-C wait for the end of a longer one


def theme(gradio):
    """Return a theme with the system's fonts, which no server is asked for, and more contrast."""
    plain = gradio.themes.Default(
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
        primary_hue="blue",
    )
    return plain.set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_400",
        block_label_text_color="*neutral_700",
        block_title_text_color="*neutral_800",
    )


if __name__ == "__main__":
    run(main)
