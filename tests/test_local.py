"""The local branch against plain loops; and the two branches side by side in one network."""

from __future__ import annotations

import dataclasses

import grounding_reference as reference
import numpy as np
import pytest
import torch
from test_models import TINY, alone, batch_loss, random_batch, random_model
from torch.testing import assert_close

from mmdist_e2e.grounding.answer import Scored, predict_batch
from mmdist_e2e.grounding.config import LocalConfig, LossConfig, MatchingConfig
from mmdist_e2e.grounding.data.batches import Batch
from mmdist_e2e.grounding.network import (
    GroundingNetwork,
    content_words,
    sentence_vector,
)

Array = reference.Array
LOCAL = LocalConfig()


def local_features(
    w: reference.Weights, frames: Array, *, depth: int, kernel: int, linear: str = "frame_fc"
) -> Array:
    """V̂ [L, D] of one video's features [L, F]: a Linear, then convolutions written out."""
    x = reference.linear(w, linear, frames)
    for c in range(depth):
        weight, bias = (w[f"local.convolutions.{c}.{n}"] for n in ("weight", "bias"))
        out = np.tile(bias, (len(x), 1))
        for position in range(len(x)):
            for tap in range(kernel):
                source = position + tap - kernel // 2
                if 0 <= source < len(x):
                    out[position] += weight[:, :, tap] @ x[source]
        x = np.maximum(out, 0) if c < depth - 1 else out
    return x


def query_vector(w: reference.Weights, words: Array, *, heads: int, layers: int) -> Array:
    """q [D] of one sentence without padding: the word stack on its own."""
    tokens = reference.linear(w, "word_fc", np.concatenate([w["start_vec"][None], words]))
    tokens = tokens + reference.positions(*tokens.shape)
    encoded = reference.stack(w, "trans.decoder2", tokens, heads=heads, layers=layers)
    return encoded[1:].mean(axis=0)


def random_network(local: LocalConfig = LOCAL, seed: int = 0) -> GroundingNetwork:
    """All weights random, biases too."""
    torch.manual_seed(seed)
    model = GroundingNetwork(TINY, local)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


@pytest.mark.parametrize(
    "local", [LOCAL, LocalConfig(depth=1, kernel=5, query="mean"), LocalConfig(depth=3, kernel=1)]
)
def test_activation_maps_against_plain_loops(local: LocalConfig) -> None:
    model, batch = random_network(local), random_batch([4, 1, 6])
    weights = {k: v.double().numpy() for k, v in model.state_dict().items()}
    with torch.no_grad():
        proposals = model.propose(batch.frames_BLF, batch.words_BWE, batch.is_word_BW)
        matched = model.activate(batch, proposals)
        pairs = model.activate(batch, proposals, all_pairs=True)
    features = [
        local_features(
            weights,
            frames.double().numpy(),
            depth=local.depth,
            kernel=local.kernel,
        )
        for frames in batch.frames_BLF
    ]
    for j in range(3):
        words = batch.words_BWE[j, : int(batch.is_word_BW[j].sum())].double().numpy()
        q = query_vector(weights, words, heads=2, layers=2)
        for i in range(3):
            norms = np.maximum(np.linalg.norm(features[i], axis=1), 1e-8) * np.linalg.norm(q)
            expected = features[i] @ q / norms
            np.testing.assert_allclose(pairs[i, j], expected, rtol=0, atol=2e-5)
            if i == j:
                np.testing.assert_allclose(matched[i], expected, rtol=0, atol=2e-5)


