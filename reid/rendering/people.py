"""The people of the rendered stand-in: who they are, their bodies, how they walk.

A person is a cloud of surface points on tubes between joints: the identity gives them colour and
width, the walk their pose. Every person, tracklet and picture has its own random stream, so that
the order of drawing can't matter.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np

SPACING = 0.0064  # between surface points, in body heights: about 1.5 supersampled pixels
PASSERS_BY = 40  # people who only stand in the way of others
IDENTITY, SCHEDULE, TRACKLET, SHOT, SCENE = range(5)  # first key of each random stream


def stream(seed: int, *key) -> np.random.Generator:
    """Make the random generator of whatever has this key."""
    return np.random.default_rng([seed, *key])


def pick(rng: np.random.Generator, table: dict) -> object:
    """Draw one key of `table` {key: weight}."""
    weights = np.array(list(table.values()), float)
    return list(table)[rng.choice(len(table), p=weights / weights.sum())]


def unit(vectors: np.ndarray) -> np.ndarray:
    """Scale vectors [..., 3] to length 1."""
    vectors = np.asarray(vectors, float)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


# fmt: off
COLOURS = {  # few, and the same for all clothes, so that many people wear the same main colours
    "white": (232, 230, 224), "grey": (128, 130, 134), "black": (30, 30, 34),
    "navy": (36, 46, 88), "blue": (62, 104, 176), "denim": (92, 116, 150),
    "red": (176, 40, 44), "pink": (224, 140, 160), "yellow": (222, 184, 62),
    "green": (58, 116, 72), "khaki": (164, 144, 104), "brown": (98, 66, 46),
}
SKIN = {(238, 200, 174): 3, (224, 180, 148): 3, (198, 150, 116): 2, (150, 104, 76): 1.2,
        (104, 70, 52): 0.8}
HAIR = {(26, 22, 22): 6, (58, 40, 30): 3, (112, 74, 44): 2, (196, 158, 98): 1,
        (150, 148, 146): 1}
HAIR_STYLE = {"short": 6, "long": 3, "bob": 2, "ponytail": 2, "buzz": 1.5, "bun": 1, "bald": 0.7}
LOWER_EDGE = {"trousers": (0.04, 0.06), "shorts": (0.25, 0.36), "skirt": (0.2, 0.38),
              "dress": (0.24, 0.34)}
# fmt: on


@dataclass(frozen=True, eq=False)
class Wardrobe:
    """How people dress: tables of what is worn, {name: weight}, as `pick` draws from them.

    Colours are names in COLOURS; sleeves are fractions of the arm.
    """

    upper: dict
    lower: dict
    accent: dict
    bag: dict
    shoes: dict
    pattern: dict
    lower_kind: dict
    sleeve: dict
    hat: dict


@dataclass(frozen=True)
class Identity:
    """The looks that stay the same about a person. Colours are RGB [3] in [0, 1]."""

    height: float  # metres; every other length is in body heights
    girth: float
    head: float
    skin: np.ndarray
    hair: np.ndarray
    hair_style: str
    hat: str
    hat_colour: np.ndarray
    upper: np.ndarray
    accent: np.ndarray
    pattern: str
    period: float  # of stripes
    sleeve: float  # the fraction of the arm that it covers
    sleeve_accent: bool
    hem: float  # height of the lower edge of the upper clothing
    lower: np.ndarray
    lower_kind: str
    lower_pattern: str
    lower_edge: float  # height of the lower edge of trousers or skirt
    shoes: np.ndarray
    boots: bool
    bag: str
    bag_colour: np.ndarray


def make_identity(rng, wardrobe):
    """Draw one person's looks."""

    def colour(table, without=None):
        name = pick(rng, {k: w for k, w in table.items() if k != without})
        return name, np.array(COLOURS.get(name, name), np.float32) / 255

    upper_name, upper = colour(wardrobe.upper)
    lower_kind = pick(rng, wardrobe.lower_kind)
    return Identity(
        height=rng.uniform(1.55, 1.88),
        girth=float(np.clip(rng.normal(1.05, 0.12), 0.85, 1.4)),
        head=rng.uniform(0.97, 1.12),
        skin=colour(SKIN)[1],
        hair=colour(HAIR)[1],
        hair_style=pick(rng, HAIR_STYLE),
        hat=pick(rng, wardrobe.hat),
        hat_colour=colour(wardrobe.bag)[1],
        upper=upper,
        accent=colour(wardrobe.accent, upper_name)[1],
        pattern=pick(rng, wardrobe.pattern),
        period=rng.uniform(0.06, 0.09),
        sleeve=pick(rng, wardrobe.sleeve),
        sleeve_accent=rng.random() < 0.15,
        hem=rng.uniform(0.49, 0.54),
        lower=colour(wardrobe.lower, upper_name if rng.random() < 0.7 else None)[1],
        lower_kind=lower_kind,
        lower_pattern=pick(rng, {"plain": 8, "sidestripe": 1.5, "checks": 0.7}),
        lower_edge=rng.uniform(*LOWER_EDGE[lower_kind]),
        shoes=colour(wardrobe.shoes)[1],
        boots=rng.random() < 0.12,
        bag=pick(rng, {"none": 4, "backpack": 3, "shoulder": 2, "hand": 2}),
        bag_colour=colour(wardrobe.bag)[1],
    )


