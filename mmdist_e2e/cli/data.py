"""`mmdist data`: annotations by name, and what is wrong with data before training on it."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.markup import escape
from rich.table import Table

from mmdist_e2e.cli import common
from mmdist_e2e.cli.common import StepDisplay, results, say
from mmdist_e2e.structures import MODALITIES
from mmdist_e2e.workspace import SPLITS, fill

if TYPE_CHECKING:
    from mmdist_e2e.grounding.data.check import Report

LABELS = {  # of facts whose key does not read well
    "not_in_seconds": "perhaps not in seconds",
    "duplicates": "repeated lines",
    "left_out": "left out: end before start",
    "queries_dropped_by_protocol": "left out by the protocol",
}


@click.group("data")
def data_group() -> None:
    """Fetch annotations, and check annotations and features before training on them."""


@data_group.command("pull")
@click.argument("name")
@click.option("--out", default="annotations", type=common.PATH, help="Folder.")
def pull_command(name: str, out: Path) -> None:
    """Fetch the annotations NAME and verify their digests.

    NAME is charades-sta or activitynet-captions (train.json, test.json and, for the second,
    val.json), or cpl-vocabulary-charades or cpl-vocabulary-activitynet (glove.pkl, for --glove and
    --vocabulary). Videos may not be redistributed: their page is printed.
    """
    from mmdist_e2e.grounding.data.published import pull

    click.echo("\n".join(pull(name, out)))
    click.echo("Next: mmdist extract VIDEOS --out features, then mmdist data check.")


@data_group.command("check")
@common.places("rgb", "train", "val", "test", "glove")
@common.places("durations", multiple=True)
@click.option(
    "--modality",
    type=click.Choice(MODALITIES),
    help="Which features of a store to read.  [default: rgb of --features, all of features/]",
)
@common.protocol
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def check_command(modality: str | None, as_json: bool, **given: Any) -> None:
    """Report what the files hold and everything that is wrong with them.

    Errors are what training or evaluation would refuse; with one, the exit code is 1.
    """
    from mmdist_e2e.grounding.data.check import check_data
    from mmdist_e2e.weights.words import load_word_vectors

    places = {modality or "rgb": given["rgb"]}
    given["flow"] = None
    say(fill("data check", given, tuple(SPLITS)))
    if not any(places.values()):  # those of the workspace
        found = {m: given[m] for m in MODALITIES if given[m] and modality in (None, m)}
        places = found or places
    say("" if any(places.values()) else "No features are given or in features/: none are checked.")
    files = {split: given[split] for split in SPLITS if given[split]}
    with StepDisplay() as progress:
        options = {name: given[name] for name in ("durations", "protocol")}
        options |= {"word_vectors": load_word_vectors(given["glove"]), "progress": progress}
        reports = {
            name: check_data(files, features=place, modality=name, **options)
            for name, place in places.items()
        }
    report = _merged(reports)
    if as_json:
        click.echo(json.dumps(vars(report), indent=2, ensure_ascii=False))
    else:
        show_report(report)
    sys.exit(1 if report.errors else 0)


def _merged(reports: Mapping[str, Report]) -> Report:
    """One report of all modalities; a sentence that not all have names its modality."""
    first, *others = reports.values()
    for kind in ("errors", "warnings"):
        said = {modality: getattr(report, kind) for modality, report in reports.items()}
        lines = [
            line if all(line in each for each in said.values()) else f"{modality}: {line}"
            for modality, each in said.items()
            for line in each
        ]
        setattr(first, kind, list(dict.fromkeys(lines)))
    if others:
        first.features = {modality: report.features for modality, report in reports.items()}
    return first


def show_report(report: Report) -> None:
    several = set(report.features) <= set(MODALITIES)
    for columns in (report.splits, report.features if several else {"features": report.features}):
        if any(columns.values()):
            _print_table(columns)
    for kind, sentences in (("warning", report.warnings), ("error", report.errors)):
        for sentence in sentences:
            results.print(f"{kind}: {sentence}", markup=False, soft_wrap=True)
    results.print(f"{len(report.errors)} errors, {len(report.warnings)} warnings.")


def _print_table(columns: Mapping[str, Mapping[str, Any]]) -> None:
    """One column for each split, one row for each fact."""
    table = Table("", *columns, show_edge=False)
    for key in {key: None for facts in columns.values() for key in facts}:
        cells = [_cell(facts.get(key)) for facts in columns.values()]
        if any(cells):
            table.add_row(LABELS.get(key, key.replace("_", " ")), *map(escape, cells))
    results.print(table)
    results.print()


def _cell(value: Any) -> str:
    """A fact as text; empty for none."""
    if isinstance(value, Mapping):
        return ", ".join(f"{k}: {v}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value or "")
