"""A contact sheet: every action of the world on one picture, for people to look at."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mmdist_e2e.store import write_atomically
from world.clips import ACTION_NAMES, sample_clip_script
from world.pen import png_bytes, write_text
from world.render import Film
from world.sentences import sample_sentence
from world.world import HEIGHT, WIDTH

_ROOMS, _FRAMES = 2, 6
_MARGIN, _CAPTION = 6, 16


def contact_sheet(path: Path, seed: int) -> None:
    """Write a PNG with one row per action: in two rooms, its sentence above six frames.

    The frames are evenly spread from the first to the last of the action's span. Sensor noise
    is left out and colours are coarsened, for the file's size.
    """
    actions = len(ACTION_NAMES) - 1
    column = _FRAMES * WIDTH + _MARGIN
    row = HEIGHT + _CAPTION
    sheet = np.full((actions * row, _ROOMS * column - _MARGIN, 3), 250, np.uint8)
    for a in range(actions):
        for k in range(_ROOMS):
            script, which = sample_clip_script(seed, (a + 1) + k * len(ACTION_NAMES))
            action, thing, start, end = script.segments[which]
            film = Film(script, noise=False)
            first, last = np.ceil(start * script.fps), np.floor(end * script.fps)
            frames = [film.frame(int(i)) for i in np.linspace(first, last, _FRAMES).round()]
            rng = np.random.default_rng([seed, a, k])
            seat = script.initial.seat if action != "stands up" else None
            words = sample_sentence(rng, action, thing, seat=seat)
            top, left = a * row, k * column
            write_text(sheet, f"{words}  ({end - start:.1f} s)", left + 2, top + _CAPTION - 5)
            picture = np.concatenate(frames, axis=1)
            place = sheet[top + _CAPTION : top + row, left : left + picture.shape[1]]
            place[...] = (picture & 0xF8) | 0x04
    write_atomically(path, png_bytes(sheet))
