"""One training over several processes, a GPU each, started by torchrun.

Every process collates the same global batch with the same masked words, keeps its own share of
rows, and stands its videos against the sentences of all. So the loss is that of one process.
Shape suffixes: B rows of this process, G rows of the global batch, D channels.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmdist_e2e.grounding.data.batches import Batch
from mmdist_e2e.structures import MmdistError

ROW_FIELDS = (
    "frames_BLF",
    "words_BWE",
    "ids_BW",
    "is_word_BW",
    "content_BW",
    "videos_B",
    "sentences_B",
    "items_B",
)


def rank() -> int:
    """Which process this is; 0 where there is one."""
    return dist.get_rank() if _running() else 0


def _running() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextmanager
def processes(device: str) -> Iterator[str]:
    """Join the processes that torchrun started, if it did; gives this one's device.

    Raises MmdistError when they are more than the GPUs of this machine.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or _running():
        yield device
        return
    own = int(os.environ.get("LOCAL_RANK", "0"))
    on_gpu = device.startswith("cuda")
    if on_gpu:
        if own >= torch.cuda.device_count():
            raise MmdistError(
                f"torchrun started more processes than the {torch.cuda.device_count()} GPUs here; "
                f"lower --nproc-per-node."
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
    """A batch's place among all processes' rows.

    sizes: rows of every process. videos_G, sentences_G: of the global batch.
    """

    sizes: tuple[int, ...]
    videos_G: Tensor
    sentences_G: Tensor

    @property
    def weight(self) -> float:
        """What a mean over this process's rows counts for in the mean over processes."""
        return self.sizes[rank()] * len(self.sizes) / len(self.videos_G)

    def own(self, rows: int) -> Tensor:
        """[B]: where this process's rows stand in the global batch."""
        start = sum(self.sizes[: rank()])
        index = torch.arange(start, start + rows, device=self.videos_G.device)
        return index.clamp_max(len(self.videos_G) - 1)

    def gather(self, rows_BD: Tensor) -> Tensor:
        """[G, D]: the rows of all processes in order; gradients flow back to where they came from.

        Every process sends as many rows as the largest has.
        """
        most = max(self.sizes)
        missing = most - len(rows_BD)
        padded = torch.cat([rows_BD, rows_BD.new_zeros(missing, rows_BD.shape[1])])
        parts = _Gather.apply(padded)
        return torch.cat([part[:size] for part, size in zip(parts, self.sizes, strict=True)])


class _Gather(torch.autograd.Function):
    """all_gather; backward sums what every process asks of this one's rows."""

    @staticmethod
    def forward(ctx: object, rows: Tensor) -> tuple[Tensor, ...]:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return tuple(parts)

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        every = torch.stack(gradients)
        dist.all_reduce(every)
        return every[dist.get_rank()]


def share(batch: Batch, masked_GW: Tensor) -> tuple[Batch, Tensor, Peers | None]:
    """This process's rows of a global batch, their masked words, and its place among the others.

    A process without rows (more processes than rows) takes the first one, which then counts 0.
    """
    if not _running():
        return batch, masked_GW, None
    total, world = len(batch.frames_BLF), dist.get_world_size()
    sizes = tuple(total // world + (r < total % world) for r in range(world))
    start = sum(sizes[: rank()])
    rows = slice(start, start + sizes[rank()]) if sizes[rank()] else slice(0, 1)
    part = replace(batch, **{name: getattr(batch, name)[rows] for name in ROW_FIELDS})
    return part, masked_GW[rows], Peers(sizes, batch.videos_B, batch.sentences_B)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes, in one call."""
    if not _running():
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    means = torch.split(flat, [gradient.numel() for gradient in gradients])
    for gradient, mean in zip(gradients, means, strict=True):
        gradient.copy_(mean.view_as(gradient))


def mean_over_processes(values: dict[str, Tensor], weight: float) -> dict[str, Tensor]:
    """Means over the global batch from every process's own, which count by `weight`."""
    if not _running():
        return values
    stacked = torch.stack([value.detach().float() * weight for value in values.values()])
    dist.all_reduce(stacked)
    return dict(zip(values, stacked / dist.get_world_size(), strict=True))
