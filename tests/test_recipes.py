"""Recipes: the published values, and settings by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from mmdist_e2e.grounding.config import Recipe, baseline, cpl, get_recipe
from mmdist_e2e.structures import MmdistError


def test_recipe_cpl() -> None:
    sizes = {"feature_dim": 1024, "word_dim": 300, "vocabulary_size": 1111}
    published = cpl(**sizes, length=200)
    assert (published.model.frame_divisor, published.model.kept_frames) == (4.0, 50)
    assert published.loss.diversity_prior == pytest.approx(0.146)
    assert published.loss.diversity_weight == pytest.approx(5.0)
    here = cpl(**sizes, length=64)
    assert here.model.kept_frames == 42
    # The length it asks for is the same, whatever N.
    assert here.loss.diversity_prior * 41 == pytest.approx(0.146 * 49)
    assert Recipe.from_json(json.loads(json.dumps(here.to_json()))) == here


def test_recipe_baseline_is_the_papers() -> None:
    sizes = {"feature_dim": 1024, "word_dim": 300, "vocabulary_size": 1111, "length": 200}
    ours, standard = baseline(**sizes), cpl(**sizes)
    assert ours.model == standard.model
    assert (ours.training.epochs, ours.training.learning_rate) == (15, 4e-4)
    assert ours.training.batch_size == 32
    loss = ours.loss
    # Eq. 3: three terms of weight 1 and ξ of CPL; its negatives and diversity stay.
    assert loss.reconstruction_weight == loss.whole_weight == loss.contrast_weight == 1
    assert (loss.margin_whole, loss.negatives) == (0.1, True)
    assert loss.diversity_prior == standard.loss.diversity_prior
    assert loss.diversity_weight == standard.loss.diversity_weight
    assert ours.matching is not None
    assert ours.local is not None
    assert (ours.matching.local_weight, ours.local.score_weight) == (4.5, 3.0)  # α, γ
    assert Recipe.from_json(json.loads(json.dumps(ours.to_json()))) == ours


@pytest.mark.parametrize("recipe", [cpl, baseline])
def test_few_queries_take_a_smaller_network_and_nothing_else(recipe: Callable[..., Recipe]) -> None:
    shape = {"feature_dim": 8, "word_dim": 3, "vocabulary_size": 5, "length": 64}
    many, few = recipe(**shape, queries=5000), recipe(**shape, queries=4999)
    assert many == recipe(**shape)
    assert (many.model.hidden, many.model.dropout) == (256, 0.1)
    assert (few.model.hidden, few.model.feed_forward, few.model.dropout) == (128, 256, 0.3)
    assert replace(few, model=many.model) == many


def test_without_local_takes_both_its_weights() -> None:
    recipe = baseline(feature_dim=4, word_dim=3, vocabulary_size=5)
    with pytest.raises(MmdistError, match="score_weight"):
        recipe.overridden({"local_weight": 0})
    without = recipe.overridden({"local_weight": 0, "score_weight": 0})
    assert without.matching is not None
    assert without.matching.local_weight == 0
    with pytest.raises(MmdistError, match="'cpl' has no setting 'local_weight'"):
        cpl(feature_dim=4, word_dim=3, vocabulary_size=5).overridden({"local_weight": 1})


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"droput": 0.2}, "no setting 'droput'"),
        ({"negatives": "maybe"}, "switch"),
        ({"epochs": "ten"}, "epochs"),
        ({"precision": "fp8"}, "precision"),
        ({"epochs": 0}, "at least 1"),
    ],
)
def test_bad_settings(values: dict[str, Any], reason: str) -> None:
    recipe = cpl(feature_dim=4, word_dim=3, vocabulary_size=5)
    with pytest.raises(MmdistError, match=reason):
        recipe.overridden(values)


def test_good_settings_take_their_kind() -> None:
    recipe = cpl(feature_dim=4, word_dim=3, vocabulary_size=5)
    changed = recipe.overridden({"dropout": 0, "negatives": "false", "warmup_updates": 10})
    assert (changed.model.dropout, changed.loss.negatives) == (0.0, False)
    assert changed.training.warmup_updates == 10
    assert recipe.loss.negatives


def test_unknown_recipe() -> None:
    with pytest.raises(MmdistError, match="valid: baseline, cpl"):
        get_recipe("clp")
