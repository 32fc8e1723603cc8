"""`mmdist extract`: videos to features."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mmdist_e2e.cli import common as options
from mmdist_e2e.cli.common import ExtractionProgress, extraction_summary, results, say
from mmdist_e2e.structures import MODALITIES, MmdistError

if TYPE_CHECKING:
    from mmdist_e2e.extractors.profiles import ExtractorSpec


@click.command("extract")
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--modality",
    help="Comma-separated: rgb, flow. Default: those of the extractors given, else rgb.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=True),
    default=Path("features"),
    show_default=True,
    help="Folder of the features.",
)
@click.option(
    "--extractor",
    "extractors",
    multiple=True,
    help="Name or checkpoint folder, once a modality; by default the shipped networks.",
)
@click.option(
    "--mode",
    default="windows",
    show_default=True,
    type=click.Choice(["windows", "dense"]),
    help="dense: I3D over the whole video at once, faster than overlapping windows.",
)
@click.option("--layer", type=click.Choice(["fc6", "fc7"]), help="Of a C3D extractor.")
@click.option(
    "--pca",
    type=click.Path(path_type=Path),
    help="HDF5 or .npz file with x_mean and U: reduces the rows as ActivityNet's C3D were.",
)
@click.option(
    "--fps-policy",
    default="ceiling",
    show_default=True,
    type=click.Choice(["ceiling", "exact"]),
    help="Of a video slower than the extractor's rate: keep its rate, or repeat its frames.",
)
@click.option(
    "--flow",
    "flow_backend",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "native", "opencv", "opencv-cuda"]),
    help="What computes optical flow.",
)
@click.option("--overwrite", is_flag=True, help="Extract again what is already there.")
@options.device
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
    modality: str | None,
    out: Path,
    extractors: tuple[str, ...],
    mode: str,
    layer: str | None,
    pca: Path | None,
    fps_policy: str,
    flow_backend: str,
    overwrite: bool,
    device: str,
    precision: str,
    stall_seconds: float,
) -> None:
    """Extract per-snippet features of PATHS, video files or folders of them.

    Every modality of a video is extracted in one pass. A second run does nothing; a killed one
    goes on where it was. The exit code is 1 when any video failed; the table at the end says why.
    """
    from mmdist_e2e.extractors.batch import Outcome, Report, extract_many, find_videos
    from mmdist_e2e.store import FeatureStore, check_out

    specs = choose_extractors(
        parse_modalities(modality) if modality is not None else None,
        extractors,
        mode=mode,
        layer=layer,
        pca=pca,
        fps_policy=fps_policy,
    )
    modalities = [spec.modality for spec in specs]
    if flow_backend != "auto" and "flow" not in modalities:
        raise MmdistError(
            f"--flow {flow_backend} says what computes optical flow, and none is extracted; add "
            f"--modality flow, or leave --flow out."
        )
    check_out(out)
    videos, problems = find_videos(paths)
    for problem in problems:
        say(f"failed: {problem.cause}")
    for spec in specs:
        say(f"{spec.modality} by {spec.name}: trained on {spec.trained_on}.")
    with ExtractionProgress(len(videos)) as progress:
        report = extract_many(
            videos,
            specs,
            FeatureStore(out),
            overwrite=overwrite,
            device=device,
            precision=precision,
            flow_backend=flow_backend,
            stall_seconds=stall_seconds,
            progress=progress,
        )
    outcomes: list[Outcome] = [*problems, *report.outcomes]
    whole = Report(outcomes)
    results.print(extraction_summary(whole, modalities))
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


def choose_extractors(
    modalities: Sequence[str] | None, extractors: Sequence[str], **options: Any
) -> list[ExtractorSpec]:
    """The extractor of each modality: one that was given, else the one that ships.

    modalities: None means those of the given extractors, or RGB. options: see `describe`; they
    hold for every extractor. Raises MmdistError as `describe` does, where two extractors or none
    give a modality, and where an option can only fit one of several extractors.
    """
    from mmdist_e2e.extractors.profiles import describe
    from mmdist_e2e.pipeline import default_extractors

    specs: dict[str, ExtractorSpec] = {}
    for name in extractors:
        spec = describe(name, **options)
        if modalities is not None and spec.modality not in modalities:
            raise MmdistError(
                f"The extractor {spec.name!r} gives {spec.modality}, not {', '.join(modalities)}; "
                f"choose one of that modality or change --modality."
            )
        other = specs.setdefault(spec.modality, spec)
        if other is not spec:
            raise MmdistError(
                f"The extractors {other.name!r} and {spec.name!r} both give {spec.modality}; "
                f"choose one a modality, or extract them into different folders."
            )
    wanted = modalities or list(specs) or ["rgb"]
    for modality, name in default_extractors([m for m in wanted if m not in specs]).items():
        specs[modality] = describe(name, **options)
    if options.get("pca") is not None and len(specs) > 1:
        raise MmdistError(
            "--pca fits the rows of one extractor; extract the modalities one by one."
        )
    return [specs[modality] for modality in wanted]
