"""Features from our store, HDF5 and .npy folders."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_source

from mmdist_e2e.grounding.data.features import load_features, open_features, places_of
from mmdist_e2e.store import FeatureStore
from mmdist_e2e.structures import Features, MmdistError, Provenance


def save_video(root: Path, video: str, rows: int = 9, channels: int = 4, **matters: object) -> None:
    data = np.random.default_rng(len(video)).normal(size=(rows, channels)).astype(np.float32)
    edges = np.linspace(0, 20.0, rows + 1)
    times = np.stack([edges[:-1], edges[1:]], axis=1)
    provenance = Provenance({"extractor": "toy", **matters})
    FeatureStore(root).save(video, Features(data, times, 20.0, "rgb", provenance))


def resampled(rows_SF: np.ndarray, length: int) -> np.ndarray:
    """The rule of the method, one position after the other: edges round(i / L · S), halves even."""
    rows, last, out = np.asarray(rows_SF, np.float64), len(rows_SF) - 1, []
    for i in range(length):
        left, right = (min(round(j / length * len(rows)), last) for j in (i, i + 1))
        out.append(rows[left:right].mean(0) if left < right else rows[left])
    return np.array(out)


def test_features_of_a_store(tmp_path: Path) -> None:
    for video in ("b", "room/a"):
        save_video(tmp_path, video)
    table = load_features({"rgb": tmp_path}, ["room/a", "b", "b"], length=5)
    assert table.videos == ("b", "room/a")
    assert table.data_VLF.shape == (2, 5, 4)
    assert table.data_VLF.dtype == torch.float32
    stored = FeatureStore(tmp_path).load("room/a", "rgb").data
    np.testing.assert_allclose(table.data_VLF[table.rows["room/a"]], resampled(stored, 5), 1e-5)
    assert table.durations_seconds["b"] == 20.0
    assert table.matters == {"rgb": {"extractor": "toy"}}
    moved = table.to("meta")
    assert moved.data_VLF.device.type == "meta"
    assert moved.rows == table.rows


@pytest.mark.parametrize("kind", ["hdf5", "npy"])
@pytest.mark.parametrize(("rows", "length"), [(7, 7), (150, 64), (3, 10)])
def test_imported_arrays(tmp_path: Path, kind: str, rows: int, length: int) -> None:
    half = np.random.default_rng(0).normal(size=(rows, 3)).astype(np.float16)
    double = np.random.default_rng(1).normal(size=(rows, 3))
    path = tmp_path
    if kind == "hdf5":
        h5py = pytest.importorskip("h5py", reason="needs the extra hdf5")
        path = tmp_path / "f.hdf5"
        with h5py.File(path, "w") as file:
            file["a"] = half
            file["room/b/c3d_features"] = double
    else:
        (tmp_path / "room").mkdir()
        np.save(tmp_path / "a.npy", half)
        np.save(tmp_path / "room" / "b.npy", double)
    table = load_features({"flow": path}, ["a", "room/b"], length=length)
    np.testing.assert_allclose(table.data_VLF[0], resampled(half, length), rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(table.data_VLF[1], resampled(double, length), rtol=2e-6, atol=1e-6)
    assert table.durations_seconds == {"a": None, "room/b": None}
    assert table.matters == {"flow": {"extractor": f"external:{kind}"}}


def test_dimensions_of_one_are_dropped(tmp_path: Path) -> None:
    """CPL squeezes the published I3D features likewise; one row stays a row."""
    for video, rows in (("a", 7), ("b", 1)):
        np.save(tmp_path / f"{video}.npy", np.arange(rows * 4.0).reshape(rows, 1, 1, 4))
    with open_features(tmp_path) as source:
        assert np.array_equal(source.features("a").data, np.arange(28.0).reshape(7, 4))
        assert source.features("b").data.shape == (1, 4)


def test_videos_without_features_are_counted_and_named(tmp_path: Path) -> None:
    save_video(tmp_path, "v0")
    with pytest.raises(MmdistError, match=r"7 of 8 videos .*\(v1, v2, v3, v4, v5 and 2 more\)"):
        load_features({"rgb": tmp_path}, [f"v{i}" for i in range(8)], length=5)


@pytest.mark.parametrize("unlike", [{"window": 32}, {"channels": 5}])
def test_features_made_in_two_ways_are_refused(tmp_path: Path, unlike: dict[str, int]) -> None:
    save_video(tmp_path, "a")
    save_video(tmp_path, "b", **unlike)
    with pytest.raises(MmdistError, match="not all made in one way: 'b' differs from 'a'"):
        load_features({"rgb": tmp_path}, ["a", "b"], length=5)


def test_names_may_carry_the_suffix_of_the_video(tmp_path: Path) -> None:
    for name in ("a.mp4", "b", "c.MKV"):
        np.save(tmp_path / f"{name}.npy", np.full((2, 3), ord(name[0]), np.float32))
    table = load_features({"rgb": tmp_path}, ["a", "b", "c"], length=2)
    assert table.data_VLF[:, 0, 0].tolist() == [97, 98, 99]
    # A name that is the id itself goes before one with a suffix; of two with one, neither does.
    np.save(tmp_path / "a.npy", np.zeros((2, 3), np.float32))
    assert not load_features({"rgb": tmp_path}, ["a"], length=2).data_VLF.any()
    np.save(tmp_path / "c.avi.npy", np.zeros((2, 3), np.float32))
    with pytest.raises(MmdistError, match=r"both 'c\.MKV' and 'c\.avi'"):
        load_features({"rgb": tmp_path}, ["b"], length=2)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.array([[1, np.nan], [2, 3], [np.inf, 1]]), r"'v' .*2 of 3 rows are not"),
        (np.zeros(5), r"'v' .*shape \[5\]"),
        (np.zeros((2, 1, 2, 3)), r"'v' .*shape \[2, 1, 2, 3\]"),
        (np.zeros((0, 3)), r"'v' .*shape \[0, 3\]"),
        (np.array([["x"]]), "'v' .*<U1"),
        (np.array([{}]), "'v' .*cannot be used"),  # would need a pickle
    ],
)
def test_unusable_arrays_name_their_video(tmp_path: Path, array: np.ndarray, reason: str) -> None:
    np.save(tmp_path / "good.npy", np.zeros((2, 3)))
    np.save(tmp_path / "v.npy", array)
    with pytest.raises(MmdistError, match=reason):
        load_features({"rgb": tmp_path}, ["good", "v"], length=2)


def test_damaged_npy(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.zeros((20, 3)))
    (tmp_path / "v.npy").write_bytes((tmp_path / "v.npy").read_bytes()[:200])
    with pytest.raises(MmdistError, match=r"'v' .*cannot be used"):
        load_features({"rgb": tmp_path}, ["v"], length=2)


def test_damaged_and_foreign_hdf5(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="needs the extra hdf5")
    (tmp_path / "bad.hdf5").write_bytes(b"no")
    with pytest.raises(MmdistError, match="not a readable HDF5"):
        load_features({"rgb": tmp_path / "bad.hdf5"}, ["a"], length=7)
    with h5py.File(tmp_path / "f.hdf5", "w") as file:
        file["a/i3d_features"] = np.zeros((2, 3))
    with pytest.raises(MmdistError, match=r"\(a\), which has 'a/i3d_features' for one"):
        load_features({"rgb": tmp_path / "f.hdf5"}, ["a"], length=7)


def test_places_without_features(tmp_path: Path) -> None:
    with pytest.raises(MmdistError, match="no features at"):
        load_features({"rgb": tmp_path / "none"}, ["a"], length=2)
    with pytest.raises(MmdistError, match="holds no rgb features; it needs"):
        load_features({"rgb": tmp_path}, ["a"], length=2)
    save_video(tmp_path, "a")
    with pytest.raises(MmdistError, match="no flow features, only rgb"):
        load_features({"flow": tmp_path}, ["a"], length=2)


@pytest.mark.parametrize("kind", ["hdf5", "npy"])
def test_rgb_and_flow_are_never_one_source(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(0)
    arrays = {video: rng.normal(size=(9, 4)).astype(np.float32) for video in "ab"}
    source = write_source(tmp_path / "one", kind, arrays)
    (tmp_path / "link").symlink_to(source)
    same = [None, source, tmp_path / "link", write_source(tmp_path / "copy", kind, arrays)]
    if kind == "hdf5":
        (tmp_path / "hard").hardlink_to(source)
        same.append(tmp_path / "hard")
        same.append(write_source(tmp_path / "copy.npy", "npy", arrays))
    for flow in same:
        with pytest.raises(MmdistError, match=r"same features, .* flow features with --flow"):
            load_features(places_of(("rgb", "flow"), source, flow), ["a", "b"], length=5)
        assert places_of(("rgb",), source, flow) == {"rgb": source}
    other = write_source(tmp_path / "other", kind, {v: array + 0.1 for v, array in arrays.items()})
    table = load_features(places_of(("rgb", "flow"), source, other), ["a", "b"], length=5)
    assert table.channels == {"rgb": 4, "flow": 4}


def test_one_store_holds_both_modalities(tmp_path: Path) -> None:
    save_video(tmp_path, "a")
    rgb = FeatureStore(tmp_path).load("a", "rgb")
    flow = Features(rgb.data[::-1], rgb.times, 20.0, "flow", rgb.provenance)
    FeatureStore(tmp_path).save("a", flow)
    places = places_of(("rgb", "flow"), tmp_path, None)
    assert load_features(places, ["a"], length=5).data_VLF.shape == (1, 5, 8)
    # A file that was renamed, or copied, to the other modality.
    (tmp_path / "a.flow.npz").write_bytes((tmp_path / "a.rgb.npz").read_bytes())
    with pytest.raises(MmdistError, match=r"of 'a' .* are those of rgb"):
        load_features(places, ["a"], length=5)
    FeatureStore(tmp_path).save("a", Features(rgb.data, rgb.times, 20.0, "flow", rgb.provenance))
    with pytest.raises(MmdistError, match="same features, once as RGB"):
        load_features(places, ["a"], length=5)


def test_digests_follow_what_was_read(tmp_path: Path) -> None:
    def digest(**asked: object) -> str:
        videos = asked.pop("videos", ["a", "b"])
        return load_features({"rgb": tmp_path}, videos, length=5).digests["rgb"]

    save_video(tmp_path, "a")
    save_video(tmp_path, "b")
    first = digest()
    save_video(tmp_path, "c")
    assert digest(videos=["b", "a", "a"]) == first
    assert digest(videos=["a", "b", "c"]) != first
    one = FeatureStore(tmp_path).load("a", "rgb")
    seen = {first}
    for changed in (
        Features(one.data + np.float32(1e-3), one.times, 20.0, "rgb", one.provenance),
        Features(one.data, one.times + 0.01, 20.0, "rgb", one.provenance),
        Features(one.data, one.times, 20.5, "rgb", one.provenance),
    ):
        FeatureStore(tmp_path).save("a", changed)
        seen.add(digest())
    for video in "ab":
        save_video(tmp_path, video, window=32)
    assert len(seen | {digest()}) == 5


@pytest.mark.skipif("MMDIST_DATA" not in os.environ, reason="set MMDIST_DATA for the real files")
def test_real_features() -> None:
    pytest.importorskip("h5py", reason="needs the extra hdf5")
    path = Path(os.environ["MMDIST_DATA"]) / "charades_clip" / "features.hdf5"
    with open_features(path) as source:
        assert len(source.names) == 897
        raw = source.features("3MSZA").data
    table = load_features({"rgb": path}, ["3MSZA"], length=50)
    np.testing.assert_allclose(table.data_VLF[0], resampled(raw, 50), rtol=1e-3, atol=1e-5)
