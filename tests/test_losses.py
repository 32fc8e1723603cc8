"""CPL's loss against plain loops; its switches; the cheap training step against the full one."""

from __future__ import annotations

import dataclasses
import math

import grounding_reference as reference
import numpy as np
import pytest
import torch
from test_models import TINY, batch_loss, random_batch, random_model
from torch.testing import assert_close

from mmdist_e2e.grounding.config import LossConfig
from mmdist_e2e.grounding.data.batches import Batch
from mmdist_e2e.grounding.losses import choose_proposal, diversity_loss
from mmdist_e2e.grounding.network import GroundingNetwork, reconstruction_loss


def test_diversity_against_loops() -> None:
    masks = torch.rand(3, 4, 11) + 0.01
    expected = np.mean([reference.diversity(m.double().numpy(), 0.146) for m in masks])
    np.testing.assert_allclose(diversity_loss(masks, 0.146), expected, rtol=1e-5)


def test_the_diversity_prior_is_a_prior_on_length() -> None:
    # A single proposal's term is least where its width is σ/(2√π·λ·(N - 1)): 0.355 here.
    widths = torch.linspace(0.1, 0.9, 161)
    grid = torch.arange(50) / 49
    masks = torch.exp(-((grid - 0.5) ** 2) / (2 * (widths[:, None] / 9) ** 2))
    each = torch.stack([diversity_loss(mask[None, None], 0.146) for mask in masks])
    asked = 9 / (2 * math.sqrt(math.pi) * 0.146 * 49)
    assert abs(float(widths[each.argmin()]) - asked) < 0.01


@pytest.mark.parametrize("negatives", [True, False])
def test_cpl_loss_against_plain_loops(negatives: bool) -> None:
    model, batch = random_model(), random_batch([5, 2, 7])
    masked = (torch.arange(7) % 2 == 0) & batch.is_word_BW
    config = LossConfig(
        contrast_weight=1.7, diversity_weight=0.3, diversity_prior=0.2, negatives=negatives
    )
    with torch.no_grad():
        terms = batch_loss(model, batch, masked, config, ratio=0.6)
    weights = {k: v.double().numpy() for k, v in model.state_dict().items()}
    sums: dict[str, float] = {}
    for b in range(3):
        count = int(batch.is_word_BW[b].sum())
        r = reference.forward(
            weights, batch.frames_BLF[b].double().numpy(),
            batch.words_BWE[b, :count].double().numpy(), batch.ids_BW[b, :count].tolist(),
            masked[b, :count].tolist(), heads=2, layers=2, kept=8, ratio=0.6,
        )  # fmt: skip
        best = float(r["losses"].min())
        values = {
            "reconstruction": best,
            "whole": r["whole"],
            "hinge_whole": max(0.0, best - r["whole"] + 0.1),
            "hinge_left": max(0.0, best - r["left"] + 0.15),
            "hinge_right": max(0.0, best - r["right"] + 0.15),
            "diversity": reference.diversity(r["masks"], 0.2),
        }
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value / 3
    contrast = sums["hinge_whole"]
    if negatives:
        contrast += sums["hinge_left"] + sums["hinge_right"]
    else:
        del sums["hinge_left"], sums["hinge_right"]
    sums["loss"] = (
        (sums["reconstruction"] + sums["whole"]) / 2 + 1.7 * contrast + 0.3 * sums["diversity"]
    )
    assert terms.keys() == sums.keys()
    for name, value in sums.items():
        np.testing.assert_allclose(terms[name], value, rtol=0, atol=1e-4, err_msg=name)


