"""`mmdist reproduce`: the paper's tables, row by row, on anybody's features."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from mmdist_e2e.cli import common as options
from mmdist_e2e.cli.common import PATH, StepDisplay, results, say
from mmdist_e2e.cli.train import parse_settings
from mmdist_e2e.structures import MmdistError


@click.command("reproduce")
@click.option("--tables", default="1,3,4,5", show_default=True, help="Which of the paper's.")
@click.option("--features", required=True, type=PATH, help="Store, HDF5 or npy folder.")
@options.flow_features
@click.option("--train", "train_path", required=True, type=PATH, help="Annotations.")
@click.option("--val", "val_path", type=PATH, help="Without it a part of --train is set aside.")
@click.option("--annotations", required=True, type=PATH, help="Annotations that score the rows.")
@click.option("--out", required=True, type=PATH, help="Folder of all runs and of table.md.")
@click.option("--seeds", default=5, show_default=True, type=click.IntRange(min=1))
@click.option("--ablation-seeds", default=3, show_default=True, type=click.IntRange(min=1))
@options.glove
@options.durations
@options.protocol
@options.length
@options.device
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="A setting of every row; may be repeated.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be trained, and what is done.")
def reproduce_command(
    tables: str,
    features: Path,
    flow_features: Path | None,
    train_path: Path,
    val_path: Path | None,
    annotations: Path,
    out: Path,
    seeds: int,
    ablation_seeds: int,
    glove: Path | None,
    durations: Path | None,
    protocol: str,
    length: int,
    device: str,
    settings: Sequence[str],
    dry_run: bool,
) -> None:
    """Train and score every row of the paper's tables over several seeds.

    One row at a time; a killed call goes on where it was, and OUT/table.md always holds what is
    done. The rows of Table 1 take --seeds, the ablations --ablation-seeds. Several calls may share
    OUT: each trains what no other is at.
    """
    from mmdist_e2e.extractors.runner import resolve_device
    from mmdist_e2e.grounding.data.annotations import world_of
    from mmdist_e2e.grounding.paper import (
        Material,
        finished,
        plan,
        reproduce,
        rows_of,
        run_of,
        table,
    )
    from mmdist_e2e.weights.words import load_word_vectors, shipped_word_vectors

    jobs = plan(rows_of(_numbers(tables)), range(seeds), range(min(seeds, ablation_seeds)))
    done = finished(out, jobs)
    if dry_run:
        for row, seed in jobs:
            state = "done" if (row.name, seed) in done else "to train"
            say(f"{row.name}, seed {seed}: {state} ({run_of(out, row, seed)})")
        left = len(jobs) - len(done)
        spent = [one["seconds"] for one in done.values()]
        cost = (
            f"about {sum(spent) / len(spent) * left / 60:.0f} minutes at the pace of what is done"
            if spent
            else "how long one takes is known once the first is done"
        )
        results.print(f"{left} of {len(jobs)} trainings are left; {cost}.", soft_wrap=True)
        return
    vectors = load_word_vectors(glove) if glove is not None else shipped_word_vectors()
    material = Material(
        world_of(annotations) or f"{features.name} with {train_path.name}",
        features, flow_features, train_path, val_path, annotations, vectors, durations, protocol,
        length, resolve_device(device),
    )  # fmt: skip
    with StepDisplay() as display:
        failed = reproduce(
            material,
            jobs,
            out,
            settings=parse_settings(settings),
            commit=_commit(),
            progress=display,
            told=say,
        )
    lines = table(finished(out, jobs), jobs, material.source)
    results.print(lines, markup=False, soft_wrap=True, highlight=False)
    if failed:
        for label, reason in failed.items():
            say(f"{label} failed: {reason}")
        sys.exit(1)


def _commit() -> str:
    """The version, and where the package lies in a git checkout its commit."""
    from mmdist_e2e import __version__

    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return __version__
    return f"{__version__} ({found.stdout.strip()})"


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError as error:
        raise MmdistError(f"--tables takes numbers, like 1,3,4,5; got {text!r}.") from error
