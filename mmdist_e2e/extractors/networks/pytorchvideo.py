"""pytorchvideo's backbones by name, as networks of features (the extra `backbones`).

State-dict keys are pytorchvideo's, so published files load strictly. Nothing is downloaded here.

Shapes: B clips, C = 3 channels, T frames, H height, W width, D feature channels.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from mmdist_e2e.structures import MmdistError, check_choice
from mmdist_e2e.weights.registry import PUBLIC

# The clip length that each backbone was published with.
FRAMES: dict[str, int] = {
    entry.config["backbone"]: entry.config["window"]
    for entry in PUBLIC
    if entry.config is not None and entry.config["network"] == "pytorchvideo"
}


class HubBackbone(nn.Module):
    """A backbone of `FRAMES` with random weights, up to its classifier.

    Raises MmdistError for an unknown name, or where pytorchvideo is not installed.
    """

    in_channels = 3

    def __init__(self, name: str) -> None:
        super().__init__()
        check_choice("The backbone", name, list(FRAMES))
        try:
            with warnings.catch_warnings():
                # torchvision compiles with torch.jit as it is imported, which is deprecated.
                warnings.simplefilter("ignore", FutureWarning)
                hub: Any = importlib.import_module("pytorchvideo.models.hub")
        except ImportError as error:
            raise MmdistError(
                f"pytorchvideo's backbones need the extra `backbones` ({error}); install it with: "
                f'pip install "mmdist-e2e[backbones]"'
            ) from error
        self.name = name
        network: Any = getattr(hub, name)(pretrained=False)
        head: Any = network.head if name.startswith("mvit") else network.blocks[-1]
        self.feature_channels: int = head.proj.in_features
        head.proj = _LeftOut(head.proj.in_features, head.proj.out_features)
        head.activation = None
        self.network: nn.Module = network

    def features(self, frames_BCTHW: Tensor) -> Tensor:
        """Features [B, 1, D] of normalised clips: the classifier's input, averaged.

        For frames larger than in training, the published head averages the classifier's outputs
        over positions. The classifier is linear, so averaging its input is the same.

        Raises MmdistError when the clips do not have 3 channels and the published length.
        """
        frames = FRAMES[self.name]
        if frames_BCTHW.ndim != 5 or frames_BCTHW.shape[1:3] != (3, frames):
            raise MmdistError(
                f"{self.name} reads clips of 3 channels and {frames} frames, "
                f"[batch, 3, {frames}, height, width]; got {list(frames_BCTHW.shape)}."
            )
        two_inputs = self.name.startswith("slowfast")
        rows_BD: Tensor = self.network(slow_and_fast(frames_BCTHW) if two_inputs else frames_BCTHW)
        return rows_BD[:, None]

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The published keys: those of pytorchvideo's own network."""
        return self.network.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.network.load_state_dict(*args, **kwargs)


class _LeftOut(nn.Linear):
    """A classifier that keeps its weights, so that published files load, and does nothing."""

    def forward(self, pooled: Tensor) -> Tensor:
        return pooled


def slow_and_fast(frames_BCTHW: Tensor) -> list[Tensor]:
    """SlowFast's two inputs: T/4 frames spread evenly from the first to the last, and all frames.

    As published, these are ⌊i · (T − 1) / (T/4 − 1)⌋: of 32 frames 0, 4, 8, 13, 17, 22, 26, 31.
    """
    frames = frames_BCTHW.shape[2]
    slow = frames // 4  # SlowFast's α
    indices = torch.arange(slow, device=frames_BCTHW.device) * (frames - 1) // (slow - 1)
    return [frames_BCTHW.index_select(2, indices), frames_BCTHW]
