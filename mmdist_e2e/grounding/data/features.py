"""Feature input: our store, an HDF5 file or a folder of .npy files, resampled to one tensor.

Shape suffixes: V videos, S rows of one video, L positions, F feature channels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmdist_e2e.grounding.data.annotations import Annotation, some, video_id
from mmdist_e2e.store import DAMAGED, TEMPORARY, FeatureStore, require
from mmdist_e2e.store import read_features as read_feature_file
from mmdist_e2e.structures import MODALITIES, Features, MmdistError, Provenance, differences

GROUP_KEY = "c3d_features"  # where the published ActivityNet features keep a video's rows
# What `mmdist features export` records beside an array (duration, modality, provenance, and times
# that `row_times` does not give): JSON in an attribute in HDF5, in one file beside .npy files.
RECORD, FIELDS = "mmdist", "features.json"
Record = Mapping[str, Any]


@dataclass(frozen=True)
class FeatureTable:
    """Features of many videos at L positions, in one tensor.

    data_VLF: float32; the channels of several modalities are concatenated.
    durations_seconds: None where the features do not record it (HDF5 and .npy of others).
    matters: by modality, in the order of the channels, the provenance that all videos share and
    that a model must agree with. channels: by modality, their number.
    digests: by modality, of the features as read, their times, durations and provenance.
    """

    videos: tuple[str, ...]
    data_VLF: Tensor
    durations_seconds: Mapping[str, float | None]
    matters: Mapping[str, Mapping[str, Any]]
    channels: Mapping[str, int]
    digests: Mapping[str, str] = field(default_factory=dict)

    @property
    def rows(self) -> dict[str, int]:
        return {video: row for row, video in enumerate(self.videos)}

    def to(self, device: torch.device | str) -> FeatureTable:
        """The same table with its tensor on another device."""
        return replace(self, data_VLF=self.data_VLF.to(device))


@dataclass(frozen=True)
class FeatureSource:
    """An open source of features of one modality.

    names: by video id, the name that the source uses. load: reads what is there of a name: features
    of a store, or an array of another program. record: reads what mmdist exported with an array.
    """

    path: Path
    modality: str
    kind: Literal["store", "hdf5", "npy"]
    names: Mapping[str, str]
    load: Callable[[str], Features | NDArray[Any]]
    record: Callable[[str], Record | None] = lambda _: None

    def timed(self, video: str) -> bool:
        """Whether the source records the duration and the provenance of a video."""
        return self.kind == "store" or self.record(self.names[video]) is not None

    def features(self, video: str) -> Features:
        """Checked features of a video. Raises MmdistError when they cannot be used.

        Arrays without a record have no times: rows are spread over a video of length 1.
        """
        name = self.names[video]
        where = f"The {self.modality} features of '{video}' in '{self.path}'"
        try:
            found = self.load(name)
            if not isinstance(found, Features):
                found = self._imported(np.atleast_1d(found), self.record(name) or {"duration": 1.0})
        except DAMAGED as error:
            raise MmdistError(f"{where} cannot be used: {error}") from error
        if found.modality != self.modality:
            raise MmdistError(
                f"{where} are those of {found.modality}; give the ones of {self.modality}."
            )
        return found

    def _imported(self, array: NDArray[Any], record: Record) -> Features:
        if array.ndim > 2 and array.size == len(array) * array.shape[-1]:
            array = array.reshape(len(array), -1)  # [S, 1, 1, F], as some files have it
        if array.dtype.kind in "fiu":
            with np.errstate(over="ignore"):  # Features refuses what is not finite then
                array = array.astype(np.float32)
        own = Provenance.external(self.kind).to_json()
        provenance = Provenance.from_json(record.get("provenance", own))
        seconds = float(record["duration"])
        times = record["times"] if "times" in record else provenance.row_times(len(array), seconds)
        modality = record.get("modality", self.modality)
        return Features(array, np.array(times), seconds, modality, provenance)


def modalities_of(path: Path) -> list[str]:
    """The modalities of a source; rgb for arrays that do not tell. Raises as `open_features`."""
    if path.suffix == ".npz" and path.is_file():
        return [read_feature_file(path).modality]
    if path.is_dir() and (own := [m for m in MODALITIES if FeatureStore(path).videos(m)]):
        return own
    with open_features(path) as source:
        record = next(filter(None, map(source.record, source.names.values())), {})
        return [str(record.get("modality", "rgb"))]


@contextmanager
def open_features(path: Path, modality: str = "rgb") -> Iterator[FeatureSource]:
    """Open a feature store (a folder of `VIDEO.<modality>.npz`), a folder of `VIDEO.npy`, or HDF5.

    A single .npz or .npy file is a source of one video.
    HDF5: one dataset per video, or one group per video that holds `c3d_features`. A video is named
    by its id, with or without the suffix of a video file. Raises MmdistError for anything else, and
    where two names mean one video.
    """
    if path.is_dir():
        yield _folder(path, modality)
        return
    if not path.is_file():
        raise MmdistError(f"There are no features at '{path}'; give a feature folder or HDF5 file.")
    if path.suffix in (".npz", ".npy"):
        one = {video_id(path.stem.removesuffix(f".{modality}")): str(path)}
        if path.suffix == ".npz":
            yield FeatureSource(path, modality, "store", one, lambda _: read_feature_file(path))
        else:
            yield FeatureSource(path, modality, "npy", one, np.load)
        return
    h5py = require("h5py", "hdf5", f"The HDF5 file '{path}'")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise MmdistError(f"'{path}' is not a readable HDF5 file of features: {error}.") from error

    def load(name: str) -> NDArray[Any]:
        node = file[name]
        return np.asarray((node[GROUP_KEY] if isinstance(node, h5py.Group) else node)[()])

    def record(name: str) -> Record | None:
        text = file[name].attrs.get(RECORD)
        return None if text is None else dict(json.loads(text))

    with file:
        yield FeatureSource(path, modality, "hdf5", _by_id(path, _names_in(file)), load, record)


def _names_in(group: Any, prefix: str = "") -> Iterator[str]:
    """Names of the videos inside an HDF5 group: datasets, and groups that hold GROUP_KEY."""
    for key, member in group.items():
        is_group = hasattr(member, "items")
        if GROUP_KEY in member if is_group else key != GROUP_KEY:
            yield f"{prefix}{key}"
        if is_group:
            yield from _names_in(member, f"{prefix}{key}/")


def _folder(path: Path, modality: str) -> FeatureSource:
    store = FeatureStore(path)
    if names := _by_id(path, store.videos(modality)):
        stored = partial(store.load, modality=modality)
        return FeatureSource(path, modality, "store", names, stored)
    files = {p.relative_to(path).as_posix().removesuffix(".npy"): p for p in path.rglob("*.npy")}
    if names := _by_id(path, sorted(name for name in files if not name.startswith(TEMPORARY))):
        record = _fields(path / FIELDS).get
        return FeatureSource(path, modality, "npy", names, lambda n: np.load(files[n]), record)
    others = [other for other in MODALITIES if store.videos(other)]
    raise MmdistError(
        f"The folder '{path}' holds no {modality} features"
        + (f", only {' and '.join(others)}" if others else "")
        + f"; it needs files VIDEO.{modality}.npz (made by mmdist extract) or VIDEO.npy."
    )


def _fields(path: Path) -> dict[str, Record]:
    """By video, what was recorded beside exported .npy files; empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        raw = json.loads(path.read_bytes())
        return dict(raw["database"]) if isinstance(raw, dict) and "database" in raw else {}
    except (OSError, ValueError, TypeError) as error:
        raise MmdistError(
            f"'{path}' is not what mmdist features export wrote ({error}); restore it, or move it "
            f"away to read the arrays alone."
        ) from error


