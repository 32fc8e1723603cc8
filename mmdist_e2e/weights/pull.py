"""Fetching by name everything that a model or an extractor needs, and checking it again later.

Like cpl.py, it stands above the extractors and the grounding models, and imports them lazily.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmdist_e2e.store import write_json
from mmdist_e2e.structures import MmdistError, Provenance
from mmdist_e2e.weights.download import Entry, Progress, check_digest, file_sha256
from mmdist_e2e.weights.registry import (
    MODELS,
    cached_folder,
    check_supplied,
    checkpoint_folder,
    find,
    install,
    is_available,
    misfits,
    nearest,
    pulled_file,
    read_config,
    read_state,
    write_checkpoint,
    write_files,
)


def model_folder(name_or_path: str | Path, progress: Progress = None) -> Path:
    """The checkpoint folder of a grounding model; a public one is pulled on first use.

    Raises MmdistError where there is neither a folder nor a model of that name, and as `pull`.
    """
    name = str(name_or_path)
    if Path(name).exists():
        return Path(name)
    if name not in MODELS:
        raise MmdistError(
            f"There is no folder {name!r} and no model of that name{nearest(name, MODELS)}, or a "
            f"folder that mmdist train wrote."
        )
    return pull(name, progress=progress)


def pull(
    name: str,
    *,
    file: Path | None = None,
    digest: str | None = None,
    progress: Progress = None,
) -> Path:
    """Put what `name` needs into the cache, unless it is there; returns the folder of `name`.

    file: its public file, by default downloaded. digest: SHA-256 that the file must have.
    Raises MmdistError for an unknown name, a wrong file or digest, a failed download, and, naming
    them all, for what only the user can supply.
    """
    entry = find(name)
    if file is not None:
        check_file(entry, file, digest)
    elif digest is not None and not entry.has_digest:
        entry = _with_digest(entry, digest)
    needs = [find(need) for need in entry.needs]
    check_supplied([*needs, *([entry] if file is None else [])])
    for need in needs:
        pull(need.name, progress=progress)
    folder = cached_folder(entry)
    if file is not None or not is_available(entry):
        install(entry, WRITERS[entry.kind], file, progress)
    if entry.kind == "public":
        return checkpoint_folder(name)
    if needs:
        config = read_config(folder)
        if config.get("needs") != (made_for := _configs(entry)):  # a profile or file is another
            modality, matters = _features(entry, config["model"]["feature_dim"])
            changed = {"features": {modality: matters}, "needs": made_for}
            write_json(folder / "config.json", config | changed)
    return folder


def check_file(entry: Entry, file: Path, digest: str | None) -> None:
    """Raises MmdistError unless `file` can be that of the entry, with the SHA-256 `digest`."""
    if entry.kind == "shipped":
        raise MmdistError(f"{entry.name!r} ships with mmdist and needs no file.")
    if not file.is_file():
        raise MmdistError(f"There is no file '{file}'; download it from {entry.url}.")
    check_digest(entry, file)
    if digest is not None:
        check_digest(_with_digest(entry, digest), file)


def _with_digest(entry: Entry, digest: str) -> Entry:
    digest = digest.strip().lower()
    if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        raise MmdistError(f"--digest needs a SHA-256 of 64 hexadecimal digits; got {digest!r}.")
    return replace(entry, git_sha1=None, sha256=digest)


def write_network(entry: Entry, folder: Path, file: Path) -> None:
    """Convert a video network's public weights. Raises MmdistError when they do not fit it."""
    from mmdist_e2e.extractors.runner import build

    assert entry.config is not None
    state = read_state(entry, file)
    if problems := misfits(build(entry.config).state_dict(), state):
        raise MmdistError(
            f"The file does not hold the weights {entry.name!r} ({problems}); give the file of "
            f"{entry.url}."
        )
    write_checkpoint(entry, folder, file, state)


def _write_file(entry: Entry, folder: Path, file: Path) -> None:
    if not entry.has_digest:
        from mmdist_e2e.extractors.networks.pca import Pca

        Pca.load(file)
    write_files(entry, folder, file, {entry.name: file.read_bytes()})


def _write_model(entry: Entry, folder: Path, file: Path) -> None:
    from mmdist_e2e.weights.cpl import PUBLISHED_FEATURES, convert_cpl, read_cpl

    released = read_cpl(file)
    modality, matters = _features(entry, released.recipe.model.feature_dim)
    vocabulary = pulled_file(entry.needs[1])
    others = PUBLISHED_FEATURES
    convert_cpl(released, vocabulary, folder, modality=modality, matters=matters, accepts=others)


WRITERS = {"public": write_network, "file": _write_file, "model": _write_model}


def _features(entry: Entry, channels: int) -> tuple[str, Mapping[str, Any]]:
    """Modality and provenance of the features that a model reads, by the profile of its needs."""
    extractor, _, *pca = entry.needs
    return extracted_features(extractor, channels, pulled_file(pca[0]) if pca else None)


def _configs(entry: Entry) -> dict[str, str]:
    """Digests of the needs' config.json: of their profiles, and of their files' digests."""
    return {n: file_sha256(cached_folder(find(n)) / "config.json") for n in entry.needs}


def extracted_features(
    extractor: str, channels: int, pca: Path | None = None
) -> tuple[str, Mapping[str, Any]]:
    """Modality and provenance of an extractor's features, or of imported ones (external:NAME).

    Raises MmdistError for an unknown extractor, or one that does not give so many channels.
    """
    if extractor.startswith("external:"):
        return "rgb", Provenance.external(extractor.removeprefix("external:")).matters

    import torch

    from mmdist_e2e.extractors.profiles import describe
    from mmdist_e2e.extractors.runner import build

    spec = describe(extractor, pca=pca)
    with torch.device("meta"):
        own = build(spec.config).feature_channels
    if spec.pca is not None:
        own = spec.pca.basis_DK.shape[1]
    if own != channels:
        raise MmdistError(
            f"The checkpoint reads features of {channels} channels and the extractor "
            f"{extractor!r} gives {own}; name another, or leave --extractor out to use the "
            f"published features."
        )
    return spec.modality, spec.matters


def damage(name_or_folder: str) -> str:
    """What is wrong with files, by their recorded SHA-256, and how to repair it; "" for nothing.

    Raises MmdistError for an unknown name and for one that is not in the cache.
    """
    folder, files = Path(name_or_folder), {}
    repair = "make the folder again"
    if not folder.is_dir():
        entry = find(name_or_folder)
        folder = cached_folder(entry)
        if not is_available(entry):
            raise MmdistError(
                f"{entry.name!r} is not in the cache; get it with: mmdist pull {entry.name}"
            )
        repair = f"delete {folder} and run: mmdist pull {entry.name}"
        if entry.kind == "shipped":
            files, repair = {"model.safetensors": entry.sha256}, "install mmdist again"
    problems = []
    try:
        files = files or read_config(folder)["files"]
        for name, expected in files.items():
            if not (folder / name).is_file():
                problems.append(f"{name} is missing")
            elif file_sha256(folder / name) != expected:
                problems.append(f"{name} is not as it was written")
    except KeyError:
        problems.append("no digests were recorded")
    except (MmdistError, OSError) as error:
        problems.append(str(error))
    return f"{', '.join(problems)}; {repair}." if problems else ""
