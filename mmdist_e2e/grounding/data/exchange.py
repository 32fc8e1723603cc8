"""Features out to other programs and back in: HDF5, folders of .npy, OpenTAD's fields.

Exports record durations, times and provenance beside the arrays, so that what is read back is what
was written, and commands that read a feature store read an export alike. See docs/features.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mmdist_e2e.grounding.answer import Progress
from mmdist_e2e.grounding.data.annotations import some
from mmdist_e2e.grounding.data.features import (
    FIELDS,
    GROUP_KEY,
    RECORD,
    open_features,
)
from mmdist_e2e.store import FeatureStore, require, staged, write_json
from mmdist_e2e.structures import Features, MmdistError

Write = Callable[[str, Features, Mapping[str, Any]], object]


def convert_features(
    path: Path,
    target: Path,
    *,
    form: str,
    modality: str = "rgb",
    layout: str = "charades",
    durations: Mapping[str, float] | None = None,
    grid: Mapping[str, float] | None = None,
    progress: Progress | None = None,
) -> int:
    """Write the features of one modality in another format; returns the number of videos.

    form: "store", "hdf5" (layout "charades": a dataset VIDEO, "activitynet": VIDEO/c3d_features),
    "npy" (a folder of VIDEO.npy and features.json), or "opentad" (the same, but every video must
    have the fields that OpenTAD and ActionFormer compute times from).
    durations: seconds by video; a store needs those that the source does not record. grid:
    effective_fps, stride, window and offset as `Provenance.row_times` takes them; by default as
    recorded.
    Raises MmdistError, and writes nothing, when durations are missing, for features that cannot be
    read, and where `target` holds something else.
    """
    durations, grid = durations or {}, grid or {}
    writers: dict[str, Callable[[Path], AbstractContextManager[Write]]]
    writers = {"store": _store, "hdf5": partial(_hdf5, layout=layout), "npy": _npy, "opentad": _npy}
    with open_features(path, modality) as source, writers[form](target) as write:
        untimed = {v for v in source.names if v not in durations and not source.timed(v)}
        if form == "store" and untimed:
            raise MmdistError(
                f"{len(untimed)} of {len(source.names)} videos in '{path}' have no duration "
                f"({some(sorted(untimed))}); give --durations."
            )
        for done, video in enumerate(sorted(source.names), start=1):
            features = source.features(video)
            seconds = durations.get(video, features.duration_seconds)
            if grid or seconds != features.duration_seconds:
                made = features.provenance
                made = replace(made, info={**made.info, **grid})
                times_S2 = made.row_times(len(features.data), seconds)
                features = replace(
                    features, times=times_S2, duration_seconds=seconds, provenance=made
                )
            record = {} if video in untimed else _record(features)
            if form == "opentad" and "fps" not in record:
                raise MmdistError(
                    f"The rows of '{video}' in '{path}' are not at a known stride, window and fps, "
                    f"which opentad needs; export them as npy or hdf5."
                )
            write(video, features, record)
            if progress:
                progress("converting features", done, len(source.names))
        return len(source.names)


def _record(features: Features) -> dict[str, Any]:
    """What the array does not hold, and the fields by which OpenTAD places rows if they do.

    Row i is centered at (i · feature_stride + offset_frames) / fps; num_frames, the window, is
    ActionFormer's name.
    """
    seconds, made = features.duration_seconds, features.provenance
    record = {"modality": features.modality, "duration": seconds, "provenance": made.to_json()}
    if not np.array_equal(made.row_times(len(features.data), seconds), features.times):
        return record | {"times": features.times.tolist()}
    if made.grid is not None:
        fps, stride, window, offset = made.grid
        record |= {"fps": fps, "frame": fps * seconds, "feature_stride": stride}
        record |= {"num_frames": window, "offset_frames": offset + window / 2}
    return record


@contextmanager
def _store(target: Path) -> Iterator[Write]:
    with staged(target) as root:
        yield lambda video, features, _: FeatureStore(root).save(video, features)


@contextmanager
def _hdf5(target: Path, layout: str) -> Iterator[Write]:
    def write(video: str, features: Features, record: Mapping[str, Any]) -> None:
        name = f"{video}/{GROUP_KEY}" if layout == "activitynet" else video
        try:
            file.create_dataset(name, data=features.data)
        except (TypeError, ValueError) as error:
            raise MmdistError(
                f"HDF5 cannot hold '{video}' beside a video that its name begins with ({error}); "
                f"export them as npy."
            ) from error
        if record:
            file[video].attrs[RECORD] = json.dumps(record, sort_keys=True)

    h5py = require("h5py", "hdf5", f"The HDF5 file '{target}'")
    with staged(target) as temporary:
        try:
            with h5py.File(temporary, "w") as file:
                yield write
        except RuntimeError as error:  # of h5py, when the disk is full as it closes the file
            raise OSError(str(error)) from error


@contextmanager
def _npy(target: Path) -> Iterator[Write]:
    database: dict[str, Any] = {}

    def write(video: str, features: Features, record: Mapping[str, Any]) -> None:
        file = folder / f"{video}.npy"
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, features.data)
        if record:
            database[video] = {"subset": "all", "annotations": [], **record}

    with staged(target) as folder:
        yield write
        write_json(folder / FIELDS, {"database": database})
