"""How the things look: the ones that stand somewhere and the ones that are carried."""

from __future__ import annotations

from collections.abc import Mapping
from math import cos, pi, sin

from world.pen import Colour, Pen, Point, mix, shade, turned
from world.rooms import TABLE_TOP, WALL_FOOT, Room

FULL_SWING = 1.75  # radians: how far doors and lids open
LEAVES = {  # width, top, bottom of the part that swings
    "door": (24.0, 21.0, 84.0),
    "cabinet": (23.0, 24.0, 54.0),
    "refrigerator": (22.0, 42.0, 83.0),
}
SEAT_HEIGHT = {"chair": 17.0, "couch": 15.0}
SEAT_FOOT = 101.0
BOX_FOOT = 106.0
BROOM_HOME = 103.0  # where a broom lies on the floor
_PICTURES: tuple[Colour, ...] = ((70, 130, 200), (90, 170, 90), (200, 120, 70), (150, 90, 170))


def hinge_of(room: Room, thing: str, x: float) -> Point:
    """Return where `thing` is hinged: (x, which way its leaf extends when closed)."""
    return (x - room.side[thing] * LEAVES[thing][0] / 2, room.side[thing])


def handle_of(room: Room, thing: str, x: float, opened: float) -> Point:
    """Return where a hand takes hold of a leaf or lid that is `opened` in [0, 1]."""
    angle = opened * FULL_SWING
    if thing == "laptop":
        return (x + room.side[thing] * 6.5, TABLE_TOP - 1.5 - 11.5 * sin(angle) + 0.5 * cos(angle))
    width, top, bottom = LEAVES[thing]
    hinge, way = hinge_of(room, thing, x)
    height = {"door": 0.52, "cabinet": 0.85, "refrigerator": 0.3}[thing]
    y = top + (bottom - top) * height + 3.0 * sin(angle)
    return (hinge + way * (width - 2.0) * cos(angle), y)


def lying_angle(room: Room) -> float:
    """Return how a broom lies on the floor: bristles away from where one picks it up."""
    return room.side["broom"] * 1.5


def _leaf(pen: Pen, room: Room, thing: str, x: float, opened: float, colour: Colour) -> None:
    """Draw the leaf in perspective: its free edge swings towards the viewer."""
    width, top, bottom = LEAVES[thing]
    hinge, way = hinge_of(room, thing, x)
    angle = opened * FULL_SWING
    free = hinge + way * width * cos(angle)
    drop, rise = 8.0 * sin(angle), 5.0 * sin(angle)
    tint = shade(colour, 1.0 - 0.32 * sin(angle))

    def corner(share: float, height: float) -> Point:
        high, low = top - rise * share, bottom + drop * share
        return (hinge + (free - hinge) * share, high + (low - high) * height)

    def panel(left: float, right: float, high: float, low: float, colour: Colour) -> None:
        corners = (corner(left, high), corner(right, high), corner(right, low), corner(left, low))
        pen.polygon(corners, colour)

    panel(0, 1, 0, 1, shade(tint, 0.72))
    panel(0.05, 0.95, 0.02, 0.98, tint)
    if thing == "door":
        panel(0.2, 0.8, 0.08, 0.42, shade(tint, 0.86))
        panel(0.2, 0.8, 0.58, 0.92, shade(tint, 0.86))
    elif thing == "cabinet":
        panel(0.18, 0.82, 0.14, 0.86, shade(tint, 0.88))
    handle = handle_of(room, thing, x, opened)
    pen.line((handle[0], handle[1] - 2.5), (handle[0], handle[1] + 2.5), 1.6, (60, 56, 50))


