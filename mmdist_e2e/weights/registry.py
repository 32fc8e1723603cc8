"""Every name that `--extractor`, `--model` and `mmdist pull` take: address, digest, licence.

`shipped` networks are ours: small, trained on our synthetic world, and part of the wheel. The
others are downloaded on first use, verified by digest, and converted to safetensors in the user's
cache. Without a digest nothing can be verified: the user supplies the file (`mmdist pull --from`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmdist_e2e.store import write_atomically, write_json
from mmdist_e2e.structures import MmdistError, check_choice
from mmdist_e2e.weights.download import Entry, Progress, fetch, file_sha256

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


KINETICS = "ImageNet inflated, Kinetics-400"
THEN_CHARADES = f"{KINETICS}, then Charades"
FLOW_KINETICS = "ImageNet inflated, flow of Kinetics-400"
WORLD = "the synthetic world, version 2; Apache-2.0"

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
        "DavideA/c3d-pytorch, converted from the Caffe original, Sports-1M; the code is MIT",
        487,
        # As the Caffe original, whose fc7 ActivityNet published: BGR, 128×171, less its mean cube,
        # here as one rounded value per channel (R, G, B), as other public ports have it.
        {"resize": [128, 171], "mean": [102, 98, 90], "std": [1, 1, 1], "channel_order": "bgr"},
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

CPL = "https://github.com/minghangz/cpl/raw/main"
PCA, PCA_PAGE = "activitynet-pca", "http://activity-net.org/challenges/2016/download.html"
NO_LICENCE = "its repository gives no licence"


def _cpl(data: str, title: str, model_id: str, words_id: str, *needs: str) -> tuple[Entry, Entry]:
    """CPL's checkpoint for a dataset and its vocabulary, by their ids as git objects."""
    model, glove = f"{CPL}/checkpoints/{data}/model-best.pt", f"{CPL}/data/{data}/glove.pkl"
    about = f"CPL's vocabulary of {title}, with GloVe vectors; {NO_LICENCE}"
    words = Entry(f"cpl-vocabulary-{data}", "file", about, None, glove, words_id)
    about = f"CPL (CVPR 2022), trained on {title}; {NO_LICENCE}"
    needs = (*needs, words.name)
    return words, Entry(f"cpl-{data}", "model", about, None, model, model_id, needs=needs)


ENTRIES: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry("world2-rgb", "shipped", f"ours, RGB of {WORLD}"),
        Entry("world2-flow", "shipped", f"ours, flow of {WORLD}"),
        *PUBLIC,
        Entry("student-world2", "model", f"ours, {WORLD}"),
        *_cpl(
            "charades",
            "Charades-STA",
            "fce37334803d3d937de27e60f95c0bb63730c215",
            "e0320a97dc583316c2b56ace462b1fafc326691b",
            "i3d-rgb-charades",
        ),
        *_cpl(
            "activitynet",
            "ActivityNet Captions",
            "ced320db35e7109b9a17966be8ac2ef915749553",
            "4384500e128d5c450b4b8de9e46f34b1223f8e64",
            "c3d-sports1m",
            PCA,
        ),
        Entry(PCA, "file", "PCA_activitynet_v1-3.hdf5, for C3D features; unknown", None, PCA_PAGE),
    )
}

# Terms of training data, by the word that names them in an entry's facts.
TERMS = {
    "ImageNet": "non-commercial research and education",
    "Kinetics": "list of videos CC BY 4.0; the videos belong to those who uploaded them",
    "Charades": "non-commercial research, by the Allen Institute for AI",
    "Sports-1M": "list of videos CC BY 3.0; the videos belong to those who uploaded them",
    "ActivityNet": "unknown; the videos belong to those who uploaded them",
    "GloVe": "public domain",
    "synthetic world": "drawn by mmdist, Apache-2.0",
}

DEFAULT_RGB_EXTRACTOR = "world2-rgb"
SHIPPED_MODEL = SHIPPED_ROOT / "student-world2"
# What config.json records of a public file, beside the entry's own config.
RECORD = ("name", "trained_on", "source", "files")
Writer = Callable[[Entry, Path, Path], None]


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
    """Where an entry is kept, whether it is there or not."""
    return (SHIPPED_ROOT if entry.ships else cache_folder() / "weights") / entry.name


def is_available(entry: Entry) -> bool:
    """Whether an entry can be used without a download."""
    # config.json is written last, so its presence means a complete folder.
    return entry.ships or (cached_folder(entry) / "config.json").is_file()


def find(name: str, *kinds: str) -> Entry:
    """The entry of a name, of some kinds. Raises MmdistError, with the nearest name, for others."""
    names = [entry.name for entry in ENTRIES.values() if not kinds or entry.kind in kinds]
    check_choice("The name or folder", name, names)
    return ENTRIES[name]


