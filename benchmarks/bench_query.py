"""How long a query takes on cached features: median of 50 calls, other core idle and busy.

    python benchmarks/bench_query.py

The busy case runs one endless Python loop in another process for each core but one.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mmdist_e2e as mm

EXAMPLES = Path(__file__).parents[1] / "examples"
CALLS = 50


def median_ms(grounder: mm.Grounder, clip: Path, query: str) -> tuple[float, float]:
    """Median and slowest of CALLS calls, in milliseconds."""
    seconds = []
    for _ in range(CALLS):
        begin = time.perf_counter()
        grounder.ground(clip, query)
        seconds.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(seconds), 1e3 * max(seconds)


def main() -> None:
    example = json.loads((EXAMPLES / "example.json").read_text())
    clip, query = EXAMPLES / example["clip"], example["query"]
    with tempfile.TemporaryDirectory() as cache:
        mm.load(cache=cache).ground(clip, query)  # extracts once
        grounder = mm.load(cache=cache)
        begin = time.perf_counter()
        grounder.ground(clip, query)
        first = 1e3 * (time.perf_counter() - begin)
        idle = median_ms(grounder, clip, query)
        others = max(1, (os.cpu_count() or 2) - 1)
        busy_loop = [sys.executable, "-c", "while True: pass"]
        burners = [subprocess.Popen(busy_loop) for _ in range(others)]
        try:
            busy = median_ms(grounder, clip, query)
        finally:
            for burner in burners:
                burner.kill()
                burner.wait()
    print(f"first query of a new Grounder: {first:.1f} ms")
    print(f"{CALLS} queries, other cores idle: median {idle[0]:.1f} ms, slowest {idle[1]:.1f} ms")
    print(f"{CALLS} queries, other cores busy: median {busy[0]:.1f} ms, slowest {busy[1]:.1f} ms")
    print(f"query, other cores idle over busy: ratio {idle[0] / busy[0]:.2f}")


if __name__ == "__main__":
    main()
