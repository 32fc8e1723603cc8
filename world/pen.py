"""A pen that draws in a room's units on a canvas twice as fine as the video.

A room is 150 x 112.5 units with y downwards; the canvas shows all of it. Drawing at twice the
size and averaging down afterwards is the whole anti-aliasing. In this room only this file
knows OpenCV.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

Colour = tuple[int, int, int]
Point = tuple[float, float]

FINENESS = 2
ROOM_HEIGHT = 112.5
_SHIFT = 4  # fractional bits of a coordinate, so that slow things glide


class Pen:
    """Draws on `canvas` [H, W, 3] uint8 RGB, `scale` pixels a unit."""

    def __init__(self, canvas: NDArray[np.uint8], scale: float) -> None:
        self.canvas = canvas
        self.scale = scale
        self._fine = scale * (1 << _SHIFT)

    def polygon(self, points: Sequence[Point], colour: Colour) -> None:
        """Fill a simple polygon."""
        fine = self._fine
        corners = np.array([(x * fine, y * fine) for x, y in points], dtype=np.int32)
        cv2.fillPoly(self.canvas, [corners], colour, cv2.LINE_8, _SHIFT)

    def box(self, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        """Fill an upright rectangle."""
        self.polygon(((left, top), (right, top), (right, bottom), (left, bottom)), colour)

    def line(self, a: Point, b: Point, width: float, colour: Colour) -> None:
        """Draw a stroke with round ends."""
        fine = self._fine
        cv2.line(
            self.canvas,
            (int(a[0] * fine), int(a[1] * fine)),
            (int(b[0] * fine), int(b[1] * fine)),
            colour,
            max(1, round(width * self.scale)),
            cv2.LINE_8,
            _SHIFT,
        )

    def stroke(self, ends: Sequence[Point], width: float, colour: Colour) -> None:
        """Draw a stroke between two ends given together."""
        self.line(ends[0], ends[1], width, colour)

    def disc(self, centre: Point, radius: float, colour: Colour) -> None:
        """Fill a circle."""
        fine = self._fine
        cv2.circle(
            self.canvas,
            (int(centre[0] * fine), int(centre[1] * fine)),
            max(1, int(radius * fine)),
            colour,
            cv2.FILLED,
            cv2.LINE_8,
            _SHIFT,
        )


def shade(colour: Colour, factor: float) -> Colour:
    """Darken (factor < 1) or brighten a colour."""
    r, g, b = (min(255, max(0, int(channel * factor))) for channel in colour)
    return (r, g, b)


def mix(a: Colour, b: Colour, share: float) -> Colour:
    """Return `a` with `share` of it replaced by `b`."""
    r, g, b_ = (int(p + (q - p) * share) for p, q in zip(a, b, strict=True))
    return (r, g, b_)


def lerp(a: Point, b: Point, share: float) -> Point:
    """Return the point `share` of the way from `a` to `b`."""
    return (a[0] + (b[0] - a[0]) * share, a[1] + (b[1] - a[1]) * share)


def turned(points: Sequence[Point], centre: Point, angle: float) -> list[Point]:
    """Turn points given relative to the origin by `angle` radians and move them to `centre`."""
    c, s = float(np.cos(angle)), float(np.sin(angle))
    return [(centre[0] + x * c - y * s, centre[1] + x * s + y * c) for x, y in points]


def framed(
    canvas: NDArray[np.uint8], matrix: NDArray[np.float64], width: int, height: int
) -> NDArray[np.uint8]:
    """Move the canvas by the affine `matrix` [2, 3] and average it down to [height, width, 3]."""
    averaged = cv2.blur(canvas, (FINENESS, FINENESS))
    moved = cv2.warpAffine(
        averaged,
        matrix / FINENESS,
        (width, height),
        flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REPLICATE,
    )
    return np.asarray(moved, np.uint8)


def write_text(picture: NDArray[np.uint8], words: str, left: int, baseline: int) -> None:
    """Write small dark words into an RGB picture."""
    place, font = (left, baseline), cv2.FONT_HERSHEY_SIMPLEX
    cv2.putText(picture, words, place, font, 0.42, (20, 20, 20), 1, cv2.LINE_AA)


def png_bytes(picture: NDArray[np.uint8]) -> bytes:
    """Encode an RGB picture as PNG."""
    done, data = cv2.imencode(".png", picture[:, :, ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 9])
    assert done, "PNG encodes any RGB picture"
    return data.tobytes()
