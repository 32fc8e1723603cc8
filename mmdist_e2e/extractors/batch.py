"""Many videos: find them, skip what is up to date, collect every failure with its cause."""

from __future__ import annotations

import stat
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from mmdist_e2e.extractors.extract import ExtractionError, cause_of, extract_video
from mmdist_e2e.extractors.profiles import ExtractorSpec
from mmdist_e2e.extractors.runner import SnippetNetwork
from mmdist_e2e.extractors.video.reader import Decoder
from mmdist_e2e.store import VIDEO_SUFFIXES, FeatureStore, fast_digest, video_key
from mmdist_e2e.structures import Features, MmdistError


def printable(text: str) -> str:
    """The text on one line, with � for control characters and bytes that are not UTF-8."""
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cs") else c for c in text)


@dataclass(frozen=True)
class Video:
    """A video file and its id: the path relative to the given folder, without the suffix."""

    id: str
    path: Path

    @property
    def label(self) -> str:
        """The id as it can be printed."""
        return printable(self.id)


@dataclass(frozen=True)
class Outcome:
    """The result for one video: rows saved by modality; `cause` says why it failed."""

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
    """What a caller may show: the running video, its fraction done, its outcome."""

    def started(self, video: Video, index: int, total: int) -> None: ...
    def advanced(self, fraction: float) -> None: ...
    def finished(self, outcome: Outcome) -> None: ...


class Found(NamedTuple):
    """The result of a search.

    problems: paths that cannot be extracted, as failed outcomes. hidden: how many names that start
    with a dot were ignored. repeated: how many further names of the videos' files were ignored.
    """

    videos: list[Video]
    problems: list[Outcome]
    hidden: int
    repeated: int


def find_videos(paths: Sequence[Path]) -> Found:
    """Search the given files and folders for videos; those of a folder come sorted.

    The id of a given file is its name; a video in a folder has its path relative to that folder;
    both without the suffix, in NFC. Hidden files and folders inside a folder are ignored, macOS's
    `._NAME` among them; a file that is given by name is always taken. Links are followed. A file
    with several names is one video: its own name counts before a link's, then the first one.
    What cannot be extracted (missing, a dangling link, a pipe, a folder without videos, files
    that share an id) becomes a problem and does not stop the others.
    """
    search = _Search()
    for given in paths:
        kind = search.kind(given)
        if kind == "file":
            search.add(given.stem, given, given.is_symlink())
        elif kind == "folder":
            search.folder(given)
    return search.result()


class _Search:
    def __init__(self) -> None:
        self.names: list[tuple[Video, bool, Path]] = []  # whether a link led there, the real path
        self.problems: list[Outcome] = []
        self.hidden = 0

    def add(self, name: str, path: Path, linked: bool) -> None:
        self.names.append((Video(video_key(name), path), linked, path.resolve()))

    def fail(self, path: Path, cause: str) -> None:
        self.problems.append(Outcome(Video(str(path), path), "failed", {}, printable(cause)))

    def kind(self, path: Path) -> Literal["file", "folder"] | None:
        """What a path leads to; None after noting why it is neither."""
        try:
            mode = path.stat().st_mode
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            reason = "does not exist" if missing else f"cannot be read ({error.strerror})"
            if stat.S_ISLNK(_mode(path, follow=False)):
                self.fail(path, f"{path} is a link to {path.readlink()}, which {reason}.")
            else:
                self.fail(path, f"{path} {reason}; give a video file or a folder of videos.")
            return None
        if stat.S_ISDIR(mode) or stat.S_ISREG(mode):
            return "folder" if stat.S_ISDIR(mode) else "file"
        kind = "a pipe" if stat.S_ISFIFO(mode) else "a socket or a device"
        self.fail(path, f"{path} is {kind}, not a regular file; save the video as a file first.")
        return None

    def folder(self, given: Path) -> None:
        """Search a folder in depth; linked folders last, and each real folder once."""
        begin, problems = len(self.names), len(self.problems)
        root, seen = given.resolve(), set[Path]()
        folders, links = [(given, False)], list[tuple[Path, bool]]()
        while folders or links:
            folder, linked = folders.pop() if folders else links.pop(0)
            real = folder.resolve()
            if real in seen or real in root.parents:  # a link that leads back ends here
                continue
            seen.add(real)
            try:
                paths = sorted(folder.iterdir())
            except OSError as error:
                self.fail(folder, f"The folder {folder} cannot be read ({error.strerror}).")
                continue
            for path in paths:
                link, mode = stat.S_ISLNK(_mode(path, follow=False)), _mode(path)
                wanted = path.suffix.lower() in VIDEO_SUFFIXES
                dangling = link and not mode and not path.suffix  # of a folder, by its name
                if path.name.startswith("."):
                    self.hidden += wanted or stat.S_ISDIR(mode)
                elif stat.S_ISDIR(mode):
                    (links if link else folders).append((path, linked or link))
                elif (wanted or dangling) and self.kind(path) == "file":
                    name = path.relative_to(given).as_posix().removesuffix(path.suffix)
                    self.add(name, path, linked or link)
        self.names[begin:] = sorted(self.names[begin:], key=lambda name: name[0].path)
        if len(self.names) == begin and len(self.problems) == problems:
            valid = " ".join(VIDEO_SUFFIXES)
            self.fail(given, f"The folder {given} has no videos (files ending in {valid}).")

    def result(self) -> Found:
        first: dict[Path, Video] = {}
        for video, _, real in sorted(self.names, key=lambda name: name[1]):
            first.setdefault(real, video)
        by_id: dict[str, list[Video]] = {}
        for video, _, real in self.names:
            if first[real] is video:
                by_id.setdefault(video.id, []).append(video)
        for name, same in by_id.items():
            for video, other in zip(same, same[1:] + same[:1], strict=True):
                if video is not other:
                    self.fail(
                        video.path,
                        f"{video.path} and {other.path} both have the video id {name!r}; rename "
                        f"one, or extract them into different folders.",
                    )
        videos = [same[0] for same in by_id.values() if len(same) == 1]
        return Found(videos, self.problems, self.hidden, len(self.names) - len(first))


