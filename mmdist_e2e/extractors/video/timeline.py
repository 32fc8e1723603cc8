"""PyAV's view of a file: which picture a player shows at which time, and the pictures.

Opening reads one local file and nothing else: no playlist, no network, no second file. The list of
packets tells when pictures are shown, without decoding. Some files have packets that show nothing
or that cannot be decoded at the start; there the list is made by decoding the video once.

Time 0 is the start of the file as players count it, which may be before the first picture.
Where the clock restarts (two recordings joined by `cat`), times continue.

Shape suffixes: N displayed pictures, H height, W width, C channels (always 3, RGB).
"""

from __future__ import annotations

import collections
import contextlib
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias, cast

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import Interpolation, VideoReformatter
from numpy.typing import NDArray

Frame = NDArray[np.uint8]

Packet: TypeAlias = "av.Packet[av.VideoStream]"

# Demuxers of playlists, devices, pictures and texts.
REFUSED = re.compile(
    ".*_pipe|adf|alias_pix|bin|brender_pix|concat|dash|ffmetadata|fits|hls|ico|idf|image2|"
    "image2pipe|imf|lavfi|rtp|rtsp|sap|sdp|tty|txd|webm_dash_manifest|xbin"
)
ALLOWED = ",".join(name for name in av.formats_available if not REFUSED.fullmatch(name))
PICTURE_BRANDS = ("avif", "heic", "heix", "heim", "heis", "mif1")  # of MP4-like files

