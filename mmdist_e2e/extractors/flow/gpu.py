"""TV-L1 on a GPU: torch for the pyramid, two Triton kernels for the rest, many pairs at once.

The arithmetic and the wavefront over the rows are those of cpu.py. A program is one warp of 32
lanes. It marches down a strip of 64 columns, two per lane, and does several iterations:

    row s      read;  iteration 0: u of row s,     then p of row s − 1
    row s − 1         iteration 1: u of row s − 1, then p of row s − 2
    row s − 2         …                                        the last of them is written

The row above stays in registers, the columns beside come from the next lane by a shuffle: there is
no shared memory and no barrier. Strips, and the segments of rows that they are divided into,
overlap by a margin that is not written, since an iteration carries values by one pixel.

Shapes: N pairs, H height, W width, S row length in memory (W and zeros up to a multiple of 8).
flow is [N, 2, H, S], constant (ρ's) [N, H, S]; as two halves in an int32, dual [N, 2, H, S] holds
(p11, p12) and (p21, p22), and gradient [N, H, S] that of the warped image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from mmdist_e2e.extractors.flow.settings import PRIMAL_STEP

if TYPE_CHECKING:
    from mmdist_e2e.extractors.flow.settings import TVL1Settings

ITERATIONS_A_LAUNCH = 4  # more need more registers than a thread has
COLUMNS = tl.constexpr(64)
PROGRAMS = 1536  # fill an H100: its SMs hold 13 of 146 registers each
MINIMUM_ROWS = 24  # of a segment; the rows of its margins are extra work
WARP_BLOCK = 256
PAIRS_A_CALL = 128  # 5 MB per pair at 256×341
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
def _sample(plane, x0, y0, wx, wy, height, width):
    """Bicubic of a plane that is zero outside."""
    total = tl.zeros(x0.shape, tl.float32)
    for j in tl.static_range(4):
        y = y0 + j - 1
        for i in tl.static_range(4):
            x = x0 + i - 1
            inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
            total += wy[j] * wx[i] * tl.load(plane + y * width + x, inside, other=0.0)
    return total


@triton.jit
def _halves(both):
    """Two float32 from an int32 of two halves."""
    low = both.to(tl.int16).to(tl.float16, bitcast=True)
    high = (both >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def _both(low, high):
    """The reverse of _halves."""
    low = low.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    high = high.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    return (low & 0xFFFF) | (high << 16)


@triton.jit(do_not_specialize=["height", "width", "stride8"])
def _warp_kernel(
    first, planes, flow, gradient, constant, height, width, stride8, BLOCK: tl.constexpr
):
    """Second image and gradients (planes [N, 3, H, W]) at x + u, and what ρ needs of them."""
    pair = tl.program_id(1).to(tl.int64)
    stride = stride8 * 8
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = offset // stride
    x = offset - y * stride
    stored = y < height
    inside = stored & (x < width)
    u = tl.load(flow + pair * 2 * height * stride + offset, inside, other=0.0)
    v = tl.load(flow + (pair * 2 + 1) * height * stride + offset, inside, other=0.0)
    px = tl.minimum(tl.maximum(x.to(tl.float32) + u, -2.0), width + 1.0)
    py = tl.minimum(tl.maximum(y.to(tl.float32) + v, -2.0), height + 1.0)
    fx, fy = tl.floor(px), tl.floor(py)
    x0, y0 = fx.to(tl.int32), fy.to(tl.int32)
    wx, wy = _cubic(px - fx), _cubic(py - fy)
    size = height * width
    planes += pair * 3 * size
    i = _sample(planes, x0, y0, wx, wy, height, width)
    ix = _sample(planes + size, x0, y0, wx, wy, height, width)
    iy = _sample(planes + 2 * size, x0, y0, wx, wy, height, width)
    both = tl.where(inside, _both(ix, iy), 0)
    ix, iy = _halves(both)  # ρ is exact at u with the gradient as it is stored
    rest = i - ix * u - iy * v - tl.load(first + pair * size + y * width + x, inside, other=0.0)
    offset += pair * height * stride
    tl.store(gradient + offset, both, stored)
    tl.store(constant + offset, tl.where(inside, rest, 0.0), stored)


@triton.jit
def _column(u, v, p, q, g, c, prox):
    """What is loaded of a column: u, v, p11, p12, p21, p22; ρ's terms, 1/|∇I|² times prox."""
    p11, p12 = _halves(p)
    p21, p22 = _halves(q)
    gx, gy = _halves(g)
    square = gx * gx + gy * gy
    root = tl.rsqrt(tl.maximum(square, FLAT))
    return (u, v, p11, p12, p21, p22), (g, tl.where(square > FLAT, prox * root * root, 0.0), c)


