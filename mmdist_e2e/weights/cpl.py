"""Converts CPL's released checkpoints (Zheng et al., CVPR 2022) to our checkpoint folders.

CPL's public code saves `model_parameters` (119 tensors, with our names) and `config`. The ids of
words follow from the `counter` in its glove.pkl.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmdist_e2e.grounding.checkpoint import CARD, save_checkpoint
from mmdist_e2e.grounding.config import Recipe, cpl
from mmdist_e2e.grounding.data.features import FeatureTable
from mmdist_e2e.grounding.data.text import Vocabulary
from mmdist_e2e.grounding.network import GroundingNetwork
from mmdist_e2e.store import write_atomically
from mmdist_e2e.structures import MmdistError, Provenance
from mmdist_e2e.weights.download import git_blob_sha1
from mmdist_e2e.weights.registry import ENTRIES, is_state, misfits, read_saved, source_of
from mmdist_e2e.weights.words import read_cpl_pickle

# Our setting and its place in CPL's config. A config without it gets the published value, the
# recipe's default.
SETTINGS = {
    "length": "dataset.max_num_frames",
    "vocabulary_limit": "dataset.vocab_size",
    "heads": "model.config.DualTransformer.num_heads",
    "sharpness": "model.config.sigma",
    "dropout": "model.config.dropout",
    "negative_growth": "model.config.gamma",
    "margin_whole": "loss.margin_1",
    "margin_negatives": "loss.margin_2",
    "contrast_weight": "loss.alpha_1",
    "diversity_weight": "loss.alpha_2",
    "diversity_prior": "loss.lambda",
    "epochs": "train.max_num_epochs",
    "batch_size": "train.batch_size",
    "learning_rate": "train.optimizer.lr",
    "warmup_updates": "train.optimizer.warmup_updates",
}

# What features must have that the authors published: they come as HDF5 or as .npy files.
PUBLISHED_FEATURES = [Provenance.external(kind).matters for kind in ("hdf5", "npy")]


@dataclass(frozen=True)
class Dataset:
    """A dataset that CPL has a checkpoint for; name: of that model and of its vocabulary."""

    name: str
    title: str
    features: str
    longest_seconds: float  # of its training videos
    videos: str  # what they show


DATASETS = {
    "CharadesSTA": Dataset(
        name="charades",
        title="Charades-STA",
        features="I3D on RGB, trained on Charades (the extractor i3d-rgb-charades)",
        longest_seconds=194.33,
        videos="home videos of half a minute",
    ),
    "ActivityNet": Dataset(
        name="activitynet",
        title="ActivityNet Captions",
        features="C3D on RGB, reduced to 500 channels by ActivityNet's own PCA",
        longest_seconds=745.5,  # of the two validation splits; those of training are not available
        videos="web videos of sports and daily life of two minutes",
    ),
}


def read_cpl(file: Path) -> tuple[Dataset, Recipe, GroundingNetwork]:
    """The dataset, recipe and network in a checkpoint of CPL's public code; none of it is run.

    Raises MmdistError for a file that holds anything else, or whose tensors are not those of such
    a network, or of a dataset that CPL's code does not have.
    """
    raw = read_saved(file, "a CPL checkpoint")
    parts: Any = raw if isinstance(raw, Mapping) else {}
    state, settings = parts.get("model_parameters"), parts.get("config")
    if not isinstance(settings, Mapping) or not is_state(state):
        raise MmdistError(
            f"'{file}' has no model_parameters and config, as a CPL checkpoint has; give CPL's "
            f"model-best.pt."
        )
    name = _setting(settings, "dataset.dataset")
    if name not in DATASETS:
        raise MmdistError(
            f"The config in '{file}' names the dataset {name!r}; CPL checkpoints of "
            f"{' and '.join(DATASETS)} can be converted."
        )
    fc1 = "trans.decoder1.decoder_layers.{}.fc1"  # of each layer
    own = {ours: _setting(settings, theirs) for ours, theirs in SETTINGS.items()}
    try:
        (hidden, feature_dim), (_, word_dim), (outputs, _), (spans, _), (feed_forward, _) = (
            state[f"{name}.weight"].shape
            for name in ("frame_fc", "word_fc", "fc_comp", "fc_gauss", fc1.format(0))
        )
        layers = sum(f"{fc1.format(i)}.weight" in state for i in range(len(state)))
        shape = {"hidden": hidden, "proposals": spans // 2, "feed_forward": feed_forward}
        shape |= {"layers": layers, "frame_divisor": 4.0}
        recipe = cpl(
            length=200, feature_dim=feature_dim, word_dim=word_dim, vocabulary_size=outputs - 1
        ).overridden(shape | {k: v for k, v in own.items() if v is not None})
        model = GroundingNetwork(recipe.model).eval()
        problems = misfits(model.state_dict(), state)
    except (KeyError, ValueError) as error:
        problems = str(error)
    if problems:
        raise MmdistError(
            f"'{file}' does not hold the weights of a CPL network ({problems}); give a file that "
            f"CPL's public code saved, like its model-best.pt."
        )
    model.load_state_dict(state)
    return DATASETS[name], recipe, model


def _setting(config: Any, path: str) -> Any:
    """The value at a dotted path; None if there is none."""
    for key in path.split("."):
        config = config.get(key) if isinstance(config, Mapping) else None
    return config


def read_vocabulary(file: Path, size: int, dim: int) -> Vocabulary:
    """The `size` most frequent words of CPL's glove.pkl: ids by rank, ties by first appearance.

    CPL drops all other words from a query. Raises MmdistError for a file that is no such pickle,
    has too few words or vectors of another length than `dim`.
    """
    # most_common is stable: ties keep the order of first appearance.
    vectors = read_cpl_pickle(
        file, lambda raw: (str(w) for w, _ in Counter(dict(raw["counter"])).most_common(size))
    )
    found, own_dim = vectors.vectors_VE.shape
    if (found, own_dim) != (size, dim):
        raise MmdistError(
            f"'{file}' counts {found} words with word vectors of {own_dim} numbers "
            f"and the checkpoint reads {size} words of {dim}; give the glove.pkl that it was "
            f"trained with."
        )
    return Vocabulary(vectors.words, vectors)


def convert_cpl(
    file: Path,
    vocabulary_file: Path,
    out: Path,
    features_of: Callable[[int], Mapping[str, Mapping[str, Any]]],
) -> None:
    """Write a checkpoint folder with the answers of the network in a file of CPL's.

    features_of: by modality the provenance that features of so many channels must have; published
    ones, imported from HDF5 or .npy files, are read as well.
    Raises MmdistError for files that do not fit the network or each other.
    """
    dataset, recipe, model = read_cpl(file)
    shape = recipe.model
    features = features_of(shape.feature_dim)
    vocabulary = read_vocabulary(vocabulary_file, shape.vocabulary_size, shape.word_dim)
    names = {entry.git_sha1: entry.name for entry in ENTRIES.values()}
    known, words = (names.get(git_blob_sha1(path)) for path in (file, vocabulary_file))
    is_released = known == f"cpl-{dataset.name}"
    own_words = f"cpl-vocabulary-{dataset.name}"
    # Two known files must belong together: equal sizes do not prove it.
    if words != own_words and (words or is_released):
        raise MmdistError(
            f"'{vocabulary_file}' is {words or 'not a file that CPL released'}; this checkpoint "
            f"needs the vocabulary of {dataset.title}: {own_words}."
        )
    source = source_of(file) | {"released": is_released}
    origin = "CPL's released file" if is_released else "not the file that CPL released"
    facts = {
        "seed": "unknown",
        "trained_on": f"{dataset.title} by CPL's public code, {origin}",
        "warning": f"trained on {dataset.videos}: on other videos this is a guess.",
        "selected_by": "highest mIoU on the test split, as CPL chooses its best epoch",
        "longest_duration_seconds": dataset.longest_seconds,
        "source": source,
        "accepts": PUBLISHED_FEATURES,
    }
    none_VLF = torch.empty(0, shape.length, shape.feature_dim)
    table = FeatureTable((), none_VLF, {}, features, dict.fromkeys(features, shape.feature_dim))
    save_checkpoint(
        out, model=model, recipe=recipe, vocabulary=vocabulary, table=table, facts=facts
    )
    kinds = (f"`{each['extractor']}`" for each in (*features.values(), *PUBLISHED_FEATURES))
    reads = " or ".join(dict.fromkeys(kinds))
    text = f"""# cpl: moments of a video from a sentence, converted from CPL

- **Origin**: a checkpoint of CPL (Zheng et al., CVPR 2022; github.com/minghangz/cpl), {origin},
  SHA-256 {source["sha256"]}.
- **Trained on**: {dataset.title}; sentences and videos only, no timestamps.
- **Features**: in training {dataset.features}; {shape.feature_dim} channels at {shape.length}
  positions. This folder takes features of {reads}; convert again with another --extractor for
  other features.
- **Words**: the {shape.vocabulary_size} most frequent of CPL's glove.pkl, counted over training and
  test sentences; all other words of a query are dropped, as in CPL.
- **Selected**: by CPL's code, as the epoch of highest mIoU on the test split.
- **Ranking**: by reconstruction alone, over every word, averaged over fixed masks; CPL draws its
  masks at random, so its own answers differ slightly between runs.
- **Limits**: the lengths of moments follow its diversity prior; answers on videos unlike its
  training data are guesses.
"""
    write_atomically(out / CARD, text.encode())