MP4_STARTS = (b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip")
MATROSKA_START, SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
OTHER_STARTS = (MATROSKA_START, b"OggS", b"FLV\x01", b"\x00\x00\x01\xba")

# Codecs of which one packet is one picture, apart from what `hidden` and `unclear` find.
ONE_TO_ONE = ("h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mjpeg", "prores", "ffv1", "gif")

BACKWARD_SECONDS = 0.1  # a decoding clock that goes back by more has restarted
PTS_BACKWARD_SECONDS = 1.0  # more, where only display times are known: pictures reorder
JOINT_PACKETS = 3  # a demuxer calls one of the last packets before a joint corrupt
FORWARD_SECONDS = 10.0  # as in FFmpeg: a transport stream that jumps by more is a joined one
WRONG_TIMES = 0.1  # share of pictures whose time may be a demuxer's wrong guess
PRIMING_SECONDS = 0.2  # sound may start that long before 0: padding that no player presents

NOT_VIDEO = (
    "is not a video but a text, a picture, a playlist, or in a format that FFmpeg does not "
    "know; give a video file."
)
CUT_OFF = (
    "starts like a video but cannot be opened and no frames can be read; "
    "it may be cut off, so copy or download it again."
)

STILL_SECONDS = 3600.0  # a picture shown for longer is damage, or days of repeated frames
MAXIMUM_PIXELS = 2**26  # of a picture, 8192×8192: an 8K video has half of them

COVER = av.stream.Disposition.attached_pic


class Unreadable(Exception):  # noqa: N818 - says what the file is
    """What is wrong with a file: a sentence that continues the file's name."""


@dataclass(frozen=True)
class Index:
    """When each picture of a file is shown, and what the container claims.

    times_N: float64 player times in seconds, ascending; the first may be above 0.
    duration_seconds: from 0 to the end of the last picture. last_seconds: its length alone.
    exact: whether times_N was read from the packets alone, one picture each.
    plain: whether the n-th decoded picture is certainly shown, upright, at times_N[n].
    shape: [H, W, 3] of the first picture, upright; all others are scaled to it.
    packets: how many were read. claimed: frames that the container claims, or None; Matroska
    claims seconds, from which the frames follow only where the rate is regular.
    zero: the file's time at which the player's clock starts.
    """

    codec: str
    container: str
    times_N: NDArray[np.float64]
    duration_seconds: float
    last_seconds: float
    exact: bool
    plain: bool
    shape: tuple[int, int, int]
    packets: int
    claimed: int | None
    claimed_seconds: float | None
    zero: float

    @property
    def average_fps(self) -> float:
        """Frames a second; from the gaps, as the length of the last frame is often a guess."""
        first, last = float(self.times_N[0]), float(self.times_N[-1])
        seconds = last - first
        fps = (len(self.times_N) - 1) / seconds if seconds else 1 / (self.duration_seconds - first)
        return round(fps, 6)


# PyAV reads metadata that is not UTF-8 by itself from version 19 on, and has no such option there.
ANY_METADATA: dict[str, Any] = (
    {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "replace"}
)


def open_file(path: Path) -> InputContainer:
    """Open for reading, or Unreadable. The file protocol takes every name as it is."""
    options = {"protocol_whitelist": "file", "format_whitelist": ALLOWED}
    try:
        file: Any = f"file:{path}"
        if "%" in path.name:  # FFmpeg would take frame%d.png for a row of pictures
            file = io.FileIO(path)
            file.name = "video"
        container = av.open(file, container_options=options, **ANY_METADATA)
    except (av.FFmpegError, OSError, ValueError) as error:
        with path.open("rb") as file:
            head = file.read(12)
        if head[4:8] in MP4_STARTS or head.startswith(OTHER_STARTS) or head[8:11] == b"AVI":
            raise Unreadable(CUT_OFF) from error
        raise Unreadable(NOT_VIDEO) from error
    assert isinstance(container, InputContainer)
    return container


def video_stream(container: InputContainer) -> av.VideoStream:
    """The stream that a player shows: never a cover picture."""
    best = container.streams.best("video")
    for stream in [best, *container.streams.video]:
        if isinstance(stream, av.VideoStream) and not stream.disposition & COVER:
            coder = stream.codec_context
            if not coder:
                raise Unreadable(CUT_OFF)
            if coder.width * coder.height > MAXIMUM_PIXELS:
                raise Unreadable(
                    f"has pictures of {coder.width}×{coder.height} pixels and may be damaged; at "
                    f"most {MAXIMUM_PIXELS} pixels (8192×8192) can be read, so scale it down."
                )
            coder.options = {"max_pixels": str(MAXIMUM_PIXELS)}  # the pictures may differ
            return stream
    if container.streams.audio or best is not None:
        raise Unreadable("has no video stream, only sound; give a file with pictures.")
    raise Unreadable(NOT_VIDEO)


def demuxed(container: InputContainer, stream: av.VideoStream) -> Iterator[Packet]:
    """PyAV's packets; at the end it stumbles over streams that it met late in a file."""
    with contextlib.suppress(IndexError):
        yield from container.demux(stream)


def packets(
    container: InputContainer, stream: av.VideoStream
) -> Iterator[tuple[Packet, bool, bool]]:
    """Packets on one clock, each with: whether it is whole, whether the clock restarts with it.

    The last one is PyAV's, which is empty and ends the stream. At a joint the demuxer calls
    whole packets corrupt, as their counters do not continue.
    """
    unit = float(stream.time_base or 1)
    jumps = container.format.name == "mpegts"
    shift, top = 0, 0
    last: int | None = None
    held: collections.deque[tuple[Packet, bool]] = collections.deque()
    for packet in demuxed(container, stream):
        shown = packet.dts if packet.pts is None else packet.pts
        restarts = False
        if packet.dts is None:  # Matroska's first packets; the order of display varies
            restarts = shown is not None and shown + shift < top - PTS_BACKWARD_SECONDS / unit
        elif last is not None:
            ahead_seconds = (packet.dts + shift - last) * unit
            jumped = jumps and packet.is_keyframe and ahead_seconds > FORWARD_SECONDS
            restarts = jumped or ahead_seconds < -BACKWARD_SECONDS
        if shown is not None:
            shift = top - shown if restarts else shift
            top = max(top, shown + shift + (packet.duration or 0))
        if packet.dts is not None:
            last = packet.dts + shift
        elif restarts:
            last = None
        if shift and packet.dts is not None:
            packet.dts += shift
        if shift and packet.pts is not None:
            packet.pts += shift
        held.append((packet, restarts))
        if len(held) > JOINT_PACKETS:
            whole = not held[0][0].is_corrupt or any(restarts for _, restarts in held)
            packet, restarts = held.popleft()
            yield packet, whole, restarts
    for packet, restarts in held:
        yield packet, not packet.is_corrupt, restarts


def hidden(codec: str, packet: Packet) -> bool:
    """Whether a VP8 or VP9 packet only updates a reference picture (an alt-ref frame)."""
    if codec not in ("vp8", "vp9"):
        return False
    data = memoryview(packet)
    first = data[0]
    if codec == "vp8":
        return not first & 0x10  # show_frame
    if data[-1] & 0xE0 == 0xC0:  # a superframe: hidden pictures and one that is shown
        return False
    after_profile = 2 if first & 0x30 == 0x30 else 3  # position of show_existing_frame
    return not first & 1 << after_profile and not first & 1 << (after_profile - 2)


def unclear(codec: str, packet: Packet) -> bool:
    """Whether an MPEG-4 packet may show no new picture or several (XviD's dropped and packed)."""
    if codec != "mpeg4":
        return False
    data = bytes(packet)
    start = data.find(b"\0\0\1\xb6")
    return start < 0 or len(data) - start < 16 or b"\0\0\1\xb6" in data[start + 4 :]


def decode(path: Path, index: Index) -> Iterator[tuple[float, av.VideoFrame]]:
    """PyAV's pictures in the order of display, each with its player time or NaN.

    What cannot be decoded before the first picture (or after a joint) is no damage, as players
    skip it: leading pictures of an open GOP, a start between key frames.

    Raises:
        Unreadable: after the last good picture before a packet that is cut or does not decode.
    """
    count, lenient, failed = 0, True, False

    def good(frames: list[av.VideoFrame]) -> Iterator[tuple[float, av.VideoFrame]]:
        nonlocal count, lenient, failed
        for frame in frames:
            if frame.is_corrupt:
                failed = failed or not lenient
            else:
                count, lenient = count + 1, False
                pts = frame.dts if frame.pts is None else frame.pts
                yield np.nan if pts is None else pts * unit - index.zero, frame

    with open_file(path) as container:
        stream = video_stream(container)
        unit = float(stream.time_base or 1)  # the last frames come without one
        try:
            for packet, whole, restarts in packets(container, stream):
                lenient = lenient or restarts
                if not packet.size:
                    continue  # nothing changes; given to a decoder it would end the stream
                if not whole and not lenient:
                    failed = True
                    break
                try:
                    frames = stream.decode(packet)
                except av.FFmpegError:
                    failed = not lenient or packet.is_keyframe
                    frames = []
                yield from good(frames)
                if failed:
                    break
        except av.FFmpegError:
            failed = True  # what follows cannot be read
        with contextlib.suppress(av.FFmpegError, EOFError):
            yield from good(stream.decode(None))  # what the decoder still holds back
    if failed or not count:
        raise damage(index, count)


def orientation(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """How to turn a decoded picture upright: swap rows and columns, then flip columns, rows.

    A display matrix maps (x, y) to (a·x + c·y, b·x + d·y); angles are taken to the nearest 90°.
    """
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return False, False, False
    a, b, _, c, d = (int(v) for v in np.frombuffer(data, np.int32)[:5])  # type: ignore[call-overload]
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return False, a < 0, d < 0
    return True, c < 0, b < 0


BICUBIC = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
JPEG_SCALING = {"interpolation": BICUBIC, "src_colorspace": "ITU601"}


def scaled(shape: tuple[int, int, int], longer_side: int | None) -> tuple[int, int, int]:
    """[H, W, 3] after scaling the longer side, as ffmpeg's `scale=320:-1` rounds the other one."""
    if longer_side is None:
        return shape
    height, width = ((2 * side * longer_side // max(shape) + 1) // 2 for side in shape[:2])
    return max(height, 1), max(width, 1), 3


class Upright:
    """Decoded pictures to RGB [H, W, 3], upright, all of the size that the first one gets.

    With a `longer_side`, libswscale scales as the ffmpeg command does for JPEG files, which have
    no other matrix of colours than BT.601's.
    """

    def __init__(self, first: av.VideoFrame, longer_side: int | None) -> None:
        self._scaler = VideoReformatter()  # one for all: to_ndarray alone makes one a frame
        self.turned = orientation(first)
        height, width, _ = scaled((first.height, first.width, 3), longer_side)
        how = {} if longer_side is None else JPEG_SCALING
        self._how: dict[str, Any] = {"width": width, "height": height, "format": "rgb24", **how}

    def __call__(self, frame: av.VideoFrame) -> Frame:
        picture = cast(Frame, self._scaler.reformat(frame, **self._how).to_ndarray())
        swap, flip_columns, flip_rows = self.turned
        if swap:
            picture = picture.swapaxes(0, 1)
        return picture[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]


def scan(path: Path, alive: Callable[[], None]) -> Index:
    """The index of a file that decodes at least at its start.

    One pass over the packets and the first picture are enough where each packet is one picture;
    otherwise all pictures are decoded (not converted) for their times.

    Raises:
        Unreadable: not a video, or damaged so that it shows before the pictures are delivered.
    """
    with open_file(path) as container:
        stream = video_stream(container)
        kind, codec = container.format.name, stream.codec_context.codec.canonical_name
        unit = float(stream.time_base or 1)
        listed: list[tuple[float, float]] = []  # shown at, seconds
        moments: list[int | None] = []
        ends, lengths = [], []
        exact = codec in ONE_TO_ONE
        plain = stream == container.streams.best("video")
        try:
            for packet, _, restarts in packets(container, stream):
                alive()
                moment = packet.dts if packet.pts is None else packet.pts
                length = (packet.duration or 0) * unit
                if moment is not None and not packet.is_discard:
                    ends.append(moment * unit + length)
                if not packet.size:
                    exact = exact and moment is None  # PyAV's last packet is empty
                    continue
                exact = exact and packet.pts is not None and not unclear(codec, packet)
                exact = exact and (packet.is_keyframe or bool(moments))
                moments.append(moment)
                lengths.append(length)
                shows = not hidden(codec, packet)
                plain = plain and shows and not restarts
                if shows and moment is not None and not packet.is_discard:
                    listed.append((moment * unit, length))
        except av.FFmpegError:
            pass  # what follows cannot be read: the frames before it are what there is
        rate = float(stream.guessed_rate or stream.average_rate or 25)
        start: int | None = container.start_time
        duration = container.duration
        claimed = int(stream.frames) or None
        seconds = _tagged_seconds(stream.metadata.get("DURATION", ""))
        if seconds is None and duration and len(container.streams) == 1:
            seconds = duration / av.time_base
        is_picture = container.metadata.get("major_brand", "").strip() in PICTURE_BRANDS
    if is_picture or (kind in ("gif", "apng") and len(moments) == 1):
        raise Unreadable(NOT_VIDEO)
    if not moments:
        raise Unreadable("holds no frames that can be read; it may be cut off.")
    if not listed:  # a raw stream has no time stamps
        step = float(np.median(lengths)) or 1 / rate
        listed = [(i * step, step) for i in range(len(moments))]
        ends, start = [len(moments) * step], None
    listed.sort()
    first = listed[0][0]
    gaps = np.diff([at for at, _ in listed])
    exact = exact and bool(np.all(gaps > 0))
    exact = exact and moments[0] == min(m for m in moments if m is not None)
    zero = first if start is None else start / av.time_base
    if exact:  # otherwise the first ones may not be shown; see below
        zero = min(zero, first)
    if -PRIMING_SECONDS < zero < 0 <= first:
        zero = 0.0
    times_N = np.array([at for at, _ in listed]) - zero
    gap = (float(np.median(gaps)) if len(gaps) else 0.0) or 1 / rate
    # A cut may leave a few holes near the end, as frames are stored out of order.
    regular = np.mean(np.abs(gaps - gap) < 0.1 * gap + 0.002) > 0.9
    if claimed is None and seconds is not None and regular:
        claimed = round((seconds - first) / gap)
    length = listed[-1][1] or gap
    end = max(max(ends) - zero, float(times_N[-1]) + length)
    plain = plain and exact and duration is not None
    shape = (0, 0, 3)
    counts = len(moments), claimed, seconds
    index = Index(codec, kind, times_N, end, length, exact, plain, shape, *counts, zero)
    index = _with_pictures(path, index, gap, alive)
    still = np.diff(index.times_N, prepend=0.0, append=index.duration_seconds).max()
    if still > STILL_SECONDS:
        raise Unreadable(
            f"shows one picture for {still / 3600:.1f} hours, so its time stamps seem to be "
            f"damaged; convert it with a video tool."
        )
    return index


def _with_pictures(path: Path, index: Index, gap: float, alive: Callable[[], None]) -> Index:
    """The index with what decoding adds: the shape, and the times where packets do not tell."""
    cut, exact, plain, shape = is_cut(path), index.exact, index.plain, index.shape
    times: list[float] = []
    for at, frame in decode(path, index):
        alive()
        if not times:
            swap, *flips = orientation(frame)
            size = (frame.width, frame.height) if swap else (frame.height, frame.width)
            shape = *size, 3
            plain = plain and not (swap or any(flips))
            exact = exact and abs(at - index.times_N[0]) < 1e-6 and not frame.interlaced_frame
            if exact and not cut:
                break
        times.append(at)
    if cut:
        missing = index.claimed is None or index.packets < index.claimed
        if missing or (exact and len(times) < len(index.times_N)):
            raise damage(index, len(times))
    if exact:
        return replace(index, plain=plain, shape=shape)
    times_N = np.array(times)
    order_N = np.arange(len(times_N))
    known_N = ~np.isnan(times_N)
    if known_N.any():
        times_N = np.interp(order_N, order_N[known_N], times_N[known_N])
    else:
        times_N = order_N * gap
    # Pictures come in the order of display; AVI has no display times, and FFmpeg's guesses for
    # packed pictures are the right times in another order.
    ordered_N = np.sort(times_N)
    if np.mean(np.minimum.accumulate(times_N[::-1])[::-1] < times_N - 1) > WRONG_TIMES:
        raise Unreadable(
            "seems to be joined from several videos, as its clock restarts; convert it "
            "with a video tool."
        )
    early = min(float(ordered_N[0]), 0.0)
    return replace(
        index,
        exact=False,
        plain=False,
        shape=shape,
        times_N=ordered_N - early,
        duration_seconds=max(index.duration_seconds, float(ordered_N[-1]) + gap) - early,
    )


def _tagged_seconds(tag: str) -> float | None:
    """Matroska's DURATION tag, `00:00:02.600000000`, in seconds."""
    try:
        hours, minutes, seconds = tag.split(":")
        return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    except ValueError:
        return None


def damage(index: Index, good: int) -> Unreadable:
    """The sentence for a file of which only the first `good` frames decode."""
    few = f"only the first {good} decode" if good else "none of them decodes"
    claimed = max(index.claimed or 0, len(index.times_N))
    what = f"{claimed} frames and {few}"
    if index.claimed is None and index.claimed_seconds is not None:
        what = f"{index.claimed_seconds:.1f} seconds and only the first {good} frames decode"
    elif index.claimed is None and good >= claimed:
        what = f"more data than it has, and only {good} frames decode"
    return Unreadable(f"is truncated or damaged: it claims {what}.")


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
            unknown = (1 << 7 * length) - 1  # the size that a live recording gives
            number = int.from_bytes(head[start + 4 : start + 4 + length], "big") & unknown
            return number != unknown and start + 4 + length + number > size
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
