"""`mmdist ground`: a clip and a sentence to moments."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.table import Table

from mmdist_e2e.cli import common as options
from mmdist_e2e.cli.common import bar, results, say


@click.command("ground")
@click.argument("clip", type=options.PATH)
@click.argument("query")
@click.option("--model", type=options.PATH, help="A run's folder; default: shipped.")
@click.option(
    "--extractor",
    "extractors",
    multiple=True,
    help="Folder of an extractor that is not in the registry, once a modality.",
)
@click.option("--top-k", default=5, show_default=True, help="How many moments at most.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
@options.device
@click.option("--cache", type=options.PATH, help="Folder of cached features.")
def ground_command(
    clip: Path,
    query: str,
    model: Path | None,
    extractors: tuple[str, ...],
    top_k: int,
    as_json: bool,
    device: str,
    cache: Path | None,
) -> None:
    """Say when in CLIP the sentence QUERY happens: start, end (seconds) and score, best first."""
    from mmdist_e2e.pipeline import load

    grounder = load(model, device=device, cache=cache, extractor=extractors)
    with bar(f"reading {clip.name}") as progress:
        moments = grounder.ground(clip, query, top_k=top_k, progress=progress)
    line = grounder.model.card_line
    if as_json:
        answer = {
            "video": str(clip),
            "query": query,
            "model": line,
            "moments": [
                {
                    "start": round(moment.start, 3),
                    "end": round(moment.end, 3),
                    "score": round(moment.score, 4),
                }
                for moment in moments
            ],
        }
        click.echo(json.dumps(answer, indent=2))
        return
    table = Table(show_edge=False)
    for column in ("rank", "start (s)", "end (s)", "score"):
        table.add_column(column, justify="right")
    for rank, moment in enumerate(moments, start=1):
        table.add_row(str(rank), f"{moment.start:.2f}", f"{moment.end:.2f}", f"{moment.score:.3f}")
    results.print(table)
    say(f"Answered by {line}")
