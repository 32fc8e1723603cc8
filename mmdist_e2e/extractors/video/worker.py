"""The decoder process, `python -m mmdist_e2e.extractors.video.worker`: frames out of one file.

decord can loop forever holding the GIL, can segfault, and clashes with CUDA torch: it runs in this
child process, which reader.py may kill and which never imports torch. JSON lines on stdin and
stdout control it. Frames go through the parent's ring of SLOTS slots: one fills while the parent
works on the other.

decord2 (3.4) as measured, and what is done about it:
- It gives pictures without times: it reads only files whose n-th picture has the n-th time.
- It converts every picture, and `skip_frames` may skip wrong ones: PyAV reads where some are left.
- At the end of what decodes, `next()` repeats frames silently: FAULT_TOLERANCE makes it raise.
- A bad packet raises from another thread and loses good frames: PyAV then decides what is damaged.
- Where the padded row is a multiple of the width (16, 32, 48, 96 … pixels), the padding is taken
  for channels and `get_batch` fails; `next()` is as fast: see `unpad`.
- The rewind to the start of MPEG-TS and its like loses the beginning: see REWINDABLE.
- Its thread decodes ahead of the parent: it reads what fits DECORD_BYTES, and PyAV the rest.

Shape suffixes: N displayed frames of the file, M sampled frames, H height, W width, C channels.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmdist_e2e.extractors.video.reader import SLOTS
from mmdist_e2e.extractors.video.timeline import (
    Frame,
    Index,
    Unreadable,
    Upright,
    damage,
    decode,
    scaled,
    scan,
)

FAULT_TOLERANCE = 1e-9  # share of repeated frames above which decord raises: any
REWINDABLE = ("mov", "matroska", "webm", "avi")
DECORD_BYTES = 2**29  # frames of a video that decord may pile up
ROUNDING_SECONDS = 1e-3  # Matroska's tick: times in a file are this coarse
TIE_SECONDS = 1e-6  # a time that falls between two samples belongs to the later one
RATE_TOLERANCE = 1e-3  # relative; 25.01 fps is 25 fps
SUSTAINED_FRAMES = 12  # a rate counts as a video's own when it lasts for so many frames
ALIVE_SECONDS = 1.0
ORPHAN_SECONDS = 600  # a native loop that outlives its parent ends by SIGALRM

Picture = tuple[float, Callable[[], Frame]]  # when it is shown, and how to convert it to RGB


class Superseded(Exception):  # noqa: N818 - not an error
    """The parent does not want the rest of this video."""


class Channel:
    """JSON lines with the parent; a request for another job supersedes the present one."""

    def __init__(self) -> None:
        self.job = -1
        self.resumed = self._spoke = time.monotonic()  # when work went on after waiting
        self._waiting: dict[str, Any] | None = None
        self._ring: tuple[tuple[str, int], mmap.mmap] | None = None
        # Libraries that print must not break the protocol: their stdout becomes stderr.
        self._out = os.fdopen(os.dup(1), "wb", buffering=0)
        os.dup2(2, 1)

    def send(self, **message: Any) -> None:
        self._out.write(json.dumps({"job": self.job, **message}).encode() + b"\n")
        self._spoke = time.monotonic()
        self._watch()

    def _watch(self) -> None:
        if hasattr(signal, "alarm"):  # the default action needs no interpreter lock
            signal.alarm(ORPHAN_SECONDS)

    def worked(self) -> float:
        """Seconds of work since this was last called, without waiting for the parent."""
        begin, self.resumed = self.resumed, time.monotonic()
        return self.resumed - begin

    def alive(self) -> None:
        """Tell the parent, now and then, that slow work goes on."""
        if time.monotonic() - self._spoke > ALIVE_SECONDS:
            self.send(alive=True)

    def read(self) -> dict[str, Any]:
        """The next request; ends the process when the parent is gone."""
        if self._waiting is not None:
            request, self._waiting = self._waiting, None
            return request
        if hasattr(signal, "alarm"):
            signal.alarm(0)  # waiting for the parent is not being stuck
        waiting = time.monotonic()
        line = sys.stdin.buffer.readline()
        if not line:
            raise SystemExit(0)
        self._watch()
        self.resumed += time.monotonic() - waiting
        request = json.loads(line)
        assert isinstance(request, dict)
        return request

    def ring(self, name: str, size: int) -> mmap.mmap:
        """The parent's ring; its name is gone, or another's, once we have it."""
        if self._ring is None or self._ring[0] != (name, size):
            with Path(name).open("r+b") as file:
                self._ring = (name, size), mmap.mmap(file.fileno(), size)
        return self._ring[1]

    def expect(self, what: str) -> dict[str, Any]:
        """The next request of this job, which is `what`, or Superseded."""
        request = self.read()
        if request["job"] != self.job or request["do"] != what:
            self._waiting = request if request["job"] != self.job else None
            raise Superseded
        return request


def plan(
    index: Index, fps: float | None, policy: str
) -> tuple[float, NDArray[np.float64], NDArray[np.float64]]:
    """What is sampled when: effective fps, shown_M (ascending), times_M.

    Sample j has the time times_M[j] and is the latest picture shown at shown_M[j] (the first one
    before it is shown): the picture at j / fps seconds, for all such times before the end. Under
    "ceiling" a video that is not faster than `fps` keeps its own frames, one by one, at its own
    average rate; where its rate varies (a frame more than half a frame off the regular grid), it
    is sampled on the grid of the fastest rate that it sustains, so that a long still does not
    thin out the motion. Under "exact" a picture counts from the sample nearest to its time on, as
    by ffmpeg's fps filter (halves up, and the end is rounded too). Without an fps, or under
    "own": every frame at its own time.
    """
    times_N, own = index.times_N, index.average_fps
    order_N = np.arange(len(times_N))
    if fps is None or policy == "own":
        return own, times_N + 1e-6, times_N
    if policy == "ceiling" and own <= fps * (1 + RATE_TOLERANCE):
        if np.abs(times_N * own - order_N).max() < 0.5:
            return own, times_N + 1e-6, order_N / own
        late = np.abs((times_N - times_N[0]) * own - order_N).max() < 0.5
        fps = own if late else min(fps, max(own, sustained_fps(times_N)))
    delay, end = ROUNDING_SECONDS, index.duration_seconds
    if policy == "exact":
        delay, end = 0.5 / fps - TIE_SECONDS, float(times_N[-1]) + index.last_seconds
    samples = max(1, math.ceil((end - delay) * fps))
    times_M = np.arange(samples) / fps
    return fps, times_M + delay, times_M


def sustained_fps(times_N: NDArray[np.float64]) -> float:
    """The fastest rate over SUSTAINED_FRAMES frames (half of a shorter video)."""
    count = max(1, min(SUSTAINED_FRAMES, (len(times_N) - 1) // 2))
    spans = times_N[count:] - times_N[:-count]
    return round(count / max(float(spans.min(initial=np.inf)), 1e-6), 6)


def uses_decord(
    index: Index, path: Path, shown_M: NDArray[np.float64], longer_side: int | None
) -> bool:
    """Whether decord reads this file right, in bounded memory, and converts no frame in vain.

    It cannot scale a frame from the decoder's own pixel format.
    """
    rewindable = any(kind in index.container.split(",") for kind in REWINDABLE)
    whole = index.packets >= (index.claimed or 0)  # decord does not tell what is missing inside
    fits = math.prod(index.shape) * len(index.times_N) <= DECORD_BYTES
    named = "%" not in path.name and str(path).encode(errors="replace").decode() == str(path)
    source_M = np.searchsorted(index.times_N, shown_M, side="right") - 1
    every = len(np.unique(source_M.clip(0))) == len(index.times_N)
    return longer_side is None and index.plain and whole and rewindable and fits and named and every


def decode_decord(path: Path, index: Index) -> Iterator[Picture]:
    """All pictures from decord, which must be as many as the index has times."""
    sys.modules["nvidia"] = None  # type: ignore[assignment]  # decord2 would load CUDA: 700 MB
    import decord

    # One thread: as fast as more on the videos measured, and the other cores are the parent's.
    reader = decord.VideoReader(str(path), num_threads=1, fault_tol=FAULT_TOLERANCE)
    for at in index.times_N.tolist():
        raw_HWC = unpad(reader.next().asnumpy())
        if raw_HWC.shape != index.shape:
            raise ValueError(f"decord gives pictures of {raw_HWC.shape}")
        yield at, partial(np.asarray, raw_HWC)


def unpad(raw_HWC: Frame) -> Frame:
    """Undo decord's C = padded row / W: the pixels are the first 3·W bytes of each row."""
    height, width, channels = raw_HWC.shape
    if channels == 3:
        return raw_HWC
    return raw_HWC.reshape(height, -1)[:, : 3 * width].reshape(height, width, 3)


