"""Runs benchmarks and compares the ratios that they print with the floors in floors.json.

    python benchmarks/check.py           the quick ones, under a minute on two idle cores
    python benchmarks/check.py --all     the slow ones as well, some ten minutes

Floors are ratios, never seconds, so that they hold on any machine; they are far enough below what
was measured to survive a busy one. A benchmark that falls below a floor runs a second time, and
the better ratio counts. The exit code is 1 when a ratio is below its floor or missing.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

FOLDER = Path(__file__).parent
RATIO = re.compile(r"^(.+): ratio (\d+(?:\.\d+)?)$", re.MULTILINE)


def ratios_of(output: str) -> dict[str, float]:
    """From the lines `name: ratio X`."""
    return {name: float(ratio) for name, ratio in RATIO.findall(output)}


def run(command: str) -> str:
    """What a benchmark prints; its errors go to the terminal."""
    script, *options = shlex.split(command)
    paths = [str(FOLDER.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, str(FOLDER / script), *options],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    return done.stdout


def below(ratios: Mapping[str, float], floors: Mapping[str, float]) -> list[str]:
    """Names of the ratios that are missing or below their floors."""
    return [name for name, floor in floors.items() if not ratios.get(name, 0.0) >= floor]


def check(benchmarks: Mapping[str, Mapping[str, float]]) -> bool:
    """Print a line for each ratio; whether all are high enough."""
    passed = True
    print(f"{'ratio':<45}{'floor':>8}{'now':>8}")
    for command, floors in benchmarks.items():
        begin, ratios = time.perf_counter(), dict[str, float]()
        for _ in range(2):
            for name, ratio in ratios_of(run(command)).items():
                ratios[name] = max(ratio, ratios.get(name, 0.0))
            if not below(ratios, floors):
                break
        failed = below(ratios, floors)
        passed &= not failed
        for name, floor in floors.items():
            found = f"{ratios[name]:8.2f}" if name in ratios else " missing"
            print(f"{name:<45}{floor:8.2f}{found}{'  BELOW' if name in failed else ''}")
        print(f"  {command}: {time.perf_counter() - begin:.0f} s", flush=True)
    return passed


def main() -> None:
    if unknown := set(sys.argv[1:]) - {"--all"}:
        sys.exit(f"Unknown: {' '.join(unknown)}; valid: --all.")
    floors = json.loads((FOLDER / "floors.json").read_text())
    groups = ("quick", "slow") if "--all" in sys.argv else ("quick",)
    results = [check(floors[group]) for group in groups]
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
