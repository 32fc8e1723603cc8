"""R@n at IoU, mIoU, the four controls; all of it pure functions of spans, save `evaluate_run`.

Spans are (start, end) in seconds. Metrics are percent. Where a query has several annotated
moments, an answer counts by the one it fits best.
Shape suffixes: Q queries, K proposals, S spans, T annotated moments of a query.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mmdist_e2e.grounding.answer import Predictions, Progress, predict
from mmdist_e2e.grounding.config import Recipe
from mmdist_e2e.grounding.data.annotations import load_annotations, protocol_of
from mmdist_e2e.grounding.data.batches import Item, make_items
from mmdist_e2e.grounding.data.features import FeatureTable, load_features, places_of
from mmdist_e2e.grounding.network import GroundingNetwork, build_network
from mmdist_e2e.store import write_atomically, write_json
from mmdist_e2e.structures import MmdistError

Array = NDArray[np.float64]

IOU_THRESHOLDS = (0.3, 0.5, 0.7)

GRID_STEPS = 20  # the best constant span lies on a grid of 1/20 = 0.05

R_AT_5 = 5


def iou(a: Array, b: Array) -> Array:
    """[..., 2] × [..., 2] -> [...]: intersection / union in seconds; 0 where both are empty."""
    shared = np.minimum(a[..., 1], b[..., 1]) - np.maximum(a[..., 0], b[..., 0])
    shared = np.maximum(shared, 0.0)
    union = (a[..., 1] - a[..., 0]) + (b[..., 1] - b[..., 0]) - shared
    ratio: Array = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    return ratio


def recall_metrics(iou_QK: Array) -> dict[str, float]:
    """R@1 and, from five proposals on, R@5 at each threshold, and mIoU of the first, in percent.

    iou_QK: IoU with the annotation, best-ranked proposal first. A hit is IoU >= m.
    """
    metrics = {}
    for n in (1, R_AT_5):
        if iou_QK.shape[1] >= n:
            best_Q = iou_QK[:, :n].max(axis=1)
            for m in IOU_THRESHOLDS:
                metrics[f"R@{n},IoU={m}"] = float((best_Q >= m).mean() * 100)
    metrics["mIoU"] = float(iou_QK[:, 0].mean() * 100)
    return metrics


def truth_of(items: Sequence[Item]) -> tuple[Array, Array]:
    """Annotated spans [Q, T, 2], the first repeated where a query has fewer; durations [Q]."""
    each = [item.annotation.moments for item in items]
    most = max(len(moments) for moments in each)
    spans_QT2 = np.array([m + m[:1] * (most - len(m)) for m in each], dtype=np.float64)
    return spans_QT2, np.array([i.duration_seconds for i in items], dtype=np.float64)


def prediction_iou(predictions: Predictions, items: Sequence[Item]) -> Array:
    """[Q, K]: IoU of every ranked proposal with its query's annotation."""
    truth_QT2, durations_Q = truth_of(items)
    spans_QK2 = np.stack([predictions.starts, predictions.ends], axis=-1)
    seconds_QK12 = (spans_QK2 * durations_Q[:, None, None])[:, :, None]
    best_QK: Array = iou(seconds_QK12, truth_QT2[:, None]).max(axis=-1)
    return best_QK


def best_constant_span(truth: Array, durations_Q: Array) -> tuple[tuple[float, float], Array]:
    """The span on a grid of 0.05 of the video that is best at IoU 0.5, and its IoUs [Q].

    truth: [Q, 2], or [Q, T, 2] for several moments a query. Fitted on the very annotations it is
    scored on: an upper bound of constant answers, which a weakly supervised model cannot know.
    Ties go to the better mean IoU.
    """
    edges = np.arange(GRID_STEPS + 1) / GRID_STEPS
    spans_S2 = np.array([(s, e) for i, s in enumerate(edges) for e in edges[i + 1 :]])
    seconds_SQ12 = (spans_S2[:, None] * durations_Q[None, :, None])[:, :, None]
    iou_SQ = iou(seconds_SQ12, truth.reshape(1, len(truth), -1, 2)).max(axis=-1)
    key = (iou_SQ >= 0.5).mean(axis=1) + 1e-6 * iou_SQ.mean(axis=1)
    best = int(key.argmax())
    return (float(spans_S2[best, 0]), float(spans_S2[best, 1])), iou_SQ[best]


def random_proposal_metrics(iou_QK: Array) -> dict[str, float]:
    """Expected R@1 and mIoU of one of the model's own proposals drawn at random: exact means."""
    each = [recall_metrics(iou_QK[:, k : k + 1]) for k in range(iou_QK.shape[1])]
    return {name: float(np.mean([metrics[name] for metrics in each])) for name in each[0]}


def shuffled_order(videos: Sequence[str], *, seed: int = 0) -> list[int]:
    """For each query, whose sentence it is given instead: one of another video.

    Every sentence is used once. Where one video has more than half of all queries, no such
    order exists and some keep their video.
    """
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(videos))
    # Sorted by video (in a random order), a shift by the largest group leaves every group.
    names = {video: rng.random() for video in sorted(set(videos))}
    order = sorted(shuffled, key=lambda i: names[videos[i]])
    largest = max(list(videos).count(video) for video in names)
    taken = order[largest:] + order[:largest]
    given = dict(zip(order, taken, strict=True))
    return [int(given[i]) for i in range(len(videos))]


