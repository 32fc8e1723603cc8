"""Whether weights are those of a network: all of them, no others, of its shapes, finite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

NAMED_AT_MOST = 3


def misfits(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """What keeps `given` from being loaded where `expected` is, in words; "" when nothing does.

    BatchNorm's counters, which inference never reads, may be missing.
    """
    kinds = {
        "missing": [k for k in expected if k not in given and not k.endswith("batches_tracked")],
        "unexpected": [key for key in given if key not in expected],
        "of another shape": [
            f"{key} {list(given[key].shape)} for {list(value.shape)}"
            for key, value in expected.items()
            if key in given and given[key].shape != value.shape
        ],
        "not finite": [key for key, value in given.items() if not value.isfinite().all()],
    }
    return "; ".join(
        f"{kind} {', '.join(keys[:NAMED_AT_MOST])}{' …' if len(keys) > NAMED_AT_MOST else ''}"
        for kind, keys in kinds.items()
        if keys
    )
