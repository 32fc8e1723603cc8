"""`mmdist extract` end to end with a tiny random network: what works, and what people get wrong."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from make_videos import cut, frames_and_times, make_audio, make_video

import mmdist_e2e as mm
from mmdist_e2e.cli.main import main
from mmdist_e2e.extractors.networks.i3d import InceptionI3d
from mmdist_e2e.extractors.profiles import describe
from mmdist_e2e.extractors.runner import SnippetNetwork
from mmdist_e2e.store import FeatureStore


def extract(tiny: Path, *arguments: object) -> Result:
    return CliRunner().invoke(
        main, ["extract", *map(str, arguments), "--extractor", str(tiny), "--precision", "fp32"]
    )


def files_in(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


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
    small = network.preprocessing(np.stack([frames[i] for i in wanted]))
    for j in range(rows):
        index = np.minimum(np.arange(8 * j, 8 * j + 16), len(wanted) - 1)
        row = network.rows(small[index][None])[0]
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
    assert run.exit_code == 1
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


def test_folder_without_videos(tmp_path, tiny_extractor):
    (tmp_path / "none").mkdir()
    run = extract(tiny_extractor, tmp_path / "none", "--out", tmp_path / "f")
    assert run.exit_code == 1
    assert "has no videos" in run.output


def test_two_files_with_one_id_are_refused_before_any_work(tmp_path, tiny_extractor):
    make_video(tmp_path / "a.mp4", 20)
    make_video(tmp_path / "a.mkv", 20)
    run = extract(tiny_extractor, tmp_path, "--out", tmp_path / "f")
    assert run.exit_code == 1
    assert "one id" in run.output or "the video id 'a'" in run.output
    assert not (tmp_path / "f").exists()


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
