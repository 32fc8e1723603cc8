"""The networks: a global branch (proposals, and the query rebuilt from each) and a local one.

The global branch is numerically CPL's network (Zheng et al., CVPR 2022) and has its parameters'
names, so that CPL's checkpoints load strictly.

Shape suffixes: B batch (of sequences), L positions, F feature channels, W words, E word dimension,
D channels, K proposals, M masks (of any kind), C = B·M, N kept frames or grid positions, V output
words + 1, T queries, S keys, H heads, h channels of one head, Q sentences. A bias is added to
attention scores, one value per key.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdist_e2e.grounding.config import GlobalConfig, LocalConfig, Recipe
from mmdist_e2e.grounding.data.batches import Batch
from mmdist_e2e.grounding.data.text import PADDING_ID
from mmdist_e2e.structures import MmdistError

LABEL_SMOOTHING = 0.1
MASK_FLOOR = 1e-10  # a key's weight is g + this, so that no query is left without a key
MINIMUM_WIDTH = 0.01
NEGATIVE_SHARPNESS = 4.5  # σ of the masks to the left and right of a proposal
MINIMUM_NORM = 1e-8
DROPOUT_STEPS = 2**15  # a share is rounded to so many steps


class Memory(NamedTuple):
    """What one layer's cross-attention reads: keys and values [B, H, S, h], and their bias."""

    keys: Tensor
    values: Tensor
    bias_B1S: Tensor


def gaussian_masks(centers: Tensor, widths: Tensor, *, positions: int, sharpness: float) -> Tensor:
    """Gaussians on the grid t_j = j/(N-1), each divided by its largest value on the grid.

    centers, widths: [...] in units of the video; `sharpness` is σ: s = max(w, 0.01)/σ.
    Returns g, [..., N] in fp32. Computed as exp(-(d² - min d²)/(2s²)), it is never 0/0.
    """
    grid_N = torch.arange(positions, dtype=torch.float32, device=centers.device) / (positions - 1)
    squared = (grid_N - centers.float().unsqueeze(-1)).square()
    deviation = widths.float().clamp_min(MINIMUM_WIDTH).unsqueeze(-1) / sharpness
    return (-(squared - squared.amin(-1, keepdim=True)) / (2 * deviation.square())).exp()


def mask_bias(masks: Tensor) -> Tensor:
    """log(g + 1e-10) in fp32: added to scores it multiplies the softmax weights by g + 1e-10."""
    return (masks.float() + MASK_FLOOR).log()


def padding_bias(is_word: Tensor) -> Tensor:
    """[B, S] bool, True for keys that may be read -> 0 or -inf, fp32."""
    return torch.zeros(is_word.shape, device=is_word.device).masked_fill(~is_word, -torch.inf)


def sinusoids(length: int, channels: int, device: torch.device) -> Tensor:
    """[T, D] positions: first half sines, second half cosines; position 0 is all zeros."""
    half = channels // 2
    steps = torch.arange(half, dtype=torch.float32, device=device)
    rates = torch.exp(steps * (-math.log(10000.0) / (half - 1)))
    angles = torch.arange(length, dtype=torch.float32, device=device)[:, None] * rates
    table_TD = torch.cat([angles.sin(), angles.cos()], dim=1)
    table_TD[0] = 0
    return table_TD