# fmt: off
# part: (length, ((position along it, half-width, half-depth), ...), lengths of the round end caps)
BODY = {
    "torso": (0.355, ((0, .092, .072), (.3, .085, .064), (.62, .097, .070), (.8, .101, .062),
                      (.9, .090, .052), (.96, .062, .042), (1, .034, .032)), (0, 0)),
    "hips": (0.12, ((0, .070, .055), (.5, .087, .066), (1, .076, .056)), (.02, 0)),
    "neck": (0.05, ((0, .030, .030), (1, .027, .028)), (0, 0)),
    "head": (0.105, ((0, .024, .032), (.25, .034, .042), (.6, .040, .047), (1, .035, .041)),
             (.012, .024)),
    "hair": (0.105, ((0, .041, .045), (.5, .046, .053), (1, .040, .047)), (.012, .029)),
    "long": (0.17, ((0, .046, .022), (1, .037, .016)), (.02, .02)),
    "ponytail": (0.15, ((0, .014, .014), (1, .011, .010)), (.014, .014)),
    "bun": (0.02, ((0, .022, .022), (1, .022, .022)), (.02, .02)),
    "hat": (0.105, ((0, .048, .055), (1, .044, .051)), (.01, .034)),
    "brim": (0.05, ((0, .040, .006), (1, .030, .004)), (.01, .01)),
    "arm": (0.17, ((0, .0265, .0275), (1, .022, .023)), (.024, .018)),
    "forearm": (0.145, ((0, .022, .022), (1, .016, .016)), (.018, .012)),
    "hand": (0.05, ((0, .014, .012), (.5, .020, .013), (1, .013, .010)), (.008, .012)),
    "thigh": (0.24, ((0, .053, .056), (1, .037, .039)), (.03, .03)),
    "shin": (0.24, ((0, .036, .037), (.35, .036, .038), (1, .022, .023)), (.03, .01)),
    "foot": (0.09, ((0, .024, .026), (.5, .027, .022), (1, .024, .016)), (.022, .024)),
    "backpack": (0.2, ((0, .075, .045), (.7, .078, .050), (1, .060, .035)), (.02, .03)),
    "bag": (0.13, ((0, .020, .085), (.8, .020, .080), (1, .012, .060)), (.015, .012)),
}
STOUT = {"torso", "hips", "arm", "forearm", "thigh", "shin", "skirt"}  # wider with the girth
# fmt: on


