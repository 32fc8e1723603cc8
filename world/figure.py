"""An articulated person: a pose, the joints that follow from it, and how it is drawn.

Limbs have two segments whose middle joint comes from inverse kinematics, so that hands are
where the objects are. All lengths are in room units; `facing` is +1 to the right, -1 to the left.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, hypot, pi, sin, sqrt

import numpy as np

from world.pen import Colour, Pen, Point, shade

GROUND = 102.0  # where the feet stand

_THIGH, _SHANK, _TORSO, _UPPER_ARM, _FOREARM, _HEAD = 18.0, 17.5, 23.0, 13.0, 13.5, 6.2


@dataclass(frozen=True)
class Body:
    """The looks of a person; `size` scales all lengths."""

    size: float
    skin: Colour
    hair: Colour
    shirt: Colour
    trousers: Colour
    shoes: Colour
    hat: Colour
    long_hair: bool
    long_sleeves: bool
    girth: float

    @property
    def hip_height(self) -> float:
        """Height of the hips of the standing person above the ground."""
        return (_THIGH + _SHANK - 0.6) * self.size

    @property
    def torso(self) -> float:
        """Length from hips to shoulders."""
        return _TORSO * self.size

    @property
    def arm(self) -> float:
        """Reach of a hand from its shoulder."""
        return (_UPPER_ARM + _FOREARM) * self.size


@dataclass(frozen=True)
class Pose:
    """Where the body is: hips, lean of the torso (radians, forward positive), hands and feet."""

    hip: Point
    lean: float
    facing: int
    near_hand: Point
    far_hand: Point
    near_foot: Point
    far_foot: Point
    nod: float = 0.0
    hat: float | None = None  # tilt of the hat on the head, None without


def sample_body(rng: np.random.Generator) -> Body:
    """Draw a person's looks."""
    skins = ((241, 203, 173), (224, 172, 130), (190, 132, 92), (140, 92, 60), (98, 64, 44))
    hairs = ((36, 28, 24), (84, 54, 32), (150, 100, 50), (206, 170, 100), (120, 120, 120))
    return Body(
        size=float(rng.uniform(0.95, 1.06)),
        skin=skins[rng.integers(len(skins))],
        hair=hairs[rng.integers(len(hairs))],
        shirt=_cloth(rng),
        trousers=shade(_cloth(rng), 0.65),
        shoes=shade(_cloth(rng), 0.5),
        hat=_cloth(rng),
        long_hair=bool(rng.random() < 0.4),
        long_sleeves=bool(rng.random() < 0.5),
        girth=float(rng.uniform(0.9, 1.2)),
    )


def shoulder_of(body: Body, hip: Point, lean: float, facing: int) -> Point:
    """Return the shoulder above `hip`."""
    return (hip[0] + facing * sin(lean) * body.torso, hip[1] - cos(lean) * body.torso)


def head_of(body: Body, pose: Pose) -> Point:
    """Return the middle of the head."""
    shoulder = shoulder_of(body, pose.hip, pose.lean, pose.facing)
    angle = 0.75 * pose.lean + 0.3 * pose.nod
    reach = 9.6 * body.size
    forward = sin(angle) * reach + 1.0
    return (shoulder[0] + pose.facing * forward, shoulder[1] - cos(angle) * reach)


def middle_joint(a: Point, b: Point, first: float, second: float, side: int) -> Point:
    """Return the elbow or knee between `a` and `b`, bent to `side` of the way from a to b."""
    dx, dy = b[0] - a[0], b[1] - a[1]
    distance = min(max(hypot(dx, dy), abs(first - second) * 1.001), (first + second) * 0.999)
    along = (first * first - second * second + distance * distance) / (2 * distance)
    off = sqrt(max(first * first - along * along, 0.0))
    scale = hypot(dx, dy) or 1e-6
    ux, uy = dx / scale, dy / scale
    return (a[0] + ux * along - side * uy * off, a[1] + uy * along + side * ux * off)


def draw_person(pen: Pen, body: Body, pose: Pose) -> None:
    """Draw the person from the far side to the near side."""
    size, facing = body.size, pose.facing
    shoulder = shoulder_of(body, pose.hip, pose.lean, facing)
    spread = 2.2 * size * body.girth
    far_shoulder = (shoulder[0] + facing * spread, shoulder[1] + 1.2)
    near_shoulder = (shoulder[0] - facing * spread * 0.8, shoulder[1] + 1.5)
    _arm(pen, body, far_shoulder, pose.far_hand, facing, 0.72)
    _leg(pen, body, (pose.hip[0] + facing * 1.4, pose.hip[1]), pose.far_foot, facing, 0.72)
    _leg(pen, body, (pose.hip[0] - facing * 1.0, pose.hip[1]), pose.near_foot, facing, 1.0)
    _torso(pen, body, pose, shoulder)
    _head(pen, body, pose, shoulder)
    _arm(pen, body, near_shoulder, pose.near_hand, facing, 0.9)


