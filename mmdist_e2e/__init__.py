"""mmdist: from MP4 files and text to timestamps.

>>> import mmdist_e2e as mm
>>> mm.load().ground("clip.mp4", "person opens door")  # doctest: +SKIP

Names are imported on first use (PEP 562), so importing this package never imports torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmdist_e2e.pipeline import Grounder as Grounder
    from mmdist_e2e.pipeline import extract as extract
    from mmdist_e2e.pipeline import load as load
    from mmdist_e2e.store import FeatureStore as FeatureStore
    from mmdist_e2e.structures import Answer as Answer
    from mmdist_e2e.structures import Features as Features
    from mmdist_e2e.structures import MmdistError as MmdistError
    from mmdist_e2e.structures import Moment as Moment
    from mmdist_e2e.structures import Provenance as Provenance

__version__ = "0.1.0"

_NAMES = {
    "structures": ("Answer", "Features", "MmdistError", "Moment", "Provenance"),
    "store": ("FeatureStore",),
    "pipeline": ("Grounder", "extract", "load"),
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
