"""One function an equation, or a term of CPL's that the paper keeps. No function knows a network.

Every sentence is scored over its own words only, so that no reconstruction depends on the batch's
other sentences or on their order.

Shape suffixes: B batch, M masks, K proposals, W words, V output words + 1, N grid positions,
L positions of the video; in [B, B, …] the video comes first, the sentence second.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdist_e2e.grounding.text import PADDING_ID

LABEL_SMOOTHING = 0.1


def scored_words(ids_BW: Tensor, masked_BW: Tensor, kind: str) -> Tensor:
    """[B, W] bool: the words of Eq. 1, "all" of a sentence or the "masked" ones alone.

    Words with id 0 (padding, or outside the output vocabulary) never are.
    """
    scored_BW = ids_BW != PADDING_ID
    return scored_BW & masked_BW if kind == "masked" else scored_BW


def reconstruction_loss(
    logits_BMWV: Tensor, ids_BW: Tensor, scored_BW: Tensor | None = None
) -> Tensor:
    """Eq. 1, [B, M]: mean over a sentence's scored words of 0.9·NLL + (0.1/V)·Σ_v(-log p_v).

    scored_BW: as `scored_words`, by default all. A sentence with none gives 0.
    """
    if scored_BW is None:
        scored_BW = ids_BW != PADDING_ID
    log_p = F.log_softmax(logits_BMWV.float(), dim=-1)
    ids_BMW1 = ids_BW[:, None, :, None].expand(*log_p.shape[:3], 1)
    picked = -log_p.gather(-1, ids_BMW1).squeeze(-1)
    spread = -log_p.mean(dim=-1)
    word_loss = (1 - LABEL_SMOOTHING) * picked + LABEL_SMOOTHING * spread
    scored_B1W = scored_BW.unsqueeze(1)
    return torch.where(scored_B1W, word_loss, 0.0).sum(-1) / scored_B1W.sum(-1).clamp_min(1)


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


def negative_pairs(
    videos_B: Tensor, sentences_B: Tensor, *, same_video: bool, same_sentence: bool
) -> Tensor:
    """[B, B] bool: whether sentence j may stand against the own sentence of video i.

    videos_B, sentences_B: equal numbers where two members share a video, or a sentence.
    same_video: whether another sentence of the same video may. same_sentence: whether an equal
    sentence of another video may.
    """
    allowed_BB = ~torch.eye(len(videos_B), dtype=torch.bool, device=videos_B.device)
    if not same_video:
        allowed_BB &= videos_B[:, None] != videos_B
    if not same_sentence:
        allowed_BB &= sentences_B[:, None] != sentences_B
    return allowed_BB


def match_log_probability(
    fit_BQ: Tensor, temperature: float, negatives_BQ: Tensor, own_B: Tensor | None = None
) -> Tensor:
    """Eq. 6 as a logarithm, [B]: that video i matches its own sentence, not a negative.

    own_B: which of the Q sentences is the own one, by default sentence i.
    """
    rows = torch.arange(len(fit_BQ), device=fit_BQ.device)
    own_B = rows if own_B is None else own_B
    allowed_BQ = negatives_BQ.clone()
    allowed_BQ[rows, own_B] = True
    scores_BQ = (fit_BQ / temperature).masked_fill(~allowed_BQ, float("-inf"))
    return scores_BQ.log_softmax(dim=1)[rows, own_B]


def local_loss(log_p_B: Tensor) -> Tensor:
    """Eq. 7, a scalar: -(1/N) Σ_j log p_j."""
    return -log_p_B.mean()


def map_distance(maps_BL: Tensor, reference_BL: Tensor, kind: str) -> Tensor:
    """φ of Eqs. 11 and 14, a scalar, mean over B: how far two maps are apart.

    The mean over L of |m - m'| ("l1") or of (m - m')² ("l2"), or the Euclidean norm over L
    ("norm"), which weighs √L times as much as a mean does. The reference gets no gradient.
    """
    difference_BL = maps_BL - reference_BL.detach()
    if kind == "norm":
        # Where maps are equal, the norm has no gradient; a tiny number under the root gives 0.
        return (difference_BL.square().sum(dim=1) + 1e-12).sqrt().mean()
    return (difference_BL.abs() if kind == "l1" else difference_BL.square()).mean()


def mutual_loss(first_BL: Tensor, second_BL: Tensor, kind: str) -> Tensor:
    """Eq. 14, a scalar: φ(m_1, δ(m_2)) + φ(m_2, δ(m_1)), δ stopping the gradient."""
    return map_distance(first_BL, second_BL, kind) + map_distance(second_BL, first_BL, kind)


def nearest_span(
    centers_BK: Tensor, widths_BK: Tensor, center_B: Tensor, width_B: Tensor
) -> Tensor:
    """[B]: the proposal of highest IoU with a span, both cut at the video's ends."""
    starts_BK, ends_BK = (centers_BK - widths_BK / 2), (centers_BK + widths_BK / 2)
    start_B1 = (center_B - width_B / 2).clamp_min(0).unsqueeze(1)
    end_B1 = (center_B + width_B / 2).clamp_max(1).unsqueeze(1)
    starts_BK, ends_BK = starts_BK.clamp_min(0), ends_BK.clamp_max(1)
    shared_BK = (torch.minimum(ends_BK, end_B1) - torch.maximum(starts_BK, start_B1)).clamp_min(0)
    union_BK = (ends_BK - starts_BK) + (end_B1 - start_B1) - shared_BK
    return (shared_BK / union_BK.clamp_min(torch.finfo(union_BK.dtype).tiny)).argmax(dim=1)
