"""A checkpoint is a folder: config.json, model.safetensors, vocabulary.json and a model card.

Word vectors that are not the shipped ones lie beside them in words.safetensors, so that a folder
answers on any machine. Never a pickle.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from mmdist_e2e.grounding.datasets import FeatureTable, collate
from mmdist_e2e.grounding.inference import INFERENCE_BATCH, predict_batch, rank
from mmdist_e2e.grounding.models import GlobalBranch, GroundingNetwork
from mmdist_e2e.grounding.recipes import Recipe, get_recipe
from mmdist_e2e.grounding.text import Sentence, Vocabulary, is_content_word
from mmdist_e2e.grounding.windows import cut, merge, window_starts
from mmdist_e2e.store import write_atomically, write_json
from mmdist_e2e.structures import Features, MmdistError, Moment, differences
from mmdist_e2e.weights.words import (
    SHIPPED_NAME,
    WordVectors,
    read_safetensors,
    shipped_word_vectors,
)

FORMAT = 1
CONFIG, MODEL, VOCABULARY, CARD = "config.json", "model.safetensors", "vocabulary.json", "README.md"
WORDS = "words.safetensors"


@dataclass
class GroundingModel:
    """A trained network with all it needs to answer.

    config: the checkpoint's config.json (recipe, seed, what it was trained on and chosen by).
    """

    model: GroundingNetwork
    recipe: Recipe
    vocabulary: Vocabulary
    config: Mapping[str, Any]

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities that `answer` needs, in the order of the network's channels."""
        return tuple(self.config.get("modalities", self.config["features"]))

    @property
    def matters(self) -> Mapping[str, Mapping[str, Any]]:
        """By modality, the provenance that features must have."""
        matters: Mapping[str, Mapping[str, Any]] = self.config["features"]
        return matters

    @property
    def card_line(self) -> str:
        """Which model this is and what it was trained on, in one line."""
        return (
            f"{self.recipe.name} (seed {self.config['seed']}, {', '.join(self.modalities)}, "
            f"{self.recipe.model.hidden} channels), trained on {self.config['trained_on']}"
        )

    def check_table(self, table: FeatureTable) -> None:
        """`check_features` of every modality."""
        for modality, matters in table.matters.items():
            self.check_features(modality, matters)

    def check_features(self, modality: str, matters: Mapping[str, Any]) -> None:
        """Raises MmdistError when features were made unlike those of training, saying how."""
        unlike = differences(self.matters[modality], matters)
        if unlike:
            raise MmdistError(
                f"These {modality} features were not made as this model needs them: "
                f"{'; '.join(unlike)}; extract them again with the model's extractor and settings."
            )

    def check_query(self, query: str) -> Sentence:
        """The query as the network reads it.

        Raises MmdistError when it is empty, has no known word, or no word this model can rank by:
        reconstruction needs words of its vocabulary, an activation map any word with a vector.
        """
        sentence = self.vocabulary.encode(query)
        if not (sentence.ids_W > 0).any() and not self.model.score_weight:
            telling = [word for word in self.vocabulary.words if is_content_word(word)]
            raise MmdistError(
                f"None of the words of the query '{query}' occurs in the sentences that this model "
                f"was trained on, so it cannot rank moments for it; use words like "
                f"{', '.join(telling[:8])}."
            )
        return sentence

    def answer(self, features: Mapping[str, Features], query: str) -> list[Moment]:
        """All K proposals as moments in seconds, best first by the score of Eq. 9.

        features: by modality, as extracted. A video longer than 1.25 × the longest of training is
        read in windows, whose moments are merged: scores compare across them. Raises MmdistError
        for features of another kind and as `check_query`. The answer depends on no seed.
        """
        sentence = self.check_query(query)
        missing = [modality for modality in self.modalities if modality not in features]
        if missing:
            raise MmdistError(
                f"This model needs {' and '.join(missing)} features; these are "
                f"{', '.join(sorted(features)) or 'none'}."
            )
        given = [features[modality] for modality in self.modalities]
        for each in given:
            self.check_features(each.modality, each.provenance.matters)
        longest = float(self.config["longest_duration_seconds"])
        starts = window_starts(given[0].duration_seconds, longest)
        if len(starts) == 1:
            return self._read([given], sentence)[0]
        windows = [[cut(each, start, longest) for each in given] for start in starts]
        return merge(
            [
                Moment(moment.start + start, moment.end + start, moment.score)
                for start, moments in zip(starts, self._read(windows, sentence), strict=True)
                for moment in moments
            ]
        )

    def _read(self, videos: Sequence[Sequence[Features]], sentence: Sentence) -> list[list[Moment]]:
        """K moments of each video, best first; of a video its modalities, in the model's order."""
        self.model.eval()
        answers = []
        for begin in range(0, len(videos), INFERENCE_BATCH):
            some = videos[begin : begin + INFERENCE_BATCH]
            length = self.recipe.model.length
            data_BLF = np.stack(
                [np.concatenate([m.resample(length).data for m in v], axis=1) for v in some]
            )
            frames_BLF = torch.from_numpy(data_BLF).to(self.model.mask_vec.device)
            ranked = rank(predict_batch(self.model, collate([sentence] * len(some), frames_BLF)))
            for video, starts, ends, scores in zip(
                some, ranked.starts, ranked.ends, ranked.scores, strict=True
            ):
                seconds = video[0].duration_seconds
                answers.append(
                    [
                        Moment(float(s) * seconds, float(e) * seconds, float(score))
                        for s, e, score in zip(starts, ends, scores, strict=True)
                    ]
                )
        return answers


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
        model = recipe.network()
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
