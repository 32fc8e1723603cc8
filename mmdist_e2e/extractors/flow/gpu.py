"""TV-L1 on a GPU: torch for the pyramid, two Triton kernels for the rest, many pairs at once.

The arithmetic is that of cpu.py. `_iterate_kernel` does several iterations per launch: a program
holds a tile of one pair's level with a margin as wide as its iterations, keeps the flow and the
dual variables in registers, and writes the inside of the tile, which nothing from beyond the
margin has reached yet:

    tile  |<- margin ->|<- what is written ->|<- margin ->|      an iteration carries values
          |      read, TILE_H × TILE_W pixels             |      by one pixel

Tiles read one buffer and write another, so programs need not wait for each other.
Shapes: N pairs, H height, W width; state is [N, 6, H, W]: u, v, p11, p12, p21, p22; terms are
[N, 4, H, W]: the two parts of the warped gradient, 1/|∇I|², and ρ's constant.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from mmdist_e2e.extractors.flow.settings import TVL1Settings

TILE_H, TILE_W, WARPS = 64, 64, 16
ITERATIONS_A_LAUNCH = 6
WARP_BLOCK = 256
PAIRS_A_CALL = 64  # 5 MB per pair at 256×341
FLAT = tl.constexpr(1e-6)  # as in cpu.py


@triton.jit
def _cubic(t):
    """Weights of the four neighbours of a point at fraction t (Keys' cubic, a = −3/4)."""
    return (
        -0.75 * t * (t * (t - 2.0) + 1.0),
        t * t * (1.25 * t - 2.25) + 1.0,
        t * (t * (1.5 - 1.25 * t) + 0.75),
        0.75 * t * t * (t - 1.0),
    )


@triton.jit
def _taps(base, y, x0, wx0, wx1, wx2, wx3, height, width):
    """One row's four taps of a plane that is zero outside."""
    row = base + y * width + x0
    inside = (y >= 0) & (y < height)
    return (
        wx0 * tl.load(row - 1, inside & (x0 >= 1) & (x0 <= width), other=0.0)
        + wx1 * tl.load(row, inside & (x0 >= 0) & (x0 < width), other=0.0)
        + wx2 * tl.load(row + 1, inside & (x0 >= -1) & (x0 < width - 1), other=0.0)
        + wx3 * tl.load(row + 2, inside & (x0 >= -2) & (x0 < width - 2), other=0.0)
    )


@triton.jit
def _plane(base, y0, x0, wx0, wx1, wx2, wx3, wy0, wy1, wy2, wy3, height, width):
    return (
        wy0 * _taps(base, y0 - 1, x0, wx0, wx1, wx2, wx3, height, width)
        + wy1 * _taps(base, y0, x0, wx0, wx1, wx2, wx3, height, width)
        + wy2 * _taps(base, y0 + 1, x0, wx0, wx1, wx2, wx3, height, width)
        + wy3 * _taps(base, y0 + 2, x0, wx0, wx1, wx2, wx3, height, width)
    )


@triton.jit
def _warp_kernel(first, planes, state, terms, height, width, BLOCK: tl.constexpr):
    """Second image and gradients (planes [N, 3, H, W]) at x + u, and what ρ needs of them."""
    pair = tl.program_id(1).to(tl.int64)
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    size = height * width
    inside = offset < size
    offset = tl.minimum(offset, size - 1)
    y = offset // width
    x = offset - y * width
    u = tl.load(state + pair * 6 * size + offset)
    v = tl.load(state + (pair * 6 + 1) * size + offset)
    px = tl.minimum(tl.maximum(x.to(tl.float32) + u, -2.0), width + 1.0)
    py = tl.minimum(tl.maximum(y.to(tl.float32) + v, -2.0), height + 1.0)
    fx, fy = tl.floor(px), tl.floor(py)
    x0, y0 = fx.to(tl.int32), fy.to(tl.int32)
    wx0, wx1, wx2, wx3 = _cubic(px - fx)
    wy0, wy1, wy2, wy3 = _cubic(py - fy)
    base = planes + pair * 3 * size
    i = _plane(base, y0, x0, wx0, wx1, wx2, wx3, wy0, wy1, wy2, wy3, height, width)
    base += size
    ix = _plane(base, y0, x0, wx0, wx1, wx2, wx3, wy0, wy1, wy2, wy3, height, width)
    base += size
    iy = _plane(base, y0, x0, wx0, wx1, wx2, wx3, wy0, wy1, wy2, wy3, height, width)
    square = ix * ix + iy * iy
    inverse = tl.where(square > FLAT, 1.0 / tl.maximum(square, FLAT), 0.0)
    constant = i - ix * u - iy * v - tl.load(first + pair * size + offset)
    out = terms + pair * 4 * size + offset
    tl.store(out, ix, inside)
    tl.store(out + size, iy, inside)
    tl.store(out + 2 * size, inverse, inside)
    tl.store(out + 3 * size, constant, inside)


@triton.jit
def _iterate_kernel(
    source, terms, target, height, width, tiles_x, bound, theta, taut,
    ITERATIONS: tl.constexpr, MARGIN: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr,
):  # fmt: skip
    """ITERATIONS (at most MARGIN) primal-dual steps of one tile of one pair."""
    pair = tl.program_id(1).to(tl.int64)
    tile = tl.program_id(0)
    rows = tl.arange(0, TH)[:, None]
    columns = tl.arange(0, TW)[None, :]
    y = (tile // tiles_x) * (TH - 2 * MARGIN) - MARGIN + rows
    x = (tile % tiles_x) * (TW - 2 * MARGIN) - MARGIN + columns
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    size = height * width
    offset = y * width + x
    here = source + pair * 6 * size + offset
    u = tl.load(here, inside, other=0.0)
    v = tl.load(here + size, inside, other=0.0)
    p11 = tl.load(here + 2 * size, inside, other=0.0)
    p12 = tl.load(here + 3 * size, inside, other=0.0)
    p21 = tl.load(here + 4 * size, inside, other=0.0)
    p22 = tl.load(here + 5 * size, inside, other=0.0)
    term = terms + pair * 4 * size + offset
    gx = tl.load(term, inside, other=0.0)
    gy = tl.load(term + size, inside, other=0.0)
    inverse = tl.load(term + 2 * size, inside, other=0.0)
    constant = tl.load(term + 3 * size, inside, other=0.0)
    left = tl.broadcast_to(tl.maximum(columns - 1, 0), (TH, TW))
    right = tl.broadcast_to(tl.minimum(columns + 1, TW - 1), (TH, TW))
    above = tl.broadcast_to(tl.maximum(rows - 1, 0), (TH, TW))
    below = tl.broadcast_to(tl.minimum(rows + 1, TH - 1), (TH, TW))
    # Dual variables are zero outside the image, and the gradient of u is zero at its end.
    keep_x = tl.where(inside & (x < width - 1), taut, 0.0)
    keep_y = tl.where(inside & (y < height - 1), taut, 0.0)
    for _ in range(ITERATIONS):  # not unrolled: the code must fit the instruction cache
        step = (constant + gx * u + gy * v) * inverse
        step = tl.minimum(tl.maximum(step, -bound), bound)
        u += theta * (p11 - tl.gather(p11, left, 1) + p12 - tl.gather(p12, above, 0)) - step * gx
        v += theta * (p21 - tl.gather(p21, left, 1) + p22 - tl.gather(p22, above, 0)) - step * gy
        ax = keep_x * (tl.gather(u, right, 1) - u)
        ay = keep_y * (tl.gather(u, below, 0) - u)
        shrink = 1.0 / (1.0 + tl.sqrt(ax * ax + ay * ay))
        p11 = (p11 + ax) * shrink
        p12 = (p12 + ay) * shrink
        bx = keep_x * (tl.gather(v, right, 1) - v)
        by = keep_y * (tl.gather(v, below, 0) - v)
        shrink = 1.0 / (1.0 + tl.sqrt(bx * bx + by * by))
        p21 = (p21 + bx) * shrink
        p22 = (p22 + by) * shrink
    written = inside & (rows >= MARGIN) & (rows < TH - MARGIN)
    written = written & (columns >= MARGIN) & (columns < TW - MARGIN)
    there = target + pair * 6 * size + offset
    tl.store(there, u, written)
    tl.store(there + size, v, written)
    tl.store(there + 2 * size, p11, written)
    tl.store(there + 3 * size, p12, written)
    tl.store(there + 4 * size, p21, written)
    tl.store(there + 5 * size, p22, written)


def _resized(images_NCHW: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(images_NCHW, size, mode="bilinear", align_corners=False)


def _planes(image_N1HW: Tensor) -> Tensor:
    """The image and its centered differences, borders repeated: [N, 3, H, W]."""
    padded = F.pad(image_N1HW, (1, 1, 1, 1), mode="replicate")
    dx = 0.5 * (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2])
    dy = 0.5 * (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1])
    return torch.cat([image_N1HW, dx, dy], dim=1)


@torch.no_grad()
def solve(
    first_NHW: Tensor, second_NHW: Tensor, sizes: list[tuple[int, int]], settings: TVL1Settings
) -> Tensor:
    """Flow [N, 2, H, W] float32 of grey images [N, H, W], on their device.

    sizes: height and width of each level of the pyramid, finest first.
    """
    count, height, width = first_NHW.shape
    flow_N2HW = first_NHW.new_empty((count, 2, height, width), dtype=torch.float32)
    # Triton launches on the current device, whatever the device of the tensors.
    with torch.cuda.device_of(first_NHW):
        for start in range(0, count, PAIRS_A_CALL):
            part = slice(start, start + PAIRS_A_CALL)
            flow_N2HW[part] = _solve(first_NHW[part], second_NHW[part], sizes, settings)
    return flow_N2HW


def _solve(
    first_NHW: Tensor, second_NHW: Tensor, sizes: list[tuple[int, int]], settings: TVL1Settings
) -> Tensor:
    firsts, seconds = [first_NHW[:, None].float()], [second_NHW[:, None].float()]
    for size in sizes[1:]:
        firsts.append(_resized(firsts[-1], size))
        seconds.append(_resized(seconds[-1], size))
    count = len(first_NHW)
    flow_N2HW = firsts[-1].new_zeros((count, 2, *sizes[-1]))
    for level in range(len(sizes) - 1, -1, -1):
        height, width = sizes[level]
        if flow_N2HW.shape[2:] != (height, width):
            flow_N2HW = _resized(flow_N2HW, (height, width)) / settings.scale_step
        state = flow_N2HW.new_zeros((count, 6, height, width))
        state[:, :2] = flow_N2HW
        other, terms = torch.empty_like(state), flow_N2HW.new_empty((count, 4, height, width))
        planes, first = _planes(seconds[level]), firsts[level].contiguous()
        tiles_x = triton.cdiv(width, TILE_W - 2 * ITERATIONS_A_LAUNCH)
        tiles = tiles_x * triton.cdiv(height, TILE_H - 2 * ITERATIONS_A_LAUNCH)
        for _ in range(settings.warps):
            _warp_kernel[(triton.cdiv(height * width, WARP_BLOCK), count)](
                first, planes, state, terms, height, width, BLOCK=WARP_BLOCK
            )
            for done in range(0, settings.native_iterations, ITERATIONS_A_LAUNCH):
                _iterate_kernel[(tiles, count)](
                    state, terms, other, height, width, tiles_x,
                    settings.lambda_ * settings.theta, settings.theta,
                    settings.tau / settings.theta,
                    ITERATIONS=min(settings.native_iterations - done, ITERATIONS_A_LAUNCH),
                    MARGIN=ITERATIONS_A_LAUNCH, TH=TILE_H, TW=TILE_W, num_warps=WARPS,
                )  # fmt: skip
                state, other = other, state
        flow_N2HW = state[:, :2]
    return flow_N2HW.contiguous()
