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

    with StepDisplay() as progress:
        lines = pull(name, out, progress)
    click.echo("\n".join(lines))
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
        places = {m: given[m] for m in MODALITIES if modality in (None, m)}
    features = {name: place for name, place in places.items() if place}
    say("" if features else "No features are given or in features/: none are checked.")
    with StepDisplay() as progress:
        report = check_data(
            {split: given[split] for split in SPLITS if given[split]},
            features=features,
            word_vectors=load_word_vectors(given["glove"]),
            durations=given["durations"],
            protocol=given["protocol"],
            progress=progress,
        )
    show_report(report, as_json)
    sys.exit(1 if report.errors else 0)


def show_report(report: Report, as_json: bool) -> None:
    """Print JSON, or tables of facts and lines of what is wrong."""
    if as_json:
        click.echo(json.dumps(vars(report), indent=2, ensure_ascii=False))
        return
    for columns in filter(None, (report.splits, report.features)):
        _print_table(columns)
    for kind, sentences in (("warning", report.warnings), ("error", report.errors)):
        for sentence in sentences:
            results.print(f"{kind}: {sentence}", markup=False, soft_wrap=True)
    results.print(f"{len(report.errors)} errors, {len(report.warnings)} warnings.")


def _print_table(columns: Mapping[str, Mapping[str, Any]]) -> None:
    """One column for each split or modality, one row for each fact."""
    table = Table("", *columns, show_edge=False)
    for key in {key: None for facts in columns.values() for key in facts}:
        cells = [_cell(facts.get(key)) for facts in columns.values()]
        if any(cells):
            table.add_row(key.replace("_", " "), *map(escape, cells))
    results.print(table)
    results.print()


def _cell(value: Any) -> str:
    """A fact as text; empty for none."""
    if isinstance(value, Mapping):
        return ", ".join(f"{k}: {v}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value or "")
