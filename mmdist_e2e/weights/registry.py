"""The registry: every name that `--extractor` takes, with address, digest and facts.

Two kinds live side by side and are never mixed up: `shipped` networks are ours, small, trained on
our own synthetic world, and come in the wheel; `public` ones are fetched on first use (a network
is needed), verified by digest, and converted once to safetensors in the user's cache. Where no
digest is known, the user brings the file.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import shlex
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from mmdist_e2e.store import write_atomically, write_json
from mmdist_e2e.structures import MmdistError
from mmdist_e2e.weights.public import PUBLIC, Entry

if TYPE_CHECKING:
    from torch import Tensor

SHIPPED_ROOT = Path(__file__).parent / "data"
FETCH_TIMEOUT_SECONDS = 60
FETCH_BLOCK_BYTES = 1 << 20
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


def git_blob_sha1(path: Path) -> str:
    """The id of a file as a git object."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as stream:
        while block := stream.read(FETCH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_digest(entry: Entry, path: Path) -> None:
    """Compare a file with every digest that the entry knows.

    Raises MmdistError for a wrong one, or a file that cannot be read.
    """
    for expected, compute in ((entry.git_sha1, git_blob_sha1), (entry.sha256, file_sha256)):
        if expected is None:
            continue
        try:
            actual = compute(path)
        except OSError as error:
            raise MmdistError(
                f"'{path}' cannot be read ({error.strerror}); give a readable file."
            ) from error
        if actual != expected:
            raise MmdistError(
                f"The file has the digest {actual}, not {expected}: it is not the file of the "
                f"weights {entry.name!r}; fetch it again from {entry.url}."
            )


def fetch(entry: Entry, path: Path) -> None:
    """Download an entry's file to `path` and verify it; a wrong file is never left behind.

    Raises MmdistError when the address cannot be reached or the content is not the expected one.
    """
    assert entry.url is not None
    assert entry.has_digest
    url = entry.url

    def copy(stream: IO[bytes]) -> None:
        request = urllib.request.Request(url, headers={"User-Agent": "mmdist"})  # noqa: S310
        with urllib.request.urlopen(request, timeout=FETCH_TIMEOUT_SECONDS) as answer:  # noqa: S310
            while block := answer.read(FETCH_BLOCK_BYTES):
                stream.write(block)

    temporary = path.with_name(path.name + ".unverified")
    try:
        _download(copy, temporary, url, entry.name)
        check_digest(entry, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _download(copy: Callable[[IO[bytes]], None], path: Path, url: str, name: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as stream:
            copy(stream)
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
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
        return file_sha256(path)[:16]
    except OSError as error:
        raise MmdistError(
            f"{folder} is not a checkpoint folder: model.safetensors is missing."
        ) from error
