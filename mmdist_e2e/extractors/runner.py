"""A network on a device: precision, batches, and how frames become rows.

`SnippetNetwork` loads a checkpoint, prepares it for a device in fp32 or bf16, and computes rows
from preprocessed frames. Two cutters feed it from a stream, with bounded memory: `Windows` cuts
overlapping windows of one row each; `DenseChunks` cuts long chunks with context, so that I3D runs
convolutionally over the whole video (dense mode).

Every network has `in_channels`, `feature_channels` and `features(frames_BCTHW) -> [B, T', D]`.
Torch is imported only where it runs: a rerun with nothing to do never loads it.

Shapes: B windows, T frames of a window, N frames, H height, W width, C channels, D features.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmdist_e2e.extractors.flow.fields import FlowFrames
from mmdist_e2e.extractors.profiles import DENSE_STRIDE, ExtractorSpec, Preprocessing
from mmdist_e2e.structures import MmdistError, check_choice
from mmdist_e2e.weights.registry import misfits

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

# A GPU is fastest with many windows per call; on a CPU more than two of 16 × 224² leave its caches.
WINDOWS_PER_CALL = {"cpu": 2, "cuda": 8}

PRECISIONS = ("auto", "fp32", "bf16")

MINIMUM_COSINE = 0.999  # of bf16 rows to fp32 rows; below it, "auto" uses fp32


def to_network(windows_BTHWC: Tensor, preprocessing: Preprocessing | None = None) -> Tensor:
    """uint8 RGB windows [B, T, H, W, C] to float32 [B, C, T, H, W]: (x − mean) / std, ordered.

    Without `preprocessing`: RGB in [−1, 1]. The permuted tensor is channels-last in memory
    already, the fastest layout on CPUs.
    """
    import torch

    chosen = preprocessing or Preprocessing(size=windows_BTHWC.shape[2])
    mean, std = list(chosen.mean), list(chosen.std)
    if chosen.channel_order == "bgr":
        windows_BTHWC, mean, std = windows_BTHWC.flip(-1), mean[::-1], std[::-1]
    # One value for each number in a row of pixels: broadcasting three at a time would be slow.
    width, device = windows_BTHWC.shape[3], windows_BTHWC.device
    scale = torch.tensor([1 / s for s in std], device=device).repeat(width)
    shift = torch.tensor([m / s for m, s in zip(mean, std, strict=True)], device=device)
    rows = windows_BTHWC.flatten(3).float().mul_(scale).sub_(shift.repeat(width))
    return rows.view(windows_BTHWC.shape).permute(0, 4, 1, 2, 3)


class RgbFrames:
    """What `FlowFrames` is for flow: here every frame is an input of its own."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing

    def push(self, frames_NHWC: NDArray[np.uint8]) -> Iterator[NDArray[np.generic]]:
        """Resize and crop frames."""
        yield self.preprocessing(frames_NHWC)

    def finish(self) -> Iterator[NDArray[np.generic]]:
        """Nothing is left."""
        yield from ()


