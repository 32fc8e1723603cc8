"""Three recipes at Charades-STA's scale on a GPU: the CPU's loss first, then a training's time.

    python benchmarks/gpu_train.py

10,602 queries of 5,338 videos, L 200, 1024-d features (the teacher reads two such modalities),
batches of 32, 15 epochs; random features, words and teacher's answers, which cost what real ones
do. Timed: one epoch after a short one, times 15, so without validation, and without asking the
teacher. The alternative is the same step in fp32.
"""

from __future__ import annotations

import copy
import time
from dataclasses import replace

import numpy as np
import torch

from mmdist_e2e.grounding.config import RECIPES, Recipe
from mmdist_e2e.grounding.data.annotations import Annotation
from mmdist_e2e.grounding.data.batches import Item, batches, draw_masks
from mmdist_e2e.grounding.data.features import FeatureTable
from mmdist_e2e.grounding.data.text import Sentence
from mmdist_e2e.grounding.losses import BatchLoss, Taught
from mmdist_e2e.grounding.train import Trainer

QUERIES, VIDEOS, L, FEATURES, WORDS, WORD_DIM, VOCABULARY = 10_602, 5_338, 200, 1024, 9, 300, 1111
TARGET_SECONDS, TOLERANCE = 300, 1e-3  # of the three recipes together; of a loss term


def items() -> list[Item]:
    rng = np.random.default_rng(0)
    made = []
    for i in range(QUERIES):
        count = int(rng.integers(WORDS - 5, WORDS + 6))
        sentence = Sentence(
            tokens=tuple(str(word) for word in rng.integers(0, VOCABULARY, count)),
            ids_W=rng.integers(1, VOCABULARY + 1, count),
            content_W=rng.random(count) < 0.5,
            vectors_WE=rng.standard_normal((count, WORD_DIM), dtype=np.float32),
        )
        video = i % VIDEOS
        made.append(Item(Annotation(f"v{video}", 30.0, 1.0, 9.0, ""), 30.0, sentence, video))
    return made


def answers() -> Taught:
    generator = torch.Generator().manual_seed(1)
    spans = torch.rand(2, QUERIES, generator=generator).clamp(0.1, 0.9)
    maps_QL = torch.rand(QUERIES, L, generator=generator) * 2 - 1
    return Taught(*spans, maps_QL)


def table_of(modalities: int) -> FeatureTable:
    names = ("rgb", "flow")[:modalities]
    return FeatureTable(
        tuple(f"v{i}" for i in range(VIDEOS)),
        torch.randn(VIDEOS, L, modalities * FEATURES, generator=torch.Generator().manual_seed(0)),
        {},
        {name: {} for name in names},
        dict.fromkeys(names, FEATURES),
    )


@torch.no_grad()
def check(recipe: Recipe, queries: list[Item], table: FeatureTable) -> None:
    """One batch without dropout, fp32: every term on the GPU is the CPU's."""
    plain = recipe.overridden({"dropout": 0.0, "precision": "fp32"})
    known = answers() if plain.distill else None
    trainer = Trainer(plain, queries, table, seed=0, answers=known)
    batch = next(batches(queries, table, 32, range(32)))
    masked = draw_masks(batch, torch.Generator().manual_seed(0))
    found = {}
    for device in ("cpu", "cuda"):
        model = copy.deepcopy(trainer.model).to(device)
        moved = replace(batch, **{k: v.to(device) for k, v in vars(batch).items()})
        taught = known.of(moved.items_B) if known else None
        terms = BatchLoss(model, plain)(moved, masked.to(device), 0.5, taught)
        found[device] = {name: float(value) for name, value in terms.items()}
    worst = max(abs(found["cpu"][name] - found["cuda"][name]) for name in found["cpu"])
    print(f"{recipe.name}: largest difference of a loss term from the CPU's: {worst:.1e}")
    assert worst < TOLERANCE, found


def epoch_seconds(
    recipe: Recipe, precision: str, queries: list[Item], table: FeatureTable
) -> float:
    known = answers() if recipe.distill else None
    recipe = recipe.overridden({"precision": precision})
    trainer = Trainer(recipe, queries, table, seed=0, answers=known)
    whole, trainer.items = trainer.items, queries[:640]
    trainer.run_epoch()
    trainer.items = whole
    torch.cuda.synchronize()
    start = time.perf_counter()
    trainer.run_epoch()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    queries = items()
    total = dict.fromkeys(("fp32", "bf16"), 0.0)
    for name, modalities in (("baseline", 1), ("teacher", 2), ("student", 1)):
        table = table_of(modalities)
        recipe = RECIPES[name](
            feature_dim=modalities * FEATURES,
            word_dim=WORD_DIM,
            vocabulary_size=VOCABULARY,
            length=L,
            channels=(FEATURES,) * modalities,
        )
        check(recipe, queries, table)
        table = table.to("cuda")
        for precision in total:
            torch.cuda.reset_peak_memory_stats()
            epoch = epoch_seconds(recipe, precision, queries, table)
            seconds = epoch * recipe.training.epochs
            total[precision] += seconds
            memory = torch.cuda.max_memory_allocated() / 2**30
            print(
                f"{name}, {precision}: {epoch:.2f} s an epoch, {seconds:.0f} s for "
                f"{recipe.training.epochs}, peak {memory:.1f} GiB"
            )
    print(f"three recipes in bf16: {total['bf16']:.0f} s (target {TARGET_SECONDS})")
    print(f"gpu_train: ratio {total['fp32'] / total['bf16']:.2f}")


if __name__ == "__main__":
    main()
