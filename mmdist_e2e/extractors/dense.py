"""Dense mode: I3D run convolutionally over a whole video, in long chunks with context.

A video's frames are padded by repeating the last one to a multiple of eight. SAME padding depends
on the size that it pads, so where the network's strides fall depends on the length of its input;
with every length and every chunk's start a multiple of eight they fall at the same frames in a
chunk as in the whole video, whose length a stream does not know before it ends.

Which frames a row sees, traced back from map j (one every eight frames), first and last:

    Mixed_5b, 5c      each ±1                        j − 2 … j + 2
    MaxPool3d_5a      2i … 2i + 1                    2j − 4 … 2j + 5
    Mixed_4b … 4f     each ±1                        2j − 9 … 2j + 10
    MaxPool3d_4a      2i … 2i + 2                    4j − 18 … 4j + 22
    2c, Mixed_3b, 3c  each ±1                        4j − 21 … 4j + 25
    Conv3d_1a         2i − 2 … 2i + 4                8j − 44 … 8j + 54

Row j is the average of maps j and j + 1, so it sees the 107 frames 8j − 44 … 8j + 62. Rows
a … b − 1 need the frames 8a − 44 … 8b + 54: on either side of the frames 8a … 8b − 1 a context of
56, the next multiple of eight.

n frames give ⌈n / 8⌉ maps, thus ⌈n / 8⌉ − 1 rows, and one row where there is one map. Row j covers
the frames 8j … 8j + 15 nominally: `snippets.row_times` with window 16 and stride 8 gives its times.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

STRIDE = 8  # frames between rows
WINDOW = 16  # frames that a row covers nominally: two maps
MINIMUM_CONTEXT = 56  # frames on either side, see above


def dense_row_count(frames: int) -> int:
    """How many rows `frames` sampled frames give; 0 only for no frame."""
    return max(-(-frames // STRIDE) - 1, 1) if frames > 0 else 0


@dataclass(frozen=True)
class Chunk:
    """Frames [N, ...] to run the network over, and its output rows to keep.

    N is a multiple of eight. The rows kept are `first_row` … `last_row` − 1, counted from the
    chunk's own first: `features(frames)[first_row:last_row]`.
    """

    frames: NDArray[np.generic]
    first_row: int
    last_row: int


class DenseChunks:
    """Cuts a stream of frames into chunks whose kept rows, joined, are those of one whole run.

    Push frames [N, ...] in order and take the chunks that are now whole; `finish` gives the last.
    At most core_frames + 2 · context_frames frames and those of one push are held.

    Args:
        core_frames: frames that each chunk adds, eight a row.
        context_frames: frames run on either side of them and trimmed again.

    Raises ValueError when either is not a multiple of eight, or too small to be exact.
    """

    def __init__(self, *, core_frames: int = 512, context_frames: int = MINIMUM_CONTEXT) -> None:
        for name, value, least in (
            ("core_frames", core_frames, STRIDE),
            ("context_frames", context_frames, MINIMUM_CONTEXT),
        ):
            if value < least or value % STRIDE:
                raise ValueError(
                    f"{name} must be a multiple of {STRIDE} and at least {least}; got {value}."
                )
        self.core_frames, self.context_frames = core_frames, context_frames
        self.frames = 0  # frames pushed so far
        self.rows = 0  # rows given so far
        self._pieces: list[NDArray[np.generic]] = []  # frames held
        self._start = 0  # the first of them in the video

    def push(self, frames: NDArray[np.generic]) -> Iterator[Chunk]:
        """Take frames [N, ...] and give every chunk that now has its context."""
        self.frames += len(frames)
        self._pieces.append(frames.copy())  # a reader may use its buffer again
        core_end = self.rows * STRIDE + self.core_frames
        while self.frames >= core_end + self.context_frames:
            held = np.concatenate(self._pieces)
            chunk = self._chunk(held[: core_end + self.context_frames - self._start], core_end)
            next_start = max(core_end - self.context_frames, 0)
            self._pieces = [held[next_start - self._start :].copy()]
            self._start = next_start
            core_end += self.core_frames
            yield chunk

    def finish(self) -> Iterator[Chunk]:
        """Give the rows left over: one chunk, unless no frame was pushed."""
        if self.frames == 0:
            return
        held = np.concatenate(self._pieces)
        self._pieces = []
        filling = np.repeat(held[-1:], -self.frames % STRIDE, axis=0)
        yield self._chunk(np.concatenate([held, filling]), dense_row_count(self.frames) * STRIDE)

    def _chunk(self, frames: NDArray[np.generic], rows_end: int) -> Chunk:
        """Keep the rows from the first not yet given up to that of the video's frame `rows_end`."""
        before = self._start // STRIDE
        first_row, self.rows = self.rows - before, rows_end // STRIDE
        return Chunk(frames, first_row, self.rows - before)
