"""The looks of the rendered stand-in: which cameras see people, and how these dress.

A network that was trained on one look and is tested on another meets other light, other backgrounds
and other clothes, as between two datasets of photographs.
"""

from dataclasses import dataclass

from reid.rendering.people import Wardrobe
from reid.rendering.scenes import Camera


@dataclass(frozen=True, eq=False)
class Look:
    """The cameras of a set, and the clothes of its people."""

    cameras: tuple
    wardrobe: Wardrobe


# fmt: off
SUMMER = Look(
    cameras=(
        Camera(8, 9, (0, 0, 180, 60), (-0.5, 0.8, 0.6), (0.61, 0.62, 0.64), (0.52, 0.51, 0.48),
               (1.0, 1.0, 1.0), 1.0, 1.0, 1.0, 0.0, 0.1, 1.0, 0.010, 90,
               "tiles", (152, 149, 144), "shop", (120, 116, 110), 6),
        Camera(22, 7, (90, -90, 0), (0.7, 0.7, 0.2), (0.56, 0.55, 0.55), (0.62, 0.6, 0.54),
               (1.05, 1.0, 0.92), 0.95, 1.03, 1.03, 0.0, 0.2, 0.9, 0.014, 80,
               "lawn", (122, 132, 100), "hedge", (72, 92, 62), 5),
        Camera(12, 12, (180, 180, 0, 130), (0.2, 0.9, 0.1), (0.66, 0.67, 0.69), (0.38, 0.39, 0.4),
               (0.96, 0.99, 1.05), 1.0, 0.92, 0.93, 0.015, 0.25, 0.8, 0.012, 85,
               "asphalt", (132, 132, 134), "brick", (134, 104, 90), 6),
        Camera(30, 6, (45, -45, 180), (-0.8, 0.6, 0.2), (0.53, 0.53, 0.55), (0.52, 0.52, 0.54),
               (0.98, 1.0, 1.02), 1.15, 1.0, 0.95, 0.0, 0.15, 0.85, 0.018, 75,
               "tiles", (138, 135, 130), "cars", (90, 96, 104), 3),
        Camera(16, 8, (-90, 90, -60, 60), (0.4, 0.9, 0.8), (0.6, 0.61, 0.6), (0.46, 0.47, 0.45),
               (0.98, 1.03, 0.96), 1.03, 0.97, 0.95, 0.01, 0.3, 0.7, 0.014, 70,
               "zebra", (122, 123, 124), "rails", (150, 152, 150), 5),
        Camera(5, 10, (0, 180, 150, 30), (0.8, 0.5, 0.5), (0.57, 0.55, 0.55), (0.6, 0.56, 0.52),
               (1.04, 0.98, 0.98), 1.05, 1.05, 1.05, 0.0, 0.15, 0.95, 0.012, 88,
               "tiles", (148, 142, 136), "tents", (150, 76, 66), 7),
    ),
    wardrobe=Wardrobe(
        upper={"white": 5, "black": 5, "grey": 3, "blue": 3, "red": 3, "navy": 2, "pink": 2,
               "yellow": 2, "green": 2, "khaki": 1},
        lower={"black": 5, "denim": 4, "navy": 3, "khaki": 3, "grey": 2, "white": 1, "brown": 1},
        accent={"white": 3, "black": 3, "red": 2, "yellow": 2, "blue": 2, "green": 1, "pink": 1},
        bag={"black": 4, "red": 2, "blue": 2, "brown": 2, "pink": 1, "yellow": 1, "green": 1},
        shoes={"black": 4, "white": 4, "brown": 2, "red": 1, "blue": 1},
        pattern={"plain": 5, "print": 2.5, "hoops": 2, "blocks": 2, "open": 2, "checks": 1.5,
                 "logo": 1.5, "stripes": 1.2},
        lower_kind={"trousers": 6, "shorts": 3, "skirt": 2, "dress": 1},
        sleeve={0.1: 1, 0.5: 5, 1.0: 5},
        hat={"none": 8, "cap": 1.5, "beanie": 0.7},
    ),
)

WINTER = Look(
    cameras=(
        Camera(10, 8, (0, 180, 20, -20), (-0.9, 0.35, 0.3), (0.50, 0.53, 0.60), (0.42, 0.40, 0.34),
               (0.94, 0.98, 1.08), 1.1, 0.95, 0.85, 0.02, 0.2, 0.9, 0.016, 82,
               "snow", (206, 210, 216), "windows", (92, 78, 74), 6),
        Camera(18, 9, (90, -90, 70, -70), (0.9, 0.3, 0.5), (0.46, 0.47, 0.54), (0.55, 0.46, 0.34),
               (1.08, 1.0, 0.88), 1.1, 1.0, 0.9, 0.01, 0.25, 0.8, 0.020, 76,
               "asphalt", (96, 98, 104), "cars", (70, 74, 82), 5),
        Camera(6, 11, (180, 0, 160), (-0.2, 0.5, -0.4), (0.48, 0.50, 0.56), (0.30, 0.31, 0.34),
               (0.98, 1.0, 1.04), 1.2, 0.9, 0.8, 0.03, 0.3, 0.75, 0.018, 84,
               "tiles", (120, 120, 124), "brick", (96, 70, 62), 6),
        Camera(26, 7, (-45, 45, 0), (0.5, 0.7, 0.6), (0.52, 0.52, 0.52), (0.40, 0.40, 0.40),
               (1.0, 1.03, 0.95), 1.05, 1.05, 0.95, 0.0, 0.15, 0.9, 0.014, 88,
               "tiles", (172, 170, 164), "tents", (110, 120, 150), 4),
        Camera(14, 10, (60, -120, 100, -60), (-0.6, 0.4, 0.7), (0.44, 0.46, 0.52),
               (0.50, 0.47, 0.42), (0.97, 1.0, 1.05), 1.15, 0.98, 0.85, 0.015, 0.3, 0.7, 0.020, 72,
               "snow", (196, 200, 210), "rails", (126, 130, 134), 5),
        Camera(8, 7, (0, -30, 30, 180), (0.3, 0.8, 0.9), (0.50, 0.46, 0.42), (0.46, 0.40, 0.32),
               (1.1, 1.0, 0.84), 1.0, 1.02, 1.0, 0.01, 0.2, 0.95, 0.022, 80,
               "zebra", (90, 92, 96), "windows", (64, 66, 78), 6),
    ),
    wardrobe=Wardrobe(
        upper={"black": 8, "navy": 5, "grey": 4, "brown": 3, "khaki": 2, "green": 2, "red": 2,
               "white": 1, "blue": 1},
        lower={"black": 7, "navy": 4, "denim": 4, "grey": 3, "brown": 1, "khaki": 1},
        accent={"grey": 3, "white": 2, "red": 2, "black": 2, "yellow": 1, "green": 1},
        bag={"black": 5, "brown": 3, "navy": 2, "red": 1, "grey": 1},
        shoes={"black": 6, "brown": 4, "white": 1},
        pattern={"plain": 7, "open": 3, "blocks": 2, "hoops": 1, "checks": 1, "logo": 0.7},
        lower_kind={"trousers": 10, "skirt": 1, "dress": 1},
        sleeve={1.0: 1},
        hat={"none": 5, "beanie": 4, "cap": 0.7},
    ),
)
# fmt: on

LOOKS = {"summer": SUMMER, "winter": WINTER}
