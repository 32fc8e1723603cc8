"""The networks: a global branch (proposals, and the query rebuilt from each) and a local one.

The global branch is numerically CPL's network (Zheng et al., CVPR 2022), so that its checkpoints
load strictly.
Shape suffixes: B batch, L positions, F feature channels, W words, E word dimension, D channels,
K proposals, M masks (whatever they are), N kept frames, V output words + 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdist_e2e.grounding.datasets import Batch
from mmdist_e2e.grounding.local import (
    LocalBranch,
    LocalConfig,
    activation_maps,
    matched_maps,
    mean_map,
    sentence_vector,
)
from mmdist_e2e.grounding.modules import (
    KeysValues,
    Stack,
    dropout,
    gaussian_masks,
    mask_bias,
    padding_bias,
    sinusoids,
)
from mmdist_e2e.structures import MmdistError, check_choice

NEGATIVE_SHARPNESS = 4.5  # σ of the masks to the left and right of a proposal


@dataclass(frozen=True)
class GlobalConfig:
    """The shape of a global branch. `feature_dim` F, `word_dim` E, `vocabulary_size` V - 1.

    length: L. frame_divisor: N = int(L // frame_divisor) frames are kept for reconstruction.
    sharpness: σ, a proposal's mask has the deviation max(w, 0.01)/σ.
    scored_words: the words of Eq. 1, "all" of a sentence as in CPL or the "masked" ones alone.
    """

    feature_dim: int
    word_dim: int
    vocabulary_size: int
    length: int
    hidden: int = 256
    heads: int = 4
    layers: int = 3
    feed_forward: int = 512
    proposals: int = 8
    sharpness: float = 9.0
    frame_divisor: float = 4.0
    dropout: float = 0.1
    scored_words: str = "all"

    def __post_init__(self) -> None:
        check_choice("scored_words", self.scored_words, ("all", "masked"))
        if self.kept_frames < 2:
            raise MmdistError(
                f"{self.length} positions divided by {self.frame_divisor} keep "
                f"{self.kept_frames} frames, and at least 2 are needed; lower the frame divisor."
            )
        if self.hidden % (2 * self.heads) or self.hidden < 4:
            raise MmdistError(
                f"{self.hidden} channels cannot be divided evenly among {self.heads} heads."
            )

    @property
    def kept_frames(self) -> int:
        """N."""
        return int(self.length // self.frame_divisor)


@dataclass(frozen=True)
class Proposals:
    """What the network makes of frames and a query before any mask.

    centers_BK, widths_BK in (0, 1). frames_BLD: projected frames; kept_BND: those of them that
    reconstruction reads.
    words_BTD: projected start vector and words, T = W + 1, without positions. is_token_BT: True
    for the start and the words. encoded_BTD: the word stack's reading of the unmasked query.
    """

    centers_BK: Tensor
    widths_BK: Tensor
    frames_BLD: Tensor
    kept_BND: Tensor
    words_BTD: Tensor
    is_token_BT: Tensor
    encoded_BTD: Tensor


@dataclass(frozen=True)
class Memory:
    """Masked frames as the word stack reads them: keys and values a layer, and log masks."""

    keys_values: list[KeysValues]
    bias_BMN: Tensor


class _Stacks(nn.Module):
    """Named as in CPL's checkpoints: decoder1 reads frames, decoder2 words."""

    def __init__(self, config: GlobalConfig) -> None:
        super().__init__()
        self.decoder1, self.decoder2 = (
            Stack(
                config.hidden,
                heads=config.heads,
                layers=config.layers,
                feed_forward=config.feed_forward,
                dropout=config.dropout,
            )
            for _ in range(2)
        )


class GlobalBranch(nn.Module):
    """Proposals, and reconstruction of the query from masked frames."""

    def __init__(self, config: GlobalConfig) -> None:
        super().__init__()
        self.config = config
        self.mask_vec = nn.Parameter(torch.zeros(config.word_dim))
        self.start_vec = nn.Parameter(torch.zeros(config.word_dim))
        self.pred_vec = nn.Parameter(torch.zeros(config.feature_dim))
        self.frame_fc = nn.Linear(config.feature_dim, config.hidden)
        self.word_fc = nn.Linear(config.word_dim, config.hidden)
        self.trans = _Stacks(config)
        self.fc_comp = nn.Linear(config.hidden, config.vocabulary_size + 1)
        self.fc_gauss = nn.Linear(config.hidden, 2 * config.proposals)

    def _drop(self, x: Tensor) -> Tensor:
        return dropout(x, self.config.dropout, training=self.training)

    def propose(self, frames_BLF: Tensor, words_BWE: Tensor, is_word_BW: Tensor) -> Proposals:
        """Read frames with the whole query and place K proposals.

        is_word_BW: True for words, False for padding. Raises MmdistError if L or F is not the
        config's.
        """
        config = self.config
        if tuple(frames_BLF.shape[1:]) != (config.length, config.feature_dim):
            raise MmdistError(
                f"This model reads features of shape [{config.length}, {config.feature_dim}] a "
                f"video; these have {list(frames_BLF.shape[1:])}: extract or resample them anew."
            )
        batch = len(frames_BLF)
        prediction = self.pred_vec.expand(batch, 1, -1)
        frames_BPD = self.frame_fc(self._drop(torch.cat([frames_BLF, prediction], dim=1)))
        start = self.start_vec.expand(batch, 1, -1)
        words_BTD = self.word_fc(self._drop(torch.cat([start, words_BWE], dim=1)))
        is_token_BT = F.pad(is_word_BW, (1, 0), value=True)
        token_bias_BT = padding_bias(is_token_BT)
        positions_TD = sinusoids(words_BTD.shape[1], config.hidden, words_BTD.device)
        encoded_BTD = self.trans.decoder2(words_BTD + positions_TD, token_bias_BT)
        # The prediction position reads every frame and is itself read by none.
        is_frame = torch.ones(1, config.length + 1, dtype=torch.bool, device=frames_BLF.device)
        is_frame[:, -1] = False
        read_B1D = self.trans.decoder1(
            frames_BPD,
            padding_bias(is_frame),
            memory=self.trans.decoder1.project_memory(encoded_BTD),
            memory_bias_BS=token_bias_BT,
            last_only=True,
        )
        spans_BK2 = self.fc_gauss(read_B1D[:, 0]).float().sigmoid().unflatten(-1, (-1, 2))
        kept = config.kept_frames
        indices = torch.arange(kept, device=frames_BPD.device) * (config.length - 1) // (kept - 1)
        return Proposals(
            centers_BK=spans_BK2[..., 0],
            widths_BK=spans_BK2[..., 1],
            frames_BLD=frames_BPD[:, :-1],
            kept_BND=frames_BPD[:, indices],
            words_BTD=words_BTD,
            is_token_BT=is_token_BT,
            encoded_BTD=encoded_BTD,
        )

    def proposal_masks(self, centers: Tensor, widths: Tensor) -> Tensor:
        """[...] -> [..., N] Gaussian masks of proposals."""
        config = self.config
        return gaussian_masks(
            centers, widths, positions=config.kept_frames, sharpness=config.sharpness
        )[0]

    def negative_masks(self, center_B: Tensor, width_B: Tensor, ratio: float) -> Tensor:
        """[B, 2, N]: masks over what lies left and right of a proposal (CPL).

        `ratio` grows from 0 to 1 over training; see `recipes`.
        """
        left = (center_B - width_B / 2).clamp_min(0) * (ratio * 0.5)
        right = (1 - center_B - width_B / 2).clamp_min(0) * (ratio * 0.5)
        return gaussian_masks(
            torch.stack([left, 1 - right], dim=1),
            torch.stack([left, right], dim=1),
            positions=self.config.kept_frames,
            sharpness=NEGATIVE_SHARPNESS,
        )[0]

    def remember(self, kept_BND: Tensor, masks_BMN: Tensor, *, whole: bool = False) -> Memory:
        """Encode the kept frames under M masks, and once more unmasked if `whole` (the last)."""
        bias_BMN = mask_bias(masks_BMN)
        if whole:
            bias_BMN = torch.cat([bias_BMN, torch.zeros_like(bias_BMN[:, :1])], dim=1)
        copies = bias_BMN.shape[1]
        encoded = self.trans.decoder1(kept_BND, bias_BMN.flatten(0, 1), copies=copies)
        return Memory(self.trans.decoder2.project_memory(encoded), bias_BMN)

    def reconstruct(self, proposals: Proposals, masked_BW: Tensor, memory: Memory) -> Tensor:
        """Logits [B, M, W, V]: output i predicts word i + 1 from the words before it.

        masked_BW: True for words hidden behind the mask vector, the same for all M.
        """
        words_BTD = proposals.words_BTD
        is_masked_BT = F.pad(masked_BW, (1, 0), value=False).unsqueeze(-1)
        mask_D = self.word_fc(self.mask_vec).to(words_BTD.dtype)
        words_BTD = torch.where(is_masked_BT, mask_D, words_BTD)
        words_BTD = words_BTD + sinusoids(words_BTD.shape[1], self.config.hidden, mask_D.device)
        copies = memory.bias_BMN.shape[1]
        token_bias_BW = padding_bias(proposals.is_token_BT[:, :-1])
        read = self.trans.decoder2(
            words_BTD[:, :-1],  # the last word is not fed
            token_bias_BW.repeat_interleave(copies, dim=0),
            memory=memory.keys_values,
            memory_bias_BS=memory.bias_BMN.flatten(0, 1),
            copies=copies,
        )
        logits: Tensor = self.fc_comp(read)
        return logits.reshape(-1, copies, *logits.shape[1:])


class GroundingNetwork(GlobalBranch):
    """The network of baseline, student and teacher: a global branch, local ones if configured.

    local: without it this is CPL's network with CPL's keys. The global branch is made first, so
    that one seed gives all networks the same weights there.
    channels: of the teacher, how many of F each modality has. The global branch reads them all
    through one Linear; each has a local branch with a Linear and convolutions of its own.
    """

    def __init__(
        self,
        config: GlobalConfig,
        local: LocalConfig | None = None,
        channels: Sequence[int] = (),
    ) -> None:
        super().__init__(config)
        self.local_config, self.channels = local, tuple(channels)
        self.local: LocalBranch | nn.ModuleList | None = None
        if local is not None and not channels:
            self.local = LocalBranch(local, feature_dim=config.feature_dim, hidden=config.hidden)
        elif local is not None:
            assert sum(channels) == config.feature_dim
            own = replace(local, own_frames=True)
            self.local = nn.ModuleList(
                LocalBranch(own, feature_dim=each, hidden=config.hidden) for each in channels
            )

    @property
    def score_weight(self) -> float:
        """γ of Eq. 9; 0 without a local branch."""
        return self.local_config.score_weight if self.local_config else 0.0

    @property
    def ranks_by_contrast(self) -> bool:
        """Whether the rest of the video counts when proposals are ranked."""
        return self.local_config is not None and self.local_config.ranking == "contrast"

    def activate(self, batch: Batch, proposals: Proposals, *, all_pairs: bool = False) -> Tensor:
        """Eq. 4: activation maps [B, L], or with `all_pairs` [B, B, L] of video i and sentence j.

        Of several modalities their mean, m_T of Eq. 13.
        """
        return mean_map(self.activate_each(batch, proposals, all_pairs=all_pairs))

    def activate_each(
        self,
        batch: Batch,
        proposals: Proposals,
        *,
        all_pairs: bool = False,
        gather: Callable[[Tensor], Tensor] | None = None,
    ) -> list[Tensor]:
        """`activate` of every modality on its own.

        The query vector is read from the unmasked words without a memory, so it knows no video;
        the modalities share it. gather: adds the sentences of other processes, [B, D] -> [G, D].
        """
        assert self.local is not None
        assert self.local_config is not None
        query_BD = sentence_vector(
            proposals.encoded_BTD, batch.is_word_BW, batch.content_BW, self.local_config.query
        )
        if gather is not None:
            query_BD = gather(query_BD)
        maps = activation_maps if all_pairs else matched_maps
        if isinstance(self.local, LocalBranch):
            own = self.local_config.own_frames
            frames_BLX = self._drop(batch.frames_BLF) if own else proposals.frames_BLD
            return [maps(self.local(frames_BLX), query_BD)]
        parts = torch.split(self._drop(batch.frames_BLF), list(self.channels), dim=-1)
        return [
            maps(local(part_BLF), query_BD)
            for local, part_BLF in zip(self.local, parts, strict=True)
        ]
