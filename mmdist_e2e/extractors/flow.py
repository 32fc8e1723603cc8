"""TV-L1 optical flow (Zach, Pock & Bischof 2007): one function, several backends.

The defaults are those of OpenCV's CUDA class, which Kinetics-I3D used. OpenCV's CPU class runs
another algorithm by default; with the median filter off, one inner and 300 outer iterations it
runs this one. Shapes: N pairs, H height, W width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmdist_e2e.structures import MmdistError

BACKENDS = ("auto", "opencv")
MINIMUM_SIDE_PIXELS = 16


@dataclass(frozen=True)
class TVL1Settings:
    """Parameters of the solver, for intensities 0–255.

    tau: time step. lambda_: weight of the data term. theta: coupling. scales, scale_step:
    the pyramid. warps and iterations per scale. epsilon: stop when the mean squared update of
    the flow falls below its square (0: never).
    """

    tau: float = 0.25
    lambda_: float = 0.15
    theta: float = 0.3
    scales: int = 5
    scale_step: float = 0.8
    warps: int = 5
    iterations: int = 300
    epsilon: float = 0.01


def tvl1(
    first_NHW: NDArray[np.uint8],
    second_NHW: NDArray[np.uint8],
    *,
    backend: str = "auto",
    settings: TVL1Settings | None = None,
) -> NDArray[np.float32]:
    """Flow from each first image to its second.

    Args:
        first_NHW, second_NHW: grey images, uint8.
        backend: "opencv" (the CPU class of the PyPI OpenCV); "auto" is the same for now.

    Returns [N, 2, H, W] float32: horizontal and vertical displacement in pixels.
    Raises MmdistError for an unknown backend, images that do not match, or sides below 16.
    """
    if backend not in BACKENDS:
        raise MmdistError(f"The flow backend {backend!r} is unknown; valid: {', '.join(BACKENDS)}.")
    if first_NHW.shape != second_NHW.shape or first_NHW.ndim != 3:
        raise MmdistError(
            f"Flow needs two stacks of grey images [N, H, W] of one shape; got "
            f"{list(first_NHW.shape)} and {list(second_NHW.shape)}."
        )
    if first_NHW.dtype != np.uint8 or second_NHW.dtype != np.uint8:
        raise MmdistError("Flow needs uint8 images with intensities 0 to 255.")
    if min(first_NHW.shape[1:]) < MINIMUM_SIDE_PIXELS:
        height, width = first_NHW.shape[1:]
        raise MmdistError(
            f"Flow needs at least {MINIMUM_SIDE_PIXELS} pixels a side; got {width}×{height}."
        )
    return _opencv(first_NHW, second_NHW, settings or TVL1Settings())


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
        tau=settings.tau,
        lambda_=settings.lambda_,
        theta=settings.theta,
        nscales=settings.scales,
        warps=settings.warps,
        epsilon=settings.epsilon,
        innnerIterations=1,  # OpenCV's own spelling
        outerIterations=settings.iterations,
        scaleStep=settings.scale_step,
        medianFiltering=1,  # a 1×1 median is none
    )
    flow_N2HW = np.empty((len(first_NHW), 2, *first_NHW.shape[1:]), dtype=np.float32)
    for index, (first, second) in enumerate(zip(first_NHW, second_NHW, strict=True)):
        flow_N2HW[index] = solver.calc(first, second, None).transpose(2, 0, 1)
    return flow_N2HW
