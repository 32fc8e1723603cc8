"""Videos as people have them: each odd kind of file, against PyAV or pictures with grey numbers."""

from __future__ import annotations

import os
import shutil
import socket
import struct
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from make_videos import make_video, pictures
from numpy.typing import NDArray

from mmdist_e2e.extractors.video.reader import Decoder, VideoError
from mmdist_e2e.extractors.video.timeline import hidden

Unit = tuple[bytes, bool]  # an encoded packet, and whether it is a key frame


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    with Decoder(stall_seconds=20) as shared:
        yield shared


def read(decoder: Decoder, path: Path, **options: object) -> tuple[NDArray, NDArray, float, float]:
    """Frames, times, rate, duration."""
    stream = decoder.frames(path, **options)  # type: ignore[arg-type]
    chunks = list(stream)
    frames = np.concatenate([chunk.frames_NHWC for chunk in chunks])
    times = np.concatenate([chunk.times_N for chunk in chunks])
    assert len(frames) == len(times) == stream.sample_count
    return frames, times, stream.fps, stream.info.duration_seconds


def shown(path: Path) -> tuple[list[NDArray], list[float]]:
    """The oracle: every picture that PyAV decodes, packets that fail skipped, and its time."""
    frames = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        for packet in container.demux(stream):
            if packet.size or packet.dts is None:
                try:
                    frames += packet.decode()
                except av.FFmpegError:
                    continue
        unit, start = float(stream.time_base), (container.start_time or 0) / 1e6
        times = [frame.pts * unit - start for frame in frames]
    return [f.to_ndarray(format="rgb24") for f in frames], times


def agrees(decoder: Decoder, path: Path) -> None:
    """Frames and times are those of PyAV; the grid of 25 a second shows the latest of them."""
    expected, expected_times = shown(path)
    frames, times, *_ = read(decoder, path, fps=None)
    np.testing.assert_allclose(times, expected_times, atol=1e-3)
    for frame, picture in zip(frames, expected, strict=True):
        assert np.abs(frame.astype(int) - picture).mean() < 1
    frames, times, *_ = read(decoder, path, fps=25, fps_policy="exact")
    for frame, at in zip(frames, times, strict=True):
        near = [i for i, t in enumerate(expected_times) if t < at + 0.5 / 25 - 1e-6]
        latest = max(near, default=0)
        assert np.abs(frame.astype(int) - expected[latest]).mean() < 1


def encode(codec: str, count: int = 40, width: int = 96, height: int = 64) -> list[Unit]:
    encoder = av.CodecContext.create(codec, "w")
    encoder.width, encoder.height, encoder.pix_fmt = width, height, "yuv420p"
    encoder.time_base, encoder.framerate = Fraction(1, 25), Fraction(25)
    encoder.gop_size, encoder.max_b_frames = 12, 0
    packets = []
    for i, picture in enumerate(pictures(count, width=width, height=height)):
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame.pts, frame.time_base = i, Fraction(1, 25)
        packets += encoder.encode(frame)
    return [(bytes(p), p.is_keyframe) for p in packets + encoder.encode(None)]


def mux(path: Path, codec: str, units: list[Unit], times_ms: list[int] | None = None) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for i, (data, key) in enumerate(units):
            packet = av.Packet(data)
            packet.pts = packet.dts = 40 * i if times_ms is None else times_ms[i]
            packet.time_base, packet.duration = Fraction(1, 1000), 40
            packet.stream, packet.is_keyframe = stream, key
            container.mux(packet)
    return path


@pytest.mark.parametrize("suffix", ["webm", "mkv"])
def test_hidden_vp8_pictures_are_not_shown(suffix: str, tmp_path: Path, decoder: Decoder) -> None:
    units, times = [], []
    for i, (data, key) in enumerate(encode("libvpx")):
        if i and i % 10 == 0:  # as alt-ref pictures: the show bit is 0
            units.append((bytes([data[0] & ~0x10]) + data[1:], False))
            times.append(40 * i - 20)
        units.append((data, key))
        times.append(40 * i)
    path = mux(tmp_path / f"hidden.{suffix}", "libvpx", units, times)
    assert decoder.probe(path).frame_count == 40
    agrees(decoder, path)


