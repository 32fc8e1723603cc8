"""One video to features of every modality: streaming, each frame decoded once.

Memory does not grow with length. Shapes: N frames of a chunk, S rows, D channels.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmdist_e2e.extractors.flow.fields import FlowFrames
from mmdist_e2e.extractors.flow.settings import MINIMUM_SIDE_PIXELS
from mmdist_e2e.extractors.runner import Chunk, DenseChunks, SnippetNetwork, Windows
from mmdist_e2e.extractors.video.reader import VideoError
from mmdist_e2e.store import fast_digest
from mmdist_e2e.structures import Features, MmdistError, Provenance

if TYPE_CHECKING:
    from mmdist_e2e.extractors.video.reader import Decoder, FrameStream

Progress = Callable[[float], None]


class ExtractionError(MmdistError):
    """A modality of a video failed; `finished` has the features of those that did not."""

    def __init__(self, message: str, finished: Mapping[str, Features]) -> None:
        super().__init__(message)
        self.finished = finished


def cause_of(error: Exception) -> str:
    """The message of an error meant for people; the class and first line of any other."""
    if isinstance(error, MmdistError):
        return str(error)
    return ": ".join(filter(None, [type(error).__name__, str(error).partition("\n")[0]]))


def extract_video(
    path: Path,
    networks: Sequence[SnippetNetwork],
    decoder: Decoder,
    *,
    source: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Features]:
    """Decode one video and run the networks over it, one network per modality.

    Networks of one frame rate, policy and longer side share one pass of decoding.

    Args:
        source: the file's `fast_digest`, if the caller has computed it.
        progress: called with the fraction done, 0 to 1.

    Returns Features by modality, with times from 0 to the duration and at least one row.
    Raises VideoError when the file cannot be decoded whole or is smaller than 16 pixels per side,
    MmdistError when the rows of a modality cannot be computed; ExtractionError for either if other
    modalities are complete.
    """
    assert len({network.spec.modality for network in networks}) == len(networks) > 0
    if source is None:
        source = fast_digest(path) if path.is_file() else {}
    passes: dict[tuple[object, ...], list[_Track]] = {}
    for network in networks:
        key = network.spec.fps, network.spec.fps_policy, network.spec.longer_side
        passes.setdefault(key, []).append(_Track(path, network))
    finished: dict[str, Features] = {}
    failures: list[MmdistError] = []
    for index, tracks in enumerate(passes.values()):

        def advanced(fraction: float, index: int = index) -> None:
            if progress is not None:
                progress((index + fraction) / len(passes))

        try:
            stream = _decode(path, tracks, decoder, advanced)
        except MmdistError as error:
            failures.append(error)
            break  # another pass would meet the same file
        for track in tracks:
            track.finish(stream, source)
            finished |= track.features
            failures += track.failures
    if failures and finished:
        raise ExtractionError(str(failures[0]), finished) from failures[0]
    if failures:
        raise failures[0]
    return finished


def _decode(
    path: Path, tracks: Sequence[_Track], decoder: Decoder, advanced: Progress
) -> FrameStream:
    """Push every frame of the video to every track that has not failed."""
    spec = tracks[0].network.spec
    stream = decoder.frames(
        path, fps=spec.fps, fps_policy=spec.fps_policy, longer_side=spec.longer_side
    )
    info = stream.info
    if min(info.width, info.height) < MINIMUM_SIDE_PIXELS:
        raise VideoError(
            path,
            f"{path} is {info.width}×{info.height} pixels; videos need at least "
            f"{MINIMUM_SIDE_PIXELS} pixels on each side.",
        )
    for track in tracks:
        track.start(stream.sample_count)
    for chunk in stream:
        for track in tracks:
            track.push(chunk.frames_NHWC)
        if all(track.failures for track in tracks):
            stream.close()
            break
        advanced(min(float(chunk.times_N[-1]) / info.duration_seconds, 1.0))
    return stream


class _Track:
    """One network's run over one video. A failure, whatever the cause, ends this track alone."""

    def __init__(self, path: Path, network: SnippetNetwork) -> None:
        spec = network.spec
        self.path, self.network, self.modality = path, network, spec.modality
        self.failures: list[MmdistError] = []  # at most one
        self.features: dict[str, Features] = {}  # by modality, when finished
        self._inputs = network.input_stream()
        self._cutter: Windows | DenseChunks = Windows(window=spec.window, stride=spec.stride)
        self._pending: list[NDArray[np.generic]] = []
        self._rows: list[NDArray[np.float32]] = []

    @contextmanager
    def _attempt(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # they hold frames and tensors
            failure = MmdistError(f"{self.path}: no {self.modality} features. {cause_of(error)}")
            failure.__cause__ = error
            self.failures.append(failure)

    def start(self, samples: int) -> None:
        """Take the number of frames to come, before the first."""
        spec = self.network.spec
        if spec.mode == "dense":
            still = isinstance(self._inputs, FlowFrames) and self._inputs.still
            frames = samples - still if spec.tail == "none" else 0
            self._cutter = DenseChunks(frames=frames)

    def push(self, frames_NHWC: NDArray[np.uint8]) -> None:
        """Take frames, and run the network on complete windows or chunks."""
        if not self.failures:
            with self._attempt():
                self._feed(self._inputs.push(frames_NHWC))

    def finish(self, stream: FrameStream, source: Mapping[str, Any]) -> None:
        """Make the features of the whole video."""
        if not self.failures:
            with self._attempt():
                self._feed(self._inputs.finish())
                self._run(self._cutter.finish())
                self._flush()
                self.features[self.modality] = self._result(stream, source)

    def _feed(self, inputs: Iterator[NDArray[np.generic]]) -> None:
        for piece_NHWC in inputs:
            self._run(self._cutter.push(piece_NHWC))

    def _run(self, pieces: Iterator[NDArray[np.generic]] | Iterator[Chunk]) -> None:
        for piece in pieces:
            if isinstance(piece, Chunk):
                self._rows.append(self.network.dense_rows(piece))
                continue
            self._pending.append(piece)
            if len(self._pending) == self.network.windows_per_call:
                self._flush()

    def _flush(self) -> None:
        if self._pending:
            self._rows.append(self.network.rows(np.stack(self._pending)))
            self._pending.clear()

    def _result(self, stream: FrameStream, source: Mapping[str, Any]) -> Features:
        spec, data_SD = self.network.spec, np.concatenate(self._rows)
        info = {
            **self.network.info,
            "decoder": stream.info.decoder,
            "effective_fps": stream.fps,
            "trained_on": spec.trained_on,
        }
        seconds = stream.info.duration_seconds
        provenance = Provenance(spec.matters, info, source)
        times_S2 = provenance.row_times(len(data_SD), seconds)
        return Features(data_SD, times_S2, seconds, spec.modality, provenance)
