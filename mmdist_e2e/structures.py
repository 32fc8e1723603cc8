"""What the parts of the package exchange: Features, Moment, Answer, and the error for users.

Imports only numpy, so that every part (and the decoder process) may import it.
Shape suffixes: S snippets, D channels, L resampled positions.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from html import escape
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

MODALITIES = ("rgb", "flow")


class MmdistError(ValueError):
    """A user's mistake or a bad file; the message is one clear sentence.

    The command line prints it and exits with 1. Any other exception is a bug and keeps its
    traceback.
    """


def check_choice(name: str, value: str, valid: Sequence[str]) -> None:
    """Raises MmdistError unless `value` is one of the valid words."""
    if value not in valid:
        near = difflib.get_close_matches(str(value), valid, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise MmdistError(f"{name} {value!r} is unknown; valid: {', '.join(valid)}.{hint}")


@dataclass(frozen=True)
class Moment:
    """A span of a video: `start` and `end` in seconds; a higher `score` is better."""

    start: float
    end: float
    score: float


@dataclass(frozen=True, repr=False)
class Answer(Sequence[Moment]):
    """The moments of one query in one video, best first; a sequence of those moments.

    video: the path as given; "" where features were given.
    unknown_words: words of the query that the model does not read.
    model, trained_on: the model's name and its training data.
    warning: on which videos the answer is a guess; None where nothing is known.
    """

    video: str
    query: str
    duration_seconds: float
    model: str
    trained_on: str
    warning: str | None
    unknown_words: tuple[str, ...]
    moments: tuple[Moment, ...]

    def __len__(self) -> int:
        return len(self.moments)

    @overload
    def __getitem__(self, index: int) -> Moment: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Moment, ...]: ...
    def __getitem__(self, index: int | slice) -> Moment | tuple[Moment, ...]:
        return self.moments[index]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON types."""
        raw = asdict(self)
        return raw | {name: list(raw[name]) for name in ("unknown_words", "moments")}

    def rows(self) -> list[dict[str, Any]]:
        """One row per moment, for a table: its rank, start, end and score, and what was asked."""
        known = {name: getattr(self, name) for name in ("video", "query", "duration_seconds")}
        ranked = enumerate(self.moments, start=1)
        return [known | {"rank": rank, **asdict(m), "model": self.model} for rank, m in ranked]

    @property
    def table(self) -> str:
        """Query, video, moments and unknown words, as text."""
        title, rows = self._cells()
        lines = ["  ".join(f"{cell:>9}" for cell in row) for row in rows]
        return "\n".join([title, *lines, *self.unknown])

    @property
    def unknown(self) -> list[str]:
        """A line that names the unknown words, if there are any."""
        words = ", ".join(self.unknown_words)
        return [f"Unknown words, not read by the model: {words}"] if words else []

    @property
    def about(self) -> list[str]:
        """Lines on the model: its name, its training data and the warning."""
        warning = [f"Warning: {self.warning}"] if self.warning else []
        return [f"Model: {self.model}", f"Trained on: {self.trained_on}", *warning]

    def _cells(self) -> tuple[str, list[tuple[str, ...]]]:
        """The title of the table and its rows; the first one is the header."""
        title = f'"{self.query}" in {self.video or "features"} ({self.duration_seconds:.2f} s)'
        rows = [
            (str(rank), f"{moment.start:.2f}", f"{moment.end:.2f}", f"{moment.score:.3f}")
            for rank, moment in enumerate(self.moments, start=1)
        ]
        return title, [("rank", "start (s)", "end (s)", "score"), *rows]

    def __repr__(self) -> str:
        return "\n".join([self.table, *self.about])

    def _repr_html_(self) -> str:
        """The same as an HTML table, for notebooks."""
        title, cells = self._cells()
        rows = "".join(f"<tr><td>{'</td><td>'.join(row)}</td></tr>" for row in cells)
        below = "<br>".join(map(escape, [*self.unknown, *self.about]))
        return f"<table><caption>{escape(title)}</caption>{rows}</table><p>{below}</p>"


def even_times(rows: int, seconds: float) -> NDArray[np.float64]:
    """[S, 2]: start and end in seconds of S rows that divide a video evenly."""
    edges = np.linspace(0.0, seconds, rows + 1)
    return np.stack([edges[:-1], edges[1:]], axis=1)


