"""Deterministic answers: every proposal scored by how well the query is rebuilt from it.

Shape suffixes: B batch, K proposals, P mask patterns, W words, L positions, F channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmdist_e2e.grounding.datasets import Batch, FeatureTable, Item, batches, mask_patterns
from mmdist_e2e.grounding.losses import reconstruction_loss
from mmdist_e2e.grounding.models import GlobalBranch

INFERENCE_BATCH = 32
Progress = Callable[[str, int, int], None]  # what, done, of how many


@dataclass(frozen=True)
class Predictions:
    """K spans a query, best first. starts, ends [Q, K] in [0, 1] of the video; scores [Q, K]."""

    starts: NDArray[np.float64]
    ends: NDArray[np.float64]
    scores: NDArray[np.float64]


@torch.inference_mode()
def predict_batch(model: GlobalBranch, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Centers, widths and reconstruction losses, [B, K] each.

    The loss is the mean over a sentence's P mask patterns, so it depends on no seed; the frames
    are encoded once for all patterns. The model must be in eval mode.
    """
    assert not model.training
    proposals = model.propose(batch.frames_BLF, batch.words_BWE, batch.is_word_BW)
    masks = model.proposal_masks(proposals.centers_BK, proposals.widths_BK)
    memory = model.remember(proposals.kept_BND, masks)
    patterns_PBW, has_pattern_PB = mask_patterns(batch.is_word_BW)
    total_BK = torch.zeros_like(proposals.centers_BK)
    for masked_BW, has_B in zip(patterns_PBW, has_pattern_PB, strict=True):
        logits = model.reconstruct(proposals, masked_BW, memory)
        loss_BK = reconstruction_loss(logits, batch.ids_BW)
        total_BK += torch.where(has_B[:, None], loss_BK, 0.0)
    count_B = has_pattern_PB.sum(dim=0)
    return proposals.centers_BK, proposals.widths_BK, total_BK / count_B[:, None]


def rank(centers_BK: Tensor, widths_BK: Tensor, losses_BK: Tensor) -> Predictions:
    """Proposals as spans [max(c - w/2, 0), min(c + w/2, 1)], the best rebuilt first."""
    centers, widths, losses = (t.double().cpu().numpy() for t in (centers_BK, widths_BK, losses_BK))
    order = np.argsort(losses, axis=1, kind="stable")
    starts = np.maximum(centers - widths / 2, 0)
    ends = np.minimum(centers + widths / 2, 1)
    return Predictions(*(np.take_along_axis(a, order, axis=1) for a in (starts, ends, -losses)))


def predict(
    model: GlobalBranch,
    items: Sequence[Item],
    table: FeatureTable,
    *,
    precision: str = "fp32",
    progress: Progress | None = None,
) -> Predictions:
    """Answer every item. Sentences of like length share a batch: less padding, same answers."""
    was_training = model.training
    model.eval()
    order = sorted(range(len(items)), key=lambda i: len(items[i].sentence.tokens))
    outputs: list[tuple[Tensor, Tensor, Tensor]] = []
    done = 0
    for batch in batches(items, table, INFERENCE_BATCH, order):
        device = batch.frames_BLF.device.type
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            outputs.append(predict_batch(model, batch))
        done += len(batch.frames_BLF)
        if progress:
            progress("answering", done, len(items))
    model.train(was_training)
    ranked = rank(*(torch.cat(parts) for parts in zip(*outputs, strict=True)))
    back = np.argsort(order)
    return Predictions(ranked.starts[back], ranked.ends[back], ranked.scores[back])
