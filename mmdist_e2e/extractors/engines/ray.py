"""Ray Data instead of one machine: an `Engine` in each of several actors.

    driver    RayEngine: blocks of a few videos → Ray Data → rows that tell what happened
      └─ actor    one for each GPU, or `workers` in all without GPUs; holds an Engine
           └─ worker process, decoders …    as without Ray

Retries, claims, records and files are the Engine's; Ray carries names and outcomes, never frames.
What is lost with an actor, or whose actors fall silent, is done again in a second round, one video
a block, by which time most of it is up to date. So Ray retries nothing itself.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import re
import signal
import socket
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
from mmdist_e2e.extractors.video.reader import PACKAGE_PARENT
from mmdist_e2e.store import FeatureStore, require
from mmdist_e2e.structures import MmdistError, check_choice

ENVIRONMENT = {  # for Ray; what the user has set stays
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_AUTO_CONNECT": "0",  # else a thread that outlives a session starts another one
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else a warning
}
# Else Ray replaces 127.0.0.1 by an address that other machines reach.
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
STORE_BYTES = 100 << 20  # of Ray's shared memory; only names are in it
BLOCK_VIDEOS, BLOCKS_PER_ACTOR = 64, 8  # at most; at least, if there are so many videos
# An actor has something to tell every BEAT_SECONDS, which costs the driver some 40 ms.
BEAT_SECONDS, ACTORS_PER_SECOND = 1.0, 10
SILENT_SECONDS = 60.0  # and some beats: the actors that had work are dead or stuck
START_SECONDS = 1800.0  # the same before the first row: a cluster may have to start machines


class RayEngine:
    """`Engine` on Ray: on this machine, or on a running cluster.

    Args:
        address: the cluster's, as `ray.init` takes it. This package is installed on its machines;
            videos, checkpoints and the store are on a file system that they and we share.
        devices: "auto" (GPUs if there are any), "all" (GPUs) or "cpu".
        workers: actors on each GPU, or in all without GPUs.
        options: the other arguments of `Engine`.

    Raises MmdistError when Ray is not installed, or for another device.
    """

    def __init__(
        self,
        specs: Sequence[ExtractorSpec],
        store: FeatureStore,
        *,
        address: str | None = None,
        devices: Sequence[str] = ("auto",),
        workers: int = 1,
        **options: Any,
    ) -> None:
        for name in devices:
            valid = ("auto", "all", "cpu")
            check_choice("With --engine ray, which assigns the GPUs, the device", name, valid)
        local = (address or "127.").startswith(("127.", "localhost"))
        os.environ.update({**ENVIRONMENT, **(LOOPBACK if local else {}), **os.environ})
        self._ray, _ = (require(name, "ray", "--engine ray") for name in ("ray", "ray.data"))
        self._root, self._address, self._devices = store.root, address, {*devices}
        self._workers = max(1, workers)
        self._options = {"specs": specs, "store": store, **options}
        self._connected = False
        self._why = ""  # a round has ended early

    def __enter__(self) -> RayEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the actors, and Ray if it is on this machine."""
        if self._connected:
            self._connected = False
            self._ray.shutdown()

    def run(self, videos: Sequence[Video], progress: BatchProgress | None = None) -> Report:
        """As `Engine.run`. Raises MmdistError also when Ray does not start."""
        sizes = {video: _bytes_of(video.path) for video in videos}
        if progress is not None:
            progress.planned(sizes)
        self._root.mkdir(parents=True, exist_ok=True)
        outcomes: dict[int, Outcome] = {}

        def finished(index: int, **told: Any) -> None:
            outcomes[index] = Outcome(videos[index], **told)
            if progress is not None:
                progress.finished(outcomes[index])

        for alone in (False, True, True):
            left = [index for index in range(len(videos)) if index not in outcomes]
            left.sort(key=lambda index: -sizes[videos[index]])
            names = [(index, videos[index].id, str(videos[index].path)) for index in left]
            for row in self._round(names, alone=alone) if names else ():
                for index, told in row["finished"]:
                    if alone and told["status"] == "skipped":  # it was done in the round before
                        told |= {"status": "done", "cause": "", "rows": self._rows(videos[index])}
                    if index not in outcomes:
                        finished(index, **told)
                for text in row["warnings"]:
                    warnings.warn(text, stacklevel=2)
                if row["refused"]:
                    raise MmdistError(row["refused"][0])
        for index in sorted({*range(len(videos))} - outcomes.keys()):
            cause = (
                f"{videos[index].path} was given up: the Ray actors that had it died{self._why}."
            )
            finished(index, status="failed", cause=cause, error="ActorDied")
        return Report([outcomes[index] for index in range(len(videos))])

    def _rows(self, video: Video) -> dict[str, int]:
        """The number of stored rows by modality."""
        store, modalities = self._options["store"], [s.modality for s in self._options["specs"]]
        return {name: len(store.load(video.id, name).data) for name in modalities}

    def _round(self, names: Sequence[Any], *, alone: bool) -> Iterator[dict[str, Any]]:
        """What the actors tell until they are done, dead or silent. alone: one video a block."""
        rows: queue.Queue[Any] = queue.Queue()
        stop = threading.Event()
        if alone:
            self.close()  # whatever has failed, it starts anew
        with contextlib.ExitStack() as starting:
            silence = starting.enter_context(contextlib.ExitStack())
            silence.enter_context(_silence())
            actors, resources = self._connect()
            beat = max(BEAT_SECONDS, actors / ACTORS_PER_SECOND)
            size = min(BLOCK_VIDEOS, len(names) // (actors * BLOCKS_PER_ACTOR))
            size = 1 if alone else max(1, size)
            blocks = [names[begin : begin + size] for begin in range(0, len(names), size)]
            data = self._dataset(blocks, min(actors, len(blocks)), resources, beat)
            listener = threading.Thread(target=_listen, args=(data, rows, stop), daemon=True)
            listener.start()
            starting.callback(listener.join, 3 * beat)  # without it, Ray's own end is noisy
            starting.callback(stop.set)
            patience, silent = START_SECONDS, True
            try:
                while isinstance(row := rows.get(timeout=patience), dict):
                    silence.close()
                    patience, silent = SILENT_SECONDS + 5 * beat, False
                    yield row
                self._why = "" if row is None else f" ({str(row).strip().splitlines()[-1]})"
            except queue.Empty:
                self._why = f" (silent for {patience:.0f} seconds)"
            if silent:
                raise MmdistError(
                    f"Ray's actors do not start{self._why}; the cluster's machines need the same "
                    f"Python, Ray and mmdist-e2e as this one, and room for an actor."
                )

    def _dataset(
        self, blocks: Sequence[Any], actors: int, resources: Mapping[str, float], beat: float
    ) -> Any:
        """The dataset whose rows are what the actors tell."""
        data, context = self._ray.data, self._ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        context.execution_no_progress_timeout_s = -1  # we have beats of our own
        context.target_max_block_size = 1  # bytes: every row is delivered at once
        context.max_errored_blocks = -1  # a lost block does not end the others
        threads, gpu = int(resources["num_cpus"]), "num_gpus" in resources
        options = {**self._options, "workers": 1, "devices": ["auto" if gpu else "cpu"]}
        if gpu and options.get("decoders") is None:
            options["decoders"] = min(8, max(2, threads - 1))
        items = [{"block": json.dumps(block)} for block in blocks]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the last two arguments get other names in Ray 2.64
            return data.from_items(items, override_num_blocks=len(items)).map_batches(
                _Actor,
                batch_size=1,
                compute=data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=1),
                fn_constructor_args=(Path.cwd(), threads, beat, options),
                **resources,
                max_restarts=-1,  # Ray Data waits for ever for dead actors that are not replaced
                max_task_retries=0,  # a repeated call loses as many rows as the first one gave
            )

    def _connect(self) -> tuple[int, dict[str, float]]:
        """The number of actors, and what each one needs. Raises MmdistError without a cluster."""
        ray, handler = self._ray, signal.getsignal(signal.SIGTERM)
        options: dict[str, Any] = {"address": self._address}
        if not self._address:
            options = {"address": "local", "_node_ip_address": "127.0.0.1"}
            options |= {"include_dashboard": False, "object_store_memory": STORE_BYTES}
            options["num_cpus"] = max(os.cpu_count() or 1, self._workers) + 1  # one stays free
            paths = [str(PACKAGE_PARENT), *filter(None, [os.environ.get("PYTHONPATH")])]
            options["runtime_env"] = {"env_vars": {"PYTHONPATH": os.pathsep.join(paths)}}
        if not ray.is_initialized():
            try:
                if match := re.fullmatch(r"([\w.-]+):(\d+)", self._address or ""):
                    # Ray tries a wrong address for minutes.
                    socket.create_connection((match[1], int(match[2])), 10.0).close()
                ray.init(log_to_driver=False, logging_level=logging.CRITICAL, **options)
            except Exception as error:
                raise MmdistError(
                    f"Ray could not be started or reached ({cause_of(error)}); check --address."
                ) from error
            finally:
                with contextlib.suppress(TypeError, ValueError):  # not in the main thread
                    signal.signal(signal.SIGTERM, handler)
            self._connected = True
            logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = [int(node.get("GPU", 0)) for node in nodes if self._devices != {"cpu"}]
        actors = sum(gpus) * self._workers or self._workers
        if not any(gpus) and "all" in self._devices:
            raise MmdistError("Ray has no GPU; use --devices cpu, or auto.")
        if not any(gpus):
            share = -(-actors // len(nodes))
            return actors, {"num_cpus": max(1, min(_free_cpus(n) // share for n in nodes))}
        shares = [(n, count * self._workers) for n, count in zip(nodes, gpus, strict=True) if count]
        cpus = max(1, min(_free_cpus(node) // share for node, share in shares))
        return actors, {"num_cpus": cpus, "num_gpus": 1 / self._workers}


def _free_cpus(node: Mapping[str, float]) -> int:
    return int(node.get("CPU", 0)) - 1


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
    """Nothing of what Ray's native code says on stderr as it starts, and none of its reports."""
    import ray._private.worker

    # Paragraphs about dead actors, on stdout, for which there is no switch.
    ray._private.worker.print_to_stdstream = lambda *_, **__: None
    with os.fdopen(os.dup(2), "w", buffering=1) as ours, open(os.devnull, "w") as null:  # noqa: PTH123
        os.dup2(null.fileno(), 2)
        try:
            with contextlib.redirect_stderr(ours if sys.stderr is sys.__stderr__ else sys.stderr):
                yield
        finally:
            os.dup2(ours.fileno(), 2)


class _Actor:
    """Extracts blocks of videos, and tells every `beat` seconds what happened."""

    def __init__(self, folder: Path, threads: int, beat: float, options: dict[str, Any]) -> None:
        os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"), str(threads)))
        with contextlib.suppress(OSError):
            os.chdir(folder)  # relative paths are the driver's
        self._beat, self._engine = beat, Engine(**options)

    def __call__(self, batch: Mapping[str, Any]) -> Iterator[dict[str, list[str]]]:
        for block in batch["block"]:
            self._indices = {Video(name, Path(path)): i for i, name, path in json.loads(block)}
            self._news: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
            thread = threading.Thread(target=self._run, daemon=True)
            thread.start()
            working = True
            while working:
                thread.join(self._beat)
                working = thread.is_alive()
                row: dict[str, list[Any]] = {"finished": [], "warnings": [], "refused": []}
                while not self._news.empty():
                    kind, news = self._news.get()
                    row[kind].append(news)
                yield {"told": [json.dumps(row)]}

    def _run(self) -> None:
        warnings.showwarning = lambda text, *_, **__: self._news.put(("warnings", str(text)))
        root = self._engine.store.root
        try:
            if not root.is_dir():
                raise MmdistError(  # noqa: TRY301
                    f"A machine of the cluster does not see the folder {root}; videos and features "
                    f"must be on a file system that all machines share."
                )
            self._engine.run([*self._indices], self)
        except MmdistError as error:
            self._news.put(("refused", str(error)))
        except BaseException as error:  # what is not finished is done again
            self._news.put(("warnings", f"A Ray actor failed: {type(error).__name__}: {error}"))

    # The progress of the engine

    def planned(self, sizes: Mapping[Video, int]) -> None: ...
    def advanced(self, video: Video, fraction: float) -> None: ...

    def finished(self, outcome: Outcome) -> None:
        index, told = self._indices[outcome.video], asdict(outcome)
        del told["video"]
        self._news.put(("finished", (index, told)))
