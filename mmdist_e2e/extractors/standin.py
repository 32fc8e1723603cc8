"""Stand-in for the conveyor."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdist_e2e.extractors.extract import ExtractionError, extract_video
from mmdist_e2e.extractors.runner import SnippetNetwork
from mmdist_e2e.extractors.video.reader import Decoder
from mmdist_e2e.structures import Features


@dataclass(frozen=True)
class Job:
    key: Hashable
    path: Path
    modalities: Sequence[str]
    source: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Result:
    job: Job
    features: Mapping[str, Features]
    failures: Sequence[Exception]
    seconds: Mapping[str, float]
    video_seconds: float


class Conveyor:
    def __init__(
        self,
        networks: Mapping[str, SnippetNetwork],
        *,
        decoders: int = 2,
        stall_seconds: float = 60.0,
    ) -> None:
        self.networks = networks
        self.decoder = Decoder(stall_seconds=stall_seconds)

    def run(
        self,
        jobs: Iterable[Job],
        *,
        save: Callable[[Job, Features], None] | None = None,
        progress: Callable[[Job, float], None] | None = None,
    ) -> Iterator[Result]:
        for job in jobs:
            begun = time.monotonic()
            failures: list[Exception] = []
            made: Mapping[str, Features] = {}
            networks = [self.networks[m] for m in job.modalities]

            def advanced(fraction: float, job: Job = job) -> None:
                if progress is not None:
                    progress(job, fraction)

            try:
                try:
                    made = extract_video(
                        job.path, networks, self.decoder, source=job.source, progress=advanced
                    )
                except ExtractionError as error:
                    made = error.finished
                    failures.append(error)
                if save is not None:
                    for features in made.values():
                        save(job, features)
            except Exception as error:
                made = {}
                failures.append(error)
            video_seconds = max((f.duration_seconds for f in made.values()), default=0.0)
            yield Result(job, made, failures, {"network": time.monotonic() - begun}, video_seconds)

    def close(self) -> None:
        self.decoder.close()

    def __enter__(self) -> Conveyor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
