"""Annotation files: formats, durations, protocols and splits.

Four formats, told apart by their content:
    Charades-STA         lines `VIDEO start end##sentence`; durations come from elsewhere
    CPL rows             JSON [[video, duration, [start, end], sentence], …]
    ActivityNet Captions JSON {video: {duration, timestamps, sentences}}
    QVHighlights         JSON lines with vid, duration, query, relevant_windows
All times are seconds.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from mmdist_e2e.store import FeatureStore
from mmdist_e2e.structures import MODALITIES, MmdistError

NAMED_AT_MOST = 5  # so many offenders are named in a message, the rest are counted

VIDEO_SUFFIXES = frozenset(
    [".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv"]
).union([".ts", ".webm", ".wmv", ".3gp"])


def video_id(name: str) -> str:
    """The id behind a video's names: `3MSZA.mp4`, `3MSZA.MKV` and `3MSZA` are one video."""
    stem, dot, suffix = name.rpartition(".")
    return stem if stem and f"{dot}{suffix.lower()}" in VIDEO_SUFFIXES else name


def some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    rest = len(names) - NAMED_AT_MOST
    return ", ".join(names[:NAMED_AT_MOST]) + (f" and {rest} more" if rest > 0 else "")


@dataclass(frozen=True)
class Annotation:
    """A sentence and where it happens, in seconds; `duration_seconds` None where not known yet.

    more: further moments of the same sentence (QVHighlights). An answer counts by the moment it
    fits best, as in moment retrieval; training reads none of them.
    """

    video: str
    duration_seconds: float | None
    start: float
    end: float
    sentence: str
    more: tuple[tuple[float, float], ...] = ()

    @property
    def moments(self) -> tuple[tuple[float, float], ...]:
        """All moments of the sentence; of several, (start, end) is the longest."""
        return ((self.start, self.end), *self.more)

    @property
    def ends_late(self) -> bool:
        """Whether a moment ends past the video's end. Needs the duration."""
        assert self.duration_seconds is not None
        return max(end for _, end in self.moments) > self.duration_seconds


def parse_annotations(path: Path, text: str) -> Iterator[Annotation]:
    """Annotations of a file's text in its order, its format chosen by how the text opens.

    Raises MmdistError naming the first bad line or row.
    """
    opening, _, _ = text.lstrip().partition("\n")
    if opening.startswith("["):
        return _cpl_rows(path, read_json(path, text))
    if not opening.startswith("{"):
        return _charades_lines(path, text)
    if _is_query(opening):
        return _json_lines(path, text)
    return _videos(path, read_json(path, text))


def _is_query(line: str) -> bool:
    try:
        record = json.loads(line)
    except ValueError:
        return False
    return isinstance(record, dict) and bool({"query", "qid", "vid"} & record.keys())


def _charades_lines(path: Path, text: str) -> Iterator[Annotation]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        place = f"Line {number} of '{path}'"
        head, separator, sentence = line.partition("##")
        fields = head.rsplit(maxsplit=2)  # a video's id may hold spaces
        if not separator or len(fields) != 3:
            raise MmdistError(f"{place} is not 'VIDEO start end##sentence'.")
        yield _annotation(place, fields[0], None, [fields[1:]], sentence)


def _cpl_rows(path: Path, rows: Any) -> Iterator[Annotation]:
    for number, row in enumerate(rows, start=1):
        place = f"Row {number} of '{path}'"
        try:
            video, seconds, span, sentence = row
        except (TypeError, ValueError) as error:
            raise MmdistError(
                f"{place} is not [video, duration, [start, end], sentence]."
            ) from error
        yield _annotation(place, video, seconds, [span], sentence)


def _videos(path: Path, videos: Mapping[str, Any]) -> Iterator[Annotation]:
    backwards = []
    for video, entry in videos.items():
        place = f"The video '{video}' of '{path}'"
        try:
            seconds, spans, sentences = (
                entry[key] for key in ("duration", "timestamps", "sentences")
            )
            pairs = list(zip(spans, sentences, strict=True))
        except (TypeError, KeyError, ValueError) as error:
            raise MmdistError(
                f"{place} is not {{duration, timestamps, sentences}} with one sentence for each "
                f"timestamp."
            ) from error
        for number, (span, sentence) in enumerate(pairs, start=1):
            where = f"Sentence {number} of the video '{video}' of '{path}'"
            if len(times := _times(where, span)) == 2 and times[0] >= times[1]:
                backwards.append(where)
            else:
                yield _annotation(where, video, seconds, [span], sentence)
    if backwards:
        warnings.warn(
            f"{len(backwards)} moments do not end after they start and are left out, as is usual "
            f"with ActivityNet Captions; the first: {backwards[0]}.",
            stacklevel=4,
        )


