"""One loop for all recipes: features and sentences in, a checkpoint folder out.

The same call gives the same bits on one machine, and an interrupted run, called again, ends with
the bits of an uninterrupted one: all randomness of an epoch comes from (seed, epoch).
Shape suffixes as in `models`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mmdist_e2e.grounding.checkpoint import save_checkpoint
from mmdist_e2e.grounding.datasets import (
    Annotation,
    FeatureTable,
    Item,
    batches,
    draw_masks,
    load_annotations,
    load_features,
    make_items,
)
from mmdist_e2e.grounding.evaluate import prediction_iou, recall_metrics
from mmdist_e2e.grounding.inference import Progress, predict
from mmdist_e2e.grounding.losses import cpl_loss
from mmdist_e2e.grounding.models import GlobalBranch
from mmdist_e2e.grounding.recipes import Recipe, TrainingConfig, get_recipe
from mmdist_e2e.grounding.text import Vocabulary, tokenize
from mmdist_e2e.store import write_atomically, write_json
from mmdist_e2e.structures import MmdistError
from mmdist_e2e.weights.words import WordVectors

INITIAL_LEARNING_RATE = 1e-7
MAXIMUM_WARMUP = 400
SEEDS_APART = 100_003  # a prime above any number of epochs: epochs of two seeds never coincide
STATE, HISTORY, LAST = "state.safetensors", "history.json", "last"
SELECTED_BY = {
    "val_recall": "the epoch of highest validation R@1 at IoU 0.5 (this uses the timestamps of the "
    "validation split)",
    "val_loss": "the epoch of lowest validation reconstruction loss (no timestamps)",
    "last": "the last epoch (no validation)",
}


def learning_rate(update: int, *, peak: float, warmup: int) -> float:
    """Before update number `update` (from 0): 1e-7 rising linearly over w, then · √(w/n)."""
    if update < warmup:
        return INITIAL_LEARNING_RATE + update * (peak - INITIAL_LEARNING_RATE) / warmup
    return peak * math.sqrt(warmup / update) if warmup else peak


def negative_ratio(epoch: int, epochs: int, growth: float) -> float:
    """How far negatives inside the video reach, epoch from 1: (epoch/epochs) ** γ_neg."""
    return float(min(epoch / epochs, 1.0) ** growth)


@dataclass
class _Progressed:
    """What an interrupted run has got so far."""

    epoch: int = 0
    updates: int = 0
    best_epoch: int = 0
    best_score: float = -math.inf
    history: list[dict[str, Any]] = field(default_factory=list)


class Trainer:
    """A model, its optimizer and how far they are. `train_run` is the way in."""

    def __init__(self, recipe: Recipe, items: Sequence[Item], table: FeatureTable, seed: int):
        self.recipe, self.items, self.table, self.seed = recipe, items, table, seed
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = GlobalBranch(recipe.model).to(table.data_VLF.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.0, fused=True)
        self.state = _Progressed()
        per_epoch = math.ceil(len(items) / recipe.training.batch_size)
        total = per_epoch * recipe.training.epochs
        wanted = recipe.training.warmup_updates
        self.warmup = min(MAXIMUM_WARMUP, max(1, total // 10)) if wanted is None else wanted

    def run_epoch(self, progress: Progress | None = None) -> dict[str, float]:
        """Train one epoch; returns the means of its loss terms."""
        settings = self.recipe.training
        epoch = self.state.epoch + 1
        generator = torch.Generator().manual_seed(self.seed * SEEDS_APART + epoch)
        order = torch.randperm(len(self.items), generator=generator).tolist()
        ratio = negative_ratio(epoch, settings.epochs, self.recipe.loss.negative_growth)
        sums: dict[str, Tensor] = {}
        done = 0
        self.model.train()
        with torch.random.fork_rng():
            torch.manual_seed(self.seed * SEEDS_APART + epoch)  # dropout
            for batch in batches(self.items, self.table, settings.batch_size, order):
                masked_BW = draw_masks(batch, generator)
                device = batch.frames_BLF.device.type
                with torch.autocast(device, torch.bfloat16, enabled=settings.precision == "bf16"):
                    terms = cpl_loss(self.model, batch, masked_BW, self.recipe.loss, ratio=ratio)
                self.update(terms["loss"])
                done += len(batch.frames_BLF)
                for name, value in terms.items():
                    sums[name] = sums.get(name, 0) + value.detach() * len(batch.frames_BLF)
                if progress:
                    progress(f"epoch {epoch} of {settings.epochs}", done, len(self.items))
        self.state.epoch = epoch
        return {name: float(total) / len(self.items) for name, total in sums.items()}

    def update(self, loss: Tensor) -> None:
        """One step of Adam at the schedule's learning rate, gradient norm clipped."""
        settings = self.recipe.training
        rate = learning_rate(self.state.updates, peak=settings.learning_rate, warmup=self.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.gradient_norm)
        self.optimizer.step()
        self.state.updates += 1

    def save_state(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Everything an interrupted run needs, in one atomic file."""
        tensors = {}
        for name, parameter in self.model.named_parameters():
            moments = self.optimizer.state[parameter]
            tensors[f"model.{name}"] = parameter.detach().cpu().contiguous()
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"{moment}.{name}"] = moments[moment].cpu().contiguous()
        meta = {
            "identity": json.dumps(identity, sort_keys=True),
            "progress": json.dumps(vars(self.state)),
        }
        data = save(tensors, metadata=meta)
        write_atomically(path, data)

    def load_state(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Continue from `path`. Raises MmdistError when it is of another run."""
        try:
            with safe_open(path, framework="pt") as file:
                meta = file.metadata()
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            known, progress = json.loads(meta["identity"]), json.loads(meta["progress"])
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise MmdistError(
                f"The training state '{path}' is damaged; delete its folder and train again."
            ) from error
        wanted = json.loads(json.dumps(identity))
        changed = sorted(k for k in wanted.keys() | known.keys() if wanted.get(k) != known.get(k))
        if changed:
            raise MmdistError(
                f"'{path.parent}' holds a training run that differs in {', '.join(changed)}; give "
                f"another --out, or delete that folder."
            )
        self.state = _Progressed(**progress)
        for name, parameter in self.model.named_parameters():
            parameter.data.copy_(tensors[f"model.{name}"])
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(self.state.updates), device=parameter.device),
                "exp_avg": tensors[f"exp_avg.{name}"].to(parameter.device),
                "exp_avg_sq": tensors[f"exp_avg_sq.{name}"].to(parameter.device),
            }


