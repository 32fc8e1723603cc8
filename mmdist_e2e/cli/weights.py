"""`mmdist weights` and `mmdist pull`: what is known by name, and getting it into the cache."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from rich.markup import escape
from rich.table import Table

from mmdist_e2e.cli.common import PATH, StepDisplay, results
from mmdist_e2e.store import check_out
from mmdist_e2e.structures import MmdistError
from mmdist_e2e.weights import registry
from mmdist_e2e.weights.download import Entry
from mmdist_e2e.weights.pull import check_file, pull, write
from mmdist_e2e.weights.registry import ENTRIES

CPL = "cpl"


@click.group("weights")
def weights_group() -> None:
    """List and verify what is known by name, and convert public files."""


@weights_group.command("list")
def list_command() -> None:
    """Show all extractors, files and models by name, and whether they need a download."""
    table = Table(show_edge=False)
    for column in ("name", "kind", "modality", "network", "in the cache"):
        table.add_column(column, no_wrap=True)
    table.add_column("facts", overflow="fold")
    for entry in ENTRIES.values():
        config = _config(entry)
        missing = "no" if entry.digest else "no, supply it"
        held = "ships" if entry.ships else "yes" if registry.is_available(entry) else missing
        what = config.get("modality", ""), config.get("network", "")
        table.add_row(*map(escape, (entry.name, entry.kind, *what, held, entry.facts)))
    results.print(table)


@weights_group.command("convert")
@click.argument("name")
@click.argument("file", type=PATH)
@click.option("--out", required=True, type=PATH, help="Checkpoint folder to write.")
@click.option("--digest", metavar="SHA256", help="Refuse FILE unless it has this SHA-256.")
@click.option("--vocabulary", type=PATH, help="For cpl: the glove.pkl of its training.")
@click.option(
    "--extractor",
    help="For cpl: the extractor whose features the model reads beside CPL's published ones "
    "(i3d-rgb-charades for Charades-STA).",
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
    if name != CPL:
        if vocabulary or extractor:
            raise MmdistError(
                f"--vocabulary and --extractor belong to {CPL!r}; leave them out for {name!r}."
            )
        entry = registry.find(name, "shipped", "public")
    elif vocabulary is None:
        raise MmdistError(
            f"{CPL!r} needs --vocabulary: the glove.pkl that the checkpoint was trained with."
        )
    else:
        needs = extractor or "external:hdf5", str(vocabulary)
        entry = Entry(CPL, "model", "", url="https://github.com/minghangz/cpl", needs=needs)
    check_file(entry, file, digest)
    check_out(out)
    write(entry, out, file)
    click.echo(f"{out}: {name}, {_source(out)}, {registry.read_config(out)['trained_on']}")


def _config(entry: Entry) -> Mapping[str, Any]:
    """The config of an entry, if it has one."""
    held = entry.config is None and registry.is_available(entry)
    return registry.read_config(registry.cached_folder(entry)) if held else entry.config or {}


def _source(folder: Path) -> str:
    """Size and SHA-256 of the public file that a folder was made from."""
    source = registry.read_config(folder).get("source")
    return f"{source['bytes']:,} bytes, SHA-256 {source['sha256']}" if source else "ships"


@weights_group.command("show")
@click.argument("name")
def show_command(name: str) -> None:
    """Show NAME's licence and its training data's, its file, and how its features are made."""
    from mmdist_e2e.extractors.profiles import profile_of

    entry = registry.find(name)
    folder = registry.cached_folder(entry)
    facts, _, licence = entry.facts.rpartition("; ")
    terms = [f"{data}: {text}" for data, text in registry.TERMS.items() if data in facts]
    held = registry.is_available(entry)
    digest = entry.git_sha1 and f"{entry.git_sha1} (as a git object)"
    lines = {
        "what": facts,
        "licence": licence,
        "training data": "; ".join(terms) or "unknown",
        "needs": ", ".join(entry.needs),
        "address": entry.url,
        "digest": digest or entry.sha256 or (entry.url and "unknown: supply the file"),
        "folder": folder if held else f"not in the cache; get it with: {entry.command}",
        "file": _source(folder) if held else None,
    }
    config = _config(entry)
    if "network" in config:
        lines |= {"network": config["network"], **profile_of(config)}
    for key, value in lines.items():
        if value:
            click.echo(f"{key + ':':15} {value}")


@weights_group.command("verify")
@click.argument("names", nargs=-1)
def verify_command(names: tuple[str, ...]) -> None:
    """Check files against the digests that were recorded when they were made.

    NAMES: see mmdist weights list, or folders; by default all that ship or are in the cache.
    """
    damaged = []
    for name in names or filter(lambda n: registry.is_available(ENTRIES[n]), ENTRIES):
        entry = None if Path(name).is_dir() else registry.find(name)
        folder = Path(name) if entry is None else registry.cached_folder(entry)
        if problem := registry.damage(folder):
            repair = f"delete {folder} and run: {entry.command}" if entry else "restore it"
            repair = "install mmdist again" if entry and entry.ships else repair
            damaged.append(f"{name}: {problem}; {repair}")
        else:
            click.echo(f"{name}: as recorded")
    if damaged:
        raise MmdistError("\n".join(damaged))


@click.command("pull")
@click.argument("names", nargs=-1, required=True)
@click.option("--from", "file", type=PATH, help="The public file of NAME, if you have it.")
@click.option("--digest", metavar="SHA256", help="Refuse FILE unless it has this SHA-256.")
def pull_command(names: tuple[str, ...], file: Path | None, digest: str | None) -> None:
    """Fetch everything that NAMES need into the cache, so that they work without a network.

    NAMES: of models, extractors or files (see: mmdist weights list). An interrupted download
    continues where it stopped. MMDIST_CACHE is the folder of the cache; MMDIST_MIRROR, the address
    of a server that has the same paths, is asked instead of the public ones.
    """
    with StepDisplay() as progress:
        folders = pull(*names, file=file, digest=digest, progress=progress)
    for name, folder in folders.items():
        click.echo(f"{name}: {_source(folder)}, in {folder}")
