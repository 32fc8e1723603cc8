"""Short snippets of single actions, to train a network on what grounding videos never show.

Rooms and scripts come from seeds of their own: no snippet is part of any grounding video.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from world.render import Film
from world.story import (
    ACTIONS,
    COMBINATIONS,
    LOOPS,
    OBJECTS,
    sample_contents,
    sample_story,
    state_for,
)
from world.world import FPS, IDLE, WORLD_VERSION, Script, Segment

ACTION_NAMES = (IDLE, *ACTIONS)
OBJECT_NAMES = ("none", *OBJECTS)

_DOMAIN = 0xC11B5  # keeps these seeds apart from those of the grounding videos


class Clip(NamedTuple):
    """A snippet and what it shows.

    frames_THWC: uint8 RGB at the world's rate. action, object: indices into ACTION_NAMES and
    OBJECT_NAMES. poses_TP: where the joints are in each frame, as `Film.pose` gives them.
    """

    frames_THWC: NDArray[np.uint8]
    action: int
    object: int
    poses_TP: NDArray[np.float32]


def sample_clip(seed: int, index: int, *, frames: int = 16) -> Clip:
    """Render snippet `index` of `seed`: `frames` consecutive frames.

    Actions take turns, so any run of len(ACTION_NAMES) indices holds each of them once. The
    snippet lies inside its action but for a fifth of its length at the most.
    """
    assert frames >= 1, "a snippet has a frame"
    script, which = sample_clip_script(seed, index)
    segment = script.segments[which]
    # Where it may begin is drawn apart from the script, which is the same for any `frames`.
    rng = np.random.default_rng(np.random.SeedSequence((*script.look, 2)))
    over = frames / 5 if segment.action != IDLE else 0.0
    low = max(0.0, segment.start * FPS - over)
    high = min(float(script.frames), segment.end * FPS + over) - frames
    first = round(rng.uniform(low, max(low, high)))
    film = Film(script)
    shown = [min(i, script.frames - 1) for i in range(first, first + frames)]
    return Clip(
        np.stack([film.frame(i) for i in shown]),
        ACTION_NAMES.index(segment.action),
        OBJECT_NAMES.index(segment.object or "none"),
        np.stack([film.pose(i) for i in shown]),
    )


def sample_clip_script(seed: int, index: int) -> tuple[Script, int]:
    """Return the script that snippet `index` is cut from and which of its segments shows it."""
    entropy = (WORLD_VERSION, seed, index, _DOMAIN)
    rng = np.random.default_rng(np.random.SeedSequence(entropy))
    wanted = ACTION_NAMES[index % len(ACTION_NAMES)]
    idle = wanted == IDLE
    things = COMBINATIONS[ACTIONS[rng.integers(len(ACTIONS))] if idle else wanted]
    thing = things[rng.integers(len(things))]
    contents = sample_contents(rng, required=[thing] if thing else [])
    if idle:
        state = state_for("waves", None, rng, contents)
        (action, thing) = sample_story(rng, contents, state, length=1)[0]
    else:
        action = wanted
        state = state_for(action, thing, rng, contents)
    low, high = (3.0, 11.0) if action in LOOPS else (2.8, 9.0)
    start = float(rng.uniform(2.0, 4.0))
    end = start + float(rng.uniform(low, high))
    total = end + float(rng.uniform(2.0, 4.0))
    segments = (
        Segment(IDLE, None, 0.0, start),
        Segment(action, thing, start, end),
        Segment(IDLE, None, end, total),
    )
    script = Script(
        id=f"w{WORLD_VERSION}-clip{seed}-{index:06d}",
        split="pretrain",
        duration_seconds=round(total * FPS) / FPS,
        fps=FPS,
        segments=segments,
        queries=(),
        contents=contents,
        initial=state,
        look=entropy,
    )
    return script, (int(rng.choice([0, 2])) if idle else 1)