def validate(trainer: Trainer, items: Sequence[Item], table: FeatureTable) -> dict[str, float]:
    """R@n, mIoU and the mean loss of the best proposal on validation items."""
    predictions = predict(trainer.model, items, table, precision=trainer.recipe.training.precision)
    metrics = recall_metrics(prediction_iou(predictions, items))
    return metrics | {"loss": float(-predictions.scores[:, 0].mean())}


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
    train_path: Path,
    val_path: Path | None,
    out: Path,
    seed: int,
    word_vectors: WordVectors,
    durations: Path | None = None,
    modality: str = "rgb",
    length: int = 64,
    overrides: Mapping[str, Any] | None = None,
    trained_on: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train a recipe from features and sentences; `out` becomes the best epoch's checkpoint.

    Writes out/ (best), out/last/ (last epoch), out/history.json, out/state.safetensors (to resume
    by calling again). overrides: settings of the recipe by name. trained_on: what the model card
    says. Returns a summary. Training reads videos and sentences; timestamps of the validation
    split are used only by `select_by="val_recall"`. Raises MmdistError for unusable input.
    """
    train_annotations = load_annotations(train_path, durations=durations)
    val_annotations = load_annotations(val_path, durations=durations) if val_path else []
    _refuse_overlap(train_annotations, val_annotations)
    sentences = [a.sentence for a in train_annotations]
    word_vectors = word_vectors.limited(w for s in sentences for w in tokenize(s))
    vocabulary = Vocabulary.from_sentences(sentences, word_vectors)
    overrides = dict(overrides or {})
    length = int(overrides.pop("length", length))
    videos = [a.video for a in (*train_annotations, *val_annotations)]
    table = load_features(features_path, videos, modality=modality, length=length)
    recipe = get_recipe(recipe_name)(
        feature_dim=table.data_VLF.shape[2],
        word_dim=word_vectors.dim,
        vocabulary_size=len(vocabulary),
        length=length,
    ).overridden(overrides)
    if not val_annotations and recipe.training.select_by != "last":
        recipe = recipe.overridden({"select_by": "last"})
    items = make_items(train_annotations, table, vocabulary)
    val_items = make_items(val_annotations, table, vocabulary)

    trainer = Trainer(recipe, items, table, seed)
    identity = {
        "recipe": recipe.to_json(),
        "seed": seed,
        "training sentences": len(items),
        "features": dict(table.matters),
        "word vectors": word_vectors.digest,
    }
    facts = {
        "seed": seed,
        "trained_on": trained_on or f"{len(items)} sentences of {train_path.name}",
        "selected_by": SELECTED_BY[recipe.training.select_by],
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
        if score > state.best_score:
            state.best_score, state.best_epoch = score, epoch
            save_checkpoint(out, **saved, facts=now)
        if epoch == recipe.training.epochs:
            save_checkpoint(out / LAST, **saved, facts=now | {"selected_by": SELECTED_BY["last"]})
        write_json(out / HISTORY, state.history)
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


def _epochs(
    trainer: Trainer, val_items: Sequence[Item], progress: Progress | None
) -> Iterator[tuple[int, dict[str, float]]]:
    """Train what is left of the epochs; after each, its number and validation."""
    while trainer.state.epoch < trainer.recipe.training.epochs:
        losses = trainer.run_epoch(progress)
        if not math.isfinite(losses["loss"]):
            raise MmdistError(
                f"The loss is no longer finite in epoch {trainer.state.epoch}; lower the learning "
                f"rate, or look for extreme values in the features."
            )
        validation = validate(trainer, val_items, trainer.table) if val_items else {}
        epoch = trainer.state.epoch
        trainer.state.history.append({"epoch": epoch, "losses": losses, "validation": validation})
        yield epoch, validation


def _refuse_overlap(train: Sequence[Annotation], val: Sequence[Annotation]) -> None:
    both = {a.video for a in train} & {a.video for a in val}
    if both:
        raise MmdistError(
            f"{len(both)} videos are in both the training and the validation split, '{min(both)}' "
            f"for one; split by video."
        )
