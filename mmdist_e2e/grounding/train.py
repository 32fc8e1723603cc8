"""One training loop for all recipes: features and sentences in, a checkpoint folder out.

The same call gives the same bits on one device, and an interrupted run that is resumed ends with
the bits of an uninterrupted one. A run is resumed or reported as finished only for the inputs that
it was started with. A student first asks its teacher about every training pair.

Shape suffixes: Q queries, B batch, L positions, D channels.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mmdist_e2e.grounding.answer import Progress
from mmdist_e2e.grounding.checkpoint import (
    CONFIG,
    MODEL,
    STATE,
    annotations_digest,
    command_line,
    model_digest,
    refuse_other,
    save_checkpoint,
)
from mmdist_e2e.grounding.config import Recipe, configure
from mmdist_e2e.grounding.data.annotations import (
    Annotation,
    carve_validation,
    load_annotations,
    world_of,
)
from mmdist_e2e.grounding.data.batches import Item, batches, draw_masks, make_items
from mmdist_e2e.grounding.data.features import (
    FeatureTable,
    having_features,
    load_features,
    places_of,
)
from mmdist_e2e.grounding.data.published import protocol_of
from mmdist_e2e.grounding.data.text import Vocabulary, read_words, tokenize
from mmdist_e2e.grounding.evaluate import (
    Windows,
    annotations_of,
    answer_items,
    cut_long_videos,
    prediction_iou,
    recall_metrics,
    video_seconds,
)
from mmdist_e2e.grounding.losses import BatchLoss, Taught
from mmdist_e2e.grounding.network import build_network
from mmdist_e2e.grounding.parallel import rank, several, share
from mmdist_e2e.grounding.teacher import load_teacher, teach
from mmdist_e2e.store import check_out, digest_of, write_atomically, write_json
from mmdist_e2e.structures import MmdistError
from mmdist_e2e.weights.words import WordVectors

INITIAL_LEARNING_RATE = 1e-7
SEEDS_APART = 100_003  # a prime above any number of epochs: epochs of two seeds never coincide
RANKS_APART = 2**49  # above every seed of one process
MOMENTS = ("exp_avg", "exp_avg_sq")  # what Adam remembers of a parameter


def learning_rate(update: int, *, peak: float, warmup: int) -> float:
    """Before update number `update` (from 0): 1e-7 rising linearly over w, then · √(w/n)."""
    if update < warmup:
        return INITIAL_LEARNING_RATE + update * (peak - INITIAL_LEARNING_RATE) / warmup
    return peak * math.sqrt(warmup / update) if warmup else peak


def negative_ratio(epoch: int, epochs: int, growth: float) -> float:
    """How far negatives inside the video reach, epoch from 1: (epoch/epochs) ** γ_neg."""
    return float(min(epoch / epochs, 1.0) ** growth)


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """On a GPU, only kernels that give the same bits each time (a CPU's do on their own)."""
    if device.type == "cpu":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@dataclass
class TrainingState:
    """How far a run is."""

    epoch: int = 0
    updates: int = 0
    best_epoch: int = 0
    best_score: float = -math.inf
    history: list[dict[str, Any]] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        return {
            "epochs": self.epoch,
            "updates": self.updates,
            "best_epoch": self.best_epoch,
            "validation": self.history[self.best_epoch - 1]["validation"],
            "history": self.history,
        }


class Trainer:
    """A model, its optimizer and their progress, on the device of the features."""

    def __init__(
        self,
        recipe: Recipe,
        items: Sequence[Item],
        table: FeatureTable,
        seed: int,
        answers: Taught | None = None,
    ) -> None:
        """answers: the teacher's, of the same items, where the recipe is a student's."""
        assert (recipe.distill is None) == (answers is None)
        if not 0 <= seed < 2**32:
            raise MmdistError(f"seed must be at least 0 and below 2**32; got {seed}.")
        self.recipe, self.items, self.table, self.seed = recipe, items, table, seed
        self.answers = answers
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = build_network(recipe).to(table.data_VLF.device)
        self.loss: nn.Module = BatchLoss(self.model, recipe)
        if several():
            untrained = recipe.matching is not None and not recipe.matching.local_weight
            self.loss = DistributedDataParallel(self.loss, find_unused_parameters=untrained)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.0, fused=True)
        self.state = TrainingState()
        self.warmup = recipe.training.warmup(len(items))

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
        device = self.table.data_VLF.device
        with torch.random.fork_rng(), repeatable(device):
            # Dropout; processes that share a batch must not drop alike.
            torch.manual_seed((self.seed * SEEDS_APART + epoch) + RANKS_APART * rank())
            for whole in batches(self.items, self.table, settings.batch_size, order):
                batch, masked_BW, peers = share(whole, draw_masks(whole, generator))
                size = len(whole.frames_BLF)
                bf16 = settings.precision == "bf16"
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    taught = self.answers.of(batch.items_B) if self.answers else None
                    terms = self.loss(batch, masked_BW, ratio, taught, peers)
                self.update(terms["loss"] * (peers.weight if peers else 1.0))
                terms = peers.mean(terms) if peers else terms
                done += size
                for name, value in terms.items():
                    sums[name] = sums.get(name, 0) + value.detach() * size
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
            tensors[f"model.{name}"] = parameter.detach().cpu().contiguous()
            # Adam knows nothing of a parameter whose term is switched off.
            moments = self.optimizer.state.get(parameter, {})
            for moment in MOMENTS:
                if moment in moments:
                    tensors[f"{moment}.{name}"] = moments[moment].cpu().contiguous()
        meta = {
            "identity": json.dumps(identity, sort_keys=True),
            "progress": json.dumps(vars(self.state)),
        }
        write_atomically(path, save(tensors, metadata=meta))

    def load_state(self, path: Path) -> None:
        """Continue from what `save_state` wrote. Raises MmdistError as `read_state`."""
        _, self.state, tensors = read_state(path)
        for name, parameter in self.model.named_parameters():
            parameter.data.copy_(tensors[f"model.{name}"])
            if f"{MOMENTS[0]}.{name}" in tensors:
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(self.state.updates), device=parameter.device),
                    **{m: tensors[f"{m}.{name}"].to(parameter.device) for m in MOMENTS},
                }


