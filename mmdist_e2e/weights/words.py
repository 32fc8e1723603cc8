"""Word vectors: the shipped GloVe words, any GloVe text file, or CPL's pickle.

Shape suffixes: V words, E word dimension.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from array import array
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mmdist_e2e.structures import MmdistError

# What a pickle of arrays in dicts names, as numpy 2 spells it. Everything else is refused.
PERMITTED = (
    "numpy._core.multiarray._reconstruct", "numpy._core.multiarray.scalar", "numpy.ndarray",
    "numpy._core.numeric._frombuffer", "numpy.dtype", "collections.OrderedDict",
    "collections.Counter", "builtins.dict", "builtins.list", "builtins.set",
)  # fmt: skip


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):  # how pickle protocol 2 stores bytes
            return lambda text, _: text.encode("latin1")
        module = module.replace("numpy.core.", "numpy._core.")  # pickles of numpy 1 load too
        if f"{module}.{name}" not in PERMITTED:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, and mmdist loads only numpy arrays, dicts and "
                f"counters: it may be malicious"
            )
        return super().find_class(module, name)


def load_restricted(path: Path) -> Any:
    """Load a pickle that holds numpy arrays, dicts, counters, lists, numbers and strings only.

    Raises MmdistError for a file that is not a whole pickle, or that names anything else, which is
    neither imported nor called.
    """
    try:
        return _RestrictedUnpickler(io.BytesIO(path.read_bytes())).load()
    except Exception as error:  # a damaged pickle can raise anything
        reason = getattr(error, "strerror", None) or error
        raise MmdistError(
            f"'{path}' cannot be read as a pickle ({reason}); give GloVe text or CPL's glove.pkl."
        ) from error


SHIPPED_NAME = "glove-6b-50d-20k"
SHIPPED_PATH = Path(__file__).parent / "data" / f"{SHIPPED_NAME}.safetensors"

FREQUENT_WORDS = 20_000  # that a checkpoint holds beside those of its training sentences
LINES_LOOKED_AT = 100  # the first lines of a text file tell how many numbers a word has


@dataclass(frozen=True)
class WordVectors:
    """`words` in order of frequency (as GloVe's files are), `vectors_VE` float32, and a name."""

    name: str
    words: tuple[str, ...]
    vectors_VE: NDArray[np.float32]
    index: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        count, shape = len(self.words), self.vectors_VE.shape
        if len(shape) != 2 or not 0 < count == shape[0] or not np.isfinite(self.vectors_VE).all():
            raise MmdistError(
                f"Word vectors '{self.name}' must be one row of finite numbers for each word, and "
                f"at least one; got {count} words and an array of shape {list(shape)}."
            )
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
        """SHA-256 over words and vectors, by which a checkpoint identifies them."""
        sha = hashlib.sha256("\n".join(self.words).encode())
        sha.update(np.ascontiguousarray(self.vectors_VE, dtype="<f4").tobytes())
        return sha.hexdigest()

    def limited(self, also: Iterable[str], *, first: int = FREQUENT_WORDS) -> WordVectors:
        """The `first` words and those of `also`."""
        if len(self.words) <= first:
            return self
        wanted = set(also)
        rows = [r for r, word in enumerate(self.words) if r < first or word in wanted]
        return WordVectors(self.name, tuple(self.words[r] for r in rows), self.vectors_VE[rows])

    def to_bytes(self, dtype: type[np.floating] = np.float32) -> bytes:
        """A safetensors file with the words in its header, as checkpoints hold it."""
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


def load_word_vectors(path: Path | None) -> WordVectors:
    """Word vectors from `path`: a GloVe or word2vec text file, CPL's pickle, or our safetensors.

    None: those that ship. Raises MmdistError for a missing or malformed file.
    """
    if path is None:
        return shipped_word_vectors()
    if not path.is_file():
        raise MmdistError(f"There is no word vector file '{path}'; give a GloVe text file.")
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    try:
        with path.open("rb") as file:
            is_pickle = file.read(1) == b"\x80"  # the first byte of pickle protocol 2 and later
    except OSError as error:
        raise MmdistError(
            f"'{path}' cannot be read ({error.strerror}); give a readable file."
        ) from error
    if not is_pickle:
        return _from_text(path)
    # <PAD> and <UNK> are no words.
    return read_cpl_pickle(path, lambda raw: (w for w in raw["w2id"] if not w.startswith("<")))


def read_cpl_pickle(path: Path, choose: Callable[[Any], Iterable[str]]) -> WordVectors:
    """Word vectors from CPL's glove.pkl {w2id, id2vec, counter}, of the words that `choose` takes.

    Raises MmdistError for a file that is no such pickle, or has no vector for one of those words.
    """
    raw = load_restricted(path)
    try:
        rows, table, words = raw["w2id"], raw["id2vec"], tuple(choose(raw))
        vectors_VE = np.stack([np.asarray(table[rows[word]], dtype=np.float32) for word in words])
    except (TypeError, KeyError, IndexError, ValueError, AttributeError) as error:
        raise MmdistError(
            f"'{path}' does not hold CPL's vocabulary (w2id, id2vec and counter); give the "
            f"glove.pkl that CPL publishes."
        ) from error
    return WordVectors(path.stem, words, vectors_VE)


def _from_text(path: Path) -> WordVectors:
    """Lines of a word and its numbers; a word may hold spaces, as some of glove.840B do.

    A first line of two counts (word2vec, fastText) is skipped; of equal words the first counts.
    """
    with path.open("rb") as file:  # bytes: some words of GloVe hold Unicode's own line ends
        opening = [line.split() for line in islice(file, LINES_LOOKED_AT)]
    sizes = Counter(len(fields) - 1 for fields in opening if len(fields) > 1)
    if not sizes:
        raise MmdistError(f"'{path}' has no line of a word and numbers; give a GloVe text file.")
    dim = max(sizes, key=lambda size: (sizes[size], size))
    has_header = dim > 1 and len(opening[0]) == 2 and b"".join(opening[0]).isdigit()
    words: dict[str, None] = {}
    values = array("f")
    bad: list[int] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            word, *fields = line.removeprefix(b"\xef\xbb\xbf").rsplit(None, dim) or [b""]
            if (number == 1 and has_header) or not line.strip():
                continue
            try:
                row = np.array(fields, dtype=np.float32)
            except ValueError:
                row = np.empty(0, dtype=np.float32)
            if len(row) != dim or not np.isfinite(row).all():
                bad.append(number)
            elif (text := word.decode("utf-8", "replace")) not in words:
                words[text] = None
                values.frombytes(row.tobytes())
    if bad:
        more = f" and {len(bad) - 10} more" if len(bad) > 10 else ""
        raise MmdistError(
            f"'{path}' has lines that are not a word and its {dim} numbers: "
            f"{', '.join(map(str, bad[:10]))}{more}; give a GloVe text file."
        )
    vectors_VE = np.frombuffer(values, dtype=np.float32).reshape(-1, dim)
    return WordVectors(path.stem, tuple(words), vectors_VE)
