"""Many videos: find them, skip what is done, collect every failure with its cause."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from mmdist_e2e.extractors.profiles import ExtractorSpec
from mmdist_e2e.extractors.runner import SnippetNetwork
from mmdist_e2e.store import FeatureStore, fast_digest
from mmdist_e2e.structures import MmdistError

if TYPE_CHECKING:
    from mmdist_e2e.extractors.video.reader import Decoder


VIDEO_SUFFIXES = frozenset(
    [".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv"]
).union([".ts", ".webm", ".wmv", ".3gp"])


@dataclass(frozen=True)
class Video:
    """A video file and its id: the path relative to the given root, without the suffix."""

    id: str
    path: Path


@dataclass(frozen=True)
class Outcome:
    """What became of one video: rows saved by modality; `cause` says why it failed."""

    video: Video
    status: Literal["done", "skipped", "failed"]
    rows: Mapping[str, int] = field(default_factory=dict)
    cause: str = ""


@dataclass
class Report:
    """Outcomes of a run, in order."""

    outcomes: list[Outcome] = field(default_factory=list)

    def count(self, status: str) -> int:
        return sum(outcome.status == status for outcome in self.outcomes)

    @property
    def failed(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.status == "failed"]


class BatchProgress(Protocol):
    """What a caller may show: which video runs, how far it is, what became of it."""

    def started(self, video: Video, index: int, total: int) -> None: ...
    def advanced(self, fraction: float) -> None: ...
    def finished(self, outcome: Outcome) -> None: ...


def find_videos(paths: Sequence[Path]) -> tuple[list[Video], list[Outcome]]:
    """Files as they are and folders searched in depth, sorted; plus what cannot be a video.

    A file's id is its name, a video in a folder has its path relative to that folder, both
    without the suffix. A missing path or a folder without videos comes back as a failed outcome,
    so that the others are still done.
    Raises MmdistError when two files have one id: one would overwrite the other's features.
    """
    videos: dict[str, Video] = {}
    problems: list[Outcome] = []
    for given in paths:
        if given.is_dir():
            found = [
                Video(path.relative_to(given).with_suffix("").as_posix(), path)
                for path in sorted(given.rglob("*"))
                if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file()
            ]
            if not found:
                valid = " ".join(sorted(VIDEO_SUFFIXES))
                cause = f"The folder {given} has no videos (files ending in {valid})."
                problems.append(Outcome(Video(str(given), given), "failed", cause=cause))
        elif given.exists():
            found = [Video(given.stem, given)]
        else:
            found = []
            cause = f"{given} does not exist; give a video file or a folder of videos."
            problems.append(Outcome(Video(str(given), given), "failed", cause=cause))
        for video in found:
            other = videos.setdefault(video.id, video)
            if other.path.resolve() != video.path.resolve():
                raise MmdistError(
                    f"Two files have the video id {video.id!r}: {other.path} and {video.path}; "
                    f"rename one, or extract them into different folders."
                )
    return list(videos.values()), problems


def extract_many(
    videos: Sequence[Video],
    specs: Sequence[ExtractorSpec],
    store: FeatureStore,
    *,
    overwrite: bool = False,
    device: str = "auto",
    precision: str = "auto",
    flow_backend: str = "auto",
    stall_seconds: float = 60.0,
    progress: BatchProgress | None = None,
) -> Report:
    """Extract every modality of every video that is not up to date, in one pass a video.

    specs: one a modality. Stored features are left alone when they were made in the same way
    from the same file. One failure never stops the other videos; what another modality finished
    is kept. A failure to write (a full disk, a file where the folder should be) fails each video
    with its cause. Networks are loaded only when there is something for them to do.
    Raises MmdistError when a network cannot be loaded: no video would go well.
    """
    from mmdist_e2e.extractors.video.reader import Decoder

    report = Report()
    networks: dict[str, SnippetNetwork] = {}

    def network_of(spec: ExtractorSpec) -> SnippetNetwork:
        if spec.modality not in networks:
            networks[spec.modality] = SnippetNetwork(
                spec, device=device, precision=precision, flow_backend=flow_backend
            )
        return networks[spec.modality]

    with Decoder(stall_seconds=stall_seconds) as decoder:
        for index, video in enumerate(videos):
            if progress is not None:
                progress.started(video, index, len(videos))
            try:
                source = fast_digest(video.path)
            except OSError as error:
                outcome = Outcome(video, "failed", cause=_unreadable(video, error))
            else:
                stale = [
                    network_of(spec)
                    for spec in specs
                    if overwrite
                    or not store.up_to_date(
                        video.id, spec.modality, matters=spec.matters, source=source
                    )
                ]
                outcome = _extract_one(video, stale, store, decoder, source, progress)
            report.outcomes.append(outcome)
            if progress is not None:
                progress.finished(outcome)
    return report


def _extract_one(
    video: Video,
    networks: Sequence[SnippetNetwork],
    store: FeatureStore,
    decoder: Decoder,
    source: Mapping[str, Any],
    progress: BatchProgress | None,
) -> Outcome:
    """Run the networks over one video and save what is whole."""
    from mmdist_e2e.extractors.extract import ExtractionError, extract_video

    if not networks:
        return Outcome(video, "skipped")
    advanced = progress.advanced if progress is not None else None
    rows: dict[str, int] = {}
    cause = ""
    try:
        try:
            made = extract_video(video.path, networks, decoder, source=source, progress=advanced)
        except ExtractionError as error:
            made, cause = dict(error.finished), str(error)
        for modality, features in made.items():
            store.save(video.id, features)
            rows[modality] = len(features.data)
    except MmdistError as error:
        cause = str(error)
    except OSError as error:
        cause = _unreadable(video, error)
    return Outcome(video, "failed" if cause else "done", rows=rows, cause=cause)


def _unreadable(video: Video, error: OSError) -> str:
    return f"{video.path} could not be read ({error.strerror or error})."
