"""A network on a device: precision, batches, and how frames become rows.

`SnippetNetwork` computes rows from preprocessed frames. Two cutters feed it from a stream, with
bounded memory: `Windows` cuts overlapping windows of one row each; `DenseChunks` cuts long chunks
with context, so that I3D runs convolutionally over the whole video (dense mode).

Torch is imported only where it runs: a rerun with nothing to do never loads it.

Shapes: B windows, T frames of a window, N frames, H height, W width, C channels, D features.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
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
WINDOWS_PER_CALL = {"cpu": 2, "cuda": 32}
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


@dataclass(frozen=True)
class RgbFrames:
    """What `FlowFrames` is for flow: here every frame is an input of its own."""

    preprocessing: Preprocessing

    def push(self, frames_NHWC: Tensor, repeats_N: Sequence[bool] = ()) -> Iterator[Tensor]:
        yield self.preprocessing(frames_NHWC)

    def finish(self) -> Iterator[Tensor]:
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

        from mmdist_e2e.extractors.networks.fold import prepare_for_inference

        check_choice("The precision", precision, ("auto", "fp32", "bf16"))
        self.spec, self.flow_backend = spec, flow_backend
        self.device = torch.device(resolve_device(device))
        self.windows_per_call = WINDOWS_PER_CALL[self.device.type]
        self.preprocessing = spec.preprocessing
        network = load_network(spec)
        if spec.pca is not None and len(spec.pca.mean_D) != network.feature_channels:
            raise MmdistError(
                f"The PCA reduces rows of {len(spec.pca.mean_D)} channels, and {spec.name!r} gives "
                f"{network.feature_channels}; give the PCA of that network's features."
            )
        self.use_bf16 = precision == "bf16" or (precision == "auto" and fast_bf16(self.device))
        self.network = prepare_for_inference(network, self.device, self.use_bf16)
        if self.use_bf16 and precision == "auto" and not self._agrees(network.to(self.device)):
            self.use_bf16 = False
            self.network = prepare_for_inference(network, self.device, False)

    def rows(self, windows_BTHWC: Tensor) -> Tensor:
        """Features [B, D] of windows of preprocessed frames, averaged over T'."""
        return self._run(windows_BTHWC, lambda rows_BTD: rows_BTD.mean(dim=1))

    def dense_rows(self, chunk: Chunk) -> Tensor:
        """Features of one chunk of preprocessed frames, without the rows of its context."""
        rows = slice(chunk.first_row, chunk.last_row)
        return self._run(chunk.frames[None], lambda rows_BTD: rows_BTD[0, rows])

    def reduced(self, rows_SD: NDArray[np.float32]) -> NDArray[np.float32]:
        """Rows [S, D], after the PCA where there is one."""
        return rows_SD if self.spec.pca is None else self.spec.pca.apply(rows_SD)

    def input_stream(self) -> RgbFrames | FlowFrames:
        """The object that turns one video's frames into this network's inputs."""
        if isinstance(self.preprocessing, Preprocessing):
            return RgbFrames(self.preprocessing)
        return FlowFrames(self.preprocessing, backend=self.flow_backend)

    @property
    def needs_repeats(self) -> bool:
        """Whether the input stream must know which samples repeat a frame."""
        preprocessing, exact = self.preprocessing, self.spec.fps_policy == "exact"
        return not isinstance(preprocessing, Preprocessing) and (
            exact or preprocessing.repeats == "still"
        )

    def _run(self, inputs_BTHWC: Tensor, choose: Callable[[Tensor], Tensor]) -> Tensor:
        import torch

        with torch.inference_mode():
            if isinstance(self.preprocessing, Preprocessing):
                frames_BCTHW = to_network(inputs_BTHWC, self.preprocessing)
            else:
                frames_BCTHW = self.preprocessing.to_network(inputs_BTHWC)
            return choose(self._features(self.network, frames_BCTHW))

    def _features(self, network: nn.Module, frames_BCTHW: Tensor) -> Tensor:
        """[B, T', D] in float32, by a network of any precision."""
        frames = frames_BCTHW.to(next(network.parameters()).dtype)
        chosen = {} if self.spec.layer is None else {"layer": self.spec.layer}
        rows_BTD: Tensor = network.features(frames, **chosen)  # type: ignore[operator]
        return rows_BTD.float()

    def _agrees(self, plain: Any) -> bool:
        """Compare bf16 with the unprepared network in fp32, on one input.

        Some releases of cuDNN and oneDNN compute wrong values in bf16 without an error.
        """
        import torch
        from torch.nn.functional import cosine_similarity, interpolate

        batch, frames, size = 1, self.spec.window, self.preprocessing.size
        if self.device.type == "cuda":  # cuDNN's errors depend on the shape
            if self.spec.mode == "dense":
                frames = CORE_FRAMES + 2 * CONTEXT_FRAMES
            else:
                batch = self.windows_per_call
        # Smooth noise: white noise is too far from the images that a network was trained on.
        generator = torch.Generator().manual_seed(0)
        coarse = torch.rand((batch, plain.in_channels, 4, 8, 8), generator=generator)
        clip = interpolate(coarse, (frames, size, size), mode="trilinear") * 2 - 1
        clip = clip.to(self.device, memory_format=torch.channels_last_3d)
        with torch.inference_mode():
            rows_BTD, rough_BTD = (self._features(n, clip) for n in (plain, self.network))
        cosine = cosine_similarity(rows_BTD, rough_BTD, dim=2).min().item()
        if cosine >= MINIMUM_COSINE:  # not so for NaN
            return True
        warnings.warn(
            f"bf16 differs from fp32 on {self.device} (cosine {cosine:.4f}); using fp32.",
            stacklevel=3,
        )
        return False

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


