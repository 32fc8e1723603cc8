"""The paper's tables from your own features: every row over several seeds.

Each row and seed is a run (`train_run`, then `evaluate_run`). A student learns from the teacher of
the same seed, and rows are compared seed by seed. Several calls may share one folder: each trains
what no other is training. A finished run counts only for the inputs that it was made from.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from mmdist_e2e.grounding.answer import Progress
from mmdist_e2e.grounding.checkpoint import (
    annotations_digest,
    input_differences,
)
from mmdist_e2e.grounding.config import advice, configure
from mmdist_e2e.grounding.data.annotations import load_annotations
from mmdist_e2e.grounding.data.features import load_features, places_of
from mmdist_e2e.grounding.data.text import tokenize
from mmdist_e2e.grounding.evaluate import evaluate_run, spread_over_runs
from mmdist_e2e.grounding.train import train_run
from mmdist_e2e.store import check_out, digest_of, write_atomically, write_json
from mmdist_e2e.structures import MmdistError, check_choice
from mmdist_e2e.weights.words import WordVectors

SHOWN = ("R@1,IoU=0.3", "R@1,IoU=0.5", "R@1,IoU=0.7", "mIoU")
JUDGED = "R@1,IoU=0.5"
BOTH, RGB = ("rgb", "flow"), ("rgb",)
Job = tuple["Row", int]

# What a finished run recorded, by row and seed: see `reproduce`.
Done = Mapping[tuple[str, int], Mapping[str, Any]]


@dataclass(frozen=True, eq=False)
class Row:
    """One row: a recipe with some settings, and R@1 at IoU 0.3, 0.5, 0.7 in the paper.

    The rows of Table 1 are trained over all seeds, the others over fewer. beside: the row that it
    is compared with, seed by seed.
    """

    name: str
    recipe: str
    tables: tuple[int, ...]
    paper: tuple[float, float, float]
    settings: Mapping[str, Any] = field(default_factory=dict)
    modalities: tuple[str, ...] = RGB
    beside: str | None = None

    @property
    def taught(self) -> bool:
        """Whether it learns from the teacher of the same seed."""
        return self.recipe == "student"


ROWS = (
    Row("cpl", "cpl", (1,), (66.40, 49.24, 22.39)),
    Row("baseline", "baseline", (1, 3, 4), (67.26, 51.58, 24.22), beside="cpl"),
    Row("teacher", "teacher", (1, 5), (70.11, 54.72, 26.00), modalities=BOTH, beside="student"),
    Row("student", "student", (1, 4), (68.90, 53.29, 25.27), beside="baseline"),
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
        {"mutual_weight": 0}, BOTH, beside="teacher",
    ),
    Row(
        "student without local distillation", "student", (4,), (68.21, 51.68, 24.45),
        {"distill_local": "false"}, beside="student",
    ),
    Row(
        "student without global distillation", "student", (4,), (68.02, 52.85, 24.98),
        {"distill_global": "false"}, beside="student",
    ),
)  # fmt: skip

TEACHER = next(row for row in ROWS if row.name == "teacher")


def rows_of(tables: Sequence[int]) -> list[Row]:
    """The rows of some tables, each once. Raises MmdistError for a table that has none."""
    valid = sorted({str(table) for row in ROWS for table in row.tables})
    for number in tables:
        check_choice("The table", str(number), valid)
    return [row for row in ROWS if set(row.tables) & set(tables)]


def plan(rows: Sequence[Row], seeds: Sequence[int], ablation_seeds: Sequence[int]) -> list[Job]:
    """What to train, in order: seed by seed, teachers before their students.

    The rows of Table 1 come first, so that an interrupted call leaves complete comparisons.
    """
    wanted = {*(row.name for row in rows), *(TEACHER.name for row in rows if row.taught)}
    needed = [row for row in ROWS if row.name in wanted]
    return [
        (row, seed)
        for headline, of_these in ((True, seeds), (False, ablation_seeds))
        for seed in of_these
        for row in needed
        if (1 in row.tables) is headline
    ]


def table(done: Done, jobs: Sequence[Job], source: str, made: str) -> str:
    """Results so far beside the paper's on Charades-STA, and the differences seed by seed.

    source: what was trained and scored on, in words. made: the settings that tables must name.
    """
    if not done:
        return "No run is finished yet.\n"
    some = next(iter(done.values()))["result"]
    lines = [
        f"Trained and scored on {source}: {some['videos']} videos, {some['protocol']}; {made}; "
        f"checkpoints chosen by {some['selected_by']}. Percent, mean ± standard deviation over "
        f"seeds; in brackets the paper's on Charades-STA.\n",
        "| row | tables | seeds | " + " | ".join(SHOWN) + " |",
        "|---" * (3 + len(SHOWN)) + "|",
    ]
    compared = []
    for row in ROWS:
        seeds = [seed for other, seed in jobs if other is row and (row.name, seed) in done]
        if not seeds:
            continue
        spread = dict(spread_over_runs([done[row.name, seed]["result"] for seed in seeds]))["model"]
        cells = [row.name, ", ".join(map(str, row.tables)), ", ".join(map(str, seeds))]
        for name, paper in zip_longest(SHOWN, row.paper):
            told = "" if paper is None else f" ({paper:.2f})"
            cells.append("{:.2f} ± {:.2f}".format(*spread[name]) + told)
        lines.append(f"| {' | '.join(cells)} |")
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
    """A line of the table of differences."""
    ours, theirs = (
        np.array([done[name, seed]["result"]["metrics"][JUDGED] for seed in seeds])
        for name in (row.name, str(row.beside))
    )
    apart = ours - theirs
    error = f"{apart.std(ddof=1) / math.sqrt(len(seeds)):.2f}" if len(seeds) > 1 else "–"
    each = " ".join(f"{difference:+.2f}" for difference in apart)
    return f"| {row.name} − {row.beside} | {len(seeds)} | {apart.mean():+.2f} | {error} | {each} |"


DONE = "reproduced.json"  # a row's result, seconds and inputs, written when it is finished
LOCKS = ".locks"


@dataclass(frozen=True)
class Material:
    """What every row is trained and scored on, by the names of `train_run`; source: in words."""

    source: str
    features_path: Path
    flow_features_path: Path | None
    train_path: Path
    val_path: Path | None
    test_path: Path
    word_vectors: WordVectors
    durations: Path | None = None
    protocol: str = "official"
    preset: str = "paper"
    length: int | None = None
    glove: Path | None = None
    device: str = "cpu"


def run_of(out: Path, row: Row, seed: int) -> Path:
    return out / f"{row.name.replace(' ', '-')}-{seed}"


def inputs_of(
    material: Material, jobs: Sequence[Job], settings: Mapping[str, Any]
) -> dict[Job, dict[str, Any]]:
    """Everything that the result of each row and seed depends on.

    settings: of every row whose recipe has them. Raises MmdistError for a setting that no row has,
    and for annotations or features that cannot be used.
    """
    train, val, test = (
        load_annotations(path, durations=material.durations, protocol=material.protocol)
        if path is not None
        else []
        for path in (material.train_path, material.val_path, material.test_path)
    )
    modalities: Sequence[str] = [m for m in BOTH if any(m in row.modalities for row, _ in jobs)]
    places = places_of(modalities, material.features_path, material.flow_features_path)
    videos = [a.video for a in (*train, *val, *test)]
    read = load_features(places, videos, length=1).digests  # of what is read, whatever the length
    words = {word for a in train for word in tokenize(a.sentence)}
    digests = {
        "annotations (train)": annotations_digest(train, moments=not val),
        "annotations (validation)": annotations_digest(val),
        "annotations (test)": annotations_digest(test),
        "word vectors": material.word_vectors.limited(words).digest,
    }
    own = {row.name: _settings(row, material, settings) for row, _ in jobs}
    unknown = sorted(set(settings) - {name for given in own.values() for name in given})
    if unknown:
        raise MmdistError(f"No row has a setting {unknown[0]!r}; see mmdist train --help.")
    inputs = {}
    for row, seed in jobs:
        modalities = BOTH if row.taught else row.modalities
        features = {f"features ({modality})": read[modality] for modality in modalities}
        taught = {"teacher's settings": digest_of(own[TEACHER.name])} if row.taught else {}
        inputs[row, seed] = {
            "settings": own[row.name] | {"seed": seed, "protocol": material.protocol},
            "digests": digests | features | taught,
        }
    return inputs


def _settings(row: Row, material: Material, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting of a row by its name, whatever the shape of features and words."""
    made = partial(configure, row.recipe, preset=material.preset, length=material.length)
    names = made(modalities=2).homes
    given = {name: value for name, value in settings.items() if name in names}
    return made(settings={**given, **row.settings}, modalities=2).settings


