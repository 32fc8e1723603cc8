"""Annotation files and the durations they may lack."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmdist_e2e.grounding.formats import (
    Annotation,
    finite_number,
    parse_annotations,
    read_json,
    video_id,
)
from mmdist_e2e.grounding.splits import in_protocol
from mmdist_e2e.store import FeatureStore
from mmdist_e2e.structures import MODALITIES, MmdistError


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