def read_state(path: Path) -> tuple[dict[str, Any], TrainingState, dict[str, Tensor]]:
    """Inputs, progress and tensors of a saved run. Raises MmdistError when it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        state = TrainingState(**json.loads(meta["progress"]))
        return json.loads(meta["identity"]), state, tensors
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise MmdistError(
            f"The training state '{path}' is damaged; delete its folder and train again."
        ) from error


HISTORY, LOG, LAST = "history.json", "log.csv", "last"
EVENTS = "tensorboard"
History = Sequence[Mapping[str, Any]]  # of every epoch its number, losses and validation
CARVED_FRACTION = 0.1

SELECTED_BY = {
    "val_recall": "the epoch of highest R@1 at IoU 0.5 (by timestamps) on {}",
    "val_loss": "the epoch of lowest reconstruction loss (no timestamps) on {}",
    "last": "the last epoch (no validation)",
}

WATCHED = {"R@1,IoU=0.5": "R@1", "R@5,IoU=0.5": "R@5", "mIoU": "mIoU"}  # in progress


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
    vocabulary_path: Path | None = None,
    skip_missing: bool = False,
    durations: Path | None = None,
    protocol: str = "official",
    modalities: Sequence[str] = ("rgb",),
    teacher: Path | None = None,
    preset: str = "paper",
    length: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    glove: Path | None = None,
    tensorboard: bool = False,
    started: Callable[[Mapping[str, Any], int], None] | None = None,
    more_epochs: bool = True,
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train a recipe from features and sentences; returns a summary.

    Writes out/ (the checkpoint of the best epoch), out/last/ (of the last one), out/history.json,
    out/log.csv (the same figures) and out/state.safetensors. A second call with the same inputs
    resumes or, with more epochs, continues the run; a finished run is left as it is.

    flow_features_path: of flow, if not stored with RGB. carve: without `val_path`, the share of
    training videos set aside as validation; 0: none, the last epoch is taken. vocabulary_path: the
    words to predict (see `read_words`), by default those of the training sentences. skip_missing:
    leave out queries of videos without features; summary and checkpoint count them. teacher: the
    run that a student learns from; its features are read from the same paths. overrides: settings
    by name, which replace the preset's, as `length` does. glove: the file of `word_vectors`, for
    the card. tensorboard: also write out/tensorboard/, the figures of log.csv. started: called
    before training with every setting and the number of queries. more_epochs: whether a run may be
    continued past the epochs that it was started with.

    Timestamps are read for the figures of validation alone; they choose the checkpoint only with
    `select_by="val_recall"`. Raises MmdistError for unusable input, and when `out` holds a run of
    other inputs.
    """
    check_out(out)
    overrides = overrides or {}
    recipe = configure(
        recipe_name, preset=preset, length=length, settings=overrides, modalities=len(modalities)
    )
    length = recipe.model.length
    if tensorboard and find_spec("tensorboard") is None:
        raise MmdistError(
            "--tensorboard needs a further package; run: pip install 'mmdist-e2e[tensorboard]'."
        )
    places = places_of(modalities, features_path, flow_features_path)
    trained = load_teacher(teacher, length) if recipe.distill else None
    taught = places_of(trained.modalities, features_path, flow_features_path) if trained else {}
    skipped: dict[str, dict[str, int]] = {}

    def load(split: str, path: Path) -> list[Annotation]:
        annotations = load_annotations(path, durations=durations, protocol=protocol)
        if skip_missing:
            annotations, skipped[split] = having_features(annotations, places | taught)
        return annotations

    train_annotations = load("train", train_path)
    val_annotations: list[Annotation] = []
    where = "no validation"
    if val_path is not None:
        val_annotations = load("val", val_path)
        where = val_path.name
        if both := {a.video for a in train_annotations} & {a.video for a in val_annotations}:
            raise MmdistError(
                f"{len(both)} videos are in both the training and the validation split, "
                f"'{min(both)}' for one; split by video."
            )
    elif carve:
        train_annotations, val_annotations, where = carve_validation(train_annotations, carve)
    sentences = [a.sentence for a in train_annotations]
    words = read_words(vocabulary_path) if vocabulary_path else []
    word_vectors = word_vectors.limited([*words, *(w for s in sentences for w in tokenize(s))])
    limit = None if words else recipe.training.vocabulary_limit
    vocabulary = Vocabulary.from_sentences(words or sentences, word_vectors, size=limit)
    videos = [a.video for a in (*train_annotations, *val_annotations)]
    table = load_features(places, videos, length=length).to(device)
    recipe = recipe.fitted(
        feature_dim=table.data_VLF.shape[2],
        word_dim=word_vectors.dim,
        vocabulary_size=len(vocabulary),
        channels=tuple(table.channels.values()),
    )
    if not val_annotations:
        recipe = recipe.overridden({"select_by": "last"})
    items = make_items(train_annotations, table, vocabulary)
    val_items = make_items(val_annotations, table, vocabulary)
    digests = {
        "annotations (train)": annotations_digest(train_annotations, moments=False),
        "annotations (validation)": annotations_digest(val_annotations),
        "word vectors": word_vectors.digest,
        **({"vocabulary": digest_of(vocabulary.words)} if words else {}),
        **{f"features ({modality})": digest for modality, digest in table.digests.items()},
    }
    if trained:
        taught_table = load_features(taught, [a.video for a in train_annotations], length=length)
        digests["teacher"] = model_digest(trained)
        for modality, digest in taught_table.digests.items():
            digests[f"features for the teacher ({modality})"] = digest
    carved = carve if carve and not val_path else None
    settings = recipe.settings | {"seed": seed, "carve": carved}
    inputs = {"settings": settings, "digests": digests, "continued": []}
    found = _found(out, inputs, more_epochs=more_epochs)
    summary = {
        "out": str(out),
        "recipe": recipe.name,
        "seed": seed,
        "queries": len(items),
        "vocabulary": len(vocabulary),
        "selected_by": SELECTED_BY[recipe.training.select_by].format(where),
        "continued": inputs["continued"],
        "skipped": skipped,
    }
    events = out / EVENTS if tensorboard and rank() == 0 else None
    if found.epoch == recipe.training.epochs:
        if events:
            write_events(events, found.history)
        return summary | found.summary() | {"how": "finished before"}
    if started:
        warmup = {"warmup_updates": recipe.training.warmup(len(items))}
        started(settings | warmup, len(items))

    answers = None
    if trained:
        answers = teach(trained, train_annotations, taught_table.to(device), progress=progress)
    trainer = Trainer(recipe, items, table, seed, answers)
    longest = max(video_seconds(item, table) for item in items)
    windows = cut_long_videos(val_items, table, places, longest_seconds=longest)
    # A carved split is a part of the file whose protocol is named.
    known = annotations_of([*items, *([] if val_path else val_items)])
    source = world_of(train_path) or f"{len(items)} sentences of {protocol_of(train_path, known)}"
    options = {
        "preset": preset,
        "length": length,
        "modality": ",".join(modalities),
        "features": features_path,
        "flow-features": flow_features_path,
        "teacher": teacher,
        "train": train_path,
        "val": val_path,
        "carve": None if val_path else carve,
        "glove": glove,
        "vocabulary": vocabulary_path,
        "durations": durations,
        "skip-missing": skip_missing,
        "protocol": protocol,
        "seed": seed,
        "out": out,
    }
    facts = {
        "command": command_line(recipe_name, options, overrides),
        **{name: summary[name] for name in ("seed", "queries", "selected_by")},
        "trained_on": source,
        "carved": carved,
        "longest_duration_seconds": longest,
        "training": recipe.to_json()["training"] | {"warmup_updates": trainer.warmup},
        "inputs": digests,
        **{name: summary[name] for name in ("skipped", "continued") if summary[name]},
    }
    if found.epoch:
        trainer.load_state(out / STATE)
    elif rank() == 0:  # from now on, `out` is a run of these inputs
        trainer.save_state(out / STATE, inputs)
    save_in = partial(
        save_checkpoint, model=trainer.model, recipe=recipe, vocabulary=vocabulary, table=table
    )
    while (state := trainer.state).epoch < recipe.training.epochs:
        _epoch(trainer, val_items, windows, progress)
        if rank() != 0:  # all processes hold the same weights, and one writes
            continue
        now = facts | {"epoch": state.epoch, "validation": state.history[-1]["validation"]}
        if state.best_epoch == state.epoch:
            save_in(out, facts=now)
        if state.epoch == recipe.training.epochs:
            save_in(out / LAST, facts=now | {"selected_by": SELECTED_BY["last"]})
        write_json(out / HISTORY, state.history)
        write_atomically(out / LOG, _csv(state.history).encode())
        # A run that is killed before this repeats the whole epoch.
        trainer.save_state(out / STATE, inputs)
        if events:
            write_events(events, state.history)
    how = f"resumed after epoch {found.epoch}" if found.epoch else "trained"
    return summary | trainer.state.summary() | {"how": how}