def checkpoint_folder(name_or_path: str) -> Path:
    """The checkpoint folder of an extractor; a public one is downloaded on first use.

    name_or_path: a registry name, or a folder with config.json and model.safetensors.
    Raises MmdistError for an unknown name, a folder that is no checkpoint, public weights that
    the user must supply, a failed download, a wrong digest, or a cache that cannot be written.
    """
    folder = Path(name_or_path)
    whole = all((folder / name).is_file() for name in ("config.json", "model.safetensors"))
    if whole and name_or_path not in ENTRIES:
        return folder
    entry = find(name_or_path, "shipped", "public")
    folder = cached_folder(entry)
    if not is_available(entry):
        check_supplied([entry])
        install(entry, write_network, None)
    elif entry.kind == "public":
        config = read_config(folder)
        record = {key: config[key] for key in RECORD if key in config}
        current = json.loads(json.dumps(entry.config)) | record
        if config != current:  # an older version made it, with another profile
            write_json(folder / "config.json", current)
    return folder


def check_supplied(entries: Iterable[Entry]) -> None:
    """Raises MmdistError naming all that are missing and that only the user can supply."""
    missing = [e for e in entries if not e.digest and not is_available(e)]
    if missing:
        steps = [f"\n  mmdist pull {e.name} --from FILE    (FILE: from {e.url})" for e in missing]
        raise MmdistError(
            f"mmdist knows no digest to verify {' and '.join(e.name for e in missing)} by, so it "
            f"does not download it; get the file yourself and run once:{''.join(steps)}"
        )


def install(entry: Entry, write: Writer, file: Path | None, progress: Progress = None) -> None:
    """Make an entry's folder in the cache, one process at a time: the others wait and use it.

    write: called with the entry, its folder and the public file; without `file` a download.
    Raises MmdistError as `fetch` and `write`, and when the cache cannot be written.
    """
    from filelock import FileLock

    folder = cached_folder(entry)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{entry.name}.lock")):
            if file is None and is_available(entry):
                return
            source = file or fetch(entry, folder.parent, progress)
            write(entry, folder, source)
            if file is None:
                source.unlink()
    except (OSError, NotImplementedError) as error:  # a file system without locks
        raise MmdistError(
            f"{entry.name!r} cannot be kept in {folder} "
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


def write_network(
    entry: Entry, folder: Path, file: Path, expected: Mapping[str, Tensor] | None = None
) -> None:
    """Convert a video network's public file. Raises MmdistError where it is not as `expected`."""
    from safetensors.torch import save

    state = read_state(entry, file)
    if expected and (problems := misfits(expected, state)):
        raise MmdistError(
            f"The file does not hold the weights {entry.name!r} ({problems}); give the file of "
            f"{entry.url}."
        )
    write_files(entry, folder, file, {"model.safetensors": save(state)})


def write_files(entry: Entry, folder: Path, file: Path, files: Mapping[str, bytes]) -> None:
    """Write what was made of a public file and, last, config.json with all digests."""
    (folder / "config.json").unlink(missing_ok=True)
    for name, content in files.items():
        write_atomically(folder / name, content)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    source = source_of(file)
    facts = f"public weights of SHA-256 {source['sha256'][:16]}…: {entry.facts}"
    record = dict(zip(RECORD, (entry.name, facts, source, digests), strict=True))
    write_json(folder / "config.json", {**(entry.config or {}), **record})


def source_of(file: Path) -> dict[str, Any]:
    """SHA-256 and size of a public file."""
    return {"sha256": file_sha256(file), "bytes": file.stat().st_size}


def pulled_file(name: str) -> Path:
    """The file of an entry of the kind "file". Raises MmdistError when the user must supply it."""
    check_supplied([ENTRIES[name]])
    return cached_folder(ENTRIES[name]) / name


def file_named(path: Path) -> Path:
    """The path, or the file in the cache that it names. Raises MmdistError before it is pulled."""
    entry = ENTRIES.get(str(path))
    is_name = entry is not None and entry.kind == "file" and not path.exists()
    return pulled_file(str(path)) if is_name else path


def read_config(folder: Path) -> dict[str, Any]:
    """A checkpoint's config.json. Raises MmdistError when it is missing or holds no settings."""
    with suppress(OSError, ValueError):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if isinstance(config, dict):
            return config
    raise MmdistError(f"{folder} is not a checkpoint folder: config.json is missing or damaged.")


def damage(folder: Path) -> str:
    """What is wrong with a folder, by the SHA-256 that were recorded of its files; or ""."""
    try:
        files = {folder / name: digest for name, digest in read_config(folder)["files"].items()}
        bad = [p.name for p, sha in files.items() if not p.is_file() or file_sha256(p) != sha]
    except KeyError:
        return "no digests were recorded"
    except (MmdistError, OSError) as error:
        return str(error).removesuffix(".")
    return f"{', '.join(bad)} changed or went missing since" if bad else ""


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