def test_the_query_vector_reads_no_start_and_no_padding() -> None:
    encoded = torch.randn(3, 5, 4)
    is_word = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]], dtype=torch.bool)
    content = torch.tensor([[0, 1, 1, 0], [1, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.bool)
    every = [encoded[0, 1:3].mean(0), encoded[1, 1:].mean(0), encoded[2, 1:4].mean(0)]
    assert_close(sentence_vector(encoded, is_word), torch.stack(every))
    # A content word among the padding is none, and without any all words are read.
    some = torch.stack([encoded[0, 2], (encoded[1, 1] + encoded[1, 3]) / 2, every[2]])
    assert_close(sentence_vector(encoded, content_words(is_word, content)), some)


def test_the_local_branch_only_adds_parameters() -> None:
    torch.manual_seed(7)
    plain = GroundingNetwork(TINY).state_dict()
    torch.manual_seed(7)
    both = GroundingNetwork(TINY, LOCAL).state_dict()
    # One seed gives the global branch the same start, with a local branch or without.
    assert all(torch.equal(both[name], value) for name, value in plain.items())
    extra = sorted(both.keys() - plain.keys())
    assert extra == [f"local.convolutions.{i}.{n}" for i in (0, 1) for n in ("bias", "weight")]


def test_answers_with_a_map_do_not_depend_on_seed_batch_or_order() -> None:
    model, batch = random_network(), random_batch([4, 1, 9, 6])
    together = predict_batch(model, batch)
    torch.manual_seed(99)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = predict_batch(model, Batch(*(t[order] for t in vars(batch).values())))
    for row in range(4):
        single = predict_batch(model, alone(batch, row))
        for a, b, c in zip(together, single, shuffled, strict=True):
            assert_close(a[row], b[0], rtol=0, atol=5e-6)
            assert_close(a[order[row]], c[row], rtol=0, atol=5e-6)


def scored(score_weight: float) -> Scored:
    config = dataclasses.replace(LOCAL, score_weight=score_weight)
    return predict_batch(random_network(config), random_batch([4, 6]))


def test_the_map_enters_the_score_by_its_weight_alone() -> None:
    none, some, more = scored(0.0), scored(1.5), scored(3.0)
    assert torch.equal(none.scores_BK, -none.losses_BK)
    assert torch.equal(none.losses_BK, more.losses_BK)
    map_part = more.scores_BK + more.losses_BK
    assert map_part.abs().max() > 0.1
    assert map_part.abs().max() <= 3.0
    assert_close(some.scores_BK + some.losses_BK, map_part / 2)


def test_the_prediction_position_is_not_a_snippet() -> None:
    model, batch = random_network(), random_batch([4])
    with torch.no_grad():
        proposals = model.propose(batch.frames_BLF, batch.words_BWE, batch.is_word_BW)
        before = model.activate(batch, proposals)
        model.pred_vec.fill_(100.0)
        proposals = model.propose(batch.frames_BLF, batch.words_BWE, batch.is_word_BW)
        assert torch.equal(model.activate(batch, proposals), before)
    assert before.shape == (1, TINY.length)


def test_the_local_loss_teaches_its_branch_and_what_it_shares() -> None:
    torch.manual_seed(3)
    model, batch = GroundingNetwork(TINY, LOCAL), random_batch([5, 2, 7, 3])
    masked = (torch.arange(7) % 3 == 0) & batch.is_word_BW
    terms = batch_loss(model, batch, masked, LossConfig(), MatchingConfig(), ratio=0.8)
    gradients = torch.autograd.grad(
        terms["local"], list(model.parameters()), retain_graph=True, allow_unused=True
    )
    taught = {
        name
        for (name, _), gradient in zip(model.named_parameters(), gradients, strict=True)
        if gradient is not None and gradient.any()
    }
    assert {n for n, _ in model.named_parameters() if n.startswith("local.")} <= taught
    assert {"frame_fc.weight", "word_fc.weight"} <= taught
    assert not {n for n in taught if n.startswith(("fc_", "trans.decoder1"))}
    terms["loss"].backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_bf16_keeps_the_cosines_digits() -> None:
    model, batch = random_network(), random_batch([4, 6])
    with torch.no_grad():
        proposals = model.propose(batch.frames_BLF, batch.words_BWE, batch.is_word_BW)
        with torch.autocast("cpu", torch.bfloat16):
            maps = model.activate(batch, proposals, all_pairs=True)
    assert maps.dtype == torch.float32
    assert not torch.equal(maps, maps.bfloat16().float())


def test_global_answers_are_untouched_by_the_branch() -> None:
    plain, batch = random_model(), random_batch([4, 6])
    both = GroundingNetwork(TINY, LOCAL).eval()
    both.load_state_dict(plain.state_dict(), strict=False)
    a, b = predict_batch(plain, batch), predict_batch(both, batch)
    assert torch.equal(a.centers_BK, b.centers_BK)
    assert torch.equal(a.losses_BK, b.losses_BK)
    assert not torch.equal(a.scores_BK, b.scores_BK)


def test_a_dead_branch_gives_zeros_not_nan() -> None:
    model = random_network()
    assert model.local is not None
    for parameter in model.local.parameters():
        torch.nn.init.zeros_(parameter)
    batch = random_batch([3, 4])
    proposals = model.propose(batch.frames_BLF, batch.words_BWE, batch.is_word_BW)
    maps = model.activate(batch, proposals, all_pairs=True)
    maps.sum().backward()
    assert not maps.any()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