def _by_id(path: Path, names: Iterable[str]) -> dict[str, str]:
    """Names by video id; a name that is an id takes precedence over one with a suffix."""
    found: dict[str, str] = {}
    for name in names:
        video = video_id(name)
        other = found.setdefault(video, name)
        if name == video:
            found[video] = name
        elif other not in (name, video):
            raise MmdistError(
                f"'{path}' holds both '{other}' and '{name}', which differ only by the suffix of "
                f"a video file; rename one."
            )
    return found


def places_of(
    modalities: Sequence[str], features_path: Path, flow_features_path: Path | None
) -> dict[str, Path]:
    """Where to read each modality: from one path, or flow from its own."""
    places = {"rgb": features_path, "flow": flow_features_path or features_path}
    return {modality: places[modality] for modality in modalities}


def having_features(
    annotations: Sequence[Annotation], places: Mapping[str, Path]
) -> tuple[list[Annotation], dict[str, int]]:
    """The annotations whose videos have features at all places, and what is left out.

    Raises MmdistError when nothing is left.
    """
    found = {a.video for a in annotations}
    for modality, path in places.items():
        with open_features(path, modality) as source:
            found &= source.names.keys()
    if not found:
        where = " and ".join(map(str, dict.fromkeys(places.values())))
        raise MmdistError(f"No video of the annotations has features in {where}; check the names.")
    left_out = [a for a in annotations if a.video not in found]
    counts = {"queries": len(left_out), "videos": len({a.video for a in left_out})}
    return [a for a in annotations if a.video in found], counts