def _rows(history: History) -> list[dict[str, Any]]:
    """Of every epoch its number, every term of the loss and every figure of validation."""
    return [
        {"epoch": entry["epoch"]}
        | entry["losses"]
        | {f"validation {name}": value for name, value in entry["validation"].items()}
        for entry in history
    ]


def _csv(history: History) -> str:
    rows = _rows(history)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_events(folder: Path, history: History) -> None:
    """Replace TensorBoard's events in `folder`, so that no step appears twice."""
    from torch.utils.tensorboard import SummaryWriter

    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    # purge_step: a TensorBoard that is open forgets what it read from the old events.
    with SummaryWriter(folder, purge_step=0) as writer:
        for row in _rows(history):
            epoch = row.pop("epoch")
            for name, value in row.items():
                writer.add_scalar(name, value, epoch)


def _found(out: Path, inputs: dict[str, Any], *, more_epochs: bool) -> TrainingState:
    """The progress of the run in `out`; epoch 0 where there is none.

    A run that shall have more epochs than it was started with is continued, and
    `inputs["continued"]` records it. Raises MmdistError when `out` holds a run of other inputs or
    of more epochs, or a checkpoint without a training state.
    """
    another = "Give another --out or delete that folder."
    if not (out / STATE).is_file():
        if (out / CONFIG).is_file():
            raise MmdistError(f"'{out}' holds a checkpoint without its training state. {another}")
        return TrainingState()
    known, state, _ = read_state(out / STATE)
    if not state.epoch and not (out / CONFIG).is_file():
        return state  # killed before anything was made
    epochs = planned = inputs["settings"]["epochs"]
    if "digests" in known and more_epochs:
        inputs["continued"] = known["continued"]
        planned = known["settings"]["epochs"]
        known["settings"]["epochs"] = epochs
    refuse_other(f"'{out}' holds a training run", known, json.loads(json.dumps(inputs)))
    if state.epoch and not all((out / name).is_file() for name in (CONFIG, MODEL)):
        raise MmdistError(f"'{out}' holds a training state without its checkpoint. {another}")
    if epochs != planned and epochs <= state.epoch:
        raise MmdistError(
            f"'{out}' holds a run of {state.epoch} of {planned} epochs, and {epochs} are wanted; "
            f"ask for more than {state.epoch} with --epochs, or give another --out."
        )
    if epochs != planned and state.epoch:
        inputs["continued"] = [
            *known["continued"],
            f"Epochs 1 to {state.epoch} were trained as part of {planned}, the following as part "
            f"of {epochs}: learning rate warmup and negatives depend on that number, so the "
            f"weights may differ from those of a run of {epochs} epochs.",
        ]
    return state


