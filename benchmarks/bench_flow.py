"""TV-L1: speed and error of our CPU solver and of OpenCV's CPU class with the same settings.

    python benchmarks/bench_flow.py [VIDEO ...]

Twenty evenly spaced pairs of consecutive, different frames of each video at shorter side 256
(without a video: the example clip). OpenCV stops early at ε 0.01. Both solvers may use every core.
The ratio is OpenCV's total time over ours. `--error` compares both with the converged solution:
OpenCV without the early stop, 10 to 20 seconds per pair.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch

from mmdist_e2e.extractors.flow import tvl1
from mmdist_e2e.extractors.flow.fields import FlowPreprocessing
from mmdist_e2e.extractors.flow.settings import TVL1Settings
from mmdist_e2e.extractors.video.reader import Decoder

PAIRS, SHORTER_SIDE, RUNS = 20, 256, 3
EXAMPLE = Path(__file__).parent.parent / "examples" / "example.mp4"


def pairs_of(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with Decoder() as decoder:
        chunks = [chunk.frames_NHWC for chunk in decoder.frames(path, fps=25)]
    frames = np.concatenate(chunks)
    moved = [i for i in range(1, len(frames)) if not np.array_equal(frames[i], frames[i - 1])]
    frames = frames[[0, *moved]]
    first = np.linspace(0, len(frames) - 2, PAIRS).round().astype(int)
    preprocessing = FlowPreprocessing(shorter_side=SHORTER_SIDE, size=224, crop=224)
    grey = [preprocessing.greys(torch.from_numpy(frames[i : i + 2])).numpy() for i in first]
    return np.stack([pair[0] for pair in grey]), np.stack([pair[1] for pair in grey])


def timed(first: np.ndarray, second: np.ndarray, backend: str, runs: int) -> tuple[float, ...]:
    tvl1(first[:1], second[:1], backend=backend)  # compiled and warm
    spans = []
    for _ in range(runs):
        begin = time.perf_counter()
        flow = tvl1(first, second, backend=backend)
        spans.append(time.perf_counter() - begin)
    return min(spans), flow


def distance(a: np.ndarray, b: np.ndarray) -> str:
    """Mean end-point error of the pairs."""
    pairs = np.hypot(*(a - b).swapaxes(0, 1)).mean((1, 2))
    return f"mean {pairs.mean():.4f}, median {np.median(pairs):.4f}, worst {pairs.max():.4f} px"


def main() -> None:
    videos = [Path(x) for x in sys.argv[1:] if x != "--error"] or [EXAMPLE]
    totals = {"native": 0.0, "opencv": 0.0}
    for video in videos:
        first, second = pairs_of(video)
        flows = {}
        for backend in totals:
            seconds, flows[backend] = timed(first, second, backend, RUNS)
            totals[backend] += seconds
            print(
                f"{video.name} {first.shape[1:]} {backend}: {1000 * seconds / PAIRS:.1f} ms a pair"
            )
        if "--error" in sys.argv:
            exact = tvl1(first, second, backend="opencv", settings=TVL1Settings(epsilon=0.0))
            for backend, flow in flows.items():
                print(f"  {backend}: from the converged solution {distance(flow, exact)}")
    print(f"flow: ratio {totals['opencv'] / totals['native']:.2f}")


if __name__ == "__main__":
    main()
