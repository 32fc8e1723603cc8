"""Video in: bad files, a decoder that crashes, stalls or is abandoned, and bounded memory."""

from __future__ import annotations

import contextlib
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
from make_videos import cut, frames_and_times, long_video, make_audio, make_video

from mmdist_e2e.extractors.video import reader as child
from mmdist_e2e.extractors.video.reader import Decoder, VideoError
from mmdist_e2e.structures import MmdistError


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    with Decoder(chunk_bytes=200_000) as shared:
        yield shared


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("videos")
    faststart = {"movflags": "faststart"}
    return {
        "b_frames.mp4": make_video(folder / "b_frames.mp4"),
        "b_frames.mkv": make_video(folder / "b_frames.mkv"),
        "faststart.mp4": make_video(folder / "faststart.mp4", container_options=faststart),
        "vp9.webm": make_video(folder / "vp9.webm", 20, codec="libvpx-vp9", b_frames=0),
        "mpeg4.avi": make_video(folder / "mpeg4.avi", codec="mpeg4", b_frames=0),
        "mpeg.ts": make_video(folder / "mpeg.ts"),
        "slow.mp4": make_video(folder / "slow.mp4", 20, rate=10),
    }


def count(decoder: Decoder, path: Path) -> int:
    return sum(len(chunk.times_N) for chunk in decoder.frames(path))


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
    assert "is not a regular file but a folder" in bad(decoder, tmp_path / "folder.mp4")
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
    whole, *_ = frames_and_times(videos[name])
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
    assert count(decoder, path) == 65


def test_damage_inside_names_the_good_frames(
    tmp_path: Path, videos: dict[str, Path], decoder: Decoder
) -> None:
    data = bytearray(videos["b_frames.mp4"].read_bytes())
    for i in range(len(data) // 3, len(data) // 3 + len(data) // 20):
        data[i] = (data[i] * 7 + 13) % 256
    (tmp_path / "damaged.mp4").write_bytes(data)
    with pytest.raises(VideoError, match=r"claims 65 frames and only the first \d+ decode"):
        list(decoder.frames(tmp_path / "damaged.mp4"))


def test_damage_anywhere_never_breaks_the_decoder(tmp_path: Path, videos: dict[str, Path]) -> None:
    """Whatever the bytes: frames or a VideoError, and the next video is read."""
    rng = np.random.default_rng(0)
    with Decoder(stall_seconds=10) as decoder:
        for name in ["b_frames.mp4", "b_frames.mkv", "vp9.webm", "mpeg.ts", "mpeg4.avi"] * 3:
            data = np.frombuffer(videos[name].read_bytes(), np.uint8).copy()
            where = rng.integers(0, len(data), 40)
            data[where] = rng.integers(0, 256, 40)
            path = tmp_path / name
            path.write_bytes(data.tobytes())
            with contextlib.suppress(VideoError):
                count(decoder, path)
        assert count(decoder, videos["b_frames.mp4"]) == 65


@pytest.mark.parametrize("kill", ["SIGSEGV", "SIGABRT", "SIGKILL"])
def test_a_crash_is_one_failed_video(kill: str, videos: dict[str, Path]) -> None:
    with Decoder(chunk_bytes=1) as decoder:
        stream = iter(decoder.frames(videos["b_frames.mp4"]))
        next(stream)
        os.kill(decoder._child.pid, signal.Signals[kill])  # type: ignore[union-attr]
        with pytest.raises(VideoError, match=f"b_frames.mp4 made its decoder crash.*{kill}"):
            list(stream)
        assert count(decoder, videos["b_frames.mkv"]) == 65


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
        assert count(decoder, videos["b_frames.mkv"]) == 65


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
            decoder.frames(videos["b_frames.mkv"])  # opened, never iterated
            assert decoder.probe(videos["slow.mp4"]).frame_count == 20
            pid = decoder._child.pid  # type: ignore[union-attr]
        assert count(decoder, videos["b_frames.mp4"]) == 65
        assert decoder._child.pid == pid  # type: ignore[union-attr]
        old = iter(decoder.frames(videos["b_frames.mp4"]))
        next(old)
        assert count(decoder, videos["slow.mp4"]) == 20
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
        "import mmdist_e2e.extractors.video.worker, decord;"
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
    assert (done.returncode, done.stdout, done.stderr) == (0, "64\n1\n", "")


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
            for read, _ in enumerate(stream):
                if read < 4:
                    time.sleep(0.2)  # a slow network: the child must not run ahead
                if read == 40:
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