def draw_behind(
    pen: Pen, room: Room, at: Mapping[str, float], opened: Mapping[str, float],
    lit: Mapping[str, float], absent: frozenset[str], seconds: float,
) -> None:  # fmt: skip
    """Draw what stands behind the person: openings, television, lamp, seats."""
    colours = room.colours
    if "door" in at:
        x = at["door"]
        pen.box(x - 14, 19, x + 14, WALL_FOOT, shade(room.trim, 0.86))
        pen.box(x - 12, 21, x + 12, WALL_FOOT, shade(room.wall, 0.34))
        pen.polygon(((x - 12, 84), (x - 8, 74), (x + 12, 74), (x + 12, 84)), shade(room.floor, 0.4))
        _leaf(pen, room, "door", x, opened["door"], colours["door"])
    if "cabinet" in at:
        x, wood = at["cabinet"], colours["cabinet"]
        pen.box(x - 13, 62, x + 13, 86, shade(wood, 0.9))
        pen.box(x - 14, 60, x + 14, 63, shade(wood, 0.6))
        pen.box(x - 0.5, 64, x + 0.5, 85, shade(wood, 0.65))
        pen.box(x - 13, 22.5, x + 13, 55.5, shade(wood, 0.8))
        pen.box(x - 11.5, 24, x + 11.5, 54, shade(wood, 0.36))
        for shelf in (38.0, 53.0):
            pen.box(x - 11.5, shelf, x + 11.5, shelf + 1.4, shade(wood, 0.75))
            for k in range(3):
                left = x - 9 + 7 * k
                pen.box(left, shelf - 6 - k % 2, left + 4, shelf, _PICTURES[k])
        _leaf(pen, room, "cabinet", x, opened["cabinet"], wood)
    if "refrigerator" in at:
        x, metal = at["refrigerator"], colours["refrigerator"]
        pen.box(x - 12.5, 22, x + 12.5, 86, shade(metal, 0.75))
        pen.box(x - 11, 23.5, x + 11, 40, metal)
        pen.box(x - 11, 42, x + 11, 83, mix((250, 250, 235), metal, 0.15))
        for shelf in (54.0, 67.0, 80.0):
            pen.box(x - 10, shelf, x + 10, shelf + 1, (170, 190, 200))
            for k in range(3):
                left = x - 8 + 6 * k
                pen.box(left, shelf - 5 - 2 * (k % 2), left + 4, shelf, _PICTURES[(k + 1) % 4])
        _leaf(pen, room, "refrigerator", x, opened["refrigerator"], metal)
    if "television" in at:
        _television(pen, at["television"], lit["television"], colours["television"], seconds)
    if "hat" in at:
        x = at["hat"]
        pen.box(x - 4, 45, x + 4, 48, shade(room.trim, 0.55))
        pen.line((x, 48), (x, 51), 1.6, (70, 60, 50))
    if "lamp" in at:
        x, level = at["lamp"], lit["lamp"]
        pen.line((x, 48), (x, 88), 1.6, (70, 66, 62))
        pen.line((x - 5, 88.5), (x + 5, 88.5), 2.4, (60, 56, 52))
        cloth = mix(shade(colours["lamp"], 0.62), (255, 246, 205), level)
        pen.polygon(((x - 4.5, 34), (x + 4.5, 34), (x + 8, 49), (x - 8, 49)), cloth)
        pull = x + room.side["lamp"] * 5.0
        pen.line((pull, 49), (pull, 56), 0.8, (80, 74, 66))
        pen.disc((pull, 57), 1.3, (120, 100, 60))
    if "couch" in at:
        _couch(pen, at["couch"], room.side["couch"], colours["couch"])
    if "chair" in at:
        _chair(pen, at["chair"], room.side["chair"], colours["chair"])


def draw_before(
    pen: Pen, room: Room, at: Mapping[str, float], opened: Mapping[str, float],
    absent: frozenset[str],
) -> None:  # fmt: skip
    """Draw what stands before the person: the table, what is on it, broom, bag and box."""
    if "table" in at:
        x, wood = at["table"], room.colours["table"]
        for leg in (x - 18.5, x + 18.5):
            pen.box(leg - 1.2, TABLE_TOP + 2, leg + 1.2, 105, shade(wood, 0.6))
        back, front = TABLE_TOP - 2.5, TABLE_TOP + 2.5
        corners = ((x - 18, back), (x + 18, back), (x + 21, front), (x - 21, front))
        pen.polygon(corners, wood)
        pen.box(x - 21, front, x + 21, front + 3, shade(wood, 0.7))
        if "laptop" in at:
            _laptop(pen, room, at["laptop"], opened["laptop"])
        for thing in ("cup", "book", "phone", "sandwich"):
            if thing in at and thing not in absent:
                draw_carried(pen, room, thing, (at[thing], TABLE_TOP), 0.0, 0.0)
        if "sandwich" in at:
            plate = (at["sandwich"], TABLE_TOP + 0.8)
            pen.line((plate[0] - 5, plate[1]), (plate[0] + 5, plate[1]), 1.4, (240, 240, 240))
    if "broom" in at and "broom" not in absent:
        draw_broom(pen, room, (at["broom"], BROOM_HOME), lying_angle(room))
    for thing in ("bag", "box"):
        if thing in at and thing not in absent:
            draw_carried(pen, room, thing, (at[thing], BOX_FOOT), 0.0, 0.0)