@triton.jit
def _primal(now, terms, left, above, step, bound):
    """Of a column: new u and v, both extrapolated, and the dual variables as they were."""
    u, v, p11, p12, p21, p22 = now
    both, inverse, constant = terms
    gx, gy = _halves(both)
    new_u = u + step * ((p11 - left[2]) + (p12 - above[5]))
    new_v = v + step * ((p21 - left[4]) + (p22 - above[7]))
    data = (constant + gx * new_u + gy * new_v) * inverse
    data = tl.minimum(tl.maximum(data, -bound), bound)
    new_u -= data * gx
    new_v -= data * gy
    return new_u, new_v, 2.0 * new_u - u, 2.0 * new_v - v, p11, p12, p21, p22


@triton.jit
def _dual(row, right_u, right_v, below, step_x, step_y):
    """Of a column: u, v and the new dual variables."""
    u, v, bar_u, bar_v, p11, p12, p21, p22 = row
    p11 += step_x * (right_u - bar_u)
    p12 += step_y * (below[2] - bar_u)
    p21 += step_x * (right_v - bar_v)
    p22 += step_y * (below[3] - bar_v)
    p = tl.rsqrt(tl.maximum(p11 * p11 + p12 * p12, 1.0))
    q = tl.rsqrt(tl.maximum(p21 * p21 + p22 * p22, 1.0))
    return u, v, p11 * p, p12 * p, p21 * q, p22 * q


