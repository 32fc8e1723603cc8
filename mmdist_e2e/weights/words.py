"""Word vectors: the shipped GloVe words, any GloVe text file, or CPL's pickle.

Shape suffixes: V words, E word dimension.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

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


SHIPPED_NAME = "glove-6b-50d-20k"

SHIPPED_PATH = Path(__file__).parent / "data" / f"{SHIPPED_NAME}.safetensors"

# A checkpoint carries its own vectors when they are not the shipped ones: so many of the most
# frequent words, beside the words of its training sentences.
FREQUENT_WORDS = 20_000


@dataclass(frozen=True)
class WordVectors:
    """`words` in order of frequency (as GloVe's files are), `vectors_VE` float32, and a name."""

    name: str
    words: tuple[str, ...]
    vectors_VE: NDArray[np.float32]
    index: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.vectors_VE.ndim != 2 or len(self.words) != len(self.vectors_VE):
            raise MmdistError(
                f"Word vectors '{self.name}' must be one row a word; got {len(self.words)} words "
                f"and an array of shape {list(self.vectors_VE.shape)}."
            )
        if len(self.words) == 0 or not np.isfinite(self.vectors_VE).all():
            raise MmdistError(f"Word vectors '{self.name}' must be finite, and at least one word.")
        object.__setattr__(self, "index", {word: row for row, word in enumerate(self.words)})

    @property
    def dim(self) -> int:
        return int(self.vectors_VE.shape[1])

    def __contains__(self, word: object) -> bool:
        return word in self.index

    def rows(self, words: Iterable[str]) -> NDArray[np.float32]:
        """[W, E]: the vectors of known words, in their order."""
        return self.vectors_VE[[self.index[word] for word in words]]

    @property
    def digest(self) -> str:
        """SHA-256 over words and vectors: what a checkpoint remembers them by."""
        sha = hashlib.sha256("\n".join(self.words).encode())
        sha.update(np.ascontiguousarray(self.vectors_VE, dtype="<f4").tobytes())
        return sha.hexdigest()

    def limited(self, also: Iterable[str], *, first: int = FREQUENT_WORDS) -> WordVectors:
        """The `first` words and those of `also`: what a checkpoint can afford to carry."""
        if len(self.words) <= first:
            return self
        wanted = set(also)
        rows = [r for r, word in enumerate(self.words) if r < first or word in wanted]
        return WordVectors(self.name, tuple(self.words[r] for r in rows), self.vectors_VE[rows])

    def to_bytes(self, dtype: type[np.floating] = np.float32) -> bytes:
        """One safetensors file, words in its header: the form shipped and kept in checkpoints."""
        assert not any("\n" in word for word in self.words)
        return save(
            {"vectors": np.ascontiguousarray(self.vectors_VE, dtype=dtype)},
            metadata={"name": self.name, "words": "\n".join(self.words)},
        )


def read_safetensors(path: Path) -> WordVectors:
    """Read what `WordVectors.to_bytes` made. Raises MmdistError for anything else."""
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            vectors_VE = file.get_tensor("vectors").astype(np.float32)
        return WordVectors(metadata["name"], tuple(metadata["words"].split("\n")), vectors_VE)
    except (OSError, SafetensorError, KeyError) as error:
        raise MmdistError(
            f"'{path}' does not hold word vectors ({error}); build it again or restore it."
        ) from error


@cache
def shipped_word_vectors() -> WordVectors:
    """The 20,000 most frequent words of GloVe 6B, 50-d (public domain), as float16 in the wheel."""
    return read_safetensors(SHIPPED_PATH)


def load_word_vectors(path: Path) -> WordVectors:
    """Word vectors from `path`: a GloVe text file, CPL's pickle, or our own safetensors.

    Raises MmdistError for a missing or malformed file, with its first bad line where it has lines.
    """
    if not path.is_file():
        raise MmdistError(f"There is no word vector file '{path}'; give a GloVe text file.")
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    with path.open("rb") as file:
        is_pickle = file.read(1) == b"\x80"  # every pickle since protocol 2 opens with PROTO
    return _from_cpl_pickle(path) if is_pickle else _from_glove_text(path)


def _from_cpl_pickle(path: Path) -> WordVectors:
    raw = load_restricted(path)
    try:
        rows, table = raw["w2id"], raw["id2vec"]
        words = tuple(word for word in rows if not word.startswith("<"))  # <PAD>, <UNK>: no words
        vectors_VE = np.stack([np.asarray(table[rows[word]], dtype=np.float32) for word in words])
    except (TypeError, KeyError, IndexError, ValueError, AttributeError) as error:
        raise MmdistError(
            f"The pickle '{path}' does not hold CPL's word vectors (w2id and id2vec); give CPL's "
            f"glove.pkl or a GloVe text file."
        ) from error
    return WordVectors(path.stem, words, vectors_VE)


def _from_glove_text(path: Path) -> WordVectors:
    words: list[str] = []
    rows: list[NDArray[np.float32]] = []
    seen: set[str] = set()
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            word, _, numbers = line.rstrip("\r\n").partition(" ")
            try:
                row = np.array(numbers.split(), dtype=np.float32)
            except ValueError:
                row = np.empty(0, dtype=np.float32)
            if row.size == 0 or (rows and row.size != rows[0].size):
                raise MmdistError(
                    f"Line {number} of '{path}' is not a word and its "
                    f"{rows[0].size if rows else 'some'} numbers; give a GloVe text file."
                )
            if word not in seen:
                seen.add(word)
                words.append(word)
                rows.append(row)
    if not rows:
        raise MmdistError(f"The word vector file '{path}' is empty; give a GloVe text file.")
    return WordVectors(path.stem, tuple(words), np.stack(rows))
