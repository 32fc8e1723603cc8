"""Golden values of the global branch: they stay, whatever is made faster.

The weights, frames and words are a fixed sequence of numbers, so no generator of a library can
move them. The constants were computed in float64 by the plain loops of `grounding_reference`. CPL's
public code (minghangz/cpl), run in float64 on the same numbers, gave the same to 2e-6 when this
was written (its word positions are float32).
"""

from __future__ import annotations

from dataclasses import dataclass

import grounding_reference as reference
import numpy as np
import pytest
import torch
from test_models import batch_loss

from mmdist_e2e.grounding.config import GlobalConfig, LossConfig
from mmdist_e2e.grounding.data.batches import Batch
from mmdist_e2e.grounding.losses import diversity_loss
from mmdist_e2e.grounding.network import GroundingNetwork, reconstruction_loss

CONFIG = GlobalConfig(
    feature_dim=6, word_dim=5, vocabulary_size=9, length=40, hidden=16, heads=2, layers=2,
    feed_forward=32, proposals=3,
)  # fmt: skip
LOSS = LossConfig(diversity_prior=0.6)  # of the order of the masks' overlap at N = 10
RATIO = 0.6  # how far the negatives reach
TOLERANCE = 2e-5


@dataclass(frozen=True)
class Golden:
    """A sentence (output ids, which of its words are masked) and all that follows from it.

    losses: one a proposal; left, right, whole: those of k*'s negatives and of the whole video;
    total: CPL's loss of them.
    """

    ids: list[int]
    masked: list[int]
    centers: list[float]
    widths: list[float]
    losses: list[float]
    left: float
    right: float
    whole: float
    diversity: float
    total: float


GOLDEN = [
    Golden(
        ids=[4],
        masked=[0],
        centers=[0.824923678, 0.480167359, 0.49590367],
        widths=[0.335229139, 0.379975455, 0.706400655],
        losses=[9.810112982, 8.808308189, 8.960848739],
        left=7.650505831,
        right=9.973832699,
        whole=7.343732312,
        diversity=0.44713408,
        total=13.184068885,
    ),
    Golden(
        ids=[2, 7, 7, 1],
        masked=[1],
        centers=[0.819778531, 0.425099689, 0.517751724],
        widths=[0.280161205, 0.358764075, 0.726449167],
        losses=[6.586990176, 6.719830364, 6.552846581],
        left=5.060159719,
        right=6.569931504,
        whole=6.049816415,
        diversity=0.355321891,
        total=10.456573059,
    ),
    Golden(
        ids=[3, 9, 1, 5, 8, 2, 6],
        masked=[0, 5],
        centers=[0.726748355, 0.90329161, 0.444601618],
        widths=[0.087831043, 0.425309853, 0.727169582],
        losses=[4.631420886, 4.078542823, 4.993765908],
        left=4.869997447,
        right=3.881699408,
        whole=4.697694264,
        diversity=0.221138439,
        total=5.840654155,
    ),
    Golden(
        ids=[1, 6, 2, 7, 3, 8, 4, 9, 5, 1, 6, 2, 7, 3, 8, 4, 9, 5, 1, 6],
        masked=[0, 3, 7, 11, 12, 19],
        centers=[0.644156917, 0.699197615, 0.49060757],
        widths=[0.223035662, 0.318396472, 0.802463034],
        losses=[6.055806972, 6.070156815, 6.10716021],
        left=5.026356011,
        right=4.470927335,
        whole=5.47946445,
        diversity=1.833694228,
        total=18.52677997,
    ),
]


def numbers(*shape: int, seed: int) -> np.ndarray:
    """Uniform in [-1, 1), float64: splitmix64 at seed, seed + 1, …"""
    count = np.arange(1, int(np.prod(shape)) + 1, dtype=np.uint64) + np.uint64(seed << 20)
    z = count * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
    z ^= z >> np.uint64(31)
    return ((z >> np.uint64(11)).astype(np.float64) / 2**52 - 1).reshape(shape)


