"""Which frames make which snippet: windows, strides and tails, without any network.

Row j covers the frames j·stride … j·stride + window − 1 of the sampled video. Example with
window 4, stride 2 and five frames:

    frames   0 1 2 3 4
    row 0    0 1 2 3
    row 1        2 3 4 4      <- `repeat_last` repeats the last frame
    row 2            4 4 4 4

`repeat_last` gives ⌈n / stride⌉ rows; `drop` keeps only rows without a repeated frame, and the
first row of a video shorter than one window all the same, so that every video has a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Tail = Literal["repeat_last", "drop"]
TAILS: tuple[Tail, ...] = ("repeat_last", "drop")


def row_count(frames: int, *, window: int, stride: int, tail: Tail = "repeat_last") -> int:
    """How many rows `frames` sampled frames give; 0 only for no frame."""
    if frames <= 0:
        return 0
    if tail == "repeat_last":
        return -(-frames // stride)
    return max((frames - window) // stride + 1, 1)


def row_times(
    rows: int, *, window: int, stride: int, fps: float, duration_seconds: float
) -> NDArray[np.float64]:
    """Start and end of each row in seconds, [rows, 2]: from 0 to the duration.

    A row ends with its window or with the video, whichever comes first; the last row ends with
    the video even where `drop` left frames over.
    """
    starts = np.arange(rows, dtype=np.float64) * stride / fps
    times = np.stack([starts, starts + window / fps], axis=1)
    times = np.minimum(times, duration_seconds)
    times[-1, 1] = duration_seconds
    return times


class Windows:
    """Cuts a stream of frames into windows with bounded memory.

    Push chunks [N, ...] in order and take whole windows [window, ...] as they fill; `finish`
    gives the tail. At most one window and one chunk of frames are held.
    """

    def __init__(self, *, window: int, stride: int, tail: Tail = "repeat_last") -> None:
        if window < 1 or stride < 1:
            raise ValueError(f"window and stride must be at least 1; got {window} and {stride}.")
        if tail not in TAILS:
            raise ValueError(f"tail must be one of {', '.join(TAILS)}; got {tail!r}.")
        self.window, self.stride, self.tail = window, stride, tail
        self.frames = 0  # frames pushed so far
        self.rows = 0  # windows given so far
        self._held: NDArray[np.generic] | None = None
        self._held_start = 0

    def push(self, chunk: NDArray[np.generic]) -> Iterator[NDArray[np.generic]]:
        """Take frames [N, ...] and give every window that is now whole."""
        self.frames += len(chunk)
        held = chunk if self._held is None else np.concatenate([self._held, chunk])
        while self.rows * self.stride + self.window <= self.frames:
            first = self.rows * self.stride - self._held_start
            self.rows += 1
            yield held[first : first + self.window]
        # With a stride above the window the next window may start beyond what was pushed; the
        # last frame is kept all the same, because a tail repeats it.
        keep_from = min(self.rows * self.stride - self._held_start, len(held) - 1)
        self._held = held[max(keep_from, 0) :].copy()
        self._held_start += max(keep_from, 0)

    def finish(self) -> Iterator[NDArray[np.generic]]:
        """Give the windows that the tail policy makes of the frames left over."""
        total = row_count(self.frames, window=self.window, stride=self.stride, tail=self.tail)
        while self.rows < total:
            assert self._held is not None
            indices = self.rows * self.stride + np.arange(self.window)
            self.rows += 1
            yield self._held[np.minimum(indices, self.frames - 1) - self._held_start]
