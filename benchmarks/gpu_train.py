"""Three recipes at Charades-STA's scale on a GPU: the CPU's loss first, then a training's time.

    python benchmarks/gpu_train.py [--device cpu]      on a CPU: a few queries, for the code alone

10,602 queries of 5,338 videos, L 200, 1024-d features (the teacher reads two such modalities),
batches of 32, 15 epochs; random features, words and teacher's answers, which cost what real ones
do. Timed: one epoch after a short one, times 15, so without validation, and without asking the
teacher. The alternative is the same step in fp32.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import replace

import numpy as np
import torch
from common import best_seconds

from mmdist_e2e.grounding.config import RECIPES, Recipe
from mmdist_e2e.grounding.data.annotations import Annotation
from mmdist_e2e.grounding.data.batches import Item, batches, draw_masks
from mmdist_e2e.grounding.data.features import FeatureTable
from mmdist_e2e.grounding.data.text import Sentence
from mmdist_e2e.grounding.losses import BatchLoss, Taught
from mmdist_e2e.grounding.train import Trainer

SIZES = {"cuda": (10_602, 5_338), "cpu": (32, 32)}  # queries, videos
L, FEATURES, WORDS, WORD_DIM, VOCABULARY, WARM_UP_QUERIES = 200, 1024, 9, 300, 1111, 640
TARGET_SECONDS, TOLERANCE = 300, 1e-3  # of the three recipes together; of a loss term


def items(queries: int, videos: int) -> list[Item]:
    rng = np.random.default_rng(0)
    made = []
    for i in range(queries):
        count = int(rng.integers(WORDS - 5, WORDS + 6))
        sentence = Sentence(
            tokens=tuple(str(word) for word in rng.integers(0, VOCABULARY, count)),
            ids_W=rng.integers(1, VOCABULARY + 1, count),
            content_W=rng.random(count) < 0.5,
            vectors_WE=rng.standard_normal((count, WORD_DIM), dtype=np.float32),
        )
        video = i % videos
        made.append(Item(Annotation(f"v{video}", 30.0, 1.0, 9.0, ""), 30.0, sentence, video))
    return made


def answers(queries: int) -> Taught:
    generator = torch.Generator().manual_seed(1)
    spans = torch.rand(2, queries, generator=generator).clamp(0.1, 0.9)
    maps_QL = torch.rand(queries, L, generator=generator) * 2 - 1
    return Taught(*spans, maps_QL)


def table_of(modalities: int, videos: int) -> FeatureTable:
    names = ("rgb", "flow")[:modalities]
    return FeatureTable(
        tuple(f"v{i}" for i in range(videos)),
        torch.randn(videos, L, modalities * FEATURES, generator=torch.Generator().manual_seed(0)),
        {},
        {name: {} for name in names},
        dict.fromkeys(names, FEATURES),
    )


@torch.no_grad()
def check(recipe: Recipe, queries: list[Item], table: FeatureTable, device: str) -> None:
    """One batch without dropout, fp32: every term on the GPU is the CPU's."""
    plain = recipe.overridden({"dropout": 0.0, "precision": "fp32"})
    known = answers(len(queries)) if plain.distill else None
    trainer = Trainer(plain, queries, table, seed=0, answers=known)
    batch = next(batches(queries, table, 32, range(32)))
    masked = draw_masks(batch, torch.Generator().manual_seed(0))
    found = {}
    for where in ("cpu", device):
        model = copy.deepcopy(trainer.model).to(where)
        moved = replace(batch, **{k: v.to(where) for k, v in vars(batch).items()})
        taught = known.of(moved.items_B) if known else None
        terms = BatchLoss(model, plain)(moved, masked.to(device), 0.5, taught)
        found[where] = {name: float(value) for name, value in terms.items()}
    worst = max(abs(found["cpu"][name] - found[device][name]) for name in found["cpu"])
    print(f"{recipe.name}: largest difference of a loss term from the CPU's: {worst:.1e}")
    assert worst < TOLERANCE, found


def epoch_seconds(
    recipe: Recipe, precision: str, queries: list[Item], table: FeatureTable
) -> float:
    known = answers(len(queries)) if recipe.distill else None
    recipe = recipe.overridden({"precision": precision})
    trainer = Trainer(recipe, queries, table, seed=0, answers=known)
    whole, trainer.items = trainer.items, queries[:WARM_UP_QUERIES]
    trainer.run_epoch()
    trainer.items = whole
    device = str(trainer.table.data_VLF.device)
    return best_seconds(trainer.run_epoch, 1, device)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time to train three recipes.")
    parser.add_argument("--device", default="cuda", choices=SIZES)
    device = parser.parse_args().device
    count, videos = SIZES[device]
    queries = items(count, videos)
    total = dict.fromkeys(("fp32", "bf16"), 0.0)
    for name, modalities in (("baseline", 1), ("teacher", 2), ("student", 1)):
        table = table_of(modalities, videos)
        recipe = RECIPES[name](
            feature_dim=modalities * FEATURES,
            word_dim=WORD_DIM,
            vocabulary_size=VOCABULARY,
            length=L,
            channels=(FEATURES,) * modalities,
        )
        check(recipe, queries, table, device)
        table = table.to(device)
        for precision in total:
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            epoch = epoch_seconds(recipe, precision, queries, table)
            seconds = epoch * recipe.training.epochs
            total[precision] += seconds
            memory = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
            print(
                f"{name}, {precision}: {epoch:.2f} s an epoch, {seconds:.0f} s for "
                f"{recipe.training.epochs}, peak {memory:.1f} GiB"
            )
    print(f"three recipes in bf16: {total['bf16']:.0f} s (target {TARGET_SECONDS})")
    print(f"gpu_train: ratio {total['fp32'] / total['bf16']:.2f}")


if __name__ == "__main__":
    main()
