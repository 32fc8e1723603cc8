"""A network in training: its updates, its learning rate, and a state that resumes to the bit.

All randomness of an epoch comes from (seed, epoch). Shape suffixes as in `models`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mmdist_e2e.grounding.datasets import FeatureTable, Item, batches, draw_masks
from mmdist_e2e.grounding.distill import TeacherAnswers
from mmdist_e2e.grounding.inference import Progress
from mmdist_e2e.grounding.objective import batch_loss
from mmdist_e2e.grounding.parallel import average_gradients, mean_over_processes, rank, share
from mmdist_e2e.grounding.recipes import Recipe
from mmdist_e2e.store import write_atomically
from mmdist_e2e.structures import MmdistError

INITIAL_LEARNING_RATE = 1e-7
MAXIMUM_WARMUP = 400
SEEDS_APART = 100_003  # a prime above any number of epochs: epochs of two seeds never coincide
RANKS_APART = 2**40
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
    """A model, its optimizer and how far they are, where the features lie."""

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
        self.recipe, self.items, self.table, self.seed = recipe, items, table, seed
        self.answers = answers
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = recipe.network().to(table.data_VLF.device)
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
                    terms = batch_loss(
                        self.model,
                        batch,
                        masked_BW,
                        self.recipe.loss,
                        self.recipe.matching,
                        self.recipe.mutual,
                        self.recipe.distill,
                        self.answers.of(batch.items_B) if self.answers else None,
                        peers,
                        ratio=ratio,
                    )
                weight = peers.weight if peers else 1.0
                self.update(terms["loss"] * weight)
                terms = mean_over_processes(terms, weight)
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
        average_gradients(self.model.parameters())
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
