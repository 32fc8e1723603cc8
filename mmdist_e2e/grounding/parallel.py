"""One training over several processes, one GPU each, started by torchrun.

Every process makes the same global batch with the same masked words, keeps its share of rows, and
compares its videos with all sentences, so the loss equals that of one process.
DistributedDataParallel averages the gradients.

Shape suffixes: B rows of this process, G rows of the global batch, D channels.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from mmdist_e2e.grounding.data.batches import Batch
from mmdist_e2e.structures import MmdistError


def several() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Which process this is; 0 where there is one."""
    return dist.get_rank() if several() else 0


@contextmanager
def processes(device: str) -> Iterator[str]:
    """Join the processes that torchrun started, if it did; gives the device of this one.

    Raises MmdistError when there are more processes than GPUs on this machine.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1" or several():
        yield device
        return
    on_gpu = device.startswith("cuda")
    if on_gpu:
        own, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if own >= count:
            raise MmdistError(
                f"torchrun started more processes than this machine has GPUs ({count}); lower "
                f"--nproc-per-node."
            )
        device = f"cuda:{own}"
        torch.cuda.set_device(own)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class Peers:
    """The place of this process's rows in a global batch."""

    size: int  # how many rows it has; 0 where there are more processes than rows
    own_B: Tensor  # their indices in the global batch
    videos_G: Tensor
    sentences_G: Tensor

    @property
    def weight(self) -> float:
        """The weight of a mean over the rows of this process in the mean over processes."""
        return self.size * dist.get_world_size() / len(self.videos_G)

    def gather(self, rows_BD: Tensor) -> Tensor:
        """[G, D]: the rows of all processes, with gradients."""
        empty_GD = rows_BD.new_zeros(len(self.videos_G), rows_BD.shape[1])
        own_GD = empty_GD.index_copy(0, self.own_B[: self.size], rows_BD[: self.size])
        return cast(Tensor, _Sum.apply(own_GD))

    def mean(self, terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Means over the global batch from the means of every process."""
        stacked = torch.stack([term.detach().float() for term in terms.values()]) * self.weight
        dist.all_reduce(stacked)
        return dict(zip(terms, stacked / dist.get_world_size(), strict=True))


class _Sum(torch.autograd.Function):
    """A sum over processes, with gradients; torch's own is deprecated."""

    @staticmethod
    def forward(ctx: object, values: Tensor) -> Tensor:
        total = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return _Sum.forward(ctx, gradient)


def share(batch: Batch, masked_GW: Tensor) -> tuple[Batch, Tensor, Peers | None]:
    """The rows of this process in a global batch, their masked words, and their place in it.

    A process without rows takes the first row, with the weight 0.
    """
    if not several():
        return batch, masked_GW, None
    every_G = torch.arange(len(masked_GW), device=masked_GW.device)
    own_B = every_G.tensor_split(dist.get_world_size())[rank()]
    size = len(own_B)
    own_B = own_B if size else every_G[:1]
    peers = Peers(size, own_B, batch.videos_B, batch.sentences_B)
    return batch.rows(own_B), masked_GW[own_B], peers
