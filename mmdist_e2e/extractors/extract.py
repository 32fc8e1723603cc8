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

from mmdist_e2e.extractors.flow.fields import Repeats
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
    Raises what `Result.failures` names first.
    """
    by_modality = {network.spec.modality: network for network in networks}
    assert len(by_modality) == len(networks) > 0

    def advanced(_: Job, fraction: float) -> None:
        if progress is not None:
            progress(fraction)

    job = Job(path, path, list(by_modality), source)
    conveyor = Conveyor(by_modality, decoders=1 if decoder is None else [decoder])
    try:
        (result,) = conveyor.run([job], progress=advanced)
    finally:
        if decoder is None:
            conveyor.close()
    if result.failures:
        raise result.failures[0]
    return dict(result.features)


class _Run:
    """One job on its way. fed: its feeder has finished with it, and the writer has not yet got it.

    A failure, whatever the cause, ends one track, or with the decoding all that have not ended.
    """

    def __init__(self, job: Job) -> None:
        self.job, self.fed = job, False
        self.tracks: list[_Track] = []
        self.features: dict[str, Features] = {}
        self.failures: list[Exception] = []
        self.seconds = dict.fromkeys(("decode", "prepare", "flow", "network", "write"), 0.0)

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
        streams, seconds = {track.stream for track in self.tracks}, self.seconds
        seconds["decode"] = sum(stream.seconds for stream in streams)
        seconds["flow"] = sum(track.inputs.seconds for track in self.tracks)
        seconds["prepare"] -= seconds["flow"]
        features = {m: self.features[m] for m in self.job.modalities if m in self.features}
        length = max((stream.info.duration_seconds for stream in streams), default=0.0)
        return Result(self.job, features, self.failures, seconds, length)


class _Track:
    """One network's run over one video.

    ended: it has had all of its frames. left: it has failed, or gone to the writer.
    """

    def __init__(
        self, run: _Run, network: SnippetNetwork, stream: FrameStream, source: Mapping[str, Any]
    ) -> None:
        self.run, self.network, self.stream, self.source = run, network, stream, source
        self.inputs, spec = network.input_stream(), network.spec
        self.cutter: Windows | DenseChunks = Windows(window=spec.window, stride=spec.stride)
        if spec.mode == "dense":
            fields = stream.sample_count - self.inputs.still
            self.cutter = DenseChunks(frames=fields if spec.tail == "none" else 0)
        self.rows: list[Tensor] = []
        self.ended = self.left = False

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

    def parts(self, frames_NHWC: Tensor | None, repeats_N: Sequence[bool]) -> Iterator[Any]:
        """The windows [T, ...] or chunks that more frames complete; None: no more will come."""
        if frames_NHWC is None:
            pieces = self.inputs.finish()
        else:
            pieces = self.inputs.push(frames_NHWC, repeats_N)
        while True:
            with self.run.clock("prepare"):
                piece_NHWC = next(pieces, None)
            if piece_NHWC is None:
                break
            yield from self.cutter.push(piece_NHWC)
        if frames_NHWC is None:
            yield from self.cutter.finish()

    def result(self, rows_SD: NDArray[np.float32]) -> Features:
        spec, stream = self.network.spec, self.stream
        info = {
            **self.network.info,
            "decoder": stream.info.decoder,
            "effective_fps": stream.fps,
            "trained_on": spec.trained_on,
        }
        seconds = stream.info.duration_seconds
        provenance = Provenance(spec.matters, info, self.source)
        data_SD = rows_SD if spec.pca is None else spec.pca.apply(rows_SD)
        times_S2 = provenance.row_times(len(data_SD), seconds)
        return Features(data_SD, times_S2, seconds, spec.modality, provenance)


@dataclass
class _Arrival:
    """Frames for the tracks of a pass, on the device; None after the last ones.

    taken: set when the networks' thread has done its part; then `wait` waits for the device's.
    """

    tracks: Sequence[_Track]
    fraction: float
    frames_NHWC: Tensor | None = None
    repeats_N: Sequence[bool] = ()
    taken: threading.Event = field(default_factory=threading.Event)
    wait: Callable[[], object] = lambda: None


class Conveyor:
    """Several videos at once through networks on one device. Use as a context manager.

    networks: by modality. decoders: how many videos are decoded at once, or the decoders to use.
    stall_seconds: of `Decoder`.
    """

    def __init__(
        self,
        networks: Mapping[str, SnippetNetwork],
        *,
        decoders: int | Sequence[Decoder] = 2,
        stall_seconds: float = 60.0,
    ) -> None:
        (device,) = {network.device for network in networks.values()}
        self.networks, self.device = networks, Device(device)
        self._new = partial(Decoder, stall_seconds=stall_seconds, pin=self.device.pin)
        self.idle = [] if isinstance(decoders, int) else [*decoders]
        self._count = decoders if isinstance(decoders, int) else len(decoders)
        self._line: _Line | None = None

    def __enter__(self) -> Conveyor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the run, dropping what is unfinished, and close the decoders. May be used again."""
        if self._line is not None:
            self._line.end()
            self._line = None
        for decoder in self.idle:
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
        run within seconds; a thread that is still in `jobs` or `save` then is left behind, and
        what it brings is dropped. Another run ends this one.
        """
        if self._line is not None:
            self._line.end()
        decoders = [self.idle.pop() if self.idle else self._new() for _ in range(self._count)]
        self._line = line = _Line(self, decoders, jobs, save)
        try:
            yield from line.results(progress)
        finally:
            line.end()


class _Line:
    """One run of a conveyor: its threads, and what passes between them.

    Another run shares nothing of it, as a thread may be left behind: idle decoders come back to
    the conveyor from the threads that used them.
    """

    def __init__(
        self,
        conveyor: Conveyor,
        decoders: Sequence[Decoder],
        jobs: Iterable[Job],
        save: Callable[[Job, Features], None] | None,
    ) -> None:
        self.networks, self.device = conveyor.networks, conveyor.device
        self.jobs, self.jobs_lock, self.save = iter(jobs), threading.Lock(), save
        self.stop = threading.Event()
        # From the feeders: arrivals, runs that were fed whole, what `jobs` raised, and None when
        # a feeder has ended. From the writer: results.
        self.inbox: queue.SimpleQueue[_Arrival | _Run | Result | BaseException | None]
        self.inbox = queue.SimpleQueue()
        self.unsaved: queue.SimpleQueue[tuple[_Track, Tensor, Callable[[], object]] | _Run | None]
        self.unsaved = queue.SimpleQueue()
        self.fed: set[_Track] = set()  # tracks that get more frames
        self.batches: dict[str, dict[_Track, list[Tensor]]] = {name: {} for name in self.networks}
        self.decoders, self.idle = decoders, conveyor.idle
        calls = [(self._feed, (decoder,)) for decoder in decoders] + [(self._write, ())]
        self.threads = [threading.Thread(target=t, args=a, daemon=True) for t, a in calls]

    def results(self, progress: Callable[[Job, float], None] | None) -> Iterator[Result]:
        for thread in self.threads:
            thread.start()
        feeders, unfinished = len(self.decoders), 0
        while (feeders or unfinished) and not self.stop.is_set():
            self._flush_waiting()
            item = self.inbox.get()
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
                self.fed.difference_update(item.tracks)
                self._settle(item)
            elif item is None:
                feeders -= 1
            else:
                raise item

    def end(self) -> None:
        """End the threads, in any thread and state; a feeder may wait for its decoder."""
        self.stop.set()
        self.inbox.put(None)
        self.unsaved.put(None)
        (threads, self.threads), deadline = (self.threads, []), time.monotonic() + END_SECONDS
        here, writer = threading.current_thread(), threads[-1:]
        while alive := [t for t in threads if t.is_alive() and t is not here]:
            alive[0].join(POLL_SECONDS)
            if alive[0].is_alive() and alive[:1] != writer:
                for decoder in self.decoders:
                    decoder.close()
            if time.monotonic() > deadline:
                break

    # The feeders' threads

    def _feed(self, decoder: Decoder) -> None:
        """Decode one job after another."""
        try:
            while (job := self._next_job()) is not None:
                run = _Run(job)
                try:
                    with fetched(job.path) as path:
                        self._decode(run, path, decoder)
                except Exception as error:
                    run.fail(error)
                self.inbox.put(run)
        except BaseException as error:  # the caller's thread raises it
            self.inbox.put(error)
        finally:
            if self.stop.is_set():
                decoder.close()
            self.idle.append(decoder)
            self.inbox.put(None)

    def _next_job(self) -> Job | None:
        while self.unsaved.qsize() > UNSAVED and not self.stop.is_set():
            time.sleep(POLL_SECONDS)
        with self.jobs_lock:
            job = None if self.stop.is_set() else next(self.jobs, None)
        return None if self.stop.is_set() else job

    def _decode(self, run: _Run, path: Path, decoder: Decoder) -> None:
        """Hand over every frame of a video. Networks that see the same frames share a pass."""
        job = run.job
        source = job.source
        if source is None:
            source = {}
            with suppress(OSError):  # the decoder says what is wrong
                source = fast_digest(path) if path.is_file() else {}
        passes: dict[tuple[Any, ...], list[SnippetNetwork]] = {}
        for network in (self.networks[modality] for modality in job.modalities):
            key = network.spec.fps, network.spec.fps_policy, network.spec.longer_side
            passes.setdefault(key, []).append(network)
        for index, ((fps, policy, longer_side), networks) in enumerate(passes.items()):
            stream = decoder.frames(
                path, fps=fps, fps_policy=policy, longer_side=longer_side, copy=False
            )
            tracks = [_Track(run, network, stream, source) for network in networks]
            run.tracks += tracks
            info = stream.info
            if min(info.width, info.height) < MINIMUM_SIDE_PIXELS:
                raise VideoError(
                    path,
                    f"{path} is {info.width}×{info.height} pixels; videos need at least "
                    f"{MINIMUM_SIDE_PIXELS} pixels on each side.",
                )
            repeats = Repeats() if any(n.needs_repeats for n in networks) else None
            before = None
            for chunk in stream:
                repeats_N = repeats.find(chunk.frames_NHWC) if repeats else ()
                frames_NHWC = self.device.upload(chunk.frames_NHWC)
                done = min(float(chunk.times_N[-1]) / info.duration_seconds, 1.0)
                fraction = (index + done) / len(passes)
                arrival = _Arrival(tracks, fraction, frames_NHWC, repeats_N)
                if self.device.copies:
                    self._wait(before)
                self.inbox.put(arrival)
                if not self.device.copies:  # the frames are still in the decoder's slot
                    self._wait(arrival)
                if all(track.left for track in tracks):
                    stream.close()
                    break
                before = arrival
            self._wait(before)
            self.inbox.put(_Arrival(tracks, (index + 1) / len(passes)))

    def _wait(self, arrival: _Arrival | None) -> None:
        """Until frames have been used."""
        while arrival is not None and not arrival.taken.wait(POLL_SECONDS):
            if self.stop.is_set():
                raise MmdistError("The run has ended.")
        if arrival is not None:
            arrival.wait()

    # The networks' thread

    def _take(self, arrival: _Arrival) -> None:
        """Run frames, or the end of a video, through preprocessing and into windows."""
        for track in arrival.tracks:
            if track.left:
                continue
            self.fed.add(track)
            with track.attempt():
                for part in track.parts(arrival.frames_NHWC, arrival.repeats_N):
                    self._submit(track, part)
                    if track.left:  # a batch has failed
                        break
            track.ended = arrival.frames_NHWC is None
            if track.ended or track.left:
                self.fed.discard(track)
                self._settle(track.run)
        arrival.frames_NHWC, arrival.wait = None, self.device.mark()
        arrival.taken.set()

    def _submit(self, track: _Track, part: Tensor | Chunk) -> None:
        """Run a dense chunk, or put a window into its network's batch."""
        network = track.network
        if isinstance(part, Chunk):
            with track.run.clock("network"):
                track.rows.append(network.dense_rows(part))
            return
        batch = self.batches[network.spec.modality]
        batch.setdefault(track, []).append(part)
        if sum(map(len, batch.values())) == network.windows_per_call:
            self._flush(network.spec.modality)

    def _flush_waiting(self) -> None:
        """Run the incomplete batches that nothing will fill soon."""
        idle = self.inbox.empty()
        for name, batch in self.batches.items():
            fed = any(track.network is self.networks[name] for track in self.fed)
            if batch and (not fed or (idle and any(track.ended for track in batch))):
                self._flush(name)

    def _flush(self, name: str) -> None:
        """Run a batch. If it fails, each video's windows on their own."""
        batch = {track: part for track, part in self.batches[name].items() if not track.left}
        self.batches[name].clear()
        try:
            self._run_batch(batch)
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # its memory is needed again
            for track, windows in batch.items():
                with track.attempt():
                    if len(batch) == 1:
                        raise
                    self._run_batch({track: windows})
        for track in batch:
            self._settle(track.run)

    def _run_batch(self, batch: Mapping[_Track, Sequence[Tensor]]) -> None:
        import torch

        windows = [window for part in batch.values() for window in part]
        if not windows:
            return
        network, count = next(iter(batch)).network, len(windows)
        if self.device.copies:  # to one shape, which is compiled once
            windows += windows[-1:] * (network.windows_per_call - count)
        begin = time.perf_counter()
        rows_BD = network.rows(torch.stack(windows))
        seconds = (time.perf_counter() - begin) / count
        first = 0
        for track, part in batch.items():
            track.rows.append(rows_BD[first : first + len(part)])
            track.run.seconds["network"] += seconds * len(part)
            first += len(part)

    def _settle(self, run: _Run) -> None:
        """Give complete tracks to the writer, then the complete run."""
        import torch

        for track in run.tracks:
            waiting = track in self.batches[track.network.spec.modality]
            if track.ended and not waiting and not track.left:
                with track.attempt():
                    self.unsaved.put((track, torch.cat(track.rows), self.device.mark()))
                    track.left = True
                    track.rows.clear()
        if run.fed and all(track.left for track in run.tracks):
            self.unsaved.put(run)
            run.fed = False

    # The writer's thread

    def _write(self) -> None:
        try:
            while (item := self.unsaved.get()) is not None and not self.stop.is_set():
                if isinstance(item, _Run):
                    self.inbox.put(item.result())
                    continue
                track, rows_SD, wait = item
                with track.run.clock("write"), track.attempt():
                    wait()
                    self._save(track.run, track.result(self.device.download(rows_SD)))
        except BaseException as error:  # the caller's thread raises it
            self.inbox.put(error)

    def _save(self, run: _Run, features: Features) -> None:
        try:
            if self.save is not None:
                self.save(run.job, features)
            run.features[features.modality] = features
        except Exception as error:
            run.fail(error)
