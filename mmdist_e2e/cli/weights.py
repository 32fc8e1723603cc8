"""`mmdist weights`: what can be had by name, and public files turned into checkpoint folders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.markup import escape
from rich.table import Table

from mmdist_e2e.cli.common import results
from mmdist_e2e.store import check_out
from mmdist_e2e.structures import MmdistError, Provenance

if TYPE_CHECKING:
    from torch import Tensor

    from mmdist_e2e.weights.download import Entry

HEXADECIMAL = frozenset("0123456789abcdef")
SHA256_DIGITS = 64
CPL = "cpl"


@click.group("weights")
def weights_group() -> None:
    """List the weights that go by a name, and convert public files."""


@weights_group.command("list")
def list_command() -> None:
    """Show every extractor by name, what it is, and whether it can be used at once."""
    from mmdist_e2e.weights.registry import ENTRIES, checkpoint_folder, is_at_hand, read_config

    table = Table(show_edge=False)
    for column in ("name", "kind", "modality", "network", "in the cache"):
        table.add_column(column, no_wrap=True)
    table.add_column("facts", overflow="fold")
    for entry in ENTRIES.values():
        config = entry.config or read_config(checkpoint_folder(entry.name))
        if entry.kind == "shipped":
            at_hand = "ships"
        elif is_at_hand(entry):
            at_hand = "yes"
        else:
            at_hand = "no" if entry.has_digest else "no, bring it"
        row = (entry.name, entry.kind, config["modality"], config["network"], at_hand, entry.facts)
        table.add_row(*map(escape, row))
    results.print(table)


@weights_group.command("convert")
@click.argument("name")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Checkpoint folder.")
@click.option("--digest", metavar="SHA256", help="Refuse FILE unless it has this SHA-256.")
@click.option("--vocabulary", type=click.Path(path_type=Path), help="For cpl: its glove.pkl.")
@click.option(
    "--extractor",
    help="For cpl: the extractor whose features it shall read (i3d-rgb-charades for Charades-STA), "
    "or external:npy; by default external:hdf5, as CPL's published ones.",
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

    NAME is a public extractor, whose folder --extractor takes, or cpl, a grounding model that CPL's
    code saved, whose folder evaluate and ground take. The file is verified where its digest is
    known, and opened without running any code in it.
    """
    if name == CPL:
        convert_grounding(file, vocabulary, out, digest, extractor)
        return
    if vocabulary is not None or extractor is not None:
        raise MmdistError(
            f"--vocabulary and --extractor belong to {CPL!r}; leave them out for {name!r}."
        )
    convert_network(name, file, out, digest)


def convert_grounding(
    file: Path, vocabulary: Path | None, out: Path, digest: str | None, extractor: str | None
) -> None:
    """Convert a checkpoint of CPL.

    Raises MmdistError for files that are no CPL checkpoint and its vocabulary, have another
    digest or do not fit each other, and for an extractor of features of another size.
    """
    from mmdist_e2e.weights.cpl import PUBLISHED_FEATURES, convert_cpl, read_cpl
    from mmdist_e2e.weights.download import Entry, check_digest

    if vocabulary is None:
        raise MmdistError(
            f"{CPL!r} needs --vocabulary: the glove.pkl that the checkpoint was trained with."
        )
    if digest is not None:
        url = "https://github.com/minghangz/cpl"
        check_digest(Entry(CPL, "public", "", url=url, sha256=parse_digest(digest)), file)
    released = read_cpl(file)
    modality, matters = "rgb", PUBLISHED_FEATURES
    if extractor is not None:
        modality, matters = extracted_features(extractor, released.recipe.model.feature_dim)
    facts = convert_cpl(released, vocabulary, out, modality=modality, matters=matters)
    known = "CPL's released file" if facts["released"] else "not a file known to be released"
    results.print(
        f"{out}: {CPL}, {facts['dataset']}, {facts['vocabulary']} words, reads features of "
        f"{matters['extractor']}; SHA-256 of the file {facts['sha256']}, {known}",
        markup=False,
        soft_wrap=True,
    )


def extracted_features(extractor: str, channels: int) -> tuple[str, Mapping[str, Any]]:
    """Modality and provenance of what an extractor gives, run as it is by default.

    external:NAME stands for imported features. Raises MmdistError for an unknown extractor, and
    one whose rows are not `channels` wide.
    """
    import torch

    from mmdist_e2e.extractors.profiles import describe
    from mmdist_e2e.extractors.runner import BUILDERS

    if extractor.startswith("external:"):
        return "rgb", Provenance.external(extractor.removeprefix("external:")).matters
    spec = describe(extractor)
    with torch.device("meta"):
        own = BUILDERS[spec.network](spec.config).feature_channels
    if own != channels:
        raise MmdistError(
            f"The checkpoint reads features of {channels} channels and the extractor "
            f"{extractor!r} gives {own}; name another, or leave --extractor out to use the "
            f"published features."
        )
    return spec.modality, spec.matters


def convert_network(name: str, file: Path, out: Path, digest: str | None) -> None:
    """Convert the public weights of a video network.

    Raises MmdistError for a name without public weights, a file that is unreadable, has another
    digest or does not fit the network, and a folder that cannot be written.
    """
    from mmdist_e2e.weights.download import check_digest, file_sha256
    from mmdist_e2e.weights.registry import read_state, write_checkpoint

    entry = public_entry(name)
    if not file.is_file():
        raise MmdistError(f"There is no file '{file}'; fetch it from {entry.url}.")
    check_out(out)
    check_digest(entry, file)
    if digest is not None:
        check_digest(replace(entry, git_sha1=None, sha256=parse_digest(digest)), file)
    state = read_state(entry, file)
    check_fits(entry, state)
    sha256 = file_sha256(file)
    write_checkpoint(out, entry, state, f"from a file of SHA-256 {sha256[:16]}…")
    results.print(f"{out}: {name}, SHA-256 of the file {sha256}", markup=False, soft_wrap=True)


def public_entry(name: str) -> Entry:
    """The public entry of a name. Raises MmdistError when there is none."""
    from mmdist_e2e.weights.registry import ENTRIES

    entry = ENTRIES.get(name)
    if entry is None or entry.kind != "public":
        valid = ", ".join([CPL, *(e.name for e in ENTRIES.values() if e.kind == "public")])
        problem = "are unknown" if entry is None else "ship with mmdist and need no conversion"
        raise MmdistError(f"The weights {name!r} {problem}; those that can be converted: {valid}.")
    return entry


def parse_digest(text: str) -> str:
    """A SHA-256 in lower case. Raises MmdistError for anything else."""
    digest = text.strip().lower()
    if len(digest) != SHA256_DIGITS or not HEXADECIMAL.issuperset(digest):
        raise MmdistError(
            f"--digest needs a SHA-256 of {SHA256_DIGITS} hexadecimal digits; got {text!r}."
        )
    return digest


def check_fits(entry: Entry, state: Mapping[str, Tensor]) -> None:
    """Raise MmdistError unless the weights are those of the entry's network, all and no others."""
    from mmdist_e2e.extractors.runner import BUILDERS
    from mmdist_e2e.weights.registry import misfits

    assert entry.config is not None
    expected = BUILDERS[entry.config["network"]](entry.config).state_dict()
    if problems := misfits(expected, state):
        raise MmdistError(
            f"The file does not hold the weights {entry.name!r} ({problems}); give "
            f"the file of {entry.url}."
        )
