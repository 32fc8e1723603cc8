"""Rooms: where the things stand, their colours, and the background that never moves."""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi, sin

import numpy as np
from numpy.typing import NDArray

from world.pen import ROOM_HEIGHT, Colour, Pen, mix, shade
from world.story import ON_TABLE, ROOM_WIDTH, WIDTHS

WALL_FOOT = 84.0  # where wall and floor meet
TABLE_TOP = 72.5  # on what table things stand
PUSH_DISTANCE = 34.0

# In sixths of a turn: red, yellow, green, blue, magenta.
_HUES = {"cup": 0, "cloth": 1, "broom": 2, "book": 4, "bag": 5}
_INNER = ("chair", "box")  # they are pushed about, so they start away from the walls


@dataclass(frozen=True)
class Room:
    """One room: x of every thing in it, which way each faces (+1 or -1), and colours."""

    at: dict[str, float]
    side: dict[str, int]
    colours: dict[str, Colour]
    wall: Colour
    floor: Colour
    trim: Colour
    texture: int
    contrast: float  # of the wall's pattern: how bright its darker colour is


def sample_room(rng: np.random.Generator, contents: tuple[str, ...]) -> Room:
    """Draw a layout along the wall for `contents`, and all colours."""
    order = [str(t) for t in rng.permutation([t for t in contents if t in WIDTHS])]
    for place, thing in ((len(order) // 2, "chair"), (len(order) // 2 - 1, "box")):
        if thing in order and 0 <= place < len(order):
            i = order.index(thing)
            order[i], order[place] = order[place], order[i]
    spare = ROOM_WIDTH - 6.0 - sum(WIDTHS[t] for t in order)
    gaps = rng.dirichlet(np.ones(len(order) + 1)) * max(spare, 0.0)
    at: dict[str, float] = {}
    edge = 3.0
    for gap, thing in zip(gaps, order, strict=False):
        edge += gap
        at[thing] = edge + WIDTHS[thing] / 2
        edge += WIDTHS[thing]
    for thing in _INNER:
        if thing in at:
            at[thing] = float(np.clip(at[thing], 62.0, ROOM_WIDTH - 62.0))
    if "table" in at:
        places = rng.permutation([-14.0, 0.0, 14.0])
        for place, thing in zip(places, [t for t in contents if t in ON_TABLE], strict=False):
            at[thing] = at["table"] + float(place) + float(rng.uniform(-1, 1))
    # A free edge, a seat's front or a standing place lies towards the middle of the room.
    side = {
        thing: (1 if x < 40 else -1 if x > ROOM_WIDTH - 40 else int(rng.choice([-1, 1])))
        for thing, x in at.items()
    }
    return Room(
        at=at,
        side=side,
        colours=_sample_colours(rng),
        wall=_pastel(rng, 150, 235, 34),
        floor=_pastel(rng, 95, 175, 40),
        trim=_pastel(rng, 170, 245, 12),
        texture=int(rng.integers(5)),
        contrast=float(rng.uniform(0.75, 0.95)),
    )


def paint_background(pen: Pen, room: Room, rng: np.random.Generator) -> None:
    """Paint wall, floor, window, pictures and a plant; the window's view is painted too."""
    pen.box(0, 0, ROOM_WIDTH, WALL_FOOT, room.wall)
    _paint_wall(pen, room)
    _paint_floor(pen, room, rng)
    pen.box(0, WALL_FOOT - 4, ROOM_WIDTH, WALL_FOOT, room.trim)
    _paint_clutter(pen, rng)
    tall = [room.at[t] for t in ("door", "cabinet", "refrigerator") if t in room.at]
    lamps = [room.at[t] for t in ("lamp", "hat", "television") if t in room.at]
    free = [
        x
        for x in rng.permutation(np.arange(12.0, 140.0, 4.0))
        if all(abs(x - t) > 26 for t in tall) and all(abs(x - t) > 18 for t in lamps)
    ]
    if free and rng.random() < 0.7:
        _paint_window(pen, free[0], room, rng)
        free = [x for x in free if abs(x - free[0]) > 24]
    for x in free[:1] if rng.random() < 0.7 else []:
        width, height = rng.uniform(5, 9), rng.uniform(5, 9)
        y = rng.uniform(28, 40)
        pen.box(x - width - 1, y - height - 1, x + width + 1, y + height + 1, shade(room.trim, 0.5))
        pen.box(x - width, y - height, x + width, y + height, _pastel(rng, 80, 220, 60))
        for _ in range(4):
            spot = (rng.uniform(x - width + 2, x + width - 2), rng.uniform(y - 3, y + 3))
            pen.disc(spot, rng.uniform(1, 2.5), _pastel(rng, 60, 230, 80))
    if rng.random() < 0.4:
        x = float(rng.choice([rng.uniform(0, 8), rng.uniform(ROOM_WIDTH - 8, ROOM_WIDTH)]))
        for k in range(9):
            angle = -pi / 2 + (k - 4) * 0.28
            tip = (x + cos(angle) * 15, 74 + sin(angle) * rng.uniform(14, 22))
            pen.line((x, 76), tip, 2.2, (50 + 6 * k, 110 + 5 * k, 50))
        pen.polygon(((x - 6, 74), (x + 6, 74), (x + 4, 88), (x - 4, 88)), room.colours["box"])
    if rng.random() < 0.5:
        x, half = rng.uniform(40, 110), rng.uniform(24, 40)
        rug = _pastel(rng, 90, 200, 60)
        pen.polygon(((x - half + 5, 94), (x + half - 5, 94), (x + half, 108), (x - half, 108)), rug)
        pen.polygon(
            ((x - half + 9, 96), (x + half - 9, 96), (x + half - 6, 106), (x - half + 6, 106)),
            shade(rug, 0.85),
        )


def _paint_clutter(pen: Pen, rng: np.random.Generator) -> None:
    """Paint posters on the wall and things on the floor that nobody ever uses."""
    for _ in range(rng.integers(0, 6)):
        x, y = float(rng.uniform(4, ROOM_WIDTH - 4)), float(rng.uniform(22, 76))
        wide, high = rng.uniform(3, 8), rng.uniform(3, 9)
        pen.box(x - wide, y - high, x + wide, y + high, _pastel(rng, 60, 220, 80))
        for _ in range(rng.integers(1, 5)):
            spot = (x + wide * rng.uniform(-0.7, 0.7), y + high * rng.uniform(-0.7, 0.7))
            if rng.random() < 0.5:
                pen.disc(spot, rng.uniform(0.8, 2.6), _pastel(rng, 40, 230, 90))
            else:
                end = (x + wide * rng.uniform(-0.8, 0.8), y + high * rng.uniform(-0.8, 0.8))
                pen.line(spot, end, rng.uniform(0.8, 2.5), _pastel(rng, 40, 230, 90))
    for _ in range(rng.integers(0, 4)):
        x, y = float(rng.uniform(4, ROOM_WIDTH - 4)), float(rng.uniform(88, 106))
        wide = rng.uniform(2, 6)
        pen.box(x - wide, y - rng.uniform(1, 6), x + wide, y, _pastel(rng, 60, 220, 80))


def grain(
    rng: np.random.Generator, shape: tuple[int, int, int], strength: float
) -> NDArray[np.float32]:
    """Return a still surface grain to be multiplied with a background of `shape`."""
    coarse = rng.standard_normal((shape[0] // 4 + 1, shape[1] // 4 + 1))
    fine = np.repeat(np.repeat(coarse, 4, axis=0), 4, axis=1)[: shape[0], : shape[1]]
    return (1.0 + strength * fine[..., None]).astype(np.float32)


def _paint_wall(pen: Pen, room: Room) -> None:
    other = shade(room.wall, room.contrast)
    if room.texture == 1:  # stripes
        for x in range(0, int(ROOM_WIDTH), 10):
            pen.box(x, 0, x + 5, WALL_FOOT, other)
    elif room.texture == 2:  # dots
        for row in range(0, 11):
            for x in range(0, int(ROOM_WIDTH) + 8, 8):
                pen.disc((x + 4 * (row % 2), 4 + row * 8), 1.2, other)
    elif room.texture == 3:  # tiles
        for x in range(0, int(ROOM_WIDTH) + 1, 9):
            pen.line((x, 0), (x, WALL_FOOT), 0.6, other)
        for y in range(3, int(WALL_FOOT), 9):
            pen.line((0, y), (ROOM_WIDTH, y), 0.6, other)
    elif room.texture == 4:  # panelling up to the middle
        pen.box(0, 56, ROOM_WIDTH, WALL_FOOT, shade(room.wall, 0.85))
        pen.box(0, 55, ROOM_WIDTH, 56.5, room.trim)


def _paint_floor(pen: Pen, room: Room, rng: np.random.Generator) -> None:
    pen.box(0, WALL_FOOT, ROOM_WIDTH, ROOM_HEIGHT + 1, room.floor)
    kind = rng.integers(3)
    if kind == 0:  # planks
        y, step = WALL_FOOT, 3.0
        while y < ROOM_HEIGHT:
            pen.line((0, y), (ROOM_WIDTH, y), 0.6, shade(room.floor, 0.85))
            for _ in range(3):
                x = float(rng.uniform(0, ROOM_WIDTH))
                pen.line((x, y), (x, y + step), 0.6, shade(room.floor, 0.85))
            y, step = y + step, step * 1.25
    elif kind == 1:  # tiles running to a point
        for x in range(-60, 211, 18):
            a, b = (75 + (x - 75) * 0.8, WALL_FOOT), (75 + (x - 75) * 1.3, ROOM_HEIGHT)
            pen.line(a, b, 0.6, shade(room.floor, 1.15))
        for y in (88.0, 94.0, 103.0):
            pen.line((0, y), (ROOM_WIDTH, y), 0.6, shade(room.floor, 1.15))


def _paint_window(pen: Pen, x: float, room: Room, rng: np.random.Generator) -> None:
    half, top, bottom = rng.uniform(10, 14), rng.uniform(16, 22), rng.uniform(48, 56)
    sky = mix((240, 245, 250), (90, 150, 225), float(rng.uniform(0, 1)))
    if rng.random() < 0.25:
        sky = (28, 34, 60)
    pen.box(x - half - 2, top - 2, x + half + 2, bottom + 2, room.trim)
    pen.box(x - half, top, x + half, bottom, sky)
    horizon = bottom - rng.uniform(4, 12)
    pen.box(x - half, horizon, x + half, bottom, shade((90, 140, 80), 0.4 + sum(sky) / 1000))
    pen.box(x - 0.8, top, x + 0.8, bottom, room.trim)
    if rng.random() < 0.5:
        curtain = _pastel(rng, 110, 230, 60)
        for left, right in ((x - half - 4, x - half + 4), (x + half - 4, x + half + 4)):
            pen.box(left, top - 4, right, bottom + 8, curtain)
            pen.box(left + 3, top - 4, left + 5, bottom + 8, shade(curtain, 0.88))


def _sample_colours(rng: np.random.Generator) -> dict[str, Colour]:
    woods = ((150, 100, 58), (190, 146, 94), (110, 70, 42), (214, 184, 140), (232, 226, 214))
    colours: dict[str, Colour] = {
        thing: shade(woods[rng.integers(len(woods))], float(rng.uniform(0.9, 1.08)))
        for thing in ("door", "cabinet", "table", "chair", "television")
    }
    metals = ((226, 228, 230), (170, 176, 182), (200, 60, 52), (120, 170, 170), (60, 64, 70))
    colours["refrigerator"] = metals[rng.integers(len(metals))]
    colours["couch"] = _pastel(rng, 60, 220, 80)
    # Small things have typical colours, so that a still picture tells what is in a hand.
    for thing, hue in _HUES.items():
        colours[thing] = _pastel(rng, 90, 190, 85, hue=-hue * pi / 3)
    colours["lamp"] = _pastel(rng, 170, 235, 40)
    colours["box"] = shade((196, 154, 104), float(rng.uniform(0.8, 1.1)))
    colours["laptop"] = metals[rng.integers(2)] if rng.random() < 0.7 else (60, 62, 66)
    colours["phone"] = (30, 30, 36) if rng.random() < 0.6 else _pastel(rng, 80, 200, 60)
    return colours


def _pastel(
    rng: np.random.Generator, low: float, high: float, strength: float, hue: float | None = None
) -> Colour:
    level = rng.uniform(low, high)
    hue = rng.uniform(0, 2 * pi) if hue is None else hue + rng.uniform(-0.35, 0.35)
    red, green, blue = (
        int(np.clip(level + strength * cos(hue + k * 2 * pi / 3), 8, 250)) for k in range(3)
    )
    return (red, green, blue)
