"""Every name that `--extractor` takes: address, digest, licence, and what its network reads.

`shipped` networks are ours: small, trained on our synthetic world, and part of the wheel. `public`
ones are downloaded on first use, verified by digest, and converted to safetensors in the user's
cache. Without a digest nothing can be verified: the user supplies the file (`mmdist weights
convert`).
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmdist_e2e.store import write_atomically, write_json
from mmdist_e2e.structures import MmdistError
from mmdist_e2e.weights.download import Entry, fetch, file_sha256

if TYPE_CHECKING:
    from torch import Tensor


# Carreira & Zisserman's, for windows of 16 frames. The keys are those of `describe`.
SAMPLING = {"fps": 25.0, "fps_policy": "ceiling", "mode": "windows", "window": 16, "stride": 8}
# Charades' frames as its README makes them, read as piergiaj/pytorch-i3d's extraction does.
CHARADES = SAMPLING | {"fps": 24.0, "fps_policy": "exact", "longer_side": 320}
CHARADES |= {"mode": "dense", "tail": "none"}


def _config(
    network: str, modality: str, preprocessing: Mapping[str, Any], **more: Any
) -> dict[str, Any]:
    return {"network": network, "modality": modality, "preprocessing": preprocessing, **more}


def _i3d(modality: str, data: str, git_sha1: str, classes: int, facts: str) -> Entry:
    shape = {"in_channels": 3, "width": 1.0, "num_classes": classes}
    charades = data == "charades"
    size = (
        {"minimum_side": 224 if modality == "flow" else 226} if charades else {"shorter_side": 256}
    )
    preprocessing: dict[str, Any] = {"size": 224, "crop": 224, **size}
    if modality == "flow":
        shape["in_channels"] = 2
        preprocessing |= {"bound": 20.0, "quantise": True}
        preprocessing |= {"shorter_side": None, "repeats": "still"} if charades else {}
    sampling = CHARADES if charades else SAMPLING
    return Entry(
        name=f"i3d-{modality}-{data}",
        kind="public",
        facts=f"{facts}; Apache-2.0",
        config=_config("i3d", modality, preprocessing, **shape, **sampling),
        url=f"https://github.com/piergiaj/pytorch-i3d/raw/master/models/{modality}_{data}.pt",
        git_sha1=git_sha1,
    )


def openmmlab_c3d_key(key: str) -> str:
    """OpenMMLab's `conv1a.conv.weight` is our `conv1.weight`; fc6 and fc7 have the same names."""
    for theirs, ours in (("conv1a", "conv1"), ("conv2a", "conv2"), (".conv.", ".")):
        key = key.replace(theirs, ours)
    return key


def _c3d(
    name: str, url: str, facts: str, classes: int, preprocessing: dict[str, Any], **more: Any
) -> Entry:
    size = {"size": 112, "crop": 112}
    every_frame = SAMPLING | {"fps_policy": "own"}  # as ActivityNet's C3D features were made
    config = _config(
        "c3d", "rgb", size | preprocessing, num_classes=classes, layer="fc7", **every_frame
    )
    return Entry(name, "public", facts, config, url, **more)