class Device:
    """Every way in which data reach or leave a device, and in which a thread waits for it.

    The thread that runs networks only calls `mark`; others upload, download and wait.
    copies: an upload is a copy, so that the memory it came from is free again.
    """

    def __init__(self, device: torch.device) -> None:
        import torch

        self.device, self.copies = device, device.type == "cuda"
        if self.copies:
            self._compute = torch.cuda.current_stream(device)
            self._copy = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def upload(self, frames_NHWC: NDArray[np.uint8]) -> Tensor:
        """The frames on the device; on a CPU they are the given memory itself."""
        import torch

        frames = torch.from_numpy(frames_NHWC)
        if not self.copies:
            return frames
        with torch.cuda.stream(self._copy):
            uploaded = frames.to(self.device, non_blocking=True)
            self._copy.record_event().synchronize()
        uploaded.record_stream(self._compute)
        return uploaded

    def mark(self) -> Callable[[], object]:
        """A function that waits until the device has done what it was given so far."""
        if not self.copies:
            return lambda: None
        event = self._compute.record_event()
        return lambda: event.synchronize()

    def download(self, rows_SD: Tensor) -> NDArray[np.float32]:
        """Rows that are computed already, in the host's memory."""
        import torch

        if self.copies:
            with torch.cuda.stream(self._copy):
                rows_SD = rows_SD.cpu()
        rows: NDArray[np.float32] = rows_SD.numpy()
        return rows

    def pin(self, memory: NDArray[np.uint8]) -> Callable[[], object]:
        """Lock memory for fast uploads, where that is possible; returns how to undo it."""
        if not self.copies:
            return lambda: None
        import torch

        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        address = memory.ctypes.data
        if int(runtime.cudaHostRegister(address, memory.nbytes, 0)) != 0:
            return lambda: None
        return lambda: runtime.cudaHostUnregister(address)


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


class _Cutter:
    """Holds the frames [N, ...] of a stream that are still needed. They are pushed in order.

    Frames that are pushed must not change later. What is given may be a view of them.
    frames: pushed so far. rows: given so far.
    """

    def __init__(self) -> None:
        self.frames = self.rows = 0
        self._pieces: list[Tensor] = []  # frames held
        self._start = 0  # the first frame held

    def _hold(self, frames: Tensor) -> None:
        if len(frames):
            self.frames += len(frames)
            self._pieces.append(frames)

    def _take(self, first: int, end: int) -> Tensor:
        """Frames `first` … `end` − 1; the last frame pushed is repeated beyond the stream's end."""
        import torch

        taken, start = [], self._start
        for piece in self._pieces:
            if first < start + len(piece) and end > start:
                taken.append(piece[max(first - start, 0) : end - start])
            start += len(piece)
        if end > self.frames:
            last = self._pieces[-1][-1:]
            taken.append(last.expand(end - max(first, self.frames), *last.shape[1:]))
        return taken[0] if len(taken) == 1 else torch.cat(taken)

    def _forget(self, end: int) -> None:
        """Drop pieces before frame `end`, but not the last one: the stream's end may repeat it."""
        while len(self._pieces) > 1 and self._start + len(self._pieces[0]) <= end:
            self._start += len(self._pieces.pop(0))


