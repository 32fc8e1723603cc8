"""Small numbers of `tests/drill.py`, and tests of what it found."""

from __future__ import annotations

import os
from pathlib import Path

import av
import pytest
from drill import (
    BROKEN,
    PARTS,
    Drill,
    Unable,
    check_sentence,
    decode_all,
    features,
    make_broken,
    make_good,
)
from make_videos import make_video

from mmdist_e2e.extractors.video.reader import Decoder

pytestmark = pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
DATA = os.environ.get("MMDIST_DATA")


def blank_video(path: Path, width: int, height: int) -> Path:
    """Three PNG pictures of one bit a pixel, in a file of some kilobytes."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("png", rate=10)
        stream.width, stream.height, stream.pix_fmt = width, height, "monob"
        for _ in range(3):
            frame = av.VideoFrame(width, height, "monob")
            frame.planes[0].update(bytes(frame.planes[0].buffer_size))
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def test_absurd_sizes_are_refused_before_they_take_memory(tmp_path: Path) -> None:
    large = blank_video(tmp_path / "large.avi", 16000, 16000)
    long = blank_video(tmp_path / "long.avi", 65000, 16)
    refused, good = decode_all([large, long])
    check_sentence(large, refused.cause)
    assert "16000×16000" in refused.cause
    assert good.frames == 3
    assert good.peak_bytes < 300e6


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_a_damaged_time_stamp_does_not_ask_for_hours_of_one_picture(
    suffix: str, tmp_path: Path
) -> None:
    times = [*range(0, 760, 40), 2 * 3600 * 1000]
    path = make_video(tmp_path / f"a.{suffix}", len(times), times_ms=times)
    (result,) = decode_all([path])
    check_sentence(path, result.cause)
    assert "one picture for 2.0 hours" in result.cause
    minutes = make_video(tmp_path / f"b.{suffix}", 20, times_ms=[*range(0, 760, 40), 60_000])
    (result,) = decode_all([minutes])
    assert result.frames >= 1500
    assert not result.cause


def test_a_stream_that_begins_late_is_no_failure(tmp_path: Path) -> None:
    """PyAV raises IndexError at the end of such a file."""
    path = make_video(tmp_path / "a.ts", 250, audio=True)
    (before,) = decode_all([path])
    data = bytearray(path.read_bytes())
    for at in range(len(data) * 9 // 10 // 188 * 188, len(data), 188):
        head = int.from_bytes(data[at + 1 : at + 3], "big")
        if head & 0x1FFF == 0x101:  # the sound's packets
            data[at + 1 : at + 3] = ((head & 0xE000) | 0x1FF).to_bytes(2, "big")
    path.write_bytes(data)
    with av.open(str(path)) as container, pytest.raises(IndexError):
        for _ in container.demux(container.streams.video[0]):
            pass
    (after,) = decode_all([path])
    assert (after.frames, after.cause) == (before.frames, "")


def test_the_decoder_loads_no_cuda(tmp_path: Path) -> None:
    """decord2 preloads the libraries that torch's packages bring: 700 MB in each process."""
    path = make_video(tmp_path / "a.mp4", 20)
    with Decoder() as decoder:
        stream = decoder.frames(path)
        assert stream.info.decoder == "decord"
        list(stream)
        maps = Path(f"/proc/{decoder._child.pid}/maps").read_text()  # type: ignore[union-attr]
    assert "decord" in maps
    assert "site-packages/nvidia" not in maps


def test_every_way_of_being_broken_is_named(tmp_path: Path) -> None:
    """Those that need no run: the others hang, or are deleted in one, or are too small."""
    paths = [p for p in make_broken(tmp_path) if not p.name.startswith(("hang", "zz", "absurd"))]
    assert len(paths) == 3 * (len(BROKEN) - 3)
    for result in decode_all(paths):
        check_sentence(result.path, result.cause)


def test_good_videos_decode_and_differ(tmp_path: Path) -> None:
    paths = make_good(tmp_path, 30)
    assert len({path.read_bytes() for path in paths}) == 30
    assert [result.cause for result in decode_all(paths)] == [""] * 30


SMALL = {
    "survive": {"good": 24, "each": 1, "kills": 2},
    "resume": {"good": 24, "kills": 2},
    "share": {"good": 24},
    "shards": {"good": 24},
    "full": {"good": 24},
    "unwritable": {"good": 24},
    "clock": {"good": 24},
    "mutations": {"count": 80},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("drill")


@pytest.mark.slow
@pytest.mark.parametrize("part", SMALL)
def test_part(part: str, tmp_path: Path, base: Path) -> None:
    more = dict(SMALL[part])
    if part == "mutations":
        if DATA is None:
            pytest.skip("MMDIST_DATA does not name the folder of real videos")
        more["data"] = Path(DATA) / "videos"
    try:
        PARTS[part](Drill(tmp_path, base=base), **more)
    except Unable as reason:
        pytest.skip(str(reason))


@pytest.mark.slow
def test_no_id_of_a_list_leads_out_of_the_output_folder(tmp_path: Path) -> None:
    drill, inside = Drill(tmp_path / "drill"), tmp_path / "videos" / "in"
    inside.mkdir(parents=True)
    make_video(inside / "good.mp4", 12)
    make_video(tmp_path / "videos" / "outside.mp4", 13)
    (inside / "..mp4").symlink_to(inside / "good.mp4")
    lines = [
        f"# root: {inside}",
        "good.mp4",
        "../outside.mp4",
        "a/../../outside.mp4",
        f"{tmp_path / 'videos' / 'outside.mp4'}",
        '"..\\u002foutside.mp4"',
        "..mp4",
        ".mmdist/claims/x.mp4",
        "/outside.mp4",
        "# root: /",
        f"{tmp_path / 'videos' / 'outside.mp4'}",
    ]
    (tmp_path / "list").write_text("\n".join(lines) + "\n")
    before = {path for path in tmp_path.rglob("*") if drill.folder not in path.parents}
    out = tmp_path / "deep" / "er" / "out"
    ended = drill.run("--list", tmp_path / "list", "--out", out)
    assert ended.code == 3, ended.output
    assert "Traceback" not in ended.output
    after = {path for path in tmp_path.rglob("*") if drill.folder not in path.parents}
    assert {path for path in after - before if out not in path.parents} <= {out, *out.parents}
    assert not {path.name for path in (out / ".mmdist").glob("claims/*")}
    names = set(features(out))
    assert "good.rgb.npz" in names
    assert len(names) <= 2  # and the one whose root is /
