"""Extractors by name: what a checkpoint holds and how it is run. Nothing here imports torch.

An `ExtractorSpec` is light, so that a rerun can skip finished videos without loading a network.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from mmdist_e2e.extractors.flow.fields import FlowPreprocessing, center, enlarged
from mmdist_e2e.extractors.flow.settings import NATIVE_SOLVER, TVL1Settings
from mmdist_e2e.extractors.networks.pca import Pca
from mmdist_e2e.extractors.video.reader import FpsPolicy
from mmdist_e2e.structures import MODALITIES, MmdistError, check_choice
from mmdist_e2e.weights.registry import checkpoint_folder, read_config, weights_digest

if TYPE_CHECKING:
    from torch import Tensor

RESIZED_AT_ONCE = 8  # frames; bounds the memory of resizing
HALF_RANGE = (127.5, 127.5, 127.5)  # as mean and std: [0, 255] to [−1, 1]


@dataclass(frozen=True)
class Preprocessing:
    """How frames become a network's input. Resizing is bilinear with antialiasing.

    Attributes:
        size: height and width that the network reads, in pixels. Alone, the whole frame is
            resized to it.
        crop: the center of what one of the next three gives; equal to `size`.
        shorter_side: resize to it, keeping the aspect ratio.
        resize: exact [height, width] to resize to.
        minimum_side: enlarge frames whose shorter side is below it, keeping the aspect ratio.
        mean, std: of red, green and blue, in units of 0–255: the network reads (x − mean) / std.
        channel_order: "rgb", or "bgr" for networks that came from OpenCV or Caffe.
    Lists, as JSON has them, become tuples. Raises ValueError naming the value that is wrong.
    """

    size: int
    shorter_side: int | None = None
    crop: int | None = None
    resize: Sequence[int] | None = None
    minimum_side: int | None = None
    mean: Sequence[float] = HALF_RANGE
    std: Sequence[float] = HALF_RANGE
    channel_order: str = "rgb"

    def __post_init__(self) -> None:
        _check_pixels("size", self.size, at_least=1)
        sides = {"shorter_side": self.shorter_side, "minimum_side": self.minimum_side}
        ways = {name: way for name, way in (*sides.items(), ("resize", self.resize)) if way}
        if len(ways) != (self.crop is not None):
            raise ValueError(
                f"crop goes with one of shorter_side, minimum_side and resize; got crop "
                f"{self.crop} with {ways or 'none of them'}."
            )
        if self.crop not in (None, self.size):
            raise ValueError(f"The crop is what the network reads: {self.crop} != {self.size}.")
        for name, side in sides.items():
            if side is not None:
                _check_pixels(name, side, at_least=self.size)
        if self.resize is not None:
            object.__setattr__(self, "resize", _numbers("resize", self.resize, 2))
            for side in self.resize:
                _check_pixels("resize", side, at_least=self.size)
        for name in ("mean", "std"):
            object.__setattr__(self, name, _numbers(name, getattr(self, name), 3))
        if min(self.std) <= 0:
            raise ValueError(f"std must be above 0; got {list(self.std)}.")
        if self.channel_order not in ("rgb", "bgr"):
            raise ValueError(
                f"The channel_order {self.channel_order!r} is unknown; valid: rgb, bgr."
            )

    def target(self, height: int, width: int) -> tuple[int, int]:
        """Size (height, width) that frames are resized to before any crop, in pixels."""
        if self.resize is not None:
            return self.resize[0], self.resize[1]
        if self.minimum_side is not None:
            return enlarged(height, width, self.minimum_side)
        if self.shorter_side is None:
            return self.size, self.size
        scale = self.shorter_side / min(height, width)
        return max(round(height * scale), self.size), max(round(width * scale), self.size)

    def __call__(self, frames_NHWC: Tensor) -> Tensor:
        """Resize and crop uint8 RGB frames to uint8 RGB [N, size, size, 3], never a view.

        On a CPU in 8-bit arithmetic, within one level of the exact result; on a GPU in float32.
        """
        import torch
        import torch.nn.functional as F

        count, height, width, _ = frames_NHWC.shape
        target = self.target(height, width)
        half_even = self.minimum_side is not None
        rows, columns = (center(side, self.size, half_even=half_even) for side in target)
        out_NHWC = frames_NHWC.new_empty((count, self.size, self.size, 3))
        if target == (height, width):
            return out_NHWC.copy_(frames_NHWC[:, rows, columns])
        for begin in range(0, count, RESIZED_AT_ONCE):
            part = slice(begin, begin + RESIZED_AT_ONCE)
            # Channels stay last in memory: torch's fast path for three bytes a pixel.
            frames_NCHW = frames_NHWC[part].contiguous().movedim(3, 1)
            if frames_NCHW.is_cuda:  # which has no 8-bit arithmetic
                frames_NCHW = frames_NCHW.float()
            resized_NCHW = F.interpolate(frames_NCHW, target, mode="bilinear", antialias=True)
            if frames_NCHW.is_cuda:
                resized_NCHW = resized_NCHW.round_().clamp_(0, 255).to(torch.uint8)
            out_NHWC[part] = resized_NCHW.movedim(1, 3)[:, rows, columns]
        return out_NHWC


def _numbers(name: str, values: object, count: int) -> tuple[float, ...]:
    if isinstance(values, Sequence) and len(values) == count:
        numbers = tuple(v for v in values if isinstance(v, int | float) and math.isfinite(v))
        if len(numbers) == count:
            return numbers
    raise ValueError(f"{name} must be {count} finite numbers; got {values!r}.")


def _check_pixels(name: str, value: object, *, at_least: int) -> None:
    if not isinstance(value, int) or value < at_least:
        raise ValueError(
            f"{name} must be a whole number of pixels, at least {at_least}; got {value!r}."
        )


Mode = Literal["windows", "dense"]

DENSE_STRIDE = 8  # frames between rows
DENSE_WINDOW = 16  # frames that a row covers nominally: two maps
TAILS = ("repeat_last", "none")  # what is repeated at a video's end to fill windows or dense maps
LAYERS = ("fc6", "fc7")  # of a C3D
ADDED = {"minimum_side": None, "repeats": "distinct"}  # these values are not in older provenance
NETWORKS = {"i3d": "an I3D", "c3d": "a C3D", "pytorchvideo": "a pytorchvideo"}


@dataclass(frozen=True)
class ExtractorSpec:
    """An extractor's checkpoint and how it is run; see `matters` for what models rely on.

    network: "i3d", "c3d" or "pytorchvideo". fps: None under the policy "own". window, stride:
    frames. longer_side: pixels to which frames are scaled as they are decoded. tail: "repeat_last"
    fills windows, and a dense run to a multiple of eight, with the last frame; "none" leaves a
    dense run as it is. layer: of a C3D. pca: reduces the rows.
    """

    name: str
    folder: Path
    digest: str
    network: str
    modality: str
    fps: float | None
    window: int
    stride: int
    config: Mapping[str, Any]
    preprocessing: Preprocessing | FlowPreprocessing
    mode: Mode = "windows"
    fps_policy: FpsPolicy = "ceiling"
    longer_side: int | None = None
    tail: str = "repeat_last"
    layer: str | None = None
    pca: Pca | None = None

    @property
    def matters(self) -> dict[str, Any]:
        """The part of the provenance that a model must agree with.

        `layer`, `flow` (how flow is computed, by any backend), `longer_side` and `pca` are present
        only if used, `preprocessing` of RGB only if config.json holds a whole profile: older
        features must still agree with older checkpoints.
        """
        matters: dict[str, Any] = {
            "extractor": self.name,
            "weights": self.digest,
            "mode": self.mode,
            "fps": self.fps,
            "fps_policy": self.fps_policy,
            "window": self.window,
            "stride": self.stride,
            "tail": self.tail,
        }
        if self.fps_policy == "exact":
            matters["fps_rounding"] = "near"  # ffmpeg's word; until 2026 it was "down"
        if self.longer_side is not None:
            matters["scaling"] = f"longer side {self.longer_side}, bicubic"
        if self.layer is not None:
            matters["layer"] = self.layer
        preprocessing = json.loads(json.dumps(asdict(self.preprocessing)))  # lists, no tuples
        preprocessing = {k: v for k, v in preprocessing.items() if ADDED.get(k, ...) != v}
        if isinstance(self.preprocessing, FlowPreprocessing):
            matters["flow"] = {"algorithm": "tvl1", "native": NATIVE_SOLVER, **preprocessing}
            matters["flow"] |= asdict(TVL1Settings())
        elif "fps_policy" in self.config:
            matters["preprocessing"] = preprocessing
        if self.pca is not None:
            matters["pca"] = self.pca.digest
        return matters

    @property
    def trained_on(self) -> str:
        return str(self.config["trained_on"])


def describe(
    name_or_folder: str,
    *,
    mode: str | None = None,
    fps_policy: str | None = None,
    layer: str | None = None,
    pca: Path | None = None,
) -> ExtractorSpec:
    """The spec of an extractor by registry name or checkpoint folder, downloaded if necessary.

    Args:
        mode: "windows" (overlapping, each on its own) or "dense" (I3D run over the whole video);
            None as the checkpoint's profile has it, else "windows".
        fps_policy: of `Decoder.frames`; None as the profile has it, else "ceiling".
        layer: of a C3D, "fc6" or "fc7"; by default as in its checkpoint.
        pca: file that reduces the rows, see `Pca.load`.

    Raises MmdistError for an unknown name, a damaged folder, a failed download, a setting of the
    checkpoint that is out of range, or an option that is unknown or does not fit the network.
    """
    folder = checkpoint_folder(name_or_folder)
    config = read_config(folder)
    path = folder / "config.json"
    try:
        network, modality, _ = config["network"], config["modality"], config["trained_on"]
        name = str(config.get("name", folder.name))
        checks = ("network", network, [*NETWORKS]), ("modality", modality, MODALITIES)
        for kind, value, valid in checks:
            if value not in valid:
                raise MmdistError(
                    f"{folder} holds the {kind} {value!r}; this version runs: {', '.join(valid)}."
                )
        mode = mode or config.get("mode", "windows")
        fps_policy = fps_policy or config.get("fps_policy", "ceiling")
        _check_options(name, network, mode, fps_policy, layer)
        own_layer = (layer or str(config["layer"])) if network == "c3d" else None
        if own_layer is not None:
            check_choice(f"In {path}, the layer", own_layer, LAYERS)
        window, stride = (_positive(path, config, key, whole=True) for key in ("window", "stride"))
        if mode == "dense":
            window, stride = DENSE_WINDOW, DENSE_STRIDE
        fps = float(_positive(path, config, "fps")) if fps_policy != "own" else None
        tail = config.get("tail", TAILS[0])
        check_choice(f"In {path}, the tail", tail, TAILS)
        longer_side = None
        if config.get("longer_side") is not None:
            longer_side = int(_positive(path, config, "longer_side", whole=True))
        reading: type[Preprocessing | FlowPreprocessing]
        reading = FlowPreprocessing if modality == "flow" else Preprocessing
        try:
            preprocessing = reading(**config["preprocessing"])
        except (TypeError, ValueError) as error:
            raise MmdistError(f"The preprocessing in {path} is wrong: {error}") from error
        return ExtractorSpec(
            name=name,
            folder=folder,
            digest=weights_digest(folder),
            network=network,
            modality=modality,
            fps=fps,
            window=int(window),
            stride=int(stride),
            config=config,
            preprocessing=preprocessing,
            mode=cast(Mode, mode),
            fps_policy=cast(FpsPolicy, fps_policy),
            longer_side=longer_side,
            tail=tail if mode == "dense" else TAILS[0],
            layer=own_layer,
            pca=None if pca is None else Pca.load(pca),
        )
    except KeyError as error:
        raise MmdistError(
            f"{path} has no {error.args[0]!r}: it is not an extractor's checkpoint."
        ) from error


def profile_of(config: Mapping[str, Any]) -> dict[str, str]:
    """How an extractor's input is made, as rows of text for people, in the order of the steps.

    config: of a checkpoint or a public entry, with the keys that `describe` reads.
    """
    given = config["preprocessing"]
    fps, size = config["fps"], given["size"]
    frames = {
        "ceiling": f"{fps:g} fps at most; a slower video keeps its own rate",
        "exact": f"{fps:g} fps exactly: frames are repeated or dropped, as by ffmpeg's fps filter",
        "own": "every frame, at the video's own rate",
    }
    what = "flow" if config["modality"] == "flow" else "frames"
    texts = {
        "longer_side": "longer side {0} (bicubic, as by ffmpeg's scale filter)",
        "shorter_side": "shorter side {0} (bilinear)",
        "minimum_side": what + " with a shorter side below {0} enlarged to it (bilinear)",
        "resize": "{0[0]}×{0[1]} (height × width, bilinear)",
        "whole": "the whole frame to {0}×{0} (bilinear)",
    }
    values = {**given, "longer_side": config.get("longer_side")}
    values["whole"] = None if given.get("crop") else size
    steps = [text.format(values[key]) for key, text in texts.items() if values.get(key)]
    profile = {
        "frames": frames[config.get("fps_policy", "ceiling")],
        "size": "; then ".join(steps),
        "crop": f"center {size}×{size}" if given.get("crop") else "none",
    }
    if what == "flow":
        pairs = "each frame and the next one, at that size"
        if given.get("repeats") == "still":
            pairs = "consecutive samples, before any enlarging; a repeated frame has none"
        bits = ", through 8 bits" if given.get("quantise") else ""
        profile["flow"] = f"TV-L1 between {pairs}"
        profile["values"] = f"±{given.get('bound', 20.0):g} pixels to [−1, 1], clipped{bits}"
    else:
        mean, std = (_short(given.get(name, HALF_RANGE)) for name in ("mean", "std"))
        order = given.get("channel_order", "rgb").upper()
        profile["values"] = f"(x − {mean}) / {std} of x in 0–255, {order}"
    dense = config.get("mode") == "dense"
    profile["mode"] = "dense: the whole video at once" if dense else "windows: each on its own"
    if dense and config.get("tail") == "none":
        profile["mode"] += ", no frame is repeated at its end"
    profile["window"] = f"{DENSE_WINDOW if dense else config['window']} frames"
    profile["stride"] = f"{DENSE_STRIDE if dense else config['stride']} frames"
    if "layer" in config:
        profile["layer"] = config["layer"]
    return profile


def _short(values: Sequence[float]) -> str:
    """One number where all are equal."""
    numbers = [f"{value:g}" for value in values]
    return numbers[0] if len(set(numbers)) == 1 else f"[{', '.join(numbers)}]"


def _check_options(name: str, network: str, mode: str, fps_policy: str, layer: str | None) -> None:
    check_choice("The mode", mode, get_args(Mode))
    check_choice("The fps policy", fps_policy, get_args(FpsPolicy))
    extractor = f"The extractor {name!r} is {NETWORKS[network]} network"
    if layer is not None:
        check_choice("The layer", layer, LAYERS)
        if network != "c3d":
            raise MmdistError(
                f"{extractor} and has no layer {layer!r} to choose; leave the layer out, or use a "
                "C3D extractor."
            )
    if mode == "dense" and network != "i3d":
        raise MmdistError(
            f"{extractor}, which reads windows only; use the mode 'windows', or an I3D extractor."
        )


def _positive(path: Path, config: Mapping[str, Any], key: str, *, whole: bool = False) -> float:
    value = config[key]
    number = not isinstance(value, bool) and isinstance(value, int if whole else int | float)
    if number and 0 < value < math.inf:
        return cast(float, value)
    needed = "a whole number, at least 1" if whole else "a finite number above 0"
    raise MmdistError(f"The {key} in {path} must be {needed}; got {value!r}.")
