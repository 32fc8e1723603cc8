"""The PCA that reduces ActivityNet's public C3D features to 500 channels.

They are fc7 rows x reduced to (x − x_mean) · U[:, :500] (escorciav/daps, data/models/README.md).
The file holds `x_mean`, `U` and `S` (in the group `data`); the spectrum `S` is not needed.

Shapes: S snippets, D channels, K components.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmdist_e2e.structures import MmdistError
from mmdist_e2e.weights.download import file_sha256

COMPONENTS = 500
MEAN, BASIS = "x_mean", "U"


@dataclass(frozen=True)
class Pca:
    """A mean and the leading principal axes.

    Attributes:
        mean_D: [D] float32.
        basis_DK: [D, K] float32, one axis per column, the strongest first.
        digest: first 16 hexadecimal digits of the SHA-256 of the file, for the provenance.
    """

    mean_D: NDArray[np.float32]
    basis_DK: NDArray[np.float32]
    digest: str

    @classmethod
    def load(cls, path: Path, *, components: int = COMPONENTS) -> Pca:
        """Read the first `components` axes of an HDF5 or .npz file with x_mean and U.

        Raises MmdistError when the file is missing or is no such file, when shapes disagree, when
        there are too few axes, or when a value is not finite.
        """
        try:
            digest = file_sha256(path)[:16]
            mean, basis = _read(path)
        except ImportError as error:
            raise MmdistError(
                f"Reading '{path}' needs h5py; run pip install 'mmdist-e2e[hdf5]', or give an .npz."
            ) from error
        except (
            KeyError, ValueError, OSError, AttributeError, TypeError, zipfile.BadZipFile
        ) as error:  # fmt: skip
            reason = getattr(error, "strerror", None) or error
            raise MmdistError(
                f"'{path}' cannot be read as a PCA file ({reason}); give an HDF5 or .npz file with "
                f"{MEAN} and {BASIS}."
            ) from error
        mean_D = mean.reshape(-1)  # also of one row or one column
        problem = ""
        if basis.ndim != 2 or mean.size not in mean.shape or len(basis) != len(mean_D):
            shapes = f"{list(mean.shape)} and {list(basis.shape)}"
            problem = f"needs {MEAN} of D numbers and {BASIS} of the shape [D, K]; got {shapes}"
        elif components > basis.shape[1]:
            problem = f"has {basis.shape[1]} components; {components} are needed"
        elif not (np.isfinite(mean_D).all() and np.isfinite(basis[:, :components]).all()):
            problem = "holds values that are not finite; download it again"
        if problem:
            raise MmdistError(f"The PCA file '{path}' {problem}.")
        return cls(mean_D, np.ascontiguousarray(basis[:, :components]), digest)

    def apply(self, rows_SD: NDArray[np.float32]) -> NDArray[np.float32]:
        """(x − mean) · U of each row: [S, K] float32."""
        out: NDArray[np.float32] = np.matmul(rows_SD - self.mean_D, self.basis_DK, dtype=np.float32)
        return out


def _read(path: Path) -> list[NDArray[np.float32]]:
    if zipfile.is_zipfile(path):
        with np.load(path, allow_pickle=False) as arrays:
            return [arrays[name].astype(np.float32) for name in (MEAN, BASIS)]
    import h5py

    with h5py.File(path, "r") as file:
        group = file.get("data", file)
        return [group[name][()].astype(np.float32) for name in (MEAN, BASIS)]
