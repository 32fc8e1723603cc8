"""Feature input: our store, an HDF5 file or a folder of .npy files, resampled to one tensor.

Shape suffixes: V videos, S rows of one video, L positions, F feature channels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmdist_e2e.grounding.data.annotations import some, video_id
from mmdist_e2e.store import FeatureStore
from mmdist_e2e.structures import MODALITIES, Features, MmdistError, Provenance, differences

COPY_TOLERANCE = 5e-3  # of the standard deviation; half precision is a tenth of it

GROUP_KEY = "c3d_features"  # where the published ActivityNet features keep a video's rows


@dataclass(frozen=True)
class FeatureTable:
    """Features of many videos at L positions, in one tensor.

    data_VLF: float32; the channels of several modalities are concatenated.
    durations_seconds: None where the features do not record it (HDF5, .npy).
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

    def __post_init__(self) -> None:
        assert list(self.matters) == list(self.channels)
        assert sum(self.channels.values()) == self.data_VLF.shape[2]

    @property
    def rows(self) -> dict[str, int]:
        return {video: row for row, video in enumerate(self.videos)}

    def to(self, device: torch.device | str) -> FeatureTable:
        """The same table with its tensor on another device."""
        return replace(self, data_VLF=self.data_VLF.to(device))


@dataclass(frozen=True)
class FeatureSource:
    """An open source of features of one modality.

    names: by video id, the name that the source uses. raw: reads the array of a name, of any shape
    and type.
    """

    path: Path
    modality: str
    kind: Literal["store", "hdf5", "npy"]
    names: Mapping[str, str]
    raw: Callable[[str], NDArray[Any]]

    def array(self, video: str) -> NDArray[Any]:
        """[S, F] of any number type, finite or not.

        Raises MmdistError when it cannot be read or is not a two-dimensional array of numbers.
        """
        try:
            array = self.raw(self.names[video])
        except MmdistError:
            raise
        except (OSError, EOFError, KeyError, ValueError, RuntimeError) as error:
            raise MmdistError(
                f"The features of '{video}' in '{self.path}' cannot be read ({error}); "
                f"extract them again."
            ) from error
        if array.ndim != 2 or 0 in array.shape or array.dtype.kind not in "fiu":
            raise MmdistError(
                f"The features of '{video}' in '{self.path}' are {array.dtype} of the shape "
                f"{list(array.shape)}; they must be numbers of the shape [snippets, channels]."
            )
        return array

    def features(self, video: str) -> Features:
        """Checked features of a video.

        Raises MmdistError as `array`, and where a value is not finite.
        """
        if self.kind == "store":
            features = FeatureStore(self.path).load(self.names[video], self.modality)
            if features.modality != self.modality:
                raise MmdistError(
                    f"The {self.modality} file of '{video}' in '{self.path}' holds "
                    f"{features.modality} features; extract {self.modality} again."
                )
            return features
        data_SF = self.array(video).astype(np.float32)
        # Imported arrays have no times: rows are spread evenly over a video of length 1.
        edges = np.linspace(0.0, 1.0, len(data_SF) + 1)
        times_S2 = np.stack([edges[:-1], edges[1:]], axis=1)
        try:
            return Features(data_SF, times_S2, 1.0, self.modality, Provenance.external(self.kind))
        except MmdistError as error:
            raise MmdistError(f"The features of '{video}' in '{self.path}': {error}") from error


@contextmanager
def open_features(path: Path, modality: str = "rgb") -> Iterator[FeatureSource]:
    """Open a feature store (a folder of `VIDEO.<modality>.npz`), a folder of `VIDEO.npy`, or HDF5.

    HDF5: one dataset per video, or one group per video that holds `c3d_features`. A video is named
    by its id, with or without the suffix of a video file. Raises MmdistError for anything else, and
    where two names mean one video.
    """
    if path.is_dir():
        yield _folder(path, modality)
        return
    if not path.is_file():
        raise MmdistError(f"There are no features at '{path}'; give a feature folder or HDF5 file.")
    try:
        import h5py
    except ImportError as error:
        raise MmdistError(
            f"Reading '{path}' needs h5py; run pip install 'mmdist-e2e[hdf5]'."
        ) from error
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise MmdistError(f"'{path}' is not a readable HDF5 file of features: {error}.") from error

    def raw(name: str) -> NDArray[Any]:
        node = file[name]
        if isinstance(node, h5py.Group):
            if GROUP_KEY not in node:
                raise MmdistError(
                    f"The group '{name}' of '{path}' holds {some(sorted(node)) or 'nothing'} and "
                    f"not {GROUP_KEY}; store each video's features as one dataset."
                )
            node = node[GROUP_KEY]
        return np.asarray(node[()])

    with file:
        yield FeatureSource(path, modality, "hdf5", _by_id(path, _names_in(file)), raw)


def _names_in(group: Any, prefix: str = "") -> Iterator[str]:
    """Members of an HDF5 group, recursively: a group is a video or a folder of videos."""
    for key, member in group.items():
        yield f"{prefix}{key}"
        if hasattr(member, "items") and GROUP_KEY not in member:
            yield from _names_in(member, f"{prefix}{key}/")


