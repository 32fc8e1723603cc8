"""Long videos are read in windows."""

from __future__ import annotations

import numpy as np
import pytest

from mmdist_e2e.grounding.answer import cut, merge, window_starts
from mmdist_e2e.structures import Features, Provenance


@pytest.mark.parametrize("duration", [30.0, 37.5, 37.6, 45.0, 60.0, 61.3, 3600.0])
def test_windows_cover_the_video_and_overlap_by_half(duration: float) -> None:
    starts = window_starts(duration, 30.0)
    if duration <= 37.5:
        assert starts == [0.0]
        return
    assert starts[0] == 0
    assert starts[-1] == pytest.approx(duration - 30)
    steps = np.diff(starts)
    assert (steps > 0).all()
    assert (steps <= 15 + 1e-9).all()


def test_cut_takes_the_snippets_of_the_window() -> None:
    data = np.arange(100, dtype=np.float32)[:, None]
    times = np.stack([np.arange(100.0), np.arange(100.0) + 1], axis=1)
    video = Features(data, times, 100.0, "rgb", Provenance({}))
    part = cut(video, 40.0, 20.0)
    assert part.data[:, 0].tolist() == list(range(40, 60))
    assert part.times[0].tolist() == [0.0, 1.0]
    assert part.duration_seconds == 20.0
    sparse = Features(data[:2], times[[0, 99]], 100.0, "rgb", Provenance({}))
    assert cut(sparse, 70.0, 20.0).data.tolist() == [[1.0]]


def test_merge_keeps_the_best_of_what_overlaps() -> None:
    a, b, c = [10.0, 20.0, -1.0, 7.0], [11.0, 21.0, -0.5, 8.0], [18.0, 30.0, -2.0, 9.0]
    assert merge(np.array([a, b, c])).tolist() == [b, c]
