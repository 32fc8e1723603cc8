"""Windows against a brute-force reading of the rule."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmdist_e2e.extractors.runner import Windows
from mmdist_e2e.structures import Provenance


def brute_force(frames: int, window: int, stride: int) -> list[list[int]]:
    starts = range(0, frames, stride)
    return [[min(i, frames - 1) for i in range(s, s + window)] for s in starts]


@pytest.mark.parametrize(("window", "stride"), [(4, 2), (16, 8), (3, 3), (2, 5), (1, 1)])
@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_windows_cover_every_frame_by_the_rule(window, stride, chunk):
    for frames in range(1, 40):
        cutter = Windows(window=window, stride=stride)
        video = torch.arange(frames)
        got = []
        for first in range(0, frames, chunk):
            got += [w.tolist() for w in cutter.push(video[first : first + chunk])]
        got += [w.tolist() for w in cutter.finish()]
        assert got == brute_force(frames, window, stride)
        assert cutter.rows == len(got) >= 1


def test_memory_does_not_grow_with_length():
    cutter = Windows(window=16, stride=8)
    for _ in range(500):
        for _ in cutter.push(torch.zeros((5, 2, 2))):
            pass
        assert sum(map(len, cutter._pieces)) <= 16 + 5


def test_times_start_at_zero_and_end_at_the_duration():
    made = Provenance({"window": 16, "stride": 8}, {"effective_fps": 12.0})
    times = made.row_times(5, 3.3)
    assert times[0, 0] == 0.0
    assert times[-1, 1] == 3.3
    assert (times[:, 1] > times[:, 0]).all()
    np.testing.assert_allclose(np.diff(times[:, 0]), 8 / 12)
    assert made.row_times(1, 0.2).tolist() == [[0.0, 0.2]]


def test_no_frame_gives_no_row():
    assert list(Windows(window=4, stride=2).finish()) == []