def test_hidden_vp9_pictures_are_told_by_their_header() -> None:
    def is_hidden(bits: str, last: int = 0) -> bool:
        packet = av.Packet(int(bits.ljust(64, "0"), 2).to_bytes(8, "big") + bytes([last]))
        return hidden("vp9", packet)

    for profile in ("00", "10", "01", "110"):  # 3 has a reserved bit
        head = "10" + profile
        assert is_hidden(head + "0" + "1" + "0")  # no repeat, not a key picture, not shown
        assert is_hidden(head + "0" + "0" + "0")
        assert not is_hidden(head + "0" + "1" + "1")
        assert not is_hidden(head + "1" + "000")  # repeats a stored picture
        assert not is_hidden(head + "010", last=0b110_00_001)  # a superframe shows one
    for codec in ("libvpx-vp9", "libvpx"):
        name = codec.removeprefix("libvpx-").replace("lib", "").replace("vpx", "vp8")
        assert not any(hidden(name, av.Packet(data)) for data, _ in encode(codec))


@pytest.mark.parametrize(
    ("codec", "name"),
    [("libx264", "x.mkv"), ("libx264", "x.ts"), ("libvpx", "x.webm"), ("libvpx-vp9", "9.webm")],
)
def test_a_start_between_key_frames_is_no_damage(
    codec: str, name: str, tmp_path: Path, decoder: Decoder
) -> None:
    path = mux(tmp_path / name, codec, encode(codec)[5:])
    assert len(shown(path)[0]) == 28
    agrees(decoder, path)


def test_leading_pictures_of_an_open_group_are_skipped(tmp_path: Path, decoder: Decoder) -> None:
    options = {"x265-params": "log-level=none:open-gop=1:keyint=20:min-keyint=20:scenecut=0"}
    whole = make_video(tmp_path / "w.mp4", codec="libx265", b_frames=4, options=options)
    for name in ("cut.mkv", "cut.mp4", "cut.ts"):
        path, keys = tmp_path / name, 0
        with av.open(str(whole)) as old, av.open(str(path), "w") as new:
            stream = new.add_stream_from_template(old.streams.video[0])
            for packet in old.demux(video=0):
                keys += packet.is_keyframe
                if keys >= 2 and packet.size:
                    packet.stream = stream
                    new.mux(packet)
        agrees(decoder, path)


def test_empty_packets_repeat_a_picture(tmp_path: Path, decoder: Decoder) -> None:
    units = encode("mpeg4")
    units[-1] = units[20] = units[7] = (b"", False)
    for name in ("empty.avi", "empty.mkv"):
        path = mux(tmp_path / name, "mpeg4", units)
        agrees(decoder, path)
        assert read(decoder, path)[2] == 25  # and not the lower average


def test_packed_pictures_are_shown_one_by_one(tmp_path: Path, decoder: Decoder) -> None:
    """XviD in AVI: two pictures in one packet, then a packet that stands for the second."""
    encoder = av.CodecContext.create("mpeg4", "w")
    encoder.width, encoder.height, encoder.pix_fmt = 96, 64, "yuv420p"
    encoder.time_base, encoder.framerate = Fraction(1, 25), Fraction(25)
    encoder.max_b_frames, encoder.gop_size, encoder.options = 1, 12, {"b_strategy": "0"}
    packets = []
    for i, picture in enumerate(pictures(40)):
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame.pts, frame.time_base = i, Fraction(1, 25)
        packets += encoder.encode(frame)
    units: list[Unit] = []
    latest = -1
    for packet in packets + encoder.encode(None):
        if packet.pts < latest:
            units[-1] = (b"\0\0\1\xb2DivX503b1393p" + units[-1][0] + bytes(packet), units[-1][1])
            units.append((b"\x7f", False))
        else:
            units.append((bytes(packet), packet.is_keyframe))
        latest = packet.pts
    path = mux(tmp_path / "packed.avi", "mpeg4", units)
    expected, _ = shown(path)
    assert len(expected) == 40
    frames, times, fps, _ = read(decoder, path, fps=None)
    assert fps == 25
    np.testing.assert_allclose(times, 0.04 * np.arange(1, 41), atol=1e-6)
    for frame, picture in zip(frames, expected, strict=True):
        assert np.abs(frame.astype(int) - picture).mean() < 1


