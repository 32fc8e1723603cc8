"""Extractors by name, without torch: what a checkpoint says of itself and how it shall be run.

An `ExtractorSpec` is light, so that a second run finds out that there is nothing to do without
loading a network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from mmdist_e2e.extractors import dense
from mmdist_e2e.structures import MODALITIES, MmdistError
from mmdist_e2e.weights.registry import checkpoint_folder, read_config, weights_digest

if TYPE_CHECKING:
    from mmdist_e2e.extractors.pca import Pca

Mode = Literal["windows", "dense"]
FpsPolicy = Literal["ceiling", "exact"]
TAIL: Literal["repeat_last"] = "repeat_last"
LAYERS = ("fc6", "fc7")
NETWORKS = {"i3d": "I3D", "c3d": "C3D", "pytorchvideo": "pytorchvideo's"}


@dataclass(frozen=True)
class ExtractorSpec:
    """An extractor's checkpoint and the way it is run; see `matters` for what models rely on.

    network: "i3d", "c3d" or "pytorchvideo". window, stride: frames. layer: of a C3D. flow: how
    flow is computed, whatever the backend that computes it. pca: what reduces the rows.
    """

    name: str
    folder: Path
    digest: str
    network: str
    modality: str
    fps: float
    window: int
    stride: int
    config: Mapping[str, Any]
    mode: Mode = "windows"
    fps_policy: FpsPolicy = "ceiling"
    layer: str | None = None
    flow: Mapping[str, Any] | None = None
    pca: Pca | None = None

    @property
    def matters(self) -> dict[str, Any]:
        """The part of the provenance that a model must agree with.

        `layer`, `flow` and `pca` are there only where they apply.
        """
        matters: dict[str, Any] = {
            "extractor": self.name,
            "weights": self.digest,
            "mode": self.mode,
            "fps": self.fps,
            "fps_policy": self.fps_policy,
            "window": self.window,
            "stride": self.stride,
            "tail": TAIL,
        }
        if self.layer is not None:
            matters["layer"] = self.layer
        if self.flow is not None:
            matters["flow"] = dict(self.flow)
        if self.pca is not None:
            matters["pca"] = self.pca.digest
        return matters

    @property
    def trained_on(self) -> str:
        return str(self.config["trained_on"])


def describe(
    name_or_folder: str,
    *,
    mode: str = "windows",
    fps_policy: str = "ceiling",
    layer: str | None = None,
    pca: Path | None = None,
) -> ExtractorSpec:
    """The spec of an extractor by registry name or checkpoint folder, fetched if it must be.

    Args:
        mode: "windows" (overlapping ones, each alone) or "dense" (I3D run over the whole video).
        fps_policy: "ceiling" (a slower video keeps its rate) or "exact" (its frames are repeated).
        layer: of a C3D, "fc6" or "fc7"; by default what its checkpoint says.
        pca: file that reduces the rows, see `Pca.load`.

    Raises MmdistError for an unknown name, a damaged folder, a failed fetch, or an option that
    is unknown or does not fit the network.
    """
    folder = checkpoint_folder(name_or_folder)
    config = read_config(folder)
    try:
        network, modality = str(config["network"]), str(config["modality"])
        name = str(config.get("name", folder.name))
        _check(folder, network, modality)
        _check_options(name, network, mode, fps_policy, layer)
        return ExtractorSpec(
            name=name,
            folder=folder,
            digest=weights_digest(folder),
            network=network,
            modality=modality,
            fps=float(config["fps"]),
            window=dense.WINDOW if mode == "dense" else int(config["window"]),
            stride=dense.STRIDE if mode == "dense" else int(config["stride"]),
            config=config,
            mode=cast(Mode, mode),
            fps_policy=cast(FpsPolicy, fps_policy),
            layer=(layer or str(config["layer"])) if network == "c3d" else None,
            flow=_flow(folder, config) if modality == "flow" else None,
            pca=_load_pca(pca),
        )
    except KeyError as error:
        raise MmdistError(
            f"{folder / 'config.json'} has no {error.args[0]!r}: it is "
            f"not an extractor's checkpoint."
        ) from error


def _check(folder: Path, network: str, modality: str) -> None:
    for kind, value, valid in (
        ("network", network, tuple(NETWORKS)),
        ("modality", modality, MODALITIES),
    ):
        if value not in valid:
            raise MmdistError(
                f"{folder} holds the {kind} {value!r}; this version runs: {', '.join(valid)}."
            )


def _check_options(name: str, network: str, mode: str, fps_policy: str, layer: str | None) -> None:
    for option, value, valid in (
        ("mode", mode, get_args(Mode)),
        ("fps policy", fps_policy, get_args(FpsPolicy)),
        ("layer", layer or LAYERS[0], LAYERS),
    ):
        if value not in valid:
            raise MmdistError(f"The {option} {value!r} is unknown; valid: {', '.join(valid)}.")
    if layer is not None and network != "c3d":
        raise MmdistError(
            f"The extractor {name!r} is {_article(network)} network and has no layer {layer!r} to "
            f"choose; leave the layer out, or take a C3D extractor."
        )
    if mode == "dense" and network != "i3d":
        raise MmdistError(
            f"The extractor {name!r} is {_article(network)} network, which reads windows alone; "
            f"use the mode 'windows', or an I3D extractor."
        )


def _article(network: str) -> str:
    return f"{'an' if network == 'i3d' else 'a'} {NETWORKS[network]}"


def _load_pca(path: Path | None) -> Pca | None:
    if path is None:
        return None
    from mmdist_e2e.extractors.pca import Pca

    return Pca.load(path)


def _flow(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    from mmdist_e2e.extractors.flow import TVL1Settings
    from mmdist_e2e.extractors.flow_frames import FlowPreprocessing

    try:
        preprocessing = FlowPreprocessing(**config["preprocessing"])
    except (TypeError, ValueError) as error:
        raise MmdistError(f"The preprocessing in {folder / 'config.json'} is wrong: {error}") from (
            error
        )
    return {"algorithm": "tvl1", **asdict(preprocessing), **asdict(TVL1Settings())}
