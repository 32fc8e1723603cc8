"""Eqs. 1-9 of the paper, each against plain loops over plain numbers (float64)."""

from __future__ import annotations

import math

import grounding_reference as reference
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from test_local import local_features, query_vector
from test_models import TINY, batch_loss, random_batch

from mmdist_e2e.grounding.answer import mean_activation, proposal_scores, spans
from mmdist_e2e.grounding.config import LocalConfig, LossConfig, MatchingConfig
from mmdist_e2e.grounding.losses import (
    best_proposal,
    hinge,
    local_loss,
    local_term,
    match_log_probability,
    negative_pairs,
    top_mean,
)
from mmdist_e2e.grounding.network import (
    GroundingNetwork,
    activation_maps,
    matched_maps,
    reconstruction_loss,
)

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def doubles(tensor: torch.Tensor) -> NDArray[np.float64]:
    return tensor.detach().double().numpy()


def test_eq_1_reconstruction() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 2, 5, 9)
    ids = torch.tensor([[4, 2, 8, 1, 3], [7, 0, 5, 0, 0], [0, 0, 0, 0, 0]])
    loss = reconstruction_loss(logits, ids)
    for b in range(3):
        for m in range(2):
            expected = reference.sentence_loss(doubles(logits[b, m]), ids[b].tolist())
            np.testing.assert_allclose(loss[b, m], expected, **CLOSE)
    assert not loss[2].any()  # nothing to score


def test_eq_2_choice() -> None:
    losses = [[3.0, 1.0, 2.0], [0.5, 1.0, 0.5], [2.0, 2.0, 0.1]]
    expected = []
    for row in losses:
        best = 0
        for k, value in enumerate(row):
            if value < row[best]:
                best = k
        expected.append(best)
    assert best_proposal(torch.tensor(losses)).tolist() == expected


def test_eq_3_hinge() -> None:
    chosen, whole = [1.0, 2.0, 0.0], [1.0, 1.0, 5.0]
    total = sum(max(0.0, a - b + 0.1) for a, b in zip(chosen, whole, strict=True))
    np.testing.assert_allclose(
        hinge(torch.tensor(chosen), torch.tensor(whole), 0.1), total / 3, **CLOSE
    )


def test_eq_4_cosines_of_all_pairs_and_of_the_matched() -> None:
    torch.manual_seed(1)
    local, query = torch.randn(3, 5, 4), torch.randn(3, 4)
    local[1, 2] = 0  # a position of zeros fits nothing, and is no division by zero
    maps, matched = activation_maps(local, query), matched_maps(local, query)
    for i in range(3):
        for j in range(3):
            for position in range(5):
                v, q = doubles(local[i, position]), doubles(query[j])
                norms = math.sqrt(sum(x * x for x in v)) * math.sqrt(sum(x * x for x in q))
                dot = sum(x * y for x, y in zip(v, q, strict=True))
                expected = dot / norms if norms else 0.0
                np.testing.assert_allclose(maps[i, j, position], expected, **CLOSE)
                if i == j:
                    np.testing.assert_allclose(matched[i, position], expected, **CLOSE)


@pytest.mark.parametrize("count", [1, 3, 7])
def test_eq_5_mean_of_the_largest(count: int) -> None:
    torch.manual_seed(2)
    maps = torch.randn(2, 2, 7)
    fit = top_mean(maps, count)
    for i in range(2):
        for j in range(2):
            ranked = sorted(maps[i, j].tolist(), reverse=True)
            np.testing.assert_allclose(fit[i, j], sum(ranked[:count]) / count, **CLOSE)


VIDEOS, SENTENCES = [7, 7, 3, 5, 9], [0, 1, 0, 2, 2]


def test_eqs_6_and_7_leave_out_the_same_video_and_equal_sentences() -> None:
    torch.manual_seed(3)
    fit = torch.randn(5, 5)
    negatives = negative_pairs(torch.tensor(VIDEOS), torch.tensor(SENTENCES))
    log_p = match_log_probability(fit, 0.3, negatives)
    total = 0.0
    for i in range(5):
        below = 0.0
        for j in range(5):
            if j == i or (VIDEOS[i] != VIDEOS[j] and SENTENCES[i] != SENTENCES[j]):
                below += math.exp(float(fit[i, j]) / 0.3)
        p = math.exp(float(fit[i, i]) / 0.3) / below
        np.testing.assert_allclose(log_p[i].exp(), p, **CLOSE)
        total += math.log(p)
    np.testing.assert_allclose(local_loss(log_p), -total / 5, **CLOSE)


