"""Extractors by name: a checkpoint's description without torch, and its network with it.

An `ExtractorSpec` is light, so that a second run finds out that there is nothing to do without
loading a network. Shapes: B windows, T frames, H height, W width, D channels.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mmdist_e2e.structures import MmdistError
from mmdist_e2e.weights.registry import checkpoint_folder, read_config, weights_digest

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

MODE = "windows"
FPS_POLICY: Literal["ceiling"] = "ceiling"
TAIL: Literal["repeat_last"] = "repeat_last"
# The worst row of a reduced-precision run against fp32 that is still taken as right.
MINIMUM_COSINE = 0.999


@dataclass(frozen=True)
class ExtractorSpec:
    """What an extractor's checkpoint says of itself; see `matters` for what models rely on."""

    name: str
    folder: Path
    digest: str
    modality: str
    fps: float
    window: int
    stride: int
    config: Mapping[str, Any]

    @property
    def matters(self) -> dict[str, Any]:
        """The part of the provenance that a model must agree with."""
        return {
            "extractor": self.name,
            "weights": self.digest,
            "mode": MODE,
            "fps": self.fps,
            "fps_policy": FPS_POLICY,
            "window": self.window,
            "stride": self.stride,
            "tail": TAIL,
        }

    @property
    def trained_on(self) -> str:
        return str(self.config["trained_on"])


def describe(name_or_folder: str) -> ExtractorSpec:
    """The spec of an extractor by registry name or checkpoint folder, fetched if it must be.

    Raises MmdistError for an unknown name, a damaged folder, or a failed fetch.
    """
    folder = checkpoint_folder(name_or_folder)
    config = read_config(folder)
    try:
        if config["network"] != "i3d":
            raise MmdistError(
                f"{folder} holds the network {config['network']!r}; this version runs: i3d."
            )
        return ExtractorSpec(
            name=str(config.get("name", folder.name)),
            folder=folder,
            digest=weights_digest(folder),
            modality=config["modality"],
            fps=float(config["fps"]),
            window=int(config["window"]),
            stride=int(config["stride"]),
            config=config,
        )
    except KeyError as error:
        raise MmdistError(
            f"{folder / 'config.json'} has no {error.args[0]!r}: it is "
            f"not an extractor's checkpoint."
        ) from error


class SnippetNetwork:
    """A network ready to turn uint8 windows into rows.

    Args:
        spec: from `describe`.
        device: "auto", "cpu", "cuda", "cuda:1", …
        precision: "auto" takes bf16 where the device is fast at it and agrees with fp32 on a
            check run at start-up (a warning says when it does not), "fp32" or "bf16" insist.
    """

    def __init__(
        self, spec: ExtractorSpec, *, device: str = "auto", precision: str = "auto"
    ) -> None:
        import torch

        from mmdist_e2e.extractors.preprocess import Preprocessing

        if precision not in ("auto", "fp32", "bf16"):
            raise MmdistError(f"The precision {precision!r} is unknown; valid: auto, fp32, bf16.")
        self.spec = spec
        self.device = torch.device(resolve_device(device))
        self.preprocessing = Preprocessing(**spec.config["preprocessing"])
        self.network = _load_i3d(spec).to(self.device, memory_format=torch.channels_last_3d)
        self.network.eval()
        self.use_bf16 = precision == "bf16"
        if precision == "auto" and _fast_bf16(self.device):
            self.use_bf16 = self._bf16_agrees()

    def rows(self, windows_BTHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Features [B, D] of windows of preprocessed frames, averaged over what time remains."""
        import torch

        from mmdist_e2e.extractors.preprocess import to_network

        with torch.inference_mode():
            windows = to_network(torch.from_numpy(windows_BTHWC).to(self.device))
            rows_BD = self._forward(windows, bf16=self.use_bf16)
        out: NDArray[np.float32] = rows_BD.cpu().numpy()
        return out

    def _forward(self, windows_BCTHW: torch.Tensor, *, bf16: bool) -> torch.Tensor:
        import torch

        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            rows_BTD: torch.Tensor = self.network.features(windows_BCTHW)
        return rows_BTD.float().mean(dim=1)

    def _bf16_agrees(self) -> bool:
        """Compare bf16 with fp32 once: some releases of cuDNN are silently wrong in bf16."""
        import torch

        size, generator = self.preprocessing.size, torch.Generator().manual_seed(0)
        shape = (1, self.network.in_channels, self.spec.window, size, size)
        # Smooth noise: white noise drives a network far from the images it was made for.
        coarse = torch.rand((1, shape[1], 4, 8, 8), generator=generator)
        clip = torch.nn.functional.interpolate(coarse, shape[2:], mode="trilinear") * 2 - 1
        clip = clip.to(self.device, memory_format=torch.channels_last_3d)
        with torch.inference_mode():
            full = self._forward(clip, bf16=False)
            half = self._forward(clip, bf16=True)
        cosine = torch.nn.functional.cosine_similarity(full, half).min().item()
        if not math.isfinite(cosine) or cosine < MINIMUM_COSINE:
            warnings.warn(
                f"bf16 differs from fp32 on {self.device} (cosine {cosine:.4f}); using fp32.",
                stacklevel=3,
            )
            return False
        return True

    @property
    def info(self) -> dict[str, str]:
        """Information that travels with features but that no model relies on."""
        import torch

        return {
            "torch": torch.__version__,
            "device": self.device.type,
            "precision": "bf16" if self.use_bf16 else "fp32",
        }


def resolve_device(device: str) -> str:
    """Turn "auto" into a real device. Raises MmdistError for one that is not there."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise MmdistError(
            f"The device {device!r} is unknown; valid: auto, cpu, cuda, cuda:N."
        ) from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise MmdistError(f"The device {device!r} is not there: torch sees no GPU; use cpu.")
    return device


def _fast_bf16(device: torch.device) -> bool:
    import torch

    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # Without these instructions bf16 is emulated and slower than fp32.
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, name, lambda: False)()) for name in checks)


def _load_i3d(spec: ExtractorSpec) -> Any:
    import torch
    from safetensors.torch import load_file

    from mmdist_e2e.extractors.i3d import InceptionI3d

    config = spec.config
    network = InceptionI3d(config["num_classes"], config["in_channels"], config["width"])
    state = load_file(spec.folder / "model.safetensors")
    missing, unexpected = network.load_state_dict(state, strict=False)
    # The public files lack BatchNorm's counters, which inference never reads.
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise MmdistError(
            f"The weights {spec.name!r} do not fit I3D: missing {missing[:3]}, "
            f"unexpected {unexpected[:3]}."
        )
    assert all(torch.isfinite(value).all() for value in state.values())
    return network
