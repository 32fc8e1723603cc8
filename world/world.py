"""The synthetic world: which video shows what, when, and the sentences that ask for it.

`sample_script(seed, index)` is a pure function; a video does not depend on how many there are.
Splits go by index alone. The statistics imitate Charades-STA's (`statistics.py` measures them).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from world.sentences import sample_sentence
from world.story import (
    ACTIONS,
    COMBINATIONS,
    LOOPS,
    NOVEL,
    OBJECTS,
    OPPOSITES,
    State,
    after,
    sample_contents,
    sample_state,
    sample_story,
)

__all__ = [
    "ACTIONS",
    "COMBINATIONS",
    "FPS",
    "HEIGHT",
    "NOVEL",
    "OBJECTS",
    "OPPOSITES",
    "SPLITS",
    "WIDTH",
    "WORLD_VERSION",
    "Query",
    "Script",
    "Segment",
    "sample_script",
    "split_of",
]

WORLD_VERSION = 2
FPS = 12.0
WIDTH, HEIGHT = 128, 96
SPLITS = ("train", "val", "test")
IDLE = "idle"

MIN_GAP_SECONDS = 1.7  # time to walk to the next place
_MIN_SECONDS, _MAX_SECONDS = 2.6, 12.0  # of one action


class Segment(NamedTuple):
    """What the person does from `start` to `end` (seconds); `object` is None where there is none.

    The segments of a script follow each other without a hole; `action` is "idle" in between.
    """

    action: str
    object: str | None
    start: float
    end: float


class Query(NamedTuple):
    """A sentence and the moment (seconds) it is about."""

    start: float
    end: float
    sentence: str


@dataclass(frozen=True)
class Script:
    """Everything a video is made from: what happens, in which room, and how it looks.

    contents: the things in the room, used or not. initial: the room as the video finds it.
    look: entropy of the renderer's own generator (layout, colours, light, camera, person).
    """

    id: str
    split: str
    duration_seconds: float
    fps: float
    segments: tuple[Segment, ...]
    queries: tuple[Query, ...]
    contents: tuple[str, ...]
    initial: State
    look: tuple[int, ...]

    @property
    def frames(self) -> int:
        """Number of frames."""
        return round(self.duration_seconds * self.fps)


def split_of(index: int) -> str:
    """Return the split of video `index`: of ten, seven train, one val, two test."""
    if index % 10 < 7:
        return "train"
    return "val" if index % 10 == 7 else "test"


def sample_script(seed: int, index: int) -> Script:
    """Return the script of video `index` of world `seed`; equal arguments, equal scripts."""
    assert seed >= 0, "a seed is not negative"
    assert index >= 0, "an index is not negative"
    entropy = (WORLD_VERSION, seed, index)
    rng = np.random.default_rng(np.random.SeedSequence(entropy))
    split = split_of(index)
    contents = sample_contents(rng)
    initial = sample_state(rng, contents)
    story = sample_story(
        rng,
        contents,
        initial,
        length=int(rng.choice([2, 3, 4], p=[0.25, 0.55, 0.2])),
        forbidden=() if split == "test" else NOVEL,
    )
    frames, spans = _sample_times(rng, [action for action, _ in story])
    duration = frames / FPS
    segments: list[Segment] = []
    clock = 0.0
    for (action, thing), (start, end) in zip(story, spans, strict=True):
        if start > clock:
            segments.append(Segment(IDLE, None, clock, start))
        segments.append(Segment(action, thing, start, end))
        clock = end
    if duration > clock:
        segments.append(Segment(IDLE, None, clock, duration))
    return Script(
        id=f"w{WORLD_VERSION}-s{seed}-{index:05d}",
        split=split,
        duration_seconds=duration,
        fps=FPS,
        segments=tuple(segments),
        queries=_sample_queries(rng, story, spans, initial),
        contents=contents,
        initial=initial,
        look=(*entropy, 1),
    )


def _sample_times(
    rng: np.random.Generator, actions: list[str]
) -> tuple[int, list[tuple[float, float]]]:
    """Draw the number of frames and each action's span, in tenths of seconds."""
    frames = int(rng.integers(round(15 * FPS), round(30 * FPS) + 1))
    duration = np.floor(frames / FPS * 10) / 10
    room = duration - MIN_GAP_SECONDS * (len(actions) - 1) - 0.2
    pace = rng.uniform(0.85, 1.15)
    lengths = np.array(
        [
            duration * pace * rng.uniform(*((0.2, 0.66) if action in LOOPS else (0.16, 0.5)))
            for action in actions
        ]
    )
    lengths = np.clip(lengths * min(1.0, 0.97 * room / lengths.sum()), _MIN_SECONDS, _MAX_SECONDS)
    if lengths.sum() > room:
        lengths *= room / lengths.sum()
    # Few large holes rather than many equal ones, so that moments lie anywhere.
    slack = rng.dirichlet(np.full(len(actions) + 1, 0.5)) * (room - lengths.sum())
    spans, clock = [], 0.0
    for i, length in enumerate(lengths):
        start = clock + max(0.0, slack[i]) + (MIN_GAP_SECONDS if i else 0.0)
        clock = start + length
        spans.append((round(float(start), 1), round(float(min(clock, duration)), 1)))
    return frames, spans


def _sample_queries(
    rng: np.random.Generator,
    story: list[tuple[str, str | None]],
    spans: list[tuple[float, float]],
    state: State,
) -> tuple[Query, ...]:
    """Ask for most of what happens, here and there twice in other words."""
    seats = []
    for action, thing in story:
        seats.append(state.seat)
        state = after(action, thing, state)
    count = int(rng.choice([1, 2, 3, 4], p=[0.24, 0.42, 0.24, 0.1]))
    unasked = list(rng.permutation(len(story)))
    asked: list[int] = []
    queries: list[Query] = []
    while len(queries) < count:
        again = asked and (not unasked or rng.random() < 0.15)
        which = int(rng.choice(asked) if again else unasked.pop())
        asked.append(which)
        sentence = sample_sentence(rng, *story[which], seat=seats[which])
        query = Query(*spans[which], sentence)
        # "person stands up." would not say from where, should both happen.
        twice = sum(action == story[which][0] for action, _ in story) > 1
        vague = twice and sentence.endswith(("stands up.", "standing up."))
        if query not in queries and not vague:
            queries.append(query)
    return tuple(queries)
