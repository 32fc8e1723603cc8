"""One function per equation (or term of CPL's that the paper keeps), and their sum per recipe.

Every sentence is scored over its own words only, so that no reconstruction depends on the batch's
other sentences or on their order.

Shape suffixes: B batch, M masks, K proposals, W words, V output words + 1, N grid positions,
L positions of the video, Q sentences; in [B, B, …] the video comes first, the sentence second.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmdist_e2e.grounding.answer import spans
from mmdist_e2e.grounding.config import LossConfig, MatchingConfig, Recipe
from mmdist_e2e.grounding.data.batches import Batch
from mmdist_e2e.grounding.network import (
    GroundingNetwork,
    Proposals,
    mean_map,
    reconstruction_loss,
)
from mmdist_e2e.grounding.parallel import Peers


def rows_of(values: Tensor) -> Tensor:
    """[B]: 0, 1, … of the first dimension."""
    return torch.arange(len(values), device=values.device)


def pick(values: Tensor, index_B: Tensor) -> Tensor:
    """[B, K, …] -> [B, …]: of every row its own entry."""
    return values[rows_of(values), index_B]


def best_proposal(loss_BK: Tensor) -> Tensor:
    """Eq. 2, [B]: the proposal from which the sentence is rebuilt best."""
    return loss_BK.argmin(dim=1)


def hinge(lower_B: Tensor, upper_B: Tensor, margin: float) -> Tensor:
    """The last term of Eq. 3, a scalar: mean of max(0, lower - upper + ξ)."""
    return (lower_B - upper_B + margin).clamp_min(0).mean()


def diversity_loss(masks_BKN: Tensor, prior: float) -> Tensor:
    """CPL's, a scalar: ‖λI - GGᵀ‖²_F over K×K, each mask divided by its sum, batch mean.

    λ = `prior` is a prior on moment length: it pulls widths to σ/(2√π·λ·(N - 1)).
    """
    rows_BKN = masks_BKN / masks_BKN.sum(-1, keepdim=True)
    gram_BKK = rows_BKN @ rows_BKN.transpose(1, 2)
    eye_KK = torch.eye(gram_BKK.shape[-1], device=gram_BKK.device)
    return (prior * eye_KK - gram_BKK).square().sum((1, 2)).mean()


def top_mean(maps_BBL: Tensor, count: int) -> Tensor:
    """Eq. 5, [B, B]: how well video i fits sentence j, the mean of the L_T largest of m_ij."""
    return maps_BBL.topk(count, dim=-1, sorted=False).values.mean(dim=-1)


def negative_pairs(videos_Q: Tensor, sentences_Q: Tensor) -> Tensor:
    """[Q, Q] bool: whether sentence j stands against the own sentence of video i.

    videos_Q, sentences_Q: equal numbers where two members share a video, or a sentence; other
    sentences of the same video, and equal sentences of other videos, do not.
    """
    return (videos_Q[:, None] != videos_Q) & (sentences_Q[:, None] != sentences_Q)


def match_log_probability(
    fit_BQ: Tensor, temperature: float, negatives_BQ: Tensor, own_B: Tensor | None = None
) -> Tensor:
    """Eq. 6 as a logarithm, [B]: that video i matches its own sentence, not a negative.

    own_B: which of the Q sentences is the own one, by default sentence i.
    """
    own_B = rows_of(fit_BQ) if own_B is None else own_B
    others_BQ = ~negatives_BQ
    others_BQ[rows_of(fit_BQ), own_B] = False
    return pick((fit_BQ / temperature).masked_fill(others_BQ, -torch.inf).log_softmax(1), own_B)


def local_loss(log_p_B: Tensor) -> Tensor:
    """Eq. 7, a scalar: -(1/N) Σ_j log p_j."""
    return -log_p_B.mean()


def map_distance(maps_BL: Tensor, reference_BL: Tensor) -> Tensor:
    """φ of Eqs. 11 and 14, a scalar: the mean of |m - m'|. The reference gets no gradient."""
    return (maps_BL - reference_BL.detach()).abs().mean()


def mutual_loss(first_BL: Tensor, second_BL: Tensor) -> Tensor:
    """Eq. 14, a scalar: φ(m_1, δ(m_2)) + φ(m_2, δ(m_1)), δ stopping the gradient."""
    return map_distance(first_BL, second_BL) + map_distance(second_BL, first_BL)


def nearest_span(
    centers_BK: Tensor, widths_BK: Tensor, center_B: Tensor, width_B: Tensor
) -> Tensor:
    """[B]: the proposal of highest IoU with a span, both cut at the video's ends."""
    starts_BK, ends_BK = spans(centers_BK, widths_BK)
    start_B1, end_B1 = spans(center_B.unsqueeze(1), width_B.unsqueeze(1))
    shared_BK = (torch.minimum(ends_BK, end_B1) - torch.maximum(starts_BK, start_B1)).clamp_min(0)
    union_BK = (ends_BK - starts_BK) + (end_B1 - start_B1) - shared_BK
    return (shared_BK / union_BK.clamp_min(torch.finfo(union_BK.dtype).tiny)).argmax(dim=1)


@dataclass(frozen=True)
class Taught:
    """A teacher's answers to B queries: the span of k^T in units of the video, and m^T.

    k^T is the proposal of the highest score (Eq. 9).
    """

    centers_B: Tensor
    widths_B: Tensor
    maps_BL: Tensor

    def of(self, queries: Tensor) -> Taught:
        """The answers to some of the queries, on the device of their numbers."""
        return Taught(*(each[queries.cpu()].to(queries.device) for each in vars(self).values()))


