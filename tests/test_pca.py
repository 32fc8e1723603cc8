"""The PCA of public C3D features: read from HDF5 or npz, applied, refused when it does not fit."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from mmdist_e2e.extractors.networks.pca import Pca
from mmdist_e2e.structures import MmdistError


def arrays(channels=24):
    rng = np.random.default_rng(0)
    return {
        "x_mean": rng.normal(size=(1, channels)),
        "U": np.linalg.qr(rng.normal(size=(channels, channels)))[0],
        "S": np.sort(rng.uniform(1, 9, size=channels))[::-1] * 1e4,
    }


def write_hdf5(path, content, group="data"):
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        for name, value in content.items():
            file[f"{group}/{name}" if group else name] = value
    return path


def write_npz(path, content):
    np.savez(path, **content)
    return path


@pytest.mark.parametrize("form", ["npz", "hdf5 with the group data", "hdf5 without a group"])
def test_rows_are_centered_and_projected_on_the_first_axes(tmp_path, form):
    content = arrays()
    if form == "npz":
        path = write_npz(tmp_path / "pca.npz", content)
    else:
        path = write_hdf5(tmp_path / "pca.hdf5", content, "data" if "with the" in form else "")
    pca = Pca.load(path, components=5)
    rows = np.random.default_rng(1).normal(size=(7, 24)).astype(np.float32)
    expected = [
        [sum((row[d] - content["x_mean"][0, d]) * content["U"][d, k] for d in range(24))
         for k in range(5)]
        for row in rows.astype(np.float64)
    ]  # fmt: skip
    actual = pca.apply(rows)
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
    assert pca.digest == hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def test_the_default_is_500_components(tmp_path):
    content = arrays(channels=512)
    pca = Pca.load(write_npz(tmp_path / "p.npz", content))
    assert pca.apply(np.zeros((3, 512), np.float32)).shape == (3, 500)
    with pytest.raises(MmdistError, match="has 24 components; 500"):
        Pca.load(write_npz(tmp_path / "q.npz", arrays()))


def test_a_flat_mean_and_no_spectrum_will_do(tmp_path):
    content = arrays()
    whole = Pca.load(write_npz(tmp_path / "a.npz", content), components=3)
    content["x_mean"] = content["x_mean"][0]
    del content["S"]
    flat = Pca.load(write_npz(tmp_path / "b.npz", content), components=3)
    np.testing.assert_array_equal(flat.mean_D, whole.mean_D)
    assert flat.digest != whole.digest


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"x_mean": np.zeros((1, 23))}, r"got \[1, 23\] and \[24, 24\]"),
        ({"x_mean": np.zeros((4, 6))}, r"got \[4, 6\]"),
        ({"x_mean": np.float64(3.0)}, r"got \[\]"),
        ({"U": np.zeros(24)}, r"and \[24\]"),
        ({"U": np.full((24, 24), np.nan)}, "not finite"),
        ({"U": np.array(["a"])}, "as a PCA file"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, change, match):
    path = write_npz(tmp_path / "pca.npz", arrays() | change)
    with pytest.raises(MmdistError, match=match):
        Pca.load(path, components=5)


def test_files_that_are_no_pca_are_named(tmp_path):
    (tmp_path / "text").write_text("no PCA")
    partial = {key: value for key, value in arrays().items() if key != "U"}
    cases = {
        tmp_path / "missing.npz": "cannot be read",
        tmp_path / "text": "as a PCA file",
        write_npz(tmp_path / "partial.npz", partial): "as a PCA file",
        write_hdf5(tmp_path / "partial.hdf5", partial): "as a PCA file",
    }
    for path, match in cases.items():
        with pytest.raises(MmdistError, match=match) as caught:
            Pca.load(path)
        assert str(path) in str(caught.value)