class SnippetNetwork:
    """A network prepared to turn preprocessed frames into rows.

    Args:
        spec: from `describe`.
        device: "auto", "cpu", "cuda", "cuda:1", …
        precision: "fp32", "bf16", or "auto": bf16 if the device is fast at it and a check at
            start-up agrees with fp32; a warning says when it does not agree.
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

        check_choice("The precision", precision, PRECISIONS)
        self.spec, self.flow_backend = spec, flow_backend
        self.device = torch.device(resolve_device(device))
        self.windows_per_call = WINDOWS_PER_CALL.get(self.device.type, WINDOWS_PER_CALL["cuda"])
        self.preprocessing = spec.preprocessing
        network = load_network(spec)
        if spec.pca is not None and len(spec.pca.mean_D) != network.feature_channels:
            raise MmdistError(
                f"The PCA reduces rows of {len(spec.pca.mean_D)} channels, and {spec.name!r} gives "
                f"{network.feature_channels}; give the PCA of that network's features."
            )
        self.network, self.use_bf16 = self._prepared(network, precision)

    def rows(self, windows_BTHWC: NDArray[np.generic]) -> NDArray[np.float32]:
        """Features [B, D] of windows of preprocessed frames, averaged over T'."""
        return self._run(windows_BTHWC, lambda rows_BTD: rows_BTD.mean(dim=1))

    def dense_rows(self, chunk: Chunk) -> NDArray[np.float32]:
        """Features of one chunk of preprocessed frames, without the rows of its context."""
        rows = slice(chunk.first_row, chunk.last_row)
        return self._run(chunk.frames[None], lambda rows_BTD: rows_BTD[0, rows])

    def input_stream(self) -> RgbFrames | FlowFrames:
        """The object that turns one video's frames into this network's inputs."""
        if isinstance(self.preprocessing, Preprocessing):
            return RgbFrames(self.preprocessing)
        return FlowFrames(
            self.preprocessing,
            backend=self.flow_backend,
            device=str(self.device),
            repeats=self.spec.fps_policy == "exact",
        )

    def _run(
        self, inputs_BTHWC: NDArray[np.generic], choose: Callable[[Tensor], Tensor]
    ) -> NDArray[np.float32]:
        import torch

        with torch.inference_mode():
            inputs = torch.from_numpy(inputs_BTHWC).to(self.device)
            if isinstance(self.preprocessing, Preprocessing):
                frames_BCTHW = to_network(inputs, self.preprocessing)
            else:
                frames_BCTHW = self.preprocessing.to_network(inputs)
            rows_ND = choose(self._features(self.network, frames_BCTHW))
        out: NDArray[np.float32] = rows_ND.cpu().numpy()
        return out if self.spec.pca is None else self.spec.pca.apply(out)

    def _features(self, network: nn.Module, frames_BCTHW: Tensor) -> Tensor:
        """[B, T', D] in float32, by a network of any precision."""
        frames = frames_BCTHW.to(next(network.parameters()).dtype)
        chosen = {} if self.spec.layer is None else {"layer": self.spec.layer}
        rows_BTD: Tensor = network.features(frames, **chosen)  # type: ignore[operator]
        return rows_BTD.float()

    def _prepared(self, network: nn.Module, precision: str) -> tuple[nn.Module, bool]:
        """The network as it will run, and whether in bf16."""
        from mmdist_e2e.extractors.networks.fold import prepare_for_inference

        bf16 = precision == "bf16" or (precision == "auto" and fast_bf16(self.device))
        ready = prepare_for_inference(network, self.device, bf16)
        if bf16 and precision == "auto" and not self._agree(network.to(self.device), ready):
            return prepare_for_inference(network, self.device, False), False
        return ready, bf16

    def _agree(self, plain: nn.Module, half: nn.Module) -> bool:
        """Compare bf16 with the unprepared network in fp32, on one input.

        Some releases of cuDNN and oneDNN compute wrong values in bf16 without an error.
        """
        import torch

        generator = torch.Generator().manual_seed(0)
        batch, channels, *volume = self._check_shape()
        # Smooth noise: white noise is too far from the images that a network was trained on.
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
        """[B, C, T, H, W] of the input on which bf16 is checked."""
        size, channels = self.preprocessing.size, 2 if self.spec.modality == "flow" else 3
        batch, frames = 1, self.spec.window
        if self.device.type == "cuda":  # cuDNN's errors depend on the shape
            if self.spec.mode == "dense":
                chunks = DenseChunks()
                frames = chunks.core_frames + 2 * chunks.context_frames
            else:
                batch = self.windows_per_call
        return batch, channels, frames, size, size

    @property
    def info(self) -> dict[str, str]:
        """Provenance that is information only: models do not depend on it."""
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
    """Turn "auto" into a real device. Raises MmdistError for one that does not exist."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind, index = torch.device(device).type, torch.device(device).index or 0
    except RuntimeError:
        kind, index = "", 0
    if kind not in ("cpu", "cuda"):
        raise MmdistError(f"The device {device!r} is unknown; valid: auto, cpu, cuda, cuda:N.")
    if kind == "cuda" and index >= torch.cuda.device_count():
        raise MmdistError(
            f"The device {device!r} does not exist: torch finds {torch.cuda.device_count()} "
            f"GPUs; use cpu, or auto."
        )
    return device


def fast_bf16(device: torch.device) -> bool:
    import torch

    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # Without these instructions bf16 is emulated, and slower than fp32.
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, name, lambda: False)()) for name in checks)


def build(config: Mapping[str, Any]) -> Any:
    """The network that a checkpoint's config.json describes, with random weights.

    Raises KeyError, TypeError, ValueError, ArithmeticError or RuntimeError for wrong settings.
    """
    if config["network"] == "i3d":
        from mmdist_e2e.extractors.networks.i3d import InceptionI3d

        return InceptionI3d(config["num_classes"], config["in_channels"], config["width"])
    if config["network"] == "c3d":
        from mmdist_e2e.extractors.networks.c3d import C3D

        return C3D(config["num_classes"], config.get("width", 1.0))
    assert config["network"] == "pytorchvideo", "describe refuses other names"
    from mmdist_e2e.extractors.networks.pytorchvideo import HubBackbone

    return HubBackbone(config["backbone"])


def load_network(spec: ExtractorSpec) -> Any:
    """The network of a checkpoint with its weights, on the CPU, in eval mode.

    Raises MmdistError when config.json describes no network, or when the weights do not fit it or
    are not finite.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        network = build(spec.config)
        state = load_file(spec.folder / "model.safetensors")
    except MmdistError:
        raise
    except (
        KeyError, TypeError, ValueError, ArithmeticError, RuntimeError, OSError, SafetensorError
    ) as error:  # fmt: skip
        raise MmdistError(
            f"The checkpoint {spec.folder} cannot be loaded ({type(error).__name__}: {error}); "
            f"restore its config.json and model.safetensors."
        ) from error
    channels = 2 if spec.modality == "flow" else 3
    if network.in_channels != channels:
        raise MmdistError(
            f"The config.json in {spec.folder} is wrong: {spec.modality} has {channels} channels, "
            f"and in_channels is {network.in_channels}."
        )
    if problems := misfits(network.state_dict(), state):
        raise MmdistError(
            f"The weights {spec.name!r} do not fit the network {spec.network!r} of their "
            f"config.json ({problems}); restore both files in {spec.folder}."
        )
    network.load_state_dict(state, strict=False)
    return network.eval()


