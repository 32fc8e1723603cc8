"""`mmdist ground`: a video and queries to moments."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from mmdist_e2e.cli import common
from mmdist_e2e.cli.common import PATH, StepDisplay
from mmdist_e2e.store import row_writer
from mmdist_e2e.structures import Answer, MmdistError
from mmdist_e2e.workspace import FEATURES, RECIPES, VIDEOS, newest_run


@click.command("ground")
@click.argument("clip", type=PATH)
@click.argument("query", nargs=-1)
@click.option(
    "--queries",
    "file",
    metavar="FILE",
    help="File of more queries, one per line, in UTF-8; - reads them from standard input.",
)
@click.option(
    "--model",
    type=PATH,
    help="Name (see: mmdist weights list) or folder of a model.  [default: the newest finished run "
    "in runs/, a student before a teacher before a baseline; without any, the model that ships]",
)
@click.option(
    "--extractor",
    multiple=True,
    help="Folder of an extractor that is not in the registry; once per modality.",
)
@click.option("--top-k", default=5, help="Maximum number of moments.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print JSON: an object, or a list for several queries."
)
@click.option("--out", type=PATH, help="File of the moments, a row each: .parquet or .jsonl.")
@common.device
@click.option("--features", type=PATH, default=FEATURES, help="Store of features to reuse.")
@click.option("--cache", type=PATH, help="Folder of cached features.  [default: the user's cache]")
def ground_command(
    clip: Path,
    query: tuple[str, ...],
    file: str | None,
    model: Path | None,
    top_k: int,
    as_json: bool,
    out: Path | None,
    cache: Path | None,
    **options: Any,
) -> None:
    """Find the moments of CLIP, a file here or in videos/, that each QUERY describes.

    Prints start and end in seconds and a score, best first. Several queries read the video once.
    """
    from mmdist_e2e.pipeline import load

    queries = [*query, *(_lines(file) if file else ())]
    if not queries:
        raise MmdistError("There is no query; give a sentence after the video, or --queries FILE.")
    write = row_writer(out) if out else None
    if not clip.exists() and (VIDEOS / clip).is_file():
        clip = VIDEOS / clip
    if model is not None and not model.is_dir():
        model = common.pulled(model)
    run = newest_run(*RECIPES) if model is None else None
    grounder = load(model or run, cache=cache or True, **options)
    if run is not None:
        click.echo(f"Found in this folder: --model {run}", err=True)
    with ExitStack() as displays:
        display: StepDisplay | None = None

        def progress(done: float) -> None:
            nonlocal display
            if display is None:  # only extraction takes long enough for a bar
                display = displays.enter_context(StepDisplay(logged=False))
            display(f"reading {clip.name}", int(100 * done), 100)

        answers = grounder.ground(clip, queries, top_k=top_k, progress=progress)
    if run is not None:
        answers = [replace(answer, model=f"{answer.model}, {run}") for answer in answers]
    if write:
        write([row for answer in answers for row in answer.rows()])
    if as_json:
        printed = [_rounded(answer) for answer in answers]
        click.echo(json.dumps(printed if len(printed) > 1 else printed[0], indent=2))
        for line in dict.fromkeys(line for answer in answers for line in answer.unknown):
            click.echo(f"Warning: {line}", err=True)
        return
    for answer in answers:
        click.echo(f"{answer.table}\n")
    click.echo("\n".join(answers[0].about))


def _rounded(answer: Answer) -> dict[str, Any]:
    """The answer with milliseconds, and scores of four decimal places."""
    raw = answer.to_dict()
    raw["duration_seconds"] = round(raw["duration_seconds"], 3)
    for moment in raw["moments"]:
        places = {"start": 3, "end": 3, "score": 4}
        moment.update({key: round(moment[key], digits) for key, digits in places.items()})
    return raw


def _lines(file: str) -> list[str]:
    """The queries of a file; blank lines are skipped."""
    try:
        with click.open_file(file, encoding="utf-8-sig") as stream:  # - is standard input
            return [line.strip() for line in stream.read().split("\n") if line.strip()]
    except OSError as error:
        raise MmdistError(f"--queries {file} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise MmdistError(f"--queries {file} is not UTF-8 text ({error}); convert it.") from error
