"""`mmdist status`: what a folder of features holds, lacks, and is getting."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click
from rich.markup import escape
from rich.table import Table

from mmdist_e2e.cli.common import PATH, results
from mmdist_e2e.structures import MODALITIES, MmdistError
from mmdist_e2e.workspace import FEATURES


@click.command("status")
@click.argument("folder", metavar="[DIR]", type=PATH, default=FEATURES)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status_command(folder: Path, as_json: bool) -> None:
    """Count the features in DIR, an output folder of mmdist extract; by default features/.

    Shows which videos lack a modality that others have, which failed and why, and which are being
    extracted now. A failure is forgotten when its video is extracted.
    """
    from mmdist_e2e.extractors.journal import Journal
    from mmdist_e2e.extractors.search import printable
    from mmdist_e2e.store import FeatureStore

    if not folder.is_dir():
        raise MmdistError(f"{folder} is not a folder; give the --out of mmdist extract.")
    store, journal = FeatureStore(folder), Journal(folder)
    ids = {modality: {*store.videos(modality)} for modality in MODALITIES}
    ids = {modality: names for modality, names in ids.items() if names}
    every = set[str]().union(*ids.values())
    lacking = {modality: sorted(every - names) for modality, names in ids.items()}
    complete = len(every) - len(set[str]().union(*lacking.values()))
    failures, running = journal.failures(), journal.running()
    if as_json:
        facts = {
            "videos": len(every),
            "complete": complete,
            "modalities": {modality: len(names) for modality, names in ids.items()},
            "lacking": {modality: names for modality, names in lacking.items() if names},
            "failed": [
                {k: v for k, v in asdict(failure).items() if k not in ("what", "run")}
                for failure in failures
            ],
            "running": running,
        }
        click.echo(json.dumps(facts, indent=2))
        return
    table = Table("", "videos", "which", show_edge=False)
    table.columns[1].justify, table.columns[2].overflow = "right", "fold"
    for modality, names in ids.items():
        table.add_row(f"with {modality}", str(len(names)), "")
    table.add_row("complete", str(complete), "")
    for modality, without in lacking.items():
        if without:
            table.add_row(f"without {modality}", str(len(without)), escape(_few(without)))
    table.add_row("running", str(len(running)), escape(_few(running)))
    table.add_row("failed", str(len(failures)), "")
    for failure in failures:
        what = f"{failure.id} ({', '.join(failure.modalities)}): {failure.cause}"
        table.add_row("", "", escape(printable(what)))
    results.print(table)


def _few(names: list[str]) -> str:
    from mmdist_e2e.extractors.search import printable

    more = f" and {len(names) - FEW} more" if len(names) > FEW else ""
    return ", ".join(printable(name) for name in names[:FEW]) + more


FEW = 5  # names of videos in a row of the table
