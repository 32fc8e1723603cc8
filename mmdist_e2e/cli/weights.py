"""`mmdist weights`: list weights by name, and convert public files to checkpoint folders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.markup import escape
from rich.table import Table

from mmdist_e2e.cli.common import PATH, results
from mmdist_e2e.store import check_out
from mmdist_e2e.structures import MmdistError, Provenance
from mmdist_e2e.weights.download import Entry, check_digest, file_sha256

CPL = "cpl"


@click.group("weights")
def weights_group() -> None:
    """List the weights that are known by name, and convert public files."""


@weights_group.command("list")
def list_command() -> None:
    """Show every extractor by name, what it is, and whether it needs a download."""
    from mmdist_e2e.weights.registry import ENTRIES, checkpoint_folder, is_available, read_config

    table = Table(show_edge=False)
    for column in ("name", "kind", "modality", "network", "in the cache"):
        table.add_column(column, no_wrap=True)
    table.add_column("facts", overflow="fold")
    for entry in ENTRIES.values():
        config = entry.config or read_config(checkpoint_folder(entry.name))
        missing = "no" if entry.has_digest else "no, supply it"
        held = "ships" if entry.kind == "shipped" else "yes" if is_available(entry) else missing
        row = entry.name, entry.kind, config["modality"], config["network"], held, entry.facts
        table.add_row(*map(escape, row))
    results.print(table)


@weights_group.command("convert")
@click.argument("name")
@click.argument("file", type=PATH)
@click.option("--out", required=True, type=PATH, help="Checkpoint folder to write.")
@click.option("--digest", metavar="SHA256", help="Refuse FILE unless it has this SHA-256.")
@click.option("--vocabulary", type=PATH, help="For cpl: the glove.pkl of its training.")
@click.option(
    "--extractor",
    help="For cpl: the extractor whose features the model reads (i3d-rgb-charades for "
    "Charades-STA), or external:npy; by default external:hdf5, as CPL's published features.",
)
def convert_command(
    name: str,
    file: Path,
    out: Path,
    digest: str | None,
    vocabulary: Path | None,
    extractor: str | None,
) -> None:
    """Convert FILE, the public weights NAME, to a checkpoint folder.

    NAME is a public extractor (its folder is for --extractor), or cpl, a grounding model saved by
    CPL's code (its folder is for evaluate and ground). FILE is verified if its digest is known,
    and opened without running any code in it.
    """
    from mmdist_e2e.weights.registry import ENTRIES

    grounding = Entry(CPL, "public", "", config={}, url="https://github.com/minghangz/cpl")
    entry = grounding if name == CPL else ENTRIES.get(name)
    if entry is None or entry.config is None:
        valid = ", ".join([CPL, *(e.name for e in ENTRIES.values() if e.kind == "public")])
        problem = "are unknown" if entry is None else "ship with mmdist and need no conversion"
        raise MmdistError(f"The weights {name!r} {problem}; valid names: {valid}.")
    if name != CPL and (vocabulary is not None or extractor is not None):
        raise MmdistError(
            f"--vocabulary and --extractor belong to {CPL!r}; leave them out for {name!r}."
        )
    if not file.is_file():
        raise MmdistError(f"There is no file '{file}'; download it from {entry.url}.")
    check_out(out)
    check_digest(entry, file)
    if digest is not None:
        digest = digest.strip().lower()
        if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
            raise MmdistError(f"--digest needs a SHA-256 of 64 hexadecimal digits; got {digest!r}.")
        check_digest(replace(entry, git_sha1=None, sha256=digest), file)
    if name != CPL:
        convert_network(entry, file, out)
    elif vocabulary is None:
        raise MmdistError(
            f"{CPL!r} needs --vocabulary: the glove.pkl that the checkpoint was trained with."
        )
    else:
        convert_grounding(file, vocabulary, out, extractor)


def convert_grounding(file: Path, vocabulary: Path, out: Path, extractor: str | None) -> None:
    """Convert a checkpoint of CPL. Raises MmdistError for files that do not fit."""
    from mmdist_e2e.weights.cpl import convert_cpl, read_cpl

    released = read_cpl(file)
    extractor = "external:hdf5" if extractor is None else extractor
    modality, matters = extracted_features(extractor, released.recipe.model.feature_dim)
    facts = convert_cpl(released, vocabulary, out, modality=modality, matters=matters)
    known = "CPL's released file" if facts["released"] else "not a file known to be released"
    click.echo(
        f"{out}: {CPL}, {facts['dataset']}, {facts['vocabulary']} words, reads features of "
        f"{matters['extractor']}; SHA-256 of the file {facts['sha256']}, {known}"
    )


def extracted_features(extractor: str, channels: int) -> tuple[str, Mapping[str, Any]]:
    """Modality and provenance of an extractor's features, or of imported ones (external:NAME).

    Raises MmdistError for an unknown extractor, or one that does not give so many channels.
    """
    if extractor.startswith("external:"):
        return "rgb", Provenance.external(extractor.removeprefix("external:")).matters

    import torch

    from mmdist_e2e.extractors.profiles import describe
    from mmdist_e2e.extractors.runner import build

    spec = describe(extractor)
    with torch.device("meta"):
        own = build(spec.config).feature_channels
    if own != channels:
        raise MmdistError(
            f"The checkpoint reads features of {channels} channels and the extractor "
            f"{extractor!r} gives {own}; name another, or leave --extractor out to use the "
            f"published features."
        )
    return spec.modality, spec.matters


def convert_network(entry: Entry, file: Path, out: Path) -> None:
    """Convert a video network's public weights. Raises MmdistError when they do not fit it."""
    from mmdist_e2e.extractors.runner import build
    from mmdist_e2e.weights.registry import misfits, read_state, write_checkpoint

    assert entry.config is not None
    state = read_state(entry, file)
    if problems := misfits(build(entry.config).state_dict(), state):
        raise MmdistError(
            f"The file does not hold the weights {entry.name!r} ({problems}); give the file of "
            f"{entry.url}."
        )
    sha256 = file_sha256(file)
    write_checkpoint(out, entry, state, f"from a file of SHA-256 {sha256[:16]}…")
    click.echo(f"{out}: {entry.name}, SHA-256 of the file {sha256}")
