"""Deterministic answers: every proposal scored by Eq. 9.

Shape suffixes: B batch, Q queries, K proposals, P mask patterns, W words, L positions, F channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmdist_e2e.grounding.datasets import Batch, FeatureTable, Item, batches, mask_patterns
from mmdist_e2e.grounding.losses import reconstruction_loss, scored_words
from mmdist_e2e.grounding.models import GlobalBranch, GroundingNetwork, Proposals

INFERENCE_BATCH = 32
Progress = Callable[[str, int, int], None]  # what, done, of how many


class Scored(NamedTuple):
    """K proposals of B queries, unranked, [B, K] each: losses_BK is r_p, scores_BK s_p of Eq. 9."""

    centers_BK: Tensor
    widths_BK: Tensor
    losses_BK: Tensor
    scores_BK: Tensor


@dataclass(frozen=True)
class Predictions:
    """K spans a query, best first, [Q, K] each.

    starts, ends in [0, 1] of the video; scores of Eq. 9; losses: the reconstruction losses r_p.
    """

    starts: NDArray[np.float64]
    ends: NDArray[np.float64]
    scores: NDArray[np.float64]
    losses: NDArray[np.float64]


def spans(centers: Tensor, widths: Tensor) -> tuple[Tensor, Tensor]:
    """Starts and ends of proposals in [0, 1]: max(c - w/2, 0) and min(c + w/2, 1)."""
    return (centers - widths / 2).clamp_min(0), (centers + widths / 2).clamp_max(1)


def mean_activation(
    maps_BL: Tensor, starts_BK: Tensor, ends_BK: Tensor, *, contrast: bool = False
) -> Tensor:
    """The mean of Eq. 9, [B, K]: of m over the snippets floor(s·L) … ceil(e·L) - 1.

    At least one snippet, the last one for a span at the video's end. contrast: plus by how much
    the mean over the rest falls short of the mean over the whole video. Within a video that ranks
    by inside minus outside; between videos, or windows of one, it still tells which fits at all.
    """
    length = maps_BL.shape[1]
    first_BK1 = (starts_BK * length).floor().clamp_max(length - 1).unsqueeze(-1)
    stop_BK1 = (ends_BK * length).ceil().unsqueeze(-1).maximum(first_BK1 + 1)
    index_L = torch.arange(length, device=maps_BL.device)
    inside_BKL = (index_L >= first_BK1) & (index_L < stop_BK1)
    total_BK = torch.where(inside_BKL, maps_BL.unsqueeze(1), 0).sum(-1)
    count_BK = inside_BKL.sum(-1)
    mean_BK = total_BK / count_BK
    if not contrast:
        return mean_BK
    video_B1 = maps_BL.sum(-1, keepdim=True)
    rest_BK = (video_B1 - total_BK) / (length - count_BK)
    short_BK = video_B1 / length - rest_BK
    return mean_BK + torch.where(count_BK < length, short_BK, 0)


def proposal_scores(activation_BK: Tensor, losses_BK: Tensor, weight: float) -> Tensor:
    """Eq. 9, [B, K]: s_p = γ · `mean_activation` - r_p."""
    return weight * activation_BK - losses_BK


@torch.inference_mode()
def predict_batch(model: GlobalBranch, batch: Batch) -> Scored:
    """Proposals and their scores; the model must be in eval mode. No seed enters."""
    proposals = model.propose(batch.frames_BLF, batch.words_BWE, batch.is_word_BW)
    return score_proposals(model, batch, proposals)


@torch.inference_mode()
def score_proposals(model: GlobalBranch, batch: Batch, proposals: Proposals) -> Scored:
    """`predict_batch`, from proposals that are at hand."""
    assert not model.training
    centers_BK, widths_BK = proposals.centers_BK, proposals.widths_BK
    losses_BK = mean_reconstruction(model, batch, proposals)
    scores_BK = -losses_BK
    if isinstance(model, GroundingNetwork) and model.score_weight:
        maps_BL = model.activate(batch, proposals)
        activation_BK = mean_activation(
            maps_BL, *spans(centers_BK, widths_BK), contrast=model.ranks_by_contrast
        )
        scores_BK = proposal_scores(activation_BK, losses_BK, model.score_weight)
    return Scored(centers_BK, widths_BK, losses_BK, scores_BK)


def mean_reconstruction(model: GlobalBranch, batch: Batch, proposals: Proposals) -> Tensor:
    """r_p, [B, K]: Eq. 1 averaged over the sentence's P mask patterns, each word counted alike.

    The frames are encoded once for all patterns.
    """
    masks = model.proposal_masks(proposals.centers_BK, proposals.widths_BK)
    memory = model.remember(proposals.kept_BND, masks)
    total_BK = torch.zeros_like(proposals.centers_BK)
    count_B1 = torch.zeros_like(total_BK[:, :1])
    for masked_BW, has_B in zip(*mask_patterns(batch.is_word_BW), strict=True):
        scored_BW = scored_words(batch.ids_BW, masked_BW, model.config.scored_words)
        words_B1 = (scored_BW.sum(1) * has_B).unsqueeze(1)
        logits_BKWV = model.reconstruct(proposals, masked_BW, memory)
        total_BK += words_B1 * reconstruction_loss(logits_BKWV, batch.ids_BW, scored_BW)
        count_B1 += words_B1
    return total_BK / count_B1.clamp_min(1)


def rank(scored: Scored) -> Predictions:
    """Proposals as spans, the highest score first; of equal ones the one proposed first."""
    centers, widths, losses, scores = (t.double().cpu() for t in scored)
    starts, ends = spans(centers, widths)
    order = np.argsort(-scores.numpy(), axis=1, kind="stable")
    ranked = (np.take_along_axis(t.numpy(), order, axis=1) for t in (starts, ends, scores, losses))
    return Predictions(*ranked)


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
    outputs: list[Scored] = []
    done = 0
    for batch in batches(items, table, INFERENCE_BATCH, order):
        device = batch.frames_BLF.device.type
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            outputs.append(predict_batch(model, batch))
        done += len(batch.frames_BLF)
        if progress:
            progress("answering", done, len(items))
    model.train(was_training)
    ranked = rank(Scored(*(torch.cat(parts) for parts in zip(*outputs, strict=True))))
    back = np.argsort(order)
    return Predictions(*(values[back] for values in vars(ranked).values()))
