"""Features out to other programs and back in: HDF5, folders of .npy, OpenTAD's fields.

Exports record durations, times and provenance beside the arrays, so that what is read back is what
was written, and commands that read a feature store read an export alike. See docs/features.md.

Shape suffixes: S rows of one video.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from mmdist_e2e.grounding.answer import Progress
from mmdist_e2e.grounding.data.annotations import some
from mmdist_e2e.grounding.data.check import rate_facts
from mmdist_e2e.grounding.data.features import (
    FIELDS,
    GROUP_KEY,
    RECORD,
    FeatureSource,
    modalities_of,
    open_features,
    require_h5py,
    row_times,
)
from mmdist_e2e.store import FeatureStore, staged, write_json
from mmdist_e2e.structures import Features, MmdistError, check_choice

FORMATS = ("hdf5", "npy", "opentad")
LAYOUTS = ("charades", "activitynet")

Write = Callable[[str, Features, Mapping[str, Any]], None]


def export_features(
    path: Path,
    target: Path,
    *,
    form: str,
    modality: str = "rgb",
    layout: str = "charades",
    progress: Progress | None = None,
) -> tuple[int, dict[str, float]]:
    """Write the features of one modality in another format: of all videos, or nothing.

    form: "hdf5" (one file; the layout "charades" has a dataset VIDEO, "activitynet" a dataset
    VIDEO/c3d_features), "npy" (a folder of VIDEO.npy and features.json), or "opentad" (the same,
    where every video has the fields that OpenTAD and ActionFormer compute times from).
    Returns the number of videos, and the fields if all videos share them.
    Raises MmdistError for features that cannot be read, and where `target` holds something else.
    """
    check_choice("The format", form, FORMATS)
    check_choice("The layout", layout, LAYOUTS)
    shared: list[dict[str, float]] = []
    writer = _hdf5(target, layout) if form == "hdf5" else _npy(target)
    with open_features(path, modality) as source, writer as write:
        for video, features in _each(source, progress):
            record = _record(features) if source.timed(video) else {}
            fields = {} if "times" in record else fields_of(features)
            if form == "opentad" and not fields:
                raise MmdistError(
                    f"The rows of '{video}' in '{path}' are not at a known stride, window and fps, "
                    f"which opentad needs; export them as npy or hdf5."
                )
            shared.append(fields)
            write(video, features, record)
    return len(shared), shared[0] if all(one == shared[0] for one in shared) else {}


def _each(source: FeatureSource, progress: Progress | None) -> Iterator[tuple[str, Features]]:
    for done, video in enumerate(sorted(source.names), start=1):
        yield video, source.features(video)
        if progress:
            progress("reading features", done, len(source.names))


def _record(features: Features) -> dict[str, Any]:
    """What the array alone does not hold; times only where `row_times` does not give them."""
    seconds, provenance = features.duration_seconds, features.provenance
    regular = np.array_equal(row_times(provenance, len(features.data), seconds), features.times)
    return {
        "modality": features.modality,
        "duration_seconds": seconds,
        "provenance": provenance.to_json(),
        **({} if regular else {"times": features.times.tolist()}),
    }


def fields_of(features: Features) -> dict[str, float]:
    """As OpenTAD names them: row i is centered at (i · feature_stride + offset_frames) / fps.

    num_frames, the window in frames, is ActionFormer's name. Empty where they are unknown.
    """
    known = {**features.provenance.matters, **features.provenance.info}
    if not all(known.get(key) for key in ("effective_fps", "stride", "window")):
        return {}
    return {
        "feature_stride": known["stride"],
        "num_frames": known["window"],
        "offset_frames": known.get("offset", 0) + known["window"] / 2,
        "fps": known["effective_fps"],
    }


@contextmanager
def _hdf5(target: Path, layout: str) -> Iterator[Write]:
    names: set[str] = set()

    def write(video: str, features: Features, record: Mapping[str, Any]) -> None:
        if parents := names & {str(parent) for parent in PurePosixPath(video).parents}:
            raise MmdistError(
                f"HDF5 cannot hold both '{min(parents)}' and '{video}'; export them as npy."
            )
        names.add(video)
        name = f"{video}/{GROUP_KEY}" if layout == "activitynet" else video
        file.create_dataset(name, data=features.data)
        if record:
            file[video].attrs[RECORD] = json.dumps(record, sort_keys=True)

    h5py = require_h5py(target)
    with staged(target) as temporary:
        try:
            with h5py.File(temporary, "w") as file:
                yield write
        except RuntimeError as error:  # how h5py reports a disk that is full when it closes a file
            raise OSError(str(error)) from error


@contextmanager
def _npy(target: Path) -> Iterator[Write]:
    database: dict[str, Any] = {}

    def write(video: str, features: Features, record: Mapping[str, Any]) -> None:
        file = folder / f"{video}.npy"
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, features.data)
        if record:
            fields, seconds = fields_of(features), features.duration_seconds
            frames = {"frame": fields["fps"] * seconds} if fields else {}
            facts = {"subset": "all", "annotations": [], "duration": seconds}
            database[video] = {**facts, **frames, **fields, RECORD: record}

    with staged(target) as folder:
        yield write
        if database:
            write_json(folder / FIELDS, {"database": database})


def import_features(
    path: Path,
    out: Path,
    *,
    modality: str = "rgb",
    durations: Mapping[str, float] | None = None,
    fields: Mapping[str, float] | None = None,
    progress: Progress | None = None,
) -> int:
    """Write features of any source that `open_features` opens to the feature store `out`.

    durations: seconds by video; needed of videos that the source records none of. fields: fps,
    stride, window and offset, in frames, of all videos (see `row_times`); by default as recorded,
    else the rows divide the video evenly. Returns the number of videos.
    Raises MmdistError when durations are missing or the features cannot be read, and where the
    store holds other features of a video; then nothing is written.
    """
    durations, fields = durations or {}, dict(fields or {})
    with open_features(path, modality) as source, staged(out) as temporary:
        unknown = sorted(v for v in source.names if v not in durations and not source.timed(v))
        if unknown:
            raise MmdistError(
                f"{len(unknown)} of {len(source.names)} videos in '{path}' have no duration "
                f"({some(unknown)}); give --durations."
            )
        for video, features in _each(source, progress):
            seconds = durations.get(video, features.duration_seconds)
            provenance = features.provenance
            if fields:
                provenance = replace(provenance, info={**provenance.info, **fields})
            if fields or seconds != features.duration_seconds:
                times_S2 = row_times(provenance, len(features.data), seconds)
                features = replace(
                    features, times=times_S2, duration_seconds=seconds, provenance=provenance
                )
            FeatureStore(temporary).save(video, features)
    return len(source.names)


def features_info(path: Path, *, progress: Progress | None = None) -> list[dict[str, Any]]:
    """What a source holds, for each modality: videos, rows, channels, rates, and how it was made.

    Raises MmdistError for features that cannot be read.
    """
    found = []
    for modality in modalities_of(path):
        rows: dict[str, int] = {}
        seconds: dict[str, float] = {}
        channels: set[int] = set()
        made: Counter[str] = Counter()
        with open_features(path, modality) as source:
            for video, features in _each(source, progress):
                rows[video], width = features.data.shape
                channels.add(width)
                made[json.dumps(dict(features.provenance.matters), sort_keys=True)] += 1
                if source.timed(video):
                    seconds[video] = features.duration_seconds
        facts = {
            "kind": source.kind,
            "modality": modality,
            "videos": len(rows),
            "rows": sum(rows.values()),
            "channels": sorted(channels),
            "videos_with_duration": len(seconds),
            "hours": round(sum(seconds.values()) / 3600, 4),
            **rate_facts(rows, seconds),
            "made_by": [json.loads(how) | {"videos": n} for how, n in made.most_common()],
        }
        found.append(facts)
    return found
