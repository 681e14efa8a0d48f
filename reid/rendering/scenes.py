"""The cameras of the rendered stand-in, their surroundings, and the pictures that they take.

Projects and lights the point clouds of people.py, and draws backgrounds and obstacles.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from reid.rendering.people import COLOURS, SCENE, SPACING, stream, unit

WIDTH, HEIGHT = 64, 128  # pixels of a picture
OVER = 2  # supersampling
SCENE_W, SCENE_H = 640, 300  # a camera's whole background, in pixels of the final pictures
AIM = 0.9  # metres above the ground at which a camera points


@dataclass(frozen=True)
class Camera:
    """A camera's position, its view, and its effect on pictures. Colours are RGB."""

    pitch: float  # degrees downwards
    distance: float  # metres
    headings: tuple  # of the people, degrees; 0: towards the camera, 90: to the right
    sun: tuple  # direction to the light: right, up, towards the camera
    ambient: tuple
    direct: tuple
    gain: tuple  # white balance
    gamma: float
    contrast: float
    saturation: float
    lift: float  # haze, added to black
    blur: float  # pixels
    resolution: float  # the sensor's pixels along a side, as a fraction of the picture's
    noise: float
    quality: int  # JPEG
    ground: str
    ground_rgb: tuple
    backdrop: str
    backdrop_rgb: tuple
    popularity: float  # how many people pass


def project(points: np.ndarray, camera: Camera) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Project world points [N, 3]: picture x [N] and y [N], and the points in the view [N, 3].

    Picture coordinates are in metres from the aim, y down. The view's axes: x to the right, y up, z
    towards the camera, which is at (0, 0, distance).
    """
    tilt = math.radians(camera.pitch)
    cos, sin = math.cos(tilt), math.sin(tilt)
    y, z = points[:, 1] - AIM, points[:, 2]
    view = np.stack([points[:, 0], y * cos - z * sin, z * cos + y * sin], 1)
    zoom = camera.distance / (camera.distance - view[:, 2])
    return view[:, 0] * zoom, -view[:, 1] * zoom, view


def draw_body(
    points: np.ndarray, normals: np.ndarray, colours: np.ndarray, camera: Camera, box: tuple
) -> np.ndarray:
    """Draw a body into a box (left, top, width, height; picture metres): RGBA [H, W, 4]."""
    wide, high = WIDTH * OVER, HEIGHT * OVER
    x, y, view = project(points, camera)
    px, py = (x - box[0]) * (wide / box[2]), (y - box[1]) * (high / box[3])
    tilt = math.radians(camera.pitch)
    eye = np.float32([0, AIM + camera.distance * math.sin(tilt), camera.distance * math.cos(tilt)])
    facing = normals @ eye > np.einsum("ij,ij->i", normals, points)
    side = max(2, math.ceil(SPACING * 1.8 * high / box[3]))  # of a point's square: leaves no holes
    inside = (px >= 0) & (py >= 0) & (px < wide - side + 1) & (py < high - side + 1)
    seen = np.flatnonzero(facing & inside)
    # far to near, so that the nearest is written last; numpy's stable sort is fast for 16 bits
    near = ((view[seen, 2] + 4) * 8000).clip(0, 65535).astype(np.uint16)
    order = seen[np.argsort(near, kind="stable")]
    spots = py[order].astype(np.int32) * wide + px[order].astype(np.int32)
    owner = np.zeros(wide * high, np.int32)
    cover = spots[:, None] + (np.arange(side) + wide * np.arange(side)[:, None]).ravel()
    owner[cover] = np.arange(1, len(order) + 1, dtype=np.int32)[:, None]
    normals = normals.take(order, 0)  # take and matmul: several times as fast as plain indexing
    lit = (normals @ unit(camera.sun).astype(np.float32)).clip(0)
    light = np.stack([lit, 0.8 + 0.2 * normals[:, 1]], 1)  # from the sun and from the sky
    rgba = np.zeros((len(order) + 1, 4), np.float32)
    rgba[1:, :3] = colours.take(order, 0) * (light @ np.float32([camera.direct, camera.ambient]))
    rgba[1:, 3] = 1
    big = rgba.take(owner, 0).reshape(HEIGHT, OVER, WIDTH, OVER, 4)
    return sum(big[:, i, :, j] for i in range(OVER) for j in range(OVER)) / OVER**2


def draw_shadow(points: np.ndarray, camera: Camera, box: tuple) -> np.ndarray:
    """Draw the body's shadow on the ground in the box: darkness [H, W, 1] in [0, 1]."""
    sun = unit(camera.sun)
    x, y, _ = project(points[::5] - points[::5, 1:2] * (sun / sun[1]), camera)
    px = ((x - box[0]) * (WIDTH / box[2])).astype(int)
    py = ((y - box[1]) * (HEIGHT / box[3])).astype(int)
    inside = (px >= 0) & (py >= 0) & (px < WIDTH) & (py < HEIGHT)
    counts = np.bincount(py[inside] * WIDTH + px[inside], minlength=WIDTH * HEIGHT)
    mask = Image.fromarray((counts.clip(0, 2) * 127).astype(np.uint8).reshape(HEIGHT, WIDTH))
    return np.asarray(mask.filter(ImageFilter.BoxBlur(1.6)), np.float32)[..., None] / 255


