"""The objects that cross rooms: Features, Moment, and the error meant for people.

Imports numpy alone, so that every room (and the decoder process) may use it.
Shape suffixes: S snippets, D channels, L resampled positions.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

MODALITIES = ("rgb", "flow")


class MmdistError(ValueError):
    """A person's mistake or a bad file; the message is one clear sentence for that person.

    The command line prints it and exits non-zero; anything else is a bug and keeps its traceback.
    """


def check_choice(name: str, value: str, valid: Sequence[str]) -> None:
    """Raises MmdistError when a setting is none of its valid words."""
    if value not in valid:
        raise MmdistError(f"{name} {value!r} is unknown; valid: {', '.join(valid)}.")


@dataclass(frozen=True)
class Moment:
    """A timed answer: `start` and `end` in seconds, `score` higher is better."""

    start: float
    end: float
    score: float


@dataclass(frozen=True)
class Provenance:
    """Where features come from.

    `matters` holds what a model must agree with (extractor, weights digest, mode, fps policy,
    window, stride, tail); `info` is information only (decoder, versions, device, precision);
    `source` identifies the video file (size in bytes, fast digest). No clock, host or path.
    Imported features carry `matters = {"extractor": "external:NAME"}`.
    """

    matters: Mapping[str, Any]
    info: Mapping[str, Any] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def external(cls, name: str) -> Provenance:
        """Provenance of features that were made elsewhere and imported under `name`."""
        return cls(matters={"extractor": f"external:{name}"})

    def to_json(self) -> dict[str, Any]:
        return {
            "matters": dict(self.matters),
            "info": dict(self.info),
            "source": dict(self.source),
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Provenance:
        return cls(raw["matters"], raw.get("info", {}), raw.get("source", {}))


def differences(expected: Mapping[str, Any], actual: Mapping[str, Any]) -> list[str]:
    """Say, one phrase a key, how two `matters` mappings differ; empty when they agree."""
    keys = sorted(set(expected) | set(actual))
    return [
        f"{key} is {actual.get(key)!r} where the model needs {expected.get(key)!r}"
        for key in keys
        if expected.get(key) != actual.get(key)
    ]


@dataclass(frozen=True)
class Features:
    """Per-snippet features of one video and one modality.

    data: [S, D] float32, finite, S >= 1.
    times: [S, 2] float64, start and end of each snippet in seconds.
    duration_seconds: length of the video.
    Raises MmdistError when shapes disagree or a value is not finite.
    """

    data: NDArray[np.float32]
    times: NDArray[np.float64]
    duration_seconds: float
    modality: str
    provenance: Provenance

    def __post_init__(self) -> None:
        if self.modality not in MODALITIES:
            raise MmdistError(
                f"The modality {self.modality!r} is unknown; valid: {', '.join(MODALITIES)}."
            )
        if self.data.ndim != 2 or self.data.shape[0] < 1:
            raise MmdistError(
                f"Features must have the shape [snippets, channels] with at least one snippet; "
                f"these have {list(self.data.shape)}."
            )
        if self.times.shape != (self.data.shape[0], 2):
            raise MmdistError(
                f"Times must have the shape [{self.data.shape[0]}, 2] like the features; "
                f"these have {list(self.times.shape)}."
            )
        if not np.isfinite(self.data).all():
            rows = int((~np.isfinite(self.data).all(axis=1)).sum())
            raise MmdistError(f"Features must be finite; {rows} of {len(self.data)} rows are not.")
        if not (np.isfinite(self.duration_seconds) and self.duration_seconds > 0):
            raise MmdistError(
                f"A duration must be a positive number of seconds; got {self.duration_seconds}."
            )

    def resample(self, length: int) -> Features:
        """Resample the S rows to `length` positions that divide the video evenly.

        Edges round(i / L * S) in float64, halves to even, clipped to S - 1; the mean over each
        bin, the row at the left edge where a bin is empty (the rule the field's numbers were
        made with: for large S the last row is never used).
        """
        if length < 1:
            raise MmdistError(f"Features cannot be resampled to {length} positions; at least 1.")
        count = self.data.shape[0]
        edges = np.round(np.arange(length + 1, dtype=np.float64) / length * count).astype(np.int64)
        edges = np.minimum(edges, count - 1)
        data = np.empty((length, self.data.shape[1]), dtype=np.float32)
        for i, (left, right) in enumerate(itertools.pairwise(edges)):
            data[i] = self.data[left:right].mean(axis=0) if left < right else self.data[left]
        bounds = np.linspace(0.0, self.duration_seconds, length + 1)
        times = np.stack([bounds[:-1], bounds[1:]], axis=1)
        return replace(self, data=data, times=times)
