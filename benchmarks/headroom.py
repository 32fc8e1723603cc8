"""What a student could gain at most: one that is taught by the training split's own timestamps.

    python benchmarks/headroom.py runs/world2 [SEED ...]      after `make world`

A run of WORK/headroom is trained and scored as the row of the student with the same seed, but for
the teacher's answers: the moment is the annotated one, and the map, inside it and outside, the mean
that the teacher's own maps have there. No weakly supervised method knows these. So the figures
tell how far a student's network and features can follow any teacher.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from mmdist_e2e.grounding import train
from mmdist_e2e.grounding.answer import GroundingModel
from mmdist_e2e.grounding.checkpoint import load_checkpoint
from mmdist_e2e.grounding.data.annotations import Annotation
from mmdist_e2e.grounding.data.batches import make_items
from mmdist_e2e.grounding.data.features import FeatureTable
from mmdist_e2e.grounding.evaluate import evaluate_run, truth_of
from mmdist_e2e.grounding.losses import Taught
from mmdist_e2e.grounding.teacher import teach
from mmdist_e2e.weights.words import shipped_word_vectors


def taught_by_timestamps(
    teacher: GroundingModel,
    annotations: list[Annotation],
    table: FeatureTable,
    **rest: Any,
) -> Taught:
    """In place of `teach`: of every pair its first annotated moment."""
    answers = teach(teacher, annotations, table, **rest)
    spans_QT2, seconds_Q = truth_of(make_items(annotations, table, teacher.vocabulary))
    moments_Q2 = torch.from_numpy(spans_QT2[:, 0] / seconds_Q[:, None]).float()
    starts_Q1, ends_Q1 = moments_Q2[:, :1], moments_Q2[:, 1:]
    maps_QL = answers.maps_BL
    middle_L = (torch.arange(maps_QL.shape[1]) + 0.5) / maps_QL.shape[1]
    inside_QL = (middle_L >= starts_Q1) & (middle_L < ends_Q1)
    return replace(
        answers,
        centers_B=moments_Q2.mean(dim=1),
        widths_B=(ends_Q1 - starts_Q1).squeeze(1),
        maps_BL=torch.where(inside_QL, maps_QL[inside_QL].mean(), maps_QL[~inside_QL].mean()),
    )


def main() -> None:
    if len(sys.argv) < 2 or not (Path(sys.argv[1]) / "rows").is_dir():
        sys.exit("Give the folder that `make world` filled, as in the first lines of this file.")
    work = Path(sys.argv[1])
    videos, features = work / "videos", work / "features"
    for seed in [int(text) for text in sys.argv[2:]] or [0, 1, 2]:
        teacher, out = work / "rows" / f"teacher-{seed}", work / "headroom" / f"student-{seed}"
        with patch.object(train, "teach", taught_by_timestamps):
            train.train_run(
                recipe_name="student",
                features_path=features,
                train_path=videos / "world_sta_train.txt",
                val_path=videos / "world_sta_val.txt",
                out=out,
                seed=seed,
                word_vectors=shipped_word_vectors(),
                teacher=teacher,
                length=load_checkpoint(teacher).recipe.model.length,
            )
        result = evaluate_run(
            out, features_path=features, annotations_path=videos / "world_sta_test.txt"
        )
        print(f"seed {seed}: {result['metrics']}", flush=True)


if __name__ == "__main__":
    main()
