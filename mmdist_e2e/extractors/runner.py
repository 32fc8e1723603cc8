"""Dense mode: I3D run convolutionally over a whole video, in long chunks with context.

A video's frames are padded by repeating the last one to a multiple of eight. SAME padding depends
on the size that it pads, so where the network's strides fall depends on the length of its input;
with every length and every chunk's start a multiple of eight they fall at the same frames in a
chunk as in the whole video, whose length a stream does not know before it ends.

Which frames a row sees, traced back from map j (one every eight frames), first and last:

    Mixed_5b, 5c      each ±1                        j − 2 … j + 2
    MaxPool3d_5a      2i … 2i + 1                    2j − 4 … 2j + 5
    Mixed_4b … 4f     each ±1                        2j − 9 … 2j + 10
    MaxPool3d_4a      2i … 2i + 2                    4j − 18 … 4j + 22
    2c, Mixed_3b, 3c  each ±1                        4j − 21 … 4j + 25
    Conv3d_1a         2i − 2 … 2i + 4                8j − 44 … 8j + 54

Row j is the average of maps j and j + 1, so it sees the 107 frames 8j − 44 … 8j + 62. Rows
a … b − 1 need the frames 8a − 44 … 8b + 54: on either side of the frames 8a … 8b − 1 a context of
56, the next multiple of eight.

n frames give ⌈n / 8⌉ maps, thus ⌈n / 8⌉ − 1 rows, and one row where there is one map. Row j covers
the frames 8j … 8j + 15 nominally: `snippets.row_times` with window 16 and stride 8 gives its times.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from mmdist_e2e.extractors.profiles import DENSE_STRIDE, ExtractorSpec, Preprocessing
from mmdist_e2e.structures import MmdistError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from mmdist_e2e.extractors.flow.fields import FlowFrames, FlowPreprocessing


def to_network(windows_BTHWC: Tensor, preprocessing: Preprocessing | None = None) -> Tensor:
    """uint8 RGB windows [B, T, H, W, C] to float32 [B, C, T, H, W]: (x − mean) / std, ordered.

    Without `preprocessing`: RGB in [−1, 1]. The permuted tensor is already channels-last in
    memory, the layout that is fastest on CPUs.
    """
    import torch

    chosen = preprocessing or Preprocessing(size=windows_BTHWC.shape[2])
    mean, std = list(chosen.mean), list(chosen.std)
    if chosen.channel_order == "bgr":
        windows_BTHWC, mean, std = windows_BTHWC.flip(-1), mean[::-1], std[::-1]
    # One value for each number of a row of pixels: three at a time would be slow.
    width, device = windows_BTHWC.shape[3], windows_BTHWC.device
    scale = torch.tensor([1 / s for s in std], device=device).repeat(width)
    shift = torch.tensor([m / s for m, s in zip(mean, std, strict=True)], device=device)
    rows = windows_BTHWC.flatten(3).float().mul_(scale).sub_(shift.repeat(width))
    return rows.view(windows_BTHWC.shape).permute(0, 4, 1, 2, 3)


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
        from mmdist_e2e.extractors.flow.fields import FlowFrames, FlowPreprocessing

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
        from mmdist_e2e.extractors.profiles import Preprocessing
        from mmdist_e2e.extractors.runner import to_network

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
        from mmdist_e2e.extractors.networks.fold import prepare_for_inference

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
    from mmdist_e2e.extractors.flow.fields import FlowPreprocessing
    from mmdist_e2e.extractors.profiles import Preprocessing

    kind = FlowPreprocessing if spec.modality == "flow" else Preprocessing
    try:
        return kind(**spec.config["preprocessing"])
    except (TypeError, ValueError) as error:
        raise MmdistError(
            f"The preprocessing in {spec.folder / 'config.json'} is wrong: {error}"
        ) from error


def _i3d(config: Mapping[str, Any]) -> nn.Module:
    from mmdist_e2e.extractors.networks.i3d import InceptionI3d

    return InceptionI3d(config["num_classes"], config["in_channels"], config["width"])


def _c3d(config: Mapping[str, Any]) -> nn.Module:
    from mmdist_e2e.extractors.networks.c3d import C3D

    return C3D(config["num_classes"], config.get("width", 1.0))


def _pytorchvideo(config: Mapping[str, Any]) -> nn.Module:
    from mmdist_e2e.extractors.networks.pytorchvideo import HubBackbone

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


Tail = Literal["repeat_last", "drop"]

TAILS: tuple[Tail, ...] = ("repeat_last", "drop")


def row_count(frames: int, *, window: int, stride: int, tail: Tail = "repeat_last") -> int:
    """How many rows `frames` sampled frames give; 0 only for no frame."""
    if frames <= 0:
        return 0
    if tail == "repeat_last":
        return -(-frames // stride)
    return max((frames - window) // stride + 1, 1)


def row_times(
    rows: int, *, window: int, stride: int, fps: float, duration_seconds: float
) -> NDArray[np.float64]:
    """Start and end of each row in seconds, [rows, 2]: from 0 to the duration.

    A row ends with its window or with the video, whichever comes first; the last row ends with
    the video even where `drop` left frames over.
    """
    starts = np.arange(rows, dtype=np.float64) * stride / fps
    times = np.stack([starts, starts + window / fps], axis=1)
    times = np.minimum(times, duration_seconds)
    times[-1, 1] = duration_seconds
    return times


class Windows:
    """Cuts a stream of frames into windows with bounded memory.

    Push chunks [N, ...] in order and take whole windows [window, ...] as they fill; `finish`
    gives the tail. At most one window and one chunk of frames are held.
    """

    def __init__(self, *, window: int, stride: int, tail: Tail = "repeat_last") -> None:
        if window < 1 or stride < 1:
            raise ValueError(f"window and stride must be at least 1; got {window} and {stride}.")
        if tail not in TAILS:
            raise ValueError(f"tail must be one of {', '.join(TAILS)}; got {tail!r}.")
        self.window, self.stride, self.tail = window, stride, tail
        self.frames = 0  # frames pushed so far
        self.rows = 0  # windows given so far
        self._held: NDArray[np.generic] | None = None
        self._held_start = 0

    def push(self, chunk: NDArray[np.generic]) -> Iterator[NDArray[np.generic]]:
        """Take frames [N, ...] and give every window that is now whole."""
        self.frames += len(chunk)
        held = chunk if self._held is None else np.concatenate([self._held, chunk])
        while self.rows * self.stride + self.window <= self.frames:
            first = self.rows * self.stride - self._held_start
            self.rows += 1
            yield held[first : first + self.window]
        # With a stride above the window the next window may start beyond what was pushed; the
        # last frame is kept all the same, because a tail repeats it.
        keep_from = min(self.rows * self.stride - self._held_start, len(held) - 1)
        self._held = held[max(keep_from, 0) :].copy()
        self._held_start += max(keep_from, 0)

    def finish(self) -> Iterator[NDArray[np.generic]]:
        """Give the windows that the tail policy makes of the frames left over."""
        total = row_count(self.frames, window=self.window, stride=self.stride, tail=self.tail)
        while self.rows < total:
            assert self._held is not None
            indices = self.rows * self.stride + np.arange(self.window)
            self.rows += 1
            yield self._held[np.minimum(indices, self.frames - 1) - self._held_start]


MINIMUM_CONTEXT = 56  # frames on either side, see above


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

    Push frames [N, ...] in order and take the chunks that are now whole; `finish` gives the last.
    At most core_frames + 2 · context_frames frames and those of one push are held.

    Args:
        core_frames: frames that each chunk adds, eight a row.
        context_frames: frames run on either side of them and trimmed again.

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
        self.frames = 0  # frames pushed so far
        self.rows = 0  # rows given so far
        self._pieces: list[NDArray[np.generic]] = []  # frames held
        self._start = 0  # the first of them in the video

    def push(self, frames: NDArray[np.generic]) -> Iterator[Chunk]:
        """Take frames [N, ...] and give every chunk that now has its context."""
        self.frames += len(frames)
        self._pieces.append(frames.copy())  # a reader may use its buffer again
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
