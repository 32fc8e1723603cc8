"""From decoded RGB frames to the flow fields that a network reads, as a stream.

Frame i gets the flow from frame i to frame i + 1. The last frame repeats the field before it, so
that n frames give n fields and the rows of flow match those of RGB in number and time:

    frames   0    1    2    3
    fields   0→1  1→2  2→3  2→3

Shapes: N frames or pairs, B windows, T frames of a window, H height, W width. The two channels of
a field are the horizontal and vertical displacement, in pixels of the grey frames.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mmdist_e2e.extractors.flow import tvl1
from mmdist_e2e.extractors.flow.settings import MINIMUM_SIDE_PIXELS

if TYPE_CHECKING:
    from torch import Tensor

PAIRS_PER_CALL = 32  # enough to use every core and to hide a GPU's launch times

Grey = NDArray[np.uint8]
Fields = NDArray[np.generic]


def grey(frames_NHWC: NDArray[np.uint8]) -> Grey:
    """Grey frames [N, H, W] of RGB ones: round(0.299 R + 0.587 G + 0.114 B), halves up."""
    weights = np.array([299, 587, 114], dtype=np.uint32)  # ITU-R BT.601: the luma of R, G and B
    grey_NHW = np.empty(frames_NHWC.shape[:3], dtype=np.uint8)
    for out_HW, frame_HWC in zip(grey_NHW, frames_NHWC, strict=True):  # a frame fits the cache
        red_HW, green_HW, blue_HW = (frame_HWC[..., c] * weights[c] for c in range(3))
        red_HW += green_HW
        red_HW += blue_HW
        out_HW[:] = (red_HW + np.uint32(500)) // np.uint32(1000)
    return grey_NHW


@dataclass(frozen=True)
class FlowPreprocessing:
    """How frames become flow, and flow a network's input.

    shorter_side: of the grey frames that flow is computed on, in pixels.
    size: the network's input is size × size.
    crop: None resizes the whole field to `size`; otherwise the center crop, equal to `size`.
    bound: displacements are clipped to ± this many pixels, and divided by it for the network.
    quantise: store fields in 256 linear buckets over ± bound, as Kinetics' flow was stored.
    """

    shorter_side: int
    size: int
    crop: int | None = None
    bound: float = 20.0
    quantise: bool = False

    def __post_init__(self) -> None:
        if self.crop is not None and not self.crop == self.size <= self.shorter_side:
            raise ValueError(
                f"The crop must equal the size and fit the shorter side; got crop {self.crop}, "
                f"size {self.size} and shorter_side {self.shorter_side}."
            )
        if self.shorter_side < MINIMUM_SIDE_PIXELS or not self.bound > 0:
            raise ValueError(
                f"Flow needs a shorter_side of at least {MINIMUM_SIDE_PIXELS} pixels and a bound "
                f"above 0; got {self.shorter_side} and {self.bound}."
            )

    def greys(self, frames_NHWC: NDArray[np.uint8]) -> Grey:
        """Grey frames, resized (bilinear, antialiased) to the shorter side."""
        import torch

        grey_NHW = grey(frames_NHWC)
        height, width = grey_NHW.shape[1:]
        scale = self.shorter_side / min(height, width)
        target = round(height * scale), round(width * scale)
        if target == (height, width) or not len(grey_NHW):
            return grey_NHW
        grey_N1HW = _resized(torch.from_numpy(grey_NHW)[:, None].float(), target)
        out: Grey = grey_N1HW.round_().clamp_(0, 255).to(torch.uint8)[:, 0].numpy()
        return out

    def fields(self, flow_N2HW: NDArray[np.float32]) -> Fields:
        """Fields [N, size, size, 2]: flow resized or cropped, then clipped.

        float16 in pixels; with `quantise`, uint8 buckets round((v / bound + 1) · 127.5).
        """
        import torch

        flow = torch.from_numpy(flow_N2HW)
        height, width = flow.shape[-2:]
        if self.crop is not None:
            top, left = (height - self.crop) // 2, (width - self.crop) // 2
            flow = flow[..., top : top + self.crop, left : left + self.crop]
        elif (height, width) != (self.size, self.size):
            flow = _resized(flow, (self.size, self.size))
        flow = flow.clamp(-self.bound, self.bound).permute(0, 2, 3, 1)
        if self.quantise:
            flow = flow.div(self.bound).add_(1).mul_(127.5).round_().to(torch.uint8)
        else:
            flow = flow.half()
        out: Fields = flow.contiguous().numpy()
        return out

    def to_network(self, windows_BTHWC: Tensor) -> Tensor:
        """Windows of fields to float32 [B, 2, T, H, W] in [−1, 1]."""
        windows = windows_BTHWC.permute(0, 4, 1, 2, 3).float()
        return windows.div_(127.5).sub_(1) if self.quantise else windows.div_(self.bound)


def _resized(images_NCHW: Tensor, target: tuple[int, int]) -> Tensor:
    import torch.nn.functional as F

    return F.interpolate(images_NCHW, target, mode="bilinear", antialias=True, align_corners=False)


class FlowFrames:
    """Turns a stream of frames into a stream of flow fields; no pair is solved twice.

    Push chunks [N, H, W, 3] in order; fields [M, size, size, 2] come somewhat later than their
    frames, and `finish` gives the rest. Both are generators that must be run to their end. Memory
    does not grow with length, and the fields do not depend on the size of the chunks.

    backend, device: of `tvl1`, whose errors are raised.
    repeats: a sample that is byte for byte the one before repeats its frame (as fps_policy "exact"
    makes them): flow is then taken between distinct frames, and every sample of a frame has the
    flow to the next distinct one.
    """

    def __init__(
        self,
        preprocessing: FlowPreprocessing,
        *,
        backend: str = "auto",
        device: str = "cpu",
        repeats: bool = False,
    ) -> None:
        self.preprocessing, self.repeats = preprocessing, repeats
        self._tvl1 = partial(tvl1, backend=backend, device=device)
        self._greys: list[Grey] = []  # distinct frames without a field yet
        self._shown: list[int] = []  # the number of samples of each of them
        self._frame_HWC: NDArray[np.uint8] | None = None  # the last sample, if repeats count
        self._field_1HWC: Fields | None = None  # the last field

    def push(self, frames_NHWC: NDArray[np.uint8]) -> Iterator[Fields]:
        """Take frames and give the fields of those whose next frame is known."""
        distinct = []
        for index, frame_HWC in enumerate(frames_NHWC):
            last_HWC = frames_NHWC[index - 1] if index else self._frame_HWC
            if self.repeats and last_HWC is not None and np.array_equal(frame_HWC, last_HWC):
                self._shown[-1] += 1
            else:
                distinct.append(index)
                self._shown.append(1)
        if self.repeats and len(frames_NHWC):
            self._frame_HWC = frames_NHWC[-1].copy()  # a view would keep the whole chunk
        if distinct:
            if len(distinct) < len(frames_NHWC):
                frames_NHWC = frames_NHWC[distinct]
            self._greys.extend(self.preprocessing.greys(frames_NHWC))
        while len(self._greys) > PAIRS_PER_CALL:
            yield from self._solve()

    def finish(self) -> Iterator[Fields]:
        """Give the remaining fields; a video of one distinct frame has no motion."""
        while len(self._greys) > 1:
            yield from self._solve()
        if self._greys:
            if self._field_1HWC is None:
                still_12HW = np.zeros((1, 2, *self._greys[0].shape), dtype=np.float32)
                self._field_1HWC = self.preprocessing.fields(still_12HW)
            yield from _repeated(self._field_1HWC, self._shown)
            self._greys.clear()

    def _solve(self) -> Iterator[Fields]:
        """Solve the first pairs that are held and give their fields."""
        pairs = min(len(self._greys) - 1, PAIRS_PER_CALL)
        greys_NHW = np.stack(self._greys[: pairs + 1])
        fields_NHWC = self.preprocessing.fields(self._tvl1(greys_NHW[:-1], greys_NHW[1:]))
        self._field_1HWC = fields_NHWC[-1:].copy()
        shown = self._shown[:pairs]
        del self._greys[:pairs], self._shown[:pairs]
        yield from _repeated(fields_NHWC, shown)


def _repeated(fields_NHWC: Fields, times: list[int]) -> Iterator[Fields]:
    """Each field once per sample of its frame, in pieces: a still hour is never held whole."""
    indices = np.repeat(np.arange(len(fields_NHWC)), times)
    for begin in range(0, len(indices), PAIRS_PER_CALL):
        yield fields_NHWC[indices[begin : begin + PAIRS_PER_CALL]]
