"""`mmdist extract`: videos to features."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.markup import escape
from rich.table import Table

from mmdist_e2e.cli import common
from mmdist_e2e.cli.common import ExtractionProgress, results, say
from mmdist_e2e.structures import MODALITIES, MmdistError, check_choice
from mmdist_e2e.workspace import FEATURES, fill

if TYPE_CHECKING:
    from mmdist_e2e.extractors.batch import Report
    from mmdist_e2e.extractors.profiles import ExtractorSpec


@click.command("extract")
@click.argument("paths", nargs=-1, type=common.PATH)
@click.option(
    "--modality", help="Comma-separated: rgb, flow. Default: those of --extractor, else rgb."
)
@click.option(
    "--out", type=common.PATH, default=FEATURES, help="Folder for feature files; made if missing."
)
@click.option(
    "--extractor",
    "extractors",
    multiple=True,
    help="Name or checkpoint folder; once per modality. Default: the shipped networks.",
)
@click.option(
    "--mode",
    type=click.Choice(["windows", "dense"]),
    help="dense: I3D over the whole video at once; faster. Default: as the extractor's profile "
    "says, else windows.",
)
@click.option("--layer", type=click.Choice(["fc6", "fc7"]), help="Output layer of a C3D extractor.")
@click.option(
    "--pca",
    type=common.PATH,
    help="activitynet-pca, or an HDF5 or .npz file with x_mean and U that reduces the rows.",
)
@click.option(
    "--fps-policy",
    type=click.Choice(["ceiling", "exact", "own"]),
    help="ceiling: videos slower than the extractor's frame rate keep their rate; exact: they "
    "repeat frames; own: every frame of any video. Default: as the extractor's profile says, else "
    "ceiling.",
)
@common.choice("--flow", "auto", "native", "opencv", "opencv-cuda", help="Optical flow solver.")
@click.option("--overwrite", is_flag=True, help="Extract again even if features are up to date.")
@common.device
@common.choice("--precision", "auto", "fp32", "bf16", help="Number format of the networks.")
@click.option(
    "--deadline",
    "stall_seconds",
    default=60.0,
    type=click.FloatRange(min=0.1),
    help="Seconds without a new frame after which a video fails.",
)
def extract_command(
    paths: tuple[Path, ...],
    modality: str | None,
    out: Path,
    extractors: tuple[str, ...],
    flow: str,
    **settings: Any,
) -> None:
    """Extract features of PATHS: video files or folders of them; by default of videos/.

    All modalities of a video are extracted in one pass. Reruns skip finished videos; after a kill,
    the next run resumes. A video that fails does not stop the others: the table at the end lists
    the causes, and the exit code is 1.
    """
    from mmdist_e2e.extractors.batch import Report, extract_many, find_videos
    from mmdist_e2e.store import FeatureStore, check_out
    from mmdist_e2e.weights.registry import file_named

    given = {"paths": paths}
    say(fill("extract", given, "paths"))
    sampling = {name: settings.pop(name) for name in ("mode", "layer", "pca", "fps_policy")}
    if sampling["pca"] is not None:
        sampling["pca"] = file_named(sampling["pca"])
    wanted = parse_modalities(modality) if modality is not None else None
    specs = choose_extractors(wanted, extractors, **sampling)
    modalities = [spec.modality for spec in specs]
    if flow != "auto" and "flow" not in modalities:
        raise MmdistError(
            f"--flow {flow} chooses the optical flow solver, but no flow is extracted; add "
            f"--modality flow or leave --flow out."
        )
    found = find_videos(given["paths"])
    if found.videos:
        check_out(out)
    for problem in found.problems:
        say(f"failed: {problem.cause}")
    for spec in specs:
        say(f"{spec.modality} by {spec.name}: trained on {spec.trained_on}.")
    say(f"Features are written to {out}." if out == FEATURES else "")
    with ExtractionProgress(len(found.videos)) as progress:
        report = extract_many(
            found.videos, specs, FeatureStore(out), flow_backend=flow, progress=progress, **settings
        )
    report = Report([*found.problems, *report.outcomes])
    results.print(_summary(report, modalities))
    if found.hidden:
        results.print(f"Ignored {found.hidden} hidden files (names that start with a dot).")
    if found.repeated:
        results.print(f"Ignored {found.repeated} further names of the same files.")
    sys.exit(1 if report.failed else 0)


def _summary(report: Report, modalities: Sequence[str]) -> Table:
    """Videos, and rows of each modality, that are done, skipped and failed; causes of failures."""
    table = Table("result", title="Extraction", title_justify="left", show_edge=False)
    for name in ("videos", *(f"{modality} rows" for modality in modalities)):
        table.add_column(name, justify="right")
    table.add_column("cause", overflow="fold")
    for status, cause in (("done", ""), ("skipped", "up to date"), ("failed", "")):
        of_these = [outcome for outcome in report.outcomes if outcome.status == status]
        rows = [sum(outcome.rows.get(m, 0) for outcome in of_these) for m in modalities]
        counts = [str(n) if n or status == "done" else "" for n in rows]
        table.add_row(status, str(len(of_these)), *counts, cause)
    for outcome in report.failed:
        table.add_row(*[""] * (len(modalities) + 2), escape(outcome.cause))
    return table


def parse_modalities(text: str) -> list[str]:
    """Split "rgb,flow". Raises MmdistError for an unknown modality."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names or [text]:
        check_choice("The modality", name, MODALITIES)
    return list(dict.fromkeys(names))


def choose_extractors(
    modalities: Sequence[str] | None, extractors: Sequence[str], **sampling: Any
) -> list[ExtractorSpec]:
    """The extractor of each modality: a given one, else the one that ships.

    modalities: None means those of the given extractors, or RGB. sampling: settings of `describe`.
    Raises MmdistError as `describe` does, and where a modality has two extractors or none.
    """
    from mmdist_e2e.extractors.profiles import describe
    from mmdist_e2e.weights.registry import DEFAULT_EXTRACTORS

    chosen = [describe(name, **sampling) for name in extractors]
    given = [spec.modality for spec in chosen]
    wanted = list(modalities or dict.fromkeys(given) or ["rgb"])
    for spec in chosen:
        if spec.modality not in wanted:
            raise MmdistError(
                f"The extractor {spec.name!r} gives {spec.modality}, not {', '.join(wanted)}; "
                f"choose one of that modality or change --modality."
            )
        if given.count(spec.modality) > 1:
            names = " and ".join(repr(s.name) for s in chosen if s.modality == spec.modality)
            raise MmdistError(
                f"The extractors {names} all give {spec.modality}; choose one per modality, or "
                f"extract them into different folders."
            )
    chosen += [describe(DEFAULT_EXTRACTORS[m], **sampling) for m in wanted if m not in given]
    if sampling.get("pca") is not None and len(chosen) > 1:
        raise MmdistError(
            "--pca fits the rows of one extractor; extract the modalities one by one."
        )
    return sorted(chosen, key=lambda spec: wanted.index(spec.modality))
