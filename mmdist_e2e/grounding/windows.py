"""Videos much longer than those of training: half-overlapping windows, merged.

L positions over an hour are a minute each, and the diversity prior asks for moments of a third
of the video; so a long video is read in windows as long as the longest training video.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mmdist_e2e.structures import Features, Moment

LONG_RATIO = 1.25  # a video is long when it lasts this many times the longest training video
MERGE_IOU = 0.5  # moments of neighbouring windows that overlap more are one


def window_starts(duration_seconds: float, window_seconds: float) -> list[float]:
    """Starts of half-overlapping windows; the last one ends with the video.

    One window, at 0, for a video that is not long.
    """
    if duration_seconds <= LONG_RATIO * window_seconds:
        return [0.0]
    last = duration_seconds - window_seconds
    starts = np.arange(0.0, last, window_seconds / 2).tolist()
    return [*starts, last]


def cut(features: Features, start: float, window_seconds: float) -> Features:
    """The snippets whose middle lies in the window (the nearest one where none does).

    Their times count from the window's start, and its length is their duration.
    """
    middles = features.times.mean(axis=1)
    inside = (middles >= start) & (middles < start + window_seconds)
    if not inside.any():
        inside[np.abs(middles - start - window_seconds / 2).argmin()] = True
    return replace(
        features,
        data=features.data[inside],
        times=features.times[inside] - start,
        duration_seconds=window_seconds,
    )


def merge(moments: Sequence[Moment]) -> list[Moment]:
    """Non-maximum suppression: best first, none that overlaps a better one by IoU > 0.5."""
    kept: list[Moment] = []
    for moment in sorted(moments, key=lambda m: -m.score):
        if all(_iou(moment, other) <= MERGE_IOU for other in kept):
            kept.append(moment)
    return kept


def _iou(a: Moment, b: Moment) -> float:
    shared = max(0.0, min(a.end, b.end) - max(a.start, b.start))
    union = (a.end - a.start) + (b.end - b.start) - shared
    return shared / union if union > 0 else 0.0
