"""Videos to features of every modality: streaming, each frame decoded and uploaded once.

    feeder threads      each has a `Decoder` and takes one video after another from the jobs;
                        they put chunks of frames on the device
    the caller's thread preprocessing, flow, windows of several videos in one batch, networks
    writer thread       rows back to the host, PCA, `Features`, saving

A feeder hands over a chunk and waits until the device has done the one before, so memory does not
grow with length. The caller's thread never waits for a GPU. A row's bytes do not depend on the
videos beside it.

Shapes: N frames of a chunk, B windows of a batch, S rows, D channels.
"""

from __future__ import annotations

import queue
import threading
import time
import traceback
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmdist_e2e.extractors.flow.fields import FlowFrames, Repeats
from mmdist_e2e.extractors.flow.settings import MINIMUM_SIDE_PIXELS
from mmdist_e2e.extractors.remote import fetched
from mmdist_e2e.extractors.runner import Chunk, DenseChunks, Device, SnippetNetwork, Windows
from mmdist_e2e.extractors.video.reader import Decoder, VideoError
from mmdist_e2e.store import fast_digest
from mmdist_e2e.structures import Features, MmdistError, Provenance

if TYPE_CHECKING:
    from torch import Tensor

    from mmdist_e2e.extractors.video.reader import FrameStream

POLL_SECONDS = 0.1  # how often a waiting thread looks whether the run has ended
END_SECONDS = 2.0  # how long an ended run waits for its threads
UNSAVED = 4  # modalities that wait for the writer at most


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


@dataclass(frozen=True)
class Job:
    """One video.

    key: the caller's name for it. modalities: which of the conveyor's networks run. source: the
    file's `fast_digest`, if the caller has computed it.
    """

    key: Hashable
    path: Path
    modalities: Sequence[str]
    source: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Result:
    """What became of a job.

    features: of the modalities that succeeded, saved if there is a `save`. failures: empty if all
    did; VideoError when the file cannot be decoded whole or is smaller than 16 pixels per side,
    MmdistError for a modality whose rows cannot be computed, and whatever `save` raised.
    seconds: by stage: decode (the child's work), prepare, flow, network (on a GPU: until the work
    is queued) and write. video_seconds: the video's duration, 0 if unknown.
    """

    job: Job
    features: Mapping[str, Features]
    failures: Sequence[Exception]
    seconds: Mapping[str, float]
    video_seconds: float


def extract_video(
    path: Path,
    networks: Sequence[SnippetNetwork],
    decoder: Decoder | None = None,
    *,
    source: Mapping[str, Any] | None = None,
    progress: Callable[[float], None] | None = None,
) -> dict[str, Features]:
    """Decode one video and run the networks over it, one network per modality.

    Args:
        decoder: one to use and to leave open.
        source: the file's `fast_digest`, if the caller has computed it.
        progress: called with the fraction done, 0 to 1.

    Returns Features by modality, with times from 0 to the duration and at least one row.
    Raises what `Result.failures` names first; ExtractionError if other modalities are complete.
    """
    by_modality = {network.spec.modality: network for network in networks}
    assert len(by_modality) == len(networks) > 0

    def advanced(_: Job, fraction: float) -> None:
        if progress is not None:
            progress(fraction)

    with Conveyor(by_modality, decoders=1 if decoder is None else [decoder]) as conveyor:
        job = Job(path, path, list(by_modality), source)
        (result,) = conveyor.run([job], progress=advanced)
    if result.failures and result.features:
        message = str(result.failures[0])
        raise ExtractionError(message, result.features) from result.failures[0]
    if result.failures:
        raise result.failures[0]
    return dict(result.features)