class Windows(_Cutter):
    """Cuts a stream of frames into windows with bounded memory.

    A video of N frames has ⌈N / stride⌉ windows; the last ones repeat the last frame. Push chunks
    [N, ...] in order and take whole windows [window, ...] as they fill; `finish` gives the rest.
    The chunks that hold frames of the next window are kept.
    """

    def __init__(self, *, window: int, stride: int) -> None:
        super().__init__()
        self.window, self.stride = window, stride

    def push(self, frames: Tensor) -> Iterator[Tensor]:
        """Take frames [N, ...] and give every window that is now whole."""
        self._hold(frames)
        while self.rows * self.stride + self.window <= self.frames:
            yield self._next()
        self._forget(self.rows * self.stride)

    def finish(self) -> Iterator[Tensor]:
        """Give the remaining windows, filled with the last frame."""
        while self.rows * self.stride < self.frames:
            yield self._next()

    def _next(self) -> Tensor:
        first = self.rows * self.stride
        self.rows += 1
        return self._take(first, first + self.window)


# SAME padding depends on the size that it pads, so a video's frames are padded to a multiple of
# eight by repeating the last one. Row j averages maps j and j + 1 and sees the frames 8j − 44 …
# 8j + 62 (derived in tests/test_dense.py). So rows a … b − 1 are exact with 56 frames of context,
# the next multiple of eight, on either side of the frames 8a … 8b − 1.
CONTEXT_FRAMES = 56
CORE_FRAMES = 512


def dense_row_count(frames: int) -> int:
    """How many rows `frames` sampled frames give: ⌈frames / 8⌉ − 1, at least 1; 0 for no frame."""
    return max(-(-frames // DENSE_STRIDE) - 1, 1) if frames > 0 else 0


@dataclass(frozen=True)
class Chunk:
    """Frames [N, ...] to run the network over, and its output rows to keep.

    The rows kept are `first_row` … `last_row` − 1, counted from the
    chunk's own first: `features(frames)[first_row:last_row]`.
    """

    frames: Tensor
    first_row: int
    last_row: int


class DenseChunks(_Cutter):
    """Cuts a stream of frames into chunks whose kept rows, joined, are those of one whole run.

    Push frames [N, ...] in order and take the chunks that are complete; `finish` gives the last.
    At most core_frames + 2 · CONTEXT_FRAMES + 7 frames and those of two pushes are held.

    core_frames: frames that each chunk adds between its contexts, a multiple of eight.
    frames: of the whole stream, for a run over just these, without repeating the last one. Every
        chunk is then as long modulo eight, so that SAME padding falls on the same frames. A stream
        that is too short for a row repeats its last frame all the same.
    """

    def __init__(self, *, core_frames: int = CORE_FRAMES, frames: int = 0) -> None:
        super().__init__()
        assert core_frames > 0
        assert core_frames % DENSE_STRIDE == 0
        self.core_frames = core_frames
        self.remainder = frames % DENSE_STRIDE if frames > DENSE_STRIDE else 0

    def push(self, frames: Tensor) -> Iterator[Chunk]:
        """Take frames [N, ...] and give every chunk that now has its context."""
        self._hold(frames)
        core_end = self.rows * DENSE_STRIDE + self.core_frames
        while self.frames >= (end := core_end + CONTEXT_FRAMES + self.remainder):
            yield self._chunk(end, core_end // DENSE_STRIDE)
            self._forget(core_end - CONTEXT_FRAMES)
            core_end += self.core_frames

    def finish(self) -> Iterator[Chunk]:
        """Give the rows left over: one chunk, unless no frame was pushed."""
        if self.frames > 0:
            padded = -(-self.frames // DENSE_STRIDE) * DENSE_STRIDE
            end = self.frames if self.remainder else padded
            yield self._chunk(end, dense_row_count(self.frames))

    def _chunk(self, frames_end: int, rows_end: int) -> Chunk:
        """The frames up to `frames_end` for the rows not yet given up to `rows_end`."""
        start = max(self.rows * DENSE_STRIDE - CONTEXT_FRAMES, 0)
        before = start // DENSE_STRIDE
        first_row, self.rows = self.rows - before, rows_end
        return Chunk(self._take(start, frames_end), first_row, rows_end - before)
