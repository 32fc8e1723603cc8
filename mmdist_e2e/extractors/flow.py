"""TV-L1 optical flow (Zach, Pock & Bischof 2007): one function, several backends.

The defaults are those of OpenCV's CUDA class, which Kinetics-I3D used. OpenCV's CPU class runs
another algorithm by default; with the median filter off, one inner and 300 outer iterations it
runs this one. Shapes: N pairs, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmdist_e2e.structures import MmdistError

BACKENDS = ("auto", "native", "opencv", "opencv-cuda")
MINIMUM_SIDE_PIXELS = 16
# Where OpenCV stops a pair when its updates have become small, the native solver runs this many
# iterations a warp: measured on real videos (docs/flow.md), it ends nearer the converged flow.
NATIVE_ITERATIONS = 36


@dataclass(frozen=True)
class TVL1Settings:
    """Parameters of the solver, for intensities 0–255.

    tau: time step. lambda_: weight of the data term. theta: coupling. scales, scale_step:
    the pyramid. warps and iterations per scale. epsilon: above 0 a solver may stop before all
    iterations are done: OpenCV when the mean squared update of the flow falls below ε², the
    native one after `NATIVE_ITERATIONS`; 0 runs them all.
    """

    tau: float = 0.25
    lambda_: float = 0.15
    theta: float = 0.3
    scales: int = 5
    scale_step: float = 0.8
    warps: int = 5
    iterations: int = 300
    epsilon: float = 0.01

    def __post_init__(self) -> None:
        positive = (self.tau, self.lambda_, self.theta, self.scales, self.warps, self.iterations)
        if min(positive) <= 0 or not 0 < self.scale_step < 1 or self.epsilon < 0:
            raise MmdistError(
                f"TV-L1 needs positive settings, a scale step between 0 and 1, and an epsilon of "
                f"at least 0; got {self}."
            )

    @property
    def native_iterations(self) -> int:
        """Iterations a warp that the native solver runs."""
        return min(self.iterations, NATIVE_ITERATIONS) if self.epsilon > 0 else self.iterations


def tvl1(
    first_NHW: NDArray[np.uint8],
    second_NHW: NDArray[np.uint8],
    *,
    backend: str = "auto",
    settings: TVL1Settings | None = None,
    device: str = "cpu",
) -> NDArray[np.float32]:
    """Flow from each first image to its second.

    Args:
        first_NHW, second_NHW: grey images, uint8.
        backend: "native" (ours: Numba on a CPU, Triton on a GPU), "opencv" (the CPU class of the
            PyPI OpenCV), "opencv-cuda" (an OpenCV that you built with CUDA); "auto" is native.
        device: where the native solver runs: "cpu", "cuda", "cuda:1", …

    Returns [N, 2, H, W] float32: horizontal and vertical displacement in pixels.
    Raises MmdistError for an unknown backend or one that is not there, images that do not match,
    or sides below 16.
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
    settings = settings or TVL1Settings()
    if backend == "opencv":
        return _opencv(first_NHW, second_NHW, settings)
    if backend == "opencv-cuda":
        return _opencv_cuda(first_NHW, second_NHW, settings)
    _, height, width = first_NHW.shape
    sizes = pyramid(height, width, settings)
    if device.startswith("cuda"):
        from mmdist_e2e.extractors import tvl1_gpu

        return tvl1_gpu.solve_arrays(first_NHW, second_NHW, sizes, settings, device)
    from mmdist_e2e.extractors import tvl1_cpu

    return tvl1_cpu.solve(first_NHW, second_NHW, sizes, settings.native_iterations, settings)


def pyramid(height: int, width: int, settings: TVL1Settings) -> list[tuple[int, int]]:
    """Height and width of each level, finest first; none has a side below 16 but the first."""
    sizes = [(height, width)]
    while len(sizes) < settings.scales:
        size = (
            round(sizes[-1][0] * settings.scale_step),
            round(sizes[-1][1] * settings.scale_step),
        )
        if min(size) < MINIMUM_SIDE_PIXELS:
            break
        sizes.append(size)
    return sizes


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
