"""C3D: 3×3×3 convolutions throughout (Tran et al., ICCV 2015), and the PCA of its fc7 rows.

State-dict keys are those of the public PyTorch port, so its checkpoint loads strictly.
Contract: `features(frames_BCTHW) -> [B, T', D]`, as every network.

ActivityNet's public 500-d features are fc7 rows x reduced to (x − x_mean) · U[:, :500]
(escorciav/daps, data/models/README.md). The file holds `x_mean`, `U` and `S` (in the group `data`);
`S`, the spectrum, scales nothing and is not read.

Shapes: B batch, C channels, T = 16 frames, H = W = 112 pixels, D = 4096 · width channels,
S snippets, K components.
"""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from mmdist_e2e.structures import MmdistError

FRAMES = 16

SIZE = 112

SPORTS1M_CLASSES = 487

FULLY_CONNECTED = 4096

# The final map, 1×4×4 of 512 channels, is what fc6 reads.
FINAL_POSITIONS = 16

# Stages of convolutions with their channels; each stage ends in a max-pool: kernel = stride,
# and padding. The first pool keeps the time axis; the last pads 7×7 so that it gives 4×4.
STAGES: tuple[tuple[dict[str, int], tuple[int, int, int], tuple[int, int, int]], ...] = (
    ({"conv1": 64}, (1, 2, 2), (0, 0, 0)),
    ({"conv2": 128}, (2, 2, 2), (0, 0, 0)),
    ({"conv3a": 256, "conv3b": 256}, (2, 2, 2), (0, 0, 0)),
    ({"conv4a": 512, "conv4b": 512}, (2, 2, 2), (0, 0, 0)),
    ({"conv5a": 512, "conv5b": 512}, (2, 2, 2), (0, 1, 1)),
)

LAYERS = ("fc6", "fc7")


class C3D(nn.Module):
    """C3D; width 1 has 78.0 M parameters without fc8.

    Args:
        num_classes: outputs of fc8; 0 leaves fc8 out, as some public checkpoints do.
        width: factor on every channel count. Raises ValueError when a layer would not have a
            whole number of channels.
        dropout: after fc6 and fc7, in training.
    """

    def __init__(
        self, num_classes: int = SPORTS1M_CLASSES, width: float = 1.0, *, dropout: float = 0.5
    ) -> None:
        super().__init__()
        self.num_classes, self.width, self.in_channels = num_classes, width, 3

        def scaled(channels: int) -> int:
            count = channels * width
            if count != int(count) or count < 1:
                raise ValueError(
                    f"width {width} gives {count} channels where C3D has {channels}; "
                    f"use a multiple of 1/64."
                )
            return int(count)

        channels = self.in_channels
        for convolutions, _, _ in STAGES:
            for name, out_channels in convolutions.items():
                self.add_module(name, nn.Conv3d(channels, scaled(out_channels), 3, padding=1))
                channels = scaled(out_channels)
        self.feature_channels = scaled(FULLY_CONNECTED)
        self.fc6 = nn.Linear(channels * FINAL_POSITIONS, self.feature_channels)
        self.fc7 = nn.Linear(self.feature_channels, self.feature_channels)
        self.fc8 = nn.Linear(self.feature_channels, num_classes) if num_classes else None
        self.dropout = nn.Dropout(dropout)

    def maps(self, frames_BCTHW: Tensor) -> Tensor:
        """Run up to pool5: [B, 512 · width, 1, 4, 4].

        Raises ValueError when the frames are not 16 RGB frames of 112×112.
        """
        needed = (self.in_channels, FRAMES, SIZE, SIZE)
        if frames_BCTHW.ndim != 5 or tuple(frames_BCTHW.shape[1:]) != needed:
            raise ValueError(
                f"C3D needs frames of the shape [batch, {', '.join(map(str, needed))}]; "
                f"got {list(frames_BCTHW.shape)}."
            )
        volume = frames_BCTHW
        for convolutions, pool, padding in STAGES:
            for name in convolutions:
                volume = F.relu(self.get_submodule(name)(volume), inplace=True)
            volume = F.max_pool3d(volume, pool, padding=padding)
        return volume

    def features(self, frames_BCTHW: Tensor, layer: str = "fc7") -> Tensor:
        """Activations [B, 1, D] of "fc6" or "fc7", after the ReLU.

        After it, because the original Caffe network rectifies in place: what its extractor
        writes as fc6 and fc7, and so every public C3D feature, is never negative.
        Raises ValueError for another layer or frames of another shape.
        """
        if layer not in LAYERS:
            raise ValueError(f"The layer {layer!r} is unknown; valid: {', '.join(LAYERS)}.")
        rows_BD = F.relu(self.fc6(self.maps(frames_BCTHW).flatten(1)))
        if layer == "fc7":
            rows_BD = F.relu(self.fc7(self.dropout(rows_BD)))
        return rows_BD[:, None]

    def forward(self, frames_BCTHW: Tensor) -> Tensor:
        """Class scores [B, num_classes] before any softmax. Raises ValueError without fc8."""
        if self.fc8 is None:
            raise ValueError("This C3D has no fc8 (num_classes is 0); use features().")
        scores: Tensor = self.fc8(self.dropout(self.features(frames_BCTHW)[:, 0]))
        return scores


