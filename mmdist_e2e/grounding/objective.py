"""The loss of a batch: Eqs. 1-8 put together, and CPL's own with the same pieces.

Shape suffixes: B batch, M masks, K proposals, W words, N grid positions, L positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmdist_e2e.grounding.datasets import Batch
from mmdist_e2e.grounding.losses import (
    best_proposal,
    diversity_loss,
    hinge,
    local_loss,
    match_log_probability,
    negative_pairs,
    reconstruction_loss,
    scored_words,
    top_mean,
)
from mmdist_e2e.grounding.models import GlobalBranch, GroundingNetwork, Proposals
from mmdist_e2e.structures import MmdistError


@dataclass(frozen=True)
class LossConfig:
    """Weights and margins of the global loss; the defaults are CPL's on Charades-STA.

    A weight of 0 switches its term off; `contrast_whole` and `negatives` switch the hinges to the
    whole video and to CPL's two negatives, all of which `contrast_weight` multiplies. Eq. 3 has
    reconstruction_weight = whole_weight = contrast_weight = 1.
    """

    reconstruction_weight: float = 0.5  # of L_rec[k*]
    whole_weight: float = 0.5  # of L_rec of the whole video
    contrast_weight: float = 1.0  # α₁ of CPL
    contrast_whole: bool = True
    diversity_weight: float = 5.0  # α₂ of CPL
    diversity_prior: float = 0.146  # λ, at N = 50
    margin_whole: float = 0.1  # ξ of Eq. 3
    margin_negatives: float = 0.15
    negatives: bool = True
    negative_growth: float = 0.5  # γ_neg: ratio = (epoch / epochs) ** γ_neg


@dataclass(frozen=True)
class MatchingConfig:
    """The local loss, Eqs. 5-8.

    local_weight: α of Eq. 8; 0 switches the local loss off. top_divisor: L_T = L // top_divisor.
    temperature: τ. same_video_negatives, same_sentence_negatives: whether other sentences of a
    video, and equal sentences of other videos, stand against its own.
    """

    local_weight: float = 4.5
    top_divisor: float = 4.0
    temperature: float = 0.15
    same_video_negatives: bool = False
    same_sentence_negatives: bool = False

    def __post_init__(self) -> None:
        if self.temperature <= 0 or self.top_divisor < 1 or self.local_weight < 0:
            raise MmdistError(
                f"temperature must be above 0, top_divisor at least 1 and local_weight not "
                f"negative; got {self.temperature}, {self.top_divisor} and {self.local_weight}."
            )


def batch_loss(
    model: GlobalBranch,
    batch: Batch,
    masked_BW: Tensor,
    config: LossConfig,
    matching: MatchingConfig | None = None,
    *,
    ratio: float,
) -> dict[str, Tensor]:
    """Eq. 8: every term of a batch (scalars) and their weighted sum as `loss`.

    masked_BW: the words hidden from reconstruction. ratio: how far CPL's negatives reach.
    """
    proposals = model.propose(batch.frames_BLF, batch.words_BWE, batch.is_word_BW)
    terms = global_terms(model, proposals, batch.ids_BW, masked_BW, config, ratio=ratio)
    hinges = [terms[name] for name in terms if name.startswith("hinge")]
    loss = (
        config.reconstruction_weight * terms["reconstruction"]
        + config.whole_weight * terms["whole"]
        + config.diversity_weight * terms["diversity"]
        + config.contrast_weight * sum(hinges)
    )
    if matching is not None and matching.local_weight:
        assert isinstance(model, GroundingNetwork)
        maps_BBL = model.activate(batch, proposals, all_pairs=True)
        terms["local"] = local_term(maps_BBL, batch, matching)
        loss = loss + matching.local_weight * terms["local"]
    return terms | {"loss": loss}


def global_terms(
    model: GlobalBranch,
    proposals: Proposals,
    ids_BW: Tensor,
    masked_BW: Tensor,
    config: LossConfig,
    *,
    ratio: float,
) -> dict[str, Tensor]:
    """The terms of Eq. 3, CPL's hinges to its negatives and its diversity.

    k* is chosen without gradient and without dropout; then only what enters the loss is computed
    with gradient: k*, its two negatives, and the whole video. The rest has no gradient (Eq. 2 is
    an argmin), so this equals computing all of it.
    """
    masks_BKN = model.proposal_masks(proposals.centers_BK, proposals.widths_BK)
    best_B = choose_proposal(model, proposals, masks_BKN, ids_BW, masked_BW)
    rows = torch.arange(len(best_B), device=best_B.device)
    masks_BMN = masks_BKN[rows, best_B].unsqueeze(1)
    with_negatives = config.negatives and config.contrast_weight != 0
    if with_negatives:
        negatives_B2N = model.negative_masks(
            proposals.centers_BK[rows, best_B], proposals.widths_BK[rows, best_B], ratio
        )
        masks_BMN = torch.cat([masks_BMN, negatives_B2N], dim=1)
    memory = model.remember(proposals.kept_BND, masks_BMN, whole=True)
    logits_BMWV = model.reconstruct(proposals, masked_BW, memory)
    scored_BW = scored_words(ids_BW, masked_BW, model.config.scored_words)
    loss_BM = reconstruction_loss(logits_BMWV, ids_BW, scored_BW)
    best_loss_B, whole_B = loss_BM[:, 0], loss_BM[:, -1]
    terms = {
        "reconstruction": best_loss_B.mean(),
        "whole": whole_B.mean(),
        "diversity": diversity_loss(masks_BKN, config.diversity_prior),
    }
    if config.contrast_whole and config.contrast_weight != 0:
        terms["hinge_whole"] = hinge(best_loss_B, whole_B, config.margin_whole)
    if with_negatives:
        terms["hinge_left"] = hinge(best_loss_B, loss_BM[:, 1], config.margin_negatives)
        terms["hinge_right"] = hinge(best_loss_B, loss_BM[:, 2], config.margin_negatives)
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
    scored_BW = scored_words(ids_BW, masked_BW, model.config.scored_words)
    logits_BMWV = model.reconstruct(proposals, masked_BW, memory)
    model.train(training)
    return best_proposal(reconstruction_loss(logits_BMWV, ids_BW, scored_BW))


def local_term(maps_BBL: Tensor, batch: Batch, config: MatchingConfig) -> Tensor:
    """L_local of Eqs. 5-7 from the activation maps of all pairs of the batch."""
    count = max(1, int(maps_BBL.shape[-1] // config.top_divisor))
    negatives_BB = negative_pairs(
        batch.videos_B,
        batch.sentences_B,
        same_video=config.same_video_negatives,
        same_sentence=config.same_sentence_negatives,
    )
    fit_BB = top_mean(maps_BBL, count)
    return local_loss(match_log_probability(fit_BB, config.temperature, negatives_BB))
