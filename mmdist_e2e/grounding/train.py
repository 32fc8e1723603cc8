"""One loop for all recipes: features and sentences in, a checkpoint folder out.

The same call gives the same bits on one device, and an interrupted run, called again, ends with
the bits of an uninterrupted one.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmdist_e2e.grounding.annotations import world_of
from mmdist_e2e.grounding.checkpoint import load_checkpoint, save_checkpoint
from mmdist_e2e.grounding.datasets import (
    Annotation,
    FeatureTable,
    Item,
    carve_validation,
    load_annotations,
    load_features,
    make_items,
    protocol_of,
)
from mmdist_e2e.grounding.distill import (
    TeacherAnswers,
    cached_answers,
    check_teacher,
    tensors_digest,
)
from mmdist_e2e.grounding.evaluate import prediction_iou, recall_metrics
from mmdist_e2e.grounding.features import places_of
from mmdist_e2e.grounding.inference import Progress, predict
from mmdist_e2e.grounding.parallel import rank
from mmdist_e2e.grounding.recipes import TrainingConfig, get_recipe
from mmdist_e2e.grounding.text import Vocabulary, tokenize
from mmdist_e2e.grounding.trainer import Trainer, learning_rate, negative_ratio
from mmdist_e2e.store import check_out, write_atomically, write_json
from mmdist_e2e.structures import MmdistError
from mmdist_e2e.weights.words import WordVectors

__all__ = ["Trainer", "learning_rate", "negative_ratio", "train_run", "validate"]

STATE, HISTORY, LOG, LAST = "state.safetensors", "history.json", "log.csv", "last"
TEACHER = "teacher.safetensors"  # its answers to the training pairs
CARVED_FRACTION = 0.1
SELECTED_BY = {
    "val_recall": "the epoch of highest R@1 at IoU 0.5 (by timestamps) on {}",
    "val_loss": "the epoch of lowest reconstruction loss (no timestamps) on {}",
    "last": "the last epoch (no validation)",
}
WATCHED = {"R@1,IoU=0.5": "R@1", "R@5,IoU=0.5": "R@5", "mIoU": "mIoU"}  # in progress


def validate(trainer: Trainer, items: Sequence[Item], table: FeatureTable) -> dict[str, float]:
    """R@n, mIoU, and L_rec[k*] averaged over queries: `loss`, which knows no timestamps."""
    predictions = predict(trainer.model, items, table, precision=trainer.recipe.training.precision)
    metrics = recall_metrics(prediction_iou(predictions, items))
    return metrics | {"loss": float(predictions.losses.min(axis=1).mean())}


def _score(settings: TrainingConfig, epoch: int, validation: Mapping[str, float]) -> float:
    match settings.select_by:
        case "val_recall":
            return validation["R@1,IoU=0.5"]
        case "val_loss":
            return -validation["loss"]
    return float(epoch)


def train_run(
    *,
    recipe_name: str,
    features_path: Path,
    flow_features_path: Path | None = None,
    train_path: Path,
    val_path: Path | None,
    out: Path,
    seed: int,
    word_vectors: WordVectors,
    carve: float = CARVED_FRACTION,
    durations: Path | None = None,
    protocol: str = "official",
    modalities: Sequence[str] = ("rgb",),
    teacher: Path | None = None,
    length: int = 64,
    overrides: Mapping[str, Any] | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train a recipe from features and sentences; `out` becomes the best epoch's checkpoint.

    Writes out/ (best), out/last/ (last epoch), out/history.json, out/log.csv, and
    out/state.safetensors (to resume by calling again). carve: without `val_path` this share of the
    training videos is set aside as validation; 0: no validation, the last epoch. modalities:
    what the network reads; flow_features_path: where flow lies, if not beside RGB. teacher: the
    run that a student learns from; its modalities are looked for in the same places. overrides:
    settings of the recipe by name. Returns a summary.
    Training reads videos and sentences; timestamps of the validation split are used only by
    `select_by="val_recall"`. Raises MmdistError for unusable input.
    """
    check_out(out)
    train_annotations = load_annotations(train_path, durations=durations, protocol=protocol)
    val_annotations: list[Annotation] = []
    where = "no validation"
    if val_path is not None:
        val_annotations = load_annotations(val_path, durations=durations, protocol=protocol)
        where = val_path.name
        _refuse_overlap(train_annotations, val_annotations)
    elif carve:
        train_annotations, val_annotations, where = carve_validation(train_annotations, carve)
    sentences = [a.sentence for a in train_annotations]
    word_vectors = word_vectors.limited(w for s in sentences for w in tokenize(s))
    vocabulary = Vocabulary.from_sentences(sentences, word_vectors)
    overrides = dict(overrides or {})
    length = int(overrides.pop("length", length))
    videos = [a.video for a in (*train_annotations, *val_annotations)]
    table = load_features(
        places_of(modalities, features_path, flow_features_path), videos, length=length
    ).to(device)
    recipe = get_recipe(recipe_name)(
        feature_dim=table.data_VLF.shape[2],
        word_dim=word_vectors.dim,
        vocabulary_size=len(vocabulary),
        length=length,
        queries=len(train_annotations),
        channels=tuple(table.channels.values()),
    ).overridden(overrides)
    answers = None
    if recipe.distill is not None:
        answers = _ask(
            teacher,
            places=lambda each: places_of(each, features_path, flow_features_path),
            annotations=train_annotations,
            length=length,
            device=device,
            cache=out / TEACHER,
            progress=progress,
        )
    if not val_annotations and recipe.training.select_by != "last":
        recipe = recipe.overridden({"select_by": "last"})
    items = make_items(train_annotations, table, vocabulary)
    val_items = make_items(val_annotations, table, vocabulary)

    # A carved split is a part of the file whose protocol is named.
    named = [*items, *([] if val_path else val_items)]
    known = [replace(i.annotation, duration_seconds=i.duration_seconds) for i in named]
    source = world_of(train_path) or f"{len(items)} sentences of {protocol_of(train_path, known)}"
    trainer = Trainer(recipe, items, table, seed, answers)
    identity = {
        "recipe": recipe.to_json(),
        "seed": seed,
        "training sentences": len(items),
        "validation": where,
        "features": {modality: dict(matters) for modality, matters in table.matters.items()},
        "teacher": tensors_digest(vars(answers)) if answers else None,
        "word vectors": word_vectors.digest,
    }
    facts = {
        "seed": seed,
        "trained_on": source,
        "queries": len(train_annotations),
        "selected_by": SELECTED_BY[recipe.training.select_by].format(where),
        "carved": carve if carve and not val_path else None,
        "longest_duration_seconds": max(item.duration_seconds for item in items),
        "training": recipe.to_json()["training"] | {"warmup_updates": trainer.warmup},
    }
    state_path = out / STATE
    if state_path.is_file():
        trainer.load_state(state_path, identity)
    for epoch, validation in _epochs(trainer, val_items, progress):
        state = trainer.state
        score = _score(recipe.training, epoch, validation)
        saved: dict[str, Any] = {
            "model": trainer.model,
            "recipe": recipe,
            "vocabulary": vocabulary,
            "table": table,
        }
        now = facts | {"epoch": epoch, "validation": validation}
        best = score > state.best_score
        if best:
            state.best_score, state.best_epoch = score, epoch
        if rank() != 0:  # of several processes, which all hold the same, one writes
            continue
        if best:
            save_checkpoint(out, **saved, facts=now)
        if epoch == recipe.training.epochs:
            save_checkpoint(out / LAST, **saved, facts=now | {"selected_by": SELECTED_BY["last"]})
        write_json(out / HISTORY, state.history)
        write_atomically(out / LOG, _csv(state.history).encode())
        # Last, so that a run killed before it repeats the whole epoch.
        trainer.save_state(state_path, identity)
    state = trainer.state
    return {
        "out": str(out),
        "recipe": recipe.name,
        "seed": seed,
        "epochs": state.epoch,
        "updates": state.updates,
        "queries": len(items),
        "vocabulary": len(vocabulary),
        "best_epoch": state.best_epoch,
        "selected_by": facts["selected_by"],
        "validation": state.history[state.best_epoch - 1]["validation"],
        "history": state.history,
    }