@triton.jit(do_not_specialize=["height", "width", "stride8", "strips", "rows"])
def _iterate_kernel(
    flow, dual, gradient, constant, flow_out, dual_out, height, width, stride8, strips, rows,
    step, bound, prox, dual_step, ITERATIONS: tl.constexpr, MARGIN: tl.constexpr,
):  # fmt: skip
    """ITERATIONS (at most MARGIN, which is even) of one segment of one strip of one pair."""
    pair = tl.program_id(1).to(tl.int64)
    strip = tl.program_id(0) % strips
    first = tl.program_id(0) // strips * rows
    last = tl.minimum(first + rows, height)
    stride = stride8 * 8
    size = height * stride
    gradient, constant = gradient + pair * size, constant + pair * size
    pair *= 2 * size
    flow, dual, flow_out, dual_out = flow + pair, dual + pair, flow_out + pair, dual_out + pair
    lane = tl.arange(0, COLUMNS // 2)
    even = strip * (COLUMNS - 2 * MARGIN) - 2 + 2 * lane  # the first strip begins with zeros
    odd = even + 1
    x = even[:, None] + tl.arange(0, 2)[None, :]
    inside = (x >= 0) & (x < stride)
    begin = tl.where(strip == 0, 0, MARGIN)
    end = tl.where(strip == strips - 1, COLUMNS, COLUMNS - MARGIN)
    written = inside & (2 * lane[:, None] >= begin) & (2 * lane[:, None] < end)
    # Dual variables are zero outside the image, and the gradient of u is zero at its end.
    even_x = tl.where((even >= 0) & (even < width - 1), dual_step, 0.0)
    odd_x = tl.where((odd >= 0) & (odd < width - 1), dual_step, 0.0)
    even_y = tl.where((even >= 0) & (even < width), dual_step, 0.0)
    odd_y = tl.where((odd >= 0) & (odd < width), dual_step, 0.0)
    left = tl.maximum(lane - 1, 0)
    right = tl.minimum(lane + 1, COLUMNS // 2 - 1)
    zero = tl.zeros((COLUMNS // 2,), tl.float32)
    # By iteration, the row above: what _primal returned for even and odd columns, and the terms.
    row = (zero, zero, zero, zero, zero, zero, zero, zero)
    terms = (tl.zeros((COLUMNS // 2,), tl.int32), zero, zero)
    rows_above = ((row, row, terms, terms),) * ITERATIONS
    for s in range(tl.maximum(first - MARGIN, 0), last + ITERATIONS):
        here = x + s * stride
        new = inside & (s < height)
        u = tl.split(tl.load(flow + here, new, other=0.0))
        v = tl.split(tl.load(flow + size + here, new, other=0.0))
        p = tl.split(tl.load(dual + here, new, other=0))
        q = tl.split(tl.load(dual + size + here, new, other=0))
        g = tl.split(tl.load(gradient + here, new, other=0))
        c = tl.split(tl.load(constant + here, new, other=0.0))
        e, terms_e = _column(u[0], v[0], p[0], q[0], g[0], c[0], prox)
        o, terms_o = _column(u[1], v[1], p[1], q[1], g[1], c[1], prox)
        rows_now = ()
        for k in tl.static_range(ITERATIONS):
            above_e, above_o, above_terms_e, above_terms_o = rows_above[k]
            beside = o[0], o[1], tl.gather(o[2], left, 0), o[3], tl.gather(o[4], left, 0)
            new_e = _primal(e, terms_e, beside, above_e, step, bound)
            new_o = _primal(o, terms_o, e, above_o, step, bound)
            ours = new_e, new_o, terms_e, terms_o
            rows_now = rows_now + (ours,)  # type: ignore[assignment]  # noqa: RUF005
            has_below = (s > k) & (s - k < height)
            down_e, down_o = tl.where(has_below, even_y, 0.0), tl.where(has_below, odd_y, 0.0)
            beside_u, beside_v = tl.gather(above_e[2], right, 0), tl.gather(above_e[3], right, 0)
            e = _dual(above_e, above_o[2], above_o[3], new_e, even_x, down_e)
            o = _dual(above_o, beside_u, beside_v, new_o, odd_x, down_o)
            terms_e, terms_o = above_terms_e, above_terms_o
        rows_above = rows_now
        there = x + (s - ITERATIONS) * stride
        if s - ITERATIONS >= first:
            tl.store(flow_out + there, tl.join(e[0], o[0]), written)
            tl.store(flow_out + size + there, tl.join(e[1], o[1]), written)
            tl.store(dual_out + there, tl.join(_both(e[2], e[3]), _both(o[2], o[3])), written)
            there += size
            tl.store(dual_out + there, tl.join(_both(e[4], e[5]), _both(o[4], o[5])), written)


def _resized(images_NCHW: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(images_NCHW, size, mode="bilinear", align_corners=False)


def _planes(image_N1HW: Tensor) -> Tensor:
    """The image and its centered differences, borders repeated: [N, 3, H, W]."""
    padded = F.pad(image_N1HW, (1, 1, 1, 1), mode="replicate")
    dx = 0.5 * (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2])
    dy = 0.5 * (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1])
    return torch.cat([image_N1HW, dx, dy], dim=1)


def _refined(dual_N2HS: Tensor, width: int, size: tuple[int, int], stride: int) -> Tensor:
    """Dual variables for the next finer level, zero beyond the right and the lower border."""
    halves = dual_N2HS[..., None].view(torch.float16)[..., :width, :]
    dual_N4HW = _resized(halves.permute(0, 1, 4, 2, 3).flatten(1, 2).float(), size)
    dual_N4HW[:, 0::2, :, -1] = 0
    dual_N4HW[:, 1::2, -1] = 0
    padded = F.pad(dual_N4HW, (0, stride - size[1])).half().view(-1, 2, 2, size[0], stride)
    return padded.permute(0, 1, 3, 4, 2).contiguous().view(torch.int32)[..., 0]


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
            _solve(first_NHW[part], second_NHW[part], sizes, settings, flow_N2HW[part])
    return flow_N2HW


def _solve(
    first_NHW: Tensor,
    second_NHW: Tensor,
    sizes: list[tuple[int, int]],
    settings: TVL1Settings,
    out_N2HW: Tensor,
) -> None:
    firsts, seconds = [first_NHW[:, None].float()], [second_NHW[:, None].float()]
    for size in sizes[1:]:
        firsts.append(_resized(firsts[-1], size))
        seconds.append(_resized(seconds[-1], size))
    count, width = len(first_NHW), 1
    flow = firsts[-1].new_zeros((count, 2, 1, 1))
    dual = torch.zeros_like(flow, dtype=torch.int32)
    step, margin = PRIMAL_STEP, (ITERATIONS_A_LAUNCH + 1) // 2 * 2
    for level in range(len(sizes) - 1, -1, -1):  # the coarsest resizes a zero
        size, stride = sizes[level], triton.cdiv(sizes[level][1], 8) * 8
        dual = _refined(dual, width, size, stride)
        flow = F.pad(_resized(flow[..., :width], size), (0, stride - size[1]))
        flow /= settings.scale_step
        height, width = size
        other_flow, other_dual = torch.zeros_like(flow), torch.zeros_like(dual)
        constant, gradient = torch.empty_like(flow[:, 0]), torch.empty_like(dual[:, 0])
        planes, first = _planes(seconds[level]), firsts[level].contiguous()
        useful = COLUMNS.value - 2 * margin
        strips = max(triton.cdiv(width + 2 - 2 * margin, useful), 1)
        rows = max(triton.cdiv(height * strips * count, PROGRAMS), MINIMUM_ROWS)
        programs = strips * triton.cdiv(height, rows)
        for _ in range(settings.warps):
            _warp_kernel[(triton.cdiv(height * stride, WARP_BLOCK), count)](
                first, planes, flow, gradient, constant, height, width, stride // 8,
                BLOCK=WARP_BLOCK,
            )  # fmt: skip
            for done in range(0, settings.native_iterations, ITERATIONS_A_LAUNCH):
                _iterate_kernel[(programs, count)](
                    flow, dual, gradient, constant, other_flow, other_dual,
                    height, width, stride // 8, strips, rows,
                    step, step * settings.lambda_, step / (step + settings.theta), 1 / (8 * step),
                    ITERATIONS=min(settings.native_iterations - done, ITERATIONS_A_LAUNCH),
                    MARGIN=margin, num_warps=1,
                )  # fmt: skip
                flow, other_flow, dual, other_dual = other_flow, flow, other_dual, dual
    out_N2HW[:] = flow[..., :width]
