"""A checkpoint is a folder: config.json, model.safetensors, vocabulary.json and a model card.

Word vectors that are not the shipped ones lie beside them in words.safetensors, so that a folder
answers on any machine. Never a pickle.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from mmdist_e2e.grounding.answer import GroundingModel
from mmdist_e2e.grounding.config import Recipe, get_recipe
from mmdist_e2e.grounding.data.features import FeatureTable
from mmdist_e2e.grounding.data.text import Vocabulary
from mmdist_e2e.grounding.network import GlobalBranch, build_network
from mmdist_e2e.store import write_atomically, write_json
from mmdist_e2e.structures import MmdistError
from mmdist_e2e.weights.words import (
    SHIPPED_NAME,
    WordVectors,
    read_safetensors,
    shipped_word_vectors,
)

FORMAT = 1

CONFIG, MODEL, VOCABULARY, CARD = "config.json", "model.safetensors", "vocabulary.json", "README.md"

WORDS = "words.safetensors"


def save_checkpoint(
    folder: Path,
    *,
    model: GlobalBranch,
    recipe: Recipe,
    vocabulary: Vocabulary,
    table: FeatureTable,
    facts: Mapping[str, Any],
) -> None:
    """Write a checkpoint folder; config.json last, so that a folder with one is whole.

    facts: seed, trained_on, selected_by, and whatever else the config shall remember.
    """
    vectors = vocabulary.vectors
    is_shipped = vectors.name == SHIPPED_NAME and vectors.digest == shipped_word_vectors().digest
    folder.mkdir(parents=True, exist_ok=True)
    weights = save({k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()})
    write_atomically(folder / MODEL, weights)
    if not is_shipped:
        write_atomically(folder / WORDS, vectors.to_bytes())
    write_json(folder / VOCABULARY, {"words": list(vocabulary.words)})
    config = {
        "format": FORMAT,
        "kind": "grounding",
        **recipe.to_json(),
        "modalities": list(table.matters),  # in order, which the keys of an object have not
        "features": {modality: dict(matters) for modality, matters in table.matters.items()},
        "word_vectors": {"name": vectors.name, "dim": vectors.dim, "digest": vectors.digest},
        **facts,
    }
    write_atomically(folder / CARD, model_card(config).encode())
    write_json(folder / CONFIG, config)


def load_checkpoint(folder: Path) -> GroundingModel:
    """Load a checkpoint folder, strictly. Raises MmdistError saying which file is wrong."""
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise MmdistError(
            f"'{folder}' is not a checkpoint (it has no {CONFIG}); give the folder that "
            f"mmdist train wrote."
        )
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        words = json.loads((folder / VOCABULARY).read_text(encoding="utf-8"))["words"]
        recipe = Recipe.from_json(config)
        vectors = _vectors_of(folder, config["word_vectors"])
        weights = load_file(folder / MODEL)
        model = build_network(recipe)
        model.load_state_dict(weights, strict=True)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        if isinstance(error, MmdistError):
            raise
        reason = str(error).splitlines()[0]
        raise MmdistError(
            f"The checkpoint '{folder}' cannot be loaded ({type(error).__name__}: {reason}); "
            f"restore the folder or train it again."
        ) from error
    return GroundingModel(model.eval(), recipe, Vocabulary(words, vectors), config)


def _vectors_of(folder: Path, expected: Mapping[str, Any]) -> WordVectors:
    own = folder / WORDS
    vectors = read_safetensors(own) if own.is_file() else shipped_word_vectors()
    if vectors.digest != expected["digest"]:
        raise MmdistError(
            f"The checkpoint '{folder}' was trained with the word vectors '{expected['name']}', "
            f"and '{vectors.name}' is not the same; restore its {WORDS}."
        )
    return vectors


def command_of(config: Mapping[str, Any]) -> str:
    """The command that trains such a model, with every setting that is not the recipe's own."""
    model, training = config["model"], config["training"]
    shape = {key: model[key] for key in ("feature_dim", "word_dim", "vocabulary_size", "length")}
    channels = config.get("mutual", {}).get("channels", ())
    standard = get_recipe(config["name"])(
        **shape, queries=config.get("queries"), channels=channels
    ).to_json()
    changed = {
        key: value
        for part in ("model", "loss", "training", "local", "matching", "mutual", "distill")
        for key, value in config.get(part, {}).items()
        if value != standard[part][key] and standard[part][key] is not None and key != "channels"
    }
    epochs = changed.pop("epochs", training["epochs"])
    words = ["mmdist train", config["name"], f"--length {model['length']}", f"--epochs {epochs}"]
    read = ",".join(config.get("modalities", config["features"]))
    if read != ("rgb,flow" if config["name"] == "teacher" else "rgb"):
        words.append(f"--modality {read}")
    if "distill" in config:
        words.append("--teacher TEACHER")
    words += [f"--set {key}={value}" for key, value in sorted(changed.items())]
    if not config.get("validation"):
        words.append("--carve 0")
    elif config.get("carved"):
        words.append(f"--carve {config['carved']}")
    return " ".join([*words, f"--seed {config['seed']}"])


def model_card(config: Mapping[str, Any]) -> str:
    """The model card: what it is, where from, how good, and what it cannot do."""
    validation = config.get("validation") or {}
    figures = ", ".join(f"{k} {v:.1f}" for k, v in validation.items()) or "none"
    model = config["model"]
    reads = ", ".join(
        f"{modality} features of {matters.get('extractor', '?')}"
        for modality, matters in config["features"].items()
    )
    return f"""# {config["name"]}: moments of a video from a sentence

- **Trained on**: {config["trained_on"]}; sentences and videos only, no timestamps.
- **Command**: `{command_of(config)}`
- **Reads**: {reads}, {model["feature_dim"]} channels at {model["length"]} positions;
  sentences of at most 20 words by {config["word_vectors"]["name"]}.
- **Chosen**: {config["selected_by"]}.
- **Validation** (percent, chosen on the same data): {figures}.
- **Limits**: it knows what its training videos show and {model["vocabulary_size"]} words; its
  moments are about as long as its diversity prior asks for; on other videos it guesses.
"""