class _Run:
    """One job on its way."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.tracks: list[_Track] = []
        self.features: dict[str, Features] = {}
        self.failures: list[Exception] = []
        self.seconds = dict.fromkeys(("decode", "prepare", "flow", "network", "write"), 0.0)
        self.video_seconds = 0.0
        self.fed = False  # whether the feeder has finished with it

    @contextmanager
    def clock(self, stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - begin

    def fail(self, error: Exception) -> None:
        cause = error.__cause__ or error
        traceback.clear_frames(cause.__traceback__)  # they hold frames and tensors
        self.failures.append(error)

    def result(self) -> Result:
        features = {m: self.features[m] for m in self.job.modalities if m in self.features}
        return Result(self.job, features, self.failures, self.seconds, self.video_seconds)


class _Track:
    """One network's run over one video. A failure, whatever the cause, ends this track alone."""

    def __init__(
        self, run: _Run, network: SnippetNetwork, stream: FrameStream, source: Mapping[str, Any]
    ) -> None:
        self.run, self.network, self.stream, self.source = run, network, stream, source
        self.inputs, spec = network.input_stream(), network.spec
        self.cutter: Windows | DenseChunks = Windows(window=spec.window, stride=spec.stride)
        if spec.mode == "dense":
            still = isinstance(self.inputs, FlowFrames) and self.inputs.still
            frames = stream.sample_count - still if spec.tail == "none" else 0
            self.cutter = DenseChunks(frames=frames)
        self.rows: list[Tensor] = []
        self.waiting = 0  # windows in a batch
        self.ended = False  # whether it has had all of its frames
        self.left = False  # whether it has failed, or gone to the writer

    @contextmanager
    def attempt(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            name = f"{self.run.job.path}: no {self.network.spec.modality} features."
            failure = MmdistError(f"{name} {cause_of(error)}")
            failure.__cause__ = error
            self.run.fail(failure)
            self.left = True
            self.rows.clear()

    def features(self, rows_SD: NDArray[np.float32]) -> Features:
        spec, stream = self.network.spec, self.stream
        info = {
            **self.network.info,
            "decoder": stream.info.decoder,
            "effective_fps": stream.fps,
            "trained_on": spec.trained_on,
        }
        seconds = stream.info.duration_seconds
        provenance = Provenance(spec.matters, info, self.source)
        data_SD = self.network.reduced(rows_SD)
        times_S2 = provenance.row_times(len(data_SD), seconds)
        return Features(data_SD, times_S2, seconds, spec.modality, provenance)


@dataclass
class _Arrival:
    """Frames for some tracks of a video, on the device; the last arrival of a pass has none.

    taken: set when the networks' thread has done its part; then `wait` waits for the device's.
    """

    tracks: Sequence[_Track]
    fraction: float
    frames_NHWC: Tensor | None = None
    repeats_N: Sequence[bool] = ()
    taken: threading.Event = field(default_factory=threading.Event)
    wait: Callable[[], object] = bool


class Conveyor:
    """Several videos at once through networks on one device. Use as a context manager.

    networks: by modality. decoders: how many videos are decoded at once, or the decoders to use,
    which stay open. stall_seconds: of `Decoder`.
    """

    def __init__(
        self,
        networks: Mapping[str, SnippetNetwork],
        *,
        decoders: int | Sequence[Decoder] = 2,
        stall_seconds: float = 60.0,
    ) -> None:
        (device,) = {network.device for network in networks.values()}
        self._networks, self._device = networks, Device(device)
        self._owned = isinstance(decoders, int)
        if isinstance(decoders, int):
            pin = self._device.pin
            decoders = [Decoder(stall_seconds=stall_seconds, pin=pin) for _ in range(decoders)]
        self._decoders = decoders
        self._threads: list[threading.Thread] = []
        self._stop = threading.Event()

    def __enter__(self) -> Conveyor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the run, dropping what is unfinished, and the conveyor's own decoders."""
        self._end()
        if self._owned:
            for decoder in self._decoders:
                decoder.close()

    def run(
        self,
        jobs: Iterable[Job],
        *,
        save: Callable[[Job, Features], None] | None = None,
        progress: Callable[[Job, float], None] | None = None,
    ) -> Generator[Result]:
        """Results of the jobs, as they complete. All failures of a job are in its result.

        Args:
            jobs: taken one by one as decoders become free, from other threads but never by two at
                once; taking one may block.
            save: called with each modality's features, in the writer's thread.
            progress: called with the fraction of a job's frames that were taken, 0 to 1.

        Raises what `jobs` or `progress` raise. Closing the generator, or the conveyor, ends the
        run within seconds. Another run ends this one.
        """
        self._end()
        self._stop = threading.Event()
        # From the feeders: arrivals, runs that were fed whole, what `jobs` raised, and None when
        # a feeder has ended. From the writer: results.
        self._inbox: queue.SimpleQueue[_Arrival | _Run | Result | BaseException | None]
        self._inbox = queue.SimpleQueue()
        self._unsaved: queue.Queue[tuple[_Track, Tensor, Callable[[], object]] | _Run | None]
        self._unsaved = queue.Queue(UNSAVED)
        self._fed: set[_Track] = set()  # tracks that get more frames
        self._batches: dict[str, list[tuple[_Track, Tensor]]]
        self._batches = {name: [] for name in self._networks}
        self._jobs, self._jobs_lock = iter(jobs), threading.Lock()
        calls = [partial(self._write, save), *(partial(self._feed, d) for d in self._decoders)]
        self._threads = [threading.Thread(target=call, daemon=True) for call in calls]
        feeders, unfinished = len(self._decoders), 0
        try:
            for thread in self._threads:
                thread.start()
            while (feeders or unfinished) and not self._stop.is_set():
                item = self._next_item()
                if isinstance(item, Result):
                    unfinished -= 1
                    yield item
                elif isinstance(item, _Arrival):
                    self._take(item)
                    if progress is not None:
                        progress(item.tracks[0].run.job, item.fraction)
                elif isinstance(item, _Run):
                    unfinished += 1
                    item.fed = True
                    for track in item.tracks:
                        track.left |= not track.ended  # decoding failed
                    self._fed.difference_update(item.tracks)
                    self._settle(item)
                elif item is None:
                    feeders -= 1
                else:
                    raise item
        finally:
            self._end()

    def _end(self) -> None:
        """End the threads; a feeder may wait for its decoder."""
        self._stop.set()
        if self._threads:
            with suppress(queue.Full):
                self._unsaved.put_nowait(None)
        deadline = time.monotonic() + END_SECONDS
        while alive := [thread for thread in self._threads if thread.is_alive()]:
            alive[-1].join(POLL_SECONDS)
            if alive[-1].is_alive():
                for decoder in self._decoders:
                    decoder.close()
            if time.monotonic() > deadline:
                break
        self._threads = []

    def _next_item(self) -> _Arrival | _Run | Result | BaseException | None:
        """What comes next, after running incomplete batches that are waited for in vain."""
        idle = self._inbox.empty()
        for name, batch in self._batches.items():
            fed = any(track.network is self._networks[name] for track in self._fed)
            if batch and (not fed or (idle and any(track.ended for track, _ in batch))):
                self._flush(name)
        return self._inbox.get()

    # The feeders' threads

    def _feed(self, decoder: Decoder) -> None:
        """Decode one job after another."""
        stop, inbox, jobs, lock = self._stop, self._inbox, self._jobs, self._jobs_lock
        try:
            while True:
                with lock:
                    job = None if stop.is_set() else next(jobs, None)
                if job is None or stop.is_set():
                    break
                run = _Run(job)
                try:
                    with fetched(job.path) as path:
                        self._decode(run, path, decoder)
                except Exception as error:
                    run.fail(error)
                inbox.put(run)
        except BaseException as error:  # the caller's thread raises it
            inbox.put(error)
        finally:
            if stop.is_set():
                decoder.close()
            inbox.put(None)

    def _decode(self, run: _Run, path: Path, decoder: Decoder) -> None:
        """Hand over every frame of a video. Networks that see the same frames share a pass."""
        job = run.job
        source = job.source
        if source is None:
            source = {}
            with suppress(OSError):  # the decoder says what is wrong
                source = fast_digest(path) if path.is_file() else {}
        passes: dict[tuple[Any, ...], list[SnippetNetwork]] = {}
        for network in (self._networks[modality] for modality in job.modalities):
            key = network.spec.fps, network.spec.fps_policy, network.spec.longer_side
            passes.setdefault(key, []).append(network)
        for index, ((fps, policy, longer_side), networks) in enumerate(passes.items()):
            stream = decoder.frames(
                path, fps=fps, fps_policy=policy, longer_side=longer_side, copy=False
            )
            info, before = stream.info, run.seconds["decode"]
            run.video_seconds = info.duration_seconds
            if min(info.width, info.height) < MINIMUM_SIDE_PIXELS:
                raise VideoError(
                    path,
                    f"{path} is {info.width}×{info.height} pixels; videos need at least "
                    f"{MINIMUM_SIDE_PIXELS} pixels on each side.",
                )
            tracks = [_Track(run, network, stream, source) for network in networks]
            run.tracks += tracks
            repeats = Repeats() if any(n.needs_repeats for n in networks) else None
            arrival = _Arrival(tracks, 0.0)
            arrival.taken.set()
            for chunk in stream:
                run.seconds["decode"] = before + stream.seconds
                repeats_N = repeats.find(chunk.frames_NHWC) if repeats else ()
                frames_NHWC = self._device.upload(chunk.frames_NHWC)
                if self._device.copies:
                    self._wait(arrival)
                done = min(float(chunk.times_N[-1]) / info.duration_seconds, 1.0)
                fraction = (index + done) / len(passes)
                arrival = _Arrival(tracks, fraction, frames_NHWC, repeats_N)
                self._inbox.put(arrival)
                if not self._device.copies:  # the frames are still in the decoder's slot
                    self._wait(arrival)
                if all(track.left for track in tracks):
                    stream.close()
                    break
            self._wait(arrival)
            self._inbox.put(_Arrival(tracks, (index + 1) / len(passes)))

    def _wait(self, arrival: _Arrival) -> None:
        """Until frames have been used."""
        while not arrival.taken.wait(POLL_SECONDS):
            if self._stop.is_set():
                raise MmdistError("The run has ended.")
        arrival.wait()

    # The networks' thread

    def _take(self, arrival: _Arrival) -> None:
        """Run frames, or the end of a video, through preprocessing and into windows."""
        for track in arrival.tracks:
            if track.left:
                continue
            if arrival.frames_NHWC is not None:
                self._fed.add(track)
                with track.attempt():
                    self._cut(track, track.inputs.push(arrival.frames_NHWC, arrival.repeats_N))
            else:
                with track.attempt():
                    self._cut(track, track.inputs.finish())
                    for part in track.cutter.finish():
                        self._submit(track, part)
                track.ended = True
                if isinstance(track.inputs, FlowFrames):
                    track.run.seconds["flow"] += track.inputs.seconds
                    track.run.seconds["prepare"] -= track.inputs.seconds
            if track.ended or track.left:
                self._fed.discard(track)
                self._settle(track.run)
        arrival.frames_NHWC, arrival.wait = None, self._device.mark()
        arrival.taken.set()

    def _cut(self, track: _Track, inputs: Iterator[Tensor]) -> None:
        while True:
            with track.run.clock("prepare"):
                piece_NHWC = next(inputs, None)
            if piece_NHWC is None or track.left:
                return
            for part in track.cutter.push(piece_NHWC):
                self._submit(track, part)

    def _submit(self, track: _Track, part: Tensor | Chunk) -> None:
        """Run a dense chunk, or put a window into its network's batch."""
        if isinstance(part, Chunk):
            with track.run.clock("network"):
                track.rows.append(track.network.dense_rows(part))
            return
        name = track.network.spec.modality
        track.waiting += 1
        self._batches[name].append((track, part))
        if len(self._batches[name]) == track.network.windows_per_call:
            self._flush(name)

    def _flush(self, name: str) -> None:
        """Run a batch. If it fails, each video's windows on their own."""
        batch = [pair for pair in self._batches[name] if not pair[0].left]
        self._batches[name].clear()
        tracks = list(dict.fromkeys(track for track, _ in batch))
        try:
            if batch:
                self._run_batch(batch)
        except Exception:
            for track in tracks:
                with track.attempt():
                    if len(tracks) == 1:
                        raise
                    self._run_batch([pair for pair in batch if pair[0] is track])
        for track in tracks:
            track.waiting -= sum(owner is track for owner, _ in batch)
            self._settle(track.run)

    def _run_batch(self, batch: Sequence[tuple[_Track, Tensor]]) -> None:
        import torch

        network, windows = batch[0][0].network, [window for _, window in batch]
        if self._device.copies:  # to one shape, which is compiled once
            windows += windows[-1:] * (network.windows_per_call - len(windows))
        begin = time.perf_counter()
        rows_BD = network.rows(torch.stack(windows))
        seconds = (time.perf_counter() - begin) / len(batch)
        for index, (track, _) in enumerate(batch):
            track.rows.append(rows_BD[index : index + 1])
            track.run.seconds["network"] += seconds

    def _settle(self, run: _Run) -> None:
        """Give complete tracks to the writer, then the complete run."""
        for track in run.tracks:
            if track.ended and not track.waiting and not track.left:
                with track.attempt():
                    import torch

                    rows_SD = torch.cat(track.rows)
                    self._unsaved.put((track, rows_SD, self._device.mark()))
                    track.left = True
                    track.rows.clear()
        if run.fed and all(track.left for track in run.tracks):
            self._unsaved.put(run)
            run.fed = False

    # The writer's thread

    def _write(self, save: Callable[[Job, Features], None] | None) -> None:
        inbox = self._inbox
        try:
            while (item := self._unsaved.get()) is not None and not self._stop.is_set():
                if isinstance(item, _Run):
                    inbox.put(item.result())
                else:
                    self._finish(*item, save)
        except BaseException as error:  # the caller's thread raises it
            inbox.put(error)

    def _finish(
        self,
        track: _Track,
        rows_SD: Tensor,
        wait: Callable[[], object],
        save: Callable[[Job, Features], None] | None,
    ) -> None:
        run = track.run
        with run.clock("write"), track.attempt():
            wait()
            features = track.features(self._device.download(rows_SD))
            try:
                if save is not None:
                    save(run.job, features)
                run.features[features.modality] = features
            except Exception as error:
                run.fail(error)
