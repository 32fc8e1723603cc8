"""OpenCV's two TV-L1 classes with the settings of ours.

Shapes: N pairs, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmdist_e2e.extractors.flow.settings import TVL1Settings
from mmdist_e2e.structures import MmdistError


def _opencv(
    first_NHW: NDArray[np.uint8], second_NHW: NDArray[np.uint8], settings: TVL1Settings
) -> NDArray[np.float32]:
    try:
        import cv2

        create = cv2.optflow.DualTVL1OpticalFlow_create  # type: ignore[attr-defined]
    except (ImportError, AttributeError) as error:
        raise MmdistError(
            "The flow backend 'opencv' needs OpenCV's contrib modules; install "
            "opencv-contrib-python-headless in place of opencv-python."
        ) from error
    solver = create(
        **_opencv_settings(settings),
        innnerIterations=1,  # OpenCV's own spelling
        outerIterations=settings.iterations,
        medianFiltering=1,  # a 1×1 median is none
    )
    return _pair_by_pair(first_NHW, second_NHW, lambda a, b: solver.calc(a, b, None))


def _opencv_cuda(
    first_NHW: NDArray[np.uint8], second_NHW: NDArray[np.uint8], settings: TVL1Settings
) -> NDArray[np.float32]:
    cuda = _cuda_module()
    solver = cuda.OpticalFlowDual_TVL1_create(
        **_opencv_settings(settings),
        iterations=settings.iterations,
    )
    first, second = cuda.GpuMat(), cuda.GpuMat()

    def solve(first_HW: NDArray[np.uint8], second_HW: NDArray[np.uint8]) -> Any:
        first.upload(first_HW)
        second.upload(second_HW)
        return solver.calc(first, second, None).download()

    return _pair_by_pair(first_NHW, second_NHW, solve)


def _opencv_settings(settings: TVL1Settings) -> dict[str, Any]:
    """What OpenCV's two classes call alike; they name the iterations each in its own way."""
    return {
        "tau": settings.tau,
        "lambda_": settings.lambda_,
        "theta": settings.theta,
        "nscales": settings.scales,
        "warps": settings.warps,
        "epsilon": settings.epsilon,
        "scaleStep": settings.scale_step,
    }


def _pair_by_pair(
    first_NHW: NDArray[np.uint8], second_NHW: NDArray[np.uint8], solve: Callable[..., Any]
) -> NDArray[np.float32]:
    """[N, 2, H, W] from a solver that gives [H, W, 2] of one pair."""
    flow_N2HW = np.empty((len(first_NHW), 2, *first_NHW.shape[1:]), dtype=np.float32)
    for index, (first, second) in enumerate(zip(first_NHW, second_NHW, strict=True)):
        flow_N2HW[index] = solve(first, second).transpose(2, 0, 1)
    return flow_N2HW


def _cuda_module() -> Any:
    """The module cv2.cuda of an OpenCV that can solve TV-L1 on a GPU, or MmdistError."""
    try:
        import cv2

        cuda = cv2.cuda
        devices = int(cuda.getCudaEnabledDeviceCount())
    except (ImportError, AttributeError):
        devices = 0
    if devices < 1:
        raise MmdistError(
            "The flow backend 'opencv-cuda' needs an OpenCV that was built with CUDA, and a GPU: "
            "the OpenCV installed here has no CUDA device (the packages on PyPI never have one); "
            "use native, which needs neither, or see docs/flow.md."
        )
    if not hasattr(cuda, "OpticalFlowDual_TVL1_create"):
        raise MmdistError(
            "The OpenCV installed here has CUDA but not its module cudaoptflow; build it with the "
            "contrib modules, or use the flow backend native."
        )
    return cuda
