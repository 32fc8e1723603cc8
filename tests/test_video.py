"""Video in and out, against PyAV decoding the same file frame by frame."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from make_videos import (
    frames_and_times,
    make_video,
    pictures,
    shift,
    turn,
)
from numpy.typing import NDArray

from mmdist_e2e.extractors.video.reader import Decoder
from mmdist_e2e.extractors.video.writer import write_video
from mmdist_e2e.structures import MmdistError

DATA = os.environ.get("MMDIST_DATA")
VFR_MS = [0, 40, 80, 100, 300, 340, 700, 710, 720, 1000, *range(1033, 2000, 33)]
CLOSE = 1.0  # mean levels: at odd sides the colour is spread in another way; neighbours differ by 5


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    with Decoder(chunk_bytes=200_000) as shared:
        yield shared


oracle = functools.cache(frames_and_times)


def read(
    decoder: Decoder, path: Path, **options: object
) -> tuple[NDArray[np.uint8], NDArray[np.float64], float]:
    stream = decoder.frames(path, **options)  # type: ignore[arg-type]
    chunks = list(stream)
    frames = np.concatenate([chunk.frames_NHWC for chunk in chunks])
    times = np.concatenate([chunk.times_N for chunk in chunks])
    assert len(frames) == len(times) == stream.sample_count
    return frames, times, stream.fps


def same(frame: NDArray[np.uint8], expected: NDArray[np.uint8]) -> bool:
    return frame.shape == expected.shape and bool(
        np.abs(frame.astype(int) - expected.astype(int)).mean() <= CLOSE
    )


CASES = {
    "b_frames.mp4": {},
    "b_frames.mkv": {},
    "sound.mp4": {"audio": True},
    "faststart.mp4": {"container_options": {"movflags": "faststart"}},
    "fragments.mp4": {"container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "vfr.mp4": {"count": len(VFR_MS), "times_ms": VFR_MS},
    "vfr.mkv": {"count": len(VFR_MS), "times_ms": VFR_MS},
    "late.mp4": {"count": 40, "times_ms": range(2000, 3600, 40)},
    "late.mkv": {"count": 40, "times_ms": range(2000, 3600, 40)},
    "late.ts": {"count": 40, "times_ms": range(2000, 3600, 40)},
    "mpeg4.avi": {"codec": "mpeg4", "b_frames": 0},
    "vp9.webm": {"codec": "libvpx-vp9", "b_frames": 0, "count": 20},
    "odd.mkv": {"codec": "libvpx-vp9", "b_frames": 0, "count": 9, "width": 97, "height": 63},
    "odd444.mkv": {"pix_fmt": "yuv444p", "count": 9, "width": 97, "height": 63},
    "padded_row.mp4": {"width": 48, "height": 34, "count": 9},
    "one_frame.mp4": {"count": 1},
    "2x2.mp4": {"count": 5, "width": 2, "height": 2},
    "slow.mp4": {"rate": 10, "count": 20},
    "fast.mp4": {"rate": 60, "count": 90},
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("videos")
    made = {}
    for name, options in CASES.items():
        made[name] = make_video(folder / name, **options)  # type: ignore[arg-type]
    made["edit_list.mp4"] = shift(made["b_frames.mp4"], folder / "edit_list.mp4", -0.52)
    made["shifted.mp4"] = shift(made["b_frames.mp4"], folder / "shifted.mp4", 1.0)
    return made


NAMES = [*CASES, "edit_list.mp4", "shifted.mp4"]


@pytest.mark.parametrize("name", NAMES)
def test_every_frame_once_at_its_own_time(
    name: str, videos: dict[str, Path], decoder: Decoder
) -> None:
    expected, expected_times, duration = oracle(videos[name])
    frames, times, _ = read(decoder, videos[name], fps=None)
    assert len(frames) == len(expected)
    assert all(map(same, frames, expected))
    np.testing.assert_allclose(times, expected_times, atol=1e-6)
    info = decoder.probe(videos[name])
    assert (info.height, info.width) == expected[0].shape[:2]
    assert info.frame_count == len(expected)
    assert info.duration_seconds == pytest.approx(duration, abs=0.05)


@pytest.mark.parametrize("policy", ["ceiling", "exact"])
@pytest.mark.parametrize("fps", [8.0, 25.0])
@pytest.mark.parametrize("name", NAMES)
def test_samples_are_what_a_player_shows(
    name: str, fps: float, policy: str, videos: dict[str, Path], decoder: Decoder
) -> None:
    expected, shown, _ = oracle(videos[name])
    duration = decoder.probe(videos[name]).duration_seconds
    frames, times, effective = read(decoder, videos[name], fps=fps, fps_policy=policy)
    own = (len(shown) - 1) / shown[-1] if len(shown) > 1 else effective
    if name.startswith("vfr"):
        own = 1 / 0.033  # the rate of its second half
    assert effective == pytest.approx(min(fps, own) if policy == "ceiling" else fps, rel=1e-3)
    np.testing.assert_allclose(times, np.arange(len(times)) / effective, atol=1e-9)
    # "exact" rounds; otherwise 1.5 ms, as Matroska rounds times to 1 ms
    ahead = 0.5 / effective - 1e-6 if policy == "exact" else 0.0015
    assert times[-1] < duration <= times[-1] + 1 / effective + ahead + 0.05
    for time_j, frame in zip(times, frames, strict=True):
        latest = max((i for i, at in enumerate(shown) if at <= time_j + ahead), default=0)
        assert same(frame, expected[latest])  # by brute force


def filtered(path: Path, size: str) -> list[NDArray[np.uint8]]:
    """What libavfilter makes of a file, as the README of Charades has it."""
    graph = av.filter.Graph()
    frames = []

    def pull() -> None:
        while True:
            try:
                frames.append(graph.vpull().to_ndarray(format="rgb24"))
            except (BlockingIOError, EOFError):
                return

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        steps = [graph.add_buffer(template=stream)]
        scale = f"{size}:in_color_matrix=bt601:flags=bicubic+accurate_rnd+full_chroma_int"
        chain = {"fps": "fps=24", "scale": scale, "format": "rgb24", "buffersink": None}
        for name, options in chain.items():
            steps.append(graph.add(name, options))
        graph.link_nodes(*steps).configure()
        for frame in container.decode(stream):
            graph.vpush(frame)
            pull()
        graph.vpush(None)
        pull()
    return frames


RATES = {
    "14.985": Fraction(15000, 1001),
    "19.62": Fraction(1962, 100),
    "24": Fraction(24),
    "25": Fraction(25),
    "29.97": Fraction(30000, 1001),
    "30": Fraction(30),
    "48": Fraction(48),  # every second frame falls between two samples
}


@pytest.mark.parametrize("kind", [*RATES, "vfr"])
@pytest.mark.parametrize("turned", [False, True])
def test_exact_and_longer_side_are_ffmpegs_filters(
    kind: str, turned: bool, tmp_path: Path, decoder: Decoder
) -> None:
    path = tmp_path / "a.mp4"
    shape = {"width": 112, "height": 64}
    if kind == "vfr":
        make_video(path, len(VFR_MS), times_ms=VFR_MS, b_frames=0, **shape)  # type: ignore[arg-type]
    else:
        write_video(path, pictures(53, **shape), fps=float(RATES[kind]), crf=10)
    expected = filtered(path, "90:-1")
    if turned:
        path = turn(path, tmp_path / "turned.mp4")
        expected = [np.rot90(frame, -1) for frame in expected]
    assert sorted(expected[0].shape[:2]) == [51, 90]  # 51.4 rows: no even number is asked for
    frames, times, _ = read(decoder, path, fps=24, fps_policy="exact", longer_side=90)
    assert len(frames) == len(expected)
    np.testing.assert_allclose(times, np.arange(len(times)) / 24, atol=1e-9)

    def distance(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
        return float(np.abs(a.astype(int) - b).mean())

    assert max(map(distance, frames, expected)) < 2  # FFmpeg 8 places colour in another way
    for a, b in itertools.pairwise(expected):  # the next one would not do
        assert np.array_equal(a, b) or distance(a, b) > 4


def test_longer_side_alone_scales_what_is_sampled(
    videos: dict[str, Path], decoder: Decoder
) -> None:
    for name, shape in (("b_frames.mp4", (64, 96)), ("odd.mkv", (63, 97))):
        plain, times, _ = read(decoder, videos[name], fps=8.0)
        small, same_times, _ = read(decoder, videos[name], fps=8.0, longer_side=48)
        np.testing.assert_array_equal(times, same_times)
        assert plain.shape[1:3] == shape
        assert small.shape[1:3] == (round(48 * shape[0] / shape[1]), 48)
        assert decoder.probe(videos[name]).width == shape[1]


def test_own_is_every_frame(videos: dict[str, Path], decoder: Decoder) -> None:
    for name in ("slow.mp4", "fast.mp4", "vfr.mp4"):
        every, times, fps = read(decoder, videos[name], fps=None)
        own, own_times, own_fps = read(decoder, videos[name], fps=12.0, fps_policy="own")
        np.testing.assert_array_equal(own, every)
        np.testing.assert_array_equal(own_times, times)
        assert own_fps == fps


def test_neighbours_are_told_apart(videos: dict[str, Path]) -> None:
    for name in set(NAMES) - {"2x2.mp4", "one_frame.mp4"}:
        frames, *_ = oracle(videos[name])
        assert not any(same(a, b) for a, b in itertools.pairwise(frames)), name


def test_a_slower_video_keeps_its_own_frames(videos: dict[str, Path], decoder: Decoder) -> None:
    expected, *_ = oracle(videos["slow.mp4"])
    frames, _, fps = read(decoder, videos["slow.mp4"], fps=25.0)
    assert fps == pytest.approx(10.0)
    assert len(frames) == len(expected) == 20
    repeated, _, fps = read(decoder, videos["slow.mp4"], fps=25.0, fps_policy="exact")
    assert fps == 25.0
    assert len(repeated) == 50


def test_a_turned_video_is_read_upright(videos: dict[str, Path], decoder: Decoder) -> None:
    upright, *_ = oracle(videos["b_frames.mp4"])
    turned = turn(videos["b_frames.mp4"], videos["b_frames.mp4"].with_name("turned.mp4"))
    frames, *_ = read(decoder, turned)
    assert same(frames[20], np.rot90(upright[20], -1))


def test_chunks_are_bounded_and_the_callers_own(videos: dict[str, Path]) -> None:
    frame_bytes = 96 * 64 * 3
    for chunk_bytes, largest in [(1, 1), (5 * frame_bytes + 7, 5), (10**9, 64)]:
        with Decoder(chunk_bytes=chunk_bytes) as decoder:
            chunks = list(decoder.frames(videos["b_frames.mp4"]))
        counts = [len(chunk.times_N) for chunk in chunks]
        if largest == 64:
            assert counts == [64, 1]
        else:  # a slot is a whole number of pages
            assert max(counts) * frame_bytes <= chunk_bytes + frame_bytes
        expected, *_ = oracle(videos["b_frames.mp4"])
        kept = np.concatenate([chunk.frames_NHWC for chunk in chunks])
        assert all(map(same, kept, expected))


@pytest.mark.parametrize("options", [{"fps": 0}, {"fps": -1.0}, {"fps": float("nan")}])
def test_bad_options(options: dict[str, float], videos: dict[str, Path], decoder: Decoder) -> None:
    with pytest.raises(MmdistError, match="fps"):
        decoder.frames(videos["b_frames.mp4"], **options)  # type: ignore[arg-type]
    with pytest.raises(MmdistError, match="valid: ceiling, exact, own"):
        decoder.frames(videos["b_frames.mp4"], fps_policy="floor")  # type: ignore[arg-type]


def test_written_videos_come_back(tmp_path: Path, decoder: Decoder) -> None:
    frames = pictures(40, width=128, height=96)
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, frames, fps=29.97, crf=10, metadata={"world": "1"})
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    back, times, fps = read(decoder, tmp_path / "a.mp4", fps=None)
    assert fps == pytest.approx(29.97, rel=1e-4)
    assert len(back) == 40
    assert times[-1] == pytest.approx(39 / 29.97, rel=1e-4)
    error = np.abs(back.astype(int) - np.stack(frames)).mean()
    assert error < 4
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.metadata["world"] == "1"


def test_nothing_is_half_written(tmp_path: Path) -> None:
    frames = pictures(3)
    target = tmp_path / "video.mp4"
    target.write_bytes(b"what was there")

    def failing() -> Iterator[NDArray[np.uint8]]:
        yield from frames
        raise OSError(28, "No space left on device")

    with pytest.raises(MmdistError, match="No space left"):
        write_video(target, failing(), fps=25)
    for wrong in ([], [frames[0][:63]], [frames[0], frames[0][:32]], [frames[0].astype(float)]):
        with pytest.raises(MmdistError, match=r"video\.mp4"):
            write_video(target, wrong, fps=25)  # type: ignore[arg-type]
    with pytest.raises(MmdistError, match="fps"):
        write_video(target, frames, fps=0)
    assert target.read_bytes() == b"what was there"
    assert list(tmp_path.iterdir()) == [target]
    with pytest.raises(MmdistError, match="cannot be written"):
        write_video(target / "inside.mp4", frames, fps=25)


@pytest.mark.skipif(DATA is None, reason="MMDIST_DATA does not name the folder of real videos")
@pytest.mark.parametrize(
    ("name", "fps", "count", "duration"),
    [
        ("Y1HGC", 14.985, 460, 30.70),
        ("v_GGSY1Qvo990", 19.62, 355, 18.09),
        ("v_ZNVhz7ctTq0", 25.0, 350, 14.0),
    ],
)
def test_real_videos(name: str, fps: float, count: int, duration: float, decoder: Decoder) -> None:
    path = Path(str(DATA)) / "videos" / f"{name}.mp4"
    expected, shown, _ = frames_and_times(path)
    stream = decoder.frames(path)
    assert stream.fps == pytest.approx(fps, rel=1e-4)
    assert stream.info.duration_seconds == pytest.approx(duration, abs=0.01)
    seen = 0
    for chunk in stream:
        for time_j, frame in zip(chunk.times_N, chunk.frames_NHWC, strict=True):
            latest = max(i for i, at in enumerate(shown) if at <= time_j + 0.001)
            assert same(frame, expected[latest])
            seen += 1
    assert seen == count
