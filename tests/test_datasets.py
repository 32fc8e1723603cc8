"""Items, batches and masks; words as CPL has them."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from mmdist_e2e.grounding.data.annotations import Annotation, load_annotations
from mmdist_e2e.grounding.data.batches import Batch, batches, draw_masks, make_items, mask_patterns
from mmdist_e2e.grounding.data.features import FeatureTable
from mmdist_e2e.grounding.data.text import MAX_WORDS, Vocabulary, has_known_word, is_word, tokenize
from mmdist_e2e.structures import MmdistError
from mmdist_e2e.weights.words import load_restricted, load_word_vectors, shipped_word_vectors

needs_data = pytest.mark.skipif(
    "MMDIST_DATA" not in os.environ, reason="set MMDIST_DATA for the real files"
)


def toy_table(*videos: str, seconds: float | None = 20.0) -> FeatureTable:
    data_VLF = torch.randn(len(videos), 5, 4, generator=torch.Generator().manual_seed(0))
    durations = dict.fromkeys(videos, seconds)
    return FeatureTable(videos, data_VLF, durations, {"rgb": {"extractor": "toy"}}, {"rgb": 4})


def test_batches_pad_and_keep_the_order() -> None:
    table = toy_table("a", "bb")
    vectors = shipped_word_vectors()
    sentences = ["person opens the door .", "person runs", "opens"]
    vocabulary = Vocabulary.from_sentences(sentences, vectors)
    videos = ["bb", "a", "bb"]
    items = make_items(
        [Annotation(v, None, 0, 1, s) for v, s in zip(videos, sentences, strict=True)],
        table, vocabulary,
    )  # fmt: skip
    first, last = batches(items, table, 2, [1, 0, 2])
    assert first.is_word_BW.tolist() == [[True] * 2 + [False] * 3, [True] * 5]
    assert first.content_BW[1].tolist() == [True, True, False, True, False]
    assert torch.equal(first.frames_BLF, table.data_VLF[[0, 1]])
    assert not first.words_BWE[0, 2:].any()
    assert not first.ids_BW[0, 2:].any()
    np.testing.assert_array_equal(last.words_BWE[0], vectors.rows(["opens"]))


def test_batches_say_which_videos_and_sentences_are_the_same() -> None:
    table = toy_table("a", "b")
    sentences = ["person opens the door.", "Person opens THE door .", "person runs", "opens"]
    vocabulary = Vocabulary.from_sentences(sentences, shipped_word_vectors())
    items = make_items(
        [Annotation(v, None, 0, 1, s) for v, s in zip("abab", sentences, strict=True)],
        table, vocabulary,
    )  # fmt: skip
    (batch,) = batches(items, table, 4, [3, 0, 2, 1])

    def pairs(group_B: torch.Tensor) -> list[list[bool]]:
        return (group_B[:, None] == group_B).tolist()

    def equal(names: str) -> list[list[bool]]:
        return [[a == b for b in names] for a in names]

    # In the order 3, 0, 2, 1: videos b, a, a, b; sentences opens, door, runs, door.
    assert pairs(batch.videos_B) == equal("baab")
    assert pairs(batch.sentences_B) == equal("odrd")
    bare = Batch(*list(vars(batch).values())[:5])
    assert pairs(bare.videos_B) == pairs(bare.sentences_B) == equal("abcd")


def test_items_without_duration_or_known_word_are_refused() -> None:
    vocabulary = Vocabulary(["person"], shipped_word_vectors())
    with pytest.raises(MmdistError, match=r"1 videos have no duration, .*\(a\); give --durations"):
        make_items(
            [Annotation("a", None, 0, 1, "person")], toy_table("a", seconds=None), vocabulary
        )
    # The annotation's own duration goes before that of the features.
    (item,) = make_items([Annotation("a", 7.0, 0, 1, "person")], toy_table("a"), vocabulary)
    assert item.duration_seconds == 7.0
    wrong = [Annotation("a", 9.0, 0, 1, s) for s in ("person", "zzgrmpf qqx .", "...")]
    with pytest.raises(MmdistError, match=r"2 of 3 sentences .*'zzgrmpf qqx \.' \(video 'a'\)"):
        make_items(wrong, toy_table("a"), vocabulary)


def test_words_outside_the_training_text_are_read_but_not_scored() -> None:
    vectors = shipped_word_vectors()
    vocabulary = Vocabulary.from_sentences(["person opens the door."], vectors)
    sentence = "person zzgrmpf closes the door"
    table = toy_table("a")
    (batch,) = batches(
        make_items([Annotation("a", None, 0, 1, sentence)], table, vocabulary), table, 1, [0]
    )
    ids = {word: i for i, word in enumerate(vocabulary.words, start=1)}
    # "closes" has a vector and no output id; "zzgrmpf" has neither and is gone.
    assert batch.ids_BW[0].tolist() == [ids["person"], 0, ids["the"], ids["door"]]
    assert batch.is_word_BW.all()
    np.testing.assert_array_equal(batch.words_BWE[0, 1], vectors.rows(["closes"])[0])


@pytest.mark.parametrize("dim", [7, 50])
def test_word_vectors_of_any_size(tmp_path: Path, dim: int) -> None:
    vectors = shipped_word_vectors()
    if dim != vectors.dim:
        line = " ".join(map(str, range(dim)))
        (tmp_path / "glove.txt").write_text(f"person {line}\ndoor {line}\n")
        vectors = load_word_vectors(tmp_path / "glove.txt")
    vocabulary = Vocabulary.from_sentences(["person door"], vectors)
    table = toy_table("a")
    items = make_items([Annotation("a", None, 0, 1, "door person door")], table, vocabulary)
    (batch,) = batches(items, table, 1, [0])
    assert batch.words_BWE.shape == (1, 3, dim)
    assert batch.ids_BW.tolist() == [[2, 1, 2]]


@needs_data
def test_words_are_counted_as_cpl_counted_them() -> None:
    """CPL's own counts, made with NLTK, against our tokenizer on the very same sentences."""
    root = Path(os.environ["MMDIST_DATA"]) / "charades_sta"
    theirs = load_restricted(root / "glove.pkl")["counter"]
    ours: Counter[str] = Counter()
    for name in ("cpl_train.json", "cpl_test.json"):
        for annotation in load_annotations(root / name):
            ours.update(tokenize(annotation.sentence))
    known = Counter({word: n for word, n in ours.items() if word in theirs})
    apart = (known - theirs) + (theirs - known)
    assert theirs.total() == 99_901
    # 22 sentences glue two with "door.the", which NLTK leaves whole; the rest are slashes.
    assert apart.total() < 0.001 * theirs.total()
    assert (theirs - known).total() <= 1