def draw_hat(pen: Pen, body: Body, middle: Point, angle: float, facing: int) -> None:
    """Draw a hat whose brim is around `middle`."""
    size = body.size
    pen.stroke(_ends(middle, 8.2 * size, angle + facing * 0.05), 2.4 * size, shade(body.hat, 0.75))
    up = (sin(angle), -cos(angle))
    for rise, half in ((1.6, 4.6), (3.6, 4.2), (5.2, 3.4)):
        centre = (middle[0] + up[0] * rise * size, middle[1] + up[1] * rise * size)
        pen.stroke(_ends(centre, half * size, angle), 3.2 * size, body.hat)


def _ends(middle: Point, half: float, angle: float) -> tuple[Point, Point]:
    dx, dy = cos(angle) * half, sin(angle) * half
    return (middle[0] - dx, middle[1] - dy), (middle[0] + dx, middle[1] + dy)


def _arm(pen: Pen, body: Body, shoulder: Point, hand: Point, facing: int, light: float) -> None:
    upper, fore = _UPPER_ARM * body.size, _FOREARM * body.size
    dx, dy = hand[0] - shoulder[0], hand[1] - shoulder[1]
    far = hypot(dx, dy) / ((upper + fore) * 0.999)
    if far > 1.0:  # a hand never leaves its arm
        hand = (shoulder[0] + dx / far, shoulder[1] + dy / far)
    elbow = middle_joint(shoulder, hand, upper, fore, facing)
    sleeve = shade(body.shirt, light)
    skin = shade(body.skin, light)
    pen.line(elbow, hand, 4.2 * body.size, sleeve if body.long_sleeves else skin)
    pen.line(shoulder, elbow, 5.2 * body.size * body.girth, sleeve)
    pen.disc(hand, 2.7 * body.size, skin)


def _leg(pen: Pen, body: Body, hip: Point, foot: Point, facing: int, light: float) -> None:
    thigh, shank = _THIGH * body.size, _SHANK * body.size
    knee = middle_joint(hip, foot, thigh, shank, -facing)
    cloth = shade(body.trousers, light)
    pen.line(knee, foot, 5.0 * body.size * body.girth, cloth)
    pen.line(hip, knee, 6.6 * body.size * body.girth, cloth)
    toe = (foot[0] + facing * 4.2 * body.size, foot[1] + 0.4)
    pen.line(foot, toe, 3.4 * body.size, shade(body.shoes, light))


def _torso(pen: Pen, body: Body, pose: Pose, shoulder: Point) -> None:
    width = body.girth * body.size
    middle = (
        (pose.hip[0] + shoulder[0]) / 2 + pose.facing * 0.8,
        (pose.hip[1] + shoulder[1]) / 2,
    )
    pen.line(pose.hip, pose.hip, 9.6 * width, body.trousers)
    pen.line(middle, (pose.hip[0], pose.hip[1] - 2.0), 9.6 * width, body.shirt)
    pen.line((shoulder[0], shoulder[1] + 2.5), middle, 10.8 * width, body.shirt)


def _head(pen: Pen, body: Body, pose: Pose, shoulder: Point) -> None:
    size, facing = body.size, pose.facing
    head = head_of(body, pose)
    radius = _HEAD * size
    if body.long_hair:
        pen.line(
            (head[0] - facing * 3.4 * size, head[1] - 1.0),
            (shoulder[0] - facing * 4.0 * size, shoulder[1] + 1.0),
            6.0 * size,
            body.hair,
        )
    pen.line(shoulder, head, 4.4 * size, shade(body.skin, 0.85))
    pen.disc((head[0] - facing * 1.2 * size, head[1] - 1.2 * size), radius * 1.04, body.hair)
    face = 0.75 * pose.lean + 0.5 * pose.nod
    pen.disc((head[0] + facing * 1.2 * size, head[1] + 0.9 * size), radius * 0.86, body.skin)
    nose = (
        head[0] + facing * (6.6 * cos(face) - 0.8 * sin(face)) * size,
        head[1] + (1.6 * cos(face) + 6.0 * sin(face)) * size,
    )
    pen.disc(nose, 1.2 * size, shade(body.skin, 0.92))
    eye = (head[0] + facing * 3.6 * size, head[1] + (-0.3 + 3.0 * sin(face)) * size)
    pen.disc(eye, 0.85 * size, (30, 26, 26))
    if pose.hat is not None:
        angle = facing * (0.5 * face) + pose.hat
        draw_hat(pen, body, (head[0], head[1] - 3.6 * size), angle, facing)


def _cloth(rng: np.random.Generator) -> Colour:
    hue = rng.uniform(0, 2 * pi)
    strength, level = rng.uniform(20, 90), rng.uniform(90, 190)
    red, green, blue = (
        int(np.clip(level + strength * cos(hue + k * 2 * pi / 3), 10, 250)) for k in range(3)
    )
    return (red, green, blue)