@functools.lru_cache
def tone_curve(camera):
    """Return gamma, contrast and haze as a table for `Image.point`."""
    tone = (np.arange(256) / 255) ** camera.gamma
    tone = (tone - 0.5) * camera.contrast + 0.5 + camera.lift
    return [round(t) for t in 255 * tone.clip(0, 1)] * 3


def develop(
    rgb: np.ndarray, camera: Camera, mood: np.ndarray, rng: np.random.Generator
) -> Image.Image:
    """Add the effects of lens and sensor to RGB [H, W, 3] in [0, 1]; return an image.

    mood: the weather's effect on the light, RGB [3].
    """
    rgb = rgb * (np.float32(camera.gain) * mood)
    grey = (rgb @ np.full(3, 1 / 3, np.float32))[..., None]
    rgb = grey + camera.saturation * (rgb - grey)
    rgb += rng.standard_normal(rgb.shape, np.float32) * camera.noise
    picture = Image.fromarray((rgb * 255).clip(0, 255).astype(np.uint8))
    picture = picture.point(tone_curve(camera))
    size = (round(WIDTH * camera.resolution), round(HEIGHT * camera.resolution))
    picture = picture.resize(size, Image.Resampling.BILINEAR)
    picture = picture.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    return picture.filter(ImageFilter.BoxBlur(camera.blur))


