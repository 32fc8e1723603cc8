"""Annotation files: formats, durations, protocols and splits.

Four formats, recognised by their content:
    Charades-STA         lines `VIDEO start end##sentence`; durations come from another file
    CPL rows             JSON [[video, duration, [start, end], sentence], …]
    ActivityNet Captions JSON {video: {duration, timestamps, sentences}}
    QVHighlights         JSON lines with vid, duration, query, relevant_windows
All times are seconds. A line ends at a line feed.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from mmdist_e2e.store import VIDEO_SUFFIXES, FeatureStore, video_key
from mmdist_e2e.structures import MODALITIES, MmdistError, check_choice

NAMED_AT_MOST = 5  # a message names this many videos or words and counts the rest
LINES_AT_MOST = 10  # a message quotes this many bad lines and counts the rest


def video_id(name: str) -> str:
    """The id of a video: its name without the suffix of a video file, in Unicode's form NFC.

    `3MSZA.mp4`, `3MSZA.MKV` and `3MSZA` are one video; so are both spellings of `é`.
    """
    name = video_key(name)
    stem, dot, suffix = name.rpartition(".")
    return stem if stem and f"{dot}{suffix.lower()}" in VIDEO_SUFFIXES else name


def some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    rest = len(names) - NAMED_AT_MOST
    return ", ".join(names[:NAMED_AT_MOST]) + (f" and {rest} more" if rest > 0 else "")


@dataclass(frozen=True)
class Annotation:
    """A sentence and its moment in seconds; `duration_seconds` is None while it is not known.

    more: further moments of the same sentence (QVHighlights). Evaluation scores an answer against
    the moment that it fits best; training reads none of them.
    """

    video: str
    duration_seconds: float | None
    start: float
    end: float
    sentence: str
    more: tuple[tuple[float, float], ...] = ()

    @property
    def moments(self) -> tuple[tuple[float, float], ...]:
        """All moments of the sentence; (start, end) is the longest of them."""
        return ((self.start, self.end), *self.more)

    @property
    def ends_late(self) -> bool:
        """Whether a moment ends after the video does. Needs the duration."""
        assert self.duration_seconds is not None
        return max(end for _, end in self.moments) > self.duration_seconds


class BadLinesError(MmdistError):
    """All bad lines of one file; `lines` holds a sentence for each."""

    def __init__(self, path: Path, lines: Sequence[str]) -> None:
        self.lines = tuple(lines)
        rest = len(lines) - LINES_AT_MOST
        shown = [*lines[:LINES_AT_MOST], *([f"{rest} more bad lines."] if rest > 0 else [])]
        heading = [f"'{path}' has {len(lines)} bad lines or rows:"] if len(lines) > 1 else []
        super().__init__("\n  ".join(heading + shown))


class _BadEntryError(Exception):
    """What is wrong with an entry, worded to follow the name of its place."""


class _BadPlaces:
    """Collects what is wrong in a file, so that it is raised together."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[str] = []

    @contextmanager
    def at(self, place: str) -> Iterator[None]:
        """Note a bad entry that is met inside."""
        try:
            yield
        except _BadEntryError as error:
            self.lines.append(f"{place} of '{self.path}' {error}")

    def raise_any(self) -> None:
        """Raises BadLinesError if there was a bad entry."""
        if self.lines:
            raise BadLinesError(self.path, self.lines)


