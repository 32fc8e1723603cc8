"""A training step of `cpl` beside CPL's public code: the same shapes, the same terms, one machine.

    python benchmarks/bench_train.py CPL      CPL: a clone of github.com/minghangz/cpl

B 32, L 200, 1024-d features, 10-word sentences of 1,111 words, K 8, hidden 256. A step: forward,
backward, gradient clipping, Adam (torch's, for both). Every way runs in a process of its own, so
that its peak memory is its own; the ways alternate and the fastest median of each counts.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

B, L, FEATURES, W, WORD_DIM, VOCABULARY, K, EPOCHS = 32, 200, 1024, 10, 300, 1111, 8, 30
EPOCH = 15  # of EPOCHS: how far the negatives inside the video reach
WARM, TIMED, ROUNDS = 2, 5, 2
WAYS = ("cpl", "fp32", "bf16")


def inputs() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "frames": torch.randn(B, L, FEATURES),
        "words": torch.randn(B, W, WORD_DIM),
        "ids": torch.randint(1, VOCABULARY + 1, (B, W)),
    }


def public_step(folder: Path) -> Callable[[], None]:
    """CPL's own model and losses. It asks for a GPU and for one function of fairseq."""
    sys.path.insert(0, str(folder))
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    utils = types.SimpleNamespace(softmax=lambda x, dim, onnx_trace=False: F.softmax(x, dim))
    fairseq = types.ModuleType("fairseq")
    fairseq.utils = utils  # type: ignore[attr-defined]
    sys.modules["fairseq"] = fairseq
    from models.cpl import CPL  # type: ignore[import-not-found]
    from models.loss import ivc_loss, rec_loss  # type: ignore[import-not-found]

    settings = json.loads((folder / "config/charades/main.json").read_text())
    config = settings["model"]["config"] | {"vocab_size": VOCABULARY + 1, "max_epoch": EPOCHS}
    model = CPL(config | {"frames_input_size": FEATURES, "words_input_size": WORD_DIM})
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-4)
    given = inputs()
    words = F.pad(given["words"], (0, 0, 1, 0))
    weights = torch.full((B, W), 1 / W, dtype=torch.float64)

    def step() -> None:
        optimizer.zero_grad()
        output = model(
            given["frames"].clone(),
            torch.full((B,), L),
            given["ids"],
            words.clone(),  # it writes its start vector into what it is given
            torch.full((B,), W),
            weights,
            epoch=EPOCH,
        )
        loss, _ = rec_loss(**output, num_props=K, **settings["loss"])
        more, _ = ivc_loss(**output, num_props=K, **settings["loss"])
        (loss + more).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10)
        optimizer.step()

    return step


def our_step(precision: str) -> Callable[[], None]:
    from mmdist_e2e.grounding.config import cpl
    from mmdist_e2e.grounding.data.batches import Batch, draw_masks
    from mmdist_e2e.grounding.data.features import FeatureTable
    from mmdist_e2e.grounding.train import Trainer

    recipe = cpl(
        feature_dim=FEATURES, word_dim=WORD_DIM, vocabulary_size=VOCABULARY, length=L
    ).overridden({"precision": precision})
    given = inputs()
    table = FeatureTable((), given["frames"], {}, {"rgb": {}}, {"rgb": FEATURES})
    trainer = Trainer(recipe, [], table, seed=0)
    trainer.model.train()
    every = torch.ones(B, W, dtype=torch.bool)
    batch = Batch(given["frames"], given["words"], given["ids"], every, every)
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        masked_BW = draw_masks(batch, generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            terms = trainer.loss(batch, masked_BW, (EPOCH / EPOCHS) ** 0.5)
        trainer.update(terms["loss"])

    return step


def measure(way: str, folder: Path) -> dict[str, float]:
    """Seconds a step and MiB: the process's peak above what it held before the first step."""
    step = public_step(folder) if way == "cpl" else our_step(way)
    scale = 1024 if sys.platform == "linux" else 1024**2
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    each = []
    for _ in range(WARM + TIMED):
        start = time.perf_counter()
        step()
        each.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": median(each[WARM:]), "mebibytes": (peak - before) / scale}


def main() -> None:
    if len(sys.argv) == 3:
        print(json.dumps(measure(sys.argv[1], Path(sys.argv[2]))))
        return
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "models/cpl.py").is_file():
        print("bench_train: give the folder of a clone of github.com/minghangz/cpl")
        return
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(ROUNDS):
        for way in WAYS:
            command = [sys.executable, __file__, way, sys.argv[1]]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[way].append(json.loads(done.stdout.splitlines()[-1]))
    best = {way: min(runs, key=lambda run: run["seconds"]) for way, runs in found.items()}
    for way, run in best.items():
        name = "CPL's public code, fp32" if way == "cpl" else f"mmdist cpl, {way}"
        print(
            f"{name}: {run['seconds']:.2f} s a step, {run['mebibytes']:.0f} MiB above the start; "
            f"ratio {best['cpl']['seconds'] / run['seconds']:.2f}"
        )


if __name__ == "__main__":
    main()