def mottle(rng, patches, strength):
    """Draw smooth noise around 1, so many patches wide: [SCENE_H, SCENE_W, 1]."""
    small = rng.uniform(-1, 1, (patches // 2, patches)).astype(np.float32)
    big = Image.fromarray(small).resize((SCENE_W, SCENE_H), Image.Resampling.BICUBIC)
    return 1 + strength * np.asarray(big)[..., None]


@functools.lru_cache
def make_scene(seed: int, number: int, camera: Camera) -> tuple[Image.Image, int]:
    """Draw the background of camera `number`: (image, row where the backdrop meets the ground)."""
    rng = stream(seed, SCENE, number)
    wide, high = SCENE_W * 2, SCENE_H * 2
    base = int(high * np.interp(camera.pitch, [5, 30], [0.5, 0.2]))
    horizon = base - int(high * np.interp(camera.pitch, [5, 30], [0.25, 0.6]))
    picture = Image.new("RGB", (wide, high), camera.ground_rgb)
    draw = ImageDraw.Draw(picture)
    paint_ground(draw, camera, rng, base, horizon)
    paint_backdrop(draw, camera, rng, base)
    small = picture.resize((SCENE_W, SCENE_H), Image.Resampling.LANCZOS)
    rgb = np.array(small, np.float32)
    for patches, strength in ((8, 0.2), (40, 0.1), (200, 0.07)):
        rgb *= mottle(rng, patches, strength)
    rgb *= np.float32(camera.ambient) + 0.7 * np.float32(camera.direct)
    return Image.fromarray(rgb.clip(0, 255).astype(np.uint8)), base // 2


def shade(rgb, factor):
    """Make an RGB tuple darker or lighter."""
    return tuple(min(255, int(c * factor)) for c in rgb)


def paint_ground(draw, camera, rng, base, horizon):
    """Paint paving, lawn, road, zebra crossing or plain snow, from the row `base` down."""
    wide, high, rgb = SCENE_W * 2, SCENE_H * 2, camera.ground_rgb

    def at(x, y):
        """Return the point of row y on the line from x on the lower edge to the vanishing point."""
        return wide / 2 + (x - wide / 2) * (y - horizon) / (high - horizon), y

    if camera.ground in ("tiles", "zebra"):
        for x in range(-3 * wide, 4 * wide, 110):
            draw.line([at(x, base), (x, high)], shade(rgb, 0.82), 3)
        for i in range(60):
            y = horizon + (high - horizon) / (1 + 0.11 * i)
            draw.line([(0, y), (wide, y)], shade(rgb, 0.82), 3)
    if camera.ground == "zebra":
        for x in range(-2 * wide, 3 * wide, 260):
            stripe = [at(x, base + 60), (x, high), (x + 130, high), at(x + 130, base + 60)]
            draw.polygon(stripe, (190, 190, 186))
    if camera.ground == "lawn":
        for x, y in rng.uniform((0, base), (wide, high), (4000, 2)):
            blade = (x + rng.uniform(-4, 4), y - rng.uniform(4, 12))
            draw.line([(x, y), blade], shade(rgb, rng.uniform(0.75, 1.2)), 2)
        path = [(0, base + 130), (wide, base + 90), (wide, base + 230), (0, base + 280)]
        draw.polygon(path, (160, 154, 142))
    if camera.ground == "asphalt":
        for x in range(-wide, 2 * wide, 420):
            draw.line([at(x, base), (x, high)], shade(rgb, 1.4), 8)


def paint_backdrop(draw, camera, rng, base):
    """Paint shops, a hedge, bricks, cars, railings, tents or lit windows above the row `base`."""
    wide, rgb = SCENE_W * 2, camera.backdrop_rgb

    def any_colour():
        return list(COLOURS.values())[rng.integers(len(COLOURS))]

    draw.rectangle([0, 0, wide, base], rgb)
    if camera.backdrop == "shop":
        for x in range(0, wide, 150):
            draw.rectangle([x + 8, 30, x + 142, base - 26], shade(rgb, rng.uniform(0.4, 1)))
            draw.polygon([(x + 20, 30), (x + 60, 30), (x + 20, base - 60)], shade(rgb, 1.3))
            y = rng.uniform(60, base - 90)
            draw.rectangle([x + 30, y, x + rng.uniform(60, 130), y + 60], any_colour())
    elif camera.backdrop == "hedge":
        for x, y in rng.uniform((0, -10), (wide, base), (2600, 2)):
            r = rng.uniform(4, 14)
            draw.ellipse([x - r, y - r, x + r, y + r], shade(rgb, rng.uniform(0.55, 1.5)))
    elif camera.backdrop == "brick":
        for row, y in enumerate(range(0, base, 16)):
            for x in range(-30 + row % 2 * 18, wide, 36):
                draw.rectangle([x, y, x + 33, y + 13], shade(rgb, rng.uniform(0.8, 1.15)))
        for x in range(60, wide, 320):
            draw.rectangle([x, 0, x + 110, base - 70], (70, 80, 92), (190, 190, 186), 6)
    elif camera.backdrop == "cars":
        for x in range(-60, wide, 310):
            glass, body = [x + 40, base - 95, x + 210, base - 30], [x, base - 60, x + 260, base - 6]
            draw.rounded_rectangle(glass, 26, (40, 46, 54))
            draw.rounded_rectangle(body, 22, any_colour())
            for wheel in (x + 50, x + 210):
                draw.ellipse([wheel - 22, base - 30, wheel + 22, base + 14], (26, 26, 28))
    elif camera.backdrop == "rails":
        draw.rectangle([0, 0, wide, base - 60], (126, 140, 118))
        for x in range(0, wide, 46):
            draw.line([(x, base - 80), (x, base)], (190, 192, 190), 6)
        for y in (base - 76, base - 40):
            draw.line([(0, y), (wide, y)], (206, 208, 204), 7)
    elif camera.backdrop == "windows":
        for x in range(10, wide, 92):
            for y in range(-30, base - 40, 74):
                light = (236, 202, 128) if rng.random() < 0.4 else shade(rgb, 0.55)
                draw.rectangle([x, y, x + 58, y + 48], light, shade(rgb, 1.5), 4)
    elif camera.backdrop == "tents":
        draw.rectangle([0, 0, wide, base], (132, 128, 132))
        for x in range(-40, wide, 210):
            cloth = rgb if rng.random() < 0.5 else any_colour()
            draw.polygon([(x, 70), (x + 95, 10), (x + 190, 70)], cloth)
            draw.rectangle([x, 70, x + 190, 92], shade(cloth, 0.75))
            draw.line([(x + 8, 90), (x + 8, base)], (210, 210, 210), 5)
            draw.rectangle([x + 24, base - 70, x + 166, base], any_colour())


def crop_scene(scene: Image.Image, spot: tuple, zoom: float, box: tuple, feet: tuple) -> np.ndarray:
    """Crop the background of a box: RGB [H, W, 3] in [0, 1].

    spot: the scene's pixel where the person stands. feet: the same point in picture metres.
    zoom: the scene's pixels per metre.
    """
    wide, high = min(box[2] * zoom, SCENE_W), min(box[3] * zoom, SCENE_H)
    left = np.clip(spot[0] + (box[0] - feet[0]) * zoom, 0, SCENE_W - wide)
    top = np.clip(spot[1] + (box[1] - feet[1]) * zoom, 0, SCENE_H - high)
    part = (left, top, left + wide, top + high)
    crop = scene.resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR, part)
    return np.asarray(crop, np.float32) / 255


@functools.lru_cache(maxsize=2)
def draw_obstacle(kind: str, colour: tuple, x: int) -> np.ndarray:
    """Draw a pole or a bicycle at the column x (pixels): premultiplied RGBA [H, W, 4]."""
    k = 3
    picture = Image.new("RGBA", (WIDTH * k, HEIGHT * k))
    draw = ImageDraw.Draw(picture)
    x *= k
    if kind == "pole":
        for i, tone in enumerate((0.55, 0.75, 1.0, 0.8)):
            stripe = [x + (i - 2) * k, 0, x + (i - 1) * k, HEIGHT * k]
            draw.rectangle(stripe, shade((150, 152, 150), tone))
    else:
        y, r = (HEIGHT - 21) * k, 17 * k
        back, fore = (x - 22 * k, y), (x + 22 * k, y)
        seat, bar, crank = (x - 12 * k, y - 24 * k), (x + 15 * k, y - 26 * k), (x, y)
        for cx, cy in (back, fore):
            draw.ellipse([cx - r, cy - r, cx + r, cy + r], outline=(24, 24, 26), width=5)
        draw.line([crank, back, seat, crank, bar, seat], colour, 6)
        draw.line([bar, fore], colour, 6)
        for cx, cy in (seat, bar):
            draw.line([(cx - 12, cy - 9), (cx + 14, cy - 9)], (20, 20, 20), 8)
    small = picture.resize((WIDTH, HEIGHT), Image.Resampling.BOX)  # Pillow premultiplies for it
    rgba = np.array(small, np.float32) / 255
    rgba[..., :3] *= rgba[..., 3:]
    return rgba


def over(below: np.ndarray, above: np.ndarray) -> np.ndarray:
    """Lay premultiplied RGBA [H, W, 4] over RGB [H, W, 3]."""
    return below * (1 - above[..., 3:]) + above[..., :3]
