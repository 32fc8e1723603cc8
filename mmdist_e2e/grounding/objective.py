"""The loss of a batch: Eqs. 1-8 put together, and CPL's own with the same pieces.

Shape suffixes: B batch, M masks, K proposals, W words, N grid positions, L positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmdist_e2e.grounding.datasets import Batch
from mmdist_e2e.grounding.local import mean_map
from mmdist_e2e.grounding.losses import (
    best_proposal,
    diversity_loss,
    hinge,
    local_loss,
    map_distance,
    match_log_probability,
    mutual_loss,
    nearest_span,
    negative_pairs,
    reconstruction_loss,
    scored_words,
    top_mean,
)
from mmdist_e2e.grounding.models import GlobalBranch, GroundingNetwork, Proposals
from mmdist_e2e.grounding.parallel import Peers
from mmdist_e2e.structures import MmdistError, check_choice

DISTANCES = ("l1", "l2", "norm")


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


@dataclass(frozen=True)
class MutualConfig:
    """The teacher's local branches, Eqs. 13 and 14.

    channels: of each modality, in the order of the features. mutual_weight: μ; 0 switches L_mutual
    off. mutual_distance: φ, a kind of `map_distance`. taught_map: what L_local is of, the "mean"
    map m_T or the mean over "each" modality's own.
    """

    channels: tuple[int, ...]
    mutual_weight: float = 1.0
    mutual_distance: str = "l1"
    taught_map: str = "mean"

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", tuple(self.channels))  # JSON knows lists alone
        check_choice("mutual_distance", self.mutual_distance, DISTANCES)
        check_choice("taught_map", self.taught_map, ("mean", "each"))
        if len(self.channels) != 2:
            raise MmdistError(
                f"A teacher reads two modalities; these features have {len(self.channels)}."
            )


@dataclass(frozen=True)
class DistillConfig:
    """What a student takes from its teacher, Eqs. 10-12.

    distill_weight: β. distill_global, distill_local: switches of Eqs. 10 and 11.
    student_proposal: which one learns that it is right: that of highest "iou" with the teacher's
    moment, the one of the same "index", or the "teacher"'s own span. distill_distance: φ, a kind
    of `map_distance`.
    """

    distill_weight: float = 0.9
    distill_global: bool = True
    distill_local: bool = True
    student_proposal: str = "iou"
    distill_distance: str = "l1"

    def __post_init__(self) -> None:
        check_choice("student_proposal", self.student_proposal, ("iou", "index", "teacher"))
        check_choice("distill_distance", self.distill_distance, DISTANCES)
        if self.distill_weight < 0:
            raise MmdistError(f"distill_weight must not be negative; got {self.distill_weight}.")


@dataclass(frozen=True)
class Taught:
    """A teacher's answers to a batch: k^T int64, its span in units of the video, and m^T."""

    proposals_B: Tensor
    centers_B: Tensor
    widths_B: Tensor
    maps_BL: Tensor