CONTAINERS = {
    "live.webm": {"codec": "libvpx", "b_frames": 0, "container_options": {"live": "1"}},
    "live.mkv": {"container_options": {"live": "1"}, "audio": True},
    "fragments.mp4": {"container_options": {"movflags": "frag_every_frame+empty_moov"}},
    "mpeg2.ts": {"codec": "mpeg2video"},
    "mpeg2.mpg": {"codec": "mpeg2video"},
    "flash.flv": {"audio": True},
    "av1.mp4": {"codec": "libsvtav1", "b_frames": 0},
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_containers(name: str, tmp_path: Path, decoder: Decoder) -> None:
    path = make_video(tmp_path / name, 40, **CONTAINERS[name])  # type: ignore[arg-type]
    agrees(decoder, path)


@pytest.mark.parametrize("rate", [25, 30])
def test_a_raw_stream_has_the_rate_of_its_codec(
    rate: int, tmp_path: Path, decoder: Decoder
) -> None:
    path = make_video(tmp_path / "raw.h264", 40, rate=rate)
    frames, times, fps, duration = read(decoder, path, fps=None)
    assert len(frames) == 40
    assert fps == pytest.approx(rate, rel=1e-3)
    np.testing.assert_allclose(times, np.arange(40) / rate, atol=1e-4)
    assert duration == pytest.approx(40 / rate)


def grey_part(path: Path, first: int, *, side: int = 64, start: int = 0) -> bytes:
    """50 pictures whose grey level is their number, counted from `first`."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = side, side, "yuv420p"
        stream.options = {"g": "25", "bf": "2", "crf": "1"}
        for i in range(50):
            grey = np.full((side, side, 3), 2 * (first + i), np.uint8)
            frame = av.VideoFrame.from_ndarray(grey, format="rgb24")
            frame.pts, frame.time_base = start + i, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path.read_bytes()


@pytest.mark.parametrize("starts", [(0, 0), (0, 90_000), (90_000, 0), (900_000, 0)])
@pytest.mark.parametrize("suffix", ["ts", "mkv"])
def test_the_clock_continues_where_files_are_joined(
    suffix: str, starts: tuple[int, int], tmp_path: Path, decoder: Decoder
) -> None:
    if suffix == "mkv" and starts[1] > starts[0]:
        pytest.skip("in Matroska that is a still")
    path = tmp_path / f"joined.{suffix}"
    first = grey_part(tmp_path / f"a.{suffix}", 0, start=starts[0])
    side = 96 if suffix == "ts" else 64  # Matroska holds the size once
    path.write_bytes(first + grey_part(tmp_path / f"b.{suffix}", 50, side=side, start=starts[1]))
    frames, _, fps, duration = read(decoder, path)
    assert fps == 25
    assert duration == pytest.approx(4.0, abs=0.1)
    assert frames.shape[1:] == (64, 64, 3)  # the second part is scaled to the size of the first
    begin = len(frames) - 100
    numbers = frames[begin:].mean(axis=(1, 2, 3)) / 2
    np.testing.assert_allclose(numbers, np.arange(100), atol=1.2)


def test_a_clock_of_33_bits_may_wrap(tmp_path: Path, decoder: Decoder) -> None:
    for seconds_before in (1, 100):
        path, offset = tmp_path / "wrap.ts", 2**33 / 90_000 - seconds_before
        options = {"output_ts_offset": str(offset)}
        with av.open(str(path), "w", container_options=options) as container:
            stream = container.add_stream("libx264", rate=25)
            stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
            for i, (data, key) in enumerate(encode("libx264")):
                packet = av.Packet(data)
                packet.pts = packet.dts = i * seconds_before
                packet.time_base, packet.stream = Fraction(1, 25), stream
                packet.is_keyframe = key
                container.mux(packet)
        frames, times, _, duration = read(decoder, path, fps=None)
        assert len(frames) == 40
        np.testing.assert_allclose(times, np.arange(40) * seconds_before / 25, atol=1e-3)
        assert duration == pytest.approx(40 * seconds_before / 25, rel=0.05)


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.webm", "libvpx"), ("9.webm", "libvpx-vp9"), ("a.mkv", "libx264"), ("a.avi", "mpeg4")],
)
def test_a_size_that_changes_is_scaled_to_the_first(
    name: str, codec: str, tmp_path: Path, decoder: Decoder
) -> None:
    units = encode(codec, 20) + encode(codec, 20, 160, 128) + encode(codec, 20, 64, 96)
    path = mux(tmp_path / name, codec, units)
    with av.open(str(path)) as container:
        expected = [f.to_ndarray(format="rgb24", width=96, height=64) for f in container.decode()]
    for options in ({"fps": None}, {"fps": 10}):  # every picture, and some: two decoders
        frames, times, *_ = read(decoder, path, **options)
        for frame, at in zip(frames, times, strict=True):
            picture = expected[int(at * 25 + 0.02)]
            assert np.abs(frame.astype(int) - picture).mean() < 4


MATRICES = {  # what a player shows, from the stored picture; a, b, c, d of the display matrix
    (1, 0, 0, 1): lambda p: p,
    (0, 1, -1, 0): lambda p: np.rot90(p, -1),
    (0, -1, 1, 0): lambda p: np.rot90(p, 1),
    (-1, 0, 0, -1): lambda p: p[::-1, ::-1],
    (-1, 0, 0, 1): lambda p: p[:, ::-1],
    (1, 0, 0, -1): lambda p: p[::-1],
    (0, 1, 1, 0): lambda p: p.swapaxes(0, 1),
    (0, -1, -1, 0): lambda p: p[::-1, ::-1].swapaxes(0, 1),
}


@pytest.mark.parametrize("matrix", MATRICES)
def test_turned_and_mirrored_pictures_are_upright(
    matrix: tuple[int, ...], tmp_path: Path, decoder: Decoder
) -> None:
    path = make_video(tmp_path / "video.mp4", 12)
    stored, _ = shown(path)
    data = bytearray(path.read_bytes())
    at = data.find(b"tkhd") + 4 + 4 + 20 + 8 + 8
    a, b, c, d = (v * 65536 for v in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 2**30)
    path.write_bytes(data)
    frames, *_ = read(decoder, path, fps=None)
    assert decoder.probe(path).height == frames.shape[1]
    for frame, picture in zip(frames, stored, strict=True):
        expected = MATRICES[matrix](picture)
        assert frame.shape == expected.shape
        assert np.abs(frame.astype(int) - expected).mean() < 1


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_pictures_may_start_after_the_sound(suffix: str, tmp_path: Path, decoder: Decoder) -> None:
    path = tmp_path / f"late.{suffix}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        sound = container.add_stream("aac", rate=44100, layout="mono")
        packets = []
        for i, picture in enumerate(pictures(50)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = i + 75
            packets += stream.encode(frame)
        packets += stream.encode(None)
        for i in range(220):
            silence = np.zeros((1, 1024), np.float32)
            tone = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
            tone.sample_rate, tone.pts = 44100, 1024 * i
            packets += sound.encode(tone)
        container.mux(packets + sound.encode(None))
    agrees(decoder, path)
    frames, times, fps, duration = read(decoder, path)
    assert fps == pytest.approx(25)
    assert times[0] == 0
    assert duration == pytest.approx(5.0, abs=0.05)
    assert len(frames) == pytest.approx(125, abs=1)


def many(*parts: tuple[float, int, float]) -> list[int]:
    """Times in ms: from a start in seconds, so many pictures, so many a second."""
    return [round(1000 * (start + i / fps)) for start, count, fps in parts for i in range(count)]


@pytest.mark.parametrize(
    ("times_ms", "fps"),
    [
        (many((0, 90, 30), (60, 1, 1)), 25.0),  # motion, then a still
        (many((0, 1, 1), (60, 90, 30)), 25.0),
        (many((0, 60, 30), (2, 200, 10)), 25.0),  # dark: the camera slows down
        (many((0, 30, 10), (30, 30, 10)), 10.0),
        ([t for t in many((0, 50, 10)) if t not in (500, 600, 3000)], 10.0),  # lost pictures
        ([0, 5000, 10_000, 15_000, 30_000], 0.2),  # slides
        (many((0, 20, 0.5)), 0.5),  # slow and regular
        (many((0, 40, 12.5)), 12.5),
        (many((0, 60, 60)), 25.0),
    ],
)
def test_a_still_does_not_thin_out_the_motion(
    times_ms: list[int], fps: float, tmp_path: Path, decoder: Decoder
) -> None:
    path = make_video(tmp_path / "vfr.mp4", len(times_ms), times_ms=times_ms, b_frames=0)
    frames, times, effective, _ = read(decoder, path)
    assert effective == pytest.approx(fps, rel=0.005)
    expected, at = shown(path)
    for j in range(0, len(frames), max(1, len(frames) // 60)):
        latest = max(i for i, t in enumerate(at) if t <= times[j] + 0.0015)
        if abs(at[latest] - times[j]) > 0.002 or j == 0:
            assert np.abs(frames[j].astype(int) - expected[latest]).mean() < 1


def test_tags_in_another_encoding(tmp_path: Path, decoder: Decoder) -> None:
    for name in ("tag.mp4", "tag.mkv", "tag.avi"):
        path = tmp_path / name
        codec = "mpeg4" if name.endswith("avi") else "libx264"
        with av.open(str(path), "w") as container:
            container.metadata["title"] = "XXXXXXXX"
            stream = container.add_stream(codec, rate=25)
            stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
            for picture in pictures(10):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode(None))
        raw = path.read_bytes()
        assert raw.count(b"XXXXXXXX") == 1
        path.write_bytes(raw.replace(b"XXXXXXXX", b"Caf\xe9 \xb0\x8e!"))
        assert decoder.probe(path).frame_count == 10


NAMES = [b"caf\xe9.mp4", b"a\nb.mp4", b"-i.mp4", b"f%03d.mp4", b"%d.png", b"http:x.mp4", b"pipe:0"]
NAMES += [
    b"concat:a|b.mp4",
    b"subfile,,start,0,end,5,,:x",
    b"x" * 251 + b".mp4",
    b"v.m3u8",
    b"\xff",
]


def test_names_of_any_bytes(
    tmp_path: Path, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    video = make_video(tmp_path / "v.mp4", 10)
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        shutil.copy(video, os.fsencode(tmp_path) + b"/" + name)
        assert decoder.probe(Path(os.fsdecode(name))).frame_count == 10
    Path(os.fsdecode(b"b\xe9\nd.mp4")).write_text("no video")
    with pytest.raises(VideoError) as caught:
        decoder.probe(os.fsdecode(b"b\xe9\nd.mp4"))
    assert str(caught.value).isprintable()


def test_what_is_no_video_file_is_refused_at_once(tmp_path: Path, decoder: Decoder) -> None:
    def refused(path: Path) -> str:
        with pytest.raises(VideoError) as caught:
            decoder.probe(path)
        return str(caught.value)

    make_video(tmp_path / "v.ts", 10)
    hls = "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:2,\nv.ts\n#EXT-X-ENDLIST\n"
    sdp = "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
    texts = {"l.m3u8": hls, "c.txt": "ffconcat version 1.0\nfile v.ts\n", "s.sdp": sdp}
    texts |= {"x.srt": "1\n00:00:00,000 --> 00:00:02,000\nhello\n\n" * 3, "t.mp4": "text\n" * 99}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        assert "is not a video" in refused(tmp_path / name), name
        shutil.copy(tmp_path / name, tmp_path / "disguised.mp4")
        assert "is not a video" in refused(tmp_path / "disguised.mp4"), name
    for codec, suffix in (("png", "png"), ("mjpeg", "jpg"), ("gif", "gif"), ("bmp", "bmp")):
        pix_fmt = {"mjpeg": "yuvj420p", "gif": "rgb8", "bmp": "bgr24"}.get(codec, "rgb24")
        encoder = av.CodecContext.create(codec, "w")
        encoder.width, encoder.height, encoder.pix_fmt = 96, 64, pix_fmt
        encoder.time_base = Fraction(1, 25)
        picture = av.VideoFrame.from_ndarray(pictures(1)[0], format="rgb24")
        path = tmp_path / f"picture.{suffix}"
        if codec == "gif":
            make_video(path, 1, codec="gif", pix_fmt="rgb8", b_frames=0)
        else:
            path.write_bytes(bytes(encoder.encode(picture.reformat(format=pix_fmt))[0]))
        assert "is not a video" in refused(path), suffix
    os.mkfifo(tmp_path / "pipe.mp4")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s.mp4"))
        for name in ("pipe.mp4", "s.mp4", "."):
            assert "is not a regular file" in refused(tmp_path / name)
    (tmp_path / "dangling.mp4").symlink_to("gone.mp4")
    assert "is a link to gone.mp4, which does not exist" in refused(tmp_path / "dangling.mp4")


@pytest.mark.parametrize(("name", "codec"), [("c.mp3", "libmp3lame"), ("c.m4a", "aac")])
def test_a_cover_picture_is_no_video(
    name: str, codec: str, tmp_path: Path, decoder: Decoder
) -> None:
    path = tmp_path / name
    with av.open(str(path), "w", format="mp3" if codec == "libmp3lame" else "mp4") as container:
        sound = container.add_stream(codec, rate=44100, layout="mono")
        cover = container.add_stream("png", rate=25)
        cover.width, cover.height, cover.pix_fmt = 96, 64, "rgb24"
        cover.disposition = av.stream.Disposition.attached_pic
        picture = av.VideoFrame.from_ndarray(pictures(1)[0], format="rgb24")
        container.mux(cover.encode(picture) + cover.encode(None))
        for i in range(20):
            silence = np.zeros((1, 1024), np.float32)
            tone = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
            tone.sample_rate, tone.pts = 44100, 1024 * i
            container.mux(sound.encode(tone))
        container.mux(sound.encode(None))
    with pytest.raises(VideoError, match="no video stream, only sound"):
        decoder.probe(path)
