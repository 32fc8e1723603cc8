"""`python -m world COMMAND`: make the synthetic world and everything that ships.

    render   videos with exact annotations        pretrain  a small video network
    probe    linear probes of video networks      glove     the shipped word vectors
    ship     copy the best student and the networks into the wheel's folder

`make world` runs the whole chain (world/chain.sh).
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path

import click

from mmdist_e2e.cli.common import bar, results
from mmdist_e2e.structures import MmdistError


@click.command("render")
@click.option("--videos", required=True, type=click.IntRange(min=1), help="How many videos.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0))
@click.option("--out", required=True, type=click.Path(path_type=Path, file_okay=False))
@click.option("--workers", default=None, type=click.IntRange(min=1), help="Default: all cores.")
def render_command(videos: int, seed: int, out: Path, workers: int | None) -> None:
    """Render short home videos and train, val and test annotations in the Charades-STA format.

    The same seed gives the same annotations and frames. A killed run goes on where it was.
    """
    from world.make import make_world

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


COMMANDS = ("render", "pretrain", "probe", "glove", "ship")


def main() -> None:
    """Run one command; the others have their options in their own files."""
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command not in COMMANDS:
        sys.exit(f"{__doc__}\nCOMMAND is one of {', '.join(COMMANDS)}; got {command!r}.")
    sys.argv[:] = [f"python -m world {command}", *sys.argv[2:]]
    if command == "render":
        try:
            render_command(standalone_mode=False)
        except (MmdistError, click.ClickException) as error:
            sys.exit(getattr(error, "message", str(error)))
    else:
        import_module(f"world.{command}").main()


if __name__ == "__main__":
    main()