class Dropout(nn.Module):
    """Zero a `share` of the values and scale the rest; torch's own on a GPU.

    torch's own takes longer than the layers on a CPU, since it draws one number per value. Here a
    64-bit number serves four values.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.share == 0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.share)
        cut = round(self.share * DROPOUT_STEPS)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_().view(torch.int16)
        # The generator's 64-bit numbers are not negative, so the sign bits are always 0.
        keep = (bits[: x.numel()].view(x.shape) & (DROPOUT_STEPS - 1)) >= cut
        return x * (keep.to(x.dtype) * (DROPOUT_STEPS / (DROPOUT_STEPS - cut)))


class Attention(nn.Module):
    """Multi-head attention; rows of `in_proj_weight` are queries, keys, values."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * channels, channels))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * channels))
        self.out_proj = nn.Linear(channels, channels)
        nn.init.xavier_uniform_(self.in_proj_weight)  # as one [3D, D] matrix
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def project(self, x_BTD: Tensor, parts: Literal["qkv", "q", "kv"] = "qkv") -> list[Tensor]:
        """The named ones of queries, keys and values, each [B, H, T, h]."""
        D = x_BTD.shape[-1]
        weight: Tensor = self.in_proj_weight
        bias: Tensor = self.in_proj_bias
        if parts != "qkv":  # a slice of all rows would be cast anew on every call under autocast
            rows = slice(D) if parts == "q" else slice(D, None)
            weight, bias = weight[rows], bias[rows]
        each_BTD = F.linear(x_BTD, weight, bias).chunk(len(weight) // D, dim=-1)
        return [t.view(*t.shape[:2], self.heads, -1).transpose(1, 2) for t in each_BTD]

    def attend(self, q_BHTh: Tensor, k_BHSh: Tensor, v_BHSh: Tensor, bias_BTS: Tensor) -> Tensor:
        """Scores scaled by 1/√h plus bias, softmax, values, output projection: [B, T, D].

        The bias reaches -23 and needs fp32, so scores and softmax are fp32 under autocast too.
        """
        bias_B1TS = bias_BTS.unsqueeze(1)
        if q_BHTh.device.type == "cpu" and q_BHTh.dtype == torch.bfloat16:
            # On a CPU torch's fused kernel computes in fp32; two bf16 products are 2.5 times as
            # fast, and so is their backward.
            scores = torch.add(
                bias_B1TS, q_BHTh @ k_BHSh.transpose(-2, -1), alpha=q_BHTh.shape[-1] ** -0.5
            )
            mixed = scores.softmax(-1).to(v_BHSh.dtype) @ v_BHSh
        else:
            with torch.autocast(q_BHTh.device.type, enabled=False):
                mixed = F.scaled_dot_product_attention(
                    q_BHTh.float(), k_BHSh.float(), v_BHSh.float(), attn_mask=bias_B1TS
                )
        out: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(-2))
        return out


class Layer(nn.Module):
    """Post-norm: self-attention, cross-attention when there is a memory, feed-forward."""

    def __init__(self, config: GlobalConfig) -> None:
        super().__init__()
        D = config.hidden
        self.drop = Dropout(config.dropout)
        self.self_attn = Attention(D, config.heads)
        self.self_attn_layer_norm = nn.LayerNorm(D)
        self.encoder_attn = Attention(D, config.heads)
        self.encoder_attn_layer_norm = nn.LayerNorm(D)
        self.fc1 = nn.Linear(D, config.feed_forward)
        self.fc2 = nn.Linear(config.feed_forward, D)
        self.final_layer_norm = nn.LayerNorm(D)

    def forward(
        self, x_BTD: Tensor, bias_BTT: Tensor, memory: Memory | None, copies: int, last_only: bool
    ) -> Tensor:
        """`copies` > 1: every input sequence becomes so many, which differ in bias only.

        Their queries, keys and values are the same and computed once (the first layer's case).
        last_only: read the last position alone, [B, 1, D]; the others are still its keys.
        """
        if last_only:
            k, v = self.self_attn.project(x_BTD, "kv")
            x_BTD, bias_BTT = x_BTD[:, -1:], bias_BTT[:, -1:]
            (q,) = self.self_attn.project(x_BTD, "q")
        else:
            q, k, v = self.self_attn.project(x_BTD)
        if copies > 1:
            x_BTD, q, k, v = (t.repeat_interleave(copies, dim=0) for t in (x_BTD, q, k, v))
        read = self.self_attn.attend(q, k, v, bias_BTT)
        x_BTD = self.self_attn_layer_norm(x_BTD + self.drop(read))
        if memory is not None:
            (q,) = self.encoder_attn.project(x_BTD, "q")
            read = self.encoder_attn.attend(q, *memory)
            x_BTD = self.encoder_attn_layer_norm(x_BTD + self.drop(read))
        hidden = self.fc2(F.relu(self.fc1(x_BTD)))
        out: Tensor = self.final_layer_norm(x_BTD + self.drop(hidden))
        return out


