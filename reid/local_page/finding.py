"""Search for the person on an uploaded crop, for several people at once.

    finder = Finder(embed, "people.index", top=10, candidates=1000)
    crop = finder.read("upload.jpg")
    ranking = finder.rank(crop, rerank=True)
    why = finder.explain(crop, ranking.places[0])

A `Finder` may be called from several threads: each call opens a `Gallery` of its own. It shows no
file that is not an image of the index, under one of the folders that were added to the index.
"""

import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from reid.dataset import parse_name
from reid.errors import UserError, printable
from reid.explain import Explanation
from reid.features import Embedder, checked
from reid.files import sha256
from reid.gallery import Gallery, Hit
from reid.images import read_image
from reid.pictures import HEIGHT, WIDTH, picture_of, scaled

MOST_BYTES = 20 * 2**20  # of an uploaded file
SHOWN = 2 * WIDTH, 2 * HEIGHT  # pixels of a picture on the page


class Crop(NamedTuple):
    """An uploaded image. `camera` is the one in its name, or None.

    inputs: what the network gets, see `Embedder.read`. feature: float32 [D]. picture: the image, to
    be shown. size, digest: the file's, by which the same file is known in the gallery.
    """

    name: str
    camera: int | None
    inputs: list[np.ndarray]
    feature: np.ndarray
    picture: Image.Image
    size: int
    digest: str


class Place(NamedTuple):
    """A place in a ranking: a `Hit` and its image, to be shown."""

    hit: Hit
    picture: Image.Image


class Ranking(NamedTuple):
    """The first places, and which images that would be among them were left out: a reason each."""

    places: list[Place]
    left_out: dict[str, int]


ITSELF, CAMERA, OUTSIDE = "the crop itself", "of the crop's camera", "outside of the gallery"


class Finder:
    """Search the gallery in an index file for crops, by one network.

    embed: a `reid.features.Embedder`. top: number of places in a ranking. candidates: how many of
    the most similar images re-ranking re-orders.
    """

    def __init__(self, embed: Embedder, index: str | Path, top: int, candidates: int):
        self.embed, self.index = embed, index
        self.top, self.candidates = top, max(top, candidates)

    def open_gallery(self) -> Gallery:
        """Open the gallery; it belongs to this thread."""
        return Gallery(self.embed.made_by, self.embed.dim, self.index)

    def read(self, path: str | Path) -> Crop:
        """Read an uploaded file. Raises UserError, by its name alone, where it is no image."""
        path = Path(path)
        try:
            size = os.path.getsize(path)
            if size > MOST_BYTES:
                raise UserError(f"{path}: has more than {MOST_BYTES >> 20} MB; make it smaller")
            image = read_image(path)
            digest = sha256(path)
        except OSError as error:
            raise UserError(f"{path.name}: can't be read ({error.strerror})") from error
        except UserError as error:  # where the upload lies is nobody's business
            raise UserError(str(error).replace(printable(path), path.name)) from error
        inputs = self.embed.to_input(image)
        feature = checked(path.name, self.embed.of_batch([inputs])[0])
        if isinstance(feature, UserError):
            raise feature
        picture = scaled(image, *SHOWN)
        return Crop(path.name, camera_of(path), inputs, feature, picture, size, digest)

    def rank(self, crop: Crop, rerank: bool = False, other_cameras: bool = False) -> Ranking:
        """Search for a crop. other_cameras: leave out the images of the crop's own camera.

        As in search.py, the same file in the gallery is left out. Raises UserError where the
        gallery can't be read.
        """
        number = self.candidates if rerank else self.top
        with self.open_gallery() as gallery:
            gallery.check_roots()
            left_out = self.reasons(gallery, crop, other_cameras)
            hits, skipped = nearest(gallery, crop.feature, number, left_out)
            if not all(map(gallery.is_current, hits)):
                gallery.drop_missing()
                hits, skipped = nearest(gallery, crop.feature, number, left_out)
            if rerank:
                hits = gallery.rerank(crop.feature, hits)
        places = [Place(hit, picture_of(hit.path, *SHOWN)) for hit in hits[: self.top]]
        return Ranking(places, dict(Counter(skipped)))

    def reasons(self, gallery, crop, other_cameras):
        """Return a function of a hit: the reason why it is left out of a ranking, or None."""
        roots = [os.path.join(os.fsdecode(root), "") for root, _ in gallery.roots()]

        def reason(hit):
            if is_copy(hit.path, crop):
                return ITSELF
            if other_cameras and crop.camera is not None and camera_of(hit.path) == crop.camera:
                return CAMERA
            # A link among the crops may point anywhere; an index may come from anywhere.
            return None if os.path.realpath(hit.path).startswith(tuple(roots)) else OUTSIDE

        return reason

    def explain(self, crop: Crop, place: Place) -> Explanation:
        """Return why a crop and a place's image are alike.

        Raises UserError where the file has changed by now, or the network has no such maps.
        """
        with self.open_gallery() as gallery:
            if not gallery.is_current(place.hit):
                name = os.path.basename(place.hit.path)
                raise UserError(f"{name}: is gone or has changed; search again")
        return self.embed.explain_inputs(crop.inputs, self.embed.read(place.hit.path))


def nearest(gallery, feature, number, left_out):
    """Return the `number` nearest hits that are not left out, and the reasons of those that are.

    Searches again for more where too many of them are left out.
    """
    wanted = number + 1  # the crop itself may be among them
    while True:
        found = gallery.search(feature[None], wanted)[0]
        hits, reasons = [], []
        for hit in found:
            reason = left_out(hit)
            reasons += [reason] if reason else []
            hits += [] if reason else [hit]
            if len(hits) == number:
                return hits, reasons
        if len(found) < wanted:
            return hits, reasons
        wanted *= 4


def camera_of(path):
    """Return the camera in an image's name; None where there is none."""
    try:
        return parse_name(path)[1]
    except UserError:
        return None


def is_copy(path, crop):
    """Tell whether a file is the one that was uploaded, byte by byte."""
    try:
        return os.path.getsize(path) == crop.size and sha256(path) == crop.digest
    except (OSError, UserError):  # gone by now
        return False