def _epoch(
    trainer: Trainer,
    val_items: Sequence[Item],
    windows: Windows | None,
    progress: Progress | None,
) -> None:
    """Train an epoch, add it to the history, and note whether it is the best so far.

    Raises MmdistError, before anything is saved, when a loss or weight is not finite.
    """
    losses = trainer.run_epoch(progress)
    state, training = trainer.state, trainer.recipe.training
    epoch = state.epoch
    weights = all(bool(p.isfinite().all()) for p in trainer.model.parameters())
    validation: dict[str, float] = {}
    if val_items and weights:
        predictions = answer_items(trainer.model, val_items, trainer.table, windows)
        validation = recall_metrics(prediction_iou(predictions, val_items))
        validation["loss"] = float(predictions.losses.min(axis=1).mean())
    if not weights or not all(map(math.isfinite, (*losses.values(), *validation.values()))):
        raise MmdistError(
            f"The loss is no longer finite in epoch {epoch}; lower the learning rate, or look "
            f"for extreme values in the features."
        )
    state.history.append({"epoch": epoch, "losses": losses, "validation": validation})
    score = float(epoch)
    if training.select_by != "last":
        by_recall = training.select_by == "val_recall"
        score = validation["R@1,IoU=0.5"] if by_recall else -validation["loss"]
    if score > state.best_score:
        state.best_score, state.best_epoch = score, epoch
    if progress:
        figures = {"loss": losses["loss"]}
        figures |= {short: validation[k] for k, short in WATCHED.items() if k in validation}
        told = ", ".join(f"{name} {value:.2f}" for name, value in figures.items())
        what = f"epoch {epoch} of {training.epochs}: {told}"
        progress(what, len(trainer.items), len(trainer.items))