def row_times(
    rows: int, *, window: int, stride: int, fps: float, duration_seconds: float
) -> NDArray[np.float64]:
    """Start and end of each row in seconds, [rows, 2]: from 0 to the duration.

    A row ends with its window or with the video, whichever comes first; the last row always ends
    with the video.
    """
    starts = np.arange(rows, dtype=np.float64) * stride / fps
    times = np.stack([starts, starts + window / fps], axis=1)
    times = np.minimum(times, duration_seconds)
    times[-1, 1] = duration_seconds
    return times


class Windows:
    """Cuts a stream of frames into windows with bounded memory.

    A video of N frames has ⌈N / stride⌉ windows; the last ones repeat the last frame. Push chunks
    [N, ...] in order and take whole windows [window, ...] as they fill; `finish` gives the rest.
    At most one window and one chunk of frames are held.
    """

    def __init__(self, *, window: int, stride: int) -> None:
        if window < 1 or stride < 1:
            raise ValueError(f"window and stride must be at least 1; got {window} and {stride}.")
        self.window, self.stride = window, stride
        self.frames = 0  # pushed so far
        self.rows = 0  # windows given so far
        self._held: NDArray[np.generic] | None = None
        self._held_start = 0  # the first frame held

    def push(self, chunk: NDArray[np.generic]) -> Iterator[NDArray[np.generic]]:
        """Take frames [N, ...] and give every window that is now whole."""
        self.frames += len(chunk)
        held = chunk if self._held is None else np.concatenate([self._held, chunk])
        while self.rows * self.stride + self.window <= self.frames:
            first = self.rows * self.stride - self._held_start
            self.rows += 1
            yield held[first : first + self.window]
        # If the stride exceeds the window, the next window may start beyond the frames pushed so
        # far; the last frame is kept even so, because `finish` may repeat it.
        keep_from = max(min(self.rows * self.stride - self._held_start, len(held) - 1), 0)
        self._held = held[keep_from:].copy()
        self._held_start += keep_from

    def finish(self) -> Iterator[NDArray[np.generic]]:
        """Give the remaining windows, filled with the last frame."""
        while self.rows * self.stride < self.frames:
            assert self._held is not None
            indices = self.rows * self.stride + np.arange(self.window)
            self.rows += 1
            yield self._held[np.minimum(indices, self.frames - 1) - self._held_start]


