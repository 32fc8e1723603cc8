"""What a video file says of itself: times of its frames, claims, and whether bytes are missing.

Part of the decoder process (decoder.py): uses PyAV, never torch. `scan` demuxes without decoding;
PyAV decodes only what decord cannot be trusted with, and counts the good frames of a bad file.

Shape suffixes: N displayed frames of the file, H height, W width, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

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