@dataclass
class Part:
    """Surface points of a tube between two joints.

    `coef` [N, 4] times a pose (start, axis, side, front) [4, 3] gives the points; `normal` [N, 3]
    times the pose's unit (axis, side, front) the outward normals; `colour` [N, 3] is in [0, 1].
    """

    joint: str
    coef: np.ndarray
    normal: np.ndarray
    colour: np.ndarray


def tube(joint, shape, thick, colour, keep=None):
    """Sample a `Part` from a shape as in `BODY`, its cross-sections scaled by `thick`.

    `colour(u, front)` gives RGB [N, 3] and `keep(u, front)` a mask [N]. u is the position along the
    axis, 0 to 1; front is the angle from the body's front (pi: back; positive: its left).
    """
    length, profile, (low, high) = shape
    knots, wide, deep = np.array(profile, float).T
    whole = length + low + high
    rings = math.ceil(whole / SPACING)
    spokes = math.ceil(2 * math.pi * thick * max(wide.max(), deep.max()) / SPACING)
    s = (np.arange(rings)[:, None] + 0.5) / rings * whole - low
    beyond = np.maximum(-s / max(low, 1e-9), (s - length) / max(high, 1e-9)).clip(0)
    cap = np.sqrt((1 - beyond**2).clip(0.004)) * thick
    u = s / length
    a, b = np.interp(u, knots, wide) * cap, np.interp(u, knots, deep) * cap
    slope_a, slope_b = np.gradient(a, s[:, 0], axis=0), np.gradient(b, s[:, 0], axis=0)
    angle = (np.arange(spokes) + 0.5 * (np.arange(rings)[:, None] % 2)) * (2 * math.pi / spokes)
    cos, sin = np.cos(angle), np.sin(angle)
    normal = unit(np.stack([-slope_a * b * cos**2 - slope_b * a * sin**2, b * cos, a * sin], -1))
    coef = np.stack(np.broadcast_arrays(1.0, u, a * cos, b * sin), -1)
    u = np.broadcast_to(u, angle.shape).ravel()
    front = (1.5 * math.pi - angle.ravel()) % (2 * math.pi) - math.pi
    kept = slice(None) if keep is None else keep(u, front)
    u, front = u[kept], front[kept]
    folds = 1 + 0.05 * np.sin(9 * u + 2 * front) + 0.04 * np.sin(23 * u - 3 * front + 1)
    coef, normal = coef.reshape(-1, 4)[kept], normal.reshape(-1, 3)[kept]
    fields = (coef, normal, colour(u, front) * folds[:, None])
    return Part(joint, *(x.astype(np.float32) for x in fields))


