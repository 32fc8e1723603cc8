"""`mmdist data`: what is wrong with somebody's files, before an hour is spent on them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
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

Facts = Mapping[str, Any]


@click.group("data")
def data_group() -> None:
    """Look at annotations and features before training on them."""


@data_group.command("check")
@click.option("--features", type=options.PATH, help="Store, HDF5 or .npy folder.")
@click.option("--train", "train_path", type=options.PATH, help="Annotations.")
@click.option("--val", "val_path", type=options.PATH, help="Annotations.")
@click.option("--test", "test_path", type=options.PATH, help="Annotations.")
@options.glove
@click.option(
    "--durations",
    multiple=True,
    type=options.PATH,
    help="Seconds by video: JSON, Charades' CSV or a feature store; may be repeated.",
)
@click.option("--modality", default="rgb", show_default=True, type=click.Choice(MODALITIES))
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
    """Read everything once and say what it holds and what is wrong with it.

    Errors are what training or evaluation would refuse; with one, the exit code is 1. The number
    to beat is the best answer that is the same for every query, fitted on that very split.
    """
    from mmdist_e2e.grounding.data.check import check_data
    from mmdist_e2e.weights.words import load_word_vectors, shipped_word_vectors

    given = {"train": train_path, "val": val_path, "test": test_path}
    files = {name: path for name, path in given.items() if path is not None}
    if not files:
        raise MmdistError("There is nothing to check; give --train, --val or --test.")
    with StepDisplay() as progress:
        report = check_data(
            files,
            features_path=features,
            word_vectors=load_word_vectors(glove) if glove else shipped_word_vectors(),
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
        results.print(_splits_table(report))
        results.print()
    if report.features:
        results.print(_features_table(report.features))
        results.print()
    for kind, sentences in (("warning", report.warnings), ("error", report.errors)):
        for sentence in sentences:
            results.print(f"{kind}: {sentence}", markup=False, soft_wrap=True)
    results.print(f"{len(report.errors)} errors, {len(report.warnings)} warnings.")


def _splits_table(report: Report) -> Table:
    """A column a split; a row a fact that any split has."""
    table = Table("", *report.splits, show_edge=False)
    for label, tell in ROWS:
        cells = [_cell(tell, facts) for facts in report.splits.values()]
        if any(cells):
            table.add_row(label, *map(escape, cells))
    for label, tell in WORD_ROWS:
        cells = [_cell(tell, report.words[name]) for name in report.splits]
        if any(cells):
            table.add_row(label, *map(escape, cells))
    for pair, overlap in report.overlaps.items():
        one, other = pair.split(", ")
        shared = f"{overlap['videos']} videos, {overlap['queries']} sentences"
        cells = [shared if name == other else "" for name in report.splits]
        table.add_row(f"shared with {one}", *cells)
    return table


def _cell(tell: Callable[[Facts], str], facts: Facts) -> str:
    try:
        return tell(facts)
    except KeyError:  # a fact that these files do not give
        return ""


def _spread(facts: Facts, scale: float = 1.0) -> str:
    return (
        f"{facts['median'] * scale:.4g} (mean {facts['mean'] * scale:.4g}, "
        f"{facts['min'] * scale:.3g} to {facts['max'] * scale:.4g})"
    )


def _range(facts: Facts) -> str:
    return f"{facts['median']:g} ({facts['min']:g} to {facts['max']:g})"


def _late(facts: Facts) -> str:
    count = facts["ends_past_duration"]
    return f"{count} (by {facts['largest_past_duration_seconds']:.2f} s at most)" if count else "0"


def _constant(facts: Facts) -> str:
    best = facts["best_constant_span"]
    start, end = best["span"]
    recalls = " / ".join(f"{value:.1f}" for key, value in best.items() if key.startswith("R@1"))
    return f"{recalls} ([{start:.2f}, {end:.2f}])"


ROWS: tuple[tuple[str, Callable[[Facts], str]], ...] = (
    ("file", lambda f: str(f["file"])),
    ("protocol", lambda f: str(f["protocol"])),
    ("queries", lambda f: f"{f['queries']}"),
    ("left out by the protocol", lambda f: f"{f['queries_dropped_by_protocol'] or ''}"),
    ("videos", lambda f: f"{f['videos']}"),
    ("words a query", lambda f: _range(f["words_per_query"])),
    ("queries cut at 20 words", lambda f: f"{f['queries_cut_at_20_words']}"),
    ("repeated lines", lambda f: f"{f['duplicates']}"),
    ("queries of several moments", lambda f: f"{f['queries_of_several_moments'] or ''}"),
    ("duration, s", lambda f: _spread(f["duration_seconds"])),
    ("moment, % of the video", lambda f: _spread(f["moment_share_of_video"], 100)),
    ("ends past the video", _late),
    ("to beat: R@1 at IoU 0.3 / 0.5 / 0.7", _constant),
)
WORD_ROWS: tuple[tuple[str, Callable[[Facts], str]], ...] = (
    ("distinct words", lambda f: f"{f['distinct']}"),
    ("words without a vector", lambda f: f"{f['share_without_vector'] * 100:.2f} %"),
    ("words not seen in training", lambda f: f"{f['share_unseen_in_training'] * 100:.2f} %"),
)


def _features_table(facts: Facts) -> Table:
    table = Table("features", "", show_edge=False)
    rows = {
        "kind": facts["kind"],
        "made by": ", ".join(f"{k} {v}" for k, v in facts["made_by"].items()),
        "videos": f"{facts['videos']}, {facts['videos_missing']} missing, "
        f"{facts['videos_unused']} unused",
        "channels": ", ".join(map(str, facts["channels"])),
        "type": ", ".join(facts["dtypes"]),
        "rows a video": _range(facts["rows"]),
        "largest value": f"{facts['largest_value']:.4g}",
    }
    for label, value in rows.items():
        table.add_row(label, escape(str(value)))
    return table