def weights() -> dict[str, np.ndarray]:
    """Every tensor of the network, in the order of their names."""
    shapes = {
        key: tuple(value.shape) for key, value in GroundingNetwork(CONFIG).state_dict().items()
    }
    made = {}
    for seed, (key, shape) in enumerate(sorted(shapes.items()), start=1):
        values = numbers(*shape, seed=seed)
        if "layer_norm.weight" in key:
            made[key] = 1 + values / 2
        else:  # sharp enough for frames, words and masks to tell in every value
            sharpness = 1.5 if key.startswith("fc_gauss") else 4
            made[key] = values / 2 if len(shape) == 1 else values * sharpness / np.sqrt(shape[1])
    return made


def inputs(words: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames [40, 6], constant over eight at a time, and word vectors [W, 5]."""
    frames = np.repeat(numbers(5, CONFIG.feature_dim, seed=900 + words), 8, axis=0)
    return 2 * frames, 2 * numbers(words, CONFIG.word_dim, seed=950 + words)


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda g: f"{len(g.ids)} words")
def test_plain_loops_give_the_golden_values(golden):
    words = len(golden.ids)
    masked = [i in golden.masked for i in range(words)]
    made = reference.forward(
        weights(), *inputs(words), golden.ids, masked,
        heads=CONFIG.heads, layers=CONFIG.layers, kept=10, ratio=RATIO,
    )  # fmt: skip
    best = min(golden.losses)
    hinges = [best - golden.whole + 0.1, best - golden.left + 0.15, best - golden.right + 0.15]
    total = (best + golden.whole) / 2 + sum(max(h, 0) for h in hinges) + 5 * golden.diversity
    assert total == pytest.approx(golden.total, abs=1e-7)
    assert reference.diversity(made["masks"], 0.6) == pytest.approx(golden.diversity, abs=2e-9)
    for name in ("centers", "widths", "losses", "left", "right", "whole"):
        assert made[name] == pytest.approx(getattr(golden, name), abs=2e-9), name


@pytest.fixture(scope="module")
def model() -> GroundingNetwork:
    network = GroundingNetwork(CONFIG)
    network.load_state_dict({k: torch.from_numpy(v).float() for k, v in weights().items()})
    return network.eval()


def batch_of(golden: Golden) -> tuple[Batch, torch.Tensor]:
    """A batch of one, and which words are masked [1, W]."""
    count = len(golden.ids)
    frames, words = (torch.from_numpy(array).float()[None] for array in inputs(count))
    is_word = torch.ones(1, count, dtype=torch.bool)
    masked = torch.zeros_like(is_word)
    masked[0, golden.masked] = True
    return Batch(
        frames, words, torch.tensor([golden.ids]), is_word, torch.zeros_like(masked)
    ), masked


def close(golden: float | list[float]):
    return pytest.approx(golden, rel=0, abs=TOLERANCE)


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda g: f"{len(g.ids)} words")
@torch.no_grad()
def test_spans_and_losses_are_the_golden_ones(model, golden):
    batch, masked = batch_of(golden)
    proposals = model.propose(batch.frames_BLF, batch.words_BWE, batch.is_word_BW)
    assert proposals.centers_BK[0].tolist() == close(golden.centers)
    assert proposals.widths_BK[0].tolist() == close(golden.widths)
    masks = model.proposal_masks(proposals.centers_BK, proposals.widths_BK)
    assert diversity_loss(masks, LOSS.diversity_prior).item() == close(golden.diversity)
    best = int(np.argmin(golden.losses))
    span = proposals.centers_BK[:, best], proposals.widths_BK[:, best]
    every = torch.cat([masks, model.negative_masks(*span, RATIO)], dim=1)
    memory = model.remember(proposals.kept_BND, every, whole=True)
    losses = reconstruction_loss(model.reconstruct(proposals, masked, memory), batch.ids_BW)
    expected = [*golden.losses, golden.left, golden.right, golden.whole]
    assert losses[0].tolist() == close(expected)


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda g: f"{len(g.ids)} words")
@torch.no_grad()
def test_the_terms_of_the_loss_are_the_golden_ones(model, golden):
    batch, masked = batch_of(golden)
    terms = batch_loss(model, batch, masked, LOSS, ratio=RATIO)
    assert terms["reconstruction"].item() == close(min(golden.losses))
    assert terms["whole"].item() == close(golden.whole)
    assert terms["diversity"].item() == close(golden.diversity)
    # The sum holds the diversity, and so its rounding in fp32, five times.
    rounding = TOLERANCE * LOSS.diversity_weight
    assert terms["loss"].item() == pytest.approx(golden.total, rel=0, abs=rounding)
