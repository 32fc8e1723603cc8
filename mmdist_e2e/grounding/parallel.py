"""One training over several processes, one GPU each, started by torchrun.

Every process collates the same global batch with the same masked words, keeps its own share of
rows, and compares its videos with the sentences of all. So the loss equals that of one process.
DistributedDataParallel averages the gradients.

Shape suffixes: B rows of this process, G rows of the global batch, D channels.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
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
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or several():
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
    """A share of a global batch, and the rows of the other processes.

    sizes: rows of every process. own_B: where the rows of this one stand in the global batch.
    videos_G, sentences_G: of the global batch.
    """

    sizes: tuple[int, ...]
    own_B: Tensor
    videos_G: Tensor
    sentences_G: Tensor

    @property
    def weight(self) -> float:
        """The weight of a mean over the rows of this process in the mean over processes."""
        return self.sizes[rank()] * len(self.sizes) / sum(self.sizes)

    def gather(self, rows_BD: Tensor) -> Tensor:
        """[G, D]: the rows of all processes in order; gradients flow back to where they came from.

        Every process sends as many rows as the largest share has.
        """
        padded = F.pad(rows_BD, (0, 0, 0, max(self.sizes) - len(rows_BD)))
        parts: Tensor = _Gather.apply(padded)
        return torch.cat([part[:size] for part, size in zip(parts, self.sizes, strict=True)])

    def mean(self, terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Means over the global batch from the means of every process."""
        stacked = torch.stack([term.detach().float() for term in terms.values()]) * self.weight
        dist.all_reduce(stacked)
        return dict(zip(terms, stacked / len(self.sizes), strict=True))


class _Gather(torch.autograd.Function):
    """all_gather with gradients; torch's own is deprecated in favor of a private module."""

    @staticmethod
    def forward(ctx: object, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        """The sum of what every process asks of the rows of this one."""
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[rank()]


def share(batch: Batch, masked_GW: Tensor) -> tuple[Batch, Tensor, Peers | None]:
    """The rows of this process in a global batch, their masked words, and its place among others.

    A process without rows (more processes than rows) takes the first row, with the weight 0.
    """
    if not several():
        return batch, masked_GW, None
    every_G = torch.arange(len(masked_GW), device=masked_GW.device)
    shares = every_G.tensor_split(dist.get_world_size())
    own_B = shares[rank()] if len(shares[rank()]) else every_G[:1]
    peers = Peers(tuple(map(len, shares)), own_B, batch.videos_B, batch.sentences_B)
    return batch.rows(own_B), masked_GW[own_B], peers
