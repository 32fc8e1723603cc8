"""The worker process, `python -m mmdist_e2e.extractors.worker`: networks on one device.

The engine (batch.py) starts it and speaks with it in JSON lines on stdin and stdout:

    → {"pickled": …}                what to load: see `main`
    ← {"say": "ready"} or {"say": "refused", "error": …}   networks are loaded, or cannot be
    ← {"say": "next"}               give me a video; answered when there is one
    → {"key": …, "path": …, "modalities": …, "source": …}  a `Job`; the key is the video's id
    ← {"say": "at", "key": …, "fraction": …}
    ← {"say": "done", "key": …, …}  the rest is `facts`
    ← {"say": "warning", "text": …}

The end of stdin ends the process and its decoders at once, but never in the middle of a save. So
does ORPHAN_SECONDS in native code that keeps the interpreter's lock.
Importing this module does not import torch.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pickle
import queue
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmdist_e2e.extractors.extract import Conveyor, Job, Result, cause_of
from mmdist_e2e.extractors.profiles import ExtractorSpec
from mmdist_e2e.extractors.runner import SnippetNetwork
from mmdist_e2e.extractors.search import printable
from mmdist_e2e.store import FeatureStore
from mmdist_e2e.structures import Features, MmdistError

ALIVE_SECONDS = 2.0  # between two looks whether threads run
PROGRESS_SECONDS = 0.5  # between two messages about one video
SAVE_SECONDS = 5.0  # that a save may still take when the parent is gone
ORPHAN_SECONDS = 600  # a process that is stuck in native code ends by SIGALRM


class WriteError(MmdistError):
    """The features of a video cannot be written: probably nobody's can."""


def saver(store: FeatureStore) -> Callable[[Job, Features], None]:
    """What writes a job's features; the job's key is the video's id."""

    def save(job: Job, features: Features) -> None:
        try:
            store.save(str(job.key), features)
        except (MmdistError, OSError) as error:
            raise WriteError(cause_of(error)) from error

    return save


def load_networks(
    specs: Sequence[ExtractorSpec], options: Mapping[str, str]
) -> dict[str, SnippetNetwork]:
    """The networks, by modality. Raises MmdistError when one cannot be loaded."""
    networks = {}
    for spec in specs:
        try:
            networks[spec.modality] = SnippetNetwork(spec, **options)
        except MmdistError:
            raise
        except (MemoryError, OSError, RuntimeError) as error:
            raise MmdistError(
                f"The extractor {spec.name!r} cannot be loaded ({cause_of(error)})."
            ) from error
    return networks


def facts(result: Result) -> dict[str, Any]:
    """What the engine wants to know of a result, as JSON has it: fields of an `Outcome`.

    unwritable: whether features could not be written.
    """
    causes = [blame(result.job.path, error) for error in result.failures]
    chains = [list(_chain(error)) for error in result.failures]
    return {
        "rows": {modality: len(made.data) for modality, made in result.features.items()},
        "cause": " ".join(dict.fromkeys(causes)),
        "error": type(chains[0][-1]).__name__ if chains else "",
        "seconds": {stage: round(seconds, 4) for stage, seconds in result.seconds.items()},
        "video_seconds": result.video_seconds,
        "unwritable": any(isinstance(error, WriteError) for chain in chains for error in chain),
    }


def blame(path: Path, error: Exception) -> str:
    """The cause of a video's failure on one line."""
    place = "" if isinstance(error, MmdistError) else f"{path}: "
    return printable(f"{place}{cause_of(error)}")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


class _Channel:
    """JSON lines with the parent. A thread reads, another one keeps the alarm from ringing."""

    def __init__(self) -> None:
        # Libraries that print must not break the protocol: their stdout becomes stderr.
        self._out = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)
        self._speaking = threading.Lock()
        self.saving = threading.Lock()
        self.inbox: queue.Queue[dict[str, Any]] = queue.Queue()
        for target in (self._read, self._live):
            threading.Thread(target=target, daemon=True).start()

    def send(self, **message: Any) -> None:
        try:
            with self._speaking:
                self._out.write(json.dumps(message).encode() + b"\n")
                self._out.flush()
        except OSError:
            self.end()

    def end(self) -> None:
        """End this process and its decoders, which share its group."""
        self.saving.acquire(timeout=SAVE_SECONDS)
        if hasattr(os, "killpg") and os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os._exit(0)

    def _read(self) -> None:
        for line in sys.stdin.buffer:
            self.inbox.put(json.loads(line))
        self.end()

    def _live(self) -> None:
        while hasattr(signal, "alarm"):
            signal.alarm(ORPHAN_SECONDS)  # the default action needs no interpreter lock
            time.sleep(ALIVE_SECONDS)


def main() -> None:
    """Load what the first message names, then extract videos until stdin ends."""
    channel = _Channel()
    pickled = base64.b64decode(channel.inbox.get()["pickled"])
    specs, options, store, conveying = pickle.loads(pickled)  # noqa: S301 - our parent's
    warnings.showwarning = lambda message, *_, **__: channel.send(say="warning", text=str(message))
    try:
        networks = load_networks(specs, options)
    except MmdistError as error:
        channel.send(say="refused", error=str(error))
        return
    write, spoke = saver(store), dict[Hashable, float]()

    def jobs() -> Iterator[Job]:
        while True:
            channel.send(say="next")
            message = channel.inbox.get()
            yield Job(path=Path(message.pop("path")), **message)

    def save(job: Job, features: Features) -> None:
        with channel.saving:
            write(job, features)

    def progress(job: Job, fraction: float) -> None:
        if time.monotonic() - spoke.get(job.key, 0.0) > PROGRESS_SECONDS:
            spoke[job.key] = time.monotonic()
            channel.send(say="at", key=job.key, fraction=fraction)

    channel.send(say="ready")
    device = next(iter(networks.values())).device
    with Conveyor(networks, **conveying) as conveyor:
        for result in conveyor.run(jobs(), save=save, progress=progress):
            if result.failures and device.type == "cuda":
                import torch

                # Raises where a fault has ended the device's context: another process must do.
                torch.cuda.synchronize(device)
            channel.send(say="done", key=result.job.key, **facts(result))
            spoke.pop(result.job.key, None)


if __name__ == "__main__":
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    main()