def _json_lines(path: Path, text: str) -> Iterator[Annotation]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        place = f"Line {number} of '{path}'"
        try:
            row = json.loads(line)
            video, seconds, sentence = row["vid"], row["duration"], row["query"]
            spans = sorted(row["relevant_windows"], key=lambda span: span[0] - span[1])
        except (TypeError, KeyError, ValueError, IndexError) as error:
            raise MmdistError(
                f"{place} is not JSON with vid, duration, query and relevant_windows (a test split "
                f"published without its windows cannot be used)."
            ) from error
        yield _annotation(place, video, seconds, spans, sentence)


def read_json(path: Path, text: str) -> Any:
    """Parsed JSON. Raises MmdistError naming the file."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MmdistError(f"'{path}' is not readable JSON: {error}.") from error


def finite_number(place: str, what: str, value: Any) -> float:
    """`value` as a number; raises MmdistError, opened by `place`, where it is none."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise MmdistError(f"{place} has {what} that is no number: {value!r}.")
    return number


def _times(place: str, span: Any) -> list[float]:
    if not isinstance(span, list):
        raise MmdistError(f"{place} has no moment [start, end].")
    return [finite_number(place, "a time", value) for value in span]


def _annotation(
    place: str, video: Any, seconds: Any, spans: Sequence[Any], sentence: Any
) -> Annotation:
    """A checked annotation; `place` opens the message of an error."""
    if not isinstance(sentence, str) or not sentence.strip():
        raise MmdistError(f"{place} has no sentence.")
    if not isinstance(video, str) or not video.strip():
        raise MmdistError(f"{place} names no video.")
    moments = []
    for times in (_times(place, span) for span in spans):
        if len(times) != 2 or not 0 <= times[0] <= times[1]:
            raise MmdistError(
                f"{place} spans {' to '.join(map(str, times))} seconds; a moment starts at 0 or "
                f"later and does not end before it starts."
            )
        moments.append((times[0], times[1]))
    if not moments:
        raise MmdistError(f"{place} has no moment [start, end].")
    duration = None if seconds is None else finite_number(place, "a duration", seconds)
    if duration is not None and duration <= 0:
        raise MmdistError(f"{place} has the duration {duration}; it must be above 0.")
    return Annotation(
        video_id(video.strip()), duration, *moments[0], sentence.strip(), tuple(moments[1:])
    )


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
    if protocol not in PROTOCOLS:
        raise MmdistError(f"There is no protocol {protocol!r}; valid: {', '.join(PROTOCOLS)}.")
    if protocol == "official":
        return list(annotations)
    unknown = sorted({a.video for a in annotations if a.duration_seconds is None})
    if unknown:
        raise MmdistError(
            f"The protocol cpl drops queries that end past their video, and {len(unknown)} videos "
            f"have no duration ({some(unknown)}); give --durations."
        )
    kept = [a for a in annotations if not a.ends_late]
    if not kept:
        raise MmdistError(
            "The protocol cpl leaves no query: all end past their video; check the durations."
        )
    return kept


