"""A student's teacher: what it answers to the training pairs, asked once and stored.

Shape suffixes: Q queries, B batch, L positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mmdist_e2e.grounding.answer import (
    INFERENCE_BATCH,
    GroundingModel,
    Progress,
    score_proposals,
)
from mmdist_e2e.grounding.checkpoint import (
    digest_of,
    load_checkpoint,
    model_digest,
    tensors_digest,
)
from mmdist_e2e.grounding.data.annotations import Annotation
from mmdist_e2e.grounding.data.batches import batches, make_items
from mmdist_e2e.grounding.data.features import FeatureTable, load_features, places_of
from mmdist_e2e.grounding.losses import Taught, pick
from mmdist_e2e.store import write_atomically
from mmdist_e2e.structures import MmdistError

FILE = "teacher.safetensors"


@dataclass(frozen=True)
class TeacherAnswers:
    """Of every training query, in the order of the annotations.

    centers_Q, widths_Q: the span of k^T = argmax of Eq. 9. maps_QL: m^T.
    """

    centers_Q: Tensor
    widths_Q: Tensor
    maps_QL: Tensor

    def of(self, queries_B: Tensor) -> Taught:
        """The answers to a batch, where the batch lies."""
        device = queries_B.device
        return Taught(*(each_Q[queries_B.cpu()].to(device) for each_Q in vars(self).values()))


@torch.inference_mode()
def teach(
    teacher: GroundingModel,
    annotations: Sequence[Annotation],
    table: FeatureTable,
    *,
    progress: Progress | None = None,
) -> TeacherAnswers:
    """Ask a teacher about the training pairs: eval mode, fixed masks, so no seed enters.

    table: features of the teacher's modalities. Raises MmdistError when they were made otherwise.
    """
    teacher.check_table(table)
    model = teacher.model.to(table.data_VLF.device).eval()
    items = make_items(annotations, table, teacher.vocabulary)
    parts: list[tuple[Tensor, ...]] = []
    done = 0
    for batch in batches(items, table, INFERENCE_BATCH, range(len(items))):
        proposals = model.propose(batch.frames_BLF, batch.words_BWE, batch.is_word_BW)
        scored = score_proposals(model, batch, proposals)
        best_B = scored.scores_BK.argmax(dim=1)
        spans = pick(scored.centers_BK, best_B), pick(scored.widths_BK, best_B)
        parts.append(tuple(t.cpu().clone() for t in (*spans, model.activate(batch, proposals))))
        done += len(best_B)
        if progress:
            progress("asking the teacher", done, len(items))
    return TeacherAnswers(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def cached_answers(
    path: Path,
    teacher: GroundingModel,
    annotations: Sequence[Annotation],
    table: FeatureTable,
    *,
    progress: Progress | None = None,
) -> TeacherAnswers:
    """`teach`, stored in `path` and read from there for the same teacher, pairs and features."""
    pairs = [[a.video, a.sentence] for a in annotations]
    features = [list(table.videos), tensors_digest({"features": table.data_VLF})]
    identity = digest_of([model_digest(teacher), pairs, features])
    if path.is_file():
        try:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("identity") == identity:
                    return TeacherAnswers(**{n: file.get_tensor(n) for n in file.keys()})  # noqa: SIM118
        except (OSError, SafetensorError):
            pass  # damaged: asked again, and replaced
    answers = teach(teacher, annotations, table, progress=progress)
    tensors = {name: tensor.contiguous() for name, tensor in vars(answers).items()}
    write_atomically(path, save(tensors, metadata={"identity": identity}))
    return answers


def load_teacher(
    run: Path | None,
    annotations: Sequence[Annotation],
    features_path: Path,
    flow_features_path: Path | None,
    length: int,
) -> tuple[GroundingModel, FeatureTable]:
    """A student's teacher, and the features that it reads of the training pairs.

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
    places = places_of(trained.modalities, features_path, flow_features_path)
    return trained, load_features(places, [a.video for a in annotations], length=length)