def _mode(path: Path, *, follow: bool = True) -> int:
    """The mode of what a path leads to, or of a link itself; 0 if it cannot be read."""
    try:
        return path.stat(follow_symlinks=follow).st_mode
    except OSError:
        return 0


def extract_many(
    videos: Sequence[Video],
    specs: Sequence[ExtractorSpec],
    store: FeatureStore,
    *,
    overwrite: bool = False,
    stall_seconds: float = 60.0,
    progress: BatchProgress | None = None,
    **options: str,
) -> Report:
    """Extract every modality of every video that is not up to date, in one pass per video.

    specs: one per modality. options: device, precision and flow_backend of `SnippetNetwork`.
    Stored features are kept when they were made in the same way from the same file. Whatever goes
    wrong in one video (damage, a full disk, too little memory) fails that video with its cause,
    and the run continues; modalities that were finished are saved.
    Networks are loaded only when needed.
    Raises MmdistError when a network cannot be loaded, since every video would fail.
    """
    report = Report()
    networks: dict[str, SnippetNetwork] = {}
    with Decoder(stall_seconds=stall_seconds) as decoder:
        for index, video in enumerate(videos):
            if progress is not None:
                progress.started(video, index, len(videos))
            stale: list[ExtractorSpec] = []
            rows: dict[str, int] = {}
            causes: list[str] = []
            with _collecting(video, causes):
                source = fast_digest(video.path)
                for spec in specs:
                    how = {"matters": spec.matters, "source": source}
                    if overwrite or not store.up_to_date(video.id, spec.modality, **how):
                        stale.append(spec)
            for spec in stale:
                if spec.modality not in networks:
                    networks[spec.modality] = _load(spec, options)
            with _collecting(video, causes):
                made: Mapping[str, Features] = {}
                try:
                    if stale:
                        needed = [networks[spec.modality] for spec in stale]
                        advanced = progress.advanced if progress is not None else None
                        made = extract_video(
                            video.path, needed, decoder, source=source, progress=advanced
                        )
                except ExtractionError as error:
                    made = error.finished
                    causes.append(str(error))
                for modality, features in made.items():
                    store.save(video.id, features)
                    rows[modality] = len(features.data)
            cause = printable(" ".join(causes))
            outcome = Outcome(
                video, "failed" if cause else "done" if stale else "skipped", rows, cause
            )
            report.outcomes.append(outcome)
            if progress is not None:
                progress.finished(outcome)
    return report


@contextmanager
def _collecting(video: Video, causes: list[str]) -> Iterator[None]:
    """Whatever is raised inside becomes a cause of the video's failure."""
    try:
        yield
    except Exception as error:
        place = "" if isinstance(error, MmdistError) else f"{video.path}: "
        causes.append(f"{place}{cause_of(error)}")


def _load(spec: ExtractorSpec, options: Mapping[str, str]) -> SnippetNetwork:
    try:
        return SnippetNetwork(spec, **options)
    except MmdistError:
        raise
    except (MemoryError, OSError, RuntimeError) as error:
        raise MmdistError(
            f"The extractor {spec.name!r} cannot be loaded ({cause_of(error)})."
        ) from error
