"""What Ray adds to a video: the same tiny videos by the local engine and by the one on Ray.

    python benchmarks/bench_ray.py --videos 2000 --workers 2

Prints for each engine the seconds until the first and the last video is finished, the milliseconds
per video between them, and the same for a rerun in which all are up to date. The files are compared.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from mmdist_e2e.extractors.batch import Engine
from mmdist_e2e.extractors.engines.ray import RayEngine
from mmdist_e2e.extractors.profiles import describe
from mmdist_e2e.extractors.search import Outcome, Video, find_videos
from mmdist_e2e.store import FeatureStore

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from conftest import make_extractor
from make_videos import make_video


class Clock:
    """When videos finished, in seconds since it was made."""

    def __init__(self) -> None:
        self.begun, self.times = time.monotonic(), list[float]()

    def planned(self, sizes: Mapping[Video, int]) -> None: ...
    def started(self, video: Video) -> None: ...
    def advanced(self, video: Video, fraction: float) -> None: ...

    def finished(self, outcome: Outcome) -> None:
        assert outcome.status != "failed", outcome.cause
        self.times.append(time.monotonic() - self.begun)

    def line(self) -> str:
        spread = (self.times[-1] - self.times[0]) / max(len(self.times) - 1, 1)
        ends = f"first after {self.times[0]:6.2f} s, last after {self.times[-1]:7.2f} s"
        return f"{ends}, {1000 * spread:7.2f} ms a video between them"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--videos", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mmdist-bench-") as name:
        folder = Path(name)
        specs = [describe(make_extractor(folder / "tiny"))]
        (folder / "videos").mkdir()
        first = make_video(folder / "videos" / "0.mp4", 16, width=32, height=32)
        for index in range(1, given.videos):
            shutil.copy(first, folder / "videos" / f"{index}.mp4")
        videos = find_videos([folder / "videos"]).videos
        made = {}
        for name, kind in (("local", Engine), ("ray", RayEngine)):
            store = FeatureStore(folder / name)
            with kind(specs, store, devices=["cpu"], workers=given.workers) as engine:
                for what in ("extract", "up to date"):
                    clock = Clock()
                    engine.run(videos, clock)
                    print(f"{name:5}  {what:10}  {clock.line()}", flush=True)
            made[name] = {p.name: p.read_bytes() for p in store.root.rglob("*.npz")}
        assert made["local"] == made["ray"]
        print(f"{len(made['ray'])} files are the same")


if __name__ == "__main__":
    main()