# Why chunks of dense mode give exactly the rows of one run over the whole video:
#
# A video's frames are padded to a multiple of eight by repeating the last one. SAME padding depends
# on the size that it pads, so the frames that the network's strides fall on depend on the length
# of its input. If every length and every chunk's start is a multiple of eight, they are the same
# frames in a chunk as in the whole video.
#
# Frames seen by one row, traced back from map j (one map every eight frames), first and last:
#
#     Mixed_5b, 5c      each ±1                        j − 2 … j + 2
#     MaxPool3d_5a      2i … 2i + 1                    2j − 4 … 2j + 5
#     Mixed_4b … 4f     each ±1                        2j − 9 … 2j + 10
#     MaxPool3d_4a      2i … 2i + 2                    4j − 18 … 4j + 22
#     2c, Mixed_3b, 3c  each ±1                        4j − 21 … 4j + 25
#     Conv3d_1a         2i − 2 … 2i + 4                8j − 44 … 8j + 54
#
# Row j is the average of maps j and j + 1, so it sees the 107 frames 8j − 44 … 8j + 62. Rows
# a … b − 1 need the frames 8a − 44 … 8b + 54: a context of 56, the next multiple of eight, on
# either side of the frames 8a … 8b − 1.
#
# n frames give ⌈n / 8⌉ maps and ⌈n / 8⌉ − 1 rows, but at least one row. Nominally row j covers the
# frames 8j … 8j + 15: `row_times` with window 16 and stride 8 gives its times.
MINIMUM_CONTEXT = 56


def dense_row_count(frames: int) -> int:
    """How many rows `frames` sampled frames give; 0 only for no frame."""
    return max(-(-frames // DENSE_STRIDE) - 1, 1) if frames > 0 else 0


@dataclass(frozen=True)
class Chunk:
    """Frames [N, ...] to run the network over, and its output rows to keep.

    N is a multiple of eight. The rows kept are `first_row` … `last_row` − 1, counted from the
    chunk's own first: `features(frames)[first_row:last_row]`.
    """

    frames: NDArray[np.generic]
    first_row: int
    last_row: int


class DenseChunks:
    """Cuts a stream of frames into chunks whose kept rows, joined, are those of one whole run.

    Push frames [N, ...] in order and take the chunks that are complete; `finish` gives the last.
    At most core_frames + 2 · context_frames frames and those of one push are held.

    Args:
        core_frames: frames that each chunk adds, eight per row.
        context_frames: frames on either side of them, whose rows are dropped.

    Raises ValueError when either is not a multiple of eight, or too small to be exact.
    """

    def __init__(self, *, core_frames: int = 512, context_frames: int = MINIMUM_CONTEXT) -> None:
        for name, value, least in (
            ("core_frames", core_frames, DENSE_STRIDE),
            ("context_frames", context_frames, MINIMUM_CONTEXT),
        ):
            if value < least or value % DENSE_STRIDE:
                raise ValueError(
                    f"{name} must be a multiple of {DENSE_STRIDE} and at least "
                    f"{least}; got {value}."
                )
        self.core_frames, self.context_frames = core_frames, context_frames
        self.frames = 0  # pushed so far
        self.rows = 0  # given so far
        self._pieces: list[NDArray[np.generic]] = []  # frames held
        self._start = 0  # the first frame held

    def push(self, frames: NDArray[np.generic]) -> Iterator[Chunk]:
        """Take frames [N, ...] and give every chunk that now has its context."""
        self.frames += len(frames)
        self._pieces.append(frames.copy())  # a reader may reuse its buffer
        core_end = self.rows * DENSE_STRIDE + self.core_frames
        while self.frames >= core_end + self.context_frames:
            held = np.concatenate(self._pieces)
            chunk = self._chunk(held[: core_end + self.context_frames - self._start], core_end)
            next_start = max(core_end - self.context_frames, 0)
            self._pieces = [held[next_start - self._start :].copy()]
            self._start = next_start
            core_end += self.core_frames
            yield chunk

    def finish(self) -> Iterator[Chunk]:
        """Give the rows left over: one chunk, unless no frame was pushed."""
        if self.frames == 0:
            return
        held = np.concatenate(self._pieces)
        self._pieces = []
        filling = np.repeat(held[-1:], -self.frames % DENSE_STRIDE, axis=0)
        yield self._chunk(
            np.concatenate([held, filling]), dense_row_count(self.frames) * DENSE_STRIDE
        )

    def _chunk(self, frames: NDArray[np.generic], rows_end: int) -> Chunk:
        """Keep the rows from the first not yet given up to that of the video's frame `rows_end`."""
        before = self._start // DENSE_STRIDE
        first_row, self.rows = self.rows - before, rows_end // DENSE_STRIDE
        return Chunk(frames, first_row, self.rows - before)
