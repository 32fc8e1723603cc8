"""Resizing frames: 8-bit arithmetic (ours) beside float32 and rounding (what it replaced).

    python benchmarks/bench_resize.py

Both make a network's input of shorter side 256, crop 224, in one process with torch's default
threads. Each runs five times; the best time counts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from common import best_seconds
from torch import Tensor

from mmdist_e2e.extractors.profiles import Preprocessing

SIZES = [(320, 240), (640, 360), (1920, 1080)]  # width, height
FRAMES = 16
RUNS = 5
PREPROCESSING = Preprocessing(size=224, shorter_side=256, crop=224)


def in_float(frames_NHWC: Tensor) -> Tensor:
    """The former path: float32, resize, round, crop."""
    height, width = PREPROCESSING.target(*frames_NHWC.shape[1:3])
    frames_NCHW = F.interpolate(
        frames_NHWC.permute(0, 3, 1, 2).float(),
        (height, width),
        mode="bilinear",
        antialias=True,
        align_corners=False,
    )
    frames_NCHW = frames_NCHW.round_().clamp_(0, 255).to(torch.uint8)
    top, left = (height - 224) // 2, (width - 224) // 2
    cropped_NCHW = frames_NCHW[..., top : top + 224, left : left + 224]
    return cropped_NCHW.permute(0, 2, 3, 1).contiguous()


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    for width, height in SIZES:
        shape = (FRAMES, height // 8, width // 8, 3)
        small_NHWC = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        frames_NHWC = small_NHWC.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)
        difference = (in_float(frames_NHWC).int() - PREPROCESSING(frames_NHWC).int()).abs().max()
        before, after = (
            1000 * best_seconds(lambda: run(frames_NHWC), RUNS) / FRAMES  # noqa: B023
            for run in (in_float, PREPROCESSING)
        )
        print(
            f"{width}x{height}: float {before:.2f} ms a frame, 8 bit {after:.2f} ms, largest "
            f"difference {difference} of 255"
        )
        print(f"resize {width}x{height}: ratio {before / after:.1f}")


if __name__ == "__main__":
    main()
