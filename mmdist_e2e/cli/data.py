"""`mmdist data`: what is wrong with annotations and features, before training on them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.markup import escape
from rich.table import Table

from mmdist_e2e.cli import common as options
from mmdist_e2e.cli.common import StepDisplay, results
from mmdist_e2e.structures import MODALITIES, MmdistError

if TYPE_CHECKING:
    from mmdist_e2e.grounding.data.check import Report

LABELS = {  # of facts whose key does not read well
    "best_constant_span": "best constant answer: R@1 at IoU 0.3 / 0.5 / 0.7",
    "duration_seconds": "duration in seconds",
    "not_in_seconds": "perhaps not in seconds",
    "duplicates": "repeated lines",
    "left_out": "left out: end before start",
    "queries_dropped_by_protocol": "left out by the protocol",
}


@click.group("data")
def data_group() -> None:
    """Check annotations and features before training on them."""


@data_group.command("check")
@click.option("--features", type=options.PATH, help="Feature store, HDF5 file or .npy folder.")
@click.option("--train", "train_path", type=options.PATH, help="Annotations for training.")
@click.option("--val", "val_path", type=options.PATH, help="Annotations for validation.")
@click.option("--test", "test_path", type=options.PATH, help="Annotations for testing.")
@options.glove
@click.option(
    "--durations",
    multiple=True,
    type=options.PATH,
    help="Seconds by video: JSON, Charades' CSV or a feature store; may be repeated.",
)
@click.option(
    "--modality",
    default="rgb",
    show_default=True,
    type=click.Choice(MODALITIES),
    help="Which features of a store to read.",
)
@options.protocol
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
@click.pass_context
def check_command(
    ctx: click.Context,
    features: Path | None,
    train_path: Path | None,
    val_path: Path | None,
    test_path: Path | None,
    glove: Path | None,
    durations: Sequence[Path],
    modality: str,
    protocol: str,
    as_json: bool,
) -> None:
    """Report what the files hold and everything that is wrong with them.

    Errors are what training or evaluation would refuse; with one, the exit code is 1. The best
    constant answer is the one span of the video that fits all queries of a split best; a model
    should beat it.
    """
    from mmdist_e2e.grounding.data.check import check_data
    from mmdist_e2e.grounding.evaluate import best_constant_span, recall_metrics
    from mmdist_e2e.weights.words import load_word_vectors, shipped_word_vectors

    def constant_answer(truth: Any, durations_Q: Any) -> dict[str, Any]:
        span, iou_Q = best_constant_span(truth, durations_Q)
        return {"span": list(span), **recall_metrics(iou_Q[:, None])}

    given = {"train": train_path, "val": val_path, "test": test_path}
    files = {name: path for name, path in given.items() if path is not None}
    if not files:
        raise MmdistError("There is nothing to check; give --train, --val or --test.")
    with StepDisplay() as progress:
        report = check_data(
            files,
            features_path=features,
            word_vectors=load_word_vectors(glove) if glove else shipped_word_vectors(),
            constant_answer=constant_answer,
            durations=durations,
            modality=modality,
            protocol=protocol,
            progress=progress,
        )
    if as_json:
        click.echo(json.dumps(vars(report), indent=2, ensure_ascii=False))
    else:
        _show(report)
    if report.errors:
        ctx.exit(1)


def _show(report: Report) -> None:
    if report.splits:
        _print_table(report.splits)
    if report.features:
        _print_table({"features": report.features})
    for kind, sentences in (("warning", report.warnings), ("error", report.errors)):
        for sentence in sentences:
            results.print(f"{kind}: {sentence}", markup=False, soft_wrap=True)
    results.print(f"{len(report.errors)} errors, {len(report.warnings)} warnings.")


def _print_table(columns: Mapping[str, Mapping[str, Any]]) -> None:
    """One column for each split, one row for each fact."""
    table = Table("", *columns, show_edge=False)
    for key in dict.fromkeys(key for facts in columns.values() for key in facts):
        cells = [_cell(facts.get(key)) for facts in columns.values()]
        if any(cells):
            table.add_row(LABELS.get(key, key.replace("_", " ")), *map(escape, cells))
    results.print(table)
    results.print()


def _cell(value: Any) -> str:
    """A fact as text; empty for none."""
    if isinstance(value, Mapping):
        if "span" in value:
            start, end = value["span"]
            recalls = " / ".join(f"{v:.1f}" for k, v in value.items() if k.startswith("R@1"))
            return f"{recalls} ([{start:.2f}, {end:.2f}])"
        if "median" in value:
            low, median, mean, high = (f"{value[k]:.4g}" for k in ("min", "median", "mean", "max"))
            return f"{median} (mean {mean}, {low} to {high})"
        return ", ".join(f"{k}: {v}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value or "")