def finished(
    out: Path, inputs: Mapping[Job, Mapping[str, Any]]
) -> dict[tuple[str, int], dict[str, Any]]:
    """{"result", "seconds", "inputs"} of the finished runs, by row and seed.

    Raises MmdistError when a run was made from other inputs.
    """
    found, others = {}, []
    for (row, seed), wanted in inputs.items():
        path = run_of(out, row, seed) / DONE
        if not path.is_file():
            continue
        done = json.loads(path.read_text(encoding="utf-8"))
        if unlike := input_differences(done.get("inputs", {}), wanted):
            others.append(f"{path.parent.name} ({unlike})")
        found[row.name, seed] = done
    if others:
        raise MmdistError(
            f"'{out}' holds {len(others)} finished runs of other inputs: {', '.join(others)}. Give "
            f"another --out or delete those folders."
        )
    return found


def reproduce(
    material: Material,
    jobs: Sequence[Job],
    out: Path,
    *,
    settings: Mapping[str, Any],
    progress: Progress | None,
    told: Callable[[str], None],
) -> tuple[str, dict[str, str]]:
    """Train and score what is not finished; rewrites out/table.md after each row.

    settings: of every row whose recipe has them. told: is called with a line about each row.
    Returns the table and, by row and seed, why it failed; the others are done all the same. What
    another call is training is skipped. Raises MmdistError as `inputs_of` and `finished`.
    """
    check_out(out)
    inputs = inputs_of(material, jobs, settings)
    finished(out, inputs)
    locks = out / LOCKS  # the system releases a lock when the process that holds it ends
    locks.mkdir(parents=True, exist_ok=True)

    sizes = next(iter(inputs.values()))["settings"]
    made = f"preset {material.preset}, L {sizes['length']}, {sizes['hidden']} channels"

    def write_table() -> str:
        lines = table(finished(out, inputs), jobs, material.source, made)
        write_atomically(out / "table.md", lines.encode())
        return lines

    once = cache(lambda text: told(text) if text else None)
    shown: dict[str, Any] = {
        "progress": progress,
        "started": lambda _, queries: once(advice(material.preset, queries)),
    }
    failed: dict[str, str] = {}
    for row, seed in jobs:
        run, label = run_of(out, row, seed), f"{row.name}, seed {seed}"
        try:
            if row.taught:  # another call may be training its teacher
                with FileLock(locks / run_of(out, TEACHER, seed).name):
                    pass
            with FileLock(locks / run.name, timeout=0):
                if (run / DONE).is_file():
                    continue
                start = time.monotonic()
                names = inputs[row, seed]["settings"]
                own = {name: value for name, value in settings.items() if name in names}
                result = _train_and_score(material, row, seed, out, own, **shown)
                seconds = round(time.monotonic() - start, 1)
                done = {"result": result, "seconds": seconds, "inputs": inputs[row, seed]}
                write_json(run / DONE, done)
        except Timeout:
            told(f"{label}: another call is training it")
        except MmdistError as error:
            failed[label] = str(error)
            told(f"{label} failed: {error}")
        else:
            told(f"{label}: R@1 at IoU 0.5 {result['metrics'][JUDGED]:.2f} ({seconds:.0f} s)")
            write_table()
    # Again at the end: another call may have finished some of these rows.
    return write_table(), failed


def _train_and_score(
    material: Material, row: Row, seed: int, out: Path, settings: Mapping[str, Any], **told: Any
) -> dict[str, Any]:
    """told: `progress` and `started` of `train_run`."""
    run, teacher = run_of(out, row, seed), run_of(out, TEACHER, seed)
    if row.taught and not (teacher / DONE).is_file():
        raise MmdistError(f"its teacher '{teacher}' is not finished.")
    given = {
        name: value for name, value in vars(material).items() if name not in ("source", "test_path")
    }
    train_run(
        recipe_name=row.recipe,
        out=run,
        seed=seed,
        modalities=row.modalities,
        teacher=teacher if row.taught else None,
        overrides={**settings, **row.settings},
        more_epochs=False,
        **given,
        **told,
    )
    same = ("features_path", "flow_features_path", "durations", "protocol", "device")
    result = evaluate_run(
        run,
        annotations_path=material.test_path,
        progress=told["progress"],
        **{name: given[name] for name in same},
    )
    return {name: value for name, value in result.items() if name != "out"}
