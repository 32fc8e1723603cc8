"""The paper's tables from anybody's features: every row over several seeds.

A row's seed is a run of its own (`train_run`, then `evaluate_run`). Students learn from the teacher
of their own seed, and seeds pair the rows. Several calls may share one folder: each trains what no
other is training.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from mmdist_e2e.grounding.answer import Progress
from mmdist_e2e.grounding.config import get_recipe
from mmdist_e2e.grounding.data.annotations import load_annotations
from mmdist_e2e.grounding.data.features import open_features, places_of
from mmdist_e2e.grounding.evaluate import evaluate_run, spread_over_runs
from mmdist_e2e.grounding.train import train_run
from mmdist_e2e.store import check_out, write_atomically, write_json
from mmdist_e2e.structures import MmdistError
from mmdist_e2e.weights.words import WordVectors

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


DONE = "reproduced.json"  # a row's figures, seconds and commit, written when all of it is done

LOCKS = ".locks"


@dataclass(frozen=True)
class Material:
    """What every row is trained and scored on; source says it in words."""

    source: str
    features: Path
    flow_features: Path | None
    train: Path
    val: Path | None
    test: Path
    word_vectors: WordVectors
    durations: Path | None = None
    protocol: str = "official"
    length: int = 64
    device: str = "cpu"


def run_of(out: Path, row: Row, seed: int) -> Path:
    return out / f"{row.folder}-{seed}"


def finished(out: Path, jobs: Sequence[Job]) -> dict[tuple[str, int], dict[str, Any]]:
    """{"result", "seconds", "commit"} of what is done, by row and seed."""
    found = {}
    for row, seed in jobs:
        path = run_of(out, row, seed) / DONE
        if path.is_file():
            found[row.name, seed] = json.loads(path.read_text(encoding="utf-8"))
    return found


def reproduce(
    material: Material,
    jobs: Sequence[Job],
    out: Path,
    *,
    settings: Mapping[str, Any],
    commit: str,
    progress: Progress | None = None,
    told: Callable[[str], None] = lambda line: None,
) -> dict[str, str]:
    """Train and score what is not yet done; rewrites out/table.md after each.

    settings: of every row whose recipe has them. commit: of the code, kept beside the figures.
    Returns, by row and seed, why it failed; the others are done all the same. What another call
    is training is passed over. Raises MmdistError for a setting that no row has, and where
    annotations or features cannot be read at all.
    """
    unknown = sorted(set(settings) - {name for row, _ in jobs for name in _names(row)})
    if unknown:
        raise MmdistError(f"No row has a setting {unknown[0]!r}; see mmdist train --help.")
    check_out(out)
    _check(material, {modality for row, _ in jobs for modality in row.modalities})
    (out / LOCKS).mkdir(parents=True, exist_ok=True)
    failed: dict[str, str] = {}
    for row, seed in jobs:
        run, label = run_of(out, row, seed), f"{row.name}, seed {seed}"
        try:
            if row.taught:  # a teacher that another call is at: its students wait
                with FileLock(_lock(out, TEACHER, seed)):
                    pass
            with FileLock(_lock(out, row, seed), timeout=0):
                if (run / DONE).is_file():
                    continue
                start = time.monotonic()
                result = _train_and_score(material, row, seed, out, settings, progress)
                seconds = round(time.monotonic() - start, 1)
                write_json(run / DONE, {"result": result, "seconds": seconds, "commit": commit})
        except Timeout:
            told(f"{label}: another call is at it")
            continue
        except MmdistError as error:
            failed[label] = str(error)
            told(f"{label} failed: {error}")
            continue
        told(f"{label}: R@1 at IoU 0.5 {result['metrics'][JUDGED]:.2f} ({seconds:.0f} s)")
        _write_table(out, jobs, material)
    _write_table(out, jobs, material)  # of these rows, whatever another call wrote
    return failed


def _write_table(out: Path, jobs: Sequence[Job], material: Material) -> None:
    lines = table(finished(out, jobs), jobs, material.source)
    write_atomically(out / "table.md", lines.encode())


def _lock(out: Path, row: Row, seed: int) -> Path:
    """A file that says who is at a run; it is let go when its process ends, however it ends."""
    return out / LOCKS / f"{row.folder}-{seed}"


def _check(material: Material, modalities: Collection[str]) -> None:
    """One sentence for a missing file, not one a row."""
    for path in (material.train, material.val, material.test):
        if path is not None:
            load_annotations(path, durations=material.durations, protocol=material.protocol)
    places = places_of(sorted(modalities), material.features, material.flow_features)
    for modality, path in places.items():
        with open_features(path, modality):
            pass


def _names(row: Row) -> set[str]:
    """The settings of a row's recipe."""
    shape = {"feature_dim": 2, "word_dim": 2, "vocabulary_size": 2}
    return set(get_recipe(row.recipe)(**shape, channels=(1, 1)).homes)


def _train_and_score(
    material: Material,
    row: Row,
    seed: int,
    out: Path,
    settings: Mapping[str, Any],
    progress: Progress | None,
) -> dict[str, Any]:
    run = run_of(out, row, seed)
    own = {name: value for name, value in settings.items() if name in _names(row)}
    train_run(
        recipe_name=row.recipe,
        features_path=material.features,
        flow_features_path=material.flow_features,
        train_path=material.train,
        val_path=material.val,
        out=run,
        seed=seed,
        word_vectors=material.word_vectors,
        durations=material.durations,
        protocol=material.protocol,
        modalities=row.modalities,
        teacher=run_of(out, TEACHER, seed) if row.taught else None,
        length=material.length,
        overrides={**own, **row.settings},
        device=material.device,
        progress=progress,
    )
    return evaluate_run(
        run,
        features_path=material.features,
        flow_features_path=material.flow_features,
        annotations_path=material.test,
        durations=material.durations,
        protocol=material.protocol,
        device=material.device,
        progress=progress,
    )
