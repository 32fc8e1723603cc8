"""`mmdist extract` end to end with a tiny random network: what works, and what people get wrong."""

from __future__ import annotations

import errno
import io
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from make_videos import cut, frames_and_times, make_audio, make_video
from rich.console import Console

import mmdist_e2e as mm
from mmdist_e2e.cli import common
from mmdist_e2e.cli.main import main
from mmdist_e2e.extractors import batch, runner
from mmdist_e2e.extractors import extract as extract_module
from mmdist_e2e.extractors.networks.i3d import InceptionI3d
from mmdist_e2e.extractors.profiles import describe
from mmdist_e2e.extractors.runner import SnippetNetwork
from mmdist_e2e.extractors.search import Video, find_videos
from mmdist_e2e.extractors.video.reader import Decoder
from mmdist_e2e.store import FeatureStore, video_key


def extract(tiny: Path, *arguments: object) -> Result:
    return CliRunner().invoke(
        main,
        [
            "extract",
            *map(str, arguments),
            "--extractor",
            str(tiny),
            "--precision",
            "fp32",
            "--workers",
            "0",
        ],
    )


def new_video(path: Path, count: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return make_video(path, count)


def files_in(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.suffix == ".npz")


def test_folders_give_ids_relative_to_them_and_a_second_run_does_nothing(tmp_path, tiny_extractor):
    videos = tmp_path / "videos"
    (videos / "sub").mkdir(parents=True)
    make_video(videos / "a.mp4", 40)
    make_video(videos / "sub" / "a.mkv", 50)
    (videos / "notes.txt").write_text("no video")
    out = tmp_path / "features"
    first = extract(tiny_extractor, videos, "--out", out)
    assert first.exit_code == 0, first.output
    assert files_in(out) == ["a.rgb.npz", "sub/a.rgb.npz"]
    stamps = [(out / name).stat().st_mtime_ns for name in files_in(out)]

    def must_not_load(*_: object, **__: object) -> None:
        raise AssertionError("a second run must not load the network")

    original = InceptionI3d.__init__
    InceptionI3d.__init__ = must_not_load
    try:
        second = extract(tiny_extractor, videos, "--out", out)
    finally:
        InceptionI3d.__init__ = original
    assert second.exit_code == 0, second.output
    assert stamps == [(out / name).stat().st_mtime_ns for name in files_in(out)]
    assert extract(tiny_extractor, videos, "--out", out, "--overwrite").exit_code == 0
    assert stamps != [(out / name).stat().st_mtime_ns for name in files_in(out)]


def test_a_replaced_video_is_extracted_again(tmp_path, tiny_extractor):
    clip = make_video(tmp_path / "a.mp4", 30)
    extract(tiny_extractor, clip, "--out", tmp_path / "f")
    before = FeatureStore(tmp_path / "f").load("a", "rgb")
    make_video(clip, 60)
    assert extract(tiny_extractor, clip, "--out", tmp_path / "f").exit_code == 0
    assert len(FeatureStore(tmp_path / "f").load("a", "rgb").data) > len(before.data)


@pytest.mark.parametrize(
    ("count", "rate"), [(1, 12), (5, 12), (16, 12), (17, 12), (60, 25), (40, 10)]
)
def test_rows_are_those_of_the_frames_by_timestamp(tmp_path, tiny_extractor, count, rate):
    """Against an independent path: PyAV's frames, chosen by brute force, windowed by hand."""
    clip = make_video(tmp_path / "a.mp4", count, rate=rate, width=64, height=48)
    features = mm.extract(clip, extractor=str(tiny_extractor), precision="fp32")
    frames, times, duration = frames_and_times(clip)
    fps = min(12.0, rate)
    wanted = [
        max(i for i, t in enumerate(times) if t <= j / fps + 1e-6)
        for j in range(10_000)
        if j / fps < duration - 1e-6
    ]
    rows = -(-len(wanted) // 8)
    assert features.data.shape == (rows, 128)
    assert np.isfinite(features.data).all()
    assert features.times[0, 0] == 0.0
    assert features.times[-1, 1] == features.duration_seconds == pytest.approx(duration, abs=1e-3)
    network = SnippetNetwork(describe(str(tiny_extractor)), device="cpu", precision="fp32")
    small = network.preprocessing(torch.from_numpy(np.stack([frames[i] for i in wanted])))
    for j in range(rows):
        index = np.minimum(np.arange(8 * j, 8 * j + 16), len(wanted) - 1)
        row = network.rows(small[index][None])[0].numpy()
        # decord and PyAV may differ by a level of colour conversion.
        assert np.linalg.norm(row - features.data[j]) < 0.02 * np.linalg.norm(row) + 1e-6


def test_bad_input_is_one_sentence_each_and_the_others_are_done(tmp_path, tiny_extractor):
    videos = tmp_path / "videos"
    videos.mkdir()
    whole = make_video(videos / "good.mp4", 40)
    (videos / "text.mp4").write_text("this is no video\n" * 40)
    (videos / "empty.mp4").touch()
    long = make_video(tmp_path / "long.mkv", 120)
    cut(long, videos / "cut1.mkv", 0.5)
    front = make_video(tmp_path / "front.mp4", 120, container_options={"movflags": "faststart"})
    cut(front, videos / "cut2.mp4", 0.6)
    cut(whole, videos / "headless.mp4", 0.5)
    make_audio(videos / "sound.mp4")
    make_video(videos / "dot.mp4", 20, width=2, height=2)
    out = tmp_path / "features"
    run = extract(tiny_extractor, videos, tmp_path / "missing.mp4", "--out", out)
    assert run.exit_code == 3
    assert "Traceback" not in run.output
    assert files_in(out) == ["good.rgb.npz"]
    causes = {
        line.split("failed: ")[1] for line in run.output.splitlines() if line.startswith("failed: ")
    }
    assert len(causes) == 8
    for name, words in {
        "text.mp4": "not a video",
        "empty.mp4": "empty",
        "cut1.mkv": "frames",
        "cut2.mp4": "frames",
        "headless.mp4": "headless.mp4",
        "sound.mp4": "no video",
        "dot.mp4": "2×2",
        "missing.mp4": "does not exist",
    }.items():
        (cause,) = [c for c in causes if f"/{name}" in c]
        assert words in cause, cause
    for name in ("cut1.mkv", "cut2.mp4"):
        (cause,) = [c for c in causes if f"/{name}" in c]
        assert any(word.isdigit() for word in cause.split()), f"no count of good frames: {cause}"


def test_two_files_with_one_id_fail_and_the_others_are_done(tmp_path, tiny_extractor):
    for name in ("a.mp4", "a.mkv", "caf\u00e9.mp4", "cafe\u0301.mp4", "b.mp4"):
        new_video(tmp_path / "in" / name, 20)
    run = extract(tiny_extractor, tmp_path / "in", "--out", tmp_path / "f")
    assert run.exit_code == 3
    assert len([line for line in run.output.splitlines() if line.startswith("failed: ")]) == 4
    assert "both have the video id 'a'; rename one" in run.output
    assert files_in(tmp_path / "f") == ["b.rgb.npz"]


def test_names_of_any_bytes_and_length(tmp_path, tiny_extractor):
    """Whatever a folder holds is extracted, and found again under the same id."""
    clip = make_video(tmp_path / "clip.mp4", 20).read_bytes()
    ids = ["caf\udce9", "line\nfeed", "\x1b[31mred", "-dash", " space ", "[bold]x", "日\u3000本"]
    ids += ["cafe\u0301", "x" * 246 + "y", "x" * 247 + "y", "x" * 248 + "y", "long/" + "é" * 125]
    for name in [*ids, "bad\udcff"]:
        path = tmp_path / "in" / f"{name}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(clip if name != "bad\udcff" else b"no video " * 50)
    command = [sys.executable, "-m", "mmdist_e2e.cli.main", "extract", str(tmp_path / "in")]
    command += ["--out", str(tmp_path / "f"), "--extractor", str(tiny_extractor)]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    run = subprocess.run(command, capture_output=True, check=False, env=environment)
    assert run.returncode == 3
    assert b"Traceback" not in run.stderr
    assert b"\x1b" not in run.stdout + run.stderr
    (line,) = [line for line in run.stderr.decode().splitlines() if line.startswith("failed: ")]
    assert "/bad\\udcff.mp4 is not a video" in line
    assert "/bad\\udcff.mp4 is not a video" in run.stdout.decode()
    assert FeatureStore(tmp_path / "f").videos("rgb") == sorted(map(video_key, ids))


def test_a_drawn_progress_shows_names_of_any_bytes(monkeypatch):
    drawn = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")
    console = Console(file=drawn, force_terminal=True, width=80)
    monkeypatch.setattr(common, "notes", console)
    monkeypatch.setattr(common, "DRAW_SECONDS", 0.01)
    with common.ExtractionProgress(1) as progress:
        progress.advanced(Video("\x1b[2Jcaf\udce9\n", Path("x")), 0.0)
        time.sleep(0.2)
    drawn.flush()
    assert "\ufffd[2Jcaf\ufffd\ufffd" in drawn.buffer.getvalue().decode()


def ids_and_causes(*paths: Path) -> tuple[list[str], list[str]]:
    found = find_videos(paths)
    return [video.id for video in found.videos], [problem.cause for problem in found.problems]


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(path.name.encode(errors="replace"))


def test_links_are_followed_once(tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    touch(root / "sub" / "a.mp4", elsewhere / "b.mp4", elsewhere / "deep" / "c.mkv")
    (root / "loop").symlink_to(root)
    (root / "sub" / "up").symlink_to("..")
    (root / "top").symlink_to("/")
    (root / "an_alias_of_sub").symlink_to(root / "sub")
    (root / "folder").symlink_to(elsewhere)
    (root / "again").symlink_to(elsewhere)
    (root / "alias.mp4").symlink_to(root / "sub" / "a.mp4")
    (root / "blob.mp4").symlink_to(tmp_path / "content")
    touch(tmp_path / "content")
    (elsewhere / "back").symlink_to(root)
    assert ids_and_causes(root) == (["again/b", "again/deep/c", "blob", "sub/a"], [])
    assert find_videos([root]).repeated == 1
    # A file's own name counts before a link's, in whatever order they are given.
    assert ids_and_causes(root, elsewhere) == (["blob", "sub/a", "b", "deep/c"], [])
    assert ids_and_causes(root / "alias.mp4") == (["alias"], [])
    assert ids_and_causes(root / "alias.mp4", root / "sub" / "a.mp4", root / "sub") == (["a"], [])


def test_dangling_links_are_named(tmp_path):
    touch(tmp_path / "in" / "a.mp4")
    for name in ("gone.mp4", "gone_folder", "notes.txt", ".hidden.mp4", "self.mp4"):
        target = "self.mp4" if name == "self.mp4" else tmp_path / "nowhere"
        (tmp_path / "in" / name).symlink_to(target)
    ids, causes = ids_and_causes(tmp_path / "in")
    assert ids == ["a"]
    names = [cause.split(" is a link to ")[0] for cause in causes]
    assert names == [str(tmp_path / "in" / x) for x in ("gone.mp4", "gone_folder", "self.mp4")]
    assert "is a link to" in ids_and_causes(tmp_path / "in" / "notes.txt")[1][0]


def test_what_is_no_regular_file_is_refused_at_once(tmp_path, tiny_extractor):
    new_video(tmp_path / "in" / "a.mp4", 20)
    os.mkfifo(tmp_path / "in" / "pipe.mp4")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        (tmp_path / "in" / "socket.mkv").symlink_to(tmp_path / "s")
        given = ["/dev/null", tmp_path / "in" / "pipe.mp4", tmp_path / "in"]
        run = extract(tiny_extractor, *given, "--out", tmp_path / "f")
    assert run.exit_code == 3
    causes = [line for line in run.output.splitlines() if line.startswith("failed: ")]
    assert len(causes) == 4
    assert all("not a regular file" in cause for cause in causes)
    assert files_in(tmp_path / "f") == ["a.rgb.npz"]


def test_hidden_files_are_ignored_in_folders_and_counted(tmp_path, tiny_extractor):
    new_video(tmp_path / "in" / "a.mp4", 20)
    touch(tmp_path / "in" / "._a.mp4", tmp_path / "in" / ".git" / "b.mp4")
    touch(tmp_path / "in" / "sub" / ".c.mkv", tmp_path / "in" / ".DS_Store")
    run = extract(tiny_extractor, tmp_path / "in", "--out", tmp_path / "f")
    assert run.exit_code == 0, run.output
    assert "Ignored 3 hidden files" in run.output
    taken = make_video(tmp_path / ".take1.mp4", 20)
    run = extract(tiny_extractor, taken, "--out", tmp_path / "f")
    assert run.exit_code == 0, run.output
    assert "gnored" not in run.output
    assert FeatureStore(tmp_path / "f").videos("rgb") == [".take1", "a"]
    ids, (cause,) = ids_and_causes(tmp_path / "in" / "sub")
    assert (ids, "has no videos" in cause) == ([], True)


def test_a_bad_path_never_stops_the_others(tmp_path, tiny_extractor):
    clip = make_video(tmp_path / "a.mp4", 20)
    (tmp_path / "none").mkdir()
    bad = [tmp_path / "missing.mp4", clip / "x.mp4", tmp_path / ("n" * 300), tmp_path / "none"]
    run = extract(tiny_extractor, *bad, clip, "--out", tmp_path / "f")
    assert run.exit_code == 3
    causes = [line for line in run.output.splitlines() if line.startswith("failed: ")]
    assert len(causes) == 4
    assert "missing.mp4 does not exist" in causes[0]
    assert "has no videos" in causes[3]
    assert files_in(tmp_path / "f") == ["a.rgb.npz"]


@pytest.mark.parametrize(
    ("place", "error", "words"),
    [
        ("network", torch.cuda.OutOfMemoryError("CUDA out of memory.\nTry less."), "CUDA out of"),
        ("network", ZeroDivisionError("x"), "ZeroDivisionError: x"),
        ("decoder", MemoryError(), "MemoryError"),
        ("store", RuntimeError("odd"), "RuntimeError: odd"),
        ("digest", PermissionError(13, "Permission denied"), "Permission denied"),
    ],
)
def test_any_failure_costs_one_video(tmp_path, tiny_extractor, monkeypatch, place, error, words):
    for count, name in enumerate("abc", 20):
        new_video(tmp_path / "in" / f"{name}.mp4", count)
    owner, name, is_b = {
        "network": (extract_module._Track, "result", 0),
        "decoder": (Decoder, "frames", 1),
        "store": (FeatureStore, "save", 1),
        "digest": (batch, "source_of", 0),
    }[place]
    original = getattr(owner, name)

    def path_of(argument):
        return argument.run.job.path if place == "network" else argument

    def failing(*arguments, **options):
        if Path(path_of(arguments[is_b])).stem == "b":
            raise error
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, failing)
    run = extract(tiny_extractor, tmp_path / "in", "--out", tmp_path / "f")
    assert run.exit_code == 3
    (cause,) = [line for line in run.output.splitlines() if line.startswith("failed: ")]
    assert "/b.mp4" in cause
    assert words in cause
    assert "Try less" not in run.output
    assert files_in(tmp_path / "f") == ["a.rgb.npz", "c.rgb.npz"]


def test_a_network_that_does_not_fit_in_memory_is_one_sentence(
    tmp_path, tiny_extractor, monkeypatch
):
    def full(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    new_video(tmp_path / "in" / "a.mp4", 20)
    monkeypatch.setattr(runner, "load_network", full)
    run = extract(tiny_extractor, tmp_path / "in", "--out", tmp_path / "f")
    assert run.exit_code == 1
    assert "Error: The extractor 'tiny' cannot be loaded (OutOfMemoryError: CUDA" in run.output


def test_an_interrupt_keeps_what_is_done(tmp_path, tiny_extractor, monkeypatch):
    for name in "ab":
        new_video(tmp_path / "in" / f"{name}.mp4", 20)
    save = FeatureStore.save

    def interrupted(self, video_id, features):
        save(self, video_id, features)
        for _ in range(2):  # a second one at once changes nothing
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)

    monkeypatch.setattr(FeatureStore, "save", interrupted)
    arguments = tmp_path / "in", "--out", tmp_path / "f", "--decoders", 1
    run = extract(tiny_extractor, *arguments)
    assert run.exit_code == 130
    assert "Extraction (stopped;" in run.output
    assert "Traceback" not in run.output
    assert len(files_in(tmp_path / "f")) == 1
    monkeypatch.undo()
    assert extract(tiny_extractor, *arguments).exit_code == 0
    assert files_in(tmp_path / "f") == ["a.rgb.npz", "b.rgb.npz"]


@pytest.mark.parametrize("out", ["/proc/nope", "a.mp4/sub", "gone/sub"])
def test_an_unwritable_out_is_refused_before_any_work(tmp_path, tiny_extractor, monkeypatch, out):
    def must_not_decode(*_: object, **__: object) -> None:
        raise AssertionError("nothing may be decoded")

    clip = make_video(tmp_path / "a.mp4", 20)
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    monkeypatch.setattr(Decoder, "frames", must_not_decode)
    run = extract(tiny_extractor, clip, "--out", tmp_path / out)
    assert run.exit_code == 1
    assert run.output.startswith("Error: The output folder ")
    assert len(run.output.strip().splitlines()) == 1


def test_out_is_a_file(tmp_path, tiny_extractor):
    clip = make_video(tmp_path / "a.mp4", 20)
    (tmp_path / "f").write_text("precious")
    run = extract(tiny_extractor, clip, "--out", tmp_path / "f")
    assert run.exit_code == 1
    assert "is a file" in run.output
    assert (tmp_path / "f").read_text() == "precious"


def test_full_disk_fails_each_video_and_leaves_nothing(tmp_path, tiny_extractor, monkeypatch):
    clip = make_video(tmp_path / "a.mp4", 20)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    run = extract(tiny_extractor, clip, "--out", tmp_path / "f")
    assert run.exit_code == 1
    assert "No space left" in run.output
    assert files_in(tmp_path / "f") == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--modality", "sound"], "valid: rgb, flow"),
        (["--device", "cuda:0"] if not torch.cuda.is_available() else ["--device", "x"], "device"),
        (["--extractor", "nonsense"], "'nonsense' is unknown; valid: "),
    ],
)
def test_bad_options_name_the_valid_ones(tmp_path, tiny_extractor, arguments, words):
    clip = make_video(tmp_path / "a.mp4", 20)
    options = [
        "extract",
        str(clip),
        "--out",
        str(tmp_path / "f"),
        "--extractor",
        str(tiny_extractor),
    ]
    run = CliRunner().invoke(main, [*options, *arguments])
    assert run.exit_code == 1
    assert words in run.output
