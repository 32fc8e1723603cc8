"""`mmdist`: the group of commands and the one place where errors become sentences.

Heavy imports live inside the commands, so that `mmdist --help` never imports torch.
"""

from __future__ import annotations

import io
import sys
import warnings
from typing import Any

import click

from mmdist_e2e import __version__
from mmdist_e2e.cli.data import data_group
from mmdist_e2e.cli.evaluate import evaluate_command
from mmdist_e2e.cli.extract import extract_command
from mmdist_e2e.cli.ground import ground_command
from mmdist_e2e.cli.reproduce import reproduce_command
from mmdist_e2e.cli.train import train_group
from mmdist_e2e.cli.weights import weights_group
from mmdist_e2e.structures import MmdistError


class PoliteGroup(click.Group):
    """Turns a person's mistake into one sentence and exit code 1; bugs keep their traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MmdistError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=PoliteGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mmdist")
def main() -> None:
    """From MP4 files and text to timestamps."""
    # Names of files may hold bytes that are not UTF-8, and a terminal may know few characters.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # A warning is for people too: one line, without the source line that raised it.
    warnings.showwarning = _show_warning


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    click.echo(f"Warning: {message}", err=True)


for command in (
    ground_command,
    extract_command,
    data_group,
    train_group,
    evaluate_command,
    reproduce_command,
    weights_group,
):
    main.add_command(command)


if __name__ == "__main__":
    main()
