"""A checkpoint is a folder: config.json, model.safetensors, vocabulary.json and a model card.

Word vectors other than the shipped ones are stored with it in words.safetensors. Never a pickle.

Results are identified by their inputs, never by a file's name: {"settings": {name: value},
"digests": {what: SHA-256}}.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from mmdist_e2e.grounding.answer import GroundingModel
from mmdist_e2e.grounding.config import Recipe
from mmdist_e2e.grounding.data.annotations import Annotation
from mmdist_e2e.grounding.data.features import FeatureTable
from mmdist_e2e.grounding.data.text import Vocabulary
from mmdist_e2e.grounding.network import GroundingNetwork, build_network
from mmdist_e2e.store import digest_of, write_atomically, write_json
from mmdist_e2e.structures import MmdistError
from mmdist_e2e.weights.words import SHIPPED_NAME, read_safetensors, shipped_word_vectors

FORMAT = 1
CONFIG, MODEL, VOCABULARY, CARD = "config.json", "model.safetensors", "vocabulary.json", "README.md"
WORDS = "words.safetensors"
STATE = "state.safetensors"  # of a training, beside its checkpoint


def save_checkpoint(
    folder: Path,
    *,
    model: GroundingNetwork,
    recipe: Recipe,
    vocabulary: Vocabulary,
    table: FeatureTable,
    facts: Mapping[str, Any],
) -> None:
    """Write a checkpoint folder; config.json last, so that a folder that has one is complete.

    facts: seed, trained_on, selected_by, and whatever else config.json shall record.
    """
    vectors = vocabulary.vectors
    weights = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    files = {MODEL: save(weights)}
    if vectors.name != SHIPPED_NAME or vectors.digest != shipped_word_vectors().digest:
        files[WORDS] = vectors.to_bytes()
    for name, content in files.items():
        write_atomically(folder / name, content)
    write_json(folder / VOCABULARY, {"words": list(vocabulary.words)})
    config = {
        "format": FORMAT,
        "kind": "grounding",
        **recipe.to_json(),
        "modalities": list(table.matters),  # JSON objects have no order
        "features": {modality: dict(matters) for modality, matters in table.matters.items()},
        "word_vectors": {"name": vectors.name, "dim": vectors.dim, "digest": vectors.digest},
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
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
        trained_with = config["word_vectors"]
        own = folder / WORDS
        vectors = read_safetensors(own) if own.is_file() else shipped_word_vectors()
        model = build_network(recipe)
        model.load_state_dict(load_file(folder / MODEL), strict=True)
    except MmdistError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise MmdistError(
            f"The checkpoint '{folder}' cannot be loaded ({type(error).__name__}: {reason}); "
            f"restore the folder or train it again."
        ) from error
    if vectors.digest != trained_with["digest"]:
        raise MmdistError(
            f"The checkpoint '{folder}' was trained with the word vectors "
            f"'{trained_with['name']}', and '{vectors.name}' is not the same; restore its {WORDS}."
        )
    return GroundingModel(model.eval(), recipe, Vocabulary(words, vectors), config)


def is_finished(folder: Path) -> bool:
    """Whether a checkpoint's training is done, as its state says; without a state, it is."""
    if not (folder / STATE).is_file():
        return (folder / CONFIG).is_file()
    with suppress(OSError, SafetensorError, AttributeError, KeyError, ValueError, TypeError):
        with safe_open(folder / STATE, framework="pt") as file:
            known = {key: json.loads(value) for key, value in file.metadata().items()}
        return bool(known["progress"]["epoch"] >= known["identity"]["settings"]["epochs"])
    return False


def command_line(recipe: str, options: Mapping[str, object], settings: Mapping[str, object]) -> str:
    """`mmdist train` with these options, for a shell; absolute paths are cut to their names."""
    words = ["mmdist", "train", recipe]
    for name, value in options.items():
        if value is True:
            words.append(f"--{name}")
        elif value is not None and value is not False:
            absolute = isinstance(value, Path) and value.is_absolute()
            words += [f"--{name}", Path(str(value)).name if absolute else str(value)]
    for name, value in settings.items():
        words += ["--set", f"{name}={str(value).lower()}"]
    return shlex.join(words)


def model_card(config: Mapping[str, Any]) -> str:
    """The model card: what it is, what it was trained on, its figures and its limits."""
    validation = config.get("validation") or {}
    figures = ", ".join(f"{k} {v:.1f}" for k, v in validation.items()) or "none"
    model = config["model"]
    reads = ", ".join(
        f"{modality} features of {matters.get('extractor', '?')}"
        for modality, matters in config["features"].items()
    )
    command = f"`{config['command']}`" if "command" in config else "not recorded"
    continued = "".join(f" {sentence}" for sentence in config.get("continued", ()))
    return f"""# {config["name"]}: moments of a video from a sentence

- **Trained on**: {config["trained_on"]}; sentences and videos only, no timestamps.
- **Command**: {command}{continued}
- **Reads**: {reads}, {model["feature_dim"]} channels at {model["length"]} positions;
  sentences of at most 20 words by {config["word_vectors"]["name"]}.
- **Chosen**: {config["selected_by"]}.
- **Validation** (percent, chosen on the same data): {figures}.
- **Limits**: it knows what its training videos show and {model["vocabulary_size"]} words; its
  moments are about as long as its diversity prior asks for; on other videos it guesses.
"""


def model_digest(trained: GroundingModel) -> str:
    """Of all that a model's answers depend on, besides features and query."""
    weights = hashlib.sha256()
    for name, tensor in sorted(trained.model.state_dict().items()):
        weights.update(f"{name} {list(tensor.shape)}".encode())
        weights.update(tensor.cpu().contiguous().numpy().tobytes())
    recipe = {k: v for k, v in trained.recipe.to_json().items() if k != "training"}
    vocabulary = trained.vocabulary
    words = [list(vocabulary.words), vocabulary.vectors.digest]
    longest = trained.config.get("longest_duration_seconds")
    return digest_of([weights.hexdigest(), recipe, words, longest])


def annotations_digest(annotations: Iterable[Annotation], *, moments: bool = True) -> str:
    """Of videos, sentences and durations in their order; and of the moments where these matter."""
    return digest_of(
        [
            [a.video, a.sentence, a.duration_seconds, list(a.moments) if moments else None]
            for a in annotations
        ]
    )


def input_differences(known: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """How recorded inputs differ from those wanted, in words; empty where they agree."""
    if "digests" not in known:
        return "its inputs are not recorded (an older version of mmdist made it)"
    phrases = []
    for kind, phrase in (("digests", "other {}"), ("settings", "{} is {} there and {} here")):
        there, here = known[kind], wanted[kind]
        phrases += [
            phrase.format(name, there.get(name, "not set"), here.get(name, "not set"))
            for name in sorted({*there, *here})
            if there.get(name) != here.get(name)
        ]
    return "; ".join(phrases)


def refuse_other(what: str, known: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises MmdistError when `what`, a folder and its contents, was made from other inputs."""
    if unlike := input_differences(known, wanted):
        raise MmdistError(
            f"{what} of other inputs: {unlike}. Give another --out or delete that folder."
        )
