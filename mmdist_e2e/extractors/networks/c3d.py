"""C3D: 3×3×3 convolutions throughout (Tran et al., ICCV 2015).

State-dict keys are those of the public PyTorch port, so its checkpoint loads strictly.

Shapes: B batch, C channels, T = 16 frames, H = W = 112 pixels, D = 4096 · width channels.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mmdist_e2e.extractors.networks import scaled
from mmdist_e2e.extractors.profiles import LAYERS
from mmdist_e2e.structures import MmdistError, check_choice

SHAPE = (3, 16, 112, 112)  # of a clip: channels, frames, height, width

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
        num_classes: outputs of fc8 (487 for Sports-1M), which is loaded and never run; 0 leaves it
            out, as some public checkpoints do.
        width: factor on every channel count. Raises ValueError unless all stay whole numbers.
    """

    def __init__(self, num_classes: int = 487, width: float = 1.0) -> None:
        super().__init__()
        self.in_channels = channels = SHAPE[0]
        for convolutions, _, _ in STAGES:
            for name, out_channels in convolutions.items():
                out = scaled(out_channels, width)
                self.add_module(name, nn.Conv3d(channels, out, 3, padding=1))
                channels = out
        self.feature_channels = scaled(4096, width)
        self.fc6 = nn.Linear(channels * 1 * 4 * 4, self.feature_channels)
        self.fc7 = nn.Linear(self.feature_channels, self.feature_channels)
        self.fc8 = nn.Linear(self.feature_channels, num_classes) if num_classes else None

    def features(self, frames_BCTHW: Tensor, layer: str = "fc7") -> Tensor:
        """Activations [B, 1, D] of "fc6" or "fc7", after the ReLU.

        The original Caffe network rectifies in place, so public C3D features are never negative.
        Raises MmdistError for another layer or frames of another shape.
        """
        check_choice("The layer", layer, LAYERS)
        if frames_BCTHW.ndim != 5 or frames_BCTHW.shape[1:] != SHAPE:
            raise MmdistError(
                f"C3D needs frames of the shape [batch, {', '.join(map(str, SHAPE))}]; "
                f"got {list(frames_BCTHW.shape)}."
            )
        volume = frames_BCTHW
        for convolutions, pool, padding in STAGES:
            for name in convolutions:
                volume = F.relu(self.get_submodule(name)(volume), inplace=True)
            volume = F.max_pool3d(volume, pool, padding=padding)
        rows_BD = F.relu(self.fc6(volume.flatten(1)))
        if layer == "fc7":
            rows_BD = F.relu(self.fc7(rows_BD))
        return rows_BD[:, None]
