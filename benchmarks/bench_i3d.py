"""I3D windows as we run them beside the usual way: fp32, contiguous, one window a call.

    python benchmarks/bench_i3d.py [EXTRACTOR]       default: the shipped network

Same weights, same windows, one process; the best of three runs counts.
"""

from __future__ import annotations

import sys
import time

import numpy as np
import torch

from mmdist_e2e.extractors.networks import SnippetNetwork, describe
from mmdist_e2e.extractors.preprocess import to_network

WINDOWS, RUNS = 32, 3


def main() -> None:
    spec = describe(sys.argv[1] if len(sys.argv) > 1 else "world1-rgb")
    ours = SnippetNetwork(spec, device="cpu")
    usual = SnippetNetwork(spec, device="cpu", precision="fp32").network.to(
        memory_format=torch.contiguous_format
    )
    size = ours.preprocessing.size
    shape = (WINDOWS, spec.window, size, size, 3)
    windows = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)

    def run_ours() -> np.ndarray:
        return np.concatenate([ours.rows(windows[i : i + 8]) for i in range(0, WINDOWS, 8)])

    def run_usual() -> np.ndarray:
        with torch.inference_mode():
            clips = to_network(torch.from_numpy(windows)).contiguous()
            return np.concatenate([usual.features(clip[None])[:, 0].numpy() for clip in clips])

    times = {}
    rows = {}
    for name, run in (("ours", run_ours), ("usual", run_usual)):
        run()
        spans = []
        for _ in range(RUNS):
            begin = time.perf_counter()
            rows[name] = run()
            spans.append(time.perf_counter() - begin)
        times[name] = min(spans)
        print(f"{name}: {1000 * times[name] / WINDOWS:.1f} ms a window")
    a, b = rows["ours"], rows["usual"]
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    print(f"row cosine: at least {cosine.min():.6f}; precision {ours.info['precision']}")
    print(f"i3d: ratio {times['usual'] / times['ours']:.2f}")


if __name__ == "__main__":
    main()
