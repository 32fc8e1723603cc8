"""TV-L1 on the CPU, compiled by Numba: users need no compiler.

The energy, pyramid and warps are those of OpenCV's CUDA class (Zach, Pock & Bischof 2007; Sánchez
et al. 2013). Within a warp we iterate as Chambolle & Pock (2011), and the dual variables p of a
level start from those of the coarser one: both save iterations.

    u ← prox(u + σ div p)            prox of the data term: one clipped step along ∇I
    p ← p + ∇(2 u − u before)/(8 σ), then p / max(1, |p|)

Two things make it fast. Every loop runs over a row without branches, so that it becomes vector
instructions. And all iterations of a warp pass over the image as one wavefront: iteration k is
one row behind iteration k − 1, so the rows in use stay in the core's cache.

    iteration 0 works on rows  … s                    u of row s needs p of rows s − 1 and s;
    iteration 1 works on rows  … s − 1                p of row s − 1 needs u of rows s − 1 and s:
    iteration 2 works on rows  … s − 2                in this order each step is in place.

Layout: `fields` is [12, H + 1, S], S > W: u, v; the warped image's gradient, 1/|∇I|² (times a
factor of the prox) and ρ's constant; p11, p12, p21, p22; ū, v̄. Row r of a dual variable is stored
in row r + 1 and column x in column x + 1; their first row and column stay zero, which is the
boundary of the divergence. Rows are processed in whole blocks of BLOCK columns, since the rest of a
vector loop runs one by one. Columns from W on hold unused numbers, except ū[W], which repeats
ū[W − 1] so that the gradient is zero there.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import numpy as np
from llvmlite import ir
from numba import config, njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from mmdist_e2e.extractors.flow.settings import PRIMAL_STEP

if TYPE_CHECKING:
    from mmdist_e2e.extractors.flow.settings import TVL1Settings

BLOCK = 32
PAD = 4  # the bicubic's reach outside the image, after clamping to two pixels outside
# Pixels below this squared gradient say nothing about motion (OpenCV's own threshold is the
# smallest float; flat patches of 8-bit images have exactly zero).
FLAT = np.float32(1e-6)
_compiled = njit(fastmath=True, nogil=True, error_model="numpy")


@_compiled
def _primal_row(r, width, fields, sigma, bound):
    """Primal step of row r, and its extrapolation."""
    u, v, gx, gy, inverse, rest = fields[0], fields[1], fields[2], fields[3], fields[4], fields[5]
    p11, p12, p21, p22 = fields[6], fields[7], fields[8], fields[9]
    bar_u, bar_v = fields[10], fields[11]
    two = np.float32(2)
    for x in range(width):
        a, b, ix, iy = u[r, x], v[r, x], gx[r, x], gy[r, x]
        div1 = (p11[r + 1, x + 1] - p11[r + 1, x]) + (p12[r + 1, x + 1] - p12[r, x + 1])
        div2 = (p21[r + 1, x + 1] - p21[r + 1, x]) + (p22[r + 1, x + 1] - p22[r, x + 1])
        new_a, new_b = a + sigma * div1, b + sigma * div2
        # ρ/|∇I|², clipped, is the three-case threshold in one.
        step = (rest[r, x] + ix * new_a + iy * new_b) * inverse[r, x]
        step = min(max(step, -bound), bound)
        new_a -= step * ix
        new_b -= step * iy
        u[r, x], v[r, x] = new_a, new_b
        bar_u[r, x], bar_v[r, x] = two * new_a - a, two * new_b - b


@_compiled
def _dual_row(r, below, width, fields, sigma):
    """Dual step of row r; `below` is r in the last row."""
    one = np.float32(1)
    for c in range(2):
        bar, p, q = fields[10 + c], fields[6 + 2 * c], fields[7 + 2 * c]
        for x in range(width):
            a = bar[r, x]
            ax = p[r + 1, x + 1] + sigma * (bar[r, x + 1] - a)
            ay = q[r + 1, x + 1] + sigma * (bar[below, x] - a)
            shrink = one / np.sqrt(max(ax * ax + ay * ay, one))
            p[r + 1, x + 1], q[r + 1, x + 1] = ax * shrink, ay * shrink


@_compiled
def _iterate(height, width, iterations, fields, sigma, bound, dual_sigma):
    """All iterations of one warp, as a wavefront over the rows."""
    whole = (width + BLOCK - 1) // BLOCK * BLOCK
    for s in range(height + iterations):
        for k in range(max(0, s - height), min(iterations, s + 1)):
            r = s - k
            if r < height:
                _primal_row(r, whole, fields, sigma, bound)
                fields[10, r, width] = fields[10, r, width - 1]
                fields[11, r, width] = fields[11, r, width - 1]
            if r > 0:
                _dual_row(r - 1, min(r, height - 1), whole, fields, dual_sigma)


@_compiled
def _resize(source, height, width, target_height, target_width, factor, out):
    """Bilinear, pixel centers at halves, borders repeated; values times `factor`."""
    for y in range(target_height):
        fy = (y + 0.5) * height / target_height - 0.5
        y0 = int(np.floor(fy))
        wy = np.float32(fy - y0)
        ya, yb = min(max(y0, 0), height - 1), min(max(y0 + 1, 0), height - 1)
        for x in range(target_width):
            fx = (x + 0.5) * width / target_width - 0.5
            x0 = int(np.floor(fx))
            wx = np.float32(fx - x0)
            xa, xb = min(max(x0, 0), width - 1), min(max(x0 + 1, 0), width - 1)
            top = source[ya, xa] + wx * (source[ya, xb] - source[ya, xa])
            bottom = source[yb, xa] + wx * (source[yb, xb] - source[yb, xa])
            out[y, x] = factor * (top + wy * (bottom - top))


@_compiled
def _with_gradients(image, height, width, out):
    """The image and its centered differences side by side: [H + 2·PAD, W + 2·PAD, 4].

    Zero outside: a pixel that leaves the picture has no gradient and so no say in the flow.
    """
    half = np.float32(0.5)
    out[: height + 2 * PAD, : width + 2 * PAD] = np.float32(0)
    for y in range(height):
        up, down = max(y - 1, 0), min(y + 1, height - 1)
        for x in range(width):
            left, right = max(x - 1, 0), min(x + 1, width - 1)
            cell = out[y + PAD, x + PAD]
            cell[0] = image[y, x]
            cell[1] = half * (image[y, right] - image[y, left])
            cell[2] = half * (image[down, x] - image[up, x])


# Polynomials of the four neighbours' weights at fraction t (Keys' cubic), from the constant term
# up. a = −3/4 as in OpenCV's CPU class: on known motions it is nearer the truth than the −1/2 of
# its CUDA class (docs/flow.md).
A = -0.75
CUBIC = ((0, 1, 0, 0), (A, 0, -A, 0), (-2 * A, -A - 3, 2 * A + 3, A), (A, A + 2, -A - 2, -A))


@intrinsic
def _sample(typing_context, flat, offset, stride, tx, ty):
    """Bicubic of a [.., .., 4] image at one point: (value, dx, dy), each float32.

    flat: the image as one row; offset: of the patch's first cell; stride: of its rows; tx, ty:
    fractions in [0, 1). Written as vector instructions, since a row of the 4 × 4 patch is 16
    numbers side by side and the compiler does not see that by itself.
    """
    real, fast = ir.FloatType(), ("fast",)
    index = partial(ir.Constant, ir.IntType(32))

    def splat(builder, value, lanes):
        vector = ir.VectorType(real, lanes)
        one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, index(0))
        return pick(builder, one, [0] * lanes)

    def pick(builder, vector, lanes):
        mask = ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes)
        return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), mask)

    def weights(builder, fraction):
        c0, c1, c2, c3 = (ir.Constant(ir.VectorType(real, 4), list(c)) for c in CUBIC)
        t = splat(builder, fraction, 4)
        out = c3
        for c in (c2, c1, c0):
            out = builder.fadd(builder.fmul(out, t, fast), c, fast)
        return out

    def generate(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, value=arguments[0]).data
        _, first, step, x, y = arguments
        wide = ir.VectorType(real, 16)
        across, down = weights(builder, x), weights(builder, y)
        total = None
        for row in range(4):
            pointer = builder.bitcast(builder.gep(data, [first]), wide.as_pointer())
            cells = builder.load(pointer, align=4)
            weight = splat(builder, builder.extract_element(down, index(row)), 16)
            part = builder.fmul(cells, weight, fast)
            total = part if total is None else builder.fadd(total, part, fast)
            first = builder.add(first, step)
        total = builder.fmul(total, pick(builder, across, [c // 4 for c in range(16)]), fast)
        for half in (8, 4):
            low = pick(builder, total, list(range(half)))
            total = builder.fadd(low, pick(builder, total, list(range(half, 2 * half))), fast)
        values = [builder.extract_element(total, index(c)) for c in range(3)]
        return context.make_tuple(builder, signature.return_type, values)

    signature = types.UniTuple(types.float32, 3)(
        flat, types.intp, types.intp, types.float32, types.float32
    )
    return signature, generate


@_compiled
def _warp(first, second4, height, width, fields, prox):
    """Second image and gradients at x + u; ρ's constant I₁(x + u) − ∇I·u − I₀ and prox/|∇I|²."""
    u, v, gx, gy, inverse, rest = fields[0], fields[1], fields[2], fields[3], fields[4], fields[5]
    flat, stride = second4.reshape(-1), 4 * second4.shape[1]
    margin = np.float32(PAD - 1)
    low = np.float32(PAD - 3)  # two pixels outside the image, in the padded one less one
    right, bottom = np.float32(width) + np.float32(PAD), np.float32(height) + np.float32(PAD)
    for y in range(height):
        for x in range(width):
            a, b = u[y, x], v[y, x]
            px = min(max(np.float32(x) + a + margin, low), right)
            py = min(max(np.float32(y) + b + margin, low), bottom)
            x0, y0 = int(px), int(py)  # neither is negative
            i, ix, iy = _sample(
                flat, y0 * stride + 4 * x0, stride, px - np.float32(x0), py - np.float32(y0)
            )
            square = ix * ix + iy * iy
            gx[y, x], gy[y, x] = ix, iy
            inverse[y, x] = prox / square if square > FLAT else np.float32(0)
            rest[y, x] = i - ix * a - iy * b - first[y, x]