def test_eq_6_runs_over_sentences_for_a_video() -> None:
    fit = torch.tensor([[0.0, 5.0], [0.0, 0.0]])  # video 0 fits sentence 1 far better
    log_p = match_log_probability(fit, 1.0, ~torch.eye(2, dtype=torch.bool))
    assert log_p[0] < -5
    np.testing.assert_allclose(log_p[1], math.log(0.5), **CLOSE)


def test_a_pair_without_negatives_costs_nothing() -> None:
    maps = torch.randn(1, 1, 16)
    assert local_term(maps, random_batch([3]), MatchingConfig()) == 0


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("weight", [4.5, 0.0])
def test_eqs_3_and_8_whole(weight: float, whole: bool) -> None:
    """The loss of a batch from what plain loops find of each sentence, and local of all pairs."""
    torch.manual_seed(4)
    model = GroundingNetwork(TINY, LocalConfig(depth=1)).eval()
    batch = random_batch([5, 2, 7])
    batch.videos_B[2] = batch.videos_B[0]
    masked = (torch.arange(7) % 2 == 0) & batch.is_word_BW
    eq_3 = LossConfig(
        reconstruction_weight=1.0, whole_weight=1.0, diversity_weight=0.0, negatives=False,
        contrast_whole=whole,
    )  # fmt: skip
    matching = MatchingConfig(local_weight=weight, top_divisor=4.0, temperature=0.2)
    with torch.no_grad():
        terms = batch_loss(model, batch, masked, eq_3, matching, ratio=1.0)
    weights = {k: doubles(v) for k, v in model.state_dict().items()}
    total, vectors, features = 0.0, [], []
    for b in range(3):
        count = int(batch.is_word_BW[b].sum())
        frames, words = doubles(batch.frames_BLF[b]), doubles(batch.words_BWE[b, :count])
        r = reference.forward(
            weights, frames, words, batch.ids_BW[b, :count].tolist(), masked[b, :count].tolist(),
            heads=2, layers=2, kept=8, ratio=1.0,
        )  # fmt: skip
        best = float(min(r["losses"]))
        total += (best + r["whole"] + max(0.0, best - r["whole"] + 0.1) * whole) / 3
        features.append(local_features(weights, frames, depth=1, kernel=3))
        vectors.append(query_vector(weights, words, heads=2, layers=2))
    local = 0.0
    for i in range(3):
        below = {}
        for j in range(3):
            cosines = [
                v @ vectors[j] / np.linalg.norm(v) / np.linalg.norm(vectors[j]) for v in features[i]
            ]
            below[j] = math.exp(sum(sorted(cosines)[-3:]) / 3 / 0.2)  # L_T = 12 // 4
        against = [j for j in range(3) if j == i or {i, j} != {0, 2}]
        local -= math.log(below[i] / sum(below[j] for j in against)) / 3
    if weight:
        np.testing.assert_allclose(terms["local"], local, rtol=0, atol=1e-4)
    else:
        assert "local" not in terms
    assert ("hinge_whole" in terms) == whole
    np.testing.assert_allclose(terms["loss"], total + weight * local, rtol=0, atol=5e-4)


@pytest.mark.parametrize("contrast", [False, True])
def test_eq_9_scores(contrast: bool) -> None:
    rng = np.random.default_rng(5)
    length = 8
    maps = rng.normal(size=(2, length))
    edges = [(0.0, 1.0), (0.25, 0.5), (0.3, 0.31), (0.1, 0.9), (0.5, 0.5), (1.0, 1.0), (0.99, 1.0)]
    losses = rng.normal(size=(2, len(edges)))
    starts, ends = (torch.tensor([[e[i] for e in edges]] * 2) for i in range(2))
    activation = mean_activation(torch.tensor(maps), starts, ends, contrast=contrast)
    scores = proposal_scores(activation, torch.tensor(losses), 3.0)
    for b in range(2):
        for k, (s, e) in enumerate(edges):
            first, last = math.floor(s * length), math.ceil(e * length) - 1
            first = min(first, length - 1)
            inside = maps[b, first : max(last, first) + 1]
            assert len(inside) >= 1
            mean = sum(inside) / len(inside)
            if contrast and len(inside) < length:
                rest = [*maps[b, :first], *maps[b, max(last, first) + 1 :]]
                mean += sum(maps[b]) / length - sum(rest) / len(rest)
            expected = 3.0 * mean - losses[b, k]
            np.testing.assert_allclose(scores[b, k], expected, **CLOSE)


def test_spans_stay_in_the_video() -> None:
    starts, ends = spans(torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0.4, 0.2, 0.4]))
    np.testing.assert_allclose(starts, [0.0, 0.4, 0.7], atol=1e-6)
    np.testing.assert_allclose(ends, [0.3, 0.6, 1.0], atol=1e-6)