def with_shuffled_queries(items: Sequence[Item]) -> list[Item]:
    """The same videos and annotations, each with a sentence of another video."""
    order = shuffled_order([item.annotation.video for item in items])
    return [
        Item(item.annotation, item.duration_seconds, items[j].sentence, item.row)
        for item, j in zip(items, order, strict=True)
    ]


def evaluate_items(
    model: GroundingNetwork,
    recipe: Recipe,
    items: Sequence[Item],
    table: FeatureTable,
    *,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], Predictions]:
    """Metrics of a model and of its four controls; and its predictions."""
    predictions = predict(model, items, table, progress=progress)
    iou_QK = prediction_iou(predictions, items)
    span, constant_iou_Q = best_constant_span(*truth_of(items))
    shuffled = predict(model, with_shuffled_queries(items), table, progress=progress)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        untrained_model = build_network(recipe).to(table.data_VLF.device)
    untrained = predict(untrained_model, items, table, progress=progress)
    result = {
        "metrics": recall_metrics(iou_QK),
        "controls": {
            "best constant span": recall_metrics(constant_iou_Q[:, None]),
            "random own proposal": random_proposal_metrics(iou_QK),
            "untrained network": recall_metrics(prediction_iou(untrained, items)),
            "shuffled queries": recall_metrics(prediction_iou(shuffled, items)),
        },
        "best_constant_span": list(span),
        "queries": len(items),
        "videos": len({item.annotation.video for item in items}),
    }
    return result, predictions


def write_predictions(path: Path, items: Sequence[Item], predictions: Predictions) -> None:
    """One JSON line a query: video, sentence, annotation, all moments best first (seconds).

    A moment is [start, end, score of Eq. 9].
    """
    iou_QK = prediction_iou(predictions, items)
    lines = []
    for q, item in enumerate(items):
        moments = [
            [round(float(v), 4) for v in (s * item.duration_seconds, e * item.duration_seconds, r)]
            for s, e, r in zip(
                predictions.starts[q], predictions.ends[q], predictions.scores[q], strict=True
            )
        ]
        row = {
            "video": item.annotation.video,
            "sentence": item.annotation.sentence,
            "annotation": [item.annotation.start, item.annotation.end],
            **({"more_annotations": item.annotation.more} if item.annotation.more else {}),
            "duration_seconds": item.duration_seconds,
            "moments": moments,
            "iou": round(float(iou_QK[q, 0]), 4),
        }
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_atomically(path, lambda stream: stream.writelines(line.encode() for line in lines))


def evaluate_run(
    run: Path,
    *,
    features_path: Path,
    annotations_path: Path,
    flow_features_path: Path | None = None,
    durations: Path | None = None,
    protocol: str = "official",
    out: Path | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluate a checkpoint folder on annotations; metrics, controls and what they are of.

    Writes `out`/predictions.jsonl and metrics.json (default: `RUN/evaluations/NAME`, of the
    annotation file's name). flow_features_path: where flow lies, if not beside RGB.
    Raises MmdistError for files that do not fit together.
    """
    from mmdist_e2e.grounding.checkpoint import load_checkpoint

    trained = load_checkpoint(run)
    annotations = load_annotations(annotations_path, durations=durations, protocol=protocol)
    table = load_features(
        places_of(trained.modalities, features_path, flow_features_path),
        [a.video for a in annotations],
        length=trained.recipe.model.length,
    ).to(device)
    trained.check_table(table)
    items = make_items(annotations, table, trained.vocabulary)
    trained.model.to(device)
    result, predictions = evaluate_items(
        trained.model, trained.recipe, items, table, progress=progress
    )
    result |= {
        "protocol": protocol_of(
            annotations_path,
            [replace(i.annotation, duration_seconds=i.duration_seconds) for i in items],
        ),
        "annotations": annotations_path.name,
        "recipe": trained.recipe.name,
        "seed": trained.config["seed"],
        "selected_by": trained.config["selected_by"],
    }
    out = out or run / "evaluations" / annotations_path.stem
    write_predictions(out / "predictions.jsonl", items, predictions)
    write_json(out / "metrics.json", result)
    return result


def spread_over_runs(
    results: Sequence[Mapping[str, Any]],
) -> list[tuple[str, dict[str, tuple[float, float]]]]:
    """Rows of a table, the model first, then its controls: mean and deviation over runs.

    results: what `evaluate_run` gave for each run on the same annotations. The deviation is that
    of a sample (0 for one run). Raises MmdistError when the runs are of different recipes.
    """
    recipes = sorted({str(result["recipe"]) for result in results})
    if len(recipes) > 1:
        raise MmdistError(
            f"Only runs of one recipe can be averaged; these are of {', '.join(recipes)}."
        )
    rows = [{"model": result["metrics"], **result["controls"]} for result in results]
    return [
        (
            name,
            {
                metric: _mean_and_deviation([row[name][metric] for row in rows])
                for metric in rows[0][name]
            },
        )
        for name in rows[0]
    ]


def _mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
