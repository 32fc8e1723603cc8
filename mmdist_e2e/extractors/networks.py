"""Networks ready to turn windows of frames or flow fields into rows.

The contract that every network keeps: an `nn.Module` with `in_channels`, `feature_channels` and
`features(frames_BCTHW: float Tensor) -> [B, T', D]`, T' at least 1. C3D's takes a `layer` too.

Shapes: B windows, T frames, H height, W width, C channels, D features.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from mmdist_e2e.extractors.dense import Chunk, DenseChunks
from mmdist_e2e.extractors.spec import ExtractorSpec as ExtractorSpec
from mmdist_e2e.extractors.spec import describe as describe
from mmdist_e2e.structures import MmdistError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from mmdist_e2e.extractors.flow_frames import FlowFrames, FlowPreprocessing
    from mmdist_e2e.extractors.preprocess import Preprocessing

# A GPU wants many windows a call; on a CPU more than two of 16 × 224² leave its caches.
WINDOWS_PER_CALL = {"cpu": 2}
DEFAULT_WINDOWS_PER_CALL = 8
PRECISIONS = ("auto", "fp32", "bf16")
# The worst row of a reduced-precision run against fp32 that is still taken as right.
MINIMUM_COSINE = 0.999


class RgbFrames:
    """For RGB what `FlowFrames` is for flow: every frame is an input of its own."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing

    def push(self, frames_NHWC: NDArray[np.uint8]) -> Iterator[NDArray[np.generic]]:
        """Resize and crop frames."""
        yield self.preprocessing(frames_NHWC)

    def finish(self) -> Iterator[NDArray[np.generic]]:
        """Nothing is left."""
        yield from ()


class SnippetNetwork:
    """A network ready to turn preprocessed frames into rows.

    Args:
        spec: from `describe`.
        device: "auto", "cpu", "cuda", "cuda:1", …
        precision: "auto" takes bf16 where the device is fast at it and agrees with fp32 on a
            check run at start-up (a warning says when it does not), "fp32" or "bf16" insist.
        flow_backend: of `tvl1`, for a network that reads flow.

    Raises MmdistError for an unknown device or precision, and for weights, preprocessing or a
    PCA that do not fit the network.
    """

    def __init__(
        self,
        spec: ExtractorSpec,
        *,
        device: str = "auto",
        precision: str = "auto",
        flow_backend: str = "auto",
    ) -> None:
        import torch

        if precision not in PRECISIONS:
            raise MmdistError(
                f"The precision {precision!r} is unknown; valid: {', '.join(PRECISIONS)}."
            )
        self.spec, self.flow_backend = spec, flow_backend
        self.device = torch.device(resolve_device(device))
        self.windows_per_call = WINDOWS_PER_CALL.get(self.device.type, DEFAULT_WINDOWS_PER_CALL)
        self.preprocessing = _preprocessing(spec)
        network = load_network(spec)
        if spec.pca is not None and len(spec.pca.mean_D) != network.feature_channels:
            raise MmdistError(
                f"The PCA reduces rows of {len(spec.pca.mean_D)} channels, and {spec.name!r} gives "
                f"{network.feature_channels}; give the PCA of that network's features."
            )
        self.network, self.use_bf16 = self._prepared(network, precision)

    def rows(self, windows_BTHWC: NDArray[np.generic]) -> NDArray[np.float32]:
        """Features [B, D] of windows of preprocessed frames, averaged over what time remains."""
        return self._run(windows_BTHWC, lambda rows_BTD: rows_BTD.mean(dim=1))

    def dense_rows(self, chunk: Chunk) -> NDArray[np.float32]:
        """Features of one long run of preprocessed frames, without the rows of its context."""
        rows = slice(chunk.first_row, chunk.last_row)
        return self._run(chunk.frames[None], lambda rows_BTD: rows_BTD[0, rows])

    def input_stream(self) -> RgbFrames | FlowFrames:
        """What turns one video's frames into what this network's windows hold."""
        from mmdist_e2e.extractors.flow_frames import FlowFrames, FlowPreprocessing

        if isinstance(self.preprocessing, FlowPreprocessing):
            return FlowFrames(
                self.preprocessing,
                backend=self.flow_backend,
                device=str(self.device),
                repeats=self.spec.fps_policy == "exact",
            )
        return RgbFrames(self.preprocessing)

    def _run(
        self, inputs_BTHWC: NDArray[np.generic], choose: Callable[[Tensor], Tensor]
    ) -> NDArray[np.float32]:
        import torch

        with torch.inference_mode():
            frames = self._to_network(torch.from_numpy(inputs_BTHWC).to(self.device))
            rows_ND = choose(self._features(self.network, frames))
        out: NDArray[np.float32] = rows_ND.cpu().numpy()
        return out if self.spec.pca is None else self.spec.pca.apply(out)

    def _to_network(self, inputs_BTHWC: Tensor) -> Tensor:
        from mmdist_e2e.extractors.preprocess import Preprocessing, to_network

        if isinstance(self.preprocessing, Preprocessing):
            return to_network(inputs_BTHWC, self.preprocessing)
        return self.preprocessing.to_network(inputs_BTHWC)

    def _features(self, network: nn.Module, frames_BCTHW: Tensor) -> Tensor:
        """[B, T', D] in float32, by a network of whatever precision."""
        frames = frames_BCTHW.to(next(network.parameters()).dtype)
        chosen = {} if self.spec.layer is None else {"layer": self.spec.layer}
        rows_BTD: Tensor = network.features(frames, **chosen)  # type: ignore[operator]
        return rows_BTD.float()

    def _prepared(self, network: nn.Module, precision: str) -> tuple[nn.Module, bool]:
        """The network as it will run, and whether in bf16."""
        from mmdist_e2e.extractors.fold import prepare_for_inference

        bf16 = precision == "bf16" or (precision == "auto" and fast_bf16(self.device))
        ready = prepare_for_inference(network, self.device, bf16)
        if bf16 and precision == "auto" and not self._agree(network.to(self.device), ready):
            return prepare_for_inference(network, self.device, False), False
        return ready, bf16

    def _agree(self, plain: nn.Module, half: nn.Module) -> bool:
        """Compare bf16 with the untouched network in fp32 once.

        Some releases of cuDNN and oneDNN are silently wrong in bf16.
        """
        import torch

        generator = torch.Generator().manual_seed(0)
        batch, channels, *volume = self._check_shape()
        # Smooth noise: white noise drives a network far from the images it was made for.
        coarse = torch.rand((batch, channels, 4, 8, 8), generator=generator)
        clip = torch.nn.functional.interpolate(coarse, tuple(volume), mode="trilinear") * 2 - 1
        clip = clip.to(self.device, memory_format=torch.channels_last_3d)
        with torch.inference_mode():
            rows, rough = (self._features(network, clip).flatten(0, 1) for network in (plain, half))
        cosine = torch.nn.functional.cosine_similarity(rows, rough).min().item()
        if not math.isfinite(cosine) or cosine < MINIMUM_COSINE:
            warnings.warn(
                f"bf16 differs from fp32 on {self.device} (cosine {cosine:.4f}); using fp32.",
                stacklevel=4,
            )
            return False
        return True

    def _check_shape(self) -> tuple[int, ...]:
        """[B, C, T, H, W] of the input to check bf16 on."""
        size, channels = self.preprocessing.size, 2 if self.spec.modality == "flow" else 3
        batch, frames = 1, self.spec.window
        if self.device.type == "cuda":  # what cuDNN gets wrong depends on the shape
            chunks = DenseChunks()
            dense_frames = chunks.core_frames + 2 * chunks.context_frames
            is_dense = self.spec.mode == "dense"
            batch, frames = (1, dense_frames) if is_dense else (self.windows_per_call, frames)
        return batch, channels, frames, size, size

    @property
    def info(self) -> dict[str, str]:
        """Information that travels with features but that no model relies on."""
        import torch

        info = {
            "torch": torch.__version__,
            "device": self.device.type,
            "precision": "bf16" if self.use_bf16 else "fp32",
        }
        if self.spec.modality == "flow":
            info["flow_backend"] = self.flow_backend
        return info


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


