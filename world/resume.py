"""Resuming a killed pretraining: its whole state after an epoch, in one atomic file.

Weights, the optimizer's moments and the state of both random generators are tensors; the rest is
JSON in the file's metadata. A resumed run ends with the bits of an uninterrupted one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from mmdist_e2e.store import write_atomically
from mmdist_e2e.structures import MmdistError

STATE = "state.safetensors"


@dataclass(frozen=True)
class Run:
    """What changes while a network is pretrained."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    generator: torch.Generator

    def save(self, path: Path, identity: Mapping[str, Any], epoch: int) -> None:
        """Write everything after `epoch` epochs; `identity` is what decides the weights."""
        state = self.optimizer.state_dict()
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for index, moments in state["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in moments.items()}
        tensors |= {"rng.torch": torch.get_rng_state(), "rng.clips": self.generator.get_state()}
        meta = {
            "identity": identity,
            "epoch": epoch,
            "groups": state["param_groups"],
            "schedule": self.schedule.state_dict(),
        }
        whole = {name: value.contiguous() for name, value in tensors.items()}
        text = {key: json.dumps(value) for key, value in meta.items()}
        write_atomically(path, save(whole, metadata=text))

    def load(self, path: Path, identity: Mapping[str, Any]) -> int:
        """Load the state in `path`; returns the number of epochs that are done, 0 without a file.

        Raises MmdistError when the file is damaged, or of a run with another identity.
        """
        if not path.is_file():
            return 0
        try:
            with safe_open(path, framework="pt") as file:
                meta = {key: json.loads(value) for key, value in file.metadata().items()}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            known, epoch = meta["identity"], int(meta["epoch"])
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise MmdistError(
                f"The training state '{path}' is damaged; delete it and pretrain again."
            ) from error
        wanted = json.loads(json.dumps(identity))
        changed = sorted(k for k in wanted.keys() | known.keys() if wanted.get(k) != known.get(k))
        if changed:
            raise MmdistError(
                f"'{path.parent}' holds a pretraining that differs in {', '.join(changed)}; give "
                f"another --out, or delete that folder."
            )
        self.model.load_state_dict(_under("model.", tensors))
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in _under("optimizer.", tensors).items():
            index, moment = name.split(".")
            like = parameters[int(index)]
            if value.shape == like.shape:  # in its parameter's memory layout, as it was
                value = torch.empty_like(like).copy_(value)
            moments.setdefault(int(index), {})[moment] = value
        self.optimizer.load_state_dict({"state": moments, "param_groups": meta["groups"]})
        self.schedule.load_state_dict(meta["schedule"])
        torch.set_rng_state(tensors["rng.torch"])
        self.generator.set_state(tensors["rng.clips"])
        return epoch


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