def draw_carried(pen: Pen, room: Room, thing: str, foot: Point, angle: float, phase: float) -> None:
    """Draw a movable thing whose foot (lowest middle) is at `foot`, turned by `angle`.

    phase: how much of a sandwich is eaten; for a book 0 is shut, above it is open and the
    fraction of it turns a page.
    """
    colour = room.colours.get(thing, (128, 128, 128))
    if thing == "cup":
        body = ((-3.2, -7.5), (3.2, -7.5), (2.6, 0.0), (-2.6, 0.0))
        pen.stroke(turned(((3.0, -5.5), (4.6, -3.6)), foot, angle), 1.4, shade(colour, 0.8))
        pen.polygon(turned(body, foot, angle), colour)
        pen.polygon(turned(((-3.2, -7.5), (3.2, -7.5), (3.1, -6.2), (-3.1, -6.2)), foot, angle),
                    shade(colour, 1.3))  # fmt: skip
    elif thing == "book" and phase <= 0.0:
        pen.polygon(turned(((-6, -3.4), (6, -3.4), (6, 0), (-6, 0)), foot, angle), colour)
        pen.polygon(turned(((-5, -2.6), (6, -2.6), (6, -0.8), (-5, -0.8)), foot, angle),
                    (244, 240, 228))  # fmt: skip
    elif thing == "book":
        _open_book(pen, foot, angle, phase % 1.0, colour)
    elif thing == "phone":
        pen.polygon(turned(((-2.6, -7), (2.6, -7), (2.6, 0), (-2.6, 0)), foot, angle), colour)
        pen.polygon(turned(((-1.9, -6), (1.9, -6), (1.9, -1.2), (-1.9, -1.2)), foot, angle),
                    (150, 200, 235))  # fmt: skip
    elif thing == "sandwich":
        left = -4.5 + 6.0 * min(phase, 1.0)
        for top, low, tint in ((-4.6, -3, (206, 150, 84)), (-3, -1.8, (104, 170, 70)),
                               (-1.8, 0, (220, 170, 104))):  # fmt: skip
            pen.polygon(turned(((left, top), (4.5, top), (4.5, low), (left, low)), foot, angle),
                        tint)  # fmt: skip
    elif thing == "bag":
        for a, b in (((-4, -11), (-3, -16)), ((-3, -16), (3, -16)), ((3, -16), (4, -11))):
            pen.stroke(turned((a, b), foot, angle), 1.5, shade(colour, 0.6))
        pen.polygon(turned(((-6, -12), (6, -12), (7.5, 0), (-7.5, 0)), foot, angle), colour)
        pen.polygon(turned(((-6, -12), (6, -12), (6.6, -7), (-6.6, -7)), foot, angle),
                    shade(colour, 0.8))  # fmt: skip
    elif thing == "box":
        pen.polygon(turned(((-9.5, -15), (9.5, -15), (9.5, 0), (-9.5, 0)), foot, angle), colour)
        pen.polygon(turned(((-9.5, -15), (9.5, -15), (7, -19), (-7, -19)), foot, angle),
                    shade(colour, 1.18))  # fmt: skip
        pen.polygon(turned(((-1.5, -15), (1.5, -15), (1.5, -9), (-1.5, -9)), foot, angle),
                    shade(colour, 0.75))  # fmt: skip


def draw_broom(pen: Pen, room: Room, grip: Point, angle: float) -> None:
    """Draw a broom held at `grip`, 30 units above its bristles, leaning by `angle`."""
    top, neck = turned(((0, -13), (0, 25)), grip, angle)
    pen.line(top, neck, 1.8, (176, 130, 78))
    head = turned(((-2.5, 24), (2.5, 24), (7, 32), (-7, 32)), grip, angle)
    pen.polygon(head, room.colours["broom"])
    pen.stroke(turned(((-3, 24), (3, 24)), grip, angle), 1.6, shade(room.colours["broom"], 0.6))


def _open_book(pen: Pen, foot: Point, angle: float, turn: float, colour: Colour) -> None:
    pen.polygon(turned(((-9, -11), (9, -11), (9, 1), (-9, 1)), foot, angle), colour)
    for left, right in ((-8, -0.4), (0.4, 8)):
        pen.polygon(turned(((left, -10.2), (right, -10.2), (right, 0), (left, 0)), foot, angle),
                    (246, 243, 232))  # fmt: skip
        for k in range(4):
            y = -8.4 + 2.2 * k
            pen.stroke(turned(((left + 1, y), (right - 1, y)), foot, angle), 0.6, (170, 168, 160))
    swing = cos(turn * pi)  # one page goes from right to left
    lift = 3.0 * sin(turn * pi)
    page = ((0, -10.2), (8 * swing, -10.2 - lift), (8 * swing, -lift), (0, 0))
    pen.polygon(turned(page, foot, angle), (222, 216, 200))


