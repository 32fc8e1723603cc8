"""From decoded RGB frames to the flow fields that a network reads, as a stream of tensors.

Frame i gets the flow from frame i to frame i + 1. The last frame repeats the field before it, so
that n frames give n fields and the rows of flow match those of RGB in number and time:

    frames   0    1    2    3
    fields   0→1  1→2  2→3  2→3

Shapes: N frames or pairs, B windows, T frames of a window, H height, W width. The two channels of
a field are the horizontal and vertical displacement, in pixels of the grey frames.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mmdist_e2e.extractors.flow import tvl1
from mmdist_e2e.extractors.flow.settings import MINIMUM_SIDE_PIXELS

if TYPE_CHECKING:
    from torch import Tensor

PAIRS_PER_CALL = 32  # enough to use every core and to hide a GPU's launch times


def grey(frames_NHWC: Tensor) -> Tensor:
    """Grey frames [N, H, W] of RGB ones: round(0.299 R + 0.587 G + 0.114 B), halves up."""
    import torch

    grey_NHW = torch.empty(frames_NHWC.shape[:3], dtype=torch.uint8, device=frames_NHWC.device)
    step = 1 if frames_NHWC.device.type == "cpu" else len(frames_NHWC)  # one frame fits the cache
    for begin in range(0, len(frames_NHWC), max(step, 1)):
        part = slice(begin, begin + step)
        red_NHW, green_NHW, blue_NHW = (frames_NHWC[part, ..., c].float() for c in range(3))
        # ITU-R BT.601: the luma of R, G and B. Whole numbers below 2²⁴ are exact in float32.
        luma_NHW = red_NHW.mul_(299).add_(green_NHW, alpha=587).add_(blue_NHW, alpha=114)
        grey_NHW[part] = luma_NHW.add_(500).div_(1000)  # rounded down
    return grey_NHW


@dataclass(frozen=True)
class FlowPreprocessing:
    """How frames become flow, and flow a network's input.

    shorter_side: of the grey frames that flow is computed on, in pixels; None keeps their size.
    size: the network's input is size × size.
    minimum_side: without a shorter_side: quantised fields whose shorter side is below it are
        enlarged to it (bilinear), then cropped.
    crop: None resizes the whole field to `size`; otherwise the center crop, equal to `size`.
    bound: displacements are clipped to ± this many pixels, and divided by it for the network.
    quantise: store fields in 256 linear buckets over ± bound, as Kinetics' flow was stored.
    repeats: what a sample that repeats its frame gets. "distinct": the flow to the next distinct
        frame. "still": none, and n samples have n − 1 fields, as Charades' flow was made.
    """

    shorter_side: int | None
    size: int
    crop: int | None = None
    bound: float = 20.0
    quantise: bool = False
    minimum_side: int | None = None
    repeats: str = "distinct"

    def __post_init__(self) -> None:
        side = self.shorter_side or self.minimum_side or 0
        if (self.shorter_side is None) == (self.minimum_side is None):
            raise ValueError("Flow needs either a shorter_side or a minimum_side.")
        if self.crop is not None and not self.crop == self.size <= side:
            raise ValueError(
                f"The crop must equal the size and fit the shorter side; got crop {self.crop}, "
                f"size {self.size} and {side}."
            )
        if side < MINIMUM_SIDE_PIXELS or not self.bound > 0:
            raise ValueError(
                f"Flow needs a shorter_side of at least {MINIMUM_SIDE_PIXELS} pixels and a bound "
                f"above 0; got {side} and {self.bound}."
            )
        if self.minimum_side is not None and not (self.crop and self.quantise):
            raise ValueError("A minimum_side of flow goes with a crop and quantise.")
        if self.repeats not in ("distinct", "still"):
            raise ValueError(f"repeats is {self.repeats!r}; valid: distinct, still.")

    def greys(self, frames_NHWC: Tensor) -> Tensor:
        """Grey frames, resized (bilinear, antialiased) to the shorter side."""
        import torch

        grey_NHW = grey(frames_NHWC)
        height, width = grey_NHW.shape[1:]
        scale = (self.shorter_side or min(height, width)) / min(height, width)
        target = round(height * scale), round(width * scale)
        if target == (height, width) or not len(grey_NHW):
            return grey_NHW
        grey_N1HW = _resized(grey_NHW[:, None].float(), target)
        return grey_N1HW.round_().clamp_(0, 255).to(torch.uint8)[:, 0]

    def fields(self, flow_N2HW: Tensor) -> Tensor:
        """Fields [N, size, size, 2]: flow resized or cropped, then clipped.

        float16 in pixels; with `quantise`, uint8 buckets round((v / bound + 1) · 127.5). Flow with
        a `minimum_side` is enlarged as buckets.
        """
        import torch

        flow = flow_N2HW
        height, width = flow.shape[-2:]
        if self.minimum_side is not None:
            height, width = target = enlarged(height, width, self.minimum_side)
            flow = self._buckets(flow)
            flow = flow if flow.shape[-2:] == target else _resized(flow, target)
        if self.crop is not None:
            half_even = self.minimum_side is not None
            rows, columns = (center(n, self.crop, half_even=half_even) for n in (height, width))
            flow = flow[..., rows, columns]
        elif (height, width) != (self.size, self.size):
            flow = _resized(flow, (self.size, self.size))
        if not self.quantise:
            flow = flow.clamp(-self.bound, self.bound).half()
        else:
            flow = (flow if self.minimum_side else self._buckets(flow)).round().to(torch.uint8)
        return flow.permute(0, 2, 3, 1).contiguous()

    def _buckets(self, flow: Tensor) -> Tensor:
        return flow.clamp(-self.bound, self.bound).div_(self.bound).add_(1).mul_(127.5).round_()

    def to_network(self, windows_BTHWC: Tensor) -> Tensor:
        """Windows of fields to float32 [B, 2, T, H, W] in [−1, 1]."""
        windows = windows_BTHWC.permute(0, 4, 1, 2, 3).float()
        return windows.div_(127.5).sub_(1) if self.quantise else windows.div_(self.bound)


def enlarged(height: int, width: int, minimum_side: int) -> tuple[int, int]:
    """The size (height, width) of an image whose shorter side is enlarged to `minimum_side`."""
    scale = max(minimum_side / min(height, width), 1.0)
    return round(height * scale), round(width * scale)


def center(side: int, size: int, *, half_even: bool) -> slice:
    """The middle `size` of `side` pixels; half pixels are rounded down, or to even as by NumPy."""
    begin = round((side - size) / 2) if half_even else (side - size) // 2
    return slice(begin, begin + size)


def _resized(images_NCHW: Tensor, target: tuple[int, int]) -> Tensor:
    import torch.nn.functional as F

    return F.interpolate(images_NCHW, target, mode="bilinear", antialias=True, align_corners=False)


class Repeats:
    """Finds samples that are byte for byte the one before, as fps_policy "exact" makes them."""

    def __init__(self) -> None:
        self._last_HWC: NDArray[np.uint8] | None = None

    def find(self, frames_NHWC: NDArray[np.uint8]) -> list[bool]:
        """Whether each of the next frames repeats the one before."""
        found = []
        last_HWC = self._last_HWC
        for frame_HWC in frames_NHWC:
            found.append(last_HWC is not None and np.array_equal(frame_HWC, last_HWC))
            last_HWC = frame_HWC
        if found:
            self._last_HWC = frames_NHWC[-1].copy()  # a view would keep the whole chunk
        return found


class FlowFrames:
    """Turns a stream of frames into a stream of flow fields; no pair is solved twice.

    Push chunks [N, H, W, 3] in order; fields [M, size, size, 2] come somewhat later than their
    frames, and `finish` gives the rest. Both are generators that must be run to their end. Memory
    does not grow with length, and the fields do not depend on the size of the chunks.

    Where `Repeats` are given, flow is taken between distinct frames, and every sample of a frame
    has the flow to the next distinct one. Preprocessing with repeats "still" says otherwise.

    backend: of `tvl1`, whose errors are raised. seconds: of its calls.
    """

    def __init__(self, preprocessing: FlowPreprocessing, *, backend: str = "auto") -> None:
        self.still = preprocessing.repeats == "still"
        self.preprocessing, self.backend = preprocessing, backend
        self.seconds = 0.0
        self._greys: list[Tensor] = []  # distinct frames without a field yet
        self._shown: list[int] = []  # the number of samples of each of them
        self._field_1HWC: Tensor | None = None  # the last field

    def push(self, frames_NHWC: Tensor, repeats_N: Sequence[bool] = ()) -> Iterator[Tensor]:
        """Take frames and give the fields of those whose next frame is known."""
        distinct = []
        for index in range(len(frames_NHWC)):
            if repeats_N and repeats_N[index]:
                self._shown[-1] += 1
            else:
                distinct.append(index)
                self._shown.append(1)
        if distinct:
            self._greys.extend(self.preprocessing.greys(_chosen(frames_NHWC, distinct)))
        while len(self._greys) > PAIRS_PER_CALL:
            yield from self._solve()

    def finish(self) -> Iterator[Tensor]:
        """Give the remaining fields; a video of one distinct frame has no motion."""
        while len(self._greys) > 1:
            yield from self._solve()
        if self._greys:
            if self.still and (self._field_1HWC is not None or self._shown[0] > 1):
                self._shown[0] -= 1  # there is no flow beyond the last sample
            if self.still or self._field_1HWC is None:
                self._field_1HWC = self._motionless()
            yield from self._per_sample(self._field_1HWC, self._shown)
            self._greys.clear()

    def _solve(self) -> Iterator[Tensor]:
        """Solve the first pairs that are held and give their fields."""
        import torch

        pairs = min(len(self._greys) - 1, PAIRS_PER_CALL)
        greys_NHW = torch.stack(self._greys[: pairs + 1])
        begin = time.perf_counter()
        flow_N2HW = tvl1(greys_NHW[:-1], greys_NHW[1:], backend=self.backend)
        self.seconds += time.perf_counter() - begin
        fields_NHWC = self.preprocessing.fields(flow_N2HW)
        self._field_1HWC = fields_NHWC[-1:].clone()
        shown = self._shown[:pairs]
        del self._greys[:pairs], self._shown[:pairs]
        yield from self._per_sample(fields_NHWC, shown)

    def _per_sample(self, fields_NHWC: Tensor, shown: list[int]) -> Iterator[Tensor]:
        """The fields of each sample of frames, in pieces: a still hour is never held whole."""
        import torch

        count = len(fields_NHWC)
        indices = np.repeat(np.arange(count), shown)
        if self.still:  # only the last sample of a frame moves on
            indices[:-1][indices[1:] == indices[:-1]] = count
            if count in indices:
                fields_NHWC = torch.cat([fields_NHWC, self._motionless()])
        for begin in range(0, len(indices), PAIRS_PER_CALL):
            yield _chosen(fields_NHWC, indices[begin : begin + PAIRS_PER_CALL].tolist())

    def _motionless(self) -> Tensor:
        grey_HW = self._greys[-1]
        return self.preprocessing.fields(grey_HW.new_zeros((1, 2, *grey_HW.shape)).float())


def _chosen(frames_NHWC: Tensor, indices: list[int]) -> Tensor:
    """These frames, without waiting for the device."""
    import torch

    if indices == list(range(len(frames_NHWC))):
        return frames_NHWC
    return frames_NHWC[torch.tensor(indices).to(frames_NHWC.device, non_blocking=True)]
