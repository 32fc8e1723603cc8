"""`mmdist reproduce`: the paper's tables, row by row, on anybody's features."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from mmdist_e2e.cli import common as options
from mmdist_e2e.cli.common import PATH, StepDisplay, results, say
from mmdist_e2e.cli.train import SETTINGS, parse_settings
from mmdist_e2e.store import check_out
from mmdist_e2e.structures import MODALITIES, MmdistError
from mmdist_e2e.workspace import RUNS, fill

ABOVE_0 = click.IntRange(min=1)


@click.command("reproduce")
@click.option("--tables", default="1,3,4,5", help="Numbers of the paper's tables.")
@options.places("rgb", "flow", "train", "val", "annotations", "glove", "durations")
@click.option("--out", default=RUNS / "paper", type=PATH, help="Folder of all runs and table.md.")
@click.option("--seeds", default=5, type=ABOVE_0, help="Number of seeds of the rows of Table 1.")
@click.option("--ablation-seeds", default=3, type=ABOVE_0, help="Number of seeds of other rows.")
@options.protocol
@options.preset
@options.length
@options.device
@SETTINGS
@click.option("--dry-run", is_flag=True, help="Print what is finished and what to train.")
def reproduce_command(
    tables: str,
    out: Path,
    seeds: int,
    ablation_seeds: int,
    device: str,
    settings: Sequence[str],
    dry_run: bool,
    **given: Any,
) -> None:
    """Train and score every row of the paper's tables over several seeds.

    An interrupted call is resumed by the same command, and OUT/table.md always holds what is
    finished. A finished row counts only for the features, annotations, word vectors and settings
    that it was made from. Several calls may share OUT: each trains what no other is training.
    """
    from mmdist_e2e.extractors.runner import resolve_device
    from mmdist_e2e.grounding import paper
    from mmdist_e2e.grounding.data.annotations import world_of
    from mmdist_e2e.weights.words import load_word_vectors

    jobs = paper.plan(
        paper.rows_of(_numbers(tables)), range(seeds), range(min(seeds, ablation_seeds))
    )
    check_out(out)
    say(fill("reproduce", given, *MODALITIES, "train", "annotations"))
    chosen = parse_settings(settings)
    source = world_of(given["annotations"]) or f"{given['rgb'].name} with {given['train'].name}"
    names = {"rgb": "features", "flow": "flow_features", "train": "train", "val": "val"}
    for option, name in (names | {"annotations": "test"}).items():
        given[f"{name}_path"] = given.pop(option)
    vectors, device = load_word_vectors(given["glove"]), resolve_device(device)
    material = paper.Material(source=source, word_vectors=vectors, device=device, **given)
    if dry_run:
        done = paper.finished(out, paper.inputs_of(material, jobs, chosen))
        for row, seed in jobs:
            state = "finished" if (row.name, seed) in done else "to train"
            say(f"{row.name}, seed {seed}: {state} ({paper.run_of(out, row, seed)})")
        left = len(jobs) - len(done)
        results.print(f"{left} of {len(jobs)} trainings are left.", soft_wrap=True)
        return
    with StepDisplay() as display:
        lines, failed = paper.reproduce(
            material, jobs, out, settings=chosen, progress=display, told=say
        )
    results.print(lines, markup=False, soft_wrap=True, highlight=False)
    if failed:
        sys.exit(1)


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError as error:
        raise MmdistError(f"--tables takes numbers, like 1,3,4,5; got {text!r}.") from error