class BatchLoss(nn.Module):
    """The loss of a recipe, as a module since DistributedDataParallel wraps modules."""

    def __init__(self, model: GroundingNetwork, recipe: Recipe) -> None:
        super().__init__()
        self.model, self.recipe = model, recipe

    def forward(
        self,
        batch: Batch,
        masked_BW: Tensor,
        ratio: float,
        taught: Taught | None = None,
        peers: Peers | None = None,
    ) -> dict[str, Tensor]:
        """Eqs. 8, 12 and the teacher's: every term (scalars), and their weighted sum as `loss`.

        masked_BW: the words hidden from reconstruction. ratio: how far CPL's negatives reach.
        taught: the teacher's answers, for a student. peers: where other processes have other rows
        of the batch; the terms are means over the rows of this one.
        """
        model, loss_config = self.model, self.recipe.loss
        matching, mutual, distill = self.recipe.matching, self.recipe.mutual, self.recipe.distill
        proposals = model.propose(batch.frames_BLF, batch.words_BWE, batch.is_word_BW)
        pseudo = None
        if distill and distill.distill_global:
            assert taught is not None
            places = proposals.centers_BK, proposals.widths_BK
            nearest_B = nearest_span(*places, taught.centers_B, taught.widths_B)
            pseudo = model.proposal_masks(*(pick(t, nearest_B) for t in places))
        terms = global_terms(model, proposals, batch.ids_BW, masked_BW, loss_config, ratio, pseudo)
        hinges = [term for name, term in terms.items() if name.startswith("hinge")]
        loss = (
            loss_config.reconstruction_weight * terms["reconstruction"]
            + loss_config.whole_weight * terms["whole"]
            + loss_config.diversity_weight * terms["diversity"]
            + loss_config.contrast_weight * sum(hinges)
        )
        if matching and matching.local_weight:
            gather = peers.gather if peers else None
            maps = model.activate_each(batch, proposals, all_pairs=True, gather=gather)
            terms["local"] = local_term(mean_map(maps), batch, matching, peers)
            loss = loss + matching.local_weight * terms["local"]
            own_B = peers.own_B if peers else rows_of(batch.ids_BW)
            own = [pick(maps_BQL, own_B) for maps_BQL in maps]  # [B, L] of the matched pairs
            if mutual and mutual.mutual_weight:
                terms["mutual"] = mutual_loss(own[0], own[1])
                loss = loss + mutual.mutual_weight * terms["mutual"]
            if distill and distill.distill_local:
                assert taught is not None
                terms["distill_local"] = map_distance(mean_map(own), taught.maps_BL)
                weight = distill.distill_weight * matching.local_weight
                loss = loss + weight * terms["distill_local"]
        if distill and distill.distill_global:
            loss = loss + distill.distill_weight * terms["distill_global"]
        return terms | {"loss": loss}


def global_terms(
    model: GroundingNetwork,
    proposals: Proposals,
    ids_BW: Tensor,
    masked_BW: Tensor,
    config: LossConfig,
    ratio: float,
    pseudo_BN: Tensor | None = None,
) -> dict[str, Tensor]:
    """The terms of Eq. 3, CPL's hinges to its negatives and its diversity; Eq. 10 of `pseudo_BN`.

    pseudo_BN: masks of the proposals nearest to the teacher's moments.
    k* is chosen without gradient and dropout. Only what enters the loss is computed with gradient
    (k*, its two negatives, the whole video): Eq. 2 is an argmin, so the rest has none.
    """
    masks_BKN = model.proposal_masks(proposals.centers_BK, proposals.widths_BK)
    best_B = choose_proposal(model, proposals, masks_BKN, ids_BW, masked_BW)
    masks = [pick(masks_BKN, best_B).unsqueeze(1)]
    with_negatives = config.negatives and config.contrast_weight != 0
    if with_negatives:
        center_B, width_B = (pick(t, best_B) for t in (proposals.centers_BK, proposals.widths_BK))
        masks.append(model.negative_masks(center_B, width_B, ratio))
    if pseudo_BN is not None:
        masks.append(pseudo_BN.unsqueeze(1))
    memory = model.remember(proposals.kept_BND, torch.cat(masks, dim=1), whole=True)
    logits_BMWV = model.reconstruct(proposals, masked_BW, memory)
    loss_BM = reconstruction_loss(logits_BMWV, ids_BW)
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
    if pseudo_BN is not None:
        pseudo_B = loss_BM[:, -2]
        terms["distill_global"] = (
            pseudo_B.mean() + whole_B.mean() + hinge(pseudo_B, whole_B, config.margin_whole)
        )
    return terms


@torch.no_grad()
def choose_proposal(
    model: GroundingNetwork,
    proposals: Proposals,
    masks_BKN: Tensor,
    ids_BW: Tensor,
    masked_BW: Tensor,
) -> Tensor:
    """Eq. 2 over all K proposals, [B]; without dropout, whose noise would affect the choice."""
    training = model.training
    model.eval()
    memory = model.remember(proposals.kept_BND, masks_BKN)
    logits_BMWV = model.reconstruct(proposals, masked_BW, memory)
    model.train(training)
    return best_proposal(reconstruction_loss(logits_BMWV, ids_BW))


def local_term(
    maps_BQL: Tensor, batch: Batch, config: MatchingConfig, peers: Peers | None = None
) -> Tensor:
    """L_local of Eqs. 5-7 from the maps of this batch's videos and all processes' sentences."""
    fit_BQ = top_mean(maps_BQL, max(1, int(maps_BQL.shape[-1] // config.top_divisor)))
    if peers is None:
        own_B, negatives_BQ = None, negative_pairs(batch.videos_B, batch.sentences_B)
    else:
        own_B = peers.own_B
        negatives_BQ = negative_pairs(peers.videos_G, peers.sentences_G)[own_B]
    return local_loss(match_log_probability(fit_BQ, config.temperature, negatives_BQ, own_B))
