"""What moves though nobody acts: pure functions of time, and each hides what it is meant to."""

from __future__ import annotations

import numpy as np
import pytest

from world.pen import Pen
from world.render import Film
from world.unrest import Unrest
from world.world import FPS, WIDTH, sample_script


def unrest(seed: int, duration: float = 25.0) -> Unrest:
    return Unrest(np.random.default_rng(seed), duration)


@pytest.mark.parametrize("seed", range(20))
def test_repeated_motions_pause_and_never_run_ahead(seed: int) -> None:
    one = unrest(seed)
    times = np.arange(0, 25, 1 / FPS)
    shown = np.array([one.clock(t) for t in times])
    steps = np.diff(shown)
    assert (shown <= times + 1e-9).all()
    assert (steps >= -1e-9).all()
    assert steps.max() < 1 / FPS + 1e-9
    assert 0.3 < (steps < 1e-9).mean() < 0.7  # still for about half of the time


@pytest.mark.parametrize("seed", range(20))
def test_the_camera_moves_and_comes_back(seed: int) -> None:
    one = unrest(seed)
    times = np.arange(0, 25, 1 / FPS)
    x, y, zoom = one.camera(times)
    assert len(x) == len(y) == len(zoom) == len(times)
    assert np.abs(x).max() < 30
    assert np.abs(y).max() < 6
    assert (np.abs(zoom - 1) < 0.08).all()
    assert np.abs(np.median(x)) < 5  # pans are short
    # Of one instant alone it says the same.
    assert one.camera(times[7:8])[0][0] == x[7]


def test_idle_hands_come_and_go() -> None:
    seen = set()
    for seed in range(20):
        gestures = [unrest(seed).gesture(t) for t in np.arange(0, 30, 0.1)]  # past its end too
        seen |= {kind for kind, _ in filter(None, gestures)}
        assert all(0 <= come <= 1 for _, come in filter(None, gestures))
        assert None in gestures
    assert seen == {"ahead", "head", "down"}


def test_passing_lights_leave_most_instants_as_they_are() -> None:
    xs = np.mgrid[0:2, 0:WIDTH][1].astype(np.float32)
    gains = np.stack([unrest(s).light(t, xs, WIDTH) for s in range(20) for t in range(25)])
    changed = np.abs(gains - 1).max(axis=(1, 2)) > 0.05
    assert 0.02 < changed.mean() < 0.6
    assert 0.5 < gains.min() < gains.max() < 2.2


def test_what_swings_and_walks_is_drawn_somewhere() -> None:
    drawn = 0
    for seed in range(20):
        canvas = np.zeros((192, 256, 3), np.uint8)
        one = unrest(seed)
        one.draw_behind(Pen(canvas, 256 / 150), 3.0)
        one.draw_before(Pen(canvas, 256 / 150), 3.0)
        drawn += bool(canvas.any())
    assert 5 < drawn < 20


def test_things_have_typical_colours_in_every_room() -> None:
    """A cup is red and a book blue, so that a still picture tells what is in a hand."""
    for index in range(30):
        colours = Film(sample_script(3, index))._room.colours
        assert int(np.argmax(colours["cup"])) == 0
        assert int(np.argmax(colours["book"])) == 2
        assert int(np.argmax(colours["broom"])) == 1
