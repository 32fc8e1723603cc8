"""Ray Data instead of one machine: an `Engine` in each of several actors.

    driver    RayEngine: blocks of a few videos → Ray Data → rows that tell what finished
      └─ actor    one for each GPU, or `workers` in all without GPUs; holds an Engine
           └─ worker process, decoders …    as without Ray

Retries of videos, claims, records and files are the Engine's. Ray carries names and outcomes, never
frames. A block that is lost with its actor (or whose actor falls silent) is done again in another
round, one video a block, by which time most of it is up to date. So Ray need not retry anything.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmdist_e2e.extractors.batch import BatchProgress, Engine, Report
from mmdist_e2e.extractors.extract import cause_of
from mmdist_e2e.extractors.profiles import ExtractorSpec
from mmdist_e2e.extractors.search import Outcome, Video
from mmdist_e2e.store import FeatureStore, require
from mmdist_e2e.structures import MmdistError, check_choice

QUIET = {  # an environment for Ray; what the user has set stays
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_AUTO_CONNECT": "0",  # else a thread that outlives a session starts another one
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else it warns of a change to come
}
# Without it, Ray replaces 127.0.0.1 by an address that other machines reach, and listens on all.
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
STORE_BYTES = 100 << 20  # of Ray's shared memory on this machine; only names are in it
BLOCK_VIDEOS = 64  # at most
BLOCKS_PER_ACTOR = 8  # at least, if there are so many videos
# An actor tells every BEAT_SECONDS what it has done; a row costs the driver some 40 ms.
BEAT_SECONDS, ACTORS_PER_SECOND = 1.0, 10
SILENT_SECONDS = 60.0  # and some beats: all working actors are dead or stuck
START_SECONDS = 1800.0  # the same before the first row: a cluster may have to start machines
BARREN_ROUNDS = 2  # in a row, then the videos that are left fail


class RayEngine:
    """`Engine` on Ray: this machine, or a running cluster.

    Args:
        address: of a cluster, as `ray.init` takes it. The package is installed on its machines;
            videos, checkpoints and the store are on a file system that all of them share.
        devices: "auto" (GPUs if there are any), "all" (GPUs) or "cpu".
        workers: actors on each GPU, or in all without GPUs.
        options: the other arguments of `Engine`.

    Raises MmdistError when Ray is not installed or the devices are others.
    """

    def __init__(
        self,
        specs: Sequence[ExtractorSpec],
        store: FeatureStore,
        *,
        address: str | None = None,
        devices: Sequence[str] = ("auto",),
        workers: int = 1,
        decoders: int | None = None,
        **options: Any,
    ) -> None:
        for name in devices:
            check_choice("With --engine ray, where Ray chooses the GPUs, the device", name,
                         ("auto", "all", "cpu"))  # fmt: skip
        os.environ.update({**QUIET, **({} if address else LOOPBACK), **os.environ})
        self._ray = require("ray", "ray", "--engine ray")
        require("ray.data", "ray", "--engine ray")
        self._specs, self._store = specs, store
        self._address, self._devices, self._workers = address, {*devices}, max(1, workers)
        self._decoders, self._options = decoders, options
        self._connected = False
        self._why = ""  # the last error of Ray

    def __enter__(self) -> RayEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the actors and, on this machine, Ray."""
        if self._connected:
            self._connected = False
            self._ray.shutdown()

    def run(self, videos: Sequence[Video], progress: BatchProgress | None = None) -> Report:
        """As `Engine.run`, the largest files first. Raises MmdistError also without a cluster."""
        sizes = [_bytes_of(video.path) for video in videos]
        self._store.root.mkdir(parents=True, exist_ok=True)
        outcomes: dict[int, Outcome] = {}
        running: set[int] = set()

        def finished(index: int, **told: Any) -> None:
            outcomes[index] = Outcome(videos[index], **told)
            if progress is not None:
                progress.finished(outcomes[index])

        def advanced(index: int, fraction: float) -> None:
            if progress is not None:
                if index not in running:
                    progress.started(videos[index])
                progress.advanced(videos[index], fraction)
            running.add(index)

        if progress is not None:
            progress.planned(dict(zip(videos, sizes, strict=True)))
        rounds = barren = 0
        while len(outcomes) < len(videos) and barren < BARREN_ROUNDS:
            left = sorted({*range(len(videos))} - outcomes.keys(), key=lambda i: -sizes[i])
            before = len(outcomes)
            for row in self._round({index: videos[index] for index in left}, alone=rounds > 0):
                for text in row["warnings"]:
                    warnings.warn(text, stacklevel=2)
                for index, told in row["outcomes"]:
                    if rounds and told["status"] == "skipped":  # the round before has done it
                        told |= {"status": "done", "cause": ""}
                    if index not in outcomes:
                        finished(index, **told)
                for index, fraction in row["running"]:
                    advanced(index, fraction)
                if row["refused"]:
                    raise MmdistError(row["refused"])
            rounds, barren = rounds + 1, barren + 1 if len(outcomes) == before else 0
            if len(outcomes) < len(videos):
                self.close()  # whatever has failed, the next round finds it new
        for index in sorted({*range(len(videos))} - outcomes.keys()):
            cause = (
                f"{videos[index].path} was given up: the Ray actors that had it ended{self._why}."
            )
            finished(index, status="failed", cause=cause, error="ActorDied")
        return Report([outcomes[index] for index in range(len(videos))])

    def _round(self, videos: Mapping[int, Video], *, alone: bool) -> Iterator[dict[str, Any]]:
        """What the actors tell before they are done, dead or silent. alone: one video a block."""
        with contextlib.ExitStack() as quiet:
            quiet.enter_context(_silence())
            actors, resources = self._connect()
            size = min(BLOCK_VIDEOS, len(videos) // (actors * BLOCKS_PER_ACTOR))
            size = 1 if alone else max(1, size)
            names = [(index, video.id, str(video.path)) for index, video in videos.items()]
            blocks = [names[begin : begin + size] for begin in range(0, len(names), size)]
            beat = max(BEAT_SECONDS, actors / ACTORS_PER_SECOND)
            rows: queue.Queue[Any] = queue.Queue()
            stop = threading.Event()
            data = self._data(blocks, min(actors, len(blocks)), resources, beat)
            listener = threading.Thread(target=_listen, args=(data, rows, stop), daemon=True)
            listener.start()
            patience = START_SECONDS
            try:
                while isinstance(row := rows.get(timeout=patience), dict):
                    quiet.close()  # Ray has started
                    patience = SILENT_SECONDS + 5 * beat
                    yield row
                self._why = f" ({cause_of(row)})" if row is not None else ""
            except queue.Empty:
                self._why = f" (silent for {patience:.0f} seconds)"
            except BaseException:
                stop.set()
                listener.join(2 * beat)
                raise

    def _data(
        self,
        blocks: Sequence[Any],
        actors: int,
        resources: Mapping[str, float],
        beat: float,
    ) -> Any:
        """The dataset whose rows tell what the actors do."""
        data, context = self._ray.data, self._ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        context.execution_no_progress_timeout_s = -1  # one video may take hours; we have beats
        context.target_max_block_size = 1  # a row is delivered as soon as it is there
        context.max_errored_blocks = -1  # a lost block does not end the others
        options = {**self._options, "workers": 1, "decoders": self._decoders}
        options["devices"] = ["auto" if "num_gpus" in resources else "cpu"]
        if self._decoders is None and "num_gpus" in resources:
            options["decoders"] = min(8, max(2, int(resources["num_cpus"]) - 1))
        rows = data.from_items([{"block": json.dumps(block)} for block in blocks],
                               override_num_blocks=len(blocks))  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # these two arguments get other names in Ray 2.64
            return rows.map_batches(
                _Actor,
                batch_size=1,
                compute=data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=1),
                fn_constructor_kwargs={
                    "specs": self._specs,
                    "root": self._store.root,
                    "folder": Path.cwd(),
                    "threads": int(resources["num_cpus"]),
                    "beat": beat,
                    "options": options,
                },
                **resources,
                max_restarts=-1,  # a dead actor that is not replaced would hang Ray Data
                max_task_retries=0,  # rows of a repeated call are dropped as known
            )

    def _connect(self) -> tuple[int, dict[str, float]]:
        """The number of actors and what each one needs. Raises MmdistError without a cluster."""
        ray, handler = self._ray, signal.getsignal(signal.SIGTERM)
        cores = os.cpu_count() or 1
        options: dict[str, Any] = {"address": self._address}
        if not self._address:
            options = {"address": "local", "include_dashboard": False}
            options |= {"_node_ip_address": "127.0.0.1", "object_store_memory": STORE_BYTES}
            options["num_cpus"] = max(cores, self._workers) + 1  # one stays free
        if not self._connected and not ray.is_initialized():
            try:
                ray.init(log_to_driver=False, logging_level=logging.CRITICAL, **options)
            except Exception as error:  # of many classes
                raise MmdistError(
                    f"Ray could not be started or reached ({cause_of(error)}); check --address."
                ) from error
            finally:
                with contextlib.suppress(ValueError):  # not in the main thread
                    signal.signal(signal.SIGTERM, handler)
            self._connected = True
            logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = 0 if self._devices == {"cpu"} else sum(int(node.get("GPU", 0)) for node in nodes)
        if not gpus and "all" in self._devices:
            raise MmdistError("Ray has no GPU; use --devices cpu, or auto.")
        slots = [int(node["GPU"]) * self._workers for node in nodes if node.get("GPU")]
        if not gpus:
            slots = [-(-self._workers // len(nodes))] * len(nodes)
        able = [node for node in nodes if node.get("GPU")] if gpus else nodes
        each = min((n.get("CPU", 1) - 1) // s for n, s in zip(able, slots, strict=True))
        resources: dict[str, float] = {"num_cpus": max(1, int(each))}
        if gpus:
            resources["num_gpus"] = 1 / self._workers
        return gpus * self._workers or self._workers, resources


def _bytes_of(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0


def _listen(data: Any, rows: queue.Queue[Any], stop: threading.Event) -> None:
    """Put what the actors tell into `rows`; at the end None, or what Ray raised."""
    try:
        for row in data.iter_rows():
            rows.put(json.loads(row["told"]))
            if stop.is_set():
                break
    except BaseException as error:  # SystemExit, when Ray is shut down
        rows.put(error if isinstance(error, Exception) else None)
    else:
        rows.put(None)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Ray's C++ part writes to file descriptor 2 as it starts; our own stderr stays."""
    import ray._private.worker

    # Paragraphs about dead actors, printed to stdout with no switch to turn them off.
    ray._private.worker.print_to_stdstream = lambda *_, **__: None
    try:
        ours = sys.stderr.fileno() == 2
    except (OSError, ValueError):
        ours = False
    if not ours:
        yield
        return
    with open(os.dup(2), "w", buffering=1) as stderr, contextlib.redirect_stderr(stderr):  # noqa: PTH123
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        os.close(null)
        try:
            yield
        finally:
            os.dup2(stderr.fileno(), 2)


class _Actor:
    """Extracts blocks of videos and tells every `beat` seconds what has finished."""

    def __init__(
        self,
        specs: Sequence[ExtractorSpec],
        root: Path,
        folder: Path,
        threads: int,
        beat: float,
        options: Mapping[str, Any],
    ) -> None:
        for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
            os.environ[name] = str(threads)
        with contextlib.suppress(OSError):
            os.chdir(folder)  # relative paths are the driver's
        self._beat, self._engine = beat, Engine(specs, FeatureStore(root), **options)

    def __call__(self, batch: Mapping[str, Any]) -> Iterator[dict[str, list[str]]]:
        for block in batch["block"]:
            telling = _Telling(json.loads(block))
            thread = threading.Thread(target=self._run, args=(telling,), daemon=True)
            thread.start()
            while True:
                thread.join(self._beat)
                ended = not thread.is_alive()
                yield {"told": [telling.row()]}
                if ended:
                    break

    def _run(self, telling: _Telling) -> None:
        warnings.showwarning = lambda text, *_, **__: telling.warnings.append(str(text))
        try:
            if not self._engine.store.root.is_dir():
                telling.refused = (
                    f"A machine of the cluster does not see the folder {self._engine.store.root}; "
                    f"videos and features must be on a file system that all machines share."
                )
                return
            self._engine.run(list(telling.indices), telling)
        except MmdistError as error:
            telling.refused = str(error)
        except BaseException as error:  # what is not finished is done again
            telling.warnings.append(f"A Ray actor failed: {type(error).__name__}: {error}")


class _Telling:
    """The progress of one block, as an actor tells it."""

    def __init__(self, block: Sequence[tuple[int, str, str]]) -> None:
        self.indices = {Video(name, Path(path)): index for index, name, path in block}
        self.warnings: list[str] = []
        self.refused = ""
        self._changing = threading.Lock()
        self._outcomes: list[tuple[int, dict[str, Any]]] = []
        self._running: dict[int, float] = {}

    def planned(self, sizes: Mapping[Video, int]) -> None: ...

    def started(self, video: Video) -> None:
        self.advanced(video, 0.0)

    def advanced(self, video: Video, fraction: float) -> None:
        with self._changing:
            self._running[self.indices[video]] = fraction

    def finished(self, outcome: Outcome) -> None:
        index, told = self.indices[outcome.video], asdict(outcome)
        told.pop("video")
        with self._changing:
            self._running.pop(index, None)
            self._outcomes.append((index, told))

    def row(self) -> str:
        """A row for the driver: what is running, and what is new."""
        with self._changing:
            row = {"outcomes": self._outcomes, "running": list(self._running.items()),
                   "warnings": self.warnings, "refused": self.refused}  # fmt: skip
            self._outcomes, self.warnings = [], []
        return json.dumps(row)
