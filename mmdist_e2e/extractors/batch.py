"""Many videos on one machine: devices, workers, retries, and every failure with its cause.

The engine's process never imports torch unless it works without worker processes.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import os
import pickle
import queue
import re
import secrets
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from mmdist_e2e.extractors.extract import Conveyor, Job
from mmdist_e2e.extractors.journal import Failure, Journal
from mmdist_e2e.extractors.profiles import ExtractorSpec
from mmdist_e2e.extractors.remote import absolute, source_of
from mmdist_e2e.extractors.search import Outcome, Status, Video, printable
from mmdist_e2e.extractors.video.reader import Child
from mmdist_e2e.extractors.worker import blame, facts, load_networks, saver
from mmdist_e2e.store import FeatureStore, digest_of
from mmdist_e2e.structures import MmdistError

LOOKING = 8  # threads that look which videos are up to date
TICK_SECONDS = 0.5
POLL_SECONDS = 1.0  # between looks whether another run has finished a video
STUCK_DEADLINES, STUCK_SECONDS = 10, 600.0  # a worker that is silent for both is stuck
DEATHS = 2  # of workers over one video, then it is given up
# Deaths of workers in a row, then the run ends: of workers that had no video, and of those that
# had one for the first time.
IDLE_DEATHS, DEATHS_IN_A_ROW = 3, 20
UNWRITABLE = 5  # videos in a row that could not be written, then the run ends
END_SECONDS = 6.0  # a worker may finish a save; then it is killed
ENVIRONMENT = {  # of workers, for glibc and libgomp; what the user has set stays
    # Threads that spin while they wait take the cores from the decoders.
    "OMP_WAIT_POLICY": "PASSIVE",
    # Else every large activation is given back and faulted in again: 15 % of dense I3D's time.
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "MALLOC_TOP_PAD_": str(2**26),
}


@dataclass
class Report:
    """Outcomes of a run, in the order of the videos."""

    outcomes: list[Outcome] = field(default_factory=list)

    def count(self, status: str) -> int:
        return sum(outcome.status == status for outcome in self.outcomes)

    @property
    def failed(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.status == "failed"]


class BatchProgress(Protocol):
    """What a caller may show; called from any thread.

    planned: the videos that are not up to date, and their sizes in bytes. advanced: the fraction
    of a running video that is done, 0 as it starts. finished: also called for videos that are up
    to date.
    """

    def planned(self, sizes: Mapping[Video, int]) -> None: ...
    def advanced(self, video: Video, fraction: float) -> None: ...
    def finished(self, outcome: Outcome) -> None: ...


def extract_many(
    videos: Sequence[Video],
    specs: Sequence[ExtractorSpec],
    store: FeatureStore,
    *,
    progress: BatchProgress | None = None,
    **options: Any,
) -> Report:
    """Extract every modality of every video that is not up to date; see `Engine` and its `run`."""
    with Engine(specs, store, **options) as engine:
        return engine.run(videos, progress)


class Engine:
    """Extracts videos with the networks of `specs`, one per modality, into a store.

    Args:
        devices: "auto" (all GPUs, else the CPU), "all" (GPUs), "cpu", "cuda:N" or "N".
        workers: worker processes on each device, which share the cores; 0 works in this process,
            on one device.
        decoders: videos that each worker decodes at the same time. None chooses by the cores.
        overwrite: extract up-to-date videos again.
        stall_seconds: a video fails when its decoder gives nothing for so long.
        options: precision and flow_backend of `SnippetNetwork`.

    Networks are loaded and workers started only when they are needed; they are kept from one run
    to the next. Use as a context manager.
    Raises MmdistError for an unknown device.
    """

    def __init__(
        self,
        specs: Sequence[ExtractorSpec],
        store: FeatureStore,
        *,
        devices: Sequence[str] = ("auto",),
        workers: int = 0,
        decoders: int | None = None,
        overwrite: bool = False,
        stall_seconds: float = 60.0,
        **options: str,
    ) -> None:
        self.specs, self.store, self.overwrite = specs, store, overwrite
        self.journal = Journal(store.root)
        self._devices = [device_named(name) for name in devices]
        self._per_device, self._options = workers, options
        self._conveying: dict[str, Any] = {"stall_seconds": stall_seconds}
        if decoders is not None:
            self._conveying["decoders"] = decoders
        self._stuck_seconds = max(STUCK_DEADLINES * stall_seconds, STUCK_SECONDS)
        self._conveyor: Conveyor | None = None
        self._modalities: set[str] = set()  # whose networks are loaded
        self._workers: dict[int, _Worker] = {}
        self._slots: list[str] = []  # the device of each worker
        self._events: queue.Queue[tuple[_Worker, dict[str, Any] | None]] = queue.Queue()
        self._deaths = self._idle_deaths = 0  # of workers in a row
        if workers == 0 and len(self._devices) > 1:
            raise MmdistError(
                f"Without worker processes one device is used, not {len(self._devices)}; ask for "
                f"at least one worker."
            )

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers, within seconds, and give the networks' memory back."""
        for worker in self._workers.values():
            worker.child.hang_up()
        deadline = time.monotonic() + END_SECONDS
        for worker in self._workers.values():
            worker.child.end(max(0.0, deadline - time.monotonic()))
        self._workers.clear()
        if self._conveyor is not None:
            self._conveyor.close()
            self._conveyor = None
        self._modalities.clear()
        self._deaths = self._idle_deaths = 0
        self.journal.close()

    def run(self, videos: Sequence[Video], progress: BatchProgress | None = None) -> Report:
        """Extract what is not up to date in one pass per video, the largest files first.

        videos: with different ids.

        Stored features are kept when they were made in the same way from the same file. Whatever
        goes wrong in one video (damage, too little memory, a crash) fails that video with its
        cause, and the run continues; modalities that were finished are saved. A worker that dies is
        replaced; the videos that it had are tried once more, each alone. A video that another run
        is extracting is left to it, and done here only if that run dies.

        Raises MmdistError when every video would fail: a network cannot be loaded, a device does
        not exist, workers cannot start or all die, nothing can be written any more.
        """
        run = _Run(self, videos, progress)
        try:
            if run.left:
                self._load(run)
            if run.left and self._per_device:
                self._run_workers(run)
            elif run.left:
                self._run_here(run)
        except BaseException:
            self.close()
            raise
        finally:
            run.release()
            self.journal.close()
        return run.report()

    def _load(self, run: _Run) -> None:
        """Make sure that the networks of a run are those that are loaded."""
        if run.modalities <= self._modalities:
            return
        self.close()
        self._modalities = {*run.modalities}
        if self._per_device:
            devices = resolve_devices(self._devices)
            self._slots = [device for device in devices for _ in range(self._per_device)]
        else:
            device = self._devices[0].replace("all", "auto")
            networks = load_networks(self._needed(), {**self._options, "device": device})
            self._conveyor = Conveyor(networks, **self._conveying)

    def _needed(self) -> list[ExtractorSpec]:
        return [spec for spec in self.specs if spec.modality in self._modalities]

    def _run_here(self, run: _Run) -> None:
        assert self._conveyor is not None

        def progress(job: Job, fraction: float) -> None:
            run.advanced(job.key, fraction)

        while run.left:
            for result in self._conveyor.run(run.jobs(), save=saver(self.store), progress=progress):
                run.finish(run.tasks[result.job.key], **facts(result))
            if run.left:
                time.sleep(POLL_SECONDS)
                run.look_again()

    def _run_workers(self, run: _Run) -> None:
        looked = ticked = time.monotonic()
        while run.left:
            for number, device in enumerate(self._slots[: run.left]):
                if number not in self._workers:
                    self._workers[number] = self._start(number, device)
            with contextlib.suppress(queue.Empty):
                worker, message = self._events.get(timeout=TICK_SECONDS)
                if worker is self._workers.get(worker.number):
                    self._hear(run, worker, message)
            now = time.monotonic()
            # Counted in ticks: time in which this process was stopped is nobody's silence.
            passed, ticked = min(now - ticked, TICK_SECONDS), now
            for worker in [*self._workers.values()]:
                if (problem := worker.stuck(passed, self._stuck_seconds)) is not None:
                    self._bury(run, worker, problem)
            if now - looked > POLL_SECONDS:
                run.look_again()
                looked = now
            for worker in self._workers.values():
                if worker.asking:
                    self._give(run, worker)

    def _start(self, number: int, device: str) -> _Worker:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        cores, count = cores or 1, len(self._slots)
        environment = {name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()}
        if count > 1:  # one worker may do as it likes
            given = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
            threads = max(1, min(cores // count, int(given) if given.isdigit() else cores))
            limits = ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS")
            environment |= dict.fromkeys(limits, str(threads))
        conveying = dict(self._conveying)
        if device != "cpu":
            conveying.setdefault("decoders", min(8, max(2, cores // count - 1)))
        options = {**self._options, "device": device}
        what = pickle.dumps((self._needed(), options, self.store, conveying))
        try:
            return _Worker(number, what, environment, self._events)
        except OSError as error:
            raise MmdistError(
                f"A worker process cannot be started ({error.strerror}); free some memory, or "
                f"extract in one process with --workers 0."
            ) from error

    def _hear(self, run: _Run, worker: _Worker, message: dict[str, Any] | None) -> None:
        if message is None:
            self._bury(run, worker)
            return
        worker.heard()
        match message.pop("say"):
            case "next":
                worker.asking = True
            case "at" if message["key"] in worker.tasks:
                run.advanced(**message)
            case "done":
                self._deaths = self._idle_deaths = 0
                run.finish(worker.tasks.pop(message.pop("key")), worker=worker.number, **message)
            case "warning":
                warnings.warn(message["text"], stacklevel=2)
            case "refused":
                raise MmdistError(message["error"])

    def _give(self, run: _Run, worker: _Worker) -> None:
        """Answer a worker's request, if there is a video for it; else it waits."""
        if worker.alone and worker.tasks:
            return
        task = run.take()
        worker.alone = task is None and not worker.tasks and bool(run.suspects)
        if worker.alone:
            task = run.suspects.popleft()
            run.advanced(task.video.id, 0.0)
        if task is not None:
            worker.give(task)

    def _bury(self, run: _Run, worker: _Worker, problem: str | None = None) -> None:
        """Sort out the videos of a worker that died or must be killed."""
        died = worker.child.end()
        how = problem or died
        del self._workers[worker.number]
        # Second tries do not count: a run may well end with many videos that kill workers.
        self._deaths += any(task.deaths == 0 for task in worker.tasks.values())
        self._idle_deaths = 0 if worker.tasks else self._idle_deaths + 1
        if self._deaths == DEATHS_IN_A_ROW or self._idle_deaths == IDLE_DEATHS:
            raise MmdistError(
                f"The run stops, since {self._idle_deaths or self._deaths} worker processes in a "
                f"row ended before they finished a video (the last one: {how}); free some memory, "
                f"or extract in one process with --workers 0."
            )
        # SIGKILL comes from outside; it accuses a video only if the worker had no other.
        accused = len(worker.tasks) == 1 or "SIGKILL" not in how
        for task in worker.tasks.values():
            run.lost(task, how, worker.number, accused=accused)


@dataclass(eq=False)
class _Task:
    """A video to extract. known: the record of its failure when this run began."""

    video: Video
    modalities: list[str]
    source: Mapping[str, Any] = field(default_factory=dict)
    what: str = ""
    known: Failure | None = None
    deaths: int = 0
    accused: int = 0  # of how many of them
    claim: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)


class _Run:
    """The state of one run: what is left, who has it, and what came of the rest.

    tasks: by the video's id. suspects: whose worker died. Without workers, `take` and `advanced`
    are called from the conveyor's threads, one at a time.
    """

    def __init__(
        self, engine: Engine, videos: Sequence[Video], progress: BatchProgress | None
    ) -> None:
        self._store, self._overwrite = engine.store, engine.overwrite
        self._journal, self._progress = engine.journal, progress
        self._name = secrets.token_hex(6)
        self._matters = {spec.modality: spec.matters for spec in engine.specs}
        self._videos, self._outcomes = videos, dict[Hashable, Outcome]()
        self._counting, self._unwritable = threading.Lock(), 0
        self.tasks: dict[Hashable, _Task] = {}
        self.suspects: collections.deque[_Task] = collections.deque()
        self._held: list[_Task] = []  # by other runs
        self.left = 0
        pool = ThreadPoolExecutor(LOOKING)
        try:
            for task, outcome in pool.map(self._look, videos):
                if outcome is None:
                    self.tasks[task.video.id] = task
                else:
                    self._settle(task, outcome)
        finally:
            pool.shutdown(cancel_futures=True)
        longest = sorted(self.tasks.values(), key=lambda task: -task.source["bytes"])
        if progress is not None:
            progress.planned({task.video: task.source["bytes"] for task in longest})
        self.left = len(longest)
        self._queue = collections.deque(longest)
        self.modalities = {m for task in longest for m in task.modalities}

    def report(self) -> Report:
        return Report([self._outcomes[video.id] for video in self._videos])

    def _look(self, video: Video) -> tuple[_Task, Outcome | None]:
        """What is to be done for a video, and the outcome if that is nothing."""
        task = _Task(video, [*self._matters], known=self._journal.failure_of(video.id))
        outcome = None
        try:
            task.source = source_of(video.path)
            if not self._overwrite:
                task.modalities = self._stale(task)
            if not task.modalities:
                outcome = Outcome(video, "skipped")
        except Exception as error:
            cause = blame(video.path, error)
            outcome = Outcome(video, "failed", {}, cause, type(error).__name__)
        task.what = digest_of([video.id, task.source, self._matters])[:16]
        return task, outcome

    def _stale(self, task: _Task) -> list[str]:
        up_to_date = self._store.up_to_date
        return [
            modality
            for modality in task.modalities
            if not up_to_date(
                task.video.id, modality, matters=self._matters[modality], source=task.source
            )
        ]

    def jobs(self) -> Iterator[Job]:
        """Jobs until there are none that can be done now."""
        while (task := self.take()) is not None:
            yield Job(task.video.id, task.video.path, task.modalities, task.source)

    def take(self) -> _Task | None:
        """The next video, claimed. None if there is none now."""
        while self._queue:
            task = self._queue.popleft()
            claim = self._journal.claim(task.video.id)
            if claim is None:
                self._held.append(task)
                continue
            task.claim = claim
            if (outcome := self._by_another_run(task)) is not None:
                self._settle(task, outcome)
            else:
                self.advanced(task.video.id, 0.0)
                return task
        return None

    def look_again(self) -> None:
        """Try again the videos that another run had."""
        self._queue.extend(self._held)
        self._held.clear()

    def _by_another_run(self, task: _Task) -> Outcome | None:
        """What another run has done with a video since this run began."""
        if not self._overwrite:
            task.modalities = self._stale(task)
            if not task.modalities:
                return Outcome(task.video, "skipped", {}, "by another run")
        failed = self._journal.failure_of(task.video.id)
        if failed is not None and failed != task.known and failed.what == task.what:
            return Outcome(task.video, "failed", {}, failed.cause, failed.error)
        return None

    def advanced(self, key: Hashable, fraction: float) -> None:
        if self._progress is not None:
            self._progress.advanced(self.tasks[key].video, fraction)

    def lost(self, task: _Task, how: str, worker: int, *, accused: bool) -> None:
        """A worker process died over a video, which is tried again, alone, or given up."""
        task.deaths += 1
        task.accused += accused
        if not self._overwrite:  # what it has saved stays
            task.modalities = self._stale(task) or task.modalities
        if task.accused < DEATHS:
            self.suspects.append(task)
            return
        cause = (
            f"{task.video.path} was given up: {task.deaths} worker processes died over it ({how}). "
            f"The file may be damaged, or memory too small."
        )
        told: dict[str, Any] = {"cause": printable(cause), "error": "WorkerDied", "worker": worker}
        self._settle(task, Outcome(task.video, "failed", attempts=task.deaths, **told))

    def finish(self, task: _Task, *, cause: str, unwritable: bool, **told: Any) -> None:
        """Note what came of a video. Raises MmdistError when nothing can be written any more."""
        status: Status = "failed" if cause else "done"
        told["attempts"] = task.deaths + 1
        self._settle(task, Outcome(task.video, status, cause=cause, **told))
        if unwritable or not cause:
            self._unwritable = self._unwritable + 1 if unwritable else 0
        if self._unwritable == UNWRITABLE:
            raise MmdistError(
                f"The run stops, since {UNWRITABLE} videos in a row could not be written. The last "
                f"one: {cause}"
            )

    def _settle(self, task: _Task, outcome: Outcome) -> None:
        if outcome.status == "failed":
            lacking = [m for m in task.modalities if m not in outcome.rows]
            path = str(absolute(task.video.path))
            note = (task.video.id, path, lacking, task.what, outcome.error, outcome.cause)
            self._journal.note(Failure(*note, outcome.attempts, self._name))
        else:
            self._journal.forget(task.video.id, self._matters)
        with self._counting:
            self._outcomes[task.video.id] = outcome
            self.left -= task.video.id in self.tasks
        task.claim.close()
        if self._progress is not None:
            self._progress.finished(outcome)

    def release(self) -> None:
        """Give up the claims of what is not finished."""
        for task in self.tasks.values():
            task.claim.close()


class _Worker:
    """The engine's side of a worker process.

    tasks: the videos that it has, by key. asking: whether it wants one. alone: whether it may have
    no other beside the one that it has.
    """

    def __init__(
        self,
        number: int,
        what: bytes,
        environment: Mapping[str, str],
        events: queue.Queue[tuple[_Worker, dict[str, Any] | None]],
    ) -> None:
        self.number, self.tasks = number, dict[Hashable, _Task]()
        self.asking = self.alone = False
        self._ready, self._silent = False, 0.0
        # In a session of its own, so that a terminal's Ctrl-C is the engine's alone.
        self.child = Child(
            "mmdist_e2e.extractors.worker",
            environment,
            hear=lambda message: events.put((self, message)),
            leader=True,
        )
        self.send(pickled=base64.b64encode(what).decode())

    def send(self, **message: Any) -> None:
        self.asking = False
        with contextlib.suppress(OSError):  # it is dead, and its last message says so
            self.child.send(message)

    def give(self, task: _Task) -> None:
        self.tasks[task.video.id] = task
        path, rest = str(task.video.path), {"modalities": task.modalities, "source": task.source}
        self.send(key=task.video.id, path=path, **rest)

    def heard(self) -> None:
        self._ready, self._silent = True, 0.0

    def stuck(self, passed: float, limit: float) -> str | None:
        """Why the process must be killed, if it must; passed: seconds since the last call."""
        if self.tasks or not self._ready:
            self._silent += passed
        return f"no progress for {self._silent:.0f} seconds" if self._silent > limit else None


def device_named(name: str) -> str:
    """One of "auto", "all", "cpu" and "cuda:N" for what a person writes. Raises MmdistError."""
    match = re.fullmatch(r"(auto|all|cpu)|cuda|(?:cuda:)?(\d+)", name.strip())
    if match is None:
        raise MmdistError(f"The device {name!r} is unknown; valid: auto, all, cpu, N, cuda:N.")
    return match[1] or f"cuda:{int(match[2] or 0)}"


def resolve_devices(names: Sequence[str]) -> list[str]:
    """The devices that the names mean, each once. Raises MmdistError if "all" means none."""
    count = gpu_count() if {"auto", "all"} & {*names} else 0
    gpus = [f"cuda:{index}" for index in range(count)]
    if "all" in names and not gpus:
        raise MmdistError("There is no GPU that torch finds; use --devices cpu, or auto.")
    meant = {"auto": gpus or ["cpu"], "all": gpus}
    return list(dict.fromkeys(device for name in names for device in meant.get(name, [name])))


def gpu_count() -> int:
    """How many GPUs torch finds, asked in a process of its own where a driver is installed."""
    drivers = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # CUDA, ROCm, and WSL's for both
    if sys.platform == "linux" and not any(Path(driver).exists() for driver in drivers):
        return 0
    asked = subprocess.run(
        [sys.executable, "-P", "-c", "import torch; print(torch.cuda.device_count())"],
        capture_output=True,
        text=True,
        check=False,
    )
    return int(asked.stdout.split()[-1]) if asked.returncode == 0 else 0
