"""TV-L1 written out plainly over numpy in float64: the oracle of the fast solvers.

Shares no code with them: whole-image operations, the three-case threshold as published, no
wavefront, no tiles.
"""

from __future__ import annotations

import numpy as np

from mmdist_e2e.extractors.flow.settings import PRIMAL_STEP, TVL1Settings

Image = np.ndarray


def resize(image: Image, size: tuple[int, int]) -> Image:
    def axis(n: int, m: int) -> Image:
        where = (np.arange(m) + 0.5) * n / m - 0.5
        low = np.floor(where).astype(int)
        matrix = np.zeros((m, n))
        for row, (i, w) in enumerate(zip(low, where - low, strict=True)):
            matrix[row, min(max(i, 0), n - 1)] += 1 - w
            matrix[row, min(max(i + 1, 0), n - 1)] += w
        return matrix

    return axis(image.shape[0], size[0]) @ image @ axis(image.shape[1], size[1]).T


def cubic(distance: Image) -> Image:
    """Keys' kernel with a = −3/4."""
    d, a = np.abs(distance), -0.75
    near = (a + 2) * d**3 - (a + 3) * d**2 + 1
    far = a * (d**3 - 5 * d**2 + 8 * d - 4)
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


def sample(image: Image, x: Image, y: Image) -> Image:
    height, width = image.shape
    out = np.zeros_like(x)
    for j in range(-1, 3):
        for i in range(-1, 3):
            column, row = np.floor(x) + i, np.floor(y) + j
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            taken = image[
                np.clip(row, 0, height - 1).astype(int), np.clip(column, 0, width - 1).astype(int)
            ]
            out += np.where(inside, taken, 0) * cubic(x - column) * cubic(y - row)
    return out


def gradients(image: Image) -> tuple[Image, Image]:
    padded = np.pad(image, 1, mode="edge")
    return (
        (padded[1:-1, 2:] - padded[1:-1, :-2]) / 2,
        (padded[2:, 1:-1] - padded[:-2, 1:-1]) / 2,
    )


def divergence(p: Image, q: Image) -> Image:
    left = np.pad(p, ((0, 0), (1, 0)))[:, :-1]
    above = np.pad(q, ((1, 0), (0, 0)))[:-1]
    return p - left + q - above


def prox(rho: Image, gx: Image, gy: Image, s: TVL1Settings) -> tuple[Image, Image]:
    """The primal step's move along the gradient: three cases, as published for the threshold."""
    square, theta = gx**2 + gy**2, s.theta + PRIMAL_STEP
    bound = s.lambda_ * theta
    scale = np.where(
        rho < -bound * square,
        bound,
        np.where(rho > bound * square, -bound, -rho / np.maximum(square, 1e-6)),
    )
    scale = np.where(square <= 1e-6, 0, scale) * PRIMAL_STEP / theta
    return scale * gx, scale * gy


def solve(first: Image, second: Image, sizes: list[tuple[int, int]], s: TVL1Settings) -> Image:
    """Flow [2, H, W] with every iteration of the settings."""
    firsts, seconds = [first.astype(np.float64)], [second.astype(np.float64)]
    for size in sizes[1:]:
        firsts.append(resize(firsts[-1], size))
        seconds.append(resize(seconds[-1], size))
    flow, dual = np.zeros((2, *sizes[-1])), np.zeros((2, 2, *sizes[-1]))
    for level in reversed(range(len(sizes))):
        if flow.shape[1:] != sizes[level]:
            flow = np.stack([resize(part, sizes[level]) / s.scale_step for part in flow])
            dual = np.stack([[resize(part, sizes[level]) for part in pair] for pair in dual])
            dual[:, 0, :, -1] = dual[:, 1, -1] = 0
        height, width = sizes[level]
        y, x = np.mgrid[:height, :width].astype(np.float64)
        planes = (seconds[level], *gradients(seconds[level]))
        for _ in range(s.warps):
            px = np.clip(x + flow[0], -2, width + 1)
            py = np.clip(y + flow[1], -2, height + 1)
            warped, gx, gy = (sample(plane, px, py) for plane in planes)
            constant = warped - gx * flow[0] - gy * flow[1] - firsts[level]
            for _ in range(s.iterations):
                before = flow.copy()
                flow += PRIMAL_STEP * np.stack([divergence(*pair) for pair in dual])
                flow += prox(constant + gx * flow[0] + gy * flow[1], gx, gy, s)
                for c, bar in enumerate(2 * flow - before):
                    dx = np.diff(bar, axis=1, append=bar[:, -1:])
                    dy = np.diff(bar, axis=0, append=bar[-1:])
                    dual[c] += np.stack([dx, dy]) / (8 * PRIMAL_STEP)
                    dual[c] /= np.maximum(np.hypot(*dual[c]), 1)
    return flow
