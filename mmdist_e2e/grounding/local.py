"""The local branch: how well every position of a video fits a sentence.

Shape suffixes: B videos, Q sentences, L positions, F feature channels, D channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdist_e2e.structures import MmdistError, check_choice

MINIMUM_NORM = 1e-8
QUERIES = ("content", "mean", "last")
RANKINGS = ("contrast", "inside")


@dataclass(frozen=True)
class LocalConfig:
    """The shape of a local branch, and its weight when proposals are ranked.

    depth, kernel: convolutions over positions, a ReLU between two. relu_last: one after the last.
    own_frames: frames through a Linear of their own, not the global branch's.
    query: the mean of the "content" words (of all where there is none), the "mean" of all words,
    or the "last" position of the word stack (which has read them all).
    score_weight: γ of Eq. 9; 0 ranks by reconstruction alone.
    ranking: what γ multiplies, the mean "inside" a proposal as Eq. 9 has it, or its "contrast" to
    the rest of the video (`inference.mean_activation`).
    """

    depth: int = 2
    kernel: int = 3
    relu_last: bool = False
    own_frames: bool = False
    query: str = "content"
    score_weight: float = 3.0
    ranking: str = "contrast"

    def __post_init__(self) -> None:
        if self.depth < 1 or self.kernel < 1 or self.kernel % 2 == 0:
            raise MmdistError(
                f"depth must be at least 1 and kernel an odd number; got {self.depth} and "
                f"{self.kernel}."
            )
        check_choice("query", self.query, QUERIES)
        check_choice("ranking", self.ranking, RANKINGS)
        if self.score_weight < 0:
            raise MmdistError(f"score_weight must not be negative; got {self.score_weight}.")


class LocalBranch(nn.Module):
    """Context-enhanced features V̂ of every position (before Eq. 4)."""

    def __init__(self, config: LocalConfig, *, feature_dim: int, hidden: int) -> None:
        super().__init__()
        self.config = config
        self.frame_fc = nn.Linear(feature_dim, hidden) if config.own_frames else None
        self.convolutions = nn.ModuleList(
            nn.Conv1d(hidden, hidden, config.kernel, padding=config.kernel // 2)
            for _ in range(config.depth)
        )

    def forward(self, frames_BLX: Tensor) -> Tensor:
        """V̂ [B, L, D] of frames: features [B, L, F] where the Linear is its own, else projected."""
        if self.frame_fc is not None:
            frames_BLX = self.frame_fc(frames_BLX)
        x_BDL = frames_BLX.transpose(1, 2)
        for i, convolution in enumerate(self.convolutions, start=1):
            x_BDL = convolution(x_BDL)
            if i < len(self.convolutions) or self.config.relu_last:
                x_BDL = F.relu(x_BDL)
        return x_BDL.transpose(1, 2)


def sentence_vector(
    encoded_BTD: Tensor, is_word_BW: Tensor, content_BW: Tensor, kind: str
) -> Tensor:
    """The query vector q [B, D], from the word stack's reading [B, W + 1, D] of start and words.

    kind: as `LocalConfig.query`; the start is never read. is_word_BW, content_BW: bool.
    """
    if kind == "last":
        rows = torch.arange(len(encoded_BTD), device=encoded_BTD.device)
        return encoded_BTD[rows, is_word_BW.sum(1)]
    read_BW = is_word_BW
    if kind == "content":
        read_BW = content_BW & is_word_BW
        read_BW = torch.where(read_BW.any(1, keepdim=True), read_BW, is_word_BW)
    read_BW1 = read_BW.unsqueeze(-1)
    words_BWD = torch.where(read_BW1, encoded_BTD[:, 1:], 0)
    return words_BWD.sum(1) / read_BW1.sum(1)


def activation_maps(local_BLD: Tensor, query_QD: Tensor) -> Tensor:
    """Eq. 4 of all pairs, [B, Q, L]: m = cos(V̂_l, q) of video i and sentence j; fp32.

    Norms are clamped, so that a position of zeros gives 0. One product for all pairs.
    """
    local, query = (F.normalize(t.float(), dim=-1, eps=MINIMUM_NORM) for t in (local_BLD, query_QD))
    with torch.autocast(local.device.type, enabled=False):  # a low temperature needs digits
        return query @ local.transpose(1, 2)


def matched_maps(local_BLD: Tensor, query_BD: Tensor) -> Tensor:
    """Eq. 4 of the matched pairs alone, [B, L]."""
    return F.cosine_similarity(
        local_BLD.float(), query_BD.float().unsqueeze(1), dim=-1, eps=MINIMUM_NORM
    )


def mean_map(maps: Sequence[Tensor]) -> Tensor:
    """Eq. 13: m_T, the mean of the modalities' maps; of one modality its own."""
    return maps[0] if len(maps) == 1 else torch.stack(list(maps)).mean(0)
