"""Annotations, features and masks."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from mmdist_e2e.grounding.datasets import (
    Annotation,
    batches,
    draw_masks,
    load_annotations,
    load_features,
    make_items,
    mask_patterns,
)
from mmdist_e2e.grounding.text import Vocabulary
from mmdist_e2e.store import FeatureStore
from mmdist_e2e.structures import Features, MmdistError, Provenance
from mmdist_e2e.weights.words import shipped_word_vectors


def save_video(root: Path, video: str, rows: int = 9, channels: int = 4, **matters: object) -> None:
    data = np.random.default_rng(len(video)).normal(size=(rows, channels)).astype(np.float32)
    edges = np.linspace(0, 20.0, rows + 1)
    times = np.stack([edges[:-1], edges[1:]], axis=1)
    provenance = Provenance({"extractor": "toy", **matters})
    FeatureStore(root).save(video, Features(data, times, 20.0, "rgb", provenance))


def test_charades_sta_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("3MSZA 24.3 30.4##person turn a light on.\n\nmy video 0 6.9##a # of ## books\n")
    (tmp_path / "d.json").write_text(json.dumps({"3MSZA": 30.96}))
    first, second = load_annotations(path, durations=tmp_path / "d.json")
    assert first == Annotation("3MSZA", 30.96, 24.3, 30.4, "person turn a light on.")
    assert second == Annotation("my video", None, 0.0, 6.9, "a # of ## books")


def test_cpl_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([["v", 30, [7.3, 17.3], "person pours."]]))
    assert load_annotations(path) == [Annotation("v", 30.0, 7.3, 17.3, "person pours.")]


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("a.txt", "v 1 2##ok\nv 1##no\n", "Line 2"),
        ("a.txt", "v 1 2 no separator\n", "Line 1"),
        ("a.txt", "v one 2##x\n", "Line 1"),
        ("a.txt", "v 5 2##x\n", "starts at 0"),
        ("a.txt", "v 1 2##\n", "no sentence"),
        ("a.txt", "\n", "no annotations"),
        ("a.json", "[[1]", "not readable JSON"),
        ("a.json", '[["v", 30, [1, 2], "x"], ["v", 30, 1, "x"]]', "Row 2"),
        ("a.json", "{}", "no annotations"),
    ],
)
def test_bad_annotations_name_the_place(tmp_path: Path, name: str, text: str, reason: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(MmdistError, match=reason):
        load_annotations(tmp_path / name)


def test_missing_annotations(tmp_path: Path) -> None:
    with pytest.raises(MmdistError, match="cannot be read"):
        load_annotations(tmp_path / "none.txt")


def test_features_of_a_store(tmp_path: Path) -> None:
    for video in ("b", "room/a"):
        save_video(tmp_path, video)
    table = load_features(tmp_path, ["room/a", "b", "b"], length=5)
    assert table.videos == ("b", "room/a")
    assert table.data_VLF.shape == (2, 5, 4)
    expected = FeatureStore(tmp_path).load("room/a", "rgb").resample(5).data
    np.testing.assert_array_equal(table.data_VLF[table.rows["room/a"]], expected)
    assert table.durations_seconds["b"] == 20.0
    assert table.matters == {"extractor": "toy"}


def test_videos_without_features_are_counted_and_named(tmp_path: Path) -> None:
    save_video(tmp_path, "v0")
    with pytest.raises(MmdistError, match=r"7 of 8 videos .*\(v1, v2, v3, v4, v5 and 2 more\)"):
        load_features(tmp_path, [f"v{i}" for i in range(8)], length=5)


@pytest.mark.parametrize("unlike", [{"window": 32}, {"channels": 5}])
def test_features_made_in_two_ways_are_refused(tmp_path: Path, unlike: dict[str, int]) -> None:
    save_video(tmp_path, "a")
    save_video(tmp_path, "b", **unlike)
    with pytest.raises(MmdistError, match="not all made in one way"):
        load_features(tmp_path, ["a", "b"], length=5)


def test_features_of_hdf5(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="needs the extra hdf5")
    rows = np.random.default_rng(0).normal(size=(7, 3))
    with h5py.File(tmp_path / "f.hdf5", "w") as file:
        file["a"] = rows.astype(np.float16)
        file["b/c3d_features"] = rows
    table = load_features(tmp_path / "f.hdf5", ["a", "b"], length=7)
    np.testing.assert_allclose(table.data_VLF[1], rows, rtol=1e-6)
    np.testing.assert_array_equal(table.data_VLF[0], rows.astype(np.float16).astype(np.float32))
    assert table.durations_seconds == {"a": None, "b": None}
    (tmp_path / "bad.hdf5").write_bytes(b"no")
    with pytest.raises(MmdistError, match="not a readable HDF5"):
        load_features(tmp_path / "bad.hdf5", ["a"], length=7)
    vocabulary = Vocabulary(["person"], shipped_word_vectors())
    with pytest.raises(MmdistError, match="1 videos have no duration"):
        make_items([Annotation("a", None, 0, 1, "person")], table, vocabulary)


def test_batches_pad_and_keep_the_order(tmp_path: Path) -> None:
    save_video(tmp_path, "a")
    save_video(tmp_path, "bb")
    table = load_features(tmp_path, ["a", "bb"], length=5)
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


def _one_sentence_batch(tmp_path: Path, sentence: str, copies: int):  # type: ignore[no-untyped-def]
    save_video(tmp_path, "a")
    table = load_features(tmp_path, ["a"], length=5)
    vocabulary = Vocabulary.from_sentences([sentence], shipped_word_vectors())
    items = make_items([Annotation("a", None, 0, 1, sentence)] * copies, table, vocabulary)
    return next(batches(items, table, copies, range(copies)))


def test_masks_are_drawn_by_content_without_replacement(tmp_path: Path) -> None:
    copies = 6000
    batch = _one_sentence_batch(tmp_path, "the person opens a door quickly", copies)
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


@pytest.mark.skipif("MMDIST_DATA" not in os.environ, reason="set MMDIST_DATA for the real files")
def test_real_annotations() -> None:
    root = Path(os.environ["MMDIST_DATA"]) / "charades_sta"
    assert len(load_annotations(root / "charades_sta_train.txt")) == 12_408
    official = load_annotations(
        root / "charades_sta_test.txt", durations=root / "durations_test.json"
    )
    cpl = load_annotations(root / "cpl_test.json")
    assert (len(official), len(cpl)) == (3_720, 3_158)
    # CPL's protocol drops exactly the queries that end past the video.
    assert sum(a.end <= (a.duration_seconds or 0) for a in official) == len(cpl)
