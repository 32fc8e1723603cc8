"""Checkpoints and vocabularies as CPL's public code writes them, small and random."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from click.testing import CliRunner, Result

from mmdist_e2e.cli.main import main

# Words and how often each occurs, in order of first appearance; ties are many on purpose.
COUNTS = {"the": 2, "door": 5, ".": 9, "cup": 2, "opens": 5, "person": 9, "mop": 1, "a": 2}
BY_RANK = [".", "person", "door", "opens", "the", "cup", "a", "mop"]
CONFIG = {
    "dataset": {"dataset": "CharadesSTA", "max_num_frames": 32, "vocab_size": 6},
    "train": {
        "optimizer": {"lr": 3e-4, "weight_decay": 0, "warmup_updates": 70, "warmup_init_lr": 1e-7},
        "batch_size": 16,
        "max_num_epochs": 11,
    },
    "model": {
        "name": "CPL",
        "config": {
            "sigma": 7,
            "gamma": 0,
            "dropout": 0.2,
            "DualTransformer": {"d_model": 16, "num_heads": 2},
        },
    },
    "loss": {"margin_1": 0.2, "margin_2": 0.25, "lambda": 0.13, "alpha_1": 2, "alpha_2": 0.5},
    "vote": False,
}


def cpl_tensors(features: int = 12, outputs: int = 7, layers: int = 2) -> dict[str, torch.Tensor]:
    """Random tensors under the names that CPL's public code gives them."""
    shapes: dict[str, tuple[int, ...]] = {
        "mask_vec": (5,), "start_vec": (5,), "pred_vec": (features,),
        "frame_fc.weight": (16, features), "word_fc.weight": (16, 5),
        "fc_comp.weight": (outputs, 16), "fc_gauss.weight": (8, 16),
    }  # fmt: skip
    for stack in ("decoder1", "decoder2"):
        for layer in range(layers):
            at = f"trans.{stack}.decoder_layers.{layer}"
            for attention in ("self_attn", "encoder_attn"):
                shapes[f"{at}.{attention}.in_proj_weight"] = (48, 16)
                shapes[f"{at}.{attention}.in_proj_bias"] = (48,)
                shapes[f"{at}.{attention}.out_proj.weight"] = (16, 16)
                shapes[f"{at}.{attention}_layer_norm.weight"] = (16,)
            shapes[f"{at}.final_layer_norm.weight"] = (16,)
            shapes[f"{at}.fc1.weight"] = (32, 16)
            shapes[f"{at}.fc2.weight"] = (16, 32)
    for name, shape in list(shapes.items()):
        if name.endswith(".weight"):
            shapes[name.removesuffix("weight") + "bias"] = shape[:1]
    generator = torch.Generator().manual_seed(4)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def glove(counts: dict[str, int] = COUNTS, width: int = 5) -> dict[str, Any]:
    """A vocabulary as CPL pickles it: rows of vectors in another order than the output ids."""
    rows = {"<PAD>": 0} | {word: i for i, word in enumerate(counts, start=1)}
    table = [np.full(width, i, dtype=np.float32) for i in range(len(rows))]
    return {"w2id": rows, "id2vec": table, "counter": Counter(counts)}


class Files:
    """A CPL checkpoint and its vocabulary, to be changed and converted."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"
        self.model, self.vocabulary = folder / "model-best.pt", folder / "glove.pkl"
        self.content: dict[str, Any] = {
            "num_updates": 77,
            "config": copy.deepcopy(CONFIG),
            "model_parameters": cpl_tensors(),
        }
        self.words = glove()

    def convert(self, *options: object) -> Result:
        torch.save(self.content, self.model)
        self.vocabulary.write_bytes(pickle.dumps(self.words, protocol=4))
        return self.run(self.model, "--vocabulary", self.vocabulary, *options)

    def run(self, *arguments: object) -> Result:
        command = ["weights", "convert", "cpl", *map(str, arguments), "--out", str(self.out)]
        return CliRunner().invoke(main, command)

    def refusal(self, *options: object) -> str:
        return self.refused(self.convert(*options))

    def refused(self, result: Result) -> str:
        """The error: one line, no traceback, and nothing written."""
        assert result.exit_code == 1, result.output
        assert isinstance(result.exception, SystemExit), result.exception
        lines = result.output.strip().splitlines()
        assert len(lines) == 1
        assert not self.out.exists()
        return lines[0]