def decode_av(path: Path, index: Index, longer_side: int | None) -> Iterator[Picture]:
    """All pictures from PyAV; Unreadable where a part is missing."""
    upright, count = None, 0
    for at, frame in decode(path, index):
        upright = upright or Upright(frame, longer_side)
        if not index.exact:  # then the index was made by decoding these same pictures
            at = float(index.times_N[count])
        count += 1
        yield at, partial(upright, frame)
    if count < len(index.times_N):
        raise damage(index, count)


def pictures(
    path: Path, index: Index, by_decord: bool, longer_side: int | None, channel: Channel
) -> Iterator[Picture]:
    """The pictures to be sampled at least, in order; PyAV continues where decord stops early."""
    last = -math.inf
    if by_decord:
        try:
            for picture in decode_decord(path, index):
                last = picture[0]
                yield picture
        except Exception:  # decord's errors share no base class
            channel.alive()
        else:
            return
    for at, convert in decode_av(path, index, longer_side):
        channel.alive()
        if at > last:
            yield at, convert


def serve(request: dict[str, Any], channel: Channel) -> None:
    """Answer one `probe` or `frames` request."""
    path = Path(request["file"])
    index = scan(path, channel.alive)
    fps, shown_M, times_M = plan(index, request.get("fps"), request.get("policy", "ceiling"))
    longer_side = request.get("longer_side")
    shape = scaled(index.shape, longer_side)
    by_decord = uses_decord(index, path, shown_M, longer_side)
    info = {
        "width": index.shape[1],
        "height": index.shape[0],
        "fps": index.average_fps,
        "duration_seconds": index.duration_seconds,
        "frame_count": len(index.times_N),
        "codec": index.codec,
        "decoder": "decord" if by_decord else "pyav",
    }
    seconds = channel.worked()
    channel.send(info=info, fps=fps, samples=len(times_M), shape=shape, seconds=seconds)
    if request["do"] == "frames":
        go = channel.expect("go")
        size = math.prod(shape)
        capacity = min(go["slot_bytes"] // size, go["frames"])
        ring = channel.ring(go["ring"], SLOTS * go["slot_bytes"])
        slots_MHWC = [
            slot_B[: capacity * size].reshape(capacity, *shape)
            for slot_B in np.frombuffer(ring, np.uint8).reshape(SLOTS, -1)
        ]
        shown = pictures(path, index, by_decord, longer_side, channel)
        frames = sample(shown, shown_M, channel)
        fill(slots_MHWC, frames, times_M, channel)


def sample(
    shown: Iterator[Picture], shown_M: NDArray[np.float64], channel: Channel
) -> Iterator[Frame]:
    """The picture of each sample: the latest one shown by then. Only these are converted."""
    current, done = None, 0
    for at, convert in shown:
        channel.alive()
        until = int(np.searchsorted(shown_M, at))  # these samples come before this picture
        if current is not None and until > done:
            yield from repeat(current(), until - done)
            done = until
        if done == len(shown_M):
            return
        current = convert
    assert current is not None, "a file without pictures is Unreadable"
    yield from repeat(current(), len(shown_M) - done)


def fill(
    slots_MHWC: list[Frame], frames: Iterator[Frame], times_M: NDArray[np.float64], channel: Channel
) -> None:
    """Write the sampled frames into the slots in turn, waiting for the parent to free them."""
    capacity, total = len(slots_MHWC[0]), len(times_M)
    slot = filled = 0
    free = SLOTS
    for done, frame_HWC in enumerate(frames, 1):
        if filled == 0:
            if free == 0:
                channel.expect("free")
                free += 1
            free -= 1
        slots_MHWC[slot][filled] = frame_HWC
        filled += 1
        if filled == capacity or done == total:
            times = times_M[done - filled : done].tolist()
            seconds = channel.worked()
            channel.send(slot=slot, times=times, last=done == total, seconds=seconds)
            slot, filled = (slot + 1) % SLOTS, 0


def main() -> None:
    """Serve requests until stdin ends."""
    channel = Channel()
    while True:
        request = channel.read()
        if request["do"] not in ("probe", "frames"):
            continue  # a "free" or "stop" that crossed the end of its video
        channel.job = request["job"]
        try:
            serve(request, channel)
        except Superseded:
            continue
        except Unreadable as error:
            channel.send(error=str(error))
        except Exception as error:  # reported to the parent, which raises it
            channel.send(error=f"cannot be decoded: {error!r}.")


if __name__ == "__main__":
    main()
