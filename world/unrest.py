"""What moves and changes while nobody acts: a hand-held camera, lights, a cat, idle hands.

Real video is full of it, and each modality suffers from another part: camera and cat move where
nothing is done, which flow cannot help but see; light and clutter change what RGB sees. And people
who read or wave pause, which leaves flow with nothing while the picture still tells.

Everything is a pure function of time, drawn from a generator of its own, so that no frame
depends on another. Lengths are in room units, times in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi, sin

import numpy as np
from numpy.typing import NDArray

from world.pen import ROOM_HEIGHT, Colour, Pen, Point, shade
from world.story import ROOM_WIDTH

Times = NDArray[np.float64]

_GESTURE_SECONDS = 2.4
_GESTURES = ("ahead", "head", "down")


@dataclass(frozen=True)
class _Swinging:
    """Something that hangs from the ceiling and swings."""

    x: float
    length: float
    radius: float
    swing: float
    pace: float
    colour: Colour


class Unrest:
    """The unrest of one video of `duration` seconds."""

    def __init__(self, rng: np.random.Generator, duration: float) -> None:
        self._waves = rng.uniform((0.5, 0.0), (2.2, 2 * pi), size=(2, 3, 2))  # axis, wave, (Hz, at)
        self._hand = 1.5 * float(rng.uniform()) ** 1.5
        # A pan goes away from the person and comes back.
        self._pans = []
        for _ in range(rng.poisson(duration / 12.0)):
            middle, length = float(rng.uniform(0, duration)), float(rng.uniform(1.5, 4.0))
            self._pans.append((middle, length, rng.choice([-1, 1]) * float(rng.uniform(8, 20))))
        self._zooming = float(rng.uniform(0.0, 0.07)), float(rng.uniform(0.1, 0.35))
        # A light that passes, as a car's does: when, how bright, which way.
        self._beams = [
            (rng.uniform(0, duration), rng.uniform(-0.3, 0.4), rng.choice([-1, 1]))
            for _ in range(rng.poisson(duration / 10.0))
        ]
        self._swinging = [
            _Swinging(
                x=float(rng.uniform(20, ROOM_WIDTH - 20)),
                length=float(rng.uniform(36, 52)),
                radius=float(rng.uniform(2.5, 5.0)),
                swing=float(rng.uniform(0.06, 0.22)),
                pace=float(rng.uniform(0.35, 0.8)),
                colour=_any_colour(rng),
            )
            for _ in range(rng.binomial(2, 0.3))
        ]
        self._cat = _any_colour(rng) if rng.random() < 0.35 else None
        self._cat_way = float(rng.uniform(0, 300)), float(rng.uniform(9, 24)), rng.uniform(2, 6)
        slots = int(duration / _GESTURE_SECONDS) + 1
        self._gestures = np.where(rng.random(slots) < 0.45, rng.integers(0, 3, slots), -1)
        self._pause = float(rng.uniform(2.6, 4.2)), float(rng.uniform(0.35, 0.6))

    def camera(self, seconds: Times) -> tuple[Times, Times, Times]:
        """How far the camera is off to the right and down, and its zoom (about 1)."""
        x, y = (
            sum(np.sin(2 * pi * hertz * seconds + at) / (1 + hertz) for hertz, at in waves)
            for waves in self._waves
        )
        x, y = self._hand * x, self._hand * y
        for middle, length, far in self._pans:
            gone = np.clip((seconds - middle) / length + 0.5, 0.0, 1.0)
            x = x + far * np.sin(pi * gone) ** 2
        swing, hertz = self._zooming
        return x, y, 1.0 + swing * np.sin(2 * pi * hertz * seconds + self._waves[0, 0, 1])

    def light(self, seconds: float, xs: NDArray[np.float32], width: int) -> NDArray[np.float32]:
        """The gain of passing lights at columns `xs` of a picture of `width` pixels."""
        gain = np.ones_like(xs)
        for middle, strength, way in self._beams:
            place = (0.5 + way * (seconds - middle) / 1.6) * width
            gain += np.float32(strength) * np.exp(-(((xs - place) / (0.3 * width)) ** 2))
        return gain

    def clock(self, seconds: float) -> float:
        """The time that repeated motions go by: it stands still for a part of every few seconds."""
        cycle, moving = self._pause
        whole, part = divmod(seconds, cycle)
        return (whole + min(part / (cycle * moving), 1.0)) * cycle * moving

    def gesture(self, seconds: float) -> tuple[str, float] | None:
        """What an idle hand does for no reason, and how far it has come, 0 to 1."""
        slot, part = divmod(seconds / _GESTURE_SECONDS, 1.0)
        kind = int(self._gestures[min(int(slot), len(self._gestures) - 1)])
        return None if kind < 0 else (_GESTURES[kind], sin(pi * part) ** 2)

    def draw_behind(self, pen: Pen, seconds: float) -> None:
        """Draw what hangs from the ceiling."""
        for thing in self._swinging:
            angle = thing.swing * sin(2 * pi * thing.pace * seconds + thing.x)
            end = (thing.x + thing.length * sin(angle), thing.length * cos(angle))
            pen.line((thing.x, 0.0), end, 0.8, (60, 58, 56))
            pen.disc(end, thing.radius, thing.colour)
            pen.disc((end[0] - 1.0, end[1] - 1.0), thing.radius * 0.4, shade(thing.colour, 1.3))

    def draw_before(self, pen: Pen, seconds: float) -> None:
        """Draw the cat, which walks to and fro before the person, and stops at times."""
        if self._cat is None:
            return
        start, pace, rest = self._cat_way
        # It walks for six seconds, then rests.
        rounds, part = divmod(seconds, 6.0 + rest)
        walked = start + pace * (rounds * 6.0 + min(part, 6.0))
        turns, along = divmod(walked, ROOM_WIDTH - 30.0)
        way = 1 if turns % 2 == 0 else -1
        x = 15.0 + along if way > 0 else ROOM_WIDTH - 15.0 - along
        _draw_cat(pen, (x, ROOM_HEIGHT - 6.0), way, walked / 3.0, seconds, self._cat)


def _draw_cat(pen: Pen, foot: Point, way: int, step: float, seconds: float, colour: Colour) -> None:
    x, y = foot
    for k, at in enumerate((-5.0, -3.5, 3.5, 5.0)):
        swing = 1.6 * sin(step + k * pi / 2)
        pen.line((x + at, y - 4.5), (x + at + swing, y), 1.4, shade(colour, 0.7 + 0.1 * (k % 2)))
    pen.line((x - way * 5.0, y - 6.0), (x + way * 5.0, y - 6.0), 5.0, colour)
    tail = (x - way * (10.0 + sin(seconds * 4.0)), y - 12.0 - 2.0 * cos(seconds * 4.0))
    pen.line((x - way * 6.0, y - 7.0), tail, 1.4, colour)
    head = (x + way * 8.0, y - 9.0)
    pen.disc(head, 2.9, colour)
    for ear in (-1.6, 1.6):
        pen.polygon(
            ((head[0] + ear - 1, head[1] - 2), (head[0] + ear, head[1] - 5),
             (head[0] + ear + 1, head[1] - 2)), shade(colour, 0.8),
        )  # fmt: skip


def _any_colour(rng: np.random.Generator) -> Colour:
    red, green, blue = (int(v) for v in rng.integers(30, 230, 3))
    return (red, green, blue)