def _ask(
    teacher: Path | None,
    *,
    places: Callable[[Sequence[str]], Mapping[str, Path]],
    annotations: Sequence[Annotation],
    length: int,
    device: str,
    cache: Path,
    progress: Progress | None,
) -> TeacherAnswers:
    """The teacher's answers to the training pairs; `places` tells where its modalities lie."""
    if teacher is None:
        raise MmdistError(
            "A student needs a teacher; give --teacher RUN, a run of mmdist train teacher."
        )
    trained = load_checkpoint(teacher)
    check_teacher(trained, length)
    wanted = [annotation.video for annotation in annotations]
    table = load_features(places(trained.modalities), wanted, length=length).to(device)
    return cached_answers(cache, trained, annotations, table, progress=progress)


def _epochs(
    trainer: Trainer, val_items: Sequence[Item], progress: Progress | None
) -> Iterator[tuple[int, dict[str, float]]]:
    """Train what is left of the epochs; after each, its number and validation."""
    epochs = trainer.recipe.training.epochs
    while trainer.state.epoch < epochs:
        losses = trainer.run_epoch(progress)
        if not math.isfinite(losses["loss"]):
            raise MmdistError(
                f"The loss is no longer finite in epoch {trainer.state.epoch}; lower the learning "
                f"rate, or look for extreme values in the features."
            )
        validation = validate(trainer, val_items, trainer.table) if val_items else {}
        epoch = trainer.state.epoch
        trainer.state.history.append({"epoch": epoch, "losses": losses, "validation": validation})
        if progress:
            figures = {"loss": losses["loss"]}
            figures |= {short: validation[k] for k, short in WATCHED.items() if k in validation}
            told = ", ".join(f"{name} {value:.2f}" for name, value in figures.items())
            progress(f"epoch {epoch} of {epochs}: {told}", len(trainer.items), len(trainer.items))
        yield epoch, validation


def _csv(history: Sequence[Mapping[str, Any]]) -> str:
    """One line an epoch: its number, every term of the loss, every figure of validation."""
    rows = [
        {"epoch": entry["epoch"]}
        | entry["losses"]
        | {f"validation {name}": value for name, value in entry["validation"].items()}
        for entry in history
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _refuse_overlap(train: Sequence[Annotation], val: Sequence[Annotation]) -> None:
    both = {a.video for a in train} & {a.video for a in val}
    if both:
        raise MmdistError(
            f"{len(both)} videos are in both the training and the validation split, '{min(both)}' "
            f"for one; split by video."
        )
