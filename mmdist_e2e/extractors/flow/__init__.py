"""TV-L1 optical flow (Zach, Pock & Bischof 2007): one function, several backends.

Shapes: N pairs, H height, W width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mmdist_e2e.extractors.flow import opencv
from mmdist_e2e.extractors.flow.settings import MINIMUM_SIDE_PIXELS, TVL1Settings, pyramid
from mmdist_e2e.structures import MmdistError, check_choice

if TYPE_CHECKING:
    from torch import Tensor

Images = TypeVar("Images", "NDArray[Any]", "Tensor")
BACKENDS = ("auto", "native", "opencv", "opencv-cuda")


def tvl1(
    first_NHW: Images,
    second_NHW: Images,
    *,
    backend: str = "auto",
    settings: TVL1Settings | None = None,
    device: str = "cpu",
) -> Images:
    """Flow from each first image to its second.

    Args:
        first_NHW, second_NHW: grey images, uint8: two arrays, or two tensors on one device.
        backend: "native" (Numba on a CPU, Triton on a GPU), "opencv" (the CPU class of the PyPI
            OpenCV), "opencv-cuda" (an OpenCV that you built with CUDA); "auto" is native.
        settings: by default those of OpenCV's CUDA class, which Kinetics-I3D used.
        device: where the native solver works on arrays: "cpu", "cuda", "cuda:1", … It works on
            tensors where they are: on a GPU without copies to the host and without waiting.

    Returns [N, 2, H, W] float32, of the images' type and on their device: horizontal and vertical
    displacement in pixels.
    Raises MmdistError for an unknown or missing backend, images that do not match, or sides
    below 16 pixels.
    """
    check_choice("The flow backend", backend, BACKENDS)
    stacks = first_NHW, second_NHW
    kinds = {f"{x.dtype} {tuple(x.shape)} on {getattr(x, 'device', 'cpu')}" for x in stacks}
    if len(kinds) > 1 or first_NHW.ndim != 3 or not str(first_NHW.dtype).endswith("uint8"):
        raise MmdistError(
            f"Flow needs two stacks of grey images [N, H, W] of one shape, uint8 with intensities "
            f"0 to 255, both arrays or both tensors on one device; got {' and '.join(kinds)}."
        )
    _, height, width = first_NHW.shape
    if min(height, width) < MINIMUM_SIDE_PIXELS:
        raise MmdistError(
            f"Flow needs at least {MINIMUM_SIDE_PIXELS} pixels per side; got {width}×{height}."
        )
    settings = settings or TVL1Settings()
    sizes = pyramid(height, width, settings)
    if not isinstance(first_NHW, np.ndarray):
        import torch

        if first_NHW.is_cuda and not backend.startswith("opencv"):
            from mmdist_e2e.extractors.flow import gpu

            return gpu.solve(first_NHW, second_NHW, sizes, settings)
        arrays = (images.cpu().numpy() for images in stacks)  # views on a CPU
        flow_N2HW = tvl1(*arrays, backend=backend, settings=settings)
        return torch.from_numpy(flow_N2HW).to(first_NHW.device)
    if backend.startswith("opencv"):
        solve = opencv.solve if backend == "opencv" else opencv.solve_cuda
        return solve(first_NHW, second_NHW, settings)
    if device.startswith("cuda"):
        import torch

        tensors = (torch.tensor(images, device=device) for images in stacks)
        return tvl1(*tensors, settings=settings).cpu().numpy()
    from mmdist_e2e.extractors.flow import cpu

    return cpu.solve(first_NHW, second_NHW, sizes, settings)
