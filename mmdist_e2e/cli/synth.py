"""`mmdist synth`: render videos of the synthetic world with exact annotations."""

from __future__ import annotations

import os
from pathlib import Path

import click

from mmdist_e2e.cli.display import bar, results


@click.command("synth")
@click.option("--videos", required=True, type=click.IntRange(min=1), help="How many videos.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0))
@click.option("--out", required=True, type=click.Path(path_type=Path, file_okay=False))
@click.option("--workers", default=None, type=click.IntRange(min=1), help="Default: all cores.")
def synth_command(videos: int, seed: int, out: Path, workers: int | None) -> None:
    """Render short home videos and train, val and test annotations in the Charades-STA format.

    The same seed gives the same annotations and frames. A killed run goes on where it was.
    """
    from mmdist_e2e.synthetic.make import make_world

    with bar("rendering", total=videos) as progress:
        summary = make_world(
            out,
            videos=videos,
            seed=seed,
            workers=workers or os.cpu_count() or 1,
            progress=progress,
        )
    for key, value in summary.items():
        results.print(f"{key}: {value}", markup=False, soft_wrap=True)
