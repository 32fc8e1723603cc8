"""The decoder process, `python -m mmdist_e2e.extractors.decoder`: frames out of one file at a time.

decord can loop forever holding the GIL, can segfault, and clashes with CUDA torch, so it lives
here, in a child that video.py may kill. Never imports torch. JSON lines on stdin and stdout for
control, frames through a memory-mapped ring of SLOTS slots that the parent made: the parent hands
out the slots, so this process decodes one chunk while the parent works on the other.

decord2 (3.4) as measured, and what is done about it:
- `len(reader)` counts packets: it is a claim. At the end of what decodes, `next()` repeats frames
  without a word. With FAULT_TOLERANCE the first repeat raises DECORDLimitReachedError instead.
- A packet that does not decode raises from another thread and loses frames already decoded, so
  how many came out varies. PyAV counts the good ones then; nothing else can.
- A packet that an edit list hides is counted but yields nothing. So the times come from the
  packets that are displayed (one demuxing pass, no decoding), not from get_frame_timestamp.
- Where the padded row happens to be a multiple of the width (16, 32, 48, 96 … pixels), the
  padding is taken for channels and `get_batch` fails; `next()` is as fast: see `unpad`.
- In MPEG-TS and its like the rewind to the start lands on a later key frame and the beginning is
  lost: PyAV decodes those containers (REWINDABLE names the others).
- `next()` pushes a packet each time it polls, and the thread behind it decodes all that was
  pushed: while the parent computes, frames pile up, at worst the whole video. So decord decodes
  what fits DECORD_BYTES, and PyAV the rest: on demand, and as fast once its scaler is reused.

Shape suffixes: N displayed frames of the file, M sampled frames, H height, W width, C channels.
"""

from __future__ import annotations

import itertools
import json
import math
import mmap
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

NOT_VIDEO = ("tty", "image2", "txt")  # what FFmpeg makes of a text or a picture

