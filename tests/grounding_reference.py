"""The global branch written out from design: plain loops over one sentence, float64, no torch.

An oracle for the batched network: nothing here is vectorised over positions, heads or masks, and
padding does not exist. It follows the text, not the code under test.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Weights = dict[str, Array]


def linear(w: Weights, name: str, x: Array) -> Array:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def layer_norm(w: Weights, name: str, x: Array) -> Array:
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


def attention(
    w: Weights, name: str, queries: Array, keys: Array, *, heads: int, causal: bool,
    weights: Array | None, readable: int,
) -> Array:  # fmt: skip
    """Softmax over the keys, multiplied by (weights + 1e-10) and renormalised."""
    width = queries.shape[1]
    rows, bias = w[f"{name}.in_proj_weight"], w[f"{name}.in_proj_bias"]
    q = queries @ rows[:width].T + bias[:width]
    k = keys @ rows[width : 2 * width].T + bias[width : 2 * width]
    v = keys @ rows[2 * width :].T + bias[2 * width :]
    size = width // heads
    mixed = np.zeros_like(q)
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        for t in range(len(q)):
            last = min(readable, t + 1) if causal else readable
            scores = np.array([q[t, part] @ k[s, part] / math.sqrt(size) for s in range(last)])
            p = np.exp(scores - scores.max())
            p /= p.sum()
            if weights is not None:
                p = p * (weights[:last] + 1e-10)
                p /= p.sum()
            for s in range(last):
                mixed[t, part] += p[s] * v[s, part]
    return linear(w, f"{name}.out_proj", mixed)


def stack(
    w: Weights, name: str, x: Array, *, heads: int, layers: int, memory: Array | None = None,
    own: Array | None = None, over: Array | None = None, readable: int | None = None,
) -> Array:  # fmt: skip
    """`own` weighs the keys of self-attention, `over` those of the memory."""
    for i in range(layers):
        at = f"{name}.decoder_layers.{i}"
        y = attention(
            w, f"{at}.self_attn", x, x, heads=heads, causal=True, weights=own,
            readable=readable or len(x),
        )  # fmt: skip
        x = layer_norm(w, f"{at}.self_attn_layer_norm", x + y)
        if memory is not None:
            y = attention(
                w, f"{at}.encoder_attn", x, memory, heads=heads, causal=False, weights=over,
                readable=len(memory),
            )  # fmt: skip
            x = layer_norm(w, f"{at}.encoder_attn_layer_norm", x + y)
        y = linear(w, f"{at}.fc2", np.maximum(linear(w, f"{at}.fc1", x), 0))
        x = layer_norm(w, f"{at}.final_layer_norm", x + y)
    return x


def positions(count: int, width: int) -> Array:
    table = np.zeros((count, width))
    half = width // 2
    for p in range(1, count):  # position 0 is all zeros
        for k in range(half):
            rate = 10000 ** (-k / (half - 1))
            table[p, k] = math.sin(p * rate)
            table[p, half + k] = math.cos(p * rate)
    return table


def gaussian(center: float, width: float, count: int, sharpness: float) -> Array:
    s = max(width, 0.01) / sharpness
    squared = np.array([(j / (count - 1) - center) ** 2 for j in range(count)])
    return np.exp(-(squared - squared.min()) / (2 * s * s))


def sentence_loss(logits: Array, ids: list[int]) -> float:
    """Mean over scored words of 0.9·NLL + (0.1/V)·Σ_v(-log p_v)."""
    total, count = 0.0, 0
    for row, word in zip(logits, ids, strict=True):
        if word == 0:
            continue
        log_p = row - row.max()
        log_p = log_p - math.log(np.exp(log_p).sum())
        total += 0.9 * -log_p[word] + 0.1 / len(row) * -log_p.sum()
        count += 1
    return total / count if count else 0.0


def forward(
    w: Weights, frames: Array, words: Array, ids: list[int], masked: list[bool], *,
    heads: int, layers: int, kept: int, ratio: float,
) -> dict[str, Array | float | int]:  # fmt: skip
    """One video and sentence through everything: spans, masks, losses of each pass."""
    length = len(frames)
    rows = linear(w, "frame_fc", np.concatenate([frames, w["pred_vec"][None]]))
    tokens = linear(w, "word_fc", np.concatenate([w["start_vec"][None], words]))
    table = positions(len(tokens), tokens.shape[1])
    encoded = stack(w, "trans.decoder2", tokens + table, heads=heads, layers=layers)
    read = stack(
        w, "trans.decoder1", rows, heads=heads, layers=layers, memory=encoded, readable=length
    )
    spans = 1 / (1 + np.exp(-linear(w, "fc_gauss", read[-1])))
    centers, widths = spans[0::2], spans[1::2]
    frames_kept = np.stack([rows[math.floor(i * (length - 1) / (kept - 1))] for i in range(kept)])
    hidden = linear(w, "word_fc", w["mask_vec"])
    fed = np.stack([tokens[0]] + [hidden if m else t for m, t in zip(masked, tokens[1:], strict=1)])
    fed = (fed + table)[:-1]

    def rebuild(mask: Array | None) -> float:
        memory = stack(w, "trans.decoder1", frames_kept, heads=heads, layers=layers, own=mask)
        out = stack(w, "trans.decoder2", fed, heads=heads, layers=layers, memory=memory, over=mask)
        return sentence_loss(linear(w, "fc_comp", out), ids)

    masks = [gaussian(c, d, kept, 9.0) for c, d in zip(centers, widths, strict=True)]
    losses = [rebuild(mask) for mask in masks]
    best = int(np.argmin(losses))
    left = max(centers[best] - widths[best] / 2, 0) * ratio * 0.5
    right = max(1 - centers[best] - widths[best] / 2, 0) * ratio * 0.5
    return {
        "centers": centers,
        "widths": widths,
        "masks": np.stack(masks),
        "losses": np.array(losses),
        "best": best,
        "whole": rebuild(None),
        "left": rebuild(gaussian(left, left, kept, 4.5)),
        "right": rebuild(gaussian(1 - right, right, kept, 4.5)),
    }


def diversity(masks: Array, prior: float) -> float:
    total = 0.0
    for a in range(len(masks)):
        for b in range(len(masks)):
            gram = (masks[a] / masks[a].sum()) @ (masks[b] / masks[b].sum())
            total += ((prior if a == b else 0.0) - gram) ** 2
    return total
