"""Resizing frames: 8-bit arithmetic (ours) beside float32 and rounding (what it replaced).

    python benchmarks/bench_resize.py

Both make a network's input of shorter side 256, crop 224, in one process with torch's default
threads. Each runs five times; the best time counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from mmdist_e2e.extractors.profiles import Preprocessing

SIZES = [(320, 240), (640, 360), (1920, 1080)]  # width, height
FRAMES = 16
RUNS = 5
PREPROCESSING = Preprocessing(size=224, shorter_side=256, crop=224)

Frames = NDArray[np.uint8]


def in_float(frames_NHWC: Frames) -> Frames:
    """The former path: float32, resize, round, crop."""
    frames_NCHW = torch.from_numpy(frames_NHWC).permute(0, 3, 1, 2)
    height, width = PREPROCESSING.target(*frames_NHWC.shape[1:3])
    frames_NCHW = F.interpolate(
        frames_NCHW.float(), (height, width), mode="bilinear", antialias=True, align_corners=False
    )
    frames_NCHW = frames_NCHW.round_().clamp_(0, 255).to(torch.uint8)
    top, left = (height - 224) // 2, (width - 224) // 2
    cropped_NCHW = frames_NCHW[..., top : top + 224, left : left + 224]
    out_NHWC: Frames = cropped_NCHW.permute(0, 2, 3, 1).contiguous().numpy()
    return out_NHWC


def in_bytes(frames_NHWC: Frames) -> Frames:
    """What the product does."""
    out_NHWC: Frames = PREPROCESSING(torch.from_numpy(frames_NHWC)).numpy()
    return out_NHWC


def best_ms(run: Callable[[Frames], Frames], frames_NHWC: Frames) -> tuple[float, Frames]:
    """Milliseconds a frame, and the result."""
    times = []
    for _ in range(RUNS):
        begin = time.perf_counter()
        out_NHWC = run(frames_NHWC)
        times.append(time.perf_counter() - begin)
    return min(times) / len(frames_NHWC) * 1000, out_NHWC


def main() -> None:
    rng = np.random.default_rng(0)
    for width, height in SIZES:
        small = rng.integers(0, 256, (FRAMES, height // 8, width // 8, 3), dtype=np.uint8)
        frames_NHWC = small.repeat(8, axis=1).repeat(8, axis=2)
        before_ms, before = best_ms(in_float, frames_NHWC)
        after_ms, after = best_ms(in_bytes, frames_NHWC)
        difference = np.abs(before.astype(int) - after.astype(int)).max()
        print(
            f"{width}x{height}: float {before_ms:.2f} ms a frame, 8 bit {after_ms:.2f} ms, "
            f"ratio {before_ms / after_ms:.1f}, largest difference {difference} of 255"
        )


if __name__ == "__main__":
    main()
