"""The store and resampling: atomic, exact, and polite about damage."""

from __future__ import annotations

import errno
import itertools
import json
import os
import subprocess
import sys
import unicodedata
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from mmdist_e2e.store import (
    FeatureStore,
    check_out,
    fast_digest,
    read_features,
    video_key,
    write_atomically,
    write_json,
)
from mmdist_e2e.structures import Features, MmdistError, Provenance, differences


def make(rows: int = 7, channels: int = 4, modality: str = "rgb") -> Features:
    rng = np.random.default_rng(rows)
    edges = np.linspace(0, 10, rows + 1)
    return Features(
        rng.normal(size=(rows, channels)).astype(np.float32),
        np.stack([edges[:-1], edges[1:]], axis=1),
        10.0,
        modality,
        Provenance({"extractor": "x", "fps": 12.0}, {"torch": "2"}, {"bytes": 3}),
    )


def test_round_trip_is_exact_and_ids_may_have_folders(tmp_path):
    store, features = FeatureStore(tmp_path), make()
    store.save("kitchen/a.b", features)
    loaded = store.load("kitchen/a.b", "rgb")
    np.testing.assert_array_equal(loaded.data, features.data)
    np.testing.assert_array_equal(loaded.times, features.times)
    assert loaded.provenance.to_json() == features.provenance.to_json()
    assert store.videos("rgb") == ["kitchen/a.b"]
    assert store.videos("flow") == []


def test_up_to_date_needs_the_same_way_and_the_same_file(tmp_path):
    store, features = FeatureStore(tmp_path), make()
    store.save("a", features)
    same = {"matters": features.provenance.matters, "source": features.provenance.source}
    assert store.up_to_date("a", "rgb", **same)
    assert not store.up_to_date("b", "rgb", **same)
    assert not store.up_to_date("a", "rgb", **{**same, "source": {"bytes": 4}})
    assert not store.up_to_date("a", "rgb", **{**same, "matters": {"extractor": "y"}})


def test_without_a_digest_of_the_source_nothing_is_reused(tmp_path):
    store, features = FeatureStore(tmp_path), make()
    store.save("a", Features(features.data, features.times, 10.0, "rgb", Provenance({"x": 1})))
    assert not store.up_to_date("a", "rgb", matters={"x": 1}, source={})


NAMES = [
    "plain",
    ".take1",
    "a/.take1",
    "a/..",
    "caf\udce9",  # a byte that is not UTF-8, as Python reads file names
    "new\nline\ttab",
    "ends in~0123456789abcdef",
    "e\u0301t\u00e9",
    "x" * 246 + "1",
    *("x" * 246 + end for end in ("12", "13", "1" * 9, "2" * 9)),
    "é" * 123,
    "é" * 124,
    "日" * 255 + "/" + "本" * 200 + "/a",
    "\udce9" * 300,
    "d" * 255 + "/" + "y" * 251,
]


def test_ids_of_any_bytes_form_and_length_are_found_again(tmp_path):
    store = FeatureStore(tmp_path)
    for rows, name in enumerate(NAMES, 1):
        store.save(name, make(rows))
    for rows, name in enumerate(NAMES, 1):
        for form in ("NFC", "NFD"):
            assert len(store.load(unicodedata.normalize(form, name), "rgb").data) == rows
        source = {"bytes": 3}
        assert store.up_to_date(name, "rgb", matters=make().provenance.matters, source=source)
    assert store.videos("rgb") == sorted(video_key(name) for name in NAMES)
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert FeatureStore(moved).videos("rgb") == sorted(video_key(name) for name in NAMES)


def test_a_name_that_fits_is_kept_whole(tmp_path):
    path = FeatureStore(tmp_path).save("x" * 247, make())
    assert path.name == "x" * 247 + ".rgb.npz"
    assert len(os.fsencode(path.name)) == 255
    assert len(os.fsencode(FeatureStore(tmp_path).path("x" * 248, "rgb").name)) == 255


@pytest.mark.parametrize("on_disk", ["\u00c5/caf\u00e9", "A\u030a/cafe\u0301", "\u212b/caf\u00e9"])
def test_feature_files_are_found_whatever_their_normal_form(tmp_path, on_disk):
    """As another system or program may have named them."""
    store = FeatureStore(tmp_path)
    path = store.save("a", make())
    (tmp_path / on_disk).parent.mkdir()
    path.rename(tmp_path / f"{on_disk}.rgb.npz")
    for asked in ("\u00c5/caf\u00e9", "A\u030a/cafe\u0301", "\u212b/cafe\u0301"):
        assert len(store.load(asked, "rgb").data) == 7
        assert not store.path(asked + "x", "rgb").is_file()
    assert store.videos("rgb") == ["\u00c5/caf\u00e9"]
    store.save("A\u030a/cafe\u0301", make(9))
    assert [len(read_features(p).data) for p in tmp_path.rglob("*.npz")] == [9]


def test_what_is_no_feature_file_is_not_listed(tmp_path):
    store = FeatureStore(tmp_path)
    store.save("a", make())
    (tmp_path / "._a.rgb.npz").write_bytes(b"\0\5\x16\7" + bytes(200))  # macOS leaves these
    names = []

    def write(stream):
        names.extend(p.name for p in tmp_path.iterdir() if p.name.startswith(".tmp"))
        stream.write(b"x")
        assert store.videos("rgb") == ["a"]

    write_atomically(tmp_path / ("n" * 255), write)
    assert all(len(name) < 20 for name in names)  # on Linux it has none until it is whole