MP4_STARTS = (b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip")

MATROSKA_START, SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"

OTHER_STARTS = (MATROSKA_START, b"RIFF", b"OggS", b"FLV\x01", b"\x00\x00\x01\xba")

CUT_OFF = (
    "{name} starts like a video but cannot be opened and no frames can be read; "
    "it may be cut off, so copy or download it again."
)


class Unreadable(Exception):  # noqa: N818 - says what the file is
    """One clear sentence about a file, for the person."""


@dataclass(frozen=True)
class Index:
    """What one demuxing pass says of a file; nothing has been decoded yet.

    times_N: float64 seconds at which each frame is displayed, the first at 0, ascending.
    claimed: frames that the container claims, or None; Matroska claims seconds, from which the
    frames follow only where the rate is regular.
    frame_bytes: of one frame, RGB.
    """

    codec: str
    container: str
    times_N: NDArray[np.float64]
    duration_seconds: float
    claimed: int | None
    claimed_seconds: float | None
    frame_bytes: int

    @property
    def average_fps(self) -> float:
        """Frames a second; from the gaps, as the length of the last frame is often a guess."""
        last = float(self.times_N[-1])
        fps = (len(self.times_N) - 1) / last if last > 0 else 1 / self.duration_seconds
        return round(fps, 6)


def is_cut(path: Path) -> bool:
    """Whether the file is shorter than its own container says (MP4 boxes, Matroska, RIFF).

    Decoders do not tell: FFmpeg takes a Matroska file that ends early for one that ends.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(64)
        if head[:4] == b"RIFF":
            return int.from_bytes(head[4:8], "little") + 8 > size
        if head[:4] == MATROSKA_START:
            start = head.find(SEGMENT)  # the segment, after the EBML header
            if start < 0 or start + 12 > len(head) or head[start + 4] == 0:
                return False
            length = 9 - head[start + 4].bit_length()
            number = int.from_bytes(head[start + 4 : start + 4 + length], "big")
            number &= (1 << 7 * length) - 1
            unknown = number == (1 << 7 * length) - 1  # a live recording
            return not unknown and start + 4 + length + number > size
        if head[4:8] not in MP4_STARTS:
            return False
        at = 0
        while at + 8 <= size:
            file.seek(at)
            box = file.read(16)
            length = int.from_bytes(box[:4], "big")
            if length == 1:
                length = int.from_bytes(box[8:16], "big")
            if length < 8 or not box[4:8].isalnum():
                return False  # 0 is "to the end"; anything else is trailing rubbish
            at += length
    return at > size


def scan(path: Path, name: str, alive: Callable[[], None]) -> Index:
    """Demux the video stream once: when each frame is displayed, and what is claimed."""
    try:
        container = av.open(str(path))
    except (av.FFmpegError, OSError, UnicodeError) as error:
        with path.open("rb") as file:
            head = file.read(12)
        if head[4:8] in MP4_STARTS or head.startswith(OTHER_STARTS):
            raise Unreadable(CUT_OFF.format(name=name)) from error
        raise Unreadable(
            f"{name} is not a video: its content is in no video format that FFmpeg knows."
        ) from error
    with container:
        kind = container.format.name
        stream = container.streams.best("video")
        if kind in NOT_VIDEO or kind.endswith("_pipe"):
            raise Unreadable(f"{name} is not a video but a text or a picture.")
        if stream is not None and not stream.codec_context:
            raise Unreadable(CUT_OFF.format(name=name))
        if stream is None or "attached_pic" in str(stream.disposition):
            raise Unreadable(f"{name} has no video stream, only sound; give a file with pictures.")
        assert isinstance(stream, av.VideoStream)
        unit = float(stream.time_base or 1)
        shown: list[tuple[float, float]] = []
        try:
            for packet in container.demux(stream):
                alive()
                moment = packet.dts if packet.pts is None else packet.pts
                if packet.size and not packet.is_discard:
                    at = math.nan if moment is None else moment * unit
                    shown.append((at, (packet.duration or 0) * unit))
        except av.FFmpegError:
            pass  # what follows cannot be read: the frames before it are what there is
        rate = float(stream.average_rate or stream.guessed_rate or 25)
        codec = stream.codec_context.codec.canonical_name
        frame_bytes = 3 * stream.width * stream.height
        claimed = int(stream.frames) or None
        claimed_seconds = _tagged_seconds(stream.metadata.get("DURATION", ""))
        if claimed_seconds is None and container.duration and len(container.streams) == 1:
            claimed_seconds = container.duration / av.time_base
    if not shown:
        raise Unreadable(f"{name} holds no frames that can be read; it may be cut off.")
    if any(math.isnan(at) for at, _ in shown):  # a raw stream has no times
        shown = [(i / rate, 1 / rate) for i in range(len(shown))]
    shown.sort()
    times_N = np.array([at for at, _ in shown]) - shown[0][0]
    gap = float(np.median(np.diff(times_N))) if len(times_N) > 1 else 1 / rate
    last = shown[-1][1] or gap or 1 / rate
    end = float(times_N[-1]) + last
    # A cut may leave a few holes near the end, as frames are stored out of order.
    regular = np.mean(np.abs(np.diff(times_N) - gap) < 0.1 * gap + 0.002) > 0.9
    if claimed is None and claimed_seconds is not None and regular:
        claimed = round(claimed_seconds / gap)
    return Index(codec, kind, times_N, end, claimed, claimed_seconds, frame_bytes)


def _tagged_seconds(tag: str) -> float | None:
    """Matroska's DURATION tag, `00:00:02.600000000`, in seconds."""
    try:
        hours, minutes, seconds = tag.split(":")
        return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    except ValueError:
        return None


def good_frames(path: Path) -> Iterator[av.VideoFrame]:
    """PyAV's frames until the first packet that is cut or does not decode."""
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        assert isinstance(stream, av.VideoStream)
        try:
            for packet in container.demux(stream):
                if packet.is_corrupt:
                    break
                yield from (f for f in stream.decode(packet) if not f.is_corrupt)
        except av.FFmpegError:
            pass
        try:  # the frames that the decoder still holds back
            yield from (f for f in stream.decode(None) if not f.is_corrupt)
        except (av.FFmpegError, EOFError):
            return


def decode_av(path: Path) -> Iterator[NDArray[np.uint8]]:
    """PyAV's good frames [H, W, 3] until the first that is not, upright like a player's."""
    scaler = VideoReformatter()  # one for all frames: to_ndarray alone makes one a frame
    for frame in good_frames(path):
        raw_HWC = scaler.reformat(frame, format="rgb24").to_ndarray()
        yield np.rot90(raw_HWC, frame.rotation // 90)


def count_good(path: Path, alive: Callable[[], None]) -> int:
    """How many frames decode before the first that does not."""
    count = 0
    for _ in good_frames(path):
        alive()
        count += 1
    return count


def damaged(name: str, index: Index, good: int) -> Unreadable:
    """The sentence for a file of which only the first `good` frames decode."""
    few = f"only the first {good} decode" if good else "none of them decodes"
    claimed = max(index.claimed or 0, len(index.times_N))
    what = f"{claimed} frames and {few}"
    if index.claimed is None and index.claimed_seconds is not None:
        what = f"{index.claimed_seconds:.1f} seconds and only the first {good} frames decode"
    elif index.claimed is None and good >= claimed:
        what = f"more data than it has, and only {good} frames decode"
    return Unreadable(f"{name} is truncated or damaged: it claims {what}.")


def incomplete(index: Index, good: int) -> bool:
    """Whether the good frames of a cut file are fewer than it claims (or nobody knows).

    A cut that took only what follows the frames (an index, tags, sound) does no harm.
    """
    return index.claimed is None or good < max(index.claimed, len(index.times_N))


SLOTS = 2

FAULT_TOLERANCE = 1e-9  # share of repeated frames above which decord raises: any

REWINDABLE = ("mov", "matroska", "webm", "avi")

DECORD_BYTES = 2**30  # frames of a video that decord may pile up

ROUNDING_SECONDS = 1e-3  # Matroska's tick: times in a file are this coarse

RATE_TOLERANCE = 1e-3  # relative; 25.01 fps is 25 fps

ALIVE_SECONDS = 1.0

ORPHAN_SECONDS = 600  # a native loop that outlives its parent ends by SIGALRM

Frame = NDArray[np.uint8]


class Superseded(Exception):  # noqa: N818 - not an error
    """The parent does not want the rest of this video."""


class Channel:
    """JSON lines with the parent; a request for another job supersedes the present one."""

    def __init__(self) -> None:
        self.job = -1
        self._spoke = time.monotonic()
        self._waiting: dict[str, Any] | None = None
        self._ring: tuple[str, mmap.mmap] | None = None
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
        line = sys.stdin.buffer.readline()
        if not line:
            raise SystemExit(0)
        self._watch()
        request = json.loads(line)
        assert isinstance(request, dict)
        return request

    def ring(self, name: str, size: int) -> mmap.mmap:
        """The parent's ring; its name is gone from the file system once we have it."""
        if self._ring is None or self._ring[0] != name:
            with Path(name).open("r+b") as file:
                self._ring = (name, mmap.mmap(file.fileno(), size))
        return self._ring[1]

    def expect(self, what: str) -> dict[str, Any]:
        """The next request of this job, which is `what`, or Superseded."""
        request = self.read()
        if request["job"] != self.job or request["do"] != what:
            self._waiting = request if request["job"] != self.job else None
            raise Superseded
        return request


def decode_decord(path: Path) -> Iterator[Frame]:
    """Frames [H, W, 3] from decord, each decoded once, in the order of display."""
    import decord

    # One thread: as fast as more on the videos measured, and the other cores are the parent's.
    # decord takes names in UTF-8 alone; on Linux an open file has a second name.
    with path.open("rb") as file:
        utf8 = re.search("[\ud800-\udfff]", str(path)) is None
        name = str(path) if utf8 else f"/proc/self/fd/{file.fileno()}"
        reader = decord.VideoReader(name, num_threads=1, fault_tol=FAULT_TOLERANCE)
    while True:
        try:
            raw_HWC = reader.next().asnumpy()
        except StopIteration:
            return
        yield unpad(raw_HWC)


def unpad(raw_HWC: Frame) -> Frame:
    """Undo decord's C = padded row / W: the pixels are the first 3·W bytes of each row."""
    height, width, channels = raw_HWC.shape
    if channels == 3:
        return raw_HWC
    return raw_HWC.reshape(height, -1)[:, : 3 * width].reshape(height, width, 3)


def plan(
    index: Index, fps: float | None, policy: str
) -> tuple[float, NDArray[np.int64], NDArray[np.float64]]:
    """Which frame is sampled when: effective fps, source_M (ascending, into N), times_M.

    Sample j is the frame displayed at j / fps, the latest that is not later than that, for all
    such times before the end. Under "ceiling" a video that is not faster than `fps` keeps its own
    frames, one by one, at its own average rate; if its rate also varies (a frame more than half a
    frame off the regular grid), it is sampled on the grid of its average rate. Without an fps:
    every frame at its own time.
    """
    own, count = index.average_fps, len(index.times_N)
    everything = np.arange(count)
    if fps is None:
        return own, everything, index.times_N
    if policy == "ceiling" and own <= fps * (1 + RATE_TOLERANCE):
        if np.abs(index.times_N * own - everything).max() < 0.5:
            return own, everything, everything / own
        fps = own
    samples = max(1, math.ceil((index.duration_seconds - ROUNDING_SECONDS) * fps))
    times_M = np.arange(samples) / fps
    source_M = np.searchsorted(index.times_N, times_M + ROUNDING_SECONDS, side="right") - 1
    return fps, source_M, times_M


def uses_decord(index: Index) -> bool:
    """Whether decord reads this file right, and in bounded memory (see the top of the file)."""
    rewindable = any(kind in index.container.split(",") for kind in REWINDABLE)
    return rewindable and index.frame_bytes * len(index.times_N) <= DECORD_BYTES


def checked(path: Path, name: str, index: Index, channel: Channel) -> Iterator[Frame]:
    """All frames of the index in order; Unreadable as soon as it is known that some are bad."""
    if is_cut(path):
        good = count_good(path, channel.alive)
        if incomplete(index, good):
            raise damaged(name, index, good)
    frames = decode_decord(path) if uses_decord(index) else decode_av(path)
    count = 0
    cause = "it stops early"
    try:
        for frame_HWC in itertools.islice(frames, len(index.times_N)):
            count += 1
            yield frame_HWC
    except Exception as error:  # decord's errors share no base class
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        cause = re.sub(r"^\[[\d:]+\] \S+ ", "", cause)  # a clock and a line of C++
    if count < len(index.times_N):
        good = count_good(path, channel.alive)
        if good < len(index.times_N):
            raise damaged(name, index, good)
        raise Unreadable(f"{name} cannot be decoded beyond frame {count} of {good}: {cause}.")


def serve(request: dict[str, Any], channel: Channel) -> None:
    """Answer one `probe` or `frames` request."""
    path, name = Path(request["file"]), request["name"]
    index = scan(path, name, channel.alive)
    frames = checked(path, name, index, channel)
    first = next(frames)  # the size as displayed: decord turns frames upright
    fps, source_M, times_M = plan(index, request.get("fps"), request.get("policy", "ceiling"))
    info = {
        "width": first.shape[1],
        "height": first.shape[0],
        "fps": index.average_fps,
        "duration_seconds": index.duration_seconds,
        "frame_count": len(index.times_N),
        "codec": index.codec,
        "decoder": "decord" if uses_decord(index) else "pyav",
    }
    channel.send(info=info, fps=fps, samples=len(source_M))
    if request["do"] == "frames":
        go = channel.expect("go")
        capacity = go["slot_bytes"] // first.size
        ring = channel.ring(go["ring"], SLOTS * go["slot_bytes"])
        slots = [
            np.frombuffer(ring, np.uint8, capacity * first.size, slot * go["slot_bytes"])
            for slot in range(SLOTS)
        ]
        slots_MHWC = [slot.reshape(capacity, *first.shape) for slot in slots]
        fill(slots_MHWC, itertools.chain([first], frames), source_M, times_M, channel)


def fill(
    slots_MHWC: list[Frame],
    frames: Iterator[Frame],
    source_M: NDArray[np.int64],
    times_M: NDArray[np.float64],
    channel: Channel,
) -> None:
    """Write the sampled frames into the slots in turn, waiting for the parent to free them."""
    capacity, total = len(slots_MHWC[0]), len(source_M)
    slot = filled = done = 0
    free = SLOTS
    # repeats first in the zip: no frame is decoded after the last sampled one
    for repeats, frame_HWC in zip(np.bincount(source_M), frames, strict=False):
        channel.alive()
        for _ in range(repeats):
            if filled == 0:
                if free == 0:
                    channel.expect("free")
                    free += 1
                free -= 1
            slots_MHWC[slot][filled] = frame_HWC
            filled, done = filled + 1, done + 1
            if filled == capacity or done == total:
                times = times_M[done - filled : done].tolist()
                channel.send(slot=slot, times=times, last=done == total)
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
            channel.send(error=f"{request['name']} cannot be decoded: {error!r}.")


if __name__ == "__main__":
    main()
