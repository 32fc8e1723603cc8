"""`mmdist features`: what feature files hold; export to and import from other formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from mmdist_e2e.cli.common import PATH, StepDisplay, durations, results
from mmdist_e2e.structures import MODALITIES, MmdistError

modality = click.option(
    "--modality",
    default="rgb",
    show_default=True,
    type=click.Choice(MODALITIES),
    help="Which features of a store; what imported arrays are.",
)


@click.group("features")
def features_group() -> None:
    """Show, export and import feature files."""


@features_group.command("info")
@click.argument("path", type=PATH)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of lines.")
def info_command(path: Path, as_json: bool) -> None:
    """Show what PATH holds and how it was made.

    PATH is a feature store, an HDF5 file, a folder of VIDEO.npy, or one .npz or .npy file.
    """
    from mmdist_e2e.grounding.data.exchange import features_info

    with StepDisplay() as progress:
        found = features_info(path, progress=progress)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    for facts in found:
        made_by = facts.pop("made_by")
        lines = [f"{key.replace('_', ' ')}: {_text(value)}" for key, value in facts.items()]
        lines += [f"made by: {_text(how)}" for how in made_by]
        results.print("\n".join(lines), markup=False, soft_wrap=True)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(each)}" for key, each in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


@features_group.command("export")
@click.argument("store", type=PATH)
@click.option("--to", "target", required=True, type=PATH, help="HDF5 file or folder to write.")
@click.option(
    "--format",
    "form",
    required=True,
    type=click.Choice(["hdf5", "npy", "opentad"]),
    help="hdf5: one file. npy: a folder of VIDEO.npy and features.json. opentad: the same, where "
    "OpenTAD's and ActionFormer's fields give the times of rows.",
)
@modality
@click.option(
    "--layout",
    default="charades",
    show_default=True,
    type=click.Choice(["charades", "activitynet"]),
    help="Of hdf5, as CPL reads it: a dataset VIDEO, or VIDEO/c3d_features.",
)
def export_command(store: Path, target: Path, **options: Any) -> None:
    """Write the features of STORE in a format of other programs.

    Durations, times and provenance are kept beside the arrays: mmdist reads an export as it reads
    a store. An existing target with other content is never changed.
    """
    from mmdist_e2e.grounding.data.exchange import export_features

    with StepDisplay() as progress:
        videos, fields = export_features(store, target, progress=progress, **options)
    results.print(f"{target}: {videos} videos", markup=False, soft_wrap=True)
    if fields and options["form"] == "opentad":
        results.print(f"Fields of all videos: {_text(fields)}", markup=False, soft_wrap=True)


@features_group.command("import")
@click.argument("path", type=PATH)
@click.option("--out", required=True, type=PATH, help="Feature store to write or to add to.")
@modality
@durations
@click.option("--fps", type=float, help="Frames per second that the features were made at.")
@click.option("--stride", type=float, help="Frames from row to row.")
@click.option("--window", type=float, help="Frames of a row.  [default: as --stride]")
@click.option("--offset", type=float, help="Frame where the first row starts.  [default: 0]")
def import_command(
    path: Path,
    out: Path,
    modality: str,
    durations: Path | None,
    fps: float | None,
    stride: float | None,
    window: float | None,
    offset: float | None,
) -> None:
    """Write the features of PATH, made elsewhere, to the feature store OUT.

    PATH is an HDF5 file, a folder of VIDEO.npy, or one .npy file. Row i starts at
    (i · stride + offset) / fps seconds and lasts window / fps; OpenTAD's offset_frames is offset +
    window / 2. Without --fps and --stride, rows divide the video evenly. What mmdist features
    export wrote needs no options.
    """
    from mmdist_e2e.grounding.data.annotations import load_durations
    from mmdist_e2e.grounding.data.exchange import import_features

    fields: dict[str, float] = {}
    if fps is not None and stride is not None:
        window = stride if window is None else window
        fields = {"effective_fps": fps, "stride": stride, "window": window, "offset": offset or 0.0}
        if min(fps, stride, window) <= 0 or (offset or 0) < 0:
            raise MmdistError(
                "--fps, --stride and --window must be above 0, and --offset at least 0."
            )
    elif any(value is not None for value in (fps, stride, window, offset)):
        raise MmdistError("Times of rows need both --fps and --stride; give both or none.")
    with StepDisplay() as progress:
        videos = import_features(
            path,
            out,
            modality=modality,
            durations=load_durations(durations) if durations else None,
            fields=fields,
            progress=progress,
        )
    results.print(f"{out}: {videos} videos", markup=False, soft_wrap=True)
