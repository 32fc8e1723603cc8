"""`mmdist reproduce`: the paper's tables, row by row, on anybody's features or on the world."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from mmdist_e2e.cli import options
from mmdist_e2e.cli.display import ExtractionProgress, StepDisplay, bar, results, say
from mmdist_e2e.cli.extract import choose_extractors
from mmdist_e2e.cli.options import PATH
from mmdist_e2e.cli.train import parse_settings
from mmdist_e2e.structures import MmdistError


@click.command("reproduce")
@click.option("--tables", default="1,3,4,5", show_default=True, help="Which of the paper's.")
@click.option("--features", type=PATH, help="Store, HDF5 or npy folder; without it, the world.")
@options.flow_features
@click.option("--train", "train_path", type=PATH, help="Annotations.")
@click.option("--val", "val_path", type=PATH, help="Without it a part of --train is set aside.")
@click.option("--annotations", type=PATH, help="Annotations that score the rows.")
@click.option(
    "--world-videos",
    default=1000,
    show_default=True,
    type=click.IntRange(min=10),
    help="Without --features: how many videos of the synthetic world are rendered.",
)
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
    features: Path | None,
    flow_features: Path | None,
    train_path: Path | None,
    val_path: Path | None,
    annotations: Path | None,
    world_videos: int,
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

    With --features give --train and --annotations too. Without them videos of the synthetic world
    are rendered into OUT/world and their features extracted by the shipped networks.
    """
    from mmdist_e2e.extractors.networks import resolve_device
    from mmdist_e2e.grounding.annotations import world_of
    from mmdist_e2e.grounding.reproduce import Material, finished, reproduce, run_of
    from mmdist_e2e.grounding.tables import plan, rows_of, table
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
    if features is None and train_path is None and annotations is None:
        features, train_path, val_path, annotations = _world(out / "world", world_videos, device)
    elif features is None or train_path is None or annotations is None:
        raise MmdistError(
            "--features, --train and --annotations belong together; give all three, or none of "
            "them for the synthetic world."
        )
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


def _world(folder: Path, videos: int, device: str) -> tuple[Path, Path, Path, Path]:
    """Features and annotations (train, val, test) of the synthetic world, made where missing."""
    from mmdist_e2e.extractors.batch import extract_many, find_videos
    from mmdist_e2e.store import FeatureStore, check_out
    from mmdist_e2e.synthetic.make import annotation_path, make_world

    check_out(folder.parent)
    with bar("rendering", total=videos) as rendered:
        workers = os.cpu_count() or 1
        make_world(folder, videos=videos, seed=0, workers=workers, progress=rendered)
    found, _ = find_videos([folder / "videos"])
    specs = choose_extractors(["rgb", "flow"], ())
    with ExtractionProgress(len(found)) as progress:
        report = extract_many(
            found, specs, FeatureStore(folder / "features"), device=device, progress=progress
        )
    if report.failed:
        raise MmdistError(f"The world cannot be extracted: {report.failed[0].cause}")
    train, val, test = (annotation_path(folder, split) for split in ("train", "val", "test"))
    return folder / "features", train, val, test


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
