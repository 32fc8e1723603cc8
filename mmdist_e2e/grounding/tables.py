"""The rows of the paper's tables, and the table of what has been reproduced, in Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmdist_e2e.grounding.evaluate import spread_over_runs
from mmdist_e2e.structures import MmdistError

SHOWN = ("R@1,IoU=0.3", "R@1,IoU=0.5", "R@1,IoU=0.7", "mIoU")
JUDGED = "R@1,IoU=0.5"
BOTH, RGB = ("rgb", "flow"), ("rgb",)
Job = tuple["Row", int]
# What a finished training left, by row and seed: see `reproduce`.
Done = Mapping[tuple[str, int], Mapping[str, Any]]


@dataclass(frozen=True)
class Row:
    """One row: a recipe with some settings, and R@1 at IoU 0.3, 0.5, 0.7 in the paper.

    headline: trained over all seeds, the others over fewer. taught: learns from the teacher.
    beside: the row it is compared with, seed by seed.
    """

    name: str
    recipe: str
    tables: tuple[int, ...]
    paper: tuple[float, float, float]
    settings: Mapping[str, Any] = field(default_factory=dict)
    modalities: tuple[str, ...] = RGB
    headline: bool = False
    taught: bool = False
    beside: str | None = None

    @property
    def folder(self) -> str:
        return self.name.replace(" ", "-")


ROWS = (
    Row("cpl", "cpl", (1,), (66.40, 49.24, 22.39), headline=True),
    Row("baseline", "baseline", (1, 3, 4), (67.26, 51.58, 24.22), headline=True, beside="cpl"),
    Row(
        "teacher", "teacher", (1, 5), (70.11, 54.72, 26.00), modalities=BOTH, headline=True,
        beside="student",
    ),
    Row(
        "student", "student", (1, 4), (68.90, 53.29, 25.27), headline=True, taught=True,
        beside="baseline",
    ),
    Row(
        "baseline without local", "baseline", (3,), (65.83, 50.54, 23.31),
        {"local_weight": 0, "score_weight": 0}, beside="baseline",
    ),
    # Undefined in the paper; here the hinges go and the reconstruction stays.
    Row(
        "baseline without global", "baseline", (3,), (60.42, 44.36, 20.80),
        {"contrast_weight": 0}, beside="baseline",
    ),
    Row(
        "teacher as concatenation", "baseline", (5,), (67.92, 52.31, 24.64), modalities=BOTH,
        beside="teacher",
    ),
    Row(
        "teacher without mutual", "teacher", (5,), (69.73, 53.86, 24.76),
        {"mutual_weight": 0}, modalities=BOTH, beside="teacher",
    ),
    Row(
        "student without local distillation", "student", (4,), (68.21, 51.68, 24.45),
        {"distill_local": "false"}, taught=True, beside="student",
    ),
    Row(
        "student without global distillation", "student", (4,), (68.02, 52.85, 24.98),
        {"distill_global": "false"}, taught=True, beside="student",
    ),
)  # fmt: skip
TABLES = (1, 3, 4, 5)
TEACHER = next(row for row in ROWS if row.name == "teacher")


def rows_of(tables: Sequence[int]) -> list[Row]:
    """The rows of some tables, each once. Raises MmdistError for a table that has none."""
    unknown = sorted(set(tables) - set(TABLES))
    if unknown or not tables:
        raise MmdistError(
            f"There is no table {', '.join(map(str, unknown)) or 'given'}; valid: "
            f"{', '.join(map(str, TABLES))}."
        )
    return [row for row in ROWS if set(row.tables) & set(tables)]


def plan(rows: Sequence[Row], seeds: Sequence[int], ablation_seeds: Sequence[int]) -> list[Job]:
    """What is to be trained, in order: seed by seed, teachers before the students they teach.

    Headline rows come first, so that a call which is stopped leaves whole comparisons.
    """
    wanted = {*(row.name for row in rows), *(TEACHER.name for row in rows if row.taught)}
    needed = [row for row in ROWS if row.name in wanted]
    return [
        (row, seed)
        for headline, of_these in ((True, seeds), (False, ablation_seeds))
        for seed in of_these
        for row in needed
        if row.headline is headline
    ]


def table(done: Done, jobs: Sequence[Job], source: str) -> str:
    """What is done so far beside the paper's Charades-STA, and the differences seed by seed.

    source: what was trained and scored on, in words.
    """
    if not done:
        return "Nothing is done yet.\n"
    some = next(iter(done.values()))["result"]
    commits = ", ".join(sorted({str(each["commit"]) for each in done.values()}))
    lines = [
        f"Trained and scored on {source}: {some['videos']} videos, {some['protocol']}; checkpoints "
        f"chosen by {some['selected_by']}. Percent, mean ± standard deviation over seeds; in "
        f"brackets the paper's on Charades-STA. mmdist {commits}.\n",
        "| row | tables | seeds | " + " | ".join(SHOWN) + " |",
        "|---" * (3 + len(SHOWN)) + "|",
    ]
    compared = []
    for row in ROWS:
        seeds = [seed for other, seed in jobs if other is row and (row.name, seed) in done]
        if not seeds:
            continue
        spread = dict(spread_over_runs([done[row.name, seed]["result"] for seed in seeds]))["model"]
        cells = [f"{spread[c][0]:.2f} ± {spread[c][1]:.2f}" for c in SHOWN]
        for i, figure in enumerate(row.paper):
            cells[i] += f" ({figure:.2f})"
        tables = ", ".join(map(str, row.tables))
        lines.append(
            f"| {row.name} | {tables} | {', '.join(map(str, seeds))} | " + " | ".join(cells) + " |"
        )
        shared = [seed for seed in seeds if (row.beside, seed) in done]
        if shared:
            compared.append(_comparison(row, shared, done))
    if compared:
        lines += [
            f"\nDifferences in {JUDGED}, paired by seed: mean and its standard error.\n",
            "| | seeds | difference | standard error | seed by seed |",
            "|---|---|---|---|---|",
            *compared,
        ]
    return "\n".join(lines) + "\n"


def _comparison(row: Row, seeds: Sequence[int], done: Done) -> str:
    def score(name: str | None, seed: int) -> float:
        return float(done[str(name), seed]["result"]["metrics"][JUDGED])

    differences = [score(row.name, seed) - score(row.beside, seed) for seed in seeds]
    error = "–"
    if len(seeds) > 1:
        error = f"{np.std(differences, ddof=1) / math.sqrt(len(seeds)):.2f}"
    each = " ".join(f"{difference:+.2f}" for difference in differences)
    return (
        f"| {row.name} − {row.beside} | {len(seeds)} | {np.mean(differences):+.2f} | {error} | "
        f"{each} |"
    )
