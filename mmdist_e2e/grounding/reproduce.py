"""The paper's tables from anybody's features: every row over several seeds, one after another.

A row's seed is a run of its own (`train_run`, then `evaluate_run`); what is finished is not done
again, so a killed call goes on where it was. Students learn from the teacher of their own seed,
and seeds pair the rows. Several calls may share one folder: each trains what no other is at.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mmdist_e2e.grounding.annotations import load_annotations
from mmdist_e2e.grounding.evaluate import evaluate_run
from mmdist_e2e.grounding.features import open_features, places_of
from mmdist_e2e.grounding.inference import Progress
from mmdist_e2e.grounding.recipes import get_recipe
from mmdist_e2e.grounding.tables import JUDGED, TEACHER, Job, Row, table
from mmdist_e2e.grounding.train import train_run
from mmdist_e2e.store import check_out, write_atomically, write_json
from mmdist_e2e.structures import MmdistError
from mmdist_e2e.weights.words import WordVectors

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