@dataclass(frozen=True)
class Provenance:
    """How features were made.

    `matters` holds what a model must agree with (extractor, weights digest, mode, fps policy,
    window, stride, tail); `info` is information only (decoder, versions, device, precision);
    `source` identifies the video file (size in bytes, fast digest). No time, host name or path.
    Imported features have `matters = {"extractor": "external:NAME"}`.
    """

    matters: Mapping[str, Any]
    info: Mapping[str, Any] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def external(cls, name: str) -> Provenance:
        """Provenance of features that another program made, imported under `name`."""
        return cls(matters={"extractor": f"external:{name}"})

    def to_json(self) -> dict[str, Any]:
        return {name: dict(part) for name, part in vars(self).items()}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Provenance:
        return cls(raw["matters"], raw.get("info", {}), raw.get("source", {}))

    @property
    def grid(self) -> tuple[float, float, float, float] | None:
        """effective_fps, stride, window and offset (frames) of the rows; None if not recorded."""
        known = {**self.matters, **self.info}
        fps, stride, window = (known.get(key) for key in ("effective_fps", "stride", "window"))
        return (fps, stride, window, known.get("offset", 0)) if fps and stride and window else None

    def row_times(self, rows: int, seconds: float) -> NDArray[np.float64]:
        """[S, 2]: start and end in seconds of S rows of a video that lasts `seconds`.

        Row i starts at (i · stride + offset) / fps and lasts window / fps, or to the end of the
        video; the last row always ends there. Without a grid, rows divide the video evenly.
        """
        if self.grid is None:
            return even_times(rows, seconds)
        fps, stride, window, offset = self.grid
        starts = (np.arange(rows, dtype=np.float64) * stride + offset) / fps
        times_S2 = np.stack([starts, starts + window / fps], axis=1).clip(max=seconds)
        times_S2[-1, 1] = seconds
        return times_S2


def differences(expected: Mapping[str, Any], actual: Mapping[str, Any]) -> list[str]:
    """How two `matters` mappings differ, one phrase per key; empty when they agree."""
    keys = sorted(set(expected) | set(actual))
    return [
        f"{key} is {actual.get(key)!r} where the model needs {expected.get(key)!r}"
        for key in keys
        if expected.get(key) != actual.get(key)
    ]


@dataclass(frozen=True)
class Features:
    """Per-snippet features of one video and one modality.

    data: [S, D] float32, finite, S and D >= 1.
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
        check_choice("The modality", self.modality, MODALITIES)
        for name, array in (("data", self.data), ("times", self.times)):
            if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
                kind = getattr(array, "dtype", type(array).__name__)
                raise MmdistError(
                    f"{name} of Features must be a numpy array of numbers; got {kind}."
                )
        if self.data.ndim != 2 or 0 in self.data.shape:
            raise MmdistError(
                f"Features must have the shape [snippets, channels], with at least one of each; "
                f"these have the shape {list(self.data.shape)}."
            )
        if self.times.shape != (self.data.shape[0], 2):
            raise MmdistError(
                f"Times must have the shape [{self.data.shape[0]}, 2] like the features; "
                f"these have {list(self.times.shape)}."
            )
        if not np.isfinite(self.data).all():
            rows = int((~np.isfinite(self.data).all(axis=1)).sum())
            raise MmdistError(f"Features must be finite; {rows} of {len(self.data)} rows are not.")
        seconds = self.duration_seconds
        if not isinstance(seconds, int | float | np.number) or not 0 < seconds < np.inf:
            raise MmdistError(f"A duration must be a positive number of seconds; got {seconds!r}.")

    @property
    def made(self) -> dict[str, Any]:
        """What must be the same for all videos that a network reads."""
        return {**self.provenance.matters, "channels": self.data.shape[1]}

    def resample(self, length: int) -> Features:
        """Resample the S rows to `length` positions that divide the video evenly.

        Bin edges are round(i / L * S) in float64 (halves to even), clipped to S - 1. A position is
        the mean over its bin, or the row at the left edge of an empty bin. Published results use
        this rule; for large S it never reads the last row.
        """
        if length < 1:
            raise MmdistError(f"Features cannot be resampled to {length} positions; at least 1.")
        count = self.data.shape[0]
        edges = np.round(np.arange(length + 1, dtype=np.float64) / length * count).astype(np.int64)
        edges = np.minimum(edges, count - 1)
        data = np.empty((length, self.data.shape[1]), dtype=np.float32)
        for i, (left, right) in enumerate(itertools.pairwise(edges)):
            data[i] = self.data[left:right].mean(axis=0) if left < right else self.data[left]
        return replace(self, data=data, times=even_times(length, self.duration_seconds))
