"""Reading other people's pickles without running their code: numpy arrays and plain containers."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

from mmdist_e2e.structures import MmdistError

# What a pickle of arrays in dicts names, under numpy 1 and numpy 2. Everything else is refused.
PERMITTED = frozenset(
    {
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy.core.multiarray", "scalar"),
        ("numpy._core.multiarray", "scalar"),
        ("numpy.core.numeric", "_frombuffer"),
        ("numpy._core.numeric", "_frombuffer"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("collections", "OrderedDict"),
        ("collections", "Counter"),
        ("builtins", "dict"),
        ("builtins", "list"),
        ("builtins", "set"),
    }
)


class _RefusedError(Exception):
    """A pickle named something outside PERMITTED."""


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return _latin1
        if (module, name) not in PERMITTED:
            raise _RefusedError(f"{module}.{name}")
        # numpy 2 moved these modules; pickles of both ages must open everywhere.
        return super().find_class(module.replace("numpy.core.", "numpy._core."), name)


def _latin1(text: str, encoding: str) -> bytes:
    """How protocol 2 spells bytes; other codecs than this one have no business in an array."""
    if encoding != "latin1":
        raise _RefusedError(f"the codec {encoding}")
    return text.encode("latin1")


def load_restricted(path: Path) -> Any:
    """Load a pickle that holds numpy arrays, dicts, counters, lists, numbers and strings only.

    Raises MmdistError for a file that is no pickle, is cut short, or names any other class or
    function (which is never imported, let alone called).
    """
    try:
        return _RestrictedUnpickler(io.BytesIO(path.read_bytes())).load()
    except _RefusedError as error:
        raise MmdistError(
            f"The pickle '{path}' asks for {error}, and only numpy arrays, dicts and counters are "
            f"opened from a pickle; it may be malicious, so ask for its source in another format."
        ) from error
    except OSError as error:
        raise MmdistError(
            f"'{path}' cannot be read ({error.strerror}); give a readable file."
        ) from error
    except (
        pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, IndexError,
        AttributeError, ImportError, MemoryError, OverflowError, UnicodeDecodeError,
    ) as error:  # fmt: skip
        raise MmdistError(
            f"'{path}' is not a readable pickle ({type(error).__name__}); give a GloVe text file "
            f"or CPL's glove.pkl."
        ) from error
