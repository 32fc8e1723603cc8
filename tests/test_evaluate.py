"""Metrics and controls against brute force."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mmdist_e2e.grounding.answer import Predictions, iou
from mmdist_e2e.grounding.data.annotations import Annotation
from mmdist_e2e.grounding.data.batches import Item
from mmdist_e2e.grounding.data.text import Vocabulary
from mmdist_e2e.grounding.evaluate import (
    best_constant_span,
    prediction_iou,
    random_proposal_metrics,
    recall_metrics,
    shuffled_order,
    spread_over_runs,
    truth_of,
    write_predictions,
)
from mmdist_e2e.structures import MmdistError
from mmdist_e2e.weights.words import shipped_word_vectors


def slow_iou(a: tuple[float, float], b: tuple[float, float]) -> float:
    """On a fine grid of instants."""
    grid = (np.arange(20_000) + 0.5) / 1000
    in_a = (grid >= a[0]) & (grid < a[1])
    in_b = (grid >= b[0]) & (grid < b[1])
    union = (in_a | in_b).sum()
    return float((in_a & in_b).sum() / union) if union else 0.0


def random_spans(count: int, rng: np.random.Generator) -> np.ndarray:
    return np.sort(rng.uniform(0, 20, (count, 2)), axis=1)


def test_iou_against_counting_instants() -> None:
    rng = np.random.default_rng(0)
    a, b = random_spans(50, rng), random_spans(50, rng)
    expected = [slow_iou(tuple(x), tuple(y)) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(iou(a, b), expected, atol=2e-3)


def test_iou_at_its_edges() -> None:
    spans = np.array([[0.0, 5.0], [5.0, 9.0], [3.0, 3.0]])
    assert iou(spans[0], spans[1]) == 0  # they touch
    assert iou(spans[0], spans[0]) == 1
    assert iou(spans[2], spans[2]) == 0  # empty both: no division by zero
    assert iou(spans[0], spans[2]) == 0


def test_recall_against_counting() -> None:
    rng = np.random.default_rng(1)
    values = rng.uniform(0, 1, (40, 8))
    values[0, 0] = 0.5  # a hit is IoU >= m
    metrics = recall_metrics(values)
    for n in (1, 5):
        for m in (0.3, 0.5, 0.7):
            hits = sum(any(v >= m for v in row[:n]) for row in values.tolist())
            assert metrics[f"R@{n},IoU={m}"] == pytest.approx(100 * hits / 40)
    assert metrics["mIoU"] == pytest.approx(100 * sum(row[0] for row in values.tolist()) / 40)
    assert "R@5,IoU=0.5" not in recall_metrics(values[:, :3])


def test_best_constant_span_against_all_of_them() -> None:
    rng = np.random.default_rng(2)
    durations = rng.uniform(15, 20, 30)
    truth = random_spans(30, rng)
    (start, end), values = best_constant_span(truth, durations)
    hits = {}
    for i in range(20):
        for j in range(i + 1, 21):
            spans = [(i / 20 * d, j / 20 * d) for d in durations]
            each = [
                iou(np.array(s), np.array(t)) for s, t in zip(spans, truth.tolist(), strict=True)
            ]
            hits[i / 20, j / 20] = sum(v >= 0.5 for v in each)
    assert hits[start, end] == max(hits.values())
    assert (values >= 0.5).sum() == max(hits.values())


def test_a_random_proposal_is_an_expectation() -> None:
    values = np.random.default_rng(3).uniform(0, 1, (25, 8))
    metrics = random_proposal_metrics(values, np.ones(values.shape, bool))
    assert metrics["R@1,IoU=0.5"] == pytest.approx(100 * (values >= 0.5).mean())
    assert metrics["mIoU"] == pytest.approx(100 * values.mean())


@pytest.mark.parametrize("groups", [[1] * 10, [3, 3, 3, 2], [5, 1, 1, 1, 1, 1], [2, 2]])
def test_shuffling_gives_every_query_a_sentence_of_another_video(groups: list[int]) -> None:
    videos = [f"v{i}" for i, size in enumerate(groups) for _ in range(size)]
    np.random.default_rng(0).shuffle(videos)
    order = shuffled_order(videos)
    assert sorted(order) == list(range(len(videos)))
    assert all(videos[i] != videos[j] for i, j in enumerate(order))
    assert order == shuffled_order(videos)


def predictions_of(spans: list[list[tuple[float, float]]]) -> Predictions:
    """Spans of each query, best first; scores -1, -2, …"""
    starts, ends = (np.array([[span[i] for span in row] for row in spans]) for i in range(2))
    losses = np.tile(np.arange(1.0, starts.shape[1] + 1), (len(spans), 1))
    return Predictions(starts, ends, -losses, losses)


def test_of_several_annotated_moments_the_one_that_fits_best_counts() -> None:
    vocabulary = Vocabulary(["person"], shipped_word_vectors())
    sentence = vocabulary.encode("person")
    two = Annotation("v", 10.0, 0.0, 5.0, "person", ((6.0, 8.0),))
    items = [
        Item(two, 10.0, sentence, 0),
        Item(Annotation("w", 20.0, 0.0, 10.0, "person"), 20.0, sentence, 1),
    ]
    spans = [[(0.6, 0.8), (0.0, 0.4)], [(0.6, 0.8), (0.0, 0.4)]]
    np.testing.assert_allclose(prediction_iou(predictions_of(spans), items), [[1.0, 0.8], [0, 0.8]])
    span, iou_Q = best_constant_span(*truth_of(items))
    assert span == (0.0, 0.5)
    np.testing.assert_allclose(iou_Q, [1.0, 1.0])


def test_predictions_are_one_line_a_query(tmp_path: Path) -> None:
    vocabulary = Vocabulary(["person"], shipped_word_vectors())
    annotation = Annotation("v", 10.0, 2.0, 6.0, "person “opens” door")
    item = Item(annotation, 10.0, vocabulary.encode("person"), 0)
    spans = predictions_of([[(0.2, 0.6), (0.0, 0.5)]])
    write_predictions(tmp_path / "p.jsonl", [item], spans)
    (row,) = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert row["video"] == "v"
    assert row["sentence"] == annotation.sentence
    assert row["moments"] == [[2.0, 6.0, -1.0], [0.0, 5.0, -2.0]]
    assert row["iou"] == 1.0


def test_runs_of_one_recipe_are_averaged_and_of_two_refused() -> None:
    def result(value: float, recipe: str = "cpl") -> dict[str, object]:
        metrics = {"mIoU": value}
        return {"recipe": recipe, "metrics": metrics, "controls": {"random": {"mIoU": 1.0}}}

    lines = dict(spread_over_runs([result(1.0), result(2.0), result(6.0)]))
    mean, deviation = lines["model"]["mIoU"]
    assert mean == 3.0
    assert deviation == pytest.approx((((-2) ** 2 + (-1) ** 2 + 3**2) / 2) ** 0.5)
    assert lines["random"]["mIoU"] == (1.0, 0.0)
    assert dict(spread_over_runs([result(5.0)]))["model"]["mIoU"] == (5.0, 0.0)
    with pytest.raises(MmdistError, match="one recipe"):
        spread_over_runs([result(1.0), result(1.0, "other")])