def fast_bf16(device: torch.device) -> bool:
    import torch

    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # Without these instructions bf16 is emulated and slower than fp32.
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, name, lambda: False)()) for name in checks)


def _preprocessing(spec: ExtractorSpec) -> Preprocessing | FlowPreprocessing:
    from mmdist_e2e.extractors.flow_frames import FlowPreprocessing
    from mmdist_e2e.extractors.preprocess import Preprocessing

    kind = FlowPreprocessing if spec.modality == "flow" else Preprocessing
    try:
        return kind(**spec.config["preprocessing"])
    except (TypeError, ValueError) as error:
        raise MmdistError(
            f"The preprocessing in {spec.folder / 'config.json'} is wrong: {error}"
        ) from error


def _i3d(config: Mapping[str, Any]) -> nn.Module:
    from mmdist_e2e.extractors.i3d import InceptionI3d

    return InceptionI3d(config["num_classes"], config["in_channels"], config["width"])


def _c3d(config: Mapping[str, Any]) -> nn.Module:
    from mmdist_e2e.extractors.c3d import C3D

    return C3D(config["num_classes"], config.get("width", 1.0))


def _pytorchvideo(config: Mapping[str, Any]) -> nn.Module:
    from mmdist_e2e.extractors.hub import HubBackbone

    return HubBackbone(config["backbone"])


BUILDERS: dict[str, Callable[[Mapping[str, Any]], nn.Module]] = {
    "i3d": _i3d,
    "c3d": _c3d,
    "pytorchvideo": _pytorchvideo,
}


def load_network(spec: ExtractorSpec) -> nn.Module:
    """The network of a checkpoint with its weights, on the CPU, in eval mode.

    Raises MmdistError when config.json describes no network, or the weights do not fit it.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        network = BUILDERS[spec.network](spec.config)
        state = load_file(spec.folder / "model.safetensors")
    except MmdistError:
        raise
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise MmdistError(
            f"The checkpoint {spec.folder} cannot be loaded ({type(error).__name__}: {error}); "
            f"restore its config.json and model.safetensors."
        ) from error
    needed, given = _shapes(network.state_dict()), _shapes(state)
    unlike = [key for key in {**needed, **given} if needed.get(key) != given.get(key)]
    if unlike:
        raise MmdistError(
            f"The weights {spec.name!r} do not fit the network {spec.network!r} of its "
            f"config.json: missing, unexpected or of another shape are {', '.join(unlike[:3])}"
            f"{' …' if len(unlike) > 3 else ''}."
        )
    network.load_state_dict(state, strict=False)
    assert all(torch.isfinite(value).all() for value in state.values())
    return network.eval()


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes by key, but for BatchNorm's counters: inference reads none, public files lack them."""
    return {k: tuple(v.shape) for k, v in state.items() if not k.endswith("num_batches_tracked")}
