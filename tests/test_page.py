"""page.py: rankings against search.py's, what it must not show, in a server and in a browser."""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, call, exit_code, save_image
from PIL import Image
from test_search import run_folder

import page
import search
from reid.errors import UserError
from reid.features import Embedder
from reid.gallery import Gallery
from reid.local_page import finding, markup
from reid.local_page.finding import CAMERA, ITSELF, OUTSIDE, Finder

pytest.importorskip("faiss")

CPU = ("--gpu_ids", "-1", "--precision", "fp32")
CROP = "0001_c1s1_000009_00.png"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.manual_seed(0)
    return run_folder(tmp_path_factory.mktemp("runs") / "dense")


@pytest.fixture(scope="module")
def embed(run):
    return Embedder(run, device="cpu", precision="fp32")


def save_blocks(path, seed, size=(48, 96)):
    """Write an image of a few large blocks, which a network tells apart."""
    few = np.random.default_rng(seed).integers(0, 256, (4, 2, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(few).resize(size, Image.Resampling.NEAREST).save(path)
    return path


def make_crops(folder, number=12):
    """Images of cameras 1 to 3, in a folder and in one below it, and one of no camera."""
    for n in range(number - 1):
        name = f"{n:04d}_c{n % 3 + 1}s1_000001_01.png"
        save_blocks(folder / ("more" if n % 4 == 0 else ".") / name, seed=n)
    save_blocks(folder / "no camera.png", seed=number)
    return folder


def make_finder(folder, embed, index, **options):
    with Gallery(embed.made_by, embed.dim, index) as gallery:
        gallery.update(folder, embed)
    return Finder(embed, index, **{"top": 5, "candidates": 8} | options)


@pytest.fixture
def finder(tmp_path, embed):
    return make_finder(make_crops(tmp_path / "crops"), embed, tmp_path / "crops.index")


def names(ranking):
    return [os.path.basename(place.hit.path) for place in ranking.places]


# --- what is found ------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [(), ("--rerank",)])
def test_ranking_is_that_of_search(flags, finder, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    query = save_blocks(tmp_path / CROP, seed=50)
    of_run = ("--model_dir", run.parent, "--name", run.name, *CPU)
    more = ("--index", "crops.index", "--top", 5, "--candidates", 8, "--json", "found.json")
    call(search.main, "--query", query, *of_run, *more, *flags)
    expected = json.loads(Path("found.json").read_text())["queries"][0]["places"]
    found = finder.rank(finder.read(query), rerank=bool(flags))
    assert [place.hit.path for place in found.places] == [place["path"] for place in expected]
    assert [place.hit.similarity for place in found.places] == pytest.approx(
        [place["similarity"] for place in expected], abs=1e-5
    )
    assert found.left_out == {}


def test_the_crop_itself_is_left_out(finder, tmp_path):
    own = tmp_path / "crops" / "0001_c2s1_000001_01.png"
    upload = tmp_path / "uploads" / "renamed.png"
    upload.parent.mkdir()
    shutil.copy(own, upload)
    found = finder.rank(finder.read(upload))
    assert found.left_out == {ITSELF: 1}
    assert len(found.places) == 5 and own.name not in names(found)
    assert "lies in the gallery" in markup.summary(found, 0.5, False)


def test_the_crops_own_camera_is_left_out_on_wish(finder, tmp_path):
    crop = finder.read(save_blocks(tmp_path / CROP, seed=50))
    assert crop.camera == 1
    everything = names(finder.rank(crop))
    assert any("_c1s" in name for name in everything)
    found = finder.rank(crop, other_cameras=True)
    # 12 images, 4 of camera 1: it had to look past the first five.
    assert len(found.places) == 5 and not any("_c1s" in name for name in names(found))
    assert found.left_out[CAMERA] >= 1
    assert "of the crop's own camera" in markup.summary(found, 0.5, False)
    finder.top = 100
    assert len(finder.rank(crop, other_cameras=True).places) == 8
    reranked = finder.rank(crop, rerank=True, other_cameras=True)
    assert not any("_c1s" in name for name in names(reranked))


def test_a_crop_without_a_camera_in_its_name(finder, tmp_path):
    crop = finder.read(save_blocks(tmp_path / "photo.png", seed=50))
    assert crop.camera is None
    assert names(finder.rank(crop, other_cameras=True)) == names(finder.rank(crop))
    assert "Only for crops whose file name tells it" in markup.camera_text(None)


def test_links_out_of_the_gallery_are_not_shown(tmp_path, embed):
    secret = save_blocks(tmp_path / "elsewhere" / "secret.png", seed=50)
    folder = make_crops(tmp_path / "crops", 6)
    (folder / "link.png").symlink_to(secret)
    (folder / "inside.png").symlink_to(folder / "no camera.png")
    finder = make_finder(folder, embed, tmp_path / "i", top=100)
    crop = finder.read(save_blocks(tmp_path / "photo.png", seed=51))
    found = finder.rank(crop)
    assert found.left_out == {OUTSIDE: 1}
    assert "inside.png" in names(found) and "link.png" not in names(found)
    # A folder that is named through a link is one like any other.
    (tmp_path / "linked").symlink_to(folder)
    finder = make_finder(tmp_path / "linked", embed, tmp_path / "j", top=100)
    assert len(finder.rank(crop).places) == 7


def test_an_index_whose_images_lie_under_no_known_folder(tmp_path, embed):
    """As one from elsewhere might: it shows none of them."""
    save_blocks(tmp_path / "elsewhere" / "secret.png", seed=50)
    finder = make_finder(tmp_path / "elsewhere", embed, tmp_path / "i")
    with finder.open_gallery() as gallery:
        gallery.base.execute("UPDATE roots SET path = ?", [b"/usr"])
        gallery.base.commit()
    found = finder.rank(finder.read(save_blocks(tmp_path / "photo.png", seed=51)))
    assert found.places == [] and found.left_out == {OUTSIDE: 1}
    assert "No image is left to be shown" in markup.summary(found, 0.5, False)


def test_what_is_gone_or_changed_is_not_shown(finder, tmp_path):
    crop = finder.read(save_blocks(tmp_path / CROP, seed=50))
    first, second, *_ = finder.rank(crop).places
    Path(first.hit.path).unlink()
    save_blocks(Path(second.hit.path), seed=99, size=(50, 90))
    assert not {first.hit.path, second.hit.path} & {p.hit.path for p in finder.rank(crop).places}
    for place in (first, second):
        with pytest.raises(UserError, match="is gone or has changed; search again"):
            finder.explain(crop, place)


@pytest.mark.parametrize("size", ["enlarged", "center"])
def test_explanation_is_that_of_the_two_files(size, run, tmp_path):
    embed = Embedder(run, device="cpu", precision="fp32", test_size=size)
    finder = make_finder(make_crops(tmp_path / "crops"), embed, tmp_path / "crops.index")
    path = save_blocks(tmp_path / CROP, seed=50, size=(61, 117))
    crop = finder.read(path)
    ranking = finder.rank(crop)
    why = finder.explain(crop, ranking.places[2])
    expected = embed.explain(path, ranking.places[2].hit.path)
    assert why.similarity == pytest.approx(ranking.places[2].hit.similarity, abs=1e-4)
    np.testing.assert_allclose(why.maps, expected.maps, atol=1e-6)
    html = markup.pair(crop, ranking, 2, why)
    assert f"Why rank 3 is at {why.similarity:.3f}" in html
    assert html.count("<img") == html.count('alt="') == 5


def test_several_at_once_find_what_one_finds(finder, tmp_path):
    paths = [save_blocks(tmp_path / "up" / f"{n}.png", seed=60 + n) for n in range(10)]
    alone = [names(finder.rank(finder.read(path), rerank=True)) for path in paths]
    with ThreadPoolExecutor(10) as pool:
        together = list(
            pool.map(lambda path: names(finder.rank(finder.read(path), rerank=True)), paths)
        )
    assert together == alone


def bad_files(folder):
    """Files that are no images, by name."""
    folder.mkdir()
    image = save_image(folder / "whole.png", seed=1)
    content = image.read_bytes()
    image.unlink()
    for name, some in {
        "broken.png": content[: len(content) // 2],
        "text.jpg": b"no image",
        "empty.jpg": b"",
        "film.jpg": b"\0\0\0\x18ftypisom",
        "<b>&.png": b"\x89PNG\r\n\x1a\n",
        "page.html": b"<script>alert(1)</script>",
        "drawing.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "drawing.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    }.items():
        (folder / name).write_bytes(some)
    Image.new("1", (10_000, 10_000)).save(folder / "bomb.png")
    return sorted(folder.iterdir())


def test_uploads_that_are_no_images(finder, tmp_path, monkeypatch):
    for path in bad_files(tmp_path / "bad"):
        with pytest.raises(UserError) as caught:
            finder.read(path)
        message = str(caught.value)
        assert "can't be read as an image" in message and len(message.splitlines()) == 1
        assert str(tmp_path) not in message
    with pytest.raises(UserError, match=r"^gone\.png: can't be read"):
        finder.read(tmp_path / "gone.png")
    monkeypatch.setattr(finding, "MOST_BYTES", 100)
    with pytest.raises(UserError, match=r"^photo\.png: has more than"):
        finder.read(save_blocks(tmp_path / "photo.png", seed=1))


# --- what is said -------------------------------------------------------------------------------


def ramp(top):
    """A curve of rates that falls from `top` to 0."""
    return np.linspace(top, 0, 201).tolist()


STORED = {"threshold": 0.79626, "false_match_rate": 0.001, "true_match_rate": 0.2}
STORED |= {"impostors": 100_000, "made_by": {}, "queries": "val"}


@pytest.mark.parametrize(
    ("stored", "threshold", "says"),
    [
        (STORED, 0.79626, "0.1 % of image pairs of different people reach this"),
        (STORED, 0.79626, "and 20 % of image pairs of the same person"),
        (STORED, 0.79626, "of people that the network was trained on"),
        (STORED, 0.5, "unknown: only the rate at 0.7963 is stored"),
        (STORED | {"curves": {"false_match": ramp(1)}}, 0.5, "25 % of image pairs of different"),
        (STORED | {"curves": {"false_match": ramp(1)}}, 0.505, "24.8 % of image pairs of"),
        (STORED | {"curves": {"false_match": ramp(1)}}, 1.0, "Under 0.01 % of image pairs"),
        (None, 0.5, "unknown: no threshold is calibrated"),
    ],
)
def test_rates_at_the_slider(stored, threshold, says):
    assert says in markup.rate_text(stored, threshold)


def test_slider_stands_at_the_stored_threshold():
    """It has fewer digits; what is marked doesn't change by that."""
    actions = page.Actions(None, None, STORED)
    assert actions.exact(0.796) == 0.79626
    assert actions.exact(0.797) == 0.797
    assert page.Actions(None, None, None).exact(0.797) == 0.797
    assert "0.1 % of image pairs" in actions.rate(0.796)


def test_marks_and_names(finder, tmp_path):
    crop = finder.read(save_blocks(tmp_path / "<i>&.png", seed=50))
    ranking = finder.rank(crop)
    at = ranking.places[1].hit.similarity
    html = markup.ranking_list(ranking, at, chosen=2)
    assert html.count("same person") == html.count('class="same"') == 2
    assert html.count('aria-pressed="true"') == 1
    assert html.count("<img") == html.count('alt="rank ') == 5
    assert markup.summary(ranking, at, False).startswith('<p class="summary">2 of the first 5')
    assert "None of the first 5" in markup.summary(ranking, 1.1, True)
    card = markup.crop_card(crop)
    assert "<i>" not in card and "&lt;i&gt;&amp;.png" in card
    assert markup.problem("<b>\n") == '<p class="problem" role="alert">&lt;b&gt;\\n</p>'


# --- mistakes on the command line ---------------------------------------------------------------


@pytest.mark.slow
def test_mistakes_get_one_line(run, tmp_path, monkeypatch, capsys):
    pytest.importorskip("gradio")
    monkeypatch.chdir(tmp_path)
    make_crops(tmp_path / "crops", 3)
    Path("empty").mkdir()
    of_run = ("--model_dir", run.parent, "--name", run.name, *CPU)
    with socket.socket() as taken:
        taken.bind((page.HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        for flags, says in [
            (of_run, "--gallery or --index: name what to search"),
            ((*of_run, "--index", "none"), "none: no such index; name a folder with --gallery"),
            ((*of_run, "--gallery", "none"), "none: no such folder"),
            ((*of_run, "--gallery", "empty"), "empty: no images in it"),
            ((*of_run, "--gallery", "crops", "--port", port), f"--port {port}: Address already"),
            ((*of_run, "--gallery", "crops", "--port", 70000), "--port: 70000 is over 65535"),
            ((*of_run, "--gallery", "crops", "--top", 1000), "--top: 1000 is over 100"),
            (("--name", "none", "--gallery", "crops", *CPU), "none"),
        ]:
            assert exit_code(page.main, *flags) == 2
            err = capsys.readouterr().err
            assert says in err and len(err.splitlines()) == 1, err
    assert sorted(os.listdir()) == ["crops", "empty"]


def test_without_gradio(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert exit_code(page.main, "--gallery", tmp_path) == 2
    assert capsys.readouterr().err == "error: page.py: needs gradio; pip install gradio\n"


def test_index_of_an_older_version(run, embed, tmp_path, monkeypatch, capsys):
    pytest.importorskip("gradio")
    finder = make_finder(make_crops(tmp_path / "crops", 3), embed, tmp_path / "i")
    with finder.open_gallery() as gallery:
        gallery.base.execute("DROP TABLE roots")
        gallery.base.commit()
    flags = ("--model_dir", run.parent, "--name", run.name, *CPU, "--index", tmp_path / "i")
    assert exit_code(page.main, *flags, "--port", free_port()) == 2
    assert "of an older version; name its folder with --gallery" in capsys.readouterr().err


def test_variables_of_gradio_open_nothing(tmp_path, monkeypatch):
    pytest.importorskip("gradio")
    for name in ("GRADIO_SHARE", "GRADIO_ALLOWED_PATHS", "GRADIO_SERVER_NAME", "GRADIO_TEMP_DIR"):
        monkeypatch.setenv(name, "/")
    for name in ("GRADIO_ANALYTICS_ENABLED", "HF_HUB_OFFLINE", "NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "x")
    page.import_gradio(tmp_path / "uploads")
    found = {name: os.environ[name] for name in os.environ if name.startswith("GRADIO_")}
    assert found == {
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_TEMP_DIR": str(tmp_path / "uploads"),
    }


# --- a server -----------------------------------------------------------------------------------

# Says on standard error what connects to, or asks for, another computer.
WATCHED = """
import sys
root, *sys.argv[1:] = sys.argv[1:]
sys.path.insert(0, root)
def watch(event, what):
    if event in ("socket.connect", "socket.getaddrinfo") and "127.0.0.1" not in str(what):
        print("outside:", event, what, file=sys.stderr, flush=True)
sys.addaudithook(watch)
import page
from reid.errors import run
run(page.main)
"""


def free_port():
    with socket.socket() as some:
        some.bind((page.HOST, 0))
        return some.getsockname()[1]


class Server:
    """page.py as a process, on crops of its own."""

    def __init__(self, run, folder):
        self.folder, self.port = folder, free_port()
        self.crops = make_crops(folder / "crops")
        self.secret = folder / "secret.txt"
        self.secret.write_text("top secret")
        (folder / "tmp").mkdir()
        flags = ("--model_dir", run.parent, "--name", run.name, *CPU, "--port", self.port)
        flags = (*flags, "--gallery", self.crops, "--top", 6)
        self.errors = (folder / "errors").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-c", WATCHED, ROOT, *map(str, flags)],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=os.environ | {"TMPDIR": str(folder / "tmp"), "OMP_NUM_THREADS": "1"},
        )
        lines = iter(self.process.stdout.readline, "")
        assert any("has the page" in line for line in lines), self.said()

    def said(self):
        self.errors.seek(0)
        return self.errors.read()

    def get(self, path, headers=None, data=None, timeout=60):
        """Return status and content of an address."""
        url = f"http://{page.HOST}:{self.port}{path}"
        request = urllib.request.Request(url, data, headers or {})
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def upload(self, name, content):
        """Send a file as the browser does; returns status and answer."""
        head = f'--cut\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n'
        body = f"{head}Content-Type: image/png\r\n\r\n".encode() + content + b"\r\n--cut--\r\n"
        kind = {"Content-Type": "multipart/form-data; boundary=cut"}
        return self.get("/gradio_api/upload", kind, body)

    def act(self, number, data, session, event=None):
        """Have an action of the page done; returns what it shows, or None where it fails."""
        body = {"data": data, "fn_index": number, "session_hash": session, "event_data": event}
        kind = {"Content-Type": "application/json"}
        status, _ = self.get("/gradio_api/queue/join", kind, json.dumps(body).encode())
        if status != 200:
            return None
        _, stream = self.get(f"/gradio_api/queue/data?session_hash={session}")
        messages = [json.loads(line[6:]) for line in stream.decode().splitlines() if line]
        [done] = [message for message in messages if message["msg"] == "process_completed"]
        return done["output"]["data"] if done["success"] else None

    def search(self, name, content, session):
        """Upload a file and search for it; returns what is shown."""
        status, paths = self.upload(name, content)
        assert status == 200
        return self.act(UPLOAD, [as_file(json.loads(paths)[0]), False, False, 0.5], session)


UPLOAD, RERANK, CAMERAS, MARK, EXPLAIN = range(5)  # in the order in which the page has them


def as_file(path):
    return {"path": path, "orig_name": "a.png", "meta": {"_type": "gradio.FileData"}}


@pytest.fixture(scope="module")
def server(run, tmp_path_factory):
    pytest.importorskip("gradio")
    started = Server(run, tmp_path_factory.mktemp("server"))
    yield started
    started.process.kill()
    started.process.wait()


@pytest.mark.slow
def test_a_server_answers_and_shows_no_file(server):
    status, start = server.get("/")
    assert status == 200 and b"googleapis" not in start
    secret, crop = str(server.secret), str(next(server.crops.glob("*.png")))
    inside = os.path.relpath(crop, server.folder)
    for path in [
        *(f"/gradio_api/file={name}" for name in (secret, crop, inside, "/etc/passwd")),
        *(f"/file={name}" for name in (secret, crop, "/etc/passwd", "page.py", "../secret.txt")),
        f"/gradio_api/file={server.folder}/tmp/../secret.txt",
        f"/gradio_api/file={server.folder}/tmp/%2e%2e/secret.txt",
        *(f"/{room}/../../../../../../{secret}" for room in ("static", "assets", "svelte")),
        *(f"/{room}/%2e%2e/%2e%2e/%2e%2e/%2e%2e{secret}" for room in ("static", "assets")),
        f"/gradio_api/proxy=file://{secret}",
        f"/gradio_api/custom_component/1/client/component/..%2f..%2f..%2f..{secret}",
        f"/static//{secret}",
        "/monitoring",
        "/gradio_api/runs",
    ]:
        status, answer = server.get(path)
        assert status >= 400, (path, status)
        assert b"top secret" not in answer and b"root:" not in answer and b"PNG" not in answer[:8]
    # Nor a name that is ours by another site's doing, in a browser on this computer.
    assert server.get("/", {"Host": "evil.example"})[0] == 400
    assert server.get("/config", {"Host": "evil.example"})[0] == 400


@pytest.mark.slow
def test_no_file_can_be_searched_for_that_was_not_uploaded(server):
    crop = str(next(server.crops.glob("*.png")))
    link = server.folder / "tmp" / "link.png"
    link.symlink_to(crop)
    for number, path in enumerate(
        [
            crop,
            str(server.secret),
            str(link),
            "/etc/passwd",
            "../secret.txt",
            "http://127.0.0.1:9/a",
        ]
    ):
        shown = server.act(UPLOAD, [as_file(path), False, False, 0.5], f"not_uploaded_{number}")
        assert shown is None, path
    assert server.search("fine.png", Path(crop).read_bytes(), "fine") is not None


def test_addresses_are_not_fetched():
    """Gradio's own way refuses those of this computer alone."""
    gradio = pytest.importorskip("gradio")
    component = gradio.File()
    page.refuse_addresses(component)
    with pytest.raises(ValueError, match="a web address is no uploaded file"):
        asyncio.run(component.async_move_resource_to_block_cache("https://example.org/a.png"))


@pytest.mark.slow
def test_odd_uploads_get_a_sentence(server, tmp_path):
    for number, path in enumerate(bad_files(tmp_path / "bad")):
        shown = server.search(path.name, path.read_bytes(), f"odd_{number}")
        if shown is None:  # Gradio itself refuses a suffix that is no image's
            assert path.suffix in (".html", ".eps")
            continue
        assert "can&#x27;t be read as an image" in shown[5]
        assert "server" not in shown[5], "where the upload lies is nobody's business"
    content = save_blocks(tmp_path / "a.png", seed=3).read_bytes()
    for number, name in enumerate(
        [
            "../../a.png",
            "..%2fa.png",
            "/etc/a.png",
            "ü ☃.png",
            "a" * 300 + ".png",
            ".png",
            "a'b;c.png",
        ]
    ):
        status, paths = server.upload(name, content)
        if status != 200:
            assert status < 500
            continue
        [path] = json.loads(paths)
        assert Path(path).resolve().is_relative_to(server.folder / "tmp")
        server.act(UPLOAD, [as_file(path), False, False, 0.5], f"name_{number}")
    assert server.upload("big.png", bytes(finding.MOST_BYTES + 1))[0] == 413
    # It has gone on.
    shown = server.search("0001_c2s1_000001_00.png", content, "after")
    assert shown[6].count("<li>") == 6


@pytest.mark.slow
def test_values_that_no_browser_sends(server, tmp_path):
    content = save_blocks(tmp_path / "a.png", seed=4).read_bytes()
    assert server.search("0001_c2s1_000001_00.png", content, "odd_values")[6].count("<li>") == 6
    for event in [None, {}, [], {"place": -1}, {"place": 6}, {"place": "0"}, {"place": None}]:
        _, shown = server.act(EXPLAIN, [None], "odd_values", event)
        assert "There is no such image" in shown
    for event in [{"place": 1.5}, {"place": [0]}, {"place": {}}, {"place": "/etc/passwd"}]:
        _, shown = server.act(EXPLAIN, [None], "odd_values", event)
        assert "There is no such image" in shown
    _, shown = server.act(EXPLAIN, [None], "odd_values", {"place": 0})
    assert "Why rank 1 is at" in shown
    for data in [["x", None, None], [None] * 3, [5.0, None, None], [], [{}, None, 10**9]]:
        server.act(MARK, data, "odd_values")
    assert server.act(MARK, [0.5, None, None], "odd_values")[1].count("<li>") == 6
    # Another's crop is not to be had.
    _, shown = server.act(EXPLAIN, [None], "another", {"place": 0})
    assert "There is no such image" in shown


@pytest.mark.slow
def test_ten_at_once(server, tmp_path):
    contents = [
        save_blocks(tmp_path / f"{n}.png", seed=70 + n // 2).read_bytes() for n in range(10)
    ]

    def ask(number):
        shown = server.search(f"{number}.png", contents[number], f"at_once_{number}")
        return re.sub(r"data:[^\"]*", "", shown[6])

    with ThreadPoolExecutor(10) as pool:
        together = list(pool.map(ask, range(10)))
    assert all(html.count("<li>") == 6 for html in together)
    assert together[::2] == together[1::2]  # two each have sent the same file
    assert len(set(together)) > 1


@pytest.mark.slow
def test_ctrl_c_ends_it_and_nothing_is_left(run, tmp_path):
    pytest.importorskip("gradio")
    started = Server(run, tmp_path)
    content = save_blocks(tmp_path / "a.png", seed=3).read_bytes()
    assert started.search("a.png", content, "one") is not None
    assert os.listdir(tmp_path / "tmp") != []
    threading.Timer(0.2, started.process.send_signal, [signal.SIGINT]).start()
    started.process.wait(60)
    assert started.process.returncode == 130
    lines = [line for line in started.said().splitlines() if "image/s" not in line]
    assert lines == ["interrupted"]
    assert os.listdir(tmp_path / "tmp") == []


# --- a browser ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("no chromium here; on Debian: apt-get install chromium")
    with api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def tab(browser, server, request):
    """An open page of this width, which asks nothing of anybody else."""
    opened = browser.new_page(viewport={"width": request.param, "height": 800})
    asked = []
    opened.on("request", lambda one: asked.append(one.url))
    opened.on("pageerror", lambda error: asked.append(f"error: {error}"))
    opened.goto(f"http://{page.HOST}:{server.port}/")
    opened.wait_for_selector("#summary .start", timeout=60_000)
    yield opened
    own = (f"http://{page.HOST}:{server.port}/", "data:", "blob:")
    assert asked and [url for url in asked if not url.startswith(own)] == []
    opened.close()


@pytest.mark.slow
@pytest.mark.parametrize("tab", [1280, 390], indirect=True)
def test_a_person_searches(tab, server, tmp_path):
    crop = save_blocks(tmp_path / CROP, seed=50)
    assert tab.locator("h1").inner_text() == markup.TITLE
    box = tab.get_by_label("Leave out the crop's own camera")
    assert box.is_disabled()
    drop(tab, crop)
    buttons = tab.locator(".places button")
    buttons.nth(5).wait_for(timeout=60_000)
    assert buttons.count() == 6
    assert "None of the first 6" in tab.locator("#summary").inner_text()  # not calibrated: 1
    similarities = [float(text) for text in tab.locator(".places b").all_inner_texts()]
    assert similarities == sorted(similarities, reverse=True)
    assert tab.locator("#crop").inner_text().startswith(f"{CROP}\ncamera 1")
    # The threshold
    slider = tab.get_by_role("slider")
    slider.fill("0")
    tab.get_by_text("6 of the first 6").wait_for(timeout=60_000)
    assert tab.locator(".verdict").all_inner_texts() == ["same person"] * 6
    assert "unknown" in tab.locator("#rate").inner_text()
    # A pair, opened with the keyboard
    buttons.nth(1).focus()
    tab.keyboard.press("Enter")
    tab.get_by_role("heading", name="Why rank 2 is at").wait_for(timeout=60_000)
    assert buttons.nth(1).get_attribute("aria-pressed") == "true"
    assert tab.evaluate("document.activeElement.dataset.place") == "1"
    images = tab.locator("#pair img")
    assert images.count() == 5 and images.nth(0).get_attribute("alt") == "your crop"
    assert tab.evaluate("document.querySelector('#pair img').naturalWidth") > 20
    slider.fill("0.5")  # the ranking is drawn anew, the chosen image stays so
    tab.get_by_text("of the first 6").wait_for(timeout=60_000)
    tab.wait_for_timeout(500)
    assert buttons.nth(1).get_attribute("aria-pressed") == "true"
    # The other choices
    box.check()
    tab.get_by_text("of the crop's own camera").wait_for(timeout=60_000)
    assert not any("_c1s" in name for name in tab.locator(".file").all_inner_texts())
    tab.get_by_label("Re-rank").check()
    tab.get_by_text("Re-ranked.").wait_for(timeout=60_000)
    # A broken file, then a whole one
    (tmp_path / "broken.png").write_bytes(b"no image")
    drop(tab, tmp_path / "broken.png")
    tab.get_by_role("alert").wait_for(timeout=60_000)
    assert "broken.png: can't be read as an image" in tab.locator("#summary").inner_text()
    assert buttons.count() == 0
    drop(tab, save_blocks(tmp_path / "photo.png", seed=51))
    buttons.nth(5).wait_for(timeout=60_000)
    assert box.is_disabled()
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def drop(tab, path):
    """Drop a file on the page, as a mouse does."""
    content = tab.evaluate_handle(
        """([bytes, name]) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], name, {type: 'image/png'}));
            return data;
        }""",
        [list(path.read_bytes()), path.name],
    )
    tab.locator("#upload button").first.dispatch_event("drop", {"dataTransfer": content})


@pytest.mark.slow
@pytest.mark.parametrize("tab", [1280], indirect=True)
def test_order_of_the_keyboard(tab, tmp_path):
    drop(tab, save_blocks(tmp_path / CROP, seed=50))
    tab.locator(".places button").nth(5).wait_for(timeout=60_000)
    tab.locator("body").click(position={"x": 2, "y": 2})
    met = []
    for _ in range(12):
        tab.keyboard.press("Tab")
        met.append(
            tab.evaluate(
                "((e) => e.dataset.place ?? e.type + ' ' + (e.ariaLabel ?? ''))"
                "(document.activeElement)"
            )
        )
    # Upload; re-rank, leave out; the threshold as a number, its reset, its slider; the places.
    kinds = [text.partition(" ")[0] for text in met[:6]]
    assert kinds == ["submit", "checkbox", "checkbox", "number", "submit", "range"], met
    assert met[6:] == [str(place) for place in range(6)], met


@pytest.mark.slow
def test_the_server_asked_nobody_else(server):
    """Last: what all tests above had it do."""
    assert "outside:" not in server.said()
