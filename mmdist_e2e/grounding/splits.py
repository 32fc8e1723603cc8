"""Which queries: the protocol of an annotation file, and a validation split carved by video."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mmdist_e2e.grounding.formats import Annotation, some
from mmdist_e2e.structures import MmdistError

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
