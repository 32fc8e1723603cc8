"""The baseline at Charades-STA's scale on a GPU: the CPU's loss first, then the time of a training.

    python benchmarks/gpu_train.py

10,602 queries of 5,338 videos, L 200, 1024-d features, batches of 32, 15 epochs; random features
and words, which cost what real ones do. Timed: one epoch after a short one, times 15, so without
validation. The alternative is the same step in fp32.
"""

from __future__ import annotations

import copy
import time
from dataclasses import replace

import numpy as np
import torch

from mmdist_e2e.grounding.datasets import Annotation, FeatureTable, Item, batches, draw_masks
from mmdist_e2e.grounding.objective import batch_loss
from mmdist_e2e.grounding.recipes import Recipe, baseline
from mmdist_e2e.grounding.text import Sentence
from mmdist_e2e.grounding.trainer import Trainer

QUERIES, VIDEOS, L, FEATURES, WORDS, WORD_DIM, VOCABULARY = 10_602, 5_338, 200, 1024, 9, 300, 1111
TARGET_SECONDS, TOLERANCE = 120, 1e-3


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


@torch.no_grad()
def check(recipe: Recipe, queries: list[Item], table: FeatureTable) -> None:
    """One batch without dropout, fp32: every term on the GPU is the CPU's."""
    plain = recipe.overridden({"dropout": 0.0, "precision": "fp32"})
    assert plain.matching is not None
    trainer = Trainer(plain, queries, table, seed=0)
    batch = next(batches(queries, table, 32, range(32)))
    masked = draw_masks(batch, torch.Generator().manual_seed(0))
    found = {}
    for device in ("cpu", "cuda"):
        model = copy.deepcopy(trainer.model).to(device)
        moved = replace(batch, **{k: v.to(device) for k, v in vars(batch).items()})
        terms = batch_loss(model, moved, masked.to(device), plain.loss, plain.matching, ratio=0.5)
        found[device] = {name: float(value) for name, value in terms.items()}
    worst = max(abs(found["cpu"][name] - found["cuda"][name]) for name in found["cpu"])
    print(f"largest difference of a loss term from the CPU's: {worst:.1e}")
    assert worst < TOLERANCE, found


def main() -> None:
    queries = items()
    table = FeatureTable(
        tuple(f"v{i}" for i in range(VIDEOS)),
        torch.randn(VIDEOS, L, FEATURES, generator=torch.Generator().manual_seed(0)),
        {},
        {"rgb": {}},
        {"rgb": FEATURES},
    )
    recipe = baseline(feature_dim=FEATURES, word_dim=WORD_DIM, vocabulary_size=VOCABULARY, length=L)
    check(recipe, queries, table)
    table = table.to("cuda")
    seconds = {}
    for precision in ("fp32", "bf16"):
        trainer = Trainer(recipe.overridden({"precision": precision}), queries, table, seed=0)
        whole, trainer.items = trainer.items, queries[:640]
        trainer.run_epoch()
        trainer.items = whole
        torch.cuda.synchronize()
        start = time.perf_counter()
        trainer.run_epoch()
        torch.cuda.synchronize()
        epoch = time.perf_counter() - start
        seconds[precision] = epoch * recipe.training.epochs
        memory = torch.cuda.max_memory_allocated() / 2**30
        print(
            f"{precision}: {epoch:.2f} s an epoch, {seconds[precision]:.0f} s for "
            f"{recipe.training.epochs} (target {TARGET_SECONDS}), peak {memory:.1f} GiB"
        )
    print(f"gpu_train: ratio {seconds['fp32'] / seconds['bf16']:.2f}")


if __name__ == "__main__":
    main()
