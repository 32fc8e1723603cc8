"""Decoding in our isolated process beside decord called directly in this one, same frames.

    python benchmarks/bench_decode.py [VIDEO …]      default: the example clip

Isolation, sampling by timestamp and shared memory are what ours adds; the ratio says what they
cost. Each runs five times; the best time counts.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

from mmdist_e2e.extractors.video.reader import Decoder

EXAMPLE = Path(__file__).parents[1] / "examples" / "example.mp4"
RUNS = 5


def best_seconds(run: Callable[[], int]) -> tuple[float, int]:
    times = []
    for _ in range(RUNS):
        begin = time.perf_counter()
        frames = run()
        times.append(time.perf_counter() - begin)
    return min(times), frames


def main() -> None:
    import decord

    paths = [Path(argument) for argument in sys.argv[1:]] or [EXAMPLE]
    ratios = []
    with Decoder() as decoder:
        for path in paths:

            def ours(path: Path = path) -> int:
                return sum(len(chunk.frames_NHWC) for chunk in decoder.frames(path, fps=None))

            def direct(path: Path = path) -> int:
                reader = decord.VideoReader(str(path), num_threads=1)
                return sum(reader.next().asnumpy().shape[0] > 0 for _ in range(len(reader)))

            ours()  # the child starts once, for many videos
            (mine, frames), (theirs, count) = best_seconds(ours), best_seconds(direct)
            assert frames == count, f"{path}: {frames} frames where decord gives {count}"
            print(f"{path.name}: ours {frames / mine:.0f} frames/s, decord {count / theirs:.0f}")
            ratios.append(theirs / mine)
    print(f"decode: ratio {sum(ratios) / len(ratios):.2f}")


if __name__ == "__main__":
    main()
