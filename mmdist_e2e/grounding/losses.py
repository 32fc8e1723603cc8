"""One function a term of the losses.

Every sentence is scored over its own words only, so that no value depends on the batch's other
sentences or on their order.

Shape suffixes: B batch, M masks, K proposals, W words, V output words + 1, N grid positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdist_e2e.grounding.datasets import Batch
from mmdist_e2e.grounding.models import GlobalBranch, Proposals
from mmdist_e2e.grounding.text import PADDING_ID

LABEL_SMOOTHING = 0.1


def reconstruction_loss(logits_BMWV: Tensor, ids_BW: Tensor) -> Tensor:
    """Eq. 1, [B, M]: mean over a sentence's words of 0.9·NLL + (0.1/V)·Σ_v(-log p_v).

    Words with id 0 (padding, or outside the output vocabulary) are not scored; a sentence with
    none left gives 0.
    """
    log_p = F.log_softmax(logits_BMWV.float(), dim=-1)
    ids_BMW1 = ids_BW[:, None, :, None].expand(*log_p.shape[:3], 1)
    picked = -log_p.gather(-1, ids_BMW1).squeeze(-1)
    spread = -log_p.mean(dim=-1)
    word_loss = (1 - LABEL_SMOOTHING) * picked + LABEL_SMOOTHING * spread
    scored_B1W = (ids_BW != PADDING_ID).unsqueeze(1)
    count_B1 = scored_B1W.sum(-1).clamp_min(1)
    return torch.where(scored_B1W, word_loss, 0.0).sum(-1) / count_B1


def best_proposal(loss_BK: Tensor) -> Tensor:
    """Eq. 2, [B]: the proposal from which the sentence is rebuilt best."""
    return loss_BK.argmin(dim=1)


def hinge(lower_B: Tensor, upper_B: Tensor, margin: float) -> Tensor:
    """Scalar: mean of max(0, lower - upper + margin)."""
    return (lower_B - upper_B + margin).clamp_min(0).mean()


def diversity_loss(masks_BKN: Tensor, prior: float) -> Tensor:
    """Scalar: ‖λI - GGᵀ‖²_F over K×K, each mask divided by its sum, averaged over the batch.

    λ = `prior` is a prior on moment length: it pulls widths to σ/(2√π·λ·(N - 1)).
    """
    rows_BKN = masks_BKN / masks_BKN.sum(-1, keepdim=True)
    gram_BKK = rows_BKN @ rows_BKN.transpose(1, 2)
    eye_KK = torch.eye(gram_BKK.shape[-1], device=gram_BKK.device)
    return (prior * eye_KK - gram_BKK).square().sum((1, 2)).mean()


@dataclass(frozen=True)
class LossConfig:
    """Weights and margins of CPL's loss; a weight of 0 switches its term off."""

    contrast_weight: float = 1.0  # α₁
    diversity_weight: float = 5.0  # α₂
    diversity_prior: float = 0.146  # λ, at N = 50
    margin_whole: float = 0.1
    margin_negatives: float = 0.15
    negatives: bool = True
    negative_growth: float = 0.5  # γ_neg: ratio = (epoch / epochs) ** γ_neg


def cpl_loss(
    model: GlobalBranch,
    batch: Batch,
    masked_BW: Tensor,
    config: LossConfig,
    *,
    ratio: float,
) -> dict[str, Tensor]:
    """CPL's loss of a batch; returns its terms (scalars) and their sum as `loss`.

    k* is chosen without gradient and without dropout; then only what enters the loss is computed
    with gradient: k*, its two negatives, and the whole video. The rest has no gradient (Eq. 2 is
    an argmin), so this equals computing all of it.
    """
    proposals = model.propose(batch.frames_BLF, batch.words_BWE, batch.is_word_BW)
    masks_BKN = model.proposal_masks(proposals.centers_BK, proposals.widths_BK)
    best_B = choose_proposal(model, proposals, masks_BKN, batch.ids_BW, masked_BW)
    rows = torch.arange(len(best_B), device=best_B.device)
    masks_BMN = masks_BKN[rows, best_B].unsqueeze(1)
    if config.negatives:
        negatives_B2N = model.negative_masks(
            proposals.centers_BK[rows, best_B], proposals.widths_BK[rows, best_B], ratio
        )
        masks_BMN = torch.cat([masks_BMN, negatives_B2N], dim=1)
    memory = model.remember(proposals.kept_BND, masks_BMN, whole=True)
    logits_BMWV = model.reconstruct(proposals, masked_BW, memory)
    loss_BM = reconstruction_loss(logits_BMWV, batch.ids_BW)
    best_loss_B, whole_B = loss_BM[:, 0], loss_BM[:, -1]
    terms = {
        "reconstruction": best_loss_B.mean(),
        "whole": whole_B.mean(),
        "hinge_whole": hinge(best_loss_B, whole_B, config.margin_whole),
        "diversity": diversity_loss(masks_BKN, config.diversity_prior),
    }
    contrast = terms["hinge_whole"]
    if config.negatives:
        terms["hinge_left"] = hinge(best_loss_B, loss_BM[:, 1], config.margin_negatives)
        terms["hinge_right"] = hinge(best_loss_B, loss_BM[:, 2], config.margin_negatives)
        contrast = contrast + terms["hinge_left"] + terms["hinge_right"]
    terms["loss"] = (
        (terms["reconstruction"] + terms["whole"]) / 2
        + config.contrast_weight * contrast
        + config.diversity_weight * terms["diversity"]
    )
    return terms


@torch.no_grad()
def choose_proposal(
    model: GlobalBranch,
    proposals: Proposals,
    masks_BKN: Tensor,
    ids_BW: Tensor,
    masked_BW: Tensor,
) -> Tensor:
    """Eq. 2 over all K proposals, [B]; without dropout, whose noise would choose with it."""
    training = model.training
    model.eval()
    memory = model.remember(proposals.kept_BND, masks_BKN)
    loss_BK = reconstruction_loss(model.reconstruct(proposals, masked_BW, memory), ids_BW)
    model.train(training)
    return best_proposal(loss_BK)