@needs_data
def test_real_words() -> None:
    root = Path(os.environ["MMDIST_DATA"])
    glove = load_word_vectors(root / "charades_sta" / "glove.pkl")
    train = load_annotations(root / "charades_clip" / "train.json")
    val = load_annotations(root / "charades_clip" / "val.json")
    vocabulary = Vocabulary.from_sentences((a.sentence for a in train), glove)
    seen = {token for a in train for token in tokenize(a.sentence)}
    assert set(vocabulary.words) <= seen  # nothing of the validation text
    for annotation in val:
        encoded = vocabulary.encode(annotation.sentence)
        expected = [t for t in tokenize(annotation.sentence) if t in glove][:MAX_WORDS]
        assert list(encoded.tokens) == expected
        assert [bool(i) for i in encoded.ids_W] == [t in vocabulary.words for t in expected]
        assert encoded.vectors_WE.shape == (len(expected), 300)
    activitynet = load_annotations(root / "activitynet" / "val_1.json")
    longest = max(activitynet, key=lambda a: sum(map(is_word, tokenize(a.sentence))))
    assert len(vocabulary.encode(longest.sentence).tokens) == MAX_WORDS
    assert all(has_known_word(a.sentence, shipped_word_vectors()) for a in activitynet)


def _one_sentence_batch(sentence: str, copies: int) -> Batch:
    table = toy_table("a")
    vocabulary = Vocabulary.from_sentences([sentence], shipped_word_vectors())
    items = make_items([Annotation("a", None, 0, 1, sentence)] * copies, table, vocabulary)
    return next(batches(items, table, copies, range(copies)))


def test_masks_are_drawn_by_content_without_replacement() -> None:
    copies = 6000
    batch = _one_sentence_batch("the person opens a door quickly", copies)
    drawn = draw_masks(batch, torch.Generator().manual_seed(0))
    assert (drawn.sum(1) == 2).all()  # max(6 // 3, 1)
    # The same draw, one word after the other.
    p = np.exp([1.0, 2, 2, 1, 2, 2])
    p /= p.sum()
    rng = np.random.default_rng(0)
    counts = Counter(w for _ in range(copies) for w in rng.choice(6, 2, replace=False, p=p))
    expected = np.array([counts[i] for i in range(6)]) / copies
    np.testing.assert_allclose(drawn.float().mean(0), expected, atol=0.025)
    assert torch.equal(drawn, draw_masks(batch, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("words", range(1, 21))
def test_patterns_mask_every_word_once(words: int) -> None:
    is_word = torch.zeros(2, 20, dtype=torch.bool)
    is_word[0, :words] = is_word[1] = True
    masks, has = mask_patterns(is_word)
    count = -(-words // max(words // 3, 1))
    assert int(has[:, 0].sum()) == count
    assert has[:count, 0].all()
    for p in range(count):
        assert masks[p, 0].nonzero()[:, 0].tolist() == [i for i in range(words) if i % count == p]
