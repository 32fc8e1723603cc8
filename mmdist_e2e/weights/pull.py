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
    ENTRIES,
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
    if name not in ENTRIES or ENTRIES[name].kind != "model":
        raise MmdistError(f"There is no folder and no model {name!r}{nearest(name, 'model')}.")
    return pull(name, progress=progress)[name]


def pull(*names: str, file: Path | None = None, progress: Progress = None) -> dict[str, Path]:
    """Put the names and all that they need into the cache; returns the folder of each.

    file: the public file of the only name; by default, and for what it needs, downloaded.
    Raises MmdistError for an unknown name, a wrong file, a failed download, and, naming them all,
    for what only the user can supply.
    """
    wanted = dict.fromkeys(n for name in names for n in (*find(name).needs, name))
    entries = [find(name) for name in wanted]
    check_supplied(entry for entry in entries if file is None or entry.name not in names)
    for entry in entries:
        given = file if entry.name in names else None
        if given or not is_available(entry):
            install(entry, write, given, progress)
        if entry.kind == "public":
            checkpoint_folder(entry.name)
        elif entry.needs:
            _agree_with_needs(entry)
    return {entry.name: cached_folder(entry) for entry in entries}


def _agree_with_needs(entry: Entry) -> None:
    """Make a model read the features that its extractor, with its profile and PCA, now gives."""
    needs = {n: file_sha256(cached_folder(find(n)) / "config.json") for n in entry.needs}
    path = cached_folder(entry) / "config.json"
    config = read_config(path.parent)
    if config.get("needs") != needs:
        extractor, *pca, _ = entry.needs
        reduced = pulled_file(pca[0]) if pca else None
        channels = config["model"]["feature_dim"]
        features = dict([extracted_features(extractor, channels, reduced)])
        write_json(path, config | {"features": features, "needs": needs})


def check_file(entry: Entry, file: Path, digest: str | None) -> None:
    """Raises MmdistError unless `file` can be that of the entry, with the SHA-256 `digest`."""
    if entry.ships:
        raise MmdistError(f"{entry.name!r} ships with mmdist and needs no file.")
    if not file.is_file():
        raise MmdistError(f"There is no file '{file}'; download it from {entry.url}.")
    check_digest(entry, file)
    if digest is not None:
        digest = digest.strip().lower()
        if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
            raise MmdistError(f"--digest needs a SHA-256 of 64 hexadecimal digits; got {digest!r}.")
        check_digest(replace(entry, git_sha1=None, sha256=digest), file)


def write(entry: Entry, folder: Path, file: Path) -> None:
    """Make an entry's folder from its public file. Raises MmdistError where it does not fit."""
    if entry.kind == "model":
        from mmdist_e2e.weights.cpl import PUBLISHED_FEATURES, convert_cpl, read_cpl

        reads, words = {"extractor": entry.needs[0]}, pulled_file(entry.needs[-1])
        convert_cpl(read_cpl(file), words, folder, matters=reads, accepts=PUBLISHED_FEATURES)
    elif entry.kind == "file":
        if not entry.digest:
            from mmdist_e2e.extractors.networks.pca import Pca

            Pca.load(file)
        write_files(entry, folder, file, {entry.name: file.read_bytes()})
    else:
        from mmdist_e2e.extractors.runner import build

        assert entry.config is not None
        state = read_state(entry, file)
        if problems := misfits(build(entry.config).state_dict(), state):
            raise MmdistError(
                f"The file does not hold the weights {entry.name!r} ({problems}); give the file of "
                f"{entry.url}."
            )
        write_checkpoint(entry, folder, file, state)


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


def damage(folder: Path) -> str:
    """What is wrong with a folder, by the SHA-256 that were recorded of its files; or ""."""
    try:
        digests = read_config(folder)["files"]
        bad = [name for name, digest in digests.items() if file_sha256(folder / name) != digest]
    except KeyError:
        return "an older version recorded no digests"
    except (MmdistError, OSError) as error:
        return str(error)
    return f"{', '.join(bad)} changed since it was written" if bad else ""
