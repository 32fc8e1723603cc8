"""The formats of annotation files: which video, which moment, and the sentence that tells of it.

Four formats, told apart by their content:
    Charades-STA         lines `VIDEO start end##sentence`; durations come from elsewhere
    CPL rows             JSON [[video, duration, [start, end], sentence], …]
    ActivityNet Captions JSON {video: {duration, timestamps, sentences}}
    QVHighlights         JSON lines with vid, duration, query, relevant_windows
All times are seconds.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdist_e2e.structures import MmdistError

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