def _folder(path: Path, modality: str) -> FeatureSource:
    store = FeatureStore(path)
    if videos := store.videos(modality):
        names = _by_id(path, videos)
        return FeatureSource(
            path, modality, "store", names, lambda name: store.load(name, modality).data
        )
    arrays = (p.relative_to(path).as_posix().removesuffix(".npy") for p in path.rglob("*.npy"))
    if names := _by_id(path, sorted(arrays)):
        return FeatureSource(
            path, modality, "npy", names, lambda name: np.load(path / f"{name}.npy")
        )
    others = [other for other in MODALITIES if store.videos(other)]
    raise MmdistError(
        f"The folder '{path}' holds no {modality} features"
        + (f", only {' and '.join(others)}" if others else "")
        + f"; it needs files VIDEO.{modality}.npz (made by mmdist extract) or VIDEO.npy."
    )


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
    """Where to read each modality: from one path, or flow from its own.

    Raises MmdistError when RGB and flow would be read from the same arrays: only a feature store
    holds both.
    """
    own = {"flow": flow_features_path} if flow_features_path is not None else {}
    places = {modality: own.get(modality, features_path) for modality in modalities}
    if len(places) > 1 and _one_source(list(places.values())):
        raise MmdistError(
            f"'{features_path}' would be read as RGB and as flow, and it holds one kind of "
            f"features; give the flow features with --flow-features."
        )
    return places


def _one_source(paths: Sequence[Path]) -> bool:
    """Whether all paths are one HDF5 file or .npy folder (which do not tell modalities apart)."""
    first = paths[0]
    if not all(path.exists() and path.samefile(first) for path in paths):
        return False
    if first.is_file():
        return True
    stored = all(FeatureStore(first).videos(modality) for modality in MODALITIES)
    return not stored and next(first.rglob("*.npy"), None) is not None


def load_features(
    places: Mapping[str, Path], videos: Sequence[str], *, length: int
) -> FeatureTable:
    """Features of `videos`, resampled to `length`, from any source that `open_features` opens.

    places: by modality, in the order of the channels.
    Raises MmdistError when videos lack features (how many, and which first), when their features
    were not all made in one way, when a value is unreadable or not finite, and when RGB and flow
    are copies of each other.
    """
    wanted = sorted(set(videos))
    tables = [_load(path, wanted, modality, length) for modality, path in places.items()]
    if len(tables) > 1:
        _refuse_copies(tables, places)
    durations = {
        video: next(
            (t.durations_seconds[video] for t in tables if t.durations_seconds[video]), None
        )
        for video in wanted
    }
    return FeatureTable(
        videos=tuple(wanted),
        data_VLF=torch.cat([t.data_VLF for t in tables], dim=2),
        durations_seconds=durations,
        matters={m: t.matters[m] for t in tables for m in t.matters},
        channels={m: t.channels[m] for t in tables for m in t.channels},
        digests={m: t.digests[m] for t in tables for m in t.digests},
    )


def _refuse_copies(tables: Sequence[FeatureTable], places: Mapping[str, Path]) -> None:
    """Raises MmdistError when a video's features are the same in both modalities.

    The same to half precision, as a copy may be stored in another number type. Constant features
    (of a black video) do not count.
    """
    one_VLF, other_VLF = (table.data_VLF for table in tables)
    if one_VLF.shape != other_VLF.shape:
        return
    copies = [
        video
        for video, one_LF, other_LF in zip(tables[0].videos, one_VLF, other_VLF, strict=True)
        if (spread := float(one_LF.std(correction=0))) > 0
        and float((one_LF - other_LF).abs().max()) <= COPY_TOLERANCE * spread
    ]
    if copies:
        raise MmdistError(
            f"{' and '.join(map(str, places.values()))} hold the same features of {len(copies)} "
            f"of {len(tables[0].videos)} videos ({some(copies)}), once as RGB and once as flow; "
            f"give the flow features with --flow-features."
        )


def _load(path: Path, wanted: Sequence[str], modality: str, length: int) -> FeatureTable:
    """One modality of `load_features`."""
    with open_features(path, modality) as source:
        missing = [video for video in wanted if video not in source.names]
        if missing:
            raise MmdistError(
                f"{len(missing)} of {len(wanted)} videos have no {modality} features in '{path}' "
                f"({some(missing)}); extract them first, or leave them out of the annotations."
            )
        first = source.features(wanted[0])
        matters = dict(first.provenance.matters)
        digest = hashlib.sha256(json.dumps(matters, sort_keys=True).encode())
        data_VLF = np.empty((len(wanted), length, first.data.shape[1]), np.float32)
        durations: dict[str, float | None] = {}
        for row, video in enumerate(wanted):
            features = source.features(video) if row else first
            unlike = differences(matters, features.provenance.matters)
            if unlike or features.data.shape[1] != data_VLF.shape[2]:
                unlike = unlike or [f"{features.data.shape[1]} channels, not {data_VLF.shape[2]}"]
                raise MmdistError(
                    f"Features in '{path}' were not all made in one way: '{video}' differs from "
                    f"'{wanted[0]}' ({'; '.join(unlike)}); extract them all alike."
                )
            data_VLF[row] = features.resample(length).data
            durations[video] = features.duration_seconds if source.kind == "store" else None
            digest.update(f"{video} {features.data.shape} {durations[video]}".encode())
            digest.update(np.ascontiguousarray(features.data, np.float32).data)
            digest.update(np.ascontiguousarray(features.times, np.float64).data)
    return FeatureTable(
        videos=tuple(wanted),
        data_VLF=torch.from_numpy(data_VLF),
        durations_seconds=durations,
        matters={modality: matters},
        channels={modality: data_VLF.shape[2]},
        digests={modality: digest.hexdigest()},
    )


def read_features(places: Mapping[str, Path], videos: Sequence[str]) -> dict[str, list[Features]]:
    """By video, its features of each modality before resampling. Raises as `load_features`."""
    found: dict[str, list[Features]] = {video: [] for video in videos}
    for modality, path in places.items():
        with open_features(path, modality) as source:
            for video in videos:
                found[video].append(source.features(video))
    return found
