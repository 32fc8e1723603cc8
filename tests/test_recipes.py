"""Recipes: the published values, and settings by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from mmdist_e2e.grounding.config import Recipe, baseline, cpl, get_recipe, student, teacher
from mmdist_e2e.grounding.data.features import FeatureTable
from mmdist_e2e.grounding.train import Trainer
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


SHAPE = {"feature_dim": 4, "word_dim": 3, "vocabulary_size": 5}


def of_all_settings() -> list[Recipe]:
    """Recipes that together have every setting."""
    return [teacher(**SHAPE, channels=(2, 2)), student(**SHAPE)]


@pytest.mark.parametrize(
    ("name", "value", "valid"),
    [
        ("droput", 0.2, "no setting 'droput'"),
        ("feature_dim", 9, "no setting 'feature_dim'"),  # the features decide
        ("negatives", "maybe", "true or false"),
        ("distill_local", 2, "true or false"),
        ("precision", "fp8", "valid: fp32, bf16"),
        ("ranking", "best", "valid: contrast, inside"),
        ("query", "first", "valid: content, mean"),
        ("select_by", 3, "valid: val_loss"),
        *((name, value, "whole number at least 1") for name in (
            "heads", "layers", "proposals", "feed_forward", "depth", "kernel", "epochs",
            "batch_size",
        ) for value in (0, -1, 2.5, math.nan, "ten")),
        *(("hidden", value, "whole number at least 4") for value in (0, 2, math.nan)),
        *((name, value, "finite number at least 0;") for name in (
            "reconstruction_weight", "whole_weight", "contrast_weight", "diversity_weight",
            "diversity_prior", "margin_whole", "margin_negatives", "negative_growth",
            "local_weight", "score_weight", "mutual_weight", "distill_weight",
        ) for value in (-0.1, math.nan, math.inf)),
        *((name, value, "finite number above 0;") for name in (
            "learning_rate", "gradient_norm", "temperature", "sharpness",
        ) for value in (0, -1, math.nan, math.inf, -math.inf, "much")),
        *(("dropout", value, "at least 0 and below 1;") for value in (1, 1.0, -0.1, math.nan)),
        *((name, value, "at least 1") for name in ("frame_divisor", "top_divisor")
          for value in (0, 0.5, math.nan, math.inf)),
        *(("warmup_updates", value, "whole number at least 0") for value in (-1, 0.5, math.nan)),
        ("frame_divisor", 40.0, "lower the frame divisor"),
        ("hidden", 30, "multiple of twice the heads"),
        ("kernel", 2, "odd"),
        ("length", 0, "whole number at least 1"),
    ],
)  # fmt: skip
def test_values_that_are_not_valid_are_refused_by_name(name: str, value: Any, valid: str) -> None:
    recipes = [r for r in of_all_settings() if name in r.homes] or of_all_settings()
    for recipe in recipes:
        with pytest.raises(MmdistError, match=valid) as caught:
            recipe.overridden({name: value})
        assert name in str(caught.value)
        if "no setting" not in valid:
            assert str(value) in str(caught.value)


def test_every_number_has_a_range() -> None:
    """A setting without one would take NaN."""
    for recipe in of_all_settings():
        for name, part in recipe.homes.items():
            now = getattr(recipe.parts[part], name)
            if isinstance(now, int | float) and not isinstance(now, bool):
                with pytest.raises(MmdistError, match=name):
                    recipe.overridden({name: math.nan})


@pytest.mark.parametrize("channels", [(3,), (1, 2, 3), (3, 0)])
def test_a_teacher_needs_two_modalities(channels: tuple[int, ...]) -> None:
    with pytest.raises(MmdistError, match=r"two modalities|channels"):
        teacher(**SHAPE, channels=channels)


OLD = {
    "model": {"scored_words": "all"},
    "local": {"relu_last": False, "own_frames": False},
    "matching": {"same_video_negatives": False, "same_sentence_negatives": False},
    "mutual": {"mutual_distance": "l1", "taught_map": "mean"},
    "distill": {"student_proposal": "iou", "distill_distance": "l1"},
}


def test_older_configs_load_where_their_settings_are_still_supported() -> None:
    for recipe in of_all_settings():
        raw = recipe.to_json()
        old = {part: held | OLD.get(part, {}) for part, held in raw.items() if part != "name"}
        assert Recipe.from_json({"name": raw["name"], **old}) == recipe


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("model", "scored_words", "masked"),
        ("local", "relu_last", True),
        ("local", "own_frames", True),
        ("local", "query", "last"),
        ("matching", "same_video_negatives", True),
        ("matching", "same_sentence_negatives", True),
        ("mutual", "mutual_distance", "norm"),
        ("mutual", "taught_map", "each"),
        ("distill", "student_proposal", "index"),
        ("distill", "distill_distance", "l2"),
    ],
)
def test_older_configs_of_other_values_are_refused(part: str, name: str, value: object) -> None:
    for recipe in of_all_settings():
        raw = recipe.to_json()
        if part in raw:
            with pytest.raises(MmdistError, match=f"{name}.*{value!r}"):
                Recipe.from_json({**raw, part: raw[part] | {name: value}})
        if name != "query":
            with pytest.raises(MmdistError, match=f"no setting '{name}'"):
                recipe.overridden({name: value})


def test_good_settings_take_their_kind() -> None:
    recipe = cpl(feature_dim=4, word_dim=3, vocabulary_size=5)
    changed = recipe.overridden({"dropout": 0, "negatives": "false", "warmup_updates": 10})
    assert (changed.model.dropout, changed.loss.negatives) == (0.0, False)
    assert changed.training.warmup_updates == 10
    assert recipe.loss.negatives


def test_unknown_recipe() -> None:
    with pytest.raises(MmdistError, match="valid: baseline, cpl"):
        get_recipe("clp")


@pytest.mark.parametrize("seed", [-1, 2**32, 2**64])
def test_a_seed_out_of_range_is_refused(seed: int) -> None:
    table = FeatureTable((), torch.zeros(1, 64, 4), {}, {"rgb": {}}, {"rgb": 4})
    with pytest.raises(MmdistError, match=f"seed .*{seed}"):
        Trainer(cpl(**SHAPE), [], table, seed)
