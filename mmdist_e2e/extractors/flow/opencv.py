"""OpenCV's two TV-L1 classes with our settings.

Its CPU class runs another algorithm by default; without the median filter, with one inner and 300
outer iterations it runs ours. Shapes: N pairs, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmdist_e2e.extractors.flow.settings import TVL1Settings
from mmdist_e2e.structures import MmdistError

Images = NDArray[np.uint8]


def solve(first_NHW: Images, second_NHW: Images, settings: TVL1Settings) -> NDArray[np.float32]:
    """Flow [N, 2, H, W] by the CPU class."""
    try:
        import cv2

        create = cv2.optflow.DualTVL1OpticalFlow_create  # type: ignore[attr-defined]
    except (ImportError, AttributeError) as error:
        raise MmdistError(
            "The flow backend 'opencv' needs OpenCV's contrib modules; install "
            "opencv-contrib-python-headless in place of opencv-python."
        ) from error
    solver = create(
        **_shared(settings),
        innnerIterations=1,  # OpenCV's own spelling
        outerIterations=settings.iterations,
        medianFiltering=1,  # a 1×1 median has no effect
    )
    return _pair_by_pair(first_NHW, second_NHW, lambda a, b: solver.calc(a, b, None))


def solve_cuda(
    first_NHW: Images, second_NHW: Images, settings: TVL1Settings
) -> NDArray[np.float32]:
    """Flow [N, 2, H, W] by the CUDA class."""
    try:
        import cv2

        cuda: Any = cv2.cuda
        create = cuda.OpticalFlowDual_TVL1_create if cuda.getCudaEnabledDeviceCount() else None
    except (ImportError, AttributeError):
        create = None
    if create is None:
        raise MmdistError(
            "The flow backend 'opencv-cuda' needs a GPU and an OpenCV that was built with CUDA and "
            "its module cudaoptflow (the PyPI packages are not); use native instead, or see "
            "docs/flow.md."
        )
    solver = create(**_shared(settings), iterations=settings.iterations)
    first, second = cuda.GpuMat(), cuda.GpuMat()

    def one(first_HW: Images, second_HW: Images) -> Any:
        first.upload(first_HW)
        second.upload(second_HW)
        return solver.calc(first, second, None).download()

    return _pair_by_pair(first_NHW, second_NHW, one)


def _shared(settings: TVL1Settings) -> dict[str, Any]:
    """All settings but the iterations, whose name differs between the classes."""
    shared = asdict(settings)
    del shared["iterations"]
    return shared | {"nscales": shared.pop("scales"), "scaleStep": shared.pop("scale_step")}


def _pair_by_pair(
    first_NHW: Images, second_NHW: Images, solve_one: Callable[..., Any]
) -> NDArray[np.float32]:
    flow_N2HW = np.empty((len(first_NHW), 2, *first_NHW.shape[1:]), dtype=np.float32)
    for index, (first, second) in enumerate(zip(first_NHW, second_NHW, strict=True)):
        flow_N2HW[index] = solve_one(first, second).transpose(2, 0, 1)  # [H, W, 2]
    return flow_N2HW