def fingerprint(annotations: Sequence[Annotation]) -> str:
    """A digest of queries in any order: videos, times to 0.01 s, words without case."""
    lines = []
    for a in annotations:
        times = " ".join(f"{start:.2f} {end:.2f}" for start, end in a.moments)
        lines.append(f"{a.video} {times} {' '.join(re.findall('[a-z0-9]+', a.sentence.lower()))}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:16]


def protocol_of(path: Path, annotations: Sequence[Annotation]) -> str:
    """Name the protocol of annotations, which belongs beside every number made with them.

    A published split is known by its content, so a file of another name or format keeps its
    protocol, and one with a query changed loses it. Any other file is named with what it does
    with queries that end past their video: that is what parts the two protocols of Charades-STA,
    whose numbers must not be mixed.
    """
    known = PUBLISHED.get(fingerprint(annotations))
    if known:
        return known
    if any(a.duration_seconds is None for a in annotations):
        late = "durations unknown"
    else:
        count = sum(a.ends_late for a in annotations)
        late = f"official: {count} late ends kept" if count else "cpl: no late ends"
    return f"{path.name} ({len(annotations)} queries, {late})"


class Carved(NamedTuple):
    """Two lists in the order of the file, which share no video, and a sentence that says so."""

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
            f"A validation split takes a share of the videos between 0 and 1, like 0.1; "
            f"got {fraction}."
        )
    videos = {a.video for a in annotations}
    if len(videos) < 2:
        raise MmdistError("One video cannot be split in two; give --val, or more videos.")
    ranked = sorted(videos, key=lambda v: hashlib.sha256(f"{seed} {v}".encode()).digest())
    chosen = set(ranked[: min(max(1, round(fraction * len(videos))), len(videos) - 1)])
    train = [a for a in annotations if a.video not in chosen]
    val = [a for a in annotations if a.video in chosen]
    report = (
        f"validation carved from the training videos: {len(chosen)} of {len(videos)} videos, "
        f"{len(val)} of {len(annotations)} queries (seed {seed})"
    )
    return Carved(train, val, report)


def load_annotations(
    path: Path,
    *,
    durations: Path | Mapping[str, float] | None = None,
    protocol: str = "official",
) -> list[Annotation]:
    """Read an annotation file of any of the four formats, in its order.

    durations: seconds by video, or a file as `load_durations` reads it; they override those of
    the file. protocol: see `in_protocol`. Raises MmdistError naming the first bad line or row.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise MmdistError(
            f"'{path}' cannot be read ({error.strerror}); give an annotation file."
        ) from error
    except UnicodeDecodeError as error:
        raise MmdistError(f"'{path}' is not readable text or JSON: {error}.") from error
    seconds = load_durations(durations) if isinstance(durations, Path) else durations
    annotations = list(parse_annotations(path, text))
    if not annotations:
        raise MmdistError(f"'{path}' holds no annotations; give at least one line.")
    return in_protocol(with_durations(annotations, seconds or {}), protocol)


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

    Raises MmdistError naming the first bad entry.
    """
    if path.is_dir():
        store = FeatureStore(path)
        return {v: store.load(v, m).duration_seconds for m in MODALITIES for v in store.videos(m)}
    try:
        text = path.read_text(encoding="utf-8-sig")
        pairs = _json_durations(path, text) if text.lstrip()[:1] in "{[" else _csv(path, text)
        seconds = {}
        for place, video, value in pairs:
            seconds[video_id(video)] = finite_number(place, "a duration", value)
            if seconds[video_id(video)] <= 0:
                raise MmdistError(f"{place} has the duration {value}; it must be above 0.")
    except OSError as error:
        raise MmdistError(
            f"'{path}' cannot be read ({error.strerror}); give a file of durations."
        ) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise MmdistError(f"'{path}' is not readable text: {error}.") from error
    return seconds


def world_of(path: Path) -> str | None:
    """Which synthetic world an annotation file is of; None for any other file."""
    try:
        facts = json.loads((path.parent / "world.json").read_text(encoding="utf-8"))
        version, seed = facts["world_version"], facts["seed"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # or somebody's own file of that name
    return f"our own synthetic world, version {version} (seed {seed}, {path.name})"


def _json_durations(path: Path, text: str) -> Iterator[tuple[str, str, Any]]:
    raw = read_json(path, text)
    if not isinstance(raw, dict):
        raise MmdistError(f"'{path}' must map every video to its duration in seconds.")
    for video, value in raw.items():
        yield f"The video '{video}' of '{path}'", video, value


def _csv(path: Path, text: str) -> Iterator[tuple[str, str, Any]]:
    rows = csv.DictReader(text.splitlines())
    if not {"id", "length"} <= set(rows.fieldnames or ()):
        raise MmdistError(
            f"'{path}' holds no durations: give JSON that maps videos to seconds, or Charades' CSV "
            f"with the columns id and length."
        )
    for row in rows:
        yield f"Line {rows.line_num} of '{path}'", row["id"] or "", row["length"]
