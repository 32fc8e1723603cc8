"""`mmdist`: the group of commands; errors of users become sentences here.

A command's module is imported when it is used, and torch only inside the commands, so that
`mmdist --help` and a query on cached features start fast.
"""

from __future__ import annotations

import io
import sys
import warnings
from importlib import import_module
from typing import Any

import click

from mmdist_e2e import __version__
from mmdist_e2e.structures import MmdistError

COMMANDS = {  # name -> module in this folder and the command in it
    "ground": "ground.ground_command",
    "extract": "extract.extract_command",
    "status": "status.status_command",
    "features": "features.features_group",
    "data": "data.data_group",
    "train": "train.train_group",
    "evaluate": "evaluate.evaluate_command",
    "reproduce": "reproduce.reproduce_command",
    "weights": "weights.weights_group",
    "pull": "weights.pull_command",
}


class PoliteGroup(click.Group):
    """Prints a user's mistake as one sentence with exit code 1; bugs keep their traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, name = COMMANDS[cmd_name].split(".")
        command: click.Command = getattr(import_module(f"mmdist_e2e.cli.{module}"), name)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MmdistError as error:
            raise click.ClickException(str(error)) from error


@click.group(
    cls=PoliteGroup,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
)
@click.version_option(__version__, prog_name="mmdist")
def main() -> None:
    """From MP4 files and text to timestamps."""
    # Names of files may hold bytes that are not UTF-8, and a terminal may know few characters.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # Warnings are for users too: one line, without the source line that raised it.
    warnings.showwarning = _show_warning


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    click.echo(f"Warning: {message}", err=True)


if __name__ == "__main__":
    main()
