"""What features hold and what is wrong with them: half of `mmdist data check`.

Shape suffixes: S rows of one video, F feature channels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmdist_e2e.grounding.features import FeatureSource, open_features
from mmdist_e2e.grounding.formats import NAMED_AT_MOST, some
from mmdist_e2e.structures import MmdistError, Provenance, differences

Progress = Callable[[str, int, int], None]  # what, done, of how many
HUGE = 1e4  # features of usual networks stay below a few hundred


@dataclass
class FeatureFacts:
    """Facts about the features of some videos; lists of strings hold ids of videos.

    present: how many of the videos have features; unused: how many others lie there.
    matters: the provenance of the first; unlike: how others differ, with their number.
    zero_rows: in videos that have other rows too. unreadable: what was raised, one a video.
    """

    kind: str
    present: int = 0
    unused: int = 0
    missing: list[str] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    channels: Counter[int] = field(default_factory=Counter)
    dtypes: Counter[str] = field(default_factory=Counter)
    matters: Mapping[str, Any] = field(default_factory=dict)
    unlike: Counter[str] = field(default_factory=Counter)
    durations_seconds: dict[str, float] = field(default_factory=dict)
    largest: float = 0.0
    zero_rows: int = 0
    unreadable: list[str] = field(default_factory=list)
    not_finite: list[str] = field(default_factory=list)
    zero: list[str] = field(default_factory=list)
    constant: list[str] = field(default_factory=list)
    single: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The figures, as JSON takes them."""
        rows = self.rows or [0]
        return {
            "kind": self.kind,
            "videos": self.present,
            "videos_missing": len(self.missing),
            "videos_unused": self.unused,
            "channels": sorted(self.channels),
            "dtypes": sorted(self.dtypes),
            "made_by": dict(self.matters),
            "rows": {"min": min(rows), "median": float(np.median(rows)), "max": max(rows)},
            "largest_value": self.largest,
            "rows_of_zeros": self.zero_rows,
            "videos_unreadable": len(self.unreadable),
            "videos_not_finite": len(self.not_finite),
            "videos_of_zeros": len(self.zero),
            "videos_constant": len(self.constant),
            "videos_of_one_row": len(self.single),
        }


def inspect_features(
    path: Path, videos: Sequence[str], modality: str, progress: Progress | None = None
) -> FeatureFacts:
    """Read the features of `videos` and judge them.

    Raises MmdistError when the place cannot be opened at all.
    """
    with open_features(path, modality) as source:
        facts = FeatureFacts(source.kind)
        facts.missing = [video for video in videos if video not in source.names]
        facts.unused = len(source.names.keys() - set(videos))
        facts.present = len(videos) - len(facts.missing)
        for done, video in enumerate(videos, start=1):
            if video in source.names:
                try:
                    _inspect(source, video, facts)
                except MmdistError as error:
                    facts.unreadable.append(str(error))
            if progress:
                progress("reading features", done, len(videos))
    _judge(facts)
    return facts


def _inspect(source: FeatureSource, video: str, facts: FeatureFacts) -> None:
    if source.kind == "store":
        features = source.features(video)
        raw_SF, matters = features.data, features.provenance.matters
        facts.durations_seconds[video] = features.duration_seconds
    else:
        raw_SF, matters = source.array(video), Provenance.external(source.kind).matters
    facts.matters = facts.matters or matters
    unlike = differences(facts.matters, matters)
    if unlike:
        facts.unlike["; ".join(unlike)] += 1
    facts.rows.append(len(raw_SF))
    facts.channels[raw_SF.shape[1]] += 1
    facts.dtypes[str(raw_SF.dtype)] += 1
    data_SF = raw_SF.astype(np.float32)
    if not np.isfinite(data_SF).all():
        facts.not_finite.append(video)
        return
    facts.largest = max(facts.largest, float(np.abs(data_SF).max()))
    is_zero_S = ~data_SF.any(axis=1)
    if is_zero_S.all():
        facts.zero.append(video)
    elif len(data_SF) == 1:
        facts.single.append(video)
    elif (data_SF == data_SF[0]).all():
        facts.constant.append(video)
    else:
        facts.zero_rows += int(is_zero_S.sum())


def _judge(facts: FeatureFacts) -> None:
    """Turn figures into sentences."""
    facts.errors += facts.unreadable[:NAMED_AT_MOST]
    if len(facts.unreadable) > NAMED_AT_MOST:
        rest = len(facts.unreadable) - NAMED_AT_MOST
        facts.errors.append(f"{rest} more videos have features that cannot be used.")
    if facts.not_finite:
        facts.errors.append(
            f"{len(facts.not_finite)} videos have features that are not finite "
            f"({some(facts.not_finite)}); make them again."
        )
    if len(facts.channels) > 1:
        counts = ", ".join(f"{n} videos of {c}" for c, n in sorted(facts.channels.items()))
        facts.errors.append(f"Features differ in their number of channels: {counts}.")
    if facts.unlike:
        how = "; ".join(f"in {n} videos {text}" for text, n in facts.unlike.most_common(3))
        facts.errors.append(f"Features were not all made in one way: {how}; extract them alike.")
    for videos, what in (
        (facts.zero, "have nothing but zeros"),
        (facts.constant, "have the same row everywhere, so no moment can be told"),
        (facts.single, "have a single row, so no moment can be told"),
    ):
        if videos:
            facts.warnings.append(f"{len(videos)} videos {what} ({some(videos)}).")
    if facts.zero_rows:
        facts.warnings.append(f"{facts.zero_rows} rows are all zeros, in videos that have others.")
    if facts.largest > HUGE:
        facts.warnings.append(
            f"Features reach {facts.largest:.3g}, far more than usual; training may diverge, so "
            f"check how they were made."
        )
