"""`mmdist extract`: videos to features."""

from __future__ import annotations

import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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


class _Stopped(KeyboardInterrupt):
    """A signal asked the run to end."""


@contextmanager
def _stoppable() -> Iterator[None]:
    """Ctrl-C and SIGTERM raise _Stopped, once; ending then takes seconds and is not disturbed."""
    numbers = (signal.SIGINT, signal.SIGTERM)

    def stop(number: int, _: object) -> None:
        for other in numbers:
            signal.signal(other, signal.SIG_IGN)
        raise _Stopped(number)

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread gets signals
        return
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    except _Stopped as stopped:
        sys.exit(128 + stopped.args[0])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
@click.option(
    "--devices",
    "--device",
    "devices",
    default="auto",
    help="Comma-separated. auto: all GPUs, else the CPU; all: all GPUs; cpu; N or cuda:N: one GPU.",
)
@click.option(
    "--workers",
    default=1,
    type=click.IntRange(min=0),
    help="Worker processes on each device; on a CPU they share the cores. 0: extract in the main "
    "process.",
)
@click.option(
    "--decoders",
    type=click.IntRange(min=1),
    help="Videos that each worker decodes at the same time. Default: by the number of cores.",
)
@common.choice(
    "--engine", "local", "ray", help="ray: Ray Data, on this machine or the cluster of --address."
)
@click.option(
    "--address",
    help="Of a running Ray cluster (HOST:6379, or auto). Its machines need this package, and share "
    "the folders of videos, checkpoints and features. Without GPUs, --workers counts its actors.",
)
@common.choice("--precision", "auto", "fp32", "bf16", help="Number format of the networks.")
@click.option(
    "--deadline",
    "stall_seconds",
    default=60.0,
    type=click.FloatRange(min=0.1),
    help="Seconds without a new frame after which a video fails.",
)
@click.option(
    "--list",
    "list_file",
    type=common.PATH,
    help="File with the path of a video on each line; - for stdin. A line '# root: DIR' sets the "
    "folder that the next paths and their ids are relative to; other lines with # are comments. A "
    'line that begins with " is a JSON string: for names with line feeds, or with bytes that are '
    "not UTF-8, as \\udcXX.",
)
@click.option("--root", type=common.PATH, help="Root of a list without such a line: see --list.")
@click.option(
    "--shard",
    metavar="I/N",
    help="Extract one of N parts of the videos, I = 0 … N−1. Parts depend on the ids alone.",
)
@click.option(
    "--log",
    type=common.PATH,
    help="File to which a JSON object is appended for each video as it finishes: id, path, status, "
    "rows, cause, error, seconds by stage, video_seconds, attempts, worker.",
)
@_stoppable()
def extract_command(
    paths: tuple[Path, ...],
    modality: str | None,
    out: Path,
    extractors: tuple[str, ...],
    flow: str,
    devices: str,
    engine: str,
    address: str | None,
    list_file: Path | None,
    root: Path | None,
    shard: str | None,
    log: Path | None,
    **settings: Any,
) -> None:
    """Extract features of PATHS: video files or folders of them; by default of videos/.

    All modalities of a video are extracted in one pass. Reruns skip finished videos; after a kill,
    the next run resumes. Several runs on one output folder share the work. A video that fails does
    not stop the others: the table at the end lists the causes, and OUT/failed.txt the videos, for
    --list.

    Exit codes: 0 all videos are done; 3 some failed; 1 all failed, or an error; 2 wrong usage; 130
    and 143 stopped by Ctrl-C and SIGTERM.
    """
    from mmdist_e2e.extractors.batch import Engine, Report
    from mmdist_e2e.extractors.journal import Journal, Log
    from mmdist_e2e.extractors.search import find_videos, in_shard, printable, read_list
    from mmdist_e2e.store import FeatureStore, check_out
    from mmdist_e2e.weights.registry import file_named

    given = {"paths": paths}
    if root is not None and list_file is None:
        raise MmdistError("--root is the root of a list; give a list with --list, or leave it out.")
    if list_file is None:
        say(fill("extract", given, "paths"))
    part = parse_shard(shard) if shard is not None else (0, 1)
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
    store, lines = FeatureStore(out), Log(log) if log is not None else None
    settings |= {"devices": devices.split(","), "flow_backend": flow}
    if engine == "ray":
        from mmdist_e2e.extractors.engines.ray import RayEngine

        extraction: Engine | RayEngine = RayEngine(specs, store, address=address, **settings)
    elif address is not None:
        raise MmdistError("--address is of a Ray cluster; add --engine ray, or leave it out.")
    else:
        extraction = Engine(specs, store, **settings)
    listed = read_list(_content(list_file), root) if list_file is not None else []
    found = find_videos(given["paths"], lists=listed)
    videos = [video for video in found.videos if in_shard(video.id, part)]
    problems = [problem for problem in found.problems if in_shard(problem.video.id, part)]
    if videos:
        check_out(out)
    for spec in specs:
        say(f"{spec.modality} by {spec.name}: trained on {spec.trained_on}.")
    say(f"Features are written to {out}." if out == FEATURES else "")
    error: _Stopped | MmdistError | None = None
    with ExtractionProgress(len(problems) + len(videos), lines) as progress:
        for problem in problems:
            progress.finished(problem)
        try:
            with extraction:
                extraction.run(videos, progress)
        except (_Stopped, MmdistError) as raised:
            error = raised
    report = Report(progress.outcomes)
    stopped = isinstance(error, _Stopped)
    if report.outcomes or stopped or error is None:
        results.print(_summary(report, modalities, stopped))
    if found.hidden:
        results.print(f"Ignored {found.hidden} hidden files (names that start with a dot).")
    if found.repeated:
        results.print(f"Ignored {found.repeated} further names of the same files.")
    try:
        failed = Journal(out).write_list(report.outcomes) if out.is_dir() else None
    except MmdistError as raised:
        error, failed = error or raised, None
    if failed is not None and report.failed:
        again = printable(str(failed))
        say(f"To try the failed videos again: mmdist extract --list {again}")
    if error is not None:
        raise error
    good = report.count("done") + report.count("skipped")
    sys.exit(0 if not report.failed else 3 if good else 1)


def parse_shard(text: str) -> tuple[int, int]:
    """Index and count of "I/N". Raises MmdistError."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not int(match[1]) < int(match[2]):
        raise MmdistError(
            f"--shard {text} is no part; write I/N with I from 0 to N − 1: 0/3, 1/3 and 2/3 are "
            f"three parts that make up the whole."
        )
    return int(match[1]), int(match[2])


def _content(path: Path) -> bytes:
    """The bytes of a list; - is stdin. Raises MmdistError when it cannot be read."""
    try:
        return sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    except OSError as error:
        raise MmdistError(f"The list {path} cannot be read ({error.strerror}).") from error


def _summary(report: Report, modalities: Sequence[str], stopped: bool) -> Table:
    """Videos, and rows of each modality, that are done, skipped and failed; causes of failures."""
    title = (
        "Extraction (stopped; run the same command again to resume)" if stopped else "Extraction"
    )
    table = Table("result", title=title, title_justify="left", show_edge=False)
    for name in ("videos", *(f"{modality} rows" for modality in modalities)):
        table.add_column(name, justify="right")
    table.add_column("cause", overflow="fold")
    others = sum(outcome.cause != "" and outcome.status == "skipped" for outcome in report.outcomes)
    skipped = f"up to date, {others} of them by another run" if others else "up to date"
    for status, cause in (("done", ""), ("skipped", skipped), ("failed", "")):
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