def full_cpl_loss(
    model: GroundingNetwork, batch: Batch, masked: torch.Tensor, config: LossConfig, ratio: float
) -> torch.Tensor:
    """Everything with gradient, chosen afterwards: what `batch_loss` must equal."""
    proposals = model.propose(batch.frames_BLF, batch.words_BWE, batch.is_word_BW)
    masks = model.proposal_masks(proposals.centers_BK, proposals.widths_BK)
    memory = model.remember(proposals.kept_BND, masks, whole=True)
    losses = reconstruction_loss(model.reconstruct(proposals, masked, memory), batch.ids_BW)
    best = losses[:, :-1].argmin(1, keepdim=True)
    chosen, whole = losses.gather(1, best)[:, 0], losses[:, -1]
    negatives = model.negative_masks(
        proposals.centers_BK.gather(1, best)[:, 0], proposals.widths_BK.gather(1, best)[:, 0], ratio
    )
    memory = model.remember(proposals.kept_BND, negatives)
    left, right = reconstruction_loss(
        model.reconstruct(proposals, masked, memory), batch.ids_BW
    ).unbind(1)
    contrast = (chosen - whole + config.margin_whole).clamp_min(0).mean()
    for negative in (left, right):
        contrast = contrast + (chosen - negative + config.margin_negatives).clamp_min(0).mean()
    return (
        (chosen.mean() + whole.mean()) / 2
        + config.contrast_weight * contrast
        + config.diversity_weight * diversity_loss(masks, config.diversity_prior)
    )


def test_the_cheap_step_equals_the_full_one_in_value_and_gradient() -> None:
    model, batch = random_model(), random_batch([5, 2, 7, 3])
    masked = (torch.arange(7) % 3 == 0) & batch.is_word_BW
    config = LossConfig()
    cheap = batch_loss(model, batch, masked, config, ratio=0.8)["loss"]
    full = full_cpl_loss(model, batch, masked, config, 0.8)
    assert_close(cheap, full, rtol=0, atol=1e-5)
    parameters = dict(model.named_parameters())
    cheap_gradients = torch.autograd.grad(cheap, list(parameters.values()), allow_unused=True)
    full_gradients = torch.autograd.grad(full, list(parameters.values()), allow_unused=True)
    for name, a, b in zip(parameters, cheap_gradients, full_gradients, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            assert_close(a, b, rtol=1e-3, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_gradient_reaches_every_parameter() -> None:
    torch.manual_seed(3)
    model, batch = GroundingNetwork(TINY), random_batch([5, 2, 7, 3])
    masked = (torch.arange(7) % 3 == 0) & batch.is_word_BW
    batch_loss(model, batch, masked, LossConfig(), ratio=0.8)["loss"].backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_spans_learn_through_the_masks_alone() -> None:
    model, batch = random_model(), random_batch([5])
    masked = torch.zeros(1, 5, dtype=torch.bool)
    config = LossConfig(diversity_weight=0.0)
    batch_loss(model, batch, masked, config, ratio=0.8)["loss"].backward()
    assert model.fc_gauss.weight.grad.abs().max() > 0


def test_choosing_leaves_dropout_on_and_uses_none() -> None:
    model, batch = random_model(dataclasses.replace(TINY, dropout=0.5)), random_batch([5, 4])
    masked = torch.zeros(2, 5, dtype=torch.bool)
    proposals = model.propose(batch.frames_BLF, batch.words_BWE, batch.is_word_BW)
    masks = model.proposal_masks(proposals.centers_BK, proposals.widths_BK)
    still = choose_proposal(model, proposals, masks, batch.ids_BW, masked)
    model.train()
    for seed in range(5):
        torch.manual_seed(seed)
        again = choose_proposal(model, proposals, masks, batch.ids_BW, masked)
        assert torch.equal(again, still)
    assert model.training


@pytest.mark.parametrize(
    ("change", "gone"),
    [
        ({"contrast_weight": 0.0}, {"hinge_whole", "hinge_left", "hinge_right"}),
        ({"contrast_whole": False}, {"hinge_whole"}),
        ({"negatives": False}, {"hinge_left", "hinge_right"}),
    ],
)
def test_switches_take_their_terms_out(change: dict[str, float], gone: set[str]) -> None:
    model, batch = random_model(), random_batch([5, 2, 7])
    masked = (torch.arange(7) % 2 == 0) & batch.is_word_BW
    full = batch_loss(model, batch, masked, LossConfig(), ratio=0.6)
    less = batch_loss(model, batch, masked, LossConfig(**change), ratio=0.6)
    assert full.keys() - less.keys() == gone
    assert_close(full["loss"] - less["loss"], sum(full[name] for name in gone))