COMPONENTS = 500

MEAN, BASIS = "x_mean", "U"

HDF5_GROUP = "data"


@dataclass(frozen=True)
class Pca:
    """A mean and the leading principal axes.

    Attributes:
        mean_D: [D] float32.
        basis_DK: [D, K] float32, one axis a column, the strongest first.
        digest: first 16 hexadecimal digits of the SHA-256 of the file, for the provenance.
    """

    mean_D: NDArray[np.float32]
    basis_DK: NDArray[np.float32]
    digest: str

    @classmethod
    def load(cls, path: Path, *, components: int = COMPONENTS) -> Pca:
        """Read the first `components` axes of an HDF5 file or an .npz with x_mean and U.

        Raises MmdistError when the file is missing or not one of these, when shapes disagree,
        when there are too few axes or a value is not finite.
        """
        try:
            with path.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()[:16]
        except OSError as error:
            raise MmdistError(
                f"The PCA file '{path}' cannot be read ({error.strerror}); give an HDF5 or .npz "
                f"file with {MEAN} and {BASIS}."
            ) from error
        mean, basis = _read_npz(path) if zipfile.is_zipfile(path) else _read_hdf5(path)
        mean_D = mean.reshape(-1)  # a row or a column [1, D] will do
        if basis.ndim != 2 or mean.size not in mean.shape or len(basis) != len(mean_D):
            raise MmdistError(
                f"The PCA file '{path}' needs {MEAN} of D numbers and {BASIS} of the shape "
                f"[D, K]; got {list(mean.shape)} and {list(basis.shape)}."
            )
        if not 1 <= components <= basis.shape[1]:
            raise MmdistError(
                f"The PCA file '{path}' has {basis.shape[1]} components; "
                f"{components} cannot be taken."
            )
        basis_DK = np.ascontiguousarray(basis[:, :components])
        if not (np.isfinite(mean_D).all() and np.isfinite(basis_DK).all()):
            raise MmdistError(
                f"The PCA file '{path}' holds values that are not finite; fetch it again."
            )
        return cls(mean_D, basis_DK, digest)

    def apply(self, rows_SD: NDArray[np.float32]) -> NDArray[np.float32]:
        """(x − mean) · U of each row: [S, K] float32. Raises MmdistError for another D."""
        if rows_SD.ndim != 2 or rows_SD.shape[1] != len(self.mean_D):
            raise MmdistError(
                f"This PCA reduces rows of {len(self.mean_D)} channels; the features have the "
                f"shape {list(rows_SD.shape)}: use the extractor that the PCA was made for."
            )
        centered_SD = (rows_SD - self.mean_D).astype(np.float32, copy=False)
        out: NDArray[np.float32] = np.matmul(centered_SD, self.basis_DK, dtype=np.float32)
        return out


Arrays = tuple[NDArray[np.float32], NDArray[np.float32]]


def _read_npz(path: Path) -> Arrays:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays[MEAN].astype(np.float32), arrays[BASIS].astype(np.float32)
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise _unlike(path, error) from error


def _read_hdf5(path: Path) -> Arrays:
    try:
        import h5py
    except ImportError as error:
        raise MmdistError(
            f"Reading '{path}' needs h5py; run pip install 'mmdist-e2e[hdf5]', or give an .npz."
        ) from error
    try:
        with h5py.File(path, "r") as file:
            group = file.get(HDF5_GROUP, file)
            return group[MEAN][()].astype(np.float32), group[BASIS][()].astype(np.float32)
    except (KeyError, ValueError, OSError, AttributeError, TypeError) as error:
        raise _unlike(path, error) from error


def _unlike(path: Path, error: Exception) -> MmdistError:
    return MmdistError(
        f"'{path}' is not a PCA file ({error}); give an HDF5 or .npz file with {MEAN} and {BASIS}."
    )