def _backbone(name: str, file: str, frames: int, rate: int, side: int, crop: int) -> Entry:
    """A backbone of pytorchvideo's model zoo, published for clips of one length and rate.

    frames: of a clip, each the `rate`-th of 30 fps video. side: the shorter side after resizing,
    in pixels. Sides and crops are from its torch hub page, or else SlowFast's configurations.
    """
    size = {"size": crop, "shorter_side": side, "crop": crop}
    colours = {"mean": [0.45 * 255] * 3, "std": [0.225 * 255] * 3}
    sampling = {"fps": 30.0 / rate, "window": frames, "stride": frames // 2}
    return Entry(
        name=name,
        kind="public",
        facts=f"pytorchvideo, Kinetics-400, {frames} frames at 30/{rate} fps; Apache-2.0",
        config=_config("pytorchvideo", "rgb", size | colours, backbone=name, **sampling),
        url=f"https://dl.fbaipublicfiles.com/pytorchvideo/model_zoo/kinetics/{file}",
    )


KINETICS, THEN_CHARADES = "ImageNet inflated, Kinetics-400", "the same, then Charades"
FLOW_KINETICS = "ImageNet inflated, flow of Kinetics-400"

PUBLIC: tuple[Entry, ...] = (
    _i3d("rgb", "imagenet", "73a4fd1d87eb3dbd97f33a9779fa1caa3d28111a", 400, KINETICS),
    _i3d("rgb", "charades", "ae56da9f0d1cdefd9643d1ca6c1b5b944f9e7467", 157, THEN_CHARADES),
    _i3d("flow", "imagenet", "ef0e7c282a102f76b14b52643574b80acba4e475", 400, FLOW_KINETICS),
    _i3d("flow", "charades", "e609545f2ae2d992ca715b819ed6b53b8f5c8b95", 157, THEN_CHARADES),
    _c3d(
        "c3d-sports1m-mm",
        "https://download.openmmlab.com/mmaction/recognition/c3d/"
        "c3d_sports1m_pretrain_20201016-dcc47ddc.pth",
        "OpenMMLab, Sports-1M, 311,985,866 bytes, no fc8; Apache-2.0",
        0,
        # As in its fine-tuning configuration for UCF-101; the means of R, G, B in this order.
        {"resize": [128, 171], "mean": [104, 117, 128], "std": [1, 1, 1]},
        sha256="dcc47ddcdc7dd62eabc24bc70491b47c82b3b1045b864c52f6bdb669243dfcff",
        rename=openmmlab_c3d_key,
    ),
    _c3d(
        "c3d-sports1m",
        "http://imagelab.ing.unimore.it/files/c3d_pytorch/c3d.pickle",
        "DavideA/c3d-pytorch, Sports-1M; preprocessing of its predict.py: RGB, 112×200, no mean "
        "(its Caffe original: BGR, 128×171, less the mean); the code is MIT",
        487,
        {"resize": [112, 200], "mean": [0, 0, 0], "std": [1, 1, 1]},
    ),
    _backbone("slow_r50", "SLOW_8x8_R50.pyth", 8, 8, 256, 256),
    _backbone("slowfast_r50", "SLOWFAST_8x8_R50.pyth", 32, 2, 256, 256),
    _backbone("slowfast_r101", "SLOWFAST_8x8_R101.pyth", 32, 2, 256, 256),
    _backbone("i3d_r50", "I3D_8x8_R50.pyth", 8, 8, 256, 256),
    _backbone("c2d_r50", "C2D_8x8_R50.pyth", 8, 8, 256, 256),
    _backbone("x3d_xs", "X3D_XS.pyth", 4, 12, 182, 182),
    _backbone("x3d_s", "X3D_S.pyth", 13, 6, 182, 182),
    _backbone("x3d_m", "X3D_M.pyth", 16, 5, 256, 256),
    _backbone("x3d_l", "X3D_L.pyth", 16, 5, 356, 356),
    _backbone("mvit_base_16x4", "MVIT_B_16x4.pyth", 16, 4, 256, 224),
    _backbone("mvit_base_32x3", "MVIT_B_32x3_f294077834.pyth", 32, 3, 256, 224),
)

SHIPPED_ROOT = Path(__file__).parent / "data"

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
    """Where downloaded weights and cached features are kept; MMDIST_CACHE overrides it."""
    if own := os.environ.get("MMDIST_CACHE"):
        return Path(own)
    import platformdirs

    with suppress(RuntimeError):
        folder = platformdirs.user_cache_path("mmdist", appauthor=False)
        if folder.is_absolute():
            return folder
    return Path("/.cache/mmdist")  # without a home folder "/" is one, as in a container


def cached_folder(entry: Entry) -> Path:
    """Where the converted weights of a public entry are kept, whether they exist or not."""
    return cache_folder() / "weights" / entry.name


def is_available(entry: Entry) -> bool:
    """Whether an entry can be used without a download."""
    # config.json is written last, so its presence means a complete folder.
    return entry.kind == "shipped" or (cached_folder(entry) / "config.json").is_file()


def checkpoint_folder(name_or_path: str) -> Path:
    """The checkpoint folder of an extractor; a public one is downloaded on first use.

    name_or_path: a registry name, or a folder with config.json and model.safetensors.
    Raises MmdistError for an unknown name, a folder that is no checkpoint, public weights that
    the user must supply, a failed download, a wrong digest, or a cache that cannot be written.
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
    folder = cached_folder(entry)
    if not is_available(entry):
        if not entry.has_digest:
            raise MmdistError(
                f"The weights {entry.name!r} are not downloaded automatically, because no digest "
                f"of them is known; download {entry.url} and run once: "
                f"mmdist weights convert {entry.name} FILE --out {shlex.quote(str(folder))}"
            )
        _install(entry, folder)
    return folder


def _install(entry: Entry, folder: Path) -> None:
    """Download and convert, one process at a time: the others wait and use the result."""
    import shutil
    import tempfile

    from filelock import FileLock

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{entry.name}.lock")):
            if is_available(entry):
                return
            for left_over in folder.glob("download-*"):  # of a killed process
                shutil.rmtree(left_over, ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=folder, prefix="download-") as temporary:
                state = read_state(entry, fetch(entry, Path(temporary)))
            write_checkpoint(folder, entry, state, f"downloaded from {entry.url}")
    except (OSError, NotImplementedError) as error:  # a file system without locks
        raise MmdistError(
            f"The weights {entry.name!r} cannot be kept in {folder} "
            f"({getattr(error, 'strerror', None) or error}); set MMDIST_CACHE to a folder that can "
            f"be written."
        ) from error


def read_state(entry: Entry, path: Path) -> dict[str, Tensor]:
    """The weights in a public file, under our keys; no code in the file is run.

    Raises MmdistError for a file that does not hold named tensors.
    """
    import torch

    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise MmdistError(f"'{path}' cannot be read ({error}); give a readable file.") from error
    except Exception as error:  # damaged bytes read as a pickle raise anything at all
        raise MmdistError(
            f"'{path}' does not hold the weights {entry.name!r} in a form that can be opened "
            f"without running its code; give the public file as it was downloaded."
        ) from error
    for wrapper in ("model_state", "state_dict"):  # pytorchvideo's, and the usual name
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

    origin: where the file came from, for `trained_on`. Raises as write_atomically.
    """
    from safetensors.torch import save

    assert entry.config is not None
    write_atomically(folder / "model.safetensors", save(dict(state)))
    facts = f"public weights, {origin}: {entry.facts}"
    write_json(folder / "config.json", {**entry.config, "name": entry.name, "trained_on": facts})


def read_config(folder: Path) -> dict[str, Any]:
    """A checkpoint's config.json. Raises MmdistError when it is missing or holds no settings."""
    with suppress(OSError, ValueError):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if isinstance(config, dict):
            return config
    raise MmdistError(f"{folder} is not a checkpoint folder: config.json is missing or damaged.")


def weights_digest(folder: Path) -> str:
    """First 16 hexadecimal digits of the SHA-256 of model.safetensors."""
    try:
        return file_sha256(folder / "model.safetensors")[:16]
    except OSError as error:
        raise MmdistError(
            f"{folder} is not a checkpoint folder: model.safetensors is missing."
        ) from error


def misfits(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """Why the weights `given` cannot be loaded into a network, in words; "" when they can.

    expected: the network's own. BatchNorm's counters may be missing: inference reads none.
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
        f"{kind} {', '.join(keys[:3])}{' …' if len(keys) > 3 else ''}"
        for kind, keys in kinds.items()
        if keys
    )