def _read_text(path: Path, what: str) -> str:
    """The text of a UTF-8 file, or of a UTF-16 file with a byte order mark."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise MmdistError(f"'{path}' cannot be read ({error.strerror}); give {what}.") from error
    try:
        text = raw.decode("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
        fault = "it holds zero bytes" if "\0" in text else ""
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        fault = f"line {line} is not {error.encoding.upper()} ({error.reason})"
    if fault:
        raise MmdistError(f"'{path}' is not readable text: {fault}; save the file as UTF-8.")
    return text


def _read_json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MmdistError(f"'{path}' is not readable JSON: {error}.") from error


def read_annotations(path: Path) -> tuple[list[Annotation], int]:
    """Annotations of any of the four formats, in their order, and how many are left out.

    Left out are moments of ActivityNet Captions that do not end after they start, as is usual.
    Raises BadLinesError naming every bad line or row, MmdistError for an unreadable file.
    """
    text = _read_text(path, "an annotation file")
    lines = [(f"Line {n}", line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    bad, annotations, left_out = _BadPlaces(path), list[Annotation](), 0
    opening = text.lstrip()[:1]
    if opening == "{" and not any(_is_query(line) for _, line in lines):
        for video, entry in _read_json(path, text).items():
            with bad.at(f"The video '{video}'"):
                seconds, pairs = _activitynet_sentences(entry)
                for number, (span, sentence) in enumerate(pairs, 1):
                    with bad.at(f"Sentence {number} of the video '{video}'"):
                        times = _times(span)
                        if len(times) == 2 and times[0] >= times[1]:
                            left_out += 1
                        else:
                            annotations.append(_annotation(video, seconds, [span], sentence))
    else:
        read: Callable[[Any], Annotation] = _from_charades if opening != "{" else _from_qvhighlights
        if opening == "[":
            lines = [(f"Row {n}", row) for n, row in enumerate(_read_json(path, text), 1)]
            read = _from_cpl
        for place, line in lines:
            with bad.at(place):
                annotations.append(read(line))
    bad.raise_any()
    if not annotations:
        raise MmdistError(f"'{path}' holds no annotations; give at least one line.")
    return annotations, left_out


def _is_query(line: str) -> bool:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and bool({"query", "qid", "vid"} & record.keys())


def _from_charades(line: str) -> Annotation:
    head, separator, sentence = line.partition("##")
    fields = head.rsplit(maxsplit=2)  # a video's id may hold spaces
    if not separator or len(fields) != 3:
        raise _BadEntryError("is not 'VIDEO start end##sentence'.")
    return _annotation(fields[0], None, [fields[1:]], sentence)


def _from_cpl(row: Any) -> Annotation:
    try:
        video, seconds, span, sentence = row
    except (TypeError, ValueError) as error:
        raise _BadEntryError("is not [video, duration, [start, end], sentence].") from error
    return _annotation(video, seconds, [span], sentence)


def _from_qvhighlights(line: str) -> Annotation:
    try:
        row = json.loads(line)
        video, seconds, sentence = row["vid"], row["duration"], row["query"]
        spans = sorted(row["relevant_windows"], key=lambda span: span[0] - span[1])
    except (TypeError, KeyError, ValueError, IndexError, RecursionError) as error:
        raise _BadEntryError(
            "is not JSON with vid, duration, query and relevant_windows (a test split that is "
            "published without its windows cannot be used)."
        ) from error
    return _annotation(video, seconds, spans, sentence)


def _activitynet_sentences(entry: Any) -> tuple[Any, list[tuple[Any, Any]]]:
    """The duration of a video, and its (moment, sentence) pairs."""
    try:
        pairs = zip(entry["timestamps"], entry["sentences"], strict=True)
        return entry["duration"], list(pairs)
    except (TypeError, KeyError, ValueError) as error:
        raise _BadEntryError(
            "is not {duration, timestamps, sentences} with one sentence for each timestamp."
        ) from error


def _video(name: Any) -> str:
    if not isinstance(name, str) or not name.strip():
        raise _BadEntryError("names no video.")
    return video_id(name.strip())


def _number(what: str, value: Any) -> float:
    with suppress(TypeError, ValueError, OverflowError):
        number = float(value)
        if math.isfinite(number) and not isinstance(value, bool):
            return number
    raise _BadEntryError(f"has {what} that is not a number: {value!r:.100}.")


def _duration(value: Any) -> float:
    seconds = _number("a duration", value)
    if seconds <= 0:
        raise _BadEntryError(f"has the duration {seconds:g}; it must be above 0.")
    return seconds


def _times(span: Any) -> list[float]:
    if not isinstance(span, list):
        raise _BadEntryError("has no moment [start, end].")
    return [_number("a time", value) for value in span]


def _annotation(video: Any, seconds: Any, spans: Sequence[Any], sentence: Any) -> Annotation:
    """A checked annotation. Raises _BadEntryError."""
    if not isinstance(sentence, str) or not sentence.strip():
        raise _BadEntryError("has no sentence.")
    moments = []
    for times in map(_times, spans):
        if len(times) != 2 or not 0 <= times[0] <= times[1]:
            raise _BadEntryError(
                f"has the moment {times}; a moment is [start, end] with 0 <= start <= end."
            )
        moments.append((times[0], times[1]))
    if not moments:
        raise _BadEntryError("has no moment [start, end].")
    duration = None if seconds is None else _duration(seconds)
    first, *more = moments
    return Annotation(_video(video), duration, *first, sentence.strip(), tuple(more))


PROTOCOLS = ("official", "cpl")

# The splits that papers report on, by `fingerprint`.
PUBLISHED = {
    "d5c0f45d383d7417": "charades_sta official, training split",
    "e21c438db7ffaa73": "charades_sta official",
    "2ff734e4cf6591d8": "charades_sta cpl, training split",
    "c5cc9b8e512f2779": "charades_sta cpl",
    "e14b4f6f408e6c80": "activitynet val_1 (validation)",
    "c2904e8f6f2d1fe9": "activitynet val_2 (test)",
}


def in_protocol(annotations: Sequence[Annotation], protocol: str) -> list[Annotation]:
    """`official`: all of them. `cpl`: without those that end past their video's duration.

    The second makes CPL's test split of Charades-STA from the official one, query for query.
    Raises MmdistError for another name, and for `cpl` without durations.
    """
    check_choice("The protocol", protocol, PROTOCOLS)
    if protocol == "official":
        return list(annotations)
    unknown = sorted({a.video for a in annotations if a.duration_seconds is None})
    if unknown:
        raise MmdistError(
            f"The protocol cpl drops queries that end past their video, and {len(unknown)} videos "
            f"have no duration ({some(unknown)}); give --durations."
        )
    if kept := [a for a in annotations if not a.ends_late]:
        return kept
    raise MmdistError(
        "The protocol cpl leaves no query: all end past their video; check the times."
    )


def fingerprint(annotations: Sequence[Annotation]) -> str:
    """A digest of queries in any order: videos, times to 0.01 s, words without case."""
    lines = []
    for a in annotations:
        times = " ".join(f"{start:.2f} {end:.2f}" for start, end in a.moments)
        lines.append(f"{a.video} {times} {' '.join(re.findall('[a-z0-9]+', a.sentence.lower()))}")
    return hashlib.sha256("\n".join(sorted(lines)).encode(errors="surrogatepass")).hexdigest()[:16]


def protocol_of(path: Path, annotations: Sequence[Annotation]) -> str:
    """Name the protocol of annotations, which belongs beside every number made with them.

    A published split is recognised by its content. Any other file is named with whether it keeps
    queries that end past their video, by which the two protocols of Charades-STA differ.
    """
    if known := PUBLISHED.get(fingerprint(annotations)):
        return known
    if any(a.duration_seconds is None for a in annotations):
        late = "durations unknown"
    elif count := sum(a.ends_late for a in annotations):
        late = f"official: {count} late ends kept"
    else:
        late = "cpl: no late ends"
    return f"{path.name} ({len(annotations)} queries, {late})"


class Carved(NamedTuple):
    """Two lists that share no video, in the order of the file, and a sentence about them."""

    train: list[Annotation]
    val: list[Annotation]
    report: str


def carve_validation(
    annotations: Sequence[Annotation], fraction: float = 0.1, seed: int = 0
) -> Carved:
    """Set aside the queries of a share of the training videos for validation.

    Videos are ranked by a digest of (seed, video), so the choice depends neither on the order of
    lines nor on how many queries a video has, and hardly changes when videos are added.
    Raises MmdistError unless 0 < fraction < 1 and there are two videos or more.
    """
    if not 0 < fraction < 1:
        raise MmdistError(
            f"The share of videos for validation must be between 0 and 1, like 0.1; got {fraction}."
        )
    videos = {a.video for a in annotations}
    if len(videos) < 2:
        raise MmdistError("One video cannot be split in two; give --val, or more videos.")
    ranked = sorted(
        videos, key=lambda v: hashlib.sha256(f"{seed} {v}".encode(errors="surrogatepass")).digest()
    )
    chosen = set(ranked[: min(max(1, round(fraction * len(videos))), len(videos) - 1)])
    val = [a for a in annotations if a.video in chosen]
    return Carved(
        [a for a in annotations if a.video not in chosen],
        val,
        f"validation carved from the training videos: {len(chosen)} of {len(videos)} videos, "
        f"{len(val)} of {len(annotations)} queries (seed {seed})",
    )


LONGEST_SECONDS = 10_000.0  # without a duration, a moment that ends later is not in seconds

SUSPICIONS = {
    "not_in_seconds": "annotations look like milliseconds or frame numbers; times and durations "
    "must be in seconds",
    "zero_length": "annotations have a moment of length zero",
    "duplicates": "lines repeat another line",
    "left_out": "moments that do not end after they start are left out",
}


def suspicions(annotations: Sequence[Annotation], left_out: int) -> dict[str, int]:
    """How many annotations are probably wrong, by the kinds of SUSPICIONS that occur."""
    distinct = {(a.video, a.moments, a.sentence.lower()) for a in annotations}
    latest = [min(LONGEST_SECONDS, 10 * (a.duration_seconds or math.inf)) for a in annotations]
    counts = {
        "not_in_seconds": sum(a.end > t for a, t in zip(annotations, latest, strict=True)),
        "zero_length": sum(any(start == end for start, end in a.moments) for a in annotations),
        "duplicates": len(annotations) - len(distinct),
        "left_out": left_out,
    }
    return {kind: count for kind, count in counts.items() if count}


def describe_suspicions(counts: Mapping[str, int]) -> str:
    return "; ".join(f"{count} {SUSPICIONS[kind]}" for kind, count in counts.items())


def load_annotations(
    path: Path,
    *,
    durations: Path | Mapping[str, float] | None = None,
    protocol: str = "official",
) -> list[Annotation]:
    """Read an annotation file, in its order; warns once of what is probably wrong.

    durations: seconds by video, or a file as `load_durations` reads it; they override those of
    the annotation file. protocol: see `in_protocol`. Raises as `read_annotations`.
    """
    seconds = load_durations(durations) if isinstance(durations, Path) else durations
    annotations, left_out = read_annotations(path)
    annotations = with_durations(annotations, seconds or {})
    if counts := suspicions(annotations, left_out):
        warnings.warn(f"'{path}': {describe_suspicions(counts)}.", stacklevel=2)
    return in_protocol(annotations, protocol)


def with_durations(
    annotations: Sequence[Annotation], seconds: Mapping[str, float | None]
) -> list[Annotation]:
    """The same annotations with the durations given; others keep theirs."""
    return [
        replace(a, duration_seconds=known) if (known := seconds.get(a.video)) else a
        for a in annotations
    ]


def load_durations(path: Path) -> dict[str, float]:
    """Seconds by video: JSON {video: seconds}, Charades' CSV (`id`, `length`), or a feature store.

    Raises BadLinesError naming every bad entry, MmdistError for anything else.
    """
    if path.is_dir():
        store = FeatureStore(path)
        names = [(video, modality) for modality in MODALITIES for video in store.videos(modality)]
        if not names:
            raise MmdistError(f"The folder '{path}' holds no features made by mmdist extract.")
        return {video_id(v): store.load(v, m).duration_seconds for v, m in names}
    bad, seconds = _BadPlaces(path), dict[str, float]()
    for place, video, value in _duration_pairs(path, _read_text(path, "a file of durations")):
        with bad.at(place):
            seconds[_video(video)] = _duration(value)
    bad.raise_any()
    return seconds


def _duration_pairs(path: Path, text: str) -> Iterator[tuple[str, str | None, Any]]:
    """The place, the video and its duration of every entry of a JSON or CSV file."""
    none = MmdistError(
        f"'{path}' holds no durations: it must map every video to its seconds in JSON, or have "
        f"the columns id and length as Charades' CSV."
    )
    if text.lstrip()[:1] in ("{", "["):
        raw = _read_json(path, text)
        if not isinstance(raw, dict):
            raise none
        yield from ((f"The video '{video}'", video, value) for video, value in raw.items())
        return
    rows = csv.DictReader(io.StringIO(text, newline=""))
    try:
        if not {"id", "length"} <= set(rows.fieldnames or ()):
            raise none
        for row in rows:
            yield f"Line {rows.line_num}", row["id"], row["length"]
    except csv.Error as error:
        raise MmdistError(f"Line {rows.line_num + 1} of '{path}' is not CSV: {error}.") from error


def world_of(path: Path) -> str | None:
    """Which synthetic world an annotation file belongs to; None for any other file."""
    try:
        facts = json.loads((path.parent / "world.json").read_text(encoding="utf-8"))
        version, seed = facts["world_version"], facts["seed"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # or an unrelated file of that name
    return f"our own synthetic world, version {version} (seed {seed}, {path.name})"
