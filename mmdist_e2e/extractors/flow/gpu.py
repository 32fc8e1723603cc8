"""TV-L1 on a GPU: torch for the pyramid, two Triton kernels for the rest, many pairs at once.

The arithmetic is that of cpu.py, and so is the order: the iterations of a launch pass over the
rows as a wavefront. A program is one warp of 32 lanes, and marches down a strip of 64 columns, two
per lane. What a row needs of the row above stays in registers; what it needs of the columns beside
it comes from the next lane by a shuffle. There is no shared memory and no barrier.

    row s      read;  iteration 0: u of row s,     then p of row s − 1
    row s − 1         iteration 1: u of row s − 1, then p of row s − 2
    row s − 2         …                                        the last of them is written

Strips overlap, and so do the segments of rows into which a strip is divided to fill the GPU: an
iteration carries values by one pixel, so a margin of one pixel per iteration is not written. A
pixel's arithmetic is the same in any strip, segment and batch.

Shapes: N pairs, H height, W width, S row length in memory (W and zeros up to a multiple of 8).
flow is [N, 2, H, S]; dual [N, 2, H, S] holds (p11, p12) and (p21, p22), and gradient [N, H, S] the
two parts of the warped gradient, each as two halves of an int32; constant is [N, H, S], of ρ.
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
    wx0, wx1, wx2, wx3 = _cubic(px - fx)
    wy0, wy1, wy2, wy3 = _cubic(py - fy)
    size = height * width
    base = planes + pair * 3 * size
    i = _plane(base, y0, x0, wx0, wx1, wx2, wx3, wy0, wy1, wy2, wy3, height, width)
    base += size
    ix = _plane(base, y0, x0, wx0, wx1, wx2, wx3, wy0, wy1, wy2, wy3, height, width)
    base += size
    iy = _plane(base, y0, x0, wx0, wx1, wx2, wx3, wy0, wy1, wy2, wy3, height, width)
    both = tl.where(inside, _both(ix, iy), 0)
    ix, iy = _halves(both)  # ρ is exact at u with the gradient as it is stored
    rest = i - ix * u - iy * v - tl.load(first + pair * size + y * width + x, inside, other=0.0)
    offset += pair * height * stride
    tl.store(gradient + offset, both, stored)
    tl.store(constant + offset, tl.where(inside, rest, 0.0), stored)


@triton.jit
def _read(flow, dual, gradient, constant, offset, size, inside):
    """One row of everything: what even and what odd columns hold."""
    u = tl.split(tl.load(flow + offset, inside, other=0.0))
    v = tl.split(tl.load(flow + size + offset, inside, other=0.0))
    p = tl.split(tl.load(dual + offset, inside, other=0))
    q = tl.split(tl.load(dual + size + offset, inside, other=0))
    g = tl.split(tl.load(gradient + offset, inside, other=0))
    c = tl.split(tl.load(constant + offset, inside, other=0.0))
    return (u[0], v[0], p[0], q[0], g[0], c[0]), (u[1], v[1], p[1], q[1], g[1], c[1])


@triton.jit
def _unpacked(read, prox):
    """(u, v, p11, p12, p21, p22) and the terms of ρ; 1/|∇I|² times prox."""
    u, v, p, q, g, c = read
    p11, p12 = _halves(p)
    p21, p22 = _halves(q)
    gx, gy = _halves(g)
    square = gx * gx + gy * gy
    root = tl.rsqrt(tl.maximum(square, FLAT))
    inverse = tl.where(square > FLAT, prox * root * root, 0.0)
    return (u, v, p11, p12, p21, p22), (g, inverse, c)


@triton.jit
def _primal(now, terms, div1, div2, step, bound):
    """New u and v, and both extrapolated."""
    u, v = now[0], now[1]
    both, inverse, constant = terms
    gx, gy = _halves(both)
    new_u, new_v = u + step * div1, v + step * div2
    data = (constant + gx * new_u + gy * new_v) * inverse
    data = tl.minimum(tl.maximum(data, -bound), bound)
    new_u -= data * gx
    new_v -= data * gy
    return new_u, new_v, 2.0 * new_u - u, 2.0 * new_v - v


@triton.jit
def _dual(p, q, dx, dy, step_x, step_y):
    p += step_x * dx
    q += step_y * dy
    shrink = tl.rsqrt(tl.maximum(p * p + q * q, 1.0))
    return p * shrink, q * shrink


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
    flow += pair * 2 * size
    dual += pair * 2 * size
    gradient += pair * size
    constant += pair * size
    flow_out += pair * 2 * size
    dual_out += pair * 2 * size
    lane = tl.arange(0, COLUMNS // 2)
    even = strip * (COLUMNS - 2 * MARGIN) - 2 + 2 * lane  # the first strip begins with zeros
    odd = even + 1
    x = even[:, None] + tl.arange(0, 2)[None, :]
    inside = (x >= 0) & (x < stride)
    column = 2 * lane[:, None]
    written = inside & ((column >= MARGIN) | (strip == 0))
    written = written & ((column < COLUMNS - MARGIN) | (strip == strips - 1))
    # Dual variables are zero outside the image, and the gradient of u is zero at its end.
    even_x = tl.where((even >= 0) & (even < width - 1), dual_step, 0.0)
    odd_x = tl.where((odd >= 0) & (odd < width - 1), dual_step, 0.0)
    even_y = tl.where((even >= 0) & (even < width), dual_step, 0.0)
    odd_y = tl.where((odd >= 0) & (odd < width), dual_step, 0.0)
    left = tl.maximum(lane - 1, 0)
    right = tl.minimum(lane + 1, COLUMNS // 2 - 1)
    zero = tl.zeros((COLUMNS // 2,), tl.float32)
    # By iteration, of even and of odd columns, the row above: u, v, both extrapolated, the dual
    # variables before their step, and the terms.
    row = (zero, zero, zero, zero, zero, zero, zero, zero)
    terms = (tl.zeros((COLUMNS // 2,), tl.int32), zero, zero)
    rows_above = ((row, row, terms, terms),) * ITERATIONS
    begin = tl.maximum(first - MARGIN, 0)
    following = _read(flow, dual, gradient, constant, x + begin * stride, size, inside)
    for s in range(begin, last + ITERATIONS):
        e, terms_e = _unpacked(following[0], prox)
        o, terms_o = _unpacked(following[1], prox)
        following = _read(
            flow, dual, gradient, constant, x + (s + 1) * stride, size, inside & (s + 1 < height)
        )
        here = ()
        for k in tl.static_range(ITERATIONS):
            above_e, above_o, above_terms_e, above_terms_o = rows_above[k]
            ue, ve, eu, ev, e11, e12, e21, e22 = above_e
            uo, vo, ou, ov, o11, o12, o21, o22 = above_o
            div1_e = (e[2] - tl.gather(o[2], left, 0)) + (e[3] - e12)
            div2_e = (e[4] - tl.gather(o[4], left, 0)) + (e[5] - e22)
            div1_o = (o[2] - e[2]) + (o[3] - o12)
            div2_o = (o[4] - e[4]) + (o[5] - o22)
            new_e = _primal(e, terms_e, div1_e, div2_e, step, bound)
            new_o = _primal(o, terms_o, div1_o, div2_o, step, bound)
            here = here + (
                (
                    (new_e[0], new_e[1], new_e[2], new_e[3], e[2], e[3], e[4], e[5]),
                    (new_o[0], new_o[1], new_o[2], new_o[3], o[2], o[3], o[4], o[5]),
                    terms_e,
                    terms_o,
                ),
            )
            r = s - k - 1
            has_below = (r >= 0) & (r < height - 1)
            down_e = tl.where(has_below, even_y, 0.0)
            down_o = tl.where(has_below, odd_y, 0.0)
            e11, e12 = _dual(e11, e12, ou - eu, new_e[2] - eu, even_x, down_e)
            e21, e22 = _dual(e21, e22, ov - ev, new_e[3] - ev, even_x, down_e)
            beside_u, beside_v = tl.gather(eu, right, 0), tl.gather(ev, right, 0)
            o11, o12 = _dual(o11, o12, beside_u - ou, new_o[2] - ou, odd_x, down_o)
            o21, o22 = _dual(o21, o22, beside_v - ov, new_o[3] - ov, odd_x, down_o)
            e, o = (ue, ve, e11, e12, e21, e22), (uo, vo, o11, o12, o21, o22)
            terms_e, terms_o = above_terms_e, above_terms_o
        rows_above = here
        r = s - ITERATIONS
        if r >= first:
            offset = x + r * stride
            tl.store(flow_out + offset, tl.join(e[0], o[0]), written)
            tl.store(flow_out + size + offset, tl.join(e[1], o[1]), written)
            tl.store(dual_out + offset, tl.join(_both(e[2], e[3]), _both(o[2], o[3])), written)
            offset += size
            tl.store(dual_out + offset, tl.join(_both(e[4], e[5]), _both(o[4], o[5])), written)


def _resized(images_NCHW: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(images_NCHW, size, mode="bilinear", align_corners=False)


def _planes(image_N1HW: Tensor) -> Tensor:
    """The image and its centered differences, borders repeated: [N, 3, H, W]."""
    padded = F.pad(image_N1HW, (1, 1, 1, 1), mode="replicate")
    dx = 0.5 * (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2])
    dy = 0.5 * (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1])
    return torch.cat([image_N1HW, dx, dy], dim=1)


def _packed(dual_N4HW: Tensor, stride: int) -> Tensor:
    """The two pairs of dual variables as the kernels read them: [N, 2, H, S] int32."""
    count, _, height, width = dual_N4HW.shape
    halves = dual_N4HW.new_zeros((count, 2, height, stride, 2), dtype=torch.float16)
    halves[..., :width, :] = dual_N4HW.unflatten(1, (2, 2)).permute(0, 1, 3, 4, 2)
    return halves.view(torch.int32)[..., 0]


def _refined(dual_N2HS: Tensor, width: int, size: tuple[int, int]) -> Tensor:
    """Dual variables [N, 4, H, W] for the next finer level, zero where they must be."""
    halves = dual_N2HS[..., None].view(torch.float16)[..., :width, :]
    dual_N4HW = _resized(halves.permute(0, 1, 4, 2, 3).flatten(1, 2).float(), size)
    dual_N4HW[:, 0::2, :, -1] = 0
    dual_N4HW[:, 1::2, -1] = 0
    return dual_N4HW


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
    count, (height, width) = len(first_NHW), sizes[-1]
    flow_N2HW = firsts[-1].new_zeros((count, 2, height, width))
    dual_N4HW = firsts[-1].new_zeros((count, 4, height, width))
    step, margin = PRIMAL_STEP, (ITERATIONS_A_LAUNCH + 1) // 2 * 2
    useful = COLUMNS.value - 2 * margin
    for level in range(len(sizes) - 1, -1, -1):
        if sizes[level] != (height, width):
            dual_N4HW = _refined(dual, width, sizes[level])
            flow_N2HW = _resized(flow_N2HW, sizes[level]) / settings.scale_step
        height, width = sizes[level]
        stride = triton.cdiv(width, 8) * 8
        flow, dual = F.pad(flow_N2HW, (0, stride - width)), _packed(dual_N4HW, stride)
        other_flow, other_dual = torch.zeros_like(flow), torch.zeros_like(dual)
        constant, gradient = torch.empty_like(flow[:, 0]), torch.empty_like(dual[:, 0])
        planes, first = _planes(seconds[level]), firsts[level].contiguous()
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
        flow_N2HW = flow[..., :width]
    return flow_N2HW