class Stack(nn.Module):
    """Layers over one sequence; self-attention is always causal."""

    def __init__(self, config: GlobalConfig) -> None:
        super().__init__()
        self.decoder_layers = nn.ModuleList(Layer(config) for _ in range(config.layers))

    def _layers(self) -> list[Layer]:
        return [layer for layer in self.decoder_layers if isinstance(layer, Layer)]

    def project_memory(self, memory_BSD: Tensor, bias_BS: Tensor) -> list[Memory]:
        """A sequence as every layer's cross-attention reads it; bias_BS is added to its scores."""
        memory = []
        for layer in self._layers():
            keys, values = layer.encoder_attn.project(memory_BSD, "kv")
            memory.append(Memory(keys, values, bias_BS.unsqueeze(1)))
        return memory

    def forward(
        self,
        x_BTD: Tensor,
        key_bias_BT: Tensor,
        memory: list[Memory] | None = None,
        *,
        copies: int = 1,
        last_only: bool = False,
    ) -> Tensor:
        """[B, T, D] -> [B·copies, T, D], or [B·copies, 1, D] of the last position alone.

        key_bias_BT: added to the scores of every key of self-attention ([B·copies, T]).
        """
        length = x_BTD.shape[1]
        causal_TT = torch.full((length, length), -torch.inf, device=x_BTD.device).triu(diagonal=1)
        bias_BTT = causal_TT.unsqueeze(0) + key_bias_BT.unsqueeze(1)
        layers = self._layers()
        for i, layer in enumerate(layers):
            read, is_last = memory[i] if memory else None, i == len(layers) - 1
            x_BTD = layer(x_BTD, bias_BTT, read, copies if i == 0 else 1, last_only and is_last)
        return x_BTD


class LocalBranch(nn.Module):
    """Context-enhanced features V̂ of every position (before Eq. 4).

    feature_dim: F, for a Linear of the branch's own; without it the branch reads the frames that
    the global branch has projected.
    """

    def __init__(self, config: LocalConfig, hidden: int, feature_dim: int | None = None) -> None:
        super().__init__()
        self.frame_fc = nn.Identity() if feature_dim is None else nn.Linear(feature_dim, hidden)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(hidden, hidden, config.kernel, padding=config.kernel // 2)
            for _ in range(config.depth)
        )

    def forward(self, frames_BLX: Tensor) -> Tensor:
        """V̂ [B, L, D] of frames [B, L, F] or [B, L, D]; a ReLU between two convolutions."""
        x_BDL: Tensor = self.frame_fc(frames_BLX).transpose(1, 2)
        for i, convolution in enumerate(self.convolutions):
            x_BDL = convolution(F.relu(x_BDL) if i else x_BDL)
        return x_BDL.transpose(1, 2)


def sentence_vector(encoded_BTD: Tensor, read_BW: Tensor) -> Tensor:
    """The query vector q [B, D]: the mean of the word stack's reading over the words in read_BW.

    encoded_BTD: of the start vector, which is never read, and W words. read_BW: bool.
    """
    read_BW1 = read_BW.unsqueeze(-1)
    return torch.where(read_BW1, encoded_BTD[:, 1:], 0).sum(1) / read_BW1.sum(1)


def content_words(is_word_BW: Tensor, content_BW: Tensor) -> Tensor:
    """[B, W] bool: the content words of each sentence, or all its words where there is none."""
    content_BW = content_BW & is_word_BW
    return torch.where(content_BW.any(1, keepdim=True), content_BW, is_word_BW)


def activation_maps(local_BLD: Tensor, query_QD: Tensor) -> Tensor:
    """Eq. 4 of all pairs, [B, Q, L]: m = cos(V̂_l, q) of video i and sentence j; fp32.

    Norms are clamped, so that a position of zeros gives 0.
    """
    local, query = (F.normalize(t.float(), dim=-1, eps=MINIMUM_NORM) for t in (local_BLD, query_QD))
    with torch.autocast(local.device.type, enabled=False):  # a low temperature needs digits
        return query @ local.transpose(1, 2)


def matched_maps(local_BLD: Tensor, query_BD: Tensor) -> Tensor:
    """Eq. 4 of the matched pairs alone, [B, L]."""
    query_B1D = query_BD.float().unsqueeze(1)
    return F.cosine_similarity(local_BLD.float(), query_B1D, dim=-1, eps=MINIMUM_NORM)


def mean_map(maps: Sequence[Tensor]) -> Tensor:
    """Eq. 13: m_T, the mean of the modalities' maps."""
    return maps[0] if len(maps) == 1 else torch.stack(list(maps)).mean(0)


def reconstruction_loss(logits_BMWV: Tensor, ids_BW: Tensor) -> Tensor:
    """Eq. 1, [B, M]: mean over a sentence's words of 0.9·NLL + (0.1/V)·Σ_v(-log p_v).

    Words with id 0 (padding, or outside the output vocabulary) are left out of the mean. A
    sentence without any other word gives 0.
    """
    scored_B1W = (ids_BW != PADDING_ID).unsqueeze(1)
    log_p = F.log_softmax(logits_BMWV.float(), dim=-1)
    ids_BMW1 = ids_BW[:, None, :, None].expand(*log_p.shape[:3], 1)
    picked_BMW = -log_p.gather(-1, ids_BMW1).squeeze(-1)
    word_loss = (1 - LABEL_SMOOTHING) * picked_BMW + LABEL_SMOOTHING * -log_p.mean(dim=-1)
    return torch.where(scored_B1W, word_loss, 0.0).sum(-1) / scored_B1W.sum(-1).clamp_min(1)


