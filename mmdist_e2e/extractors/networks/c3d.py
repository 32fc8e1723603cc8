"""C3D: 3×3×3 convolutions throughout (Tran et al., ICCV 2015).

State-dict keys are those of the public PyTorch port, so its checkpoint loads strictly.

Shapes: B batch, C channels, T = 16 frames, H = W = 112 pixels, D = 4096 · width channels.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mmdist_e2e.extractors.networks import scaled
from mmdist_e2e.extractors.profiles import LAYERS
from mmdist_e2e.structures import MmdistError

FRAMES, SIZE = 16, 112

SPORTS1M_CLASSES = 487

FULLY_CONNECTED = 4096

FINAL_POSITIONS = 16  # fc6 reads the final map: 1×4×4 positions of 512 channels

# Stages of convolutions with their channels; each stage ends in a max-pool: kernel = stride,
# and padding. The first pool keeps the time axis; the last pads 7×7 so that it gives 4×4.
STAGES: tuple[tuple[dict[str, int], tuple[int, int, int], tuple[int, int, int]], ...] = (
    ({"conv1": 64}, (1, 2, 2), (0, 0, 0)),
    ({"conv2": 128}, (2, 2, 2), (0, 0, 0)),
    ({"conv3a": 256, "conv3b": 256}, (2, 2, 2), (0, 0, 0)),
    ({"conv4a": 512, "conv4b": 512}, (2, 2, 2), (0, 0, 0)),
    ({"conv5a": 512, "conv5b": 512}, (2, 2, 2), (0, 1, 1)),
)


class C3D(nn.Module):
    """C3D; width 1 has 78.0 M parameters without fc8.

    Args:
        num_classes: outputs of fc8, which is loaded and never run; 0 leaves it out, as some public
            checkpoints do.
        width: factor on every channel count. Raises ValueError unless all stay whole numbers.
    """

    def __init__(self, num_classes: int = SPORTS1M_CLASSES, width: float = 1.0) -> None:
        super().__init__()
        self.in_channels = 3
        channels = self.in_channels
        for convolutions, _, _ in STAGES:
            for name, out_channels in convolutions.items():
                out = scaled(out_channels, width)
                self.add_module(name, nn.Conv3d(channels, out, 3, padding=1))
                channels = out
        self.feature_channels = scaled(FULLY_CONNECTED, width)
        self.fc6 = nn.Linear(channels * FINAL_POSITIONS, self.feature_channels)
        self.fc7 = nn.Linear(self.feature_channels, self.feature_channels)
        self.fc8 = nn.Linear(self.feature_channels, num_classes) if num_classes else None

    def maps(self, frames_BCTHW: Tensor) -> Tensor:
        """Run up to pool5: [B, 512 · width, 1, 4, 4].

        Raises MmdistError when the frames are not 16 RGB frames of 112×112.
        """
        needed = (self.in_channels, FRAMES, SIZE, SIZE)
        if frames_BCTHW.ndim != 5 or tuple(frames_BCTHW.shape[1:]) != needed:
            raise MmdistError(
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

        The original Caffe network rectifies in place, so public C3D features are never negative.
        Raises MmdistError for another layer or frames of another shape.
        """
        if layer not in LAYERS:
            raise MmdistError(f"The layer {layer!r} is unknown; valid: {', '.join(LAYERS)}.")
        rows_BD = F.relu(self.fc6(self.maps(frames_BCTHW).flatten(1)))
        if layer == "fc7":
            rows_BD = F.relu(self.fc7(rows_BD))
        return rows_BD[:, None]
