"""`mmdist evaluate`: a trained model on annotations, beside its controls."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.table import Table

from mmdist_e2e.cli.display import StepDisplay, results, say


@click.command("evaluate")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--features", required=True, type=click.Path(path_type=Path))
@click.option("--annotations", required=True, type=click.Path(path_type=Path))
@click.option("--durations", type=click.Path(path_type=Path), help="JSON: video id to seconds.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of metrics and predictions.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def evaluate_command(
    run: Path,
    features: Path,
    annotations: Path,
    durations: Path | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Evaluate RUN: R@n at IoU m and mIoU, in percent, beside the four controls.

    The controls: the best constant span (fitted on the evaluated split itself), a random one of
    the model's own proposals, an untrained network, and queries shuffled among videos.
    """
    from mmdist_e2e.grounding.evaluate import evaluate_run, summary_lines

    with StepDisplay() as progress:
        result = evaluate_run(
            run,
            features_path=features,
            annotations_path=annotations,
            durations=durations,
            out=out,
            progress=progress,
        )
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    lines = summary_lines(result)
    table = Table(show_edge=False)
    table.add_column("percent")
    columns = list(lines[0][1])
    for column in columns:
        table.add_column(column, justify="right")
    for name, metrics in lines:
        cells = [f"{metrics[c]:.2f}" if c in metrics else "–" for c in columns]
        table.add_row(name.replace("_", " "), *cells)
    results.print(table)
    say(
        f"{result['annotations']}, protocol {result['protocol']}, recipe {result['recipe']}, "
        f"seed {result['seed']}, checkpoint chosen by {result['selected_by']}."
    )
