"""Annotation files: formats, durations, protocols and splits.

Formats, recognised by their content:
    Charades-STA         lines `VIDEO start end##sentence`; durations come from another file
    CPL rows             JSON [[video, duration, [start, end], sentence], …]
    ActivityNet Captions JSON {video: {duration, timestamps, sentences}}; Charades-CG alike
    TimeLens-Bench       JSON {video: {duration, spans, queries}}
    QVHighlights         JSON lines with vid, duration, query, relevant_windows
    TimeLens-100K        JSON lines with video_path, duration, events: [{query, span}]; its
                         filtered form has query and span in place of events
A function for each kind of entry (a line, a row, a record, a video) gives its `Fields`; what must
be true of them is checked in one place. All times are seconds. A line ends at a line feed.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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

    more: further moments of the same sentence (QVHighlights, TimeLens-100K). Evaluation scores an
    answer against the moment that it fits best; training reads none of them.
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


@contextmanager
def _noting(bad: list[str], place: str) -> Iterator[None]:
    """Add a bad entry that is met inside to `bad`, so that all are raised together."""
    try:
        yield
    except _BadEntryError as error:
        bad.append(f"{place} {error}")


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


# Of one annotation, unchecked: video, seconds, moments (or one moment), sentence. The text before
# them names the part of an entry that holds several.
Fields = tuple[str, Any, Any, Any, Any]


def read_annotations(path: Path) -> tuple[list[Annotation], int]:
    """Annotations of any format, in their order, and how many are left out.

    Left out are moments of ActivityNet Captions that do not end after they start, as is usual.
    Raises BadLinesError naming every bad line or row, MmdistError for an unreadable file.
    """
    text = _read_text(path, "an annotation file")
    bad, annotations, left_out = list[str](), list[Annotation](), 0
    read, entries = _entries(path, text)
    for place, entry in entries:
        with _noting(bad, f"{place} of '{path}'"):
            for part, video, seconds, raw, sentence in read(entry):
                whole = f"{part} of {place[0].lower()}{place[1:]}" if part else place
                with _noting(bad, f"{whole} of '{path}'"):
                    moments = _moments(raw)
                    if read is _from_video and _backward(moments):
                        left_out += 1
                    else:
                        annotations.append(_annotation(video, seconds, moments, sentence))
    if bad:
        raise BadLinesError(path, bad)
    if not annotations:
        raise MmdistError(f"'{path}' holds no annotations; give at least one line.")
    return annotations, left_out


def _entries(
    path: Path, text: str
) -> tuple[Callable[[Any], list[Fields]], Iterable[tuple[str, Any]]]:
    """How the file's format reads an entry, and its entries by their places."""
    lines = [(f"Line {n}", line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    opening = text.lstrip()[:1]
    if opening == "[":
        return _from_row, [(f"Row {n}", row) for n, row in enumerate(_read_json(path, text), 1)]
    if opening != "{":
        return _from_charades, lines
    if any(_is_record(line) for _, line in lines):
        return _from_record, lines
    videos = _read_json(path, text).items()
    return _from_video, [(f"The video '{video}'", (video, entry)) for video, entry in videos]


def _is_record(line: str) -> bool:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and bool({"query", "vid", "video_path"} & record.keys())


def _from_charades(line: str) -> list[Fields]:
    head, separator, sentence = line.partition("##")
    fields = head.rsplit(maxsplit=2)  # a video's id may hold spaces
    if not separator or len(fields) != 3:
        raise _BadEntryError("is not 'VIDEO start end##sentence'.")
    return [("", fields[0], None, fields[1:], sentence)]


def _from_row(row: Any) -> list[Fields]:
    """A row of CPL, or a record in a JSON list."""
    if isinstance(row, dict):
        return _from_record(row)
    try:
        video, seconds, span, sentence = row
    except (TypeError, ValueError) as error:
        raise _BadEntryError("is not [video, duration, [start, end], sentence].") from error
    return [("", video, seconds, span, sentence)]


def _from_video(item: tuple[str, Any]) -> list[Fields]:
    video, entry = item
    return _from_record({"vid": video, **entry} if isinstance(entry, dict) else entry)


def _from_record(record: Any) -> list[Fields]:
    """A sentence of a video, or several: as events, or in two lists."""

    def first(names: str, part: Mapping[str, Any]) -> Any:
        return part[next((name for name in names.split() if name in part), names)]

    moments = "timestamps spans relevant_windows span"
    try:
        record = json.loads(record) if isinstance(record, str) else record
        about = first("vid video_path", record), record["duration"]
        if "query" in record:
            return [("", *about, first(moments, record), record["query"])]
        if "events" in record:
            pairs = [(first(moments, event), event["query"]) for event in record["events"]]
        else:
            lists = first(moments, record), first("sentences queries", record)
            pairs = list(zip(*lists, strict=True))
    except (TypeError, KeyError, ValueError, RecursionError) as error:
        raise _BadEntryError(
            "is not JSON with vid, duration, query and relevant_windows; nor with video_path, "
            "duration and events of query and span; nor {duration, timestamps, sentences} or "
            "{duration, spans, queries} of a video, with one sentence for each moment (a test "
            "split that is published without its moments cannot be used)."
        ) from error
    return [(f"Sentence {n}", *about, *pair) for n, pair in enumerate(pairs, 1)]


def _video(name: Any) -> str:
    if not isinstance(name, str) or not name.strip():
        raise _BadEntryError("names no video.")
    return video_id(name.strip())


def _number(what: str, value: Any) -> float:
    with suppress(TypeError, ValueError, OverflowError):
        if not isinstance(value, bool) and math.isfinite(number := float(value)):
            return number
    raise _BadEntryError(f"has {what} that is not a number: {value!r:.100}.")


def _duration(value: Any) -> float:
    seconds = _number("a duration", value)
    if seconds <= 0:
        raise _BadEntryError(f"has the duration {seconds:g}; it must be above 0.")
    return seconds


def _moments(raw: Any) -> list[list[float]]:
    """The numbers of one moment [start, end] or of a list of moments."""
    spans = raw if isinstance(raw, list) and raw and isinstance(raw[0], list) else [raw]
    if not all(isinstance(span, list) and span for span in spans):
        raise _BadEntryError("has no moment [start, end].")
    return [[_number("a time", value) for value in span] for span in spans]


def _backward(moments: Sequence[Sequence[float]]) -> bool:
    return len(moments) == 1 and len(moments[0]) == 2 and moments[0][0] >= moments[0][1]


def _annotation(
    video: Any, seconds: Any, moments: Sequence[Sequence[float]], sentence: Any
) -> Annotation:
    """A checked annotation, its longest moment first. Raises _BadEntryError."""
    if not isinstance(sentence, str) or not sentence.strip():
        raise _BadEntryError("has no sentence.")
    for times in moments:
        if len(times) != 2 or not 0 <= times[0] <= times[1]:
            raise _BadEntryError(
                f"has the moment {times}; a moment is [start, end] with 0 <= start <= end."
            )
    (start, end), *more = sorted(((s, e) for s, e in moments), key=lambda m: m[0] - m[1])
    duration = None if seconds is None else _duration(seconds)
    return Annotation(_video(video), duration, start, end, sentence.strip(), tuple(more))


PROTOCOLS = ("official", "cpl")


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


def carve_validation(
    annotations: Sequence[Annotation], fraction: float = 0.1, seed: int = 0
) -> tuple[list[Annotation], list[Annotation], str]:
    """Set aside the queries of a share of the training videos for validation.

    Returns training and validation, in the order of the file, and a sentence about them.
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
    report = (
        f"validation carved from the training videos: {len(chosen)} of {len(videos)} videos, "
        f"{len(val)} of {len(annotations)} queries (seed {seed})"
    )
    return [a for a in annotations if a.video not in chosen], val, report


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

    Also JSON {video: {duration, …}}, alone or under "database", as ActivityNet has it.
    Raises BadLinesError naming every bad entry, MmdistError for anything else.
    """
    if path.is_dir():
        store = FeatureStore(path)
        names = [(video, modality) for modality in MODALITIES for video in store.videos(modality)]
        if not names:
            raise MmdistError(f"The folder '{path}' holds no features made by mmdist extract.")
        return {video_id(v): store.load(v, m).duration_seconds for v, m in names}
    bad, seconds = list[str](), dict[str, float]()
    for place, video, value in _duration_pairs(path, _read_text(path, "a file of durations")):
        with _noting(bad, f"{place} of '{path}'"):
            seconds[_video(video)] = _duration(value)
    if bad:
        raise BadLinesError(path, bad)
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
        videos = raw.get("database")
        for video, value in (videos if isinstance(videos, dict) else raw).items():
            seconds = value.get("duration") if isinstance(value, dict) else value
            yield f"The video '{video}'", video, seconds
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