@dataclass(frozen=True)
class Proposals:
    """What the network makes of frames and a query before any mask; T = W + 1."""

    centers_BK: Tensor  # in (0, 1), as the widths
    widths_BK: Tensor
    frames_BLD: Tensor  # projected
    kept_BND: Tensor  # those of them that reconstruction reads
    words_BTD: Tensor  # projected start vector and words, without positions
    is_token_BT: Tensor  # True for the start and the words
    encoded_BTD: Tensor  # the word stack's reading of the unmasked query


class GroundingNetwork(nn.Module):
    """Proposals, reconstruction of the query from masked frames and, if configured, local branches.

    local: without it this is CPL's network with CPL's keys.
    channels: of a teacher, how many of F each modality has. The global branch reads them all
    through one Linear; each has a local branch with a Linear and convolutions of its own.
    """

    def __init__(
        self, config: GlobalConfig, local: LocalConfig | None = None, channels: Sequence[int] = ()
    ) -> None:
        super().__init__()
        self.config, self.local_config, self.channels = config, local, tuple(channels)
        self.drop = Dropout(config.dropout)
        self.mask_vec = nn.Parameter(torch.zeros(config.word_dim))
        self.start_vec = nn.Parameter(torch.zeros(config.word_dim))
        self.pred_vec = nn.Parameter(torch.zeros(config.feature_dim))
        self.frame_fc = nn.Linear(config.feature_dim, config.hidden)
        self.word_fc = nn.Linear(config.word_dim, config.hidden)
        # Named as in CPL's checkpoints: decoder1 reads frames, decoder2 words.
        self.trans = nn.ModuleDict({"decoder1": Stack(config), "decoder2": Stack(config)})
        self.fc_comp = nn.Linear(config.hidden, config.vocabulary_size + 1)
        self.fc_gauss = nn.Linear(config.hidden, 2 * config.proposals)
        # Last, so that a seed gives all networks the same weights up to here.
        self.local: LocalBranch | nn.ModuleList | None = None
        if local is not None and not channels:
            self.local = LocalBranch(local, config.hidden)
        elif local is not None:
            assert sum(channels) == config.feature_dim
            self.local = nn.ModuleList(LocalBranch(local, config.hidden, each) for each in channels)

    @property
    def frame_stack(self) -> Stack:
        return cast(Stack, self.trans["decoder1"])

    @property
    def word_stack(self) -> Stack:
        return cast(Stack, self.trans["decoder2"])

    def propose(self, frames_BLF: Tensor, words_BWE: Tensor, is_word_BW: Tensor) -> Proposals:
        """Read frames with the whole query and place K proposals.

        is_word_BW: True for words, False for padding. Raises MmdistError if L or F is not the
        config's.
        """
        config, device = self.config, frames_BLF.device
        if tuple(frames_BLF.shape[1:]) != (config.length, config.feature_dim):
            raise MmdistError(
                f"This model reads features of shape [{config.length}, {config.feature_dim}] a "
                f"video; these have {list(frames_BLF.shape[1:])}. Extract or resample them again."
            )
        batch = len(frames_BLF)
        prediction = self.pred_vec.expand(batch, 1, -1)
        frames_BPD = self.frame_fc(self.drop(torch.cat([frames_BLF, prediction], dim=1)))
        start = self.start_vec.expand(batch, 1, -1)
        words_BTD = self.word_fc(self.drop(torch.cat([start, words_BWE], dim=1)))
        is_token_BT = F.pad(is_word_BW, (1, 0), value=True)
        token_bias_BT = padding_bias(is_token_BT)
        positions_TD = sinusoids(words_BTD.shape[1], config.hidden, device)
        encoded_BTD = self.word_stack(words_BTD + positions_TD, token_bias_BT)
        memory = self.frame_stack.project_memory(encoded_BTD, token_bias_BT)
        # The prediction position reads every frame and is itself read by none.
        is_frame = torch.arange(config.length + 1, device=device).unsqueeze(0) < config.length
        read_B1D = self.frame_stack(frames_BPD, padding_bias(is_frame), memory, last_only=True)
        spans_BK2 = self.fc_gauss(read_B1D[:, 0]).float().sigmoid().unflatten(-1, (-1, 2))
        kept = config.kept_frames
        indices = torch.arange(kept, device=device) * (config.length - 1) // (kept - 1)
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
        kept, sharpness = self.config.kept_frames, self.config.sharpness
        return gaussian_masks(centers, widths, positions=kept, sharpness=sharpness)

    def negative_masks(self, center_B: Tensor, width_B: Tensor, ratio: float) -> Tensor:
        """[B, 2, N]: masks over what lies left and right of a proposal (CPL).

        `ratio` grows from 0 to 1 over training (`train.negative_ratio`).
        """
        left = (center_B - width_B / 2).clamp_min(0) * (ratio * 0.5)
        right = (1 - center_B - width_B / 2).clamp_min(0) * (ratio * 0.5)
        centers_B2 = torch.stack([left, 1 - right], dim=1)
        widths_B2 = torch.stack([left, right], dim=1)
        kept = self.config.kept_frames
        return gaussian_masks(centers_B2, widths_B2, positions=kept, sharpness=NEGATIVE_SHARPNESS)

    def remember(self, kept_BND: Tensor, masks_BMN: Tensor, *, whole: bool = False) -> list[Memory]:
        """Encode the kept frames under M masks, and once more unmasked if `whole` (the last)."""
        bias_BMN = mask_bias(masks_BMN)
        if whole:
            bias_BMN = torch.cat([bias_BMN, torch.zeros_like(bias_BMN[:, :1])], dim=1)
        copies, bias_CN = bias_BMN.shape[1], bias_BMN.flatten(0, 1)
        encoded_CND = self.frame_stack(kept_BND, bias_CN, copies=copies)
        return self.word_stack.project_memory(encoded_CND, bias_CN)

    def reconstruct(self, proposals: Proposals, masked_BW: Tensor, memory: list[Memory]) -> Tensor:
        """Logits [B, M, W, V]: output i predicts word i + 1 from the words before it.

        masked_BW: True for words hidden behind the mask vector, the same for all M.
        """
        words_BTD = proposals.words_BTD
        is_masked_BT = F.pad(masked_BW, (1, 0), value=False).unsqueeze(-1)
        mask_D = self.word_fc(self.mask_vec).to(words_BTD.dtype)
        words_BTD = torch.where(is_masked_BT, mask_D, words_BTD)
        words_BTD = words_BTD + sinusoids(words_BTD.shape[1], self.config.hidden, mask_D.device)
        copies = len(memory[0].bias_B1S) // len(words_BTD)
        token_bias_BW = padding_bias(proposals.is_token_BT[:, :-1])
        token_bias_CW = token_bias_BW.repeat_interleave(copies, dim=0)
        # The last word is not fed.
        read_CWD = self.word_stack(words_BTD[:, :-1], token_bias_CW, memory, copies=copies)
        logits: Tensor = self.fc_comp(read_CWD)
        return logits.reshape(-1, copies, *logits.shape[1:])

    def activate(self, batch: Batch, proposals: Proposals, *, all_pairs: bool = False) -> Tensor:
        """Eq. 4: activation maps [B, L], or with `all_pairs` [B, B, L] of video i and sentence j.

        With several modalities, their mean (m_T of Eq. 13).
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
        """`activate` of every modality on its own; they share the query vector.

        gather: adds the sentences of other processes, [B, D] -> [G, D].
        """
        assert self.local is not None
        assert self.local_config is not None
        read_BW = batch.is_word_BW
        if self.local_config.query == "content":
            read_BW = content_words(read_BW, batch.content_BW)
        query_BD = sentence_vector(proposals.encoded_BTD, read_BW)
        if gather is not None:
            query_BD = gather(query_BD)
        maps = activation_maps if all_pairs else matched_maps
        if isinstance(self.local, LocalBranch):
            return [maps(self.local(proposals.frames_BLD), query_BD)]
        parts = self.drop(batch.frames_BLF).split(self.channels, dim=-1)
        return [maps(local(part), query_BD) for local, part in zip(self.local, parts, strict=True)]


def build_network(recipe: Recipe) -> GroundingNetwork:
    """The untrained network of a recipe; torch's global generator draws its weights."""
    channels = recipe.mutual.channels if recipe.mutual else ()
    return GroundingNetwork(recipe.model, recipe.local, channels)
