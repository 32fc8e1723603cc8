"""`mmdist features`: what feature files hold; export to and import from other formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mmdist_e2e.cli.common import PATH, StepDisplay, choice
from mmdist_e2e.cli.data import show_report
from mmdist_e2e.structures import MODALITIES, MmdistError

ABOVE_0 = click.FloatRange(0, min_open=True)

modality = choice(
    "--modality", *MODALITIES, help="Which features of a store; what imported arrays are."
)


@click.group("features")
def features_group() -> None:
    """Show, export and import feature files."""


@features_group.command("info")
@click.argument("path", type=PATH)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def info_command(path: Path, as_json: bool) -> None:
    """Show what PATH holds, how it was made, and what is wrong with it.

    PATH is a feature store, an HDF5 file, a folder of VIDEO.npy, or one .npz or .npy file.
    """
    from mmdist_e2e.grounding.data.check import check_source

    with StepDisplay() as progress:
        report = check_source(path, progress=progress)
    show_report(report, as_json)


@features_group.command("export")
@click.argument("store", type=PATH)
@click.option("--to", "target", required=True, type=PATH, help="HDF5 file or folder to write.")
@click.option(
    "--format",
    "form",
    required=True,
    type=click.Choice(["hdf5", "npy", "opentad"]),
    help="One HDF5 file; a folder of .npy files; the same with the fields that OpenTAD needs.",
)
@modality
@choice(
    "--layout",
    "charades",
    "activitynet",
    help="Of hdf5: a dataset VIDEO, or VIDEO/c3d_features.",
)
def export_command(store: Path, target: Path, **options: Any) -> None:
    """Write the features of STORE in a format of other programs.

    Durations, times and provenance go with them: mmdist reads an export as it reads a store. A
    target with other content is never changed.
    """
    _convert(store, target, **options)


@features_group.command("import")
@click.argument("path", type=PATH)
@click.option("--out", required=True, type=PATH, help="Feature store to write or to add to.")
@modality
@click.option("--durations", type=PATH, help="Seconds by video: JSON, CSV or a feature store.")
@click.option("--fps", "effective_fps", type=ABOVE_0, help="Rate at which frames were read.")
@click.option("--stride", type=ABOVE_0, help="Frames from row to row.")
@click.option("--window", type=ABOVE_0, help="Frames of a row.")
@click.option("--offset", type=click.FloatRange(0), help="Frame at which row 0 starts [0].")
def import_command(
    path: Path, out: Path, modality: str, durations: Path | None, **grid: float | None
) -> None:
    """Write the features of PATH, made elsewhere, to the feature store OUT.

    PATH is an HDF5 file, a folder of VIDEO.npy, or one .npy file. Row i starts at
    (i · stride + offset) / fps seconds and lasts window / fps; OpenTAD's offset_frames is offset +
    window / 2. Without these options, rows divide the video evenly. What mmdist features export
    wrote needs no options.
    """
    from mmdist_e2e.grounding.data.annotations import load_durations

    given = {name: value for name, value in grid.items() if value is not None}
    if given and not {"effective_fps", "stride", "window"} <= given.keys():
        raise MmdistError("Times of rows need --fps, --stride and --window; give all three.")
    seconds = load_durations(durations) if durations else None
    _convert(path, out, form="store", modality=modality, durations=seconds, grid=given)


def _convert(path: Path, target: Path, **options: Any) -> None:
    from mmdist_e2e.grounding.data.exchange import convert_features

    with StepDisplay() as progress:
        videos = convert_features(path, target, progress=progress, **options)
    click.echo(f"{target}: {videos} videos")
