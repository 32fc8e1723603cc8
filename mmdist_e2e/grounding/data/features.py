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

    @property
    def rows(self) -> dict[str, int]:
        return {video: row for row, video in enumerate(self.videos)}

    def to(self, device: torch.device | str) -> FeatureTable:
        """The same table with its tensor on another device."""
        return replace(self, data_VLF=self.data_VLF.to(device))


@dataclass(frozen=True)
class FeatureSource:
    """An open source of features of one modality.

    names: by video id, the name that the source uses. raw: reads the array of a name.
    """

    path: Path
    modality: str
    kind: Literal["store", "hdf5", "npy"]
    names: Mapping[str, str]
    raw: Callable[[str], NDArray[Any]]

    def array(self, video: str) -> NDArray[Any]:
        """[S, F] of any number type, finite or not. Raises MmdistError for anything else."""
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
        """Checked features of a video. Raises MmdistError as `array`, and for infinite values."""
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
    if names := _by_id(path, store.videos(modality)):
        return FeatureSource(
            path, modality, "store", names, lambda name: store.load(name, modality).data
        )
    files = {p.relative_to(path).as_posix().removesuffix(".npy"): p for p in path.rglob("*.npy")}
    if names := _by_id(path, sorted(files)):
        return FeatureSource(path, modality, "npy", names, lambda name: np.load(files[name]))
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
    """Where to read each modality: from one path, or flow from its own."""
    own = {"flow": flow_features_path or features_path}
    return {modality: own.get(modality, features_path) for modality in modalities}


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
                    f"'{path}' ({some(missing)}); extract them first, or leave them out of the "
                    f"annotations."
                )
            first = source.features(wanted[0])
            matters[modality] = dict(first.provenance.matters)
            digest = hashlib.sha256(json.dumps(matters[modality], sort_keys=True).encode())
            data_VLF = np.empty((len(wanted), length, first.data.shape[1]), np.float32)
            for row, video in enumerate(wanted):
                features = source.features(video) if row else first
                _refuse_unlike(first, features, f"Features in '{path}'", (wanted[0], video))
                data_VLF[row] = features.resample(length).data
                seconds = features.duration_seconds if source.kind == "store" else None
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


def _refuse_unlike(first: Features, other: Features, where: str, videos: tuple[str, str]) -> None:
    """Raises MmdistError when the features of two videos were not made in one way."""
    unlike = differences(first.provenance.matters, other.provenance.matters)
    channels, wanted = other.data.shape[1], first.data.shape[1]
    if unlike or channels != wanted:
        unlike = unlike or [f"{channels} channels, not {wanted}"]
        raise MmdistError(
            f"{where} were not all made in one way: '{videos[1]}' differs from '{videos[0]}' "
            f"({'; '.join(unlike)}); extract them all alike."
        )


def read_features(places: Mapping[str, Path], videos: Sequence[str]) -> dict[str, list[Features]]:
    """By video, its features of each modality before resampling. Raises as `load_features`."""
    found: dict[str, list[Features]] = {video: [] for video in videos}
    for modality, path in places.items():
        with open_features(path, modality) as source:
            for video in videos:
                found[video].append(source.features(video))
    return found
