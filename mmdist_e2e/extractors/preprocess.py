"""From decoded RGB frames to what a network reads. Torch and numpy alone.

Shapes: N frames, B windows, T frames of a window, H height, W width, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

CHANNEL_ORDERS = ("rgb", "bgr")
HALF_RANGE = (127.5, 127.5, 127.5)  # as mean and std: [0, 255] to [−1, 1]


@dataclass(frozen=True)
class Preprocessing:
    """How frames become a network's input. Resizing is bilinear with antialiasing.

    Attributes:
        size: height and width that the network reads, in pixels. Alone, the whole frame is
            resized to it.
        shorter_side: resize to it, keeping the aspect ratio, then take the center `crop`.
        crop: equal to `size`; goes with `shorter_side` or `resize`.
        resize: exact [height, width] to resize to, then take the center `crop`.
        mean, std: of red, green and blue, in units of 0–255: the network reads (x − mean) / std.
        channel_order: "rgb", or "bgr" for networks that came from OpenCV or Caffe.
    Lists, as JSON has them, become tuples. Raises ValueError naming the value that is wrong.
    """

    size: int
    shorter_side: int | None = None
    crop: int | None = None
    resize: Sequence[int] | None = None
    mean: Sequence[float] = HALF_RANGE
    std: Sequence[float] = HALF_RANGE
    channel_order: str = "rgb"

    def __post_init__(self) -> None:
        _check_pixels("size", self.size, at_least=1)
        if self.shorter_side is not None and self.resize is not None:
            raise ValueError(
                f"shorter_side ({self.shorter_side}) and resize ({self.resize}) exclude each other."
            )
        if (self.shorter_side is None and self.resize is None) != (self.crop is None):
            raise ValueError(
                f"crop goes with shorter_side or resize; got crop {self.crop}, "
                f"shorter_side {self.shorter_side}, resize {self.resize}."
            )
        if self.crop is not None and self.crop != self.size:
            raise ValueError(f"The crop is what the network reads: {self.crop} != {self.size}.")
        if self.shorter_side is not None:
            _check_pixels("shorter_side", self.shorter_side, at_least=self.size)
        if self.resize is not None:
            object.__setattr__(self, "resize", _numbers("resize", self.resize, 2))
            for side in self.resize:
                _check_pixels("resize", side, at_least=self.size)
        for name in ("mean", "std"):
            object.__setattr__(self, name, _numbers(name, getattr(self, name), 3))
        if min(self.std) <= 0:
            raise ValueError(f"std must be above 0; got {list(self.std)}.")
        if self.channel_order not in CHANNEL_ORDERS:
            raise ValueError(
                f"The channel_order {self.channel_order!r} is unknown; "
                f"valid: {', '.join(CHANNEL_ORDERS)}."
            )

    def target(self, height: int, width: int) -> tuple[int, int]:
        """Size (height, width) that frames are resized to before any crop, in pixels."""
        if self.resize is not None:
            return self.resize[0], self.resize[1]
        if self.shorter_side is None:
            return self.size, self.size
        scale = self.shorter_side / min(height, width)
        return max(round(height * scale), self.size), max(round(width * scale), self.size)

    def __call__(self, frames_NHWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Resize and crop uint8 RGB frames to uint8 RGB [N, size, size, 3].

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


def to_network(windows_BTHWC: Tensor, preprocessing: Preprocessing | None = None) -> Tensor:
    """uint8 RGB windows [B, T, H, W, C] to float32 [B, C, T, H, W]: (x − mean) / std, ordered.

    Without `preprocessing`: RGB in [−1, 1]. The permuted tensor is already channels-last in
    memory, the layout that is fastest on CPUs.
    """
    chosen = preprocessing or Preprocessing(size=windows_BTHWC.shape[2])
    mean, std = list(chosen.mean), list(chosen.std)
    if chosen.channel_order == "bgr":
        windows_BTHWC, mean, std = windows_BTHWC.flip(-1), mean[::-1], std[::-1]
    # One value for each number of a row of pixels: three at a time would be slow.
    width, device = windows_BTHWC.shape[3], windows_BTHWC.device
    scale = torch.tensor([1 / s for s in std], device=device).repeat(width)
    shift = torch.tensor([m / s for m, s in zip(mean, std, strict=True)], device=device)
    rows = windows_BTHWC.flatten(3).float().mul_(scale).sub_(shift.repeat(width))
    return rows.view(windows_BTHWC.shape).permute(0, 4, 1, 2, 3)


def _numbers(name: str, values: object, count: int) -> tuple[float, ...]:
    if isinstance(values, Sequence) and len(values) == count:
        numbers = tuple(v for v in values if isinstance(v, int | float) and math.isfinite(v))
        if len(numbers) == count:
            return numbers
    raise ValueError(f"{name} must be {count} finite numbers; got {values!r}.")


def _check_pixels(name: str, value: object, *, at_least: int) -> None:
    if not isinstance(value, int) or value < at_least:
        raise ValueError(
            f"{name} must be a whole number of pixels, at least {at_least}; got {value!r}."
        )