def blend(mask: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Choose RGB [N, 3]: `one` where `mask` [N] is true, else `other`; each [3] or [N, 3]."""
    return np.where(mask[:, None], one, other)


def torso_colour(who, u, front):
    """Colour a shirt or jacket, with the straps of a bag: RGB [N, 3]."""
    side = abs(front)
    y, arc = u * 0.355 / who.period, front * 0.09 / who.period  # in periods of the stripes
    across, down = y % 1 < 0.4, arc % 1 < 0.4
    mask = {
        "hoops": y % 1 < 0.45,
        "stripes": (arc * 1.3) % 1 < 0.4,
        "checks": across & down,
        "print": ((u - 0.58) / 0.24) ** 2 + (np.minimum(side, math.pi - side) / 0.75) ** 2 < 1,
        "logo": ((u - 0.74) / 0.07) ** 2 + ((front - 0.5) / 0.28) ** 2 < 1,
        "blocks": u > 0.62,
        "open": side < 0.38,
    }.get(who.pattern, np.zeros(len(u), bool))
    rgb = blend(mask, who.accent, who.upper)
    if who.pattern == "checks":
        rgb = blend(across ^ down, (who.upper + who.accent) / 2, rgb)
    if who.bag == "backpack":
        rgb = blend((abs(side - 0.75) < 0.17) & (u > 0.35), who.bag_colour, rgb)
    if who.bag == "shoulder":  # a strap from the left shoulder to the right hip, front and back
        height = np.where(side < math.pi / 2, front, np.sign(front) * (math.pi - side))
        rgb = blend(abs(height - (u - 0.45) * 2.2) < 0.16, who.bag_colour, rgb)
    return blend(u > 0.97, who.upper * 0.8, rgb)


def arm_colour(who, u, start):
    """Colour sleeve and skin of an upper arm (start 0) or a forearm (start 0.5): RGB [N, 3]."""
    rgb = who.accent if who.sleeve_accent or who.pattern == "blocks" else who.upper
    if who.pattern in ("hoops", "checks"):
        rgb = blend((u * 0.17 / who.period) % 1 < 0.45, who.accent, rgb)
    return blend(start + u / 2 < who.sleeve, rgb, who.skin)


def leg_colour(who, u, front, top):
    """Colour trouser leg, skin and boot from the height `top` down: RGB [N, 3]."""
    y, rgb = top - 0.24 * u, who.lower
    if who.lower_pattern == "sidestripe":
        rgb = blend(abs(abs(front) - math.pi / 2) < 0.45, who.accent, rgb)
    if who.lower_pattern == "checks":
        rgb = blend(((y * 18) % 1 < 0.35) ^ (front % 1 < 0.35), who.lower / 2 + 0.25, rgb)
    covered = (y > who.lower_edge) & (who.lower_kind in ("trousers", "shorts"))
    return blend((y < 0.16) & who.boots, who.shoes, blend(covered, rgb, who.skin))


def head_colour(who, u, front):
    """Colour skin with a hint of eyes, brows and mouth: RGB [N, 3]."""
    eyes = ((u - 0.52) / 0.05) ** 2 + ((abs(front) - 0.42) / 0.16) ** 2 < 1
    brows = (abs(u - 0.63) < 0.03) & (abs(abs(front) - 0.42) < 0.25)
    mouth = (abs(u - 0.2) < 0.035) & (abs(front) < 0.3)
    shade = np.select([eyes, brows, mouth], [0.35, 0.6, 0.7], 1.0)
    return who.skin * shade[:, None]


def hair_line(who, front):
    """Return the lower edge of the hair [N], 0 to 1 up the head: high in front, lower elsewhere."""
    back = {"long": -1, "bob": 0.05, "buzz": 0.5, "short": 0.45}.get(who.hair_style, 0.35)
    return np.select([abs(front) < 0.8, abs(front) < 1.6], [0.72, back + 0.1], back)


def build_body(who):
    """Build the whole person: a list of `Part`."""
    parts = []

    def add(joint, colour, keep=None, shape=None, thick=1.0):
        name = joint.rstrip("LR")
        thick *= who.girth if name in STOUT else 1.0
        if not callable(colour):
            rgb, colour = colour, lambda u, front: np.broadcast_to(rgb, (len(u), 3))
        parts.append(tube(joint, shape or BODY[name], thick, colour, keep))

    cloth = who.upper if who.lower_kind == "dress" else who.lower
    cut = (who.hem - 0.49) / 0.355
    add("torso", functools.partial(torso_colour, who), lambda u, front: u > cut)
    add("hips", cloth)
    add("neck", who.skin * 0.9)
    add("head", functools.partial(head_colour, who), thick=who.head)
    sleeves, legs = 1 + 0.1 * who.sleeve, 1.1 if who.lower_kind == "trousers" else 1.0
    for limb in "LR":
        add("arm" + limb, lambda u, front: arm_colour(who, u, 0), thick=sleeves)
        add("forearm" + limb, lambda u, front: arm_colour(who, u, 0.5), thick=sleeves)
        add("hand" + limb, who.skin)
        add("thigh" + limb, lambda u, front: leg_colour(who, u, front, 0.52), thick=legs)
        add("shin" + limb, lambda u, front: leg_colour(who, u, front, 0.28), thick=legs)
        add("foot" + limb, who.shoes)
    if who.lower_kind in ("skirt", "dress"):
        length = 0.55 - who.lower_edge
        flare = 0.1 + 0.14 * length
        shape = (length, ((0, flare, flare), (1, 0.089, 0.068)), (0, 0))
        add("skirt", lambda u, front: blend(u < 0.06, cloth * 0.7, cloth), shape=shape)
    if who.bag != "none":
        joint, seam = ("backpack", 0.45) if who.bag == "backpack" else ("bag", 0.72)
        dark = who.bag_colour * 0.6
        add(joint, lambda u, front: blend(abs(u - seam) < 0.05, dark, who.bag_colour))
    if who.hair_style != "bald":
        add("hair", who.hair, lambda u, front: u > hair_line(who, front), thick=who.head)
    if who.hair_style in ("long", "ponytail", "bun"):
        add("tail", who.hair, shape=BODY[who.hair_style])
    if who.hat != "none":
        low = 0.62 if who.hat == "cap" else 0.55
        add("hat", who.hat_colour, lambda u, front: u > low, thick=who.head)
    if who.hat == "cap":
        add("brim", who.hat_colour * 0.85)
    return parts


@dataclass
class Person:
    """An identity and its body; `colours` [N, 3] are those of all its parts' points."""

    who: Identity
    parts: list
    colours: np.ndarray


@functools.lru_cache(maxsize=PASSERS_BY + 2)
def make_person(seed: int, number: int, wardrobe: Wardrobe) -> Person:
    """Make the person of this number, dressed from a wardrobe.

    Passers-by are numbered from -PASSERS_BY to -1.
    """
    who = make_identity(stream(seed, IDENTITY, number + PASSERS_BY), wardrobe)
    parts = build_body(who)
    return Person(who, parts, np.concatenate([part.colour for part in parts]))


@dataclass(frozen=True)
class Gait:
    """A person's walk through a tracklet: angles in radians, yaw 0 faces the camera."""

    yaw: float
    phase: float
    step: float  # phase from one frame to the next
    stride: float
    lean: float
    arms: str


def make_gait(rng: np.random.Generator, camera: object, who: Identity) -> Gait:
    """Draw a walk that more or less follows one of the camera's paths."""
    yaw = math.radians(rng.choice(camera.headings) + rng.normal(0, 22))
    stride = rng.uniform(0.02, 0.1) if rng.random() < 0.15 else rng.uniform(0.3, 0.55)
    stride *= 0.55 if who.lower_kind in ("skirt", "dress") else 1.0
    arms = pick(rng, {"swing": 6, "phone": 1.2, "pockets": 1.2})
    return Gait(yaw, rng.uniform(0, 7), rng.uniform(0.5, 1.3), stride, rng.uniform(0, 0.08), arms)


def bone(start, length, angle, out=0.0):
    """Return start and end [2, 3] of a bone that hangs from `start`, swung forward by `angle`.

    out: how far the end lies towards the person's left.
    """
    end = np.array([out, -length * math.cos(angle), length * math.sin(angle)])
    return np.array([start, start + end])


def skeleton(who, gait, phase):
    """Return the start and end of a walking body's parts: {joint: [2, 3]}, in body heights.

    The axes: x to the person's left, y up from the ground, z forward.
    """
    bones = {}
    for limb, sign in (("L", 1), ("R", -1)):
        t = phase + (0 if sign > 0 else math.pi)
        swing = gait.stride * math.sin(t)
        bend = 0.08 + gait.stride * 1.5 * max(0.0, math.cos(t + 0.5))
        thigh = bone([sign * 0.046 * who.girth, 0.52, 0], 0.24, swing + 0.05)
        shin = bone(thigh[1], 0.24, swing + 0.05 - bend)
        toes = 0.35 * min(0.0, swing + 0.05 - bend)  # point down when the heel is up
        foot = bone(shin[1] + [0, -0.012, -0.018], 0.09, math.pi / 2 + toes, sign * 0.015)
        upper, elbow, out = 0.02 - 0.75 * swing, 0.18 + 0.35 * gait.stride, 0.035 * who.girth
        if gait.arms == "pockets":
            upper, elbow, out = -0.25, 0.75, 0.06
        if gait.arms == "phone" and sign > 0:
            upper, elbow = 0.35, 1.75
        arm = bone([sign * (0.081 + 0.012 * who.girth), 0.797, 0], 0.17, upper, sign * out)
        forearm = bone(arm[1], 0.145, upper + elbow, -sign * 0.02)
        hand = bone(forearm[1], 0.05, upper + elbow, -sign * 0.006)
        named = {"thigh": thigh, "shin": shin, "foot": foot, "arm": arm, "forearm": forearm}
        bones |= {name + limb: ends for name, ends in (named | {"hand": hand}).items()}
    head = np.array([[0, 0.878, 0.024], [0, 0.878 + 0.105 * who.head, 0.022]])
    tail = {"bun": [[0, 0.085, -0.055], [0, 0.1, -0.06]],
            "ponytail": [[0, -0.06, -0.075], [0, 0.08, -0.055]]}  # fmt: skip
    back = -0.068 * who.girth - 0.03
    hip = np.array([-0.12 * who.girth, 0.42, -0.01])
    bones |= {
        "torso": np.array([[0, 0.49, 0], [0, 0.845, 0.02]]),
        "hips": np.array([[0, 0.455, 0], [0, 0.575, 0]]),
        "neck": np.array([[0, 0.835, 0.012], [0, 0.885, 0.022]]),
        "head": head,
        "hair": head,
        "hat": head,
        "tail": head[0] + tail.get(who.hair_style, [[0, -0.1, -0.05], [0, 0.07, -0.03]]),
        "brim": head[0] + [[0, 0.072, 0.04], [0, 0.064, 0.095]],
        "skirt": np.array([[0, who.lower_edge, 0], [0, 0.55, 0]]),
        "backpack": np.array([[0, 0.58, back], [0, 0.78, back]]),
        "bag": np.array([hip, hip + [0.015, 0.13, 0]]),
    }
    if who.bag == "hand":
        bones["bag"] = bones["handR"][1] + [[-0.01, -0.15, 0], [-0.01, -0.02, 0]]
    lowest = min(bones[foot][:, 1].min() for foot in ("footL", "footR"))
    for ends in bones.values():
        ends[:, 2] += gait.lean * np.maximum(0, ends[:, 1] - 0.5)
    return {joint: ends + [0, 0.026 - lowest, 0] for joint, ends in bones.items()}


def pose_body(person: Person, gait: Gait, frame: int) -> tuple[np.ndarray, np.ndarray]:
    """Pose a person in the world: points [N, 3] in metres, unit normals [N, 3].

    The world's axes: x to the right of the picture, y up, z towards the camera; the person stands
    at the origin.
    """
    bones = skeleton(person.who, gait, gait.phase + frame * gait.step)
    ends = np.array([bones[part.joint] for part in person.parts])
    axis = ends[:, 1] - ends[:, 0]
    along = unit(axis)
    side = unit(np.array([1.0, 0, 0]) - along * along[:, :1])
    front = np.cross(side, along)
    front[along[:, 1] < -0.3] *= -1  # limbs point down, which would turn their front to the back
    yaw = gait.yaw + 0.04 * math.sin(frame * 1.7)
    cos, sin = math.cos(yaw), math.sin(yaw)
    turn = np.array([[cos, 0, -sin], [0, 1, 0], [sin, 0, cos]])
    poses = np.stack([ends[:, 0], axis, side, front], 1) @ turn * person.who.height
    bases = np.stack([along, side, front], 1) @ turn
    posed = list(zip(person.parts, poses.astype(np.float32), bases.astype(np.float32), strict=True))
    points = np.concatenate([part.coef @ pose for part, pose, _ in posed])
    return points, np.concatenate([part.normal @ basis for part, _, basis in posed])