def _laptop(pen: Pen, room: Room, x: float, opened: float) -> None:
    colour = room.colours["laptop"]
    angle = opened * FULL_SWING
    back, front = TABLE_TOP - 1.5, TABLE_TOP + 1.6
    pen.polygon(((x - 8, back), (x + 8, back), (x + 9.5, front), (x - 9.5, front)), colour)
    keys = ((x - 7, back + 0.5), (x + 7, back + 0.5), (x + 7.5, back + 1.8), (x - 7.5, back + 1.8))
    pen.polygon(keys, shade(colour, 0.55))
    high = back - 12.0 * sin(angle) + 3.0 * max(cos(angle), -0.3)
    wide = 8.0 + 1.4 * cos(angle)
    lid = ((x - 8, back), (x + 8, back), (x + wide, high), (x - wide, high))
    pen.polygon(lid, shade(colour, 0.8))
    if angle > 0.3:
        low, top = back - 1.0, high + 1.0
        if low > top:
            glow = mix((40, 46, 60), (120, 180, 240), min(1.0, angle))
            pen.box(x - 7, top, x + 7, low, glow)
            tall = low - top
            pen.box(x - 5, top + tall * 0.25, x + 3, top + tall * 0.5, (235, 240, 245))


def _television(pen: Pen, x: float, level: float, wood: Colour, seconds: float) -> None:
    pen.box(x - 14, 70, x + 14, 86, wood)
    pen.box(x - 14, 69, x + 14, 71, shade(wood, 0.7))
    pen.box(x - 0.5, 72, x + 0.5, 85, shade(wood, 0.7))
    pen.box(x - 15, 47, x + 15, 69, (28, 28, 32))
    dark = (16, 17, 22)
    scene = int(seconds * 0.7)
    colour, other = _PICTURES[scene % 4], _PICTURES[(scene * 3 + 1) % 4]
    pen.box(x - 13.5, 48.5, x + 13.5, 66.5, mix(dark, shade(colour, 1.25), level))
    pen.box(x - 13.5, 60, x + 13.5, 66.5, mix(dark, other, level))
    place = x + 9.0 * sin(seconds * 1.9)
    pen.disc((place, 57), 3.6, mix(dark, (250, 225, 200), level))
    pen.disc((x + 12, 68), 0.8, (60, 220, 80) if level > 0.5 else (210, 50, 40))


def _chair(pen: Pen, x: float, side: int, colour: Colour) -> None:
    seat, back = SEAT_FOOT - SEAT_HEIGHT["chair"], x - side * 7.5
    for leg in (-7.5, 7.5):
        pen.line((x + leg, seat), (x + leg, SEAT_FOOT), 1.8, shade(colour, 0.7))
        pen.line((x + leg * 0.75, seat), (x + leg * 0.75, SEAT_FOOT - 4), 1.5, shade(colour, 0.5))
    pen.line((back, seat), (back - side * 1.6, seat - 24), 2.4, shade(colour, 0.85))
    pen.line((back - side * 1.0, seat - 14), (back - side * 1.6, seat - 24), 4.0, colour)
    pen.box(x - 9, seat - 1, x + 9, seat + 2, colour)


def _couch(pen: Pen, x: float, side: int, colour: Colour) -> None:
    seat = SEAT_FOOT - SEAT_HEIGHT["couch"]
    for leg in (-15, 15):
        pen.box(x + leg - 1.5, seat + 10, x + leg + 1.5, SEAT_FOOT, (60, 44, 34))
    back = x - side * 15
    pen.line((back, seat + 6), (back - side * 2, seat - 19), 9.0, shade(colour, 0.8))
    pen.box(x - 19, seat + 3, x + 19, seat + 12, shade(colour, 0.72))
    pen.line((x - 15, seat + 2), (x + 15, seat + 2), 5.5, colour)
    pen.line((back + side * 1, seat - 3), (back + side * 16, seat - 3), 3.0, shade(colour, 0.9))
    pen.box(min(back, back + side * 16), seat - 3, max(back, back + side * 16), seat,
            shade(colour, 0.62))  # fmt: skip
