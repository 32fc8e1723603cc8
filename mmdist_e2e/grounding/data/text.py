"""Sentences as networks read them: tokenizer, function words, output vocabulary.

Shape suffixes: W words of one sentence, E word dimension.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmdist_e2e.structures import MmdistError
from mmdist_e2e.weights.words import WordVectors, load_restricted

MAX_WORDS = 20
PADDING_ID = 0  # output id 0 is padding and "outside the output vocabulary": never scored

# Kinds of tokens, in order of precedence: clitics ('s 're n't, split off as in GloVe and NLTK),
# numbers with inner points, words with inner hyphens, any other visible character.
_TOKEN = re.compile(
    r"n't\b|'(?:s|re|ve|ll|d|m)\b|\d+(?:[.,:]\d+)+|[^\W_]+?(?=n't\b)|[^\W_]+(?:-[^\W_]+)*|[^\w\s]|_"
)

_APOSTROPHES = str.maketrans({"’": "'", "‘": "'", "ʼ": "'", "“": '"', "”": '"'})

# English function words; all other words are content words. The list replaces CPL's
# part-of-speech tagger, which has to download its data.
_CLOSED_CLASSES = (
    # articles, determiners, quantifiers
    "a an the this that these those some any no every each either neither both all half such what "
    "which whose another other others much many more most few fewer little less least several "
    "enough own same "
    # pronouns
    "i me my mine myself you your yours yourself yourselves he him his himself she her hers "
    "herself it its itself we us our ours ourselves they them their theirs themselves one ones "
    "who whom whoever whatever whichever someone somebody something anyone anybody anything "
    "everyone everybody everything nobody nothing none "
    # prepositions and particles
    "about above across after against along alongside amid among amongst around as at before "
    "behind below beneath beside besides between beyond by despite down during except for from in "
    "inside into like near of off on onto opposite out outside over past per since through "
    "throughout till to toward towards under underneath unlike until up upon via with within "
    "without "
    # conjunctions
    "and or but nor so yet if then than because while whilst whereas although though unless "
    "whether once when whenever where wherever how why "
    # auxiliaries and modals
    "am is are was were be been being do does did doing done have has had having can could may "
    "might must shall should will would ought need dare "
    # negation, pro-adverbs and clitics
    "not n't never there here also too very just only even again still already "
    "'s 're 've 'll 'd 'm s t"
)

FUNCTION_WORDS = frozenset(_CLOSED_CLASSES.split())


def tokenize(sentence: str) -> list[str]:
    """Lower-case a sentence and split it into words, clitics and punctuation.

    "The person's t-shirt doesn't fit." gives the, person, 's, t-shirt, does, n't, fit, "."
    """
    text = unicodedata.normalize("NFC", sentence).translate(_APOSTROPHES).lower()
    return _TOKEN.findall(re.sub(r"\bcannot\b", "can not", text))


def is_word(token: str) -> bool:
    """Whether a token is a word or a number, not punctuation."""
    return any(c.isalnum() for c in token)


def is_content_word(token: str) -> bool:
    """Whether a token is a word that is no function word."""
    return token not in FUNCTION_WORDS and is_word(token)


def known_tokens(sentence: str, vectors: WordVectors) -> list[str]:
    """The first 20 tokens that have a vector, punctuation included, as in CPL."""
    return [token for token in tokenize(sentence) if token in vectors][:MAX_WORDS]


def has_known_word(sentence: str, vectors: WordVectors) -> bool:
    """Whether `Vocabulary.encode` accepts the sentence."""
    return any(map(is_word, known_tokens(sentence, vectors)))


def read_words(path: Path) -> list[str]:
    """Words of a file, each once: one per line, a JSON list, or CPL's glove.pkl (by their counts).

    Raises MmdistError for a file that cannot be read or holds no such list.
    """
    try:
        if path.read_bytes()[:1] == b"\x80":  # a pickle
            words = [word for word, _ in Counter(load_restricted(path)["counter"]).most_common()]
        else:
            text = path.read_text(encoding="utf-8-sig")
            words = json.loads(text) if path.suffix == ".json" else text.split("\n")
        words = list(dict.fromkeys(filter(None, (word.strip().lower() for word in words))))
    except MmdistError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise MmdistError(
            f"'{path}' is no list of words ({error}); give one word per line, a JSON list (.json) "
            f"or CPL's glove.pkl."
        ) from error
    if not words:
        raise MmdistError(f"'{path}' holds no words; give those to predict.")
    return words


@dataclass(frozen=True)
class Sentence:
    """A sentence as the networks read it.

    ids_W: output ids, 0 for a word outside the output vocabulary, which is read but not scored.
    content_W: True for content words. vectors_WE float32.
    """

    tokens: tuple[str, ...]
    ids_W: NDArray[np.int64]
    content_W: NDArray[np.bool_]
    vectors_WE: NDArray[np.float32]


class Vocabulary:
    """The words that a model predicts (output ids) and the words that it reads (vectors)."""

    def __init__(self, words: Sequence[str], vectors: WordVectors) -> None:
        """`words` in order of their ids, which start at 1."""
        if len(set(words)) != len(words):
            raise MmdistError("An output vocabulary must hold each word once.")
        self.words = tuple(words)
        self.vectors = vectors
        self._ids = {word: i for i, word in enumerate(words, start=1)}

    @classmethod
    def from_sentences(
        cls, sentences: Iterable[str], vectors: WordVectors, *, size: int | None = None
    ) -> Vocabulary:
        """The words of the training sentences: id = 1 + frequency rank, ties by first appearance.

        `size` keeps the most frequent only. Raises MmdistError if no word is known.
        """
        counts = Counter(t for s in sentences for t in tokenize(s) if t in vectors)
        if not counts:
            raise MmdistError(
                f"None of the words to predict has a vector in '{vectors.name}'; give others with "
                f"--glove."
            )
        # most_common is stable: ties keep the order of first appearance.
        return cls([word for word, _ in counts.most_common(size)], vectors)

    def __len__(self) -> int:
        return len(self.words)

    def unread(self, text: str) -> list[str]:
        """The content words that the model does not read, since they have no vector.

        Lower-cased, each once, in order of appearance.
        """
        tokens = (t for t in tokenize(text) if is_content_word(t) and t not in self.vectors)
        return list(dict.fromkeys(tokens))

    def encode(self, sentence: str) -> Sentence:
        """Raises MmdistError for an empty sentence and for one without a known word."""
        if not sentence.strip():
            raise MmdistError(
                "The query is empty; describe in a few words what happens in the moment."
            )
        tokens = known_tokens(sentence, self.vectors)
        if not any(map(is_word, tokens)):
            raise MmdistError(
                f"None of the words of the query '{sentence}' is among the "
                f"{len(self.vectors.words)} words of '{self.vectors.name}'; use common English "
                f"words."
            )
        return Sentence(
            tokens=tuple(tokens),
            ids_W=np.array([self._ids.get(t, PADDING_ID) for t in tokens], dtype=np.int64),
            content_W=np.array([is_content_word(t) for t in tokens]),
            vectors_WE=self.vectors.rows(tokens),
        )
