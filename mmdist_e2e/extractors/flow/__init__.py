"""TV-L1 optical flow (Zach, Pock & Bischof 2007): one function, several backends.

Shapes: N pairs, H height, W width.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mmdist_e2e.extractors.flow import opencv
from mmdist_e2e.extractors.flow.settings import MINIMUM_SIDE_PIXELS, TVL1Settings, pyramid
from mmdist_e2e.structures import MmdistError, check_choice

BACKENDS = ("auto", "native", "opencv", "opencv-cuda")


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
        backend: "native" (Numba on a CPU, Triton on a GPU), "opencv" (the CPU class of the PyPI
            OpenCV), "opencv-cuda" (an OpenCV that you built with CUDA); "auto" is native.
        settings: by default those of OpenCV's CUDA class, which Kinetics-I3D used.
        device: of the native solver: "cpu", "cuda", "cuda:1", …

    Returns [N, 2, H, W] float32: horizontal and vertical displacement in pixels.
    Raises MmdistError for an unknown or missing backend, images that do not match, or sides
    below 16 pixels.
    """
    check_choice("The flow backend", backend, BACKENDS)
    kinds = {(images.shape, str(images.dtype)) for images in (first_NHW, second_NHW)}
    if len(kinds) > 1 or first_NHW.ndim != 3 or first_NHW.dtype != np.uint8:
        raise MmdistError(
            f"Flow needs two stacks of grey images [N, H, W] of one shape, uint8 with intensities "
            f"0 to 255; got {' and '.join(f'{dtype} {shape}' for shape, dtype in kinds)}."
        )
    _, height, width = first_NHW.shape
    if min(height, width) < MINIMUM_SIDE_PIXELS:
        raise MmdistError(
            f"Flow needs at least {MINIMUM_SIDE_PIXELS} pixels per side; got {width}×{height}."
        )
    settings = settings or TVL1Settings()
    if backend.startswith("opencv"):
        solve = opencv.solve if backend == "opencv" else opencv.solve_cuda
        return solve(first_NHW, second_NHW, settings)
    sizes = pyramid(height, width, settings)
    if device.startswith("cuda"):
        from mmdist_e2e.extractors.flow import gpu

        return gpu.solve_arrays(first_NHW, second_NHW, sizes, settings, device)
    from mmdist_e2e.extractors.flow import cpu

    return cpu.solve(first_NHW, second_NHW, sizes, settings)