def batch_loss(
    model: GlobalBranch,
    batch: Batch,
    masked_BW: Tensor,
    config: LossConfig,
    matching: MatchingConfig | None = None,
    mutual: MutualConfig | None = None,
    distill: DistillConfig | None = None,
    taught: Taught | None = None,
    peers: Peers | None = None,
    *,
    ratio: float,
) -> dict[str, Tensor]:
    """Eqs. 8, 12 and the teacher's: every term of a batch (scalars), their weighted sum as `loss`.

    masked_BW: the words hidden from reconstruction. ratio: how far CPL's negatives reach.
    taught: the teacher's answers, with `distill`. peers: where other processes have other rows of
    the batch; the terms are means over this one's.
    """
    proposals = model.propose(batch.frames_BLF, batch.words_BWE, batch.is_word_BW)
    pseudo = None
    if distill is not None and distill.distill_global:
        assert taught is not None
        pseudo = pseudo_span(proposals, taught, distill.student_proposal)
    terms = global_terms(
        model, proposals, batch.ids_BW, masked_BW, config, ratio=ratio, pseudo=pseudo
    )
    hinges = [terms[name] for name in terms if name.startswith("hinge")]
    loss = (
        config.reconstruction_weight * terms["reconstruction"]
        + config.whole_weight * terms["whole"]
        + config.diversity_weight * terms["diversity"]
        + config.contrast_weight * sum(hinges)
    )
    if matching is not None and matching.local_weight:
        assert isinstance(model, GroundingNetwork)
        gather = peers.gather if peers else None
        maps = model.activate_each(batch, proposals, all_pairs=True, gather=gather)
        apart = mutual is not None and mutual.taught_map == "each"
        fitted = maps if apart else [mean_map(maps)]
        each = [local_term(m, batch, matching, peers) for m in fitted]
        terms["local"] = torch.stack(each).mean()
        loss = loss + matching.local_weight * terms["local"]
        rows = torch.arange(len(maps[0]), device=maps[0].device)
        own_B = peers.own(len(rows)) if peers else rows
        own = [maps_BQL[rows, own_B] for maps_BQL in maps]  # [B, L] of the matched pairs
        if mutual is not None and mutual.mutual_weight:
            terms["mutual"] = mutual_loss(own[0], own[1], mutual.mutual_distance)
            loss = loss + mutual.mutual_weight * terms["mutual"]
        if distill is not None and distill.distill_local:
            assert taught is not None
            terms["distill_local"] = map_distance(
                mean_map(own), taught.maps_BL, distill.distill_distance
            )
            weight = distill.distill_weight * matching.local_weight
            loss = loss + weight * terms["distill_local"]
    if distill is not None and distill.distill_global:
        loss = loss + distill.distill_weight * terms["distill_global"]
    return terms | {"loss": loss}


def pseudo_span(proposals: Proposals, taught: Taught, kind: str) -> tuple[Tensor, Tensor]:
    """Center and width [B] of what the student takes for right; of its own with gradient."""
    if kind == "teacher":
        return taught.centers_B, taught.widths_B
    centers_BK, widths_BK = proposals.centers_BK, proposals.widths_BK
    chosen_B = taught.proposals_B
    if kind == "iou":
        chosen_B = nearest_span(
            centers_BK.detach(), widths_BK.detach(), taught.centers_B, taught.widths_B
        )
    rows = torch.arange(len(chosen_B), device=chosen_B.device)
    return centers_BK[rows, chosen_B], widths_BK[rows, chosen_B]


def global_terms(
    model: GlobalBranch,
    proposals: Proposals,
    ids_BW: Tensor,
    masked_BW: Tensor,
    config: LossConfig,
    *,
    ratio: float,
    pseudo: tuple[Tensor, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The terms of Eq. 3, CPL's hinges to its negatives and its diversity; Eq. 10 of `pseudo`.

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
    if pseudo is not None:
        masks_BMN = torch.cat([masks_BMN, model.proposal_masks(*pseudo).unsqueeze(1)], dim=1)
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
    if pseudo is not None:
        pseudo_B = loss_BM[:, -2]
        terms["distill_global"] = (
            pseudo_B.mean() + whole_B.mean() + hinge(pseudo_B, whole_B, config.margin_whole)
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
    scored_BW = scored_words(ids_BW, masked_BW, model.config.scored_words)
    logits_BMWV = model.reconstruct(proposals, masked_BW, memory)
    model.train(training)
    return best_proposal(reconstruction_loss(logits_BMWV, ids_BW, scored_BW))


def local_term(
    maps_BQL: Tensor, batch: Batch, config: MatchingConfig, peers: Peers | None = None
) -> Tensor:
    """L_local of Eqs. 5-7 from the maps of this batch's videos and all processes' sentences."""
    count = max(1, int(maps_BQL.shape[-1] // config.top_divisor))
    videos, sentences, own_B = batch.videos_B, batch.sentences_B, None
    if peers is not None:
        videos, sentences = peers.videos_G, peers.sentences_G
        own_B = peers.own(len(maps_BQL))
    negatives = negative_pairs(
        videos,
        sentences,
        same_video=config.same_video_negatives,
        same_sentence=config.same_sentence_negatives,
    )
    negatives_BQ = negatives if own_B is None else negatives[own_B]
    fit_BQ = top_mean(maps_BQL, count)
    return local_loss(match_log_probability(fit_BQ, config.temperature, negatives_BQ, own_B))
