"""The store and resampling: atomic, exact, and polite about damage."""

from __future__ import annotations

import errno
import itertools
import os
from fractions import Fraction

import numpy as np
import pytest

from mmdist_e2e.store import FeatureStore, fast_digest, read_features
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