def _cached(function):
    """As _compiled; kept on disk where Numba finds a writable folder (containers may have none)."""
    try:
        return njit(fastmath=True, nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:
        return _compiled(function)


@_cached
def _solve(first, second, heights, widths, warps, iterations, upscale, sigma, bound, prox, out):
    """One pair, coarse to fine; the pyramid is the given sizes, finest first."""
    levels = len(heights)
    stride = (widths[0] + BLOCK - 1) // BLOCK * BLOCK + BLOCK
    images = np.empty((2, levels, heights[0], widths[0]), np.float32)
    images[0, 0], images[1, 0] = first, second
    for s in range(1, levels):
        for side in range(2):
            _resize(
                images[side, s - 1], heights[s - 1], widths[s - 1], heights[s], widths[s],
                np.float32(1), images[side, s],
            )  # fmt: skip
    fields = np.zeros((12, heights[0] + 1, stride), np.float32)
    second4 = np.empty((heights[0] + 2 * PAD, widths[0] + 2 * PAD, 4), np.float32)
    for s in range(levels - 1, -1, -1):
        height, width = heights[s], widths[s]
        coarse = fields.copy()
        fields[:] = np.float32(0)
        if s < levels - 1:
            below = heights[s + 1], widths[s + 1], height, width
            for c in range(2):
                _resize(coarse[c], *below, upscale, fields[c])
            for c in range(6, 10):
                _resize(coarse[c, 1:, 1:], *below, np.float32(1), fields[c, 1:, 1:])
            # Nothing flows over the right and the lower border.
            fields[6, :, width] = fields[8, :, width] = np.float32(0)
            fields[7, height] = fields[9, height] = np.float32(0)
        _with_gradients(images[1, s], height, width, second4)
        for _ in range(warps):
            _warp(images[0, s], second4, height, width, fields, prox)
            _iterate(height, width, iterations, fields, sigma, bound, np.float32(0.125) / sigma)
    out[:] = fields[:2, : heights[0], : widths[0]]


@cache
def _solve_uncached():
    return _compiled(_solve.py_func)


def solve(
    first_NHW: NDArray[np.uint8],
    second_NHW: NDArray[np.uint8],
    sizes: list[tuple[int, int]],
    settings: TVL1Settings,
) -> NDArray[np.float32]:
    """Flow [N, 2, H, W] of every pair, one pair per core.

    sizes: height and width of each level of the pyramid, finest first.
    """
    flow_N2HW = np.empty((len(first_NHW), 2, *first_NHW.shape[1:]), dtype=np.float32)
    heights, widths = (np.array(side, dtype=np.int64) for side in zip(*sizes, strict=True))
    numbers: list[Any] = [settings.warps, settings.native_iterations]
    numbers += [np.float32(x) for x in (1 / settings.scale_step, PRIMAL_STEP)]
    prox = PRIMAL_STEP / (PRIMAL_STEP + settings.theta)
    numbers += [np.float32(x) for x in (PRIMAL_STEP * settings.lambda_, prox)]

    def one(index: int) -> None:
        first, second = (x[index].astype(np.float32) for x in (first_NHW, second_NHW))
        arguments = first, second, heights, widths, *numbers, flow_N2HW[index]
        try:
            _solve(*arguments)
        except (OSError, EOFError, UnpicklingError):  # Numba's cache is damaged, or its disk full
            _solve_uncached()(*arguments)

    # Numba counts the cores that this process may use.
    with ThreadPoolExecutor(min(config.NUMBA_DEFAULT_NUM_THREADS, len(first_NHW) or 1)) as pool:
        list(pool.map(one, range(len(first_NHW))))
    return flow_N2HW