def test_two_processes_that_write_one_video_never_show_a_part(tmp_path):
    script = """
import sys
sys.path.insert(0, sys.argv[1])
from test_store import FeatureStore, make
for i in range(40):
    FeatureStore(sys.argv[2]).save("a/b", make(int(sys.argv[3])))
"""
    here = str(Path(__file__).parent)
    running = [
        subprocess.Popen([sys.executable, "-c", script, here, str(tmp_path / "f"), rows])
        for rows in ("500", "900")
    ]
    seen = set()
    while any(process.poll() is None for process in running):
        if FeatureStore(tmp_path / "f").path("a/b", "rgb").is_file():
            seen.add(len(FeatureStore(tmp_path / "f").load("a/b", "rgb").data))
    assert [process.returncode for process in running] == [0, 0]
    assert seen <= {500, 900}
    assert [p.name for p in (tmp_path / "f" / "a").iterdir()] == ["b.rgb.npz"]


@pytest.mark.parametrize("place", ["FILE/sub", "/proc/nope", "/proc/nope/sub", "n" * 300, "LINK"])
def test_an_output_folder_that_cannot_be_made_is_one_sentence(tmp_path, place):
    (tmp_path / "FILE").write_text("precious")
    (tmp_path / "LINK").symlink_to(tmp_path / "nowhere")
    with pytest.raises(MmdistError, match=r"cannot be made or written \(.*\); choose another"):
        check_out(tmp_path / place)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["FILE", "LINK"]


def test_an_output_folder_that_can_be_made_is_left_as_it_is(tmp_path):
    (tmp_path / "there").mkdir()
    check_out(tmp_path / "there")
    check_out(tmp_path / "new" / "deep")
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]


def test_a_full_disk_is_seen_before_any_work(tmp_path, monkeypatch):
    import tempfile

    class Full:
        def __enter__(self):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", lambda **_: Full())
    with pytest.raises(MmdistError, match="No space left"):
        check_out(tmp_path)


def test_json_holds_names_of_any_bytes(tmp_path):
    write_json(tmp_path / "r.json", {"video": "caf\udce9 é\n"})
    text = (tmp_path / "r.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"video": "caf\udce9 é\n"}
    assert "é" in text


def test_what_is_no_regular_file_is_never_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(MmdistError, match="regular file"):
        fast_digest(tmp_path / "pipe.mp4")


def test_full_disk_leaves_the_old_file_and_no_part(tmp_path, monkeypatch):
    store = FeatureStore(tmp_path)
    path = store.save("a", make(3))
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MmdistError, match="No space left"):
        store.save("a", make(5))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.rgb.npz"]


def test_a_file_where_the_folder_should_be_is_named(tmp_path):
    (tmp_path / "out").write_text("not a folder")
    with pytest.raises(MmdistError, match="out"):
        FeatureStore(tmp_path / "out").save("a", make())


@pytest.mark.parametrize("keep", [0, 10, 200])
def test_a_truncated_feature_file_is_refused_and_made_again(tmp_path, keep):
    store = FeatureStore(tmp_path)
    path = store.save("a", make())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(MmdistError, match="not a whole feature file"):
        read_features(path)
    assert not store.up_to_date("a", "rgb", matters={"extractor": "x"}, source={})


def test_missing_features_say_how_to_make_them(tmp_path):
    with pytest.raises(MmdistError, match="mmdist extract"):
        FeatureStore(tmp_path).load("a", "rgb")


def test_digest_sees_a_change_anywhere_it_reads(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(bytes(5_000_000))
    first = fast_digest(path)
    assert fast_digest(path) == first
    changed = bytearray(5_000_000)
    changed[-1] = 1
    path.write_bytes(changed)
    assert fast_digest(path) != first


def exact_resample(data: np.ndarray, length: int) -> np.ndarray:
    """The rule in integers: round(i·S/L) with halves to even, by fractions."""
    count = len(data)
    edges = [min(round(Fraction(i * count, length)), count - 1) for i in range(length + 1)]
    pairs = itertools.pairwise(edges)
    return np.array([data[a:b].mean(axis=0) if a < b else data[a] for a, b in pairs])


@pytest.mark.parametrize("rows", [1, 2, 5, 17, 64, 199, 200, 201, 1000])
@pytest.mark.parametrize("length", [1, 16, 64, 200])
def test_resampling_follows_the_rule(rows, length):
    features = make(rows)
    resampled = features.resample(length)
    assert resampled.data.shape == (length, 4)
    if rows * 64 % length == 0 or (length & (length - 1)) == 0:
        # i / L is exact in float64 only for powers of two; elsewhere a half may round either way.
        np.testing.assert_allclose(resampled.data, exact_resample(features.data, length), rtol=1e-6)
    assert resampled.times[0, 0] == 0.0
    assert resampled.times[-1, 1] == features.duration_seconds
    assert np.isfinite(resampled.data).all()


def test_resampling_a_constant_gives_the_constant():
    features = make(37)
    flat = Features(
        np.full_like(features.data, 2.5), features.times, 10.0, "rgb", features.provenance
    )
    assert (flat.resample(200).data == 2.5).all()


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("data", np.full((2, 3), np.nan, np.float32), "2 of 2 rows"),
        ("data", np.zeros((0, 3), np.float32), "at least one"),
        ("times", np.zeros((3, 2)), "Times"),
        ("duration_seconds", 0.0, "positive"),
        ("modality", "sound", "rgb, flow"),
    ],
)
def test_broken_features_are_refused(field, value, words):
    good = {
        "data": np.zeros((2, 3), np.float32),
        "times": np.zeros((2, 2)),
        "duration_seconds": 1.0,
        "modality": "rgb",
        "provenance": Provenance({}),
    }
    with pytest.raises(MmdistError, match=words):
        Features(**{**good, field: value})


def test_differences_name_both_sides():
    phrases = differences({"fps": 25.0, "window": 16}, {"fps": 12.0, "window": 16})
    assert phrases == ["fps is 12.0 where the model needs 25.0"]
