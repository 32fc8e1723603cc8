"""What can happen in a room: the actions, the objects, and which action is possible when.

A state says what is open, lit, worn, held and sat on. An action is possible in some states and
leads to another state, so that nothing closes that is not open and nothing is put down that
is not in a hand. Every action returns an object to its own place, so places need no state.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np

# The objects each action goes with; None where it needs none. Opposites stand side by side.
COMBINATIONS: dict[str, tuple[str | None, ...]] = {
    "opens": ("door", "cabinet", "refrigerator", "laptop"),
    "closes": ("door", "cabinet", "refrigerator", "laptop"),
    "picks up": ("cup", "book", "phone", "bag", "box", "broom"),
    "puts down": ("cup", "book", "phone", "bag", "box", "broom"),
    "sits down": ("chair", "couch"),
    "stands up": ("chair", "couch"),
    "turns on": ("lamp", "television"),
    "turns off": ("lamp", "television"),
    "pushes": ("chair", "box"),
    "pulls": ("chair", "box"),
    "puts on": ("hat",),
    "takes off": ("hat",),
    "drinks": ("cup",),
    "reads": ("book",),
    "eats": ("sandwich",),
    "sweeps": ("broom",),
    "wipes": ("table",),
    "waves": (None,),
}
ACTIONS = tuple(COMBINATIONS)
OPPOSITES = tuple(zip(ACTIONS[0:12:2], ACTIONS[1:12:2], strict=True))
LOOPS = ACTIONS[12:]
OBJECTS = tuple(sorted({o for objects in COMBINATIONS.values() for o in objects if o}))

# Performed and asked for in test videos only. Each word of them occurs in training elsewhere.
NOVEL = frozenset(
    {("closes", "refrigerator"), ("picks up", "bag"), ("turns off", "television"), ("pulls", "box")}
)

ON_TABLE = ("laptop", "cup", "book", "phone", "sandwich")
SMALL = frozenset({"cup", "book", "phone", "bag"})  # the other hand stays free
# Width along the wall, in the room's units (a room is ROOM_WIDTH wide).
WIDTHS = {
    "door": 29.0,
    "cabinet": 27.0,
    "refrigerator": 26.0,
    "table": 42.0,
    "chair": 22.0,
    "couch": 40.0,
    "lamp": 13.0,
    "television": 30.0,
    "box": 21.0,
    "bag": 16.0,
    "broom": 9.0,
    "hat": 12.0,
}
ROOM_WIDTH = 150.0

# How eagerly a possible action is chosen: evens out how often each one is performed.
_EAGERNESS = {
    "opens": 1.1,
    "closes": 1.1,
    "picks up": 0.9,
    "puts down": 1.4,
    "sits down": 1.2,
    "stands up": 4.0,
    "turns on": 1.3,
    "turns off": 1.3,
    "pushes": 1.2,
    "pulls": 1.2,
    "puts on": 1.6,
    "takes off": 1.6,
    "drinks": 1.1,
    "reads": 1.1,
    "eats": 1.4,
    "sweeps": 1.4,
    "wipes": 0.7,
    "waves": 0.45,
}


@dataclass(frozen=True)
class State:
    """The person and the things that change; everything else of a room stays as it is."""

    held: str | None = None
    seat: str | None = None
    opened: frozenset[str] = frozenset()
    lit: frozenset[str] = frozenset()
    wears_hat: bool = False
    moved: tuple[str, ...] = ()  # pushed or pulled, in order


def is_possible(action: str, thing: str | None, state: State, contents: Collection[str]) -> bool:
    """Whether the person can do `action` with `thing` in `state` in a room of `contents`."""
    if thing is not None and thing not in contents:
        return False
    if action == "waves":
        return state.held not in ("box", "broom")
    if action == "stands up":
        return state.seat == thing
    if action in ("drinks", "reads") and state.held == thing:
        return True
    if state.seat is not None:
        return False
    if action == "puts down":
        return state.held == thing
    if action == "sweeps":
        return state.held in (None, thing)
    free_hand = state.held is None or state.held in SMALL
    match action:
        case "opens":
            return free_hand and thing not in state.opened
        case "closes":
            return free_hand and thing in state.opened
        case "turns on":
            return free_hand and thing not in state.lit
        case "turns off":
            return free_hand and thing in state.lit
        case "sits down":
            return free_hand
        case "puts on":
            return state.held is None and not state.wears_hat
        case "takes off":
            return state.held is None and state.wears_hat
        case "pushes" | "pulls":
            return state.held is None and thing not in state.moved
    return state.held is None  # picks up, drinks, reads, eats, wipes: from its place


def after(action: str, thing: str | None, state: State) -> State:
    """Return the state that `action` leads to; the action must be possible."""
    match action, thing:
        case "opens", str():
            return replace(state, opened=state.opened | {thing})
        case "closes", str():
            return replace(state, opened=state.opened - {thing})
        case "turns on", str():
            return replace(state, lit=state.lit | {thing})
        case "turns off", str():
            return replace(state, lit=state.lit - {thing})
        case "picks up", str():
            return replace(state, held=thing)
        case "puts down", _:
            return replace(state, held=None)
        case "sits down", str():
            return replace(state, seat=thing)
        case "stands up", _:
            return replace(state, seat=None)
        case (("pushes" | "pulls"), str()):
            return replace(state, moved=(*state.moved, thing))
        case (("puts on" | "takes off"), _):
            return replace(state, wears_hat=action == "puts on")
    return state


def sample_contents(rng: np.random.Generator, *, required: Sequence[str] = ()) -> tuple[str, ...]:
    """Draw the things in a room, `required` ones first, until the wall is full."""
    contents: list[str] = []
    room = ROOM_WIDTH - 6.0

    def add(thing: str) -> None:
        nonlocal room
        if thing in ON_TABLE and "table" not in contents:
            add("table")
        if thing not in contents and (thing in ON_TABLE or WIDTHS[thing] <= room):
            contents.append(thing)
            room -= WIDTHS.get(thing, 0.0)

    for thing in required:
        add(thing)
    if rng.random() < 0.85:
        add("table")
    for thing in rng.permutation(sorted(WIDTHS)):
        add(str(thing))
    if "table" in contents:
        for thing in rng.permutation(ON_TABLE)[: rng.integers(2, 4)]:
            if sum(c in ON_TABLE for c in contents) < 3:
                add(str(thing))
    return tuple(sorted(contents))


def sample_state(rng: np.random.Generator, contents: Collection[str]) -> State:
    """Draw how a room is found: what is open, lit, worn, held, sat on."""

    def some(things: Sequence[str], chance: float) -> frozenset[str]:
        return frozenset(t for t in things if rng.random() < chance and t in contents)

    opened = some(("door", "cabinet", "refrigerator", "laptop"), 0.5)
    lit = some(("lamp", "television"), 0.5)
    held = seat = None
    if rng.random() < 0.33:
        held = _pick(rng, [c for c in COMBINATIONS["puts down"] if c and c in contents])
    if rng.random() < 0.3 and (held is None or held in SMALL):
        seat = _pick(rng, [c for c in ("chair", "couch") if c in contents])
    wears_hat = "hat" in contents and bool(rng.random() < 0.5)
    return State(held=held, seat=seat, opened=opened, lit=lit, wears_hat=wears_hat)


def state_for(
    action: str, thing: str | None, rng: np.random.Generator, contents: Collection[str]
) -> State:
    """Draw a state in which `action` with `thing` is possible."""
    state = sample_state(rng, contents)
    for _ in range(20):
        if is_possible(action, thing, state, contents):
            return state
        state = sample_state(rng, contents)
    only = frozenset({thing}) if thing else frozenset()
    return replace(
        state,
        held=thing if action == "puts down" else None,
        seat=thing if action == "stands up" else None,
        opened=state.opened | only if action == "closes" else state.opened - only,
        lit=state.lit | only if action == "turns off" else state.lit - only,
        wears_hat=action == "takes off",
    )


def sample_story(
    rng: np.random.Generator,
    contents: Collection[str],
    state: State,
    *,
    length: int,
    forbidden: Collection[tuple[str, str | None]] = (),
) -> list[tuple[str, str | None]]:
    """Draw up to `length` actions, each possible after the one before, none of them twice."""
    story: list[tuple[str, str | None]] = []
    while len(story) < length:
        options: dict[str, list[str | None]] = {}
        for action, things in COMBINATIONS.items():
            possible = [
                thing
                for thing in things
                if (action, thing) not in story
                and (action, thing) not in forbidden
                and is_possible(action, thing, state, contents)
            ]
            if possible:
                options[action] = possible
        if not options:
            break
        weights = np.array([_EAGERNESS[action] for action in options])
        action = list(options)[rng.choice(len(options), p=weights / weights.sum())]
        thing = options[action][rng.integers(len(options[action]))]
        story.append((action, thing))
        state = after(action, thing, state)
    return story


def _pick(rng: np.random.Generator, things: Sequence[str]) -> str | None:
    return things[int(rng.integers(len(things)))] if things else None
