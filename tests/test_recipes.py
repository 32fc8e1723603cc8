"""Recipes: the published values, and settings by name."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mmdist_e2e.grounding.checkpoint import recipe_settings
from mmdist_e2e.grounding.config import (
    OURS,
    Recipe,
    advice,
    baseline,
    configure,
    cpl,
    get_recipe,
    student,
    teacher,
)
from mmdist_e2e.grounding.data.features import FeatureTable
from mmdist_e2e.grounding.train import Trainer
from mmdist_e2e.structures import MmdistError

# Charades-STA. "paper": Bao et al., AAAI 2024. "CPL": config/charades/main.json, models/cpl.py and
# models/loss.py of CPL's public code. "ours": neither gives a value (docs/settings.md).
GLOBAL_AND_TRAINING = {
    "length": 200,  # paper, "Implementation Details": L, video snippets
    "hidden": 256,  # paper, "Implementation Details": d, as CPL's hidden_size
    "heads": 4,  # CPL: DualTransformer.num_heads
    "layers": 3,  # CPL: num_decoder_layers1 and 2
    "feed_forward": 512,  # CPL: twice d_model
    "proposals": 8,  # CPL: num_props
    "sharpness": 9.0,  # CPL: sigma
    "frame_divisor": 4.0,  # CPL: props_len = n_frames // 4
    "dropout": 0.1,  # CPL: dropout, of the network and of the transformer
    "contrast_weight": 1.0,  # paper, Eq. 3; CPL: alpha_1
    "contrast_whole": True,  # paper, Eq. 3
    "diversity_weight": 5.0,  # CPL: alpha_2
    "diversity_prior": 0.146,  # CPL: lambda
    "margin_whole": 0.1,  # CPL: margin_1 (ξ of Eq. 3)
    "margin_negatives": 0.15,  # CPL: margin_2
    "negatives": True,  # CPL: use_negative
    "negative_growth": 0.5,  # CPL: gamma
    "batch_size": 32,  # paper, "Implementation Details"; CPL
    "warmup_updates": 400,  # CPL: optimizer.warmup_updates
    "gradient_norm": 10.0,  # CPL: clip_grad_norm_ in its runner
    "vocabulary_limit": 1111,  # paper, "Implementation Details"; CPL: vocab_size
    "precision": "bf16",  # ours
    "select_by": "val_loss",  # ours
}
CPLS_OWN = {
    "reconstruction_weight": 0.5,  # CPL: (L_rec + L_full) / 2
    "whole_weight": 0.5,
    "epochs": 30,  # CPL: max_num_epochs
    "learning_rate": 4e-4,  # CPL: optimizer.lr
}
THE_PAPERS = {
    "reconstruction_weight": 1.0,  # paper, Eq. 3
    "whole_weight": 1.0,  # paper, Eq. 3
    "epochs": 15,  # paper, "Implementation Details"
    "learning_rate": 4e-4,  # paper, "Implementation Details": the baseline's
    "local_weight": 4.5,  # paper: α of Eq. 8
    "score_weight": 3.0,  # paper: γ of Eq. 9
    "ranking": "inside",  # paper, Eq. 9
    "query": "content",  # ours
    "depth": 2,  # ours: "a sequence of convolutional layers"
    "kernel": 3,  # ours
    "top_divisor": 4.0,  # ours: L_T = L/4
    "temperature": 0.15,  # ours: τ
}
TEACHERS = {"learning_rate": 3.5e-4, "mutual_weight": 1.0}  # paper; ours: μ
STUDENTS = {
    "learning_rate": 5e-4,  # paper, "Implementation Details"
    "distill_weight": 0.9,  # paper: β of Eq. 12
    "distill_global": True,  # paper, Eq. 10
    "distill_local": True,  # paper, Eq. 11
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "cpl": GLOBAL_AND_TRAINING | CPLS_OWN,
    "baseline": GLOBAL_AND_TRAINING | THE_PAPERS,
    "teacher": GLOBAL_AND_TRAINING | THE_PAPERS | TEACHERS,
    "student": GLOBAL_AND_TRAINING | THE_PAPERS | STUDENTS,
}


def settings_of(name: str, preset: str, **options: Any) -> dict[str, Any]:
    values = recipe_settings(configure(name, preset=preset, modalities=2, **options))
    assert values.pop("recipe") == name
    return values


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_papers_preset_has_every_published_value(name: str) -> None:
    assert settings_of(name, "paper") == PUBLISHED[name]
    assert configure(name, modalities=2) == configure(name, preset="paper", modalities=2)
    assert configure(name, modalities=2).model.kept_frames == 50


def test_settings_called_ours_are_those_that_the_table_calls_so() -> None:
    table = Path(__file__).read_text()
    ours = re.findall(r'"(\w+)": \S+,  # ours', table)
    assert {*ours, "mutual_weight"} == set(OURS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_other_presets_differ_in_what_is_said(name: str) -> None:
    activitynet = {  # CPL: config/activitynet/main.json; the paper: 8,000 words
        "contrast_weight": 2.0 if name == "cpl" else 1.0,  # Eq. 3 has no α₁
        "diversity_weight": 0.1, "diversity_prior": 0.13, "negative_growth": 0.0,
        "vocabulary_limit": 8000,
    }  # fmt: skip
    assert settings_of(name, "paper-activitynet") == PUBLISHED[name] | activitynet
    few = {
        "length": 64, "hidden": 128, "feed_forward": 256, "dropout": 0.3, "frame_divisor": 1.5,
        "warmup_updates": None, "vocabulary_limit": None,
        "diversity_prior": pytest.approx(0.146 * 49 / 41),  # the same length of moments
        "diversity_weight": pytest.approx(5 * (41 / 49) ** 2),
    }  # fmt: skip
    few |= {"ranking": "contrast"} if name != "cpl" else {}
    assert settings_of(name, "small") == PUBLISHED[name] | few


def test_what_is_given_replaces_the_presets() -> None:
    given = {"hidden": 64, "warmup_updates": 7, "vocabulary_limit": "none"}
    changed = settings_of("baseline", "paper", length=64, settings=given)
    assert (changed["length"], changed["hidden"], changed["warmup_updates"]) == (64, 64, 7)
    assert changed["vocabulary_limit"] is None
    assert changed["frame_divisor"] == 1.5  # N is kept large, as the length decides
    assert settings_of("cpl", "small", settings={"length": 100})["length"] == 100
    with pytest.raises(MmdistError, match="preset 'papr' is unknown; valid: paper, "):
        configure("cpl", preset="papr")


def test_few_queries_are_told_how_both_presets_did() -> None:
    assert advice("paper", 5000) is advice("small", 10) is None
    for preset in ("paper", "paper-activitynet"):
        text = advice(preset, 4999)
        assert text is not None
        assert text.startswith("There are only 4999 training queries.")
        assert "--preset small" in text


def test_warmup_follows_the_queries_where_it_is_not_set() -> None:
    training = configure("baseline", preset="small").training
    assert [training.warmup(n) for n in (1, 320, 100_000)] == [1, 15, 400]
    assert configure("baseline").training.warmup(1) == 400


def test_recipes_survive_json() -> None:
    for recipe in of_all_settings():
        assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


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
        ("frame_divisor", 150.0, "lower the frame divisor"),
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
