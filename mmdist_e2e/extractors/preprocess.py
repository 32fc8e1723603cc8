"""From decoded RGB frames to what a network reads. Torch and numpy alone.

Shapes: N frames, H height, W width, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Preprocessing:
    """How frames become a network's input.

    Either `shorter_side` and `crop` are set (resize keeping the aspect ratio, then the center
    crop) or both are None and the whole frame is resized to `size` × `size`. Bilinear with
    antialiasing; values [0, 255] go to [−1, 1].
    """

    size: int
    shorter_side: int | None = None
    crop: int | None = None

    def __post_init__(self) -> None:
        if (self.shorter_side is None) != (self.crop is None):
            raise ValueError("shorter_side and crop go together.")
        if self.crop is not None and self.crop != self.size:
            raise ValueError(f"The crop is what the network reads: {self.crop} != {self.size}.")

    def target(self, height: int, width: int) -> tuple[int, int]:
        """Size (height, width) that frames are resized to before any crop, in pixels."""
        if self.shorter_side is None:
            return self.size, self.size
        scale = self.shorter_side / min(height, width)
        return max(round(height * scale), self.size), max(round(width * scale), self.size)

    def __call__(self, frames_NHWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Resize and crop uint8 frames to uint8 [N, size, size, 3].

        Frames stay 8-bit, so that buffered windows take a quarter of float32; the rounding is
        below that of the decoder.
        """
        frames_NCHW = torch.from_numpy(frames_NHWC).permute(0, 3, 1, 2)
        height, width = frames_NCHW.shape[-2:]
        target = self.target(height, width)
        if target != (height, width):
            frames_NCHW = F.interpolate(
                frames_NCHW.float(), target, mode="bilinear", antialias=True, align_corners=False
            )
            frames_NCHW = frames_NCHW.round_().clamp_(0, 255).to(torch.uint8)
        top, left = (target[0] - self.size) // 2, (target[1] - self.size) // 2
        cropped = frames_NCHW[..., top : top + self.size, left : left + self.size]
        out: NDArray[np.uint8] = cropped.permute(0, 2, 3, 1).contiguous().numpy()
        return out


def to_network(windows_BTHWC: Tensor) -> Tensor:
    """uint8 windows [B, T, H, W, C] to float32 [B, C, T, H, W] in [−1, 1].

    The permuted tensor is already channels-last in memory, the layout that is fastest on CPUs.
    """
    return windows_BTHWC.permute(0, 4, 1, 2, 3).float().mul_(2 / 255).sub_(1)