def load_features(
    places: Mapping[str, Path], videos: Sequence[str], *, length: int
) -> FeatureTable:
    """Features of `videos`, resampled to `length`, from any source that `open_features` opens.

    places: by modality, in the order of the channels.
    Raises MmdistError when videos lack features (how many, and which first), when their features
    were not all made in one way, when a value is unreadable or not finite, and when RGB and flow
    are the same features (only a feature store tells the two apart).
    """
    wanted = sorted(set(videos))
    durations: dict[str, float | None] = dict.fromkeys(wanted)
    arrays: dict[str, NDArray[np.float32]] = {}
    matters: dict[str, Mapping[str, Any]] = {}
    digests: dict[str, str] = {}
    for modality, path in places.items():
        with open_features(path, modality) as source:
            missing = [video for video in wanted if video not in source.names]
            if missing:
                raise MmdistError(
                    f"{len(missing)} of {len(wanted)} videos have no {modality} features in "
                    f"'{path}' ({some(missing)}), which has '{min(source.names)}' for one; extract "
                    f"them first, or leave their queries out (--skip-missing of train and "
                    f"evaluate)."
                )
            first = source.features(wanted[0])
            matters[modality] = dict(first.provenance.matters)
            digest = hashlib.sha256(json.dumps(matters[modality], sort_keys=True).encode())
            data_VLF = np.empty((len(wanted), length, first.data.shape[1]), np.float32)
            for row, video in enumerate(wanted):
                features = source.features(video) if row else first
                if unlike := differences(first.made, features.made):
                    raise MmdistError(
                        f"Features in '{path}' were not all made in one way: '{video}' differs "
                        f"from '{wanted[0]}' ({'; '.join(unlike)}); extract them all alike."
                    )
                data_VLF[row] = features.resample(length).data
                seconds = features.duration_seconds if source.timed(video) else None
                durations[video] = durations[video] or seconds
                digest.update(f"{video} {features.data.shape} {seconds}".encode())
                digest.update(np.ascontiguousarray(features.data, np.float32).data)
                digest.update(np.ascontiguousarray(features.times, np.float64).data)
        arrays[modality], digests[modality] = data_VLF, digest.hexdigest()
    one, *others = arrays.values()
    if any(np.array_equal(one, other) for other in others):
        raise MmdistError(
            f"{' and '.join(map(str, places.values()))} hold the same features, once as RGB and "
            f"once as flow; give the flow features with --flow-features."
        )
    return FeatureTable(
        videos=tuple(wanted),
        data_VLF=torch.from_numpy(np.concatenate(list(arrays.values()), axis=2)),
        durations_seconds=durations,
        matters=matters,
        channels={modality: array.shape[2] for modality, array in arrays.items()},
        digests=digests,
    )


def read_features(places: Mapping[str, Path], videos: Sequence[str]) -> dict[str, list[Features]]:
    """By video, its features of each modality before resampling. Raises as `load_features`."""
    found: dict[str, list[Features]] = {video: [] for video in videos}
    for modality, path in places.items():
        with open_features(path, modality) as source:
            for video in videos:
                found[video].append(source.features(video))
    return found
