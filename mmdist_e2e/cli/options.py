"""Options that several commands have, each written once."""

from __future__ import annotations

from pathlib import Path

import click

from mmdist_e2e.grounding.splits import PROTOCOLS

PATH = click.Path(path_type=Path)

flow_features = click.option(
    "--flow-features", type=PATH, help="Where flow lies, if not beside RGB."
)
glove = click.option("--glove", type=PATH, help="GloVe text or CPL's glove.pkl.")
durations = click.option("--durations", type=PATH, help="Seconds by video: JSON, CSV or a store.")
protocol = click.option(
    "--protocol",
    default="official",
    show_default=True,
    type=click.Choice(PROTOCOLS),
    help="cpl drops queries that end past their video.",
)
length = click.option(
    "--length", default=64, show_default=True, type=click.IntRange(min=4), help="L."
)
device = click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N."
)
