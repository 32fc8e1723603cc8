"""One training loop for all recipes: features and sentences in, a checkpoint folder out.

The same call gives the same bits on one device, and an interrupted run, called again, ends with
the bits of an uninterrupted one. A student first asks its teacher about every training pair.

Shape suffixes: Q queries, B batch, L positions, D channels.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mmdist_e2e.grounding.answer import (
    INFERENCE_BATCH,
    GroundingModel,
    Progress,
    predict,
    score_proposals,
)
from mmdist_e2e.grounding.checkpoint import load_checkpoint, save_checkpoint
from mmdist_e2e.grounding.config import Count, Recipe, TrainingConfig, check_setting, get_recipe
from mmdist_e2e.grounding.data.annotations import (
    Annotation,
    carve_validation,
    load_annotations,
    protocol_of,
    world_of,
)
from mmdist_e2e.grounding.data.batches import Item, batches, draw_masks, make_items
from mmdist_e2e.grounding.data.features import FeatureTable, load_features, places_of
from mmdist_e2e.grounding.data.text import Vocabulary, tokenize
from mmdist_e2e.grounding.evaluate import prediction_iou, recall_metrics
from mmdist_e2e.grounding.losses import BatchLoss, Taught
from mmdist_e2e.grounding.network import build_network
from mmdist_e2e.grounding.parallel import rank, several, share
from mmdist_e2e.store import check_out, write_atomically, write_json
from mmdist_e2e.structures import MmdistError
from mmdist_e2e.weights.words import WordVectors

TENSORS = ("centers_Q", "widths_Q", "maps_QL")


@dataclass(frozen=True)
class TeacherAnswers:
    """Of every training query, in the order of the annotations.

    centers_Q, widths_Q: the span of k^T = argmax of Eq. 9. maps_QL: m^T.
    """

    centers_Q: Tensor
    widths_Q: Tensor
    maps_QL: Tensor

    def of(self, queries_B: Tensor) -> Taught:
        """The answers to a batch, where the batch lies."""
        device = queries_B.device
        return Taught(*(getattr(self, name)[queries_B.cpu()].to(device) for name in TENSORS))


@torch.inference_mode()
def teach(
    teacher: GroundingModel,
    annotations: Sequence[Annotation],
    table: FeatureTable,
    *,
    progress: Progress | None = None,
) -> TeacherAnswers:
    """Ask a teacher about the training pairs: eval mode, fixed masks, so no seed enters.

    table: features of the teacher's modalities. Raises MmdistError when they were made otherwise.
    """
    teacher.check_table(table)
    model = teacher.model.to(table.data_VLF.device).eval()
    items: list[Item] = make_items(annotations, table, teacher.vocabulary)
    parts: list[tuple[Tensor, ...]] = []
    done = 0
    for batch in batches(items, table, INFERENCE_BATCH, range(len(items))):
        proposals = model.propose(batch.frames_BLF, batch.words_BWE, batch.is_word_BW)
        scored = score_proposals(model, batch, proposals)
        best_B = scored.scores_BK.argmax(dim=1)
        rows = torch.arange(len(best_B), device=best_B.device)
        maps_BL = model.activate(batch, proposals)
        spans = scored.centers_BK[rows, best_B], scored.widths_BK[rows, best_B]
        parts.append(tuple(t.cpu().clone() for t in (*spans, maps_BL)))
        done += len(best_B)
        if progress:
            progress("asking the teacher", done, len(items))
    return TeacherAnswers(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def cached_answers(
    path: Path,
    teacher: GroundingModel,
    annotations: Sequence[Annotation],
    table: FeatureTable,
    *,
    progress: Progress | None = None,
) -> TeacherAnswers:
    """`teach`, kept in `path` for the same teacher, pairs and features."""
    identity = _identity(teacher, annotations, table)
    if path.is_file():
        try:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("identity") == identity:
                    return TeacherAnswers(*(file.get_tensor(name) for name in TENSORS))
        except (OSError, SafetensorError):
            pass  # damaged: asked again, and replaced
    answers = teach(teacher, annotations, table, progress=progress)
    tensors = {name: getattr(answers, name).contiguous() for name in TENSORS}
    write_atomically(path, save(tensors, metadata={"identity": identity}))
    return answers


def _identity(
    teacher: GroundingModel, annotations: Sequence[Annotation], table: FeatureTable
) -> str:
    """What the answers depend on."""
    pairs = hashlib.sha256(repr([(a.video, a.sentence) for a in annotations]).encode())
    tensors = {**teacher.model.state_dict(), "features": table.data_VLF}
    return f"{tensors_digest(tensors)} {pairs.hexdigest()}"


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def check_teacher(teacher: GroundingModel, length: int) -> None:
    """Raises MmdistError when a student of L positions cannot learn from this teacher."""
    if teacher.model.local is None:
        raise MmdistError(
            f"A {teacher.recipe.name} has no activation map to learn from; give a run of "
            f"mmdist train teacher (or baseline) as --teacher."
        )
    if teacher.recipe.model.length != length:
        raise MmdistError(
            f"The teacher reads {teacher.recipe.model.length} positions and the student "
            f"{length}; give --length {teacher.recipe.model.length}."
        )


INITIAL_LEARNING_RATE = 1e-7

MAXIMUM_WARMUP = 400

SEEDS_APART = 100_003  # a prime above any number of epochs: epochs of two seeds never coincide

RANKS_APART = 2**49  # above every seed of one process

MAXIMUM_SEED = 2**32

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


class Trainer:
    """A model, its optimizer and their progress, on the device of the features."""

    def __init__(
        self,
        recipe: Recipe,
        items: Sequence[Item],
        table: FeatureTable,
        seed: int,
        answers: TeacherAnswers | None = None,
    ) -> None:
        """answers: the teacher's, of the same items, where the recipe is a student's."""
        assert (recipe.distill is None) == (answers is None)
        if not 0 <= seed < MAXIMUM_SEED:
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
        self.state = TrainingState(**progress)
        for name, parameter in self.model.named_parameters():
            parameter.data.copy_(tensors[f"model.{name}"])
            if f"{MOMENTS[0]}.{name}" in tensors:
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(self.state.updates), device=parameter.device),
                    **{m: tensors[f"{m}.{name}"].to(parameter.device) for m in MOMENTS},
                }


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
    length = overrides.pop("length", length)
    check_setting("length", length, Count)
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
