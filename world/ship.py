"""Copy what `make world` made into the wheel's folder, and its figures into the cards.

    python -m world ship runs/world2

The student that is best on validation ships; its card shows the spread over all seeds and the
other rows. Without runs only the extractors ship; without probe.json only the
model.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from mmdist_e2e.grounding.checkpoint import model_card
from mmdist_e2e.grounding.evaluate import spread_over_runs
from mmdist_e2e.grounding.paper import DONE
from mmdist_e2e.store import write_atomically
from mmdist_e2e.structures import MmdistError
from mmdist_e2e.weights.registry import SHIPPED_MODEL, SHIPPED_ROOT
from world.card import name_of
from world.probe import table

EXTRACTOR_FILES = ("config.json", "model.safetensors")
MODEL_FILES = (*EXTRACTOR_FILES, "vocabulary.json")
COLUMNS = ("R@1,IoU=0.3", "R@1,IoU=0.5", "R@1,IoU=0.7", "mIoU")


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def copy(source: Path, target: Path, files: tuple[str, ...], card: str, addition: str) -> None:
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for name in files:
        shutil.copy(source / name, target / name)
    write_atomically(target / "README.md", f"{card.rstrip()}\n\n{addition}".encode())


def probe_section(probe: dict[str, Any]) -> str:
    return (
        "## Linear probe\n\n"
        f"Actions of the grounding videos at the middle of each row, fitted on "
        f"{probe['train_rows']:,} rows of train videos, scored on {probe['test_rows']:,} rows of "
        f"test videos (percent); `both` is the RGB and the flow network's rows side by side. "
        f'"Of two" chooses between two opposites alone, on their rows (guessing gives 50).\n\n'
        + "\n".join(table(probe))
        + "\n"
    )


def test_section(results: list[dict[str, Any]], shipped_seed: int) -> str:
    lines = [
        "## Test split of the world\n",
        f"{results[0]['queries']} queries of {results[0]['videos']} videos, seeds and rooms unseen "
        f"in training; percent, mean ± standard deviation over seeds "
        f"{', '.join(str(r['seed']) for r in results)}. This is seed {shipped_seed}, the best on "
        f"validation.\n",
        "| | " + " | ".join(COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for name, metrics in spread_over_runs(results):
        cells = (f"{metrics[c][0]:.2f} ± {metrics[c][1]:.2f}" for c in COLUMNS)
        lines.append(f"| {name.replace('_', ' ')} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def ship_extractors(work: Path) -> None:
    section = probe_section(read(work / "probe.json"))
    for modality in ("rgb", "flow"):
        source = work / modality
        target = SHIPPED_ROOT / name_of(modality)
        copy(source, target, EXTRACTOR_FILES, (source / "README.md").read_text(), section)


def ship_model(rows: Path) -> None:
    runs = [path.parent for path in sorted(rows.glob(f"student-[0-9]*/{DONE}"))]
    if not runs:
        return
    results = [read(run / DONE)["result"] for run in runs]
    best = max(runs, key=lambda run: read(run / "config.json")["validation"]["R@1,IoU=0.5"])
    config = read(best / "config.json")
    section = test_section(results, config["seed"])
    beside = (rows / "table.md").read_text()
    section += f"\n## Beside the other rows\n\n{beside}"
    copy(best, SHIPPED_MODEL, MODEL_FILES, model_card(config), section)
    print(section)


def main() -> None:
    """Command line of this module; see `--help`."""
    parser = argparse.ArgumentParser(description="Copy networks and student into the wheel.")
    parser.add_argument("work", type=Path, help="what `make world` wrote, like runs/world2")
    work = parser.parse_args().work
    if not work.is_dir():
        raise MmdistError(f"There is no folder '{work}'; run make world first.")
    if (work / "probe.json").is_file():
        ship_extractors(work)
    ship_model(work / "rows")
