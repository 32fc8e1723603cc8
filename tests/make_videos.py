"""Small videos for the tests, made with PyAV: every odd thing a file can be."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray


def pictures(count: int, *, width: int = 96, height: int = 64) -> list[NDArray[np.uint8]]:
    """Frames [H, W, 3] that are all different: a block that moves over a changing ground."""
    frames = []
    for i in range(count):
        y, x = np.mgrid[0:height, 0:width]
        ground = np.stack([(x + 3 * i) % 256, (y + 5 * i) % 256, (x + y + 7 * i) % 256], axis=-1)
        left, top = (5 * i) % width, (3 * i) % height
        ground[top : top + 16, left : left + 16] = (255, 255, 0)
        frames.append(ground.astype(np.uint8))
    return frames


def make_video(
    path: Path,
    count: int = 65,
    *,
    width: int = 96,
    height: int = 64,
    rate: int = 25,
    times_ms: Sequence[int] | None = None,
    pix_fmt: str = "yuv420p",
    codec: str = "libx264",
    b_frames: int = 2,
    gop: int = 12,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    audio: bool = False,
) -> Path:
    """Write `count` frames at `rate`, or at the given presentation times in milliseconds."""
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.codec_context.max_b_frames = b_frames
        stream.codec_context.gop_size = gop
        stream.options = {"threads": "1", **(options or {})}
        if times_ms is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        sound = container.add_stream("aac", rate=16000, layout="mono") if audio else None
        for i, picture in enumerate(pictures(count, width=width, height=height)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if times_ms is not None:
                frame.pts, frame.time_base = times_ms[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        if sound is not None:
            for packet in _hum(sound, seconds=count / rate):
                container.mux(packet)
            container.mux(sound.encode(None))
        container.mux(stream.encode(None))
    return path


def make_audio(path: Path, *, seconds: float = 1.0) -> Path:
    """An MP4 with sound alone."""
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=16000, layout="mono")
        for packet in _hum(sound, seconds=seconds):
            container.mux(packet)
        container.mux(sound.encode(None))
    return path


def _hum(stream: av.AudioStream, *, seconds: float) -> list[av.Packet]:
    packets = []
    for start in range(0, int(seconds * 16000), 1024):
        wave = np.sin(np.arange(start, start + 1024) * 2 * np.pi * 220 / 16000)
        frame = av.AudioFrame.from_ndarray(
            wave.astype(np.float32)[None], format="fltp", layout="mono"
        )
        frame.sample_rate, frame.pts = 16000, start
        frame.time_base = Fraction(1, 16000)
        packets.extend(stream.encode(frame))
    return packets


def cut(source: Path, target: Path, fraction: float) -> Path:
    """Keep the first `fraction` of the bytes of a file."""
    data = source.read_bytes()
    target.write_bytes(data[: int(len(data) * fraction)])
    return target


def frames_and_times(path: Path) -> tuple[list[NDArray[np.uint8]], list[float], float]:
    """The oracle: PyAV's frames [H, W, 3], their player times, and the end of the last one."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        decoded = [f for f in container.decode(stream) if not f.is_corrupt]
        times = [float(f.pts * f.time_base) for f in decoded]
        frames = [f.to_ndarray(format="rgb24") for f in decoded]
        last = decoded[-1]
        length = float(last.duration * last.time_base) if last.duration else 0.0
        start = times[0] if container.start_time is None else container.start_time / 1e6
    return frames, [t - start for t in times], times[-1] - start + length


def long_video(path: Path, repeats: int, *, width: int = 320, height: int = 240) -> Path:
    """12 · repeats frames at 25 fps: one group of pictures encoded once and muxed many times."""
    seed = make_video(path.with_suffix(".seed.mp4"), 12, width=width, height=height, b_frames=0)
    with av.open(str(seed)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        group = [bytes(p) for p in source.demux(video=0) if p.size]
        for i in range(12 * repeats):
            packet = av.Packet(group[i % 12])
            packet.stream, packet.time_base = stream, Fraction(1, 25)
            packet.pts = packet.dts = i
            packet.duration, packet.is_keyframe = 1, i % 12 == 0
            target.mux(packet)
    return path


def shift(source: Path, target: Path, seconds: float) -> Path:
    """Copy a video with all its times moved; below 0 the MP4 hides frames by an edit list."""
    options = {"avoid_negative_ts": "disabled"}
    with av.open(str(source)) as old, av.open(str(target), "w", options=options) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.size:
                packet.stream = stream
                packet.pts += int(seconds / packet.time_base)
                packet.dts += int(seconds / packet.time_base)
                new.mux(packet)
    return target


def turn(source: Path, target: Path) -> Path:
    """Copy an MP4, its display matrix turned by a quarter (as phones film)."""
    data = bytearray(source.read_bytes())
    at = data.find(b"tkhd") + 4 + 4 + 20 + 8 + 8
    data[at : at + 36] = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 0, 0, 2**30)
    target.write_bytes(data)
    return target
