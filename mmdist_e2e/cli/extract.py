"""`mmdist extract`: videos to features."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from mmdist_e2e.cli.display import ExtractionProgress, extraction_summary, results, say
from mmdist_e2e.structures import MODALITIES, MmdistError


@click.command("extract")
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--modality", default="rgb", show_default=True, help="Comma-separated: rgb.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=True),
    default=Path("features"),
    show_default=True,
    help="Folder of the features.",
)
@click.option("--extractor", help="Name or checkpoint folder; by default the shipped network.")
@click.option("--overwrite", is_flag=True, help="Extract again what is already there.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N.")
@click.option(
    "--precision", default="auto", show_default=True, type=click.Choice(["auto", "fp32", "bf16"])
)
@click.option(
    "--deadline",
    "stall_seconds",
    default=60.0,
    show_default=True,
    type=click.FloatRange(min=0.1),
    help="Seconds without a new frame after which a video counts as failed.",
)
def extract_command(
    paths: tuple[Path, ...],
    modality: str,
    out: Path,
    extractor: str | None,
    overwrite: bool,
    device: str,
    precision: str,
    stall_seconds: float,
) -> None:
    """Extract per-snippet features of PATHS, video files or folders of them.

    A second run does nothing; a killed one goes on where it was. The exit code is 1 when any
    video failed; the table at the end says why.
    """
    from mmdist_e2e.extractors.batch import Outcome, Report, extract_many, find_videos
    from mmdist_e2e.extractors.networks import describe
    from mmdist_e2e.pipeline import default_extractors
    from mmdist_e2e.store import FeatureStore

    modalities = parse_modalities(modality)
    names = dict.fromkeys(modalities, extractor) if extractor else default_extractors(modalities)
    if out.exists() and not out.is_dir():
        raise MmdistError(f"{out} is a file; --out needs a folder (a new one is made).")
    videos, problems = find_videos(paths)
    for problem in problems:
        say(f"failed: {problem.cause}")
    outcomes: list[Outcome] = [*problems]
    for name in names.values():
        spec = describe(str(name))
        if spec.modality not in modalities:
            raise MmdistError(
                f"The extractor {spec.name!r} gives {spec.modality}, not {modality}; choose one "
                f"of that modality or change --modality."
            )
        say(f"{spec.modality} by {spec.name}: trained on {spec.trained_on}.")
        with ExtractionProgress(len(videos)) as progress:
            report = extract_many(
                videos,
                spec,
                FeatureStore(out),
                overwrite=overwrite,
                device=device,
                precision=precision,
                stall_seconds=stall_seconds,
                progress=progress,
            )
        outcomes.extend(report.outcomes)
    whole = Report(outcomes)
    results.print(extraction_summary(whole))
    sys.exit(1 if whole.failed else 0)


def parse_modalities(text: str) -> list[str]:
    """Split "rgb,flow". Raises MmdistError for a name that is no modality."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in MODALITIES]
    if unknown or not names:
        raise MmdistError(
            f"The modality {(unknown or [text])[0]!r} is unknown; valid: {', '.join(MODALITIES)}."
        )
    return list(dict.fromkeys(names))
