"""Attention weighted by Gaussian masks, the two stacks' layers, and word positions.

The numbers are CPL's (Zheng et al., CVPR 2022), and so are the parameters' names.
Shape suffixes: B batch (of sequences), T queries, S keys, H heads, D channels, N grid positions,
K proposals, h channels of one head. A bias is added to attention scores, one value a key.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MASK_FLOOR = 1e-10  # a key's weight is g + this, so that no query is left without a key
MINIMUM_WIDTH = 0.01
DROPOUT_STEPS = 2**15  # a share is rounded to so many steps
MINUS_INFINITY = float("-inf")
KeysValues = tuple[Tensor, Tensor]


def gaussian_masks(
    centers: Tensor, widths: Tensor, *, positions: int, sharpness: float
) -> tuple[Tensor, Tensor]:
    """Gaussians on the grid t_j = j/(N-1), each divided by its largest value on the grid.

    centers, widths: [...] in units of the video; `sharpness` is σ: s = max(w, 0.01)/σ.
    Returns (g, log g), both [..., N] and fp32. As exp(-(d² - min d²)/(2s²)) it is never 0/0.
    """
    grid_N = torch.arange(positions, dtype=torch.float32, device=centers.device) / (positions - 1)
    squared = (grid_N - centers.float().unsqueeze(-1)).square()
    deviation = widths.float().clamp_min(MINIMUM_WIDTH).unsqueeze(-1) / sharpness
    exponent = -(squared - squared.amin(-1, keepdim=True)) / (2 * deviation.square())
    return exponent.exp(), exponent


def mask_bias(masks: Tensor) -> Tensor:
    """log(g + 1e-10) in fp32: added to scores it multiplies the softmax weights by g + 1e-10."""
    return (masks.float() + MASK_FLOOR).log()


def padding_bias(is_word: Tensor) -> Tensor:
    """[B, S] bool, True for keys that may be read -> 0 or -inf, fp32."""
    return torch.zeros(is_word.shape, device=is_word.device).masked_fill(~is_word, MINUS_INFINITY)


def causal_bias(length: int, device: torch.device) -> Tensor:
    """[T, T]: -inf above the diagonal."""
    full = torch.full((length, length), MINUS_INFINITY, device=device)
    return full.triu(diagonal=1)


def sinusoids(length: int, channels: int, device: torch.device) -> Tensor:
    """[T, D] positions: first half sines, second half cosines; position 0 is all zeros."""
    half = channels // 2
    rates = torch.exp(
        torch.arange(half, dtype=torch.float32, device=device) * (-math.log(10000.0) / (half - 1))
    )
    angles = torch.arange(length, dtype=torch.float32, device=device)[:, None] * rates
    table_TD = torch.cat([angles.sin(), angles.cos()], dim=1)
    table_TD[0] = 0
    return table_TD


def dropout(x: Tensor, share: float, *, training: bool) -> Tensor:
    """Zero a `share` of the values and scale the rest; off the CPU torch's own.

    torch's CPU generator makes one number after the other and takes longer than the layers here;
    one 64-bit number has bits for four values.
    """
    if not training or share == 0:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, share)
    cut = round(share * DROPOUT_STEPS)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_().view(torch.int16)
    # The generator's 64-bit numbers are not negative, so the sign bits say nothing.
    keep = (bits[: x.numel()].view(x.shape) & (DROPOUT_STEPS - 1)) >= cut
    return x * (keep.to(x.dtype) * (DROPOUT_STEPS / (DROPOUT_STEPS - cut)))


class Attention(nn.Module):
    """Multi-head attention; rows of `in_proj_weight` are queries, keys, values."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"{channels} channels cannot be divided among {heads} heads.")
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * channels, channels))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * channels))
        self.out_proj = nn.Linear(channels, channels)
        nn.init.xavier_uniform_(self.in_proj_weight)  # as one [3D, D] matrix
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def _split(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.view(*x_BTD.shape[:2], self.heads, -1).transpose(1, 2)

    def project(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, H, T, h] of self-attention."""
        q, k, v = F.linear(x_BTD, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        return self._split(q), self._split(k), self._split(v)

    def project_memory(self, memory_BSD: Tensor) -> KeysValues:
        """Keys and values [B, H, S, h] of a memory, projected once for however many readers."""
        channels = memory_BSD.shape[-1]
        k, v = F.linear(
            memory_BSD, self.in_proj_weight[channels:], self.in_proj_bias[channels:]
        ).chunk(2, dim=-1)
        return self._split(k), self._split(v)

    def project_queries(self, x_BTD: Tensor) -> Tensor:
        """[B, H, T, h] queries of cross-attention."""
        channels = x_BTD.shape[-1]
        return self._split(
            F.linear(x_BTD, self.in_proj_weight[:channels], self.in_proj_bias[:channels])
        )

    def attend(self, q_BHTh: Tensor, k_BHSh: Tensor, v_BHSh: Tensor, bias_BTS: Tensor) -> Tensor:
        """Scores scaled by 1/√h plus bias, softmax, values, output projection: [B, T, D].

        The bias reaches -23 and needs fp32, so scores and softmax are fp32 under autocast too.
        """
        bias_B1TS = bias_BTS.unsqueeze(1)
        if q_BHTh.device.type == "cpu" and q_BHTh.dtype == torch.bfloat16:
            # torch's fused kernel is fp32 at heart on a CPU: two bf16 products are 2.5 times as
            # fast here, and so is their backward.
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

    def __init__(self, channels: int, heads: int, feed_forward: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.self_attn = Attention(channels, heads)
        self.self_attn_layer_norm = nn.LayerNorm(channels)
        self.encoder_attn = Attention(channels, heads)
        self.encoder_attn_layer_norm = nn.LayerNorm(channels)
        self.fc1 = nn.Linear(channels, feed_forward)
        self.fc2 = nn.Linear(feed_forward, channels)
        self.final_layer_norm = nn.LayerNorm(channels)

    def _drop(self, x: Tensor) -> Tensor:
        return dropout(x, self.dropout, training=self.training)

    def forward(
        self,
        x_BTD: Tensor,
        self_bias_BTT: Tensor,
        memory: KeysValues | None,
        memory_bias_B1S: Tensor | None,
        *,
        copies: int = 1,
        last_only: bool = False,
    ) -> Tensor:
        """`copies` > 1: every input sequence becomes so many, which differ in bias only.

        Their queries, keys and values are the same and computed once (the first layer's case).
        last_only: read the last position alone, [B, 1, D]; the others are still its keys.
        """
        if last_only:
            k, v = self.self_attn.project_memory(x_BTD)
            x_BTD, self_bias_BTT = x_BTD[:, -1:], self_bias_BTT[:, -1:]
            q = self.self_attn.project_queries(x_BTD)
        else:
            q, k, v = self.self_attn.project(x_BTD)
        if copies > 1:
            x_BTD, q, k, v = (t.repeat_interleave(copies, dim=0) for t in (x_BTD, q, k, v))
        x_BTD = self.self_attn_layer_norm(
            x_BTD + self._drop(self.self_attn.attend(q, k, v, self_bias_BTT))
        )
        if memory is not None:
            assert memory_bias_B1S is not None
            q = self.encoder_attn.project_queries(x_BTD)
            read = self.encoder_attn.attend(q, *memory, memory_bias_B1S)
            x_BTD = self.encoder_attn_layer_norm(x_BTD + self._drop(read))
        hidden = self.fc2(F.relu(self.fc1(x_BTD)))
        out: Tensor = self.final_layer_norm(x_BTD + self._drop(hidden))
        return out


class Stack(nn.Module):
    """Layers over one sequence; self-attention is always causal."""

    def __init__(
        self, channels: int, *, heads: int, layers: int, feed_forward: int, dropout: float
    ) -> None:
        super().__init__()
        self.decoder_layers = nn.ModuleList(
            Layer(channels, heads, feed_forward, dropout) for _ in range(layers)
        )

    def _layers(self) -> list[Layer]:
        return [layer for layer in self.decoder_layers if isinstance(layer, Layer)]

    def project_memory(self, memory_BSD: Tensor) -> list[KeysValues]:
        """Keys and values of a memory for every layer."""
        return [layer.encoder_attn.project_memory(memory_BSD) for layer in self._layers()]

    def forward(
        self,
        x_BTD: Tensor,
        key_bias_BT: Tensor | None = None,
        *,
        memory: list[KeysValues] | None = None,
        memory_bias_BS: Tensor | None = None,
        copies: int = 1,
        last_only: bool = False,
    ) -> Tensor:
        """[B, T, D] -> [B·copies, T, D], or [B·copies, 1, D] of the last position alone.

        key_bias_BT: added to the scores of every key of self-attention ([B·copies, T]).
        memory_bias_BS: the same for cross-attention.
        """
        bias_BTT = causal_bias(x_BTD.shape[1], x_BTD.device).unsqueeze(0)
        if key_bias_BT is not None:
            bias_BTT = bias_BTT + key_bias_BT.unsqueeze(1)
        memory_bias = None if memory_bias_BS is None else memory_bias_BS.unsqueeze(1)
        layers = self._layers()
        for i, layer in enumerate(layers):
            x_BTD = layer(
                x_BTD,
                bias_BTT,
                None if memory is None else memory[i],
                memory_bias,
                copies=copies if i == 0 else 1,
                last_only=last_only and i == len(layers) - 1,
            )
        return x_BTD
