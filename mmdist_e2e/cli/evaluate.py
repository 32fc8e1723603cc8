"""`mmdist evaluate`: a trained model on annotations, beside its controls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from mmdist_e2e.cli import common as options
from mmdist_e2e.cli.common import StepDisplay, results, say
from mmdist_e2e.structures import MODALITIES, MmdistError
from mmdist_e2e.workspace import RUNS, fill


@click.command("evaluate")
@click.argument("runs", nargs=-1, type=options.PATH)
@options.places("rgb", "flow", "annotations", "durations")
@options.skip_missing
@options.protocol
@options.device
@click.option(
    "--out",
    type=options.PATH,
    help="Folder of metrics.json and predictions.jsonl.  [default: RUN/evaluations/NAME-DIGEST, "
    "in runs/ for a model of a name]",
)
@click.option(
    "--predictions",
    "predictions_path",
    type=options.PATH,
    help="File for the predictions of one run too: .parquet or .jsonl.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def evaluate_command(
    runs: tuple[Path, ...],
    out: Path | None,
    device: str,
    as_json: bool,
    **given: Any,
) -> None:
    """Evaluate RUNS: R@n at IoU m and mIoU in percent, and four controls.

    Without RUNS, the newest finished run in runs/: a student before a teacher before a baseline.
    Queries are answered as `mmdist ground` answers them. Of several runs (seeds of one recipe) the
    table shows mean ± standard deviation. Every combination of model, features, annotations and
    protocol has its own folder.

    The controls: the best constant span (fitted on the evaluated annotations), a random one of the
    model's own proposals, an untrained network, and queries shuffled among videos.
    """
    from mmdist_e2e.extractors.runner import resolve_device
    from mmdist_e2e.grounding.evaluate import evaluate_run, spread_over_runs

    if len(runs) > 1 and (out or given["predictions_path"]):
        raise MmdistError("--out and --predictions are for one run; omit them for several.")
    folders = tuple(run if run.is_dir() else options.pulled(run) for run in runs)
    # Results of a model from the cache belong here.
    homes = {to: RUNS / name for to, name in zip(folders, runs, strict=True) if to != name}
    given |= {"runs": folders, "device": resolve_device(device)}
    say(fill("evaluate", given, "runs", MODALITIES, "annotations"))
    runs, given["features_path"] = given.pop("runs"), given.pop("rgb") or given["flow"]
    for option, name in (("flow", "flow_features_path"), ("annotations", "annotations_path")):
        given[name] = given.pop(option)
    with StepDisplay() as progress:
        evaluated = [
            evaluate_run(run, home=homes.get(run), out=out, progress=progress, **given)
            for run in runs
        ]
    if as_json:
        click.echo(json.dumps(evaluated[0] if len(runs) == 1 else evaluated, indent=2))
        return
    lines = spread_over_runs(evaluated)
    columns = list(lines[0][1])
    table = Table("percent", show_edge=False)
    for column in columns:
        table.add_column(column, justify="right")
    for name, metrics in lines:
        cells = ["{:.2f} ± {:.2f}".format(*metrics[c]) if c in metrics else "–" for c in columns]
        table.add_row(name, *(cell if len(runs) > 1 else cell.split(" ±")[0] for cell in cells))
    results.print(table)
    for result in evaluated:
        say(f"Written to {result['out']}.")
    if "skipped" in result:
        say(options.skipped(result["annotations"], result["skipped"]))
    seeds = ", ".join(str(each["seed"]) for each in evaluated)
    say(
        f"Protocol {result['protocol']}, recipe {result['recipe']}, seeds {seeds}, checkpoints "
        f"chosen by {result['selected_by']}."
    )
