"""Fetching by name everything that a model or an extractor needs, and checking it again later.

Like cpl.py, it stands above the extractors and the grounding models, and imports them lazily.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mmdist_e2e.store import write_json
from mmdist_e2e.structures import MmdistError, Provenance
from mmdist_e2e.weights import registry
from mmdist_e2e.weights.download import Entry, Progress, check_digest, file_sha256


def model_folder(name: str, progress: Progress = None) -> Path:
    """The checkpoint folder of a grounding model by its name. Raises MmdistError as `pull`."""
    return pull(registry.find(name, "model").name, progress=progress)[name]


def pull(
    *names: str,
    file: Path | None = None,
    digest: str | None = None,
    progress: Progress = None,
) -> dict[str, Path]:
    """Put the names and all that they need into the cache; returns the folder of each.

    file: the public file of the only name, and its SHA-256; by default it is downloaded.
    Raises MmdistError for an unknown name, a wrong file, a failed download, and, naming them all,
    for what only the user can supply.
    """
    if file is not None or digest is not None:
        if file is None or len(names) != 1:
            raise MmdistError("--from FILE, with or without --digest, is for one NAME.")
        check_file(registry.find(names[0]), file, digest)
    wanted = dict.fromkeys(n for name in names for n in (*registry.find(name).needs, name))
    entries = [registry.find(name) for name in wanted]
    registry.check_supplied(entry for entry in entries if file is None or entry.name not in names)
    for entry in entries:
        registry.install(entry, write, file if entry.name in names else None, progress)
        if entry.needs:
            _agree_with_needs(entry)
    return {entry.name: registry.cached_folder(entry) for entry in entries}


def _agree_with_needs(entry: Entry) -> None:
    """Make a model read the features that its extractor, with its profile and PCA, now gives."""
    folders = {name: registry.cached_folder(registry.find(name)) for name in entry.needs}
    needs = {name: file_sha256(folder / "config.json") for name, folder in folders.items()}
    path = registry.cached_folder(entry) / "config.json"
    config = registry.read_config(path.parent)
    if config.get("needs") != needs:
        features = _features(entry, config["model"]["feature_dim"])
        write_json(path, config | {"features": features, "needs": needs})


def check_file(entry: Entry, file: Path, digest: str | None) -> None:
    """Raises MmdistError unless `file` can be that of the entry, with the SHA-256 `digest`."""
    if entry.ships:
        raise MmdistError(f"{entry.name!r} ships with mmdist and needs no file.")
    if not (file.is_file() and os.access(file, os.R_OK)):
        raise MmdistError(f"There is no file '{file}' to read; download it from {entry.url}.")
    check_digest(entry, file)
    if digest is not None:
        check_digest(replace(entry, git_sha1=None, sha256=digest.strip().lower()), file)


def write(entry: Entry, folder: Path, file: Path) -> None:
    """Make an entry's folder from its public file. Raises MmdistError where it does not fit."""
    if entry.kind == "model":
        from mmdist_e2e.weights.cpl import convert_cpl

        words = registry.file_named(Path(entry.needs[-1]))
        convert_cpl(file, words, folder, partial(_features, entry))
    elif entry.kind == "file":
        if not entry.digest:
            from mmdist_e2e.extractors.networks.pca import Pca

            Pca.load(file)
        registry.write_file(entry, folder, file)
    else:
        from mmdist_e2e.extractors.runner import build

        assert entry.config is not None
        registry.write_network(entry, folder, file, build(entry.config).state_dict())


def _features(entry: Entry, channels: int) -> dict[str, Mapping[str, Any]]:
    """Modality and provenance of the features that a model's extractor gives.

    The extractor external:NAME stands for imported features.
    Raises MmdistError for an unknown extractor, or one that does not give so many channels.
    """
    extractor, *reduced, _ = entry.needs
    if extractor.startswith("external:"):
        return {"rgb": Provenance.external(extractor.removeprefix("external:")).matters}

    import torch

    from mmdist_e2e.extractors.networks.pca import COMPONENTS
    from mmdist_e2e.extractors.profiles import describe
    from mmdist_e2e.extractors.runner import build

    pca = registry.file_named(Path(reduced[0])) if reduced else None
    spec = describe(extractor, pca=pca)
    with torch.device("meta"):
        own = COMPONENTS if pca else build(spec.config).feature_channels
    if own != channels:
        raise MmdistError(
            f"The checkpoint reads features of {channels} channels and the extractor "
            f"{extractor!r} gives {own}; name another, or external:hdf5 for published features."
        )
    return {spec.modality: spec.matters}
