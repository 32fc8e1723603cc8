"""A student's teacher: what it answers to the training pairs, asked once in a training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mmdist_e2e.grounding.answer import INFERENCE_BATCH, GroundingModel, Progress, predict_batch
from mmdist_e2e.grounding.checkpoint import (
    load_checkpoint,
)
from mmdist_e2e.grounding.data.annotations import Annotation
from mmdist_e2e.grounding.data.batches import batches, make_items
from mmdist_e2e.grounding.data.features import FeatureTable
from mmdist_e2e.grounding.losses import Taught, pick
from mmdist_e2e.structures import MmdistError


@torch.inference_mode()
def teach(
    teacher: GroundingModel,
    annotations: Sequence[Annotation],
    table: FeatureTable,
    *,
    progress: Progress | None = None,
) -> Taught:
    """Ask a teacher about the training pairs: eval mode, fixed masks, so no seed enters.

    table: features of the teacher's modalities. Raises MmdistError when they were made otherwise.
    """
    teacher.check_features(table.matters)
    model = teacher.model.to(table.data_VLF.device).eval()
    items = make_items(annotations, table, teacher.vocabulary)
    parts: list[tuple[Tensor, ...]] = []
    done = 0
    for batch in batches(items, table, INFERENCE_BATCH, range(len(items))):
        proposals = model.propose(batch.frames_BLF, batch.words_BWE, batch.is_word_BW)
        scored = predict_batch(model, batch, proposals)
        best_B = scored.scores_BK.argmax(dim=1)
        spans = pick(scored.centers_BK, best_B), pick(scored.widths_BK, best_B)
        parts.append(tuple(t.cpu().clone() for t in (*spans, model.activate(batch, proposals))))
        done += len(best_B)
        if progress:
            progress("asking the teacher", done, len(items))
    return Taught(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def load_teacher(run: Path | None, length: int) -> GroundingModel:
    """A student's teacher.

    Raises MmdistError when a student of `length` positions cannot learn from it.
    """
    if run is None:
        raise MmdistError(
            "A student needs a teacher; give --teacher RUN, a run of mmdist train teacher."
        )
    trained = load_checkpoint(run)
    recipe = trained.recipe
    if trained.model.local is None:
        raise MmdistError(
            f"A {recipe.name} has no activation map to learn from; give a run of "
            f"mmdist train teacher (or baseline) as --teacher."
        )
    if recipe.model.length != length:
        raise MmdistError(
            f"The teacher reads {recipe.model.length} positions and the student "
            f"{length}; give --length {recipe.model.length}."
        )
    return trained
