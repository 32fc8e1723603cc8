"""TV-L1 on a GPU: a check of the result, then pairs per second at 256×341 for several settings.

    python benchmarks/gpu_flow.py

The check is against the plain float64 solver of the tests, on small images. Then the iterations per
launch and the division of the strips vary; the last lines are the settings in use and the fastest.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from gpu_limits import seconds

from mmdist_e2e.extractors.flow import gpu
from mmdist_e2e.extractors.flow.settings import TVL1Settings, pyramid

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import flow_reference

HEIGHT, WIDTH = 256, 341
LAUNCHES = (2, 3, 4, 5)
PROGRAMS = (768, 1536, 3072, 6144)
ROWS = (16, 24, 48)
PAIRS = (32, 64, 128, 256)


def images(count: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth textures and the same moved by a smooth field of up to some four pixels."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand((count, 1, height // 6, width // 6), generator=generator) * 255
    first = F.interpolate(noise, (height, width), mode="bicubic").clamp(0, 255)
    field = torch.randn((count, 2, 4, 4), generator=generator) * 2
    field = F.interpolate(field, (height, width), mode="bicubic").permute(0, 2, 3, 1)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    grid = torch.stack([x, y], dim=-1) - field
    grid = (grid + 0.5) / torch.tensor([width, height]) * 2 - 1
    second = F.grid_sample(first, grid, mode="bicubic", align_corners=False)
    return tuple(side[:, 0].round().clamp(0, 255).byte().cuda() for side in (first, second))


def check() -> None:
    """The kernels against the plain solver; raises when they differ."""
    settings = TVL1Settings(iterations=12, warps=3, epsilon=0.0)
    for height, width in ((40, 61), (96, 128), (75, 200)):
        first, second = images(2, height, width)
        sizes = pyramid(height, width, settings)
        got = gpu.solve(first, second, sizes, settings).cpu().numpy()
        for pair in range(2):
            a, b = (side[pair].cpu().numpy() for side in (first, second))
            expected = flow_reference.solve(a, b, sizes, settings)
            # Rounding is amplified where a pixel leaves the image, so not the largest.
            difference = np.abs(got[pair] - expected)
            most = float(np.quantile(difference, 0.98))
            print(f"{height}×{width}: 98 % of values within {most:.1e} px of float64")
            wrong = most > 0.01 or difference.mean() > 0.002
            assert not wrong, "the GPU's flow is wrong; no speed is reported"


def main() -> None:
    check()
    settings = TVL1Settings()
    sizes = pyramid(HEIGHT, WIDTH, settings)
    first, second = images(max(PAIRS), HEIGHT, WIDTH)
    shipped = (gpu.ITERATIONS_A_LAUNCH, gpu.PROGRAMS, gpu.MINIMUM_ROWS, 64)
    gpu.PAIRS_A_CALL = max(PAIRS)

    def rate(launch: int, programs: int, rows: int, pairs: int) -> float:
        gpu.ITERATIONS_A_LAUNCH, gpu.PROGRAMS, gpu.MINIMUM_ROWS = launch, programs, rows
        a, b = first[:pairs], second[:pairs]
        return pairs / seconds(lambda: gpu.solve(a, b, sizes, settings), runs=5)

    found = {}
    for launch, programs, rows in itertools.product(LAUNCHES, PROGRAMS, ROWS):
        key = launch, programs, rows, 64
        found[key] = rate(*key)
        print(f"{launch} iterations, {programs} programs, {rows} rows: {found[key]:.0f} pairs/s")
    best = max(found, key=found.__getitem__)
    for pairs in PAIRS:
        found[*best[:3], pairs] = rate(*best[:3], pairs)
        print(f"{best[:3]}, {pairs} pairs a call: {found[*best[:3], pairs]:.0f} pairs/s")
    print(f"shipped {shipped}: {rate(*shipped):.0f} pairs/s")
    best = max(found, key=found.__getitem__)
    print(f"fastest {best}: {found[best]:.0f} pairs/s at {HEIGHT}×{WIDTH}, target 3000")


if __name__ == "__main__":
    main()
