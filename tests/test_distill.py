"""Teacher and student: Eqs. 10-14 against plain loops, stop-gradients, and whole runs."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch
from test_local import local_features, query_vector
from test_models import TINY, batch_loss, random_batch
from torch.testing import assert_close

from mmdist_e2e.grounding.config import (
    DistillConfig,
    LocalConfig,
    LossConfig,
    MatchingConfig,
    MutualConfig,
    Recipe,
    baseline,
    student,
    teacher,
)
from mmdist_e2e.grounding.data.batches import Batch
from mmdist_e2e.grounding.losses import (
    Taught,
    local_term,
    map_distance,
    mutual_loss,
    nearest_span,
)
from mmdist_e2e.grounding.network import GroundingNetwork, build_network

LOCAL = LocalConfig(depth=1, kernel=3)
EQ_3 = LossConfig(
    reconstruction_weight=1.0, whole_weight=1.0, diversity_weight=0.0, negatives=False
)
MATCHING = MatchingConfig(local_weight=2.0, top_divisor=4.0, temperature=0.2)
CHANNELS = (2, 3)  # of TINY's five


def network(channels: tuple[int, ...] = ()) -> GroundingNetwork:
    torch.manual_seed(3)
    model = GroundingNetwork(TINY, LOCAL, channels)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def masked(batch: Batch) -> torch.Tensor:
    return (torch.arange(batch.is_word_BW.shape[1]) % 3 == 0) & batch.is_word_BW


def taught(batch: Batch) -> Taught:
    size = len(batch.frames_BLF)
    generator = torch.Generator().manual_seed(1)
    return Taught(
        torch.rand(size, generator=generator),
        0.2 + 0.3 * torch.rand(size, generator=generator),
        torch.rand(size, TINY.length, generator=generator),
    )


def test_eqs_11_and_14_distance_and_its_stopped_gradient() -> None:
    rng = np.random.default_rng(0)
    first, second = (torch.tensor(rng.normal(size=(3, 7)), requires_grad=True) for _ in range(2))
    total = 0.0
    for b in range(3):
        gaps = [float((first[b, i] - second[b, i]).detach()) for i in range(7)]
        total += sum(map(abs, gaps)) / 7 / 3
    distance = map_distance(first, second)
    assert float(distance.detach()) == pytest.approx(total)
    (gradient,) = torch.autograd.grad(distance, first)
    assert gradient.abs().min() > 0
    assert torch.autograd.grad(map_distance(first, second), second, allow_unused=True) == (None,)
    mutual = mutual_loss(first, second)
    assert float(mutual.detach()) == pytest.approx(2 * total)
    # Each side moves as if the other stood still: half of what the plain sum's gradient would be.
    gradients = torch.autograd.grad(mutual, (first, second))
    assert_close(gradients[0], gradient)
    assert_close(gradients[1], -gradient)


def test_nearest_span_is_the_one_of_highest_iou() -> None:
    generator = torch.Generator().manual_seed(0)
    centers, widths = (torch.rand(20, 8, generator=generator) for _ in range(2))
    center, width = (torch.rand(20, generator=generator) for _ in range(2))
    found = nearest_span(centers, widths, center, width)
    for b in range(20):
        spans = [
            (max(c - w / 2, 0), min(c + w / 2, 1))
            for c, w in zip(
                [float(center[b]), *centers[b].tolist()],
                [float(width[b]), *widths[b].tolist()],
                strict=True,
            )
        ]
        (s, e), *own = spans
        ious = []
        for start, end in own:
            shared = max(0.0, min(e, end) - max(s, start))
            ious.append(shared / (e - s + end - start - shared))
        assert int(found[b]) == int(np.argmax(ious))


def test_eq_13_each_modality_has_a_branch_and_the_teachers_map_is_their_mean() -> None:
    model, batch = network(CHANNELS), random_batch([4, 1, 6])
    weights = {k: v.double().numpy() for k, v in model.state_dict().items()}
    with torch.no_grad():
        proposals = model.propose(batch.frames_BLF, batch.words_BWE, batch.is_word_BW)
        together = model.activate(batch, proposals)
        each = model.activate_each(batch, proposals)
    for b in range(3):
        words = batch.words_BWE[b, : int(batch.is_word_BW[b].sum())].double().numpy()
        q = query_vector(weights, words, heads=2, layers=2)
        maps = []
        for m, part in enumerate((slice(0, 2), slice(2, 5))):
            own = {
                key.replace(f"local.{m}.", "local."): value
                for key, value in weights.items()
                if not key.startswith("local.") or key.startswith(f"local.{m}.")
            }
            features = local_features(
                own, batch.frames_BLF[b][:, part].double().numpy(), depth=1, kernel=3,
                linear="local.frame_fc",
            )  # fmt: skip
            maps.append(features @ q / np.linalg.norm(features, axis=1) / np.linalg.norm(q))
            np.testing.assert_allclose(each[m][b], maps[m], rtol=0, atol=2e-5)
        np.testing.assert_allclose(together[b], (maps[0] + maps[1]) / 2, rtol=0, atol=2e-5)


@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_the_teachers_loss_is_the_sum_of_its_terms(weight: float) -> None:
    model, batch = network(CHANNELS), random_batch([4, 2, 6])
    mutual = MutualConfig(CHANNELS, mutual_weight=weight)
    terms = batch_loss(model, batch, masked(batch), EQ_3, MATCHING, mutual, ratio=1.0)
    plain = batch_loss(model, batch, masked(batch), EQ_3, ratio=1.0)
    expected = plain["loss"] + 2.0 * terms["local"]
    proposals = model.propose(batch.frames_BLF, batch.words_BWE, batch.is_word_BW)
    first, second = model.activate_each(batch, proposals)
    if weight:
        assert_close(terms["mutual"], 2 * (first - second).abs().mean())
        expected = expected + weight * terms["mutual"]
    else:
        assert "mutual" not in terms
    assert_close(terms["loss"], expected)
    # L_local is that of the mean map.
    maps = model.activate(batch, proposals, all_pairs=True)
    assert_close(terms["local"], local_term(maps, batch, MATCHING))


def test_eqs_10_to_12_against_the_plain_oracle() -> None:
    model, batch = network(), random_batch([4, 2, 6])
    hidden, answers = masked(batch), taught(batch)
    distill = DistillConfig()
    terms = batch_loss(model, batch, hidden, EQ_3, MATCHING, None, distill, answers, ratio=1.0)
    plain = batch_loss(model, batch, hidden, EQ_3, MATCHING, ratio=1.0)
    proposals = model.propose(batch.frames_BLF, batch.words_BWE, batch.is_word_BW)
    nearest = nearest_span(
        proposals.centers_BK, proposals.widths_BK, answers.centers_B, answers.widths_B
    )
    expected = 0.0
    for b in range(3):
        count = int(batch.is_word_BW[b].sum())
        k = int(nearest[b])
        span = proposals.centers_BK[b, k].item(), proposals.widths_BK[b, k].item()
        masks = model.proposal_masks(*(torch.tensor([[value]]) for value in span))
        single = dataclasses.replace(
            proposals,
            **{
                f.name: getattr(proposals, f.name)[b : b + 1] for f in dataclasses.fields(proposals)
            },
        )
        memory = model.remember(single.kept_BND, masks, whole=True)
        logits = model.reconstruct(single, hidden[b : b + 1], memory)[0].double()
        losses = [
            float(np.mean([
                -0.9 * row.log_softmax(-1)[int(i)] - 0.1 * row.log_softmax(-1).mean()
                for row, i in zip(logits[m, :count].detach(), batch.ids_BW[b, :count], strict=True)
            ]))
            for m in range(2)
        ]  # fmt: skip
        expected += (losses[0] + losses[1] + max(0.0, losses[0] - losses[1] + 0.1)) / 3
    assert float(terms["distill_global"]) == pytest.approx(expected, abs=1e-4)
    own = model.activate(batch, proposals)
    assert_close(terms["distill_local"], (own - answers.maps_BL).abs().mean())
    total = plain["loss"] + 0.9 * (terms["distill_global"] + 2.0 * terms["distill_local"])
    assert_close(terms["loss"], total, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("switches", "gone"),
    [
        ({"distill_global": False}, {"distill_global"}),
        ({"distill_local": False}, {"distill_local"}),
        ({"distill_global": False, "distill_local": False}, {"distill_global", "distill_local"}),
    ],
)
def test_distillation_switches(switches: dict[str, Any], gone: set[str]) -> None:
    model, batch = network(), random_batch([4, 2, 6])
    terms = batch_loss(
        model, batch, masked(batch), EQ_3, MATCHING, None, DistillConfig(**switches),
        taught(batch), ratio=1.0,
    )  # fmt: skip
    plain = batch_loss(model, batch, masked(batch), EQ_3, MATCHING, ratio=1.0)
    assert terms.keys() == (plain.keys() | {"distill_global", "distill_local"}) - gone
    if len(gone) == 2:
        assert_close(terms["loss"], plain["loss"])


def test_recipes_are_the_papers() -> None:
    shape = {"feature_dim": 5, "word_dim": 3, "vocabulary_size": 7, "length": 64}
    plain = baseline(**shape)
    ours, learner = teacher(**shape, channels=CHANNELS), student(**shape)
    assert (ours.training.epochs, ours.training.learning_rate) == (15, 3.5e-4)
    assert (learner.training.epochs, learner.training.learning_rate) == (15, 5e-4)
    assert learner.distill is not None
    assert learner.distill.distill_weight == 0.9  # β
    assert learner.model == plain.model == ours.model
    torch.manual_seed(0)
    theirs = build_network(learner).state_dict()
    torch.manual_seed(0)
    mine = build_network(plain).state_dict()
    assert theirs.keys() == mine.keys()  # the student's network is the baseline's
    assert all(torch.equal(theirs[k], mine[k]) for k in mine)
    for recipe in (ours, learner):
        assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
