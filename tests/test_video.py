"""Video in and out, against PyAV decoding the same file frame by frame."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from make_videos import (
    cut,
    frames_and_times,
    long_video,
    make_audio,
    make_video,
    pictures,
    shift,
    turn,
)
from numpy.typing import NDArray

from mmdist_e2e.extractors import child
from mmdist_e2e.extractors.video import Decoder, VideoError, write_video
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
    assert effective == pytest.approx(min(fps, own) if policy == "ceiling" else fps, rel=1e-3)
    np.testing.assert_allclose(times, np.arange(len(times)) / effective, atol=1e-9)
    assert times[-1] < duration <= times[-1] + 1 / effective + 0.05
    for time_j, frame in zip(times, frames, strict=True):
        # by brute force; 1.5 ms as Matroska rounds times to 1 ms
        latest = max(i for i, at in enumerate(shown) if at <= time_j + 0.0015)
        assert same(frame, expected[latest])


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
    # the two decoders of the child agree on the direction
    from mmdist_e2e.extractors.decoder import decode_av

    assert same(frames[3], next(itertools.islice(decode_av(turned), 3, None)))


def test_chunks_are_bounded_and_the_callers_own(videos: dict[str, Path]) -> None:
    frame_bytes = 96 * 64 * 3
    for chunk_bytes, largest in [(1, 1), (5 * frame_bytes + 7, 5), (10**9, 65)]:
        with Decoder(chunk_bytes=chunk_bytes) as decoder:
            chunks = list(decoder.frames(videos["b_frames.mp4"]))
        counts = [len(chunk.times_N) for chunk in chunks]
        if largest == 65:
            assert counts == [65]
        else:  # a slot is a whole number of pages
            assert max(counts) * frame_bytes <= chunk_bytes + frame_bytes
        expected, *_ = oracle(videos["b_frames.mp4"])
        kept = np.concatenate([chunk.frames_NHWC for chunk in chunks])
        assert all(map(same, kept, expected))


def bad(decoder: Decoder, path: Path) -> str:
    """The sentence of the failure, and that it names the file and is one."""
    with pytest.raises(VideoError) as caught:
        for _ in decoder.frames(path):
            pass
    message = str(caught.value)
    assert caught.value.path == path
    assert message.startswith(str(path))
    assert message.endswith(".")
    assert "\n" not in message
    with pytest.raises(VideoError):
        decoder.probe(path)
    return message.removeprefix(str(path))


def test_bad_files_are_named(tmp_path: Path, decoder: Decoder) -> None:
    assert "does not exist" in bad(decoder, tmp_path / "missing.mp4")
    (tmp_path / "empty.mp4").touch()
    assert "is empty (0 bytes)" in bad(decoder, tmp_path / "empty.mp4")
    (tmp_path / "text.mp4").write_text("a text with the wrong name\n" * 50)
    assert "is not a video" in bad(decoder, tmp_path / "text.mp4")
    (tmp_path / "text.txt").write_text("a text with the right name\n" * 50)
    assert "is not a video" in bad(decoder, tmp_path / "text.txt")
    assert "only sound" in bad(decoder, make_audio(tmp_path / "sound.mp4"))
    (tmp_path / "folder.mp4").mkdir()
    assert "is a folder" in bad(decoder, tmp_path / "folder.mp4")
    assert "is not a regular file" in bad(decoder, Path(os.devnull))
    assert "cannot be read" in bad(decoder, tmp_path / "text.mp4" / "inside.mp4")
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    assert "is not a video" in bad(decoder, tmp_path / "noise.mp4")


@pytest.mark.parametrize("fraction", [0.4, 0.9, 0.96])
def test_an_mp4_cut_before_its_index(
    fraction: float, tmp_path: Path, videos: dict[str, Path], decoder: Decoder
) -> None:
    message = bad(decoder, cut(videos["b_frames.mp4"], tmp_path / "cut.mp4", fraction))
    assert "no frames can be read" in message
    assert "may be cut off" in message


@pytest.mark.parametrize(
    ("name", "fraction"),
    [
        *itertools.product(["b_frames.mkv", "faststart.mp4", "vp9.webm"], [0.3, 0.6, 0.9, 0.97]),
        *itertools.product(["mpeg4.avi"], [0.5, 0.7, 0.9]),
    ],
)
def test_a_cut_video_names_its_good_frames(
    name: str, fraction: float, tmp_path: Path, videos: dict[str, Path], decoder: Decoder
) -> None:
    whole, *_ = oracle(videos[name])
    path = cut(videos[name], tmp_path / name, fraction)
    message = bad(decoder, path)
    claim, good = (int(word) for word in message.replace(".", "").split() if word.isdigit())
    assert claim == len(whole)
    # an independent count: frames of the cut file that equal the whole one's, each once
    with av.open(str(path)) as container:
        stream, found = container.streams.video[0], []
        for packet in container.demux(stream):
            try:
                found += [f.to_ndarray(format="rgb24") for f in packet.decode()]
            except av.FFmpegError:
                found += [f.to_ndarray(format="rgb24") for f in stream.decode(None)]
                break
    intact = sum(any(np.array_equal(a, b) for b in whole) for a in found)
    assert 0 < good < claim
    assert abs(good - intact) <= 1  # a half packet may decode to a whole picture


def test_a_cut_that_spares_all_frames_is_no_failure(
    tmp_path: Path, videos: dict[str, Path], decoder: Decoder
) -> None:
    path = cut(videos["b_frames.mkv"], tmp_path / "spared.mkv", 0.999)
    frames, *_ = read(decoder, path)
    assert len(frames) == 65


def test_damage_inside_names_the_good_frames(
    tmp_path: Path, videos: dict[str, Path], decoder: Decoder
) -> None:
    data = bytearray(videos["b_frames.mp4"].read_bytes())
    for i in range(len(data) // 3, len(data) // 3 + len(data) // 20):
        data[i] = (data[i] * 7 + 13) % 256
    (tmp_path / "damaged.mp4").write_bytes(data)
    with pytest.raises(VideoError, match=r"claims 65 frames and only the first \d+ decode"):
        list(decoder.frames(tmp_path / "damaged.mp4"))


def test_a_start_between_key_frames_is_not_read_with_repeats(
    tmp_path: Path, videos: dict[str, Path], decoder: Decoder
) -> None:
    """62 packets of which 53 decode: decord would repeat the last frame without a word."""
    path = tmp_path / "headless.mkv"
    with av.open(str(videos["b_frames.mkv"])) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in [p for p in old.demux(video=0) if p.size][3:]:
            packet.stream = stream
            new.mux(packet)
    with pytest.raises(VideoError, match=r"claims 6\d frames and only the first \d+ decode"):
        list(decoder.frames(path))


def test_damage_anywhere_never_breaks_the_decoder(tmp_path: Path, videos: dict[str, Path]) -> None:
    """Whatever the bytes: frames or a VideoError, and the next video is read."""
    rng = np.random.default_rng(0)
    with Decoder(stall_seconds=10) as decoder:
        for name in ["b_frames.mp4", "b_frames.mkv", "vp9.webm", "late.ts", "mpeg4.avi"] * 3:
            data = np.frombuffer(videos[name].read_bytes(), np.uint8).copy()
            where = rng.integers(0, len(data), 40)
            data[where] = rng.integers(0, 256, 40)
            path = tmp_path / name
            path.write_bytes(data.tobytes())
            with contextlib.suppress(VideoError):
                read(decoder, path)
        assert len(read(decoder, videos["b_frames.mp4"])[0]) == 65


@pytest.mark.parametrize("kill", ["SIGSEGV", "SIGABRT", "SIGKILL"])
def test_a_crash_is_one_failed_video(kill: str, videos: dict[str, Path]) -> None:
    with Decoder(chunk_bytes=1) as decoder:
        stream = iter(decoder.frames(videos["b_frames.mp4"]))
        next(stream)
        os.kill(decoder._child.pid, signal.Signals[kill])  # type: ignore[union-attr]
        with pytest.raises(VideoError, match=f"b_frames.mp4 made its decoder crash.*{kill}"):
            list(stream)
        assert len(read(decoder, videos["b_frames.mkv"])[0]) == 65


def test_a_stall_is_one_failed_video(videos: dict[str, Path]) -> None:
    with Decoder(chunk_bytes=1, stall_seconds=5) as decoder:
        stream = iter(decoder.frames(videos["b_frames.mp4"]))
        next(stream)
        decoder._stall_seconds = 0.3
        pid = decoder._child.pid  # type: ignore[union-attr]
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(
            VideoError, match=r"b_frames.mp4 was given up .* nothing for 0.3 seconds"
        ):
            list(stream)
        assert not alive(pid)
        decoder._stall_seconds = 30
        assert len(read(decoder, videos["b_frames.mkv"])[0]) == 65


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not (stat.exists() and stat.read_text().split(")")[1].split()[0] == "Z")


def test_abandoning_a_video_keeps_the_child(videos: dict[str, Path]) -> None:
    with Decoder(chunk_bytes=1) as decoder:
        for _ in range(3):
            for chunk in decoder.frames(videos["b_frames.mp4"]):
                assert chunk.times_N[0] == 0
                break
            decoder.frames(videos["vfr.mkv"])  # opened, never iterated
            assert decoder.probe(videos["slow.mp4"]).frame_count == 20
            pid = decoder._child.pid  # type: ignore[union-attr]
        assert len(read(decoder, videos["b_frames.mp4"])[0]) == 65
        assert decoder._child.pid == pid  # type: ignore[union-attr]
        old = iter(decoder.frames(videos["b_frames.mp4"]))
        next(old)
        assert len(read(decoder, videos["slow.mp4"])[0]) == 20
        with pytest.raises(VideoError, match="no longer being read"):
            list(old)
    assert not alive(pid)
    stream = decoder.frames(videos["b_frames.mp4"])
    decoder.close()
    with pytest.raises(VideoError, match="no longer being read"):
        list(stream)


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
def test_the_child_knows_no_torch_and_the_parent_no_decord(videos: dict[str, Path]) -> None:
    with Decoder() as decoder:
        list(decoder.frames(videos["b_frames.mp4"]))
        maps = Path(f"/proc/{decoder._child.pid}/maps").read_text()  # type: ignore[union-attr]
    assert "decord" in maps
    assert "torch" not in maps
    code = (
        "import sys, mmdist_e2e.extractors.video as v;"
        "assert not {'decord', 'av', 'torch', 'cv2'} & set(sys.modules);"
        "import mmdist_e2e.extractors.decoder, decord;"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unguarded_script_in_a_hostile_folder(tmp_path: Path, videos: dict[str, Path]) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('shadowed')\n")
    (tmp_path / "user").mkdir()
    script = tmp_path / "user" / "script.py"
    script.write_text(
        "import sys, os\n"
        f"os.chdir({str(tmp_path)!r})\n"
        "from mmdist_e2e.extractors.video import Decoder\n"
        "for chunk in Decoder().frames(sys.argv[1]): print(len(chunk.times_N))\n"
    )
    done = subprocess.run(
        [sys.executable, str(script), str(videos["b_frames.mp4"])],
        env={**os.environ, "PYTHONPATH": str(child.PACKAGE_PARENT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "65\n", "")


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
def test_the_child_does_not_outlive_a_killed_parent(videos: dict[str, Path]) -> None:
    code = (
        "import sys, time; from mmdist_e2e.extractors.video import Decoder\n"
        "decoder = Decoder(chunk_bytes=1)\n"
        "next(iter(decoder.frames(sys.argv[1])))\n"
        "print(decoder._child.pid, decoder._child.ring.name, flush=True); time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(videos["b_frames.mp4"])],
        env={**os.environ, "PYTHONPATH": str(child.PACKAGE_PARENT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    pid, ring = parent.stdout.readline().split()
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 10
    while alive(int(pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(int(pid))
    assert not Path(ring).exists()


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
def test_memory_does_not_grow_with_length_nor_with_waiting(tmp_path: Path) -> None:
    peaks_kb = []
    for repeats in (10, 110):  # 110 MB and 1.2 GB of frames
        path = long_video(tmp_path / f"{repeats}.mp4", repeats, width=640, height=480)
        with Decoder(chunk_bytes=8 * 2**20) as decoder:
            stream = decoder.frames(path)
            for count, _ in enumerate(stream):
                if count < 4:
                    time.sleep(0.2)  # a slow network: the child must not run ahead
                if count == 40:
                    break
            assert stream.sample_count == 12 * repeats
            status = Path(f"/proc/{decoder._child.pid}/status").read_text()  # type: ignore[union-attr]
        peaks_kb.append(next(int(x.split()[1]) for x in status.splitlines() if "VmHWM" in x))
    assert peaks_kb[1] < peaks_kb[0] + 60_000


def test_a_full_disk_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(child.os, "posix_fallocate", full)
    with pytest.raises(MmdistError, match="needs 2 MiB for frames"):
        child.Ring(2**20)


@pytest.mark.parametrize("options", [{"fps": 0}, {"fps": -1.0}, {"fps": float("nan")}])
def test_bad_options(options: dict[str, float], videos: dict[str, Path], decoder: Decoder) -> None:
    with pytest.raises(MmdistError, match="fps"):
        decoder.frames(videos["b_frames.mp4"], **options)  # type: ignore[arg-type]
    with pytest.raises(MmdistError, match="valid: ceiling, exact"):
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
