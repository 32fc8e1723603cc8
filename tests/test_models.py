"""The network against the plain float64 oracle, its keys, masks and independence of the batch."""

from __future__ import annotations

import math

import grounding_reference as reference
import numpy as np
import pytest
import torch
from torch.testing import assert_close

from mmdist_e2e.grounding.answer import predict_batch
from mmdist_e2e.grounding.config import (
    DistillConfig,
    GlobalConfig,
    LocalConfig,
    LossConfig,
    MatchingConfig,
    MutualConfig,
    Recipe,
    TrainingConfig,
)
from mmdist_e2e.grounding.data.batches import Batch
from mmdist_e2e.grounding.losses import BatchLoss, Taught
from mmdist_e2e.grounding.network import (
    Attention,
    Dropout,
    GroundingNetwork,
    gaussian_masks,
    mask_bias,
    reconstruction_loss,
    sinusoids,
)
from mmdist_e2e.structures import MmdistError

TINY = GlobalConfig(
    feature_dim=5, word_dim=3, vocabulary_size=7, length=12, hidden=16, heads=2, layers=2,
    feed_forward=24, proposals=4, frame_divisor=1.5,
)  # fmt: skip


def random_model(config: GlobalConfig = TINY, seed: int = 0) -> GroundingNetwork:
    """All weights random, biases and learned vectors too, so that none of them hides."""
    torch.manual_seed(seed)
    model = GroundingNetwork(config)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def random_batch(lengths: list[int], config: GlobalConfig = TINY, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    size, longest = len(lengths), max(lengths)
    is_word = torch.arange(longest) < torch.tensor(lengths)[:, None]
    ids = torch.randint(1, config.vocabulary_size + 1, (size, longest), generator=generator)
    words = torch.randn(size, longest, config.word_dim, generator=generator)
    return Batch(
        torch.randn(size, config.length, config.feature_dim, generator=generator),
        words * is_word[..., None],
        ids * is_word,
        is_word,
        torch.zeros_like(is_word),
    )


def alone(batch: Batch, row: int) -> Batch:
    count = int(batch.is_word_BW[row].sum())
    return Batch(
        batch.frames_BLF[row : row + 1],
        *(getattr(batch, n)[row : row + 1, :count] for n in ("words_BWE", "ids_BW")),
        *(getattr(batch, n)[row : row + 1, :count] for n in ("is_word_BW", "content_BW")),
    )


def batch_loss(
    model: GroundingNetwork, batch: Batch, masked: torch.Tensor, loss: LossConfig,
    matching: MatchingConfig | None = None, mutual: MutualConfig | None = None,
    distill: DistillConfig | None = None, taught: Taught | None = None, *, ratio: float,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """`BatchLoss` of these parts."""
    local = LocalConfig(score_weight=0.0) if matching else None
    recipe = Recipe("test", TINY, loss, TrainingConfig(), local, matching, mutual, distill)
    terms: dict[str, torch.Tensor] = BatchLoss(model, recipe)(batch, masked, ratio, taught)
    return terms


def all_losses(
    model: GroundingNetwork, batch: Batch, masked: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Proposal masks [B, K, N] and losses [B, K + 1], the whole video last."""
    proposals = model.propose(batch.frames_BLF, batch.words_BWE, batch.is_word_BW)
    masks = model.proposal_masks(proposals.centers_BK, proposals.widths_BK)
    memory = model.remember(proposals.kept_BND, masks, whole=True)
    logits = model.reconstruct(proposals, masked, memory)
    return masks, reconstruction_loss(logits, batch.ids_BW)


@pytest.mark.parametrize("words", [1, 2, 3, 6, 20])
def test_against_plain_loops(words: int) -> None:
    model = random_model(seed=words)
    batch = random_batch([words], seed=words)
    batch.ids_BW[0, words // 2] = 0 if words > 2 else batch.ids_BW[0, 0]  # one unscored word
    masked = torch.tensor([[i % 3 == 0 for i in range(words)]])
    weights = {k: v.double().numpy() for k, v in model.state_dict().items()}
    expected = reference.forward(
        weights, batch.frames_BLF[0].double().numpy(), batch.words_BWE[0].double().numpy(),
        batch.ids_BW[0].tolist(), masked[0].tolist(), heads=2, layers=2, kept=8, ratio=0.6,
    )  # fmt: skip
    with torch.no_grad():
        proposals = model.propose(batch.frames_BLF, batch.words_BWE, batch.is_word_BW)
        masks, losses = all_losses(model, batch, masked)
        center, width = (
            t[:, expected["best"]] for t in (proposals.centers_BK, proposals.widths_BK)
        )
        negatives = model.negative_masks(center, width, 0.6)
        memory = model.remember(proposals.kept_BND, negatives)
        negative = reconstruction_loss(model.reconstruct(proposals, masked, memory), batch.ids_BW)
    close = {"rtol": 0, "atol": 1e-5}
    np.testing.assert_allclose(proposals.centers_BK[0], expected["centers"], **close)
    np.testing.assert_allclose(proposals.widths_BK[0], expected["widths"], **close)
    np.testing.assert_allclose(masks[0], expected["masks"], **close)
    np.testing.assert_allclose(losses[0, :-1], expected["losses"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(losses[0, -1], expected["whole"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(
        negative[0], [expected["left"], expected["right"]], rtol=0, atol=1e-4
    )


def test_keys_are_those_of_cpl() -> None:
    config = GlobalConfig(feature_dim=1024, word_dim=300, vocabulary_size=1111, length=200)
    shapes = {k: tuple(v.shape) for k, v in GroundingNetwork(config).state_dict().items()}
    assert len(shapes) == 119
    assert shapes["mask_vec"] == shapes["start_vec"] == (300,)
    assert shapes["pred_vec"] == (1024,)
    assert shapes["frame_fc.weight"] == (256, 1024)
    assert shapes["word_fc.weight"] == (256, 300)
    assert shapes["fc_comp.weight"] == (1112, 256)
    assert shapes["fc_gauss.weight"] == (16, 256)
    assert config.kept_frames == 50
    for stack in ("decoder1", "decoder2"):
        for layer in range(3):
            at = f"trans.{stack}.decoder_layers.{layer}"
            for attention in ("self_attn", "encoder_attn"):
                assert shapes[f"{at}.{attention}.in_proj_weight"] == (768, 256)
                assert shapes[f"{at}.{attention}.out_proj.bias"] == (256,)
                assert shapes[f"{at}.{attention}_layer_norm.weight"] == (256,)
            assert shapes[f"{at}.fc1.weight"] == (512, 256)
            assert shapes[f"{at}.final_layer_norm.bias"] == (256,)


def test_start_of_training() -> None:
    model = GroundingNetwork(TINY)
    assert not any(v.any() for v in (model.mask_vec, model.start_vec, model.pred_vec))
    attention = model.frame_stack.decoder_layers[0].self_attn
    assert not attention.in_proj_bias.any()
    bound = math.sqrt(6 / (16 + 48))  # Xavier, of the [3D, D] matrix as one
    assert attention.in_proj_weight.abs().max() <= bound
    assert attention.in_proj_weight.abs().max() > 0.9 * bound


def test_gaussian_masks_equal_the_textbook_form_and_are_never_0_over_0() -> None:
    centers, widths = torch.tensor([0.31, 0.5, 0.02]), torch.tensor([0.4, 1.0, 0.15])
    masks = gaussian_masks(centers, widths, positions=50, sharpness=9.0)
    grid = torch.arange(50).double() / 49
    for mask, c, w in zip(masks, centers.double(), widths.double(), strict=True):
        g = torch.exp(-((grid - c) ** 2) / (2 * (w / 9) ** 2))
        assert_close(mask.double(), g / g.max(), rtol=0, atol=1e-5)
    narrow = gaussian_masks(
        torch.tensor([0.3333], requires_grad=True), torch.tensor([0.0]), positions=5, sharpness=9.0
    )
    assert narrow.isfinite().all()
    assert narrow.max() == 1


def test_bias_equals_multiplying_the_softmax() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 6, 8, dtype=torch.float64)
    g = torch.rand(6, dtype=torch.float64) ** 8
    weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(8), -1) * (g + 1e-10)
    expected = weights / weights.sum(-1, keepdim=True) @ v
    attention = Attention(8, 1)
    torch.nn.init.eye_(attention.out_proj.weight)
    got = attention.attend(q.float(), k.float(), v.float(), mask_bias(g)[None, None])
    assert_close(got.double(), expected[0], rtol=0, atol=1e-5)


def test_attention_in_bf16_rounds_only_its_inputs_and_outputs() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 1, 6, 8).bfloat16()
    bias = mask_bias(torch.rand(2, 1, 6) ** 40)  # down to 1e-10: bf16 could not add these
    attention = Attention(8, 1)
    torch.nn.init.eye_(attention.out_proj.weight)
    expected = attention.attend(q.float(), k.float(), v.float(), bias)
    with torch.autocast("cpu", torch.bfloat16):
        got = attention.attend(q, k, v, bias)
    assert got.dtype == torch.bfloat16
    assert_close(got.float(), expected, rtol=0, atol=0.03)


def test_positions() -> None:
    table = sinusoids(5, 8, torch.device("cpu"))
    np.testing.assert_allclose(table, reference.positions(5, 8), atol=1e-6)


def test_losses_do_not_depend_on_the_batch() -> None:
    model, batch = random_model(), random_batch([4, 1, 9, 6])
    masked = (torch.arange(9) % 3 == 1) & batch.is_word_BW
    with torch.no_grad():
        _, together = all_losses(model, batch, masked)
        for row in range(4):
            single = alone(batch, row)
            _, loss = all_losses(model, single, masked[row : row + 1, : single.ids_BW.shape[1]])
            assert_close(together[row : row + 1], loss, rtol=0, atol=2e-6)


def test_answers_do_not_depend_on_seed_batch_or_order() -> None:
    model, batch = random_model(), random_batch([4, 1, 9, 6])
    together = predict_batch(model, batch)
    torch.manual_seed(99)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = predict_batch(model, Batch(*(t[order] for t in vars(batch).values())))
    for row in range(4):
        single = predict_batch(model, alone(batch, row))
        for a, b, c in zip(together, single, shuffled, strict=True):
            assert_close(a[row], b[0], rtol=0, atol=2e-6)
            assert_close(a[order[row]], c[row], rtol=0, atol=2e-6)


def test_deterministic_inference_is_the_mean_over_its_patterns() -> None:
    model, batch = random_model(), random_batch([7])
    with torch.no_grad():
        each = [all_losses(model, batch, torch.arange(7)[None] % 4 == p)[1] for p in range(4)]
    # 7 words, 2 masked at once: 4 patterns.
    assert_close(predict_batch(model, batch)[2], torch.stack(each).mean(0)[:, :-1])


def test_later_words_do_not_reach_earlier_outputs() -> None:
    model, batch = random_model(), random_batch([6])
    changed = Batch(
        **vars(batch)
        | {"words_BWE": batch.words_BWE.clone().index_fill_(1, torch.tensor([4, 5]), 3.0)}
    )
    nothing = torch.zeros(1, 6, dtype=torch.bool)
    with torch.no_grad():
        proposals = model.propose(batch.frames_BLF, batch.words_BWE, batch.is_word_BW)
        other = model.propose(changed.frames_BLF, changed.words_BWE, changed.is_word_BW)
        masks = model.proposal_masks(proposals.centers_BK, proposals.widths_BK)
        memory = model.remember(proposals.kept_BND, masks)
        first = model.reconstruct(proposals, nothing, memory)
        second = model.reconstruct(other, nothing, memory)
    assert_close(first[:, :, :5], second[:, :, :5])  # word 4 is first read at output 5
    assert (first[:, :, 5] - second[:, :, 5]).abs().max() > 1e-3


def test_features_of_another_shape_are_refused() -> None:
    model = GroundingNetwork(TINY)
    batch = random_batch([3])
    with pytest.raises(MmdistError, match=r"\[12, 5\].*\[11, 5\]"):
        model.propose(batch.frames_BLF[:, 1:], batch.words_BWE, batch.is_word_BW)


def test_dropout_drops_its_share_evenly_and_keeps_the_mean():
    torch.manual_seed(0)
    ones = torch.ones(1001, 301)  # not a multiple of the four values that share a number
    drop = Dropout(0.1)
    out = drop(ones)
    kept = out != 0
    assert kept.float().mean().item() == pytest.approx(0.9, abs=0.003)
    assert out[kept].unique().tolist() == pytest.approx([1 / 0.9], abs=1e-4)
    assert out.mean().item() == pytest.approx(1, abs=0.003)
    lanes = kept.flatten()[:300_000].view(-1, 4).double()
    assert lanes.mean(dim=0).tolist() == pytest.approx([0.9] * 4, abs=0.01)
    # Values that share a number are dropped independently of each other.
    assert torch.corrcoef(lanes.T).fill_diagonal_(0).abs().max() < 0.02
    assert drop.eval()(ones) is ones
