"""Answers to annotated queries, as `mmdist ground` gives them; R@n at IoU, mIoU and four controls.

Spans are (start, end) in seconds. Metrics are percent. Where a query has several annotated
moments, an answer counts by the one it fits best.
Shape suffixes: Q queries, K moments of an answer, S spans, T annotated moments of a query.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mmdist_e2e.grounding.answer import (
    Array,
    GroundingModel,
    Predictions,
    Progress,
    cut,
    iou,
    merge,
    predict,
    window_starts,
)
from mmdist_e2e.grounding.checkpoint import (
    annotations_digest,
    load_checkpoint,
    model_digest,
    refuse_other,
)
from mmdist_e2e.grounding.data.annotations import Annotation, load_annotations
from mmdist_e2e.grounding.data.batches import Item, make_items
from mmdist_e2e.grounding.data.features import (
    FeatureTable,
    having_features,
    load_features,
    places_of,
    read_features,
)
from mmdist_e2e.grounding.data.published import protocol_of
from mmdist_e2e.grounding.network import GroundingNetwork, build_network
from mmdist_e2e.store import check_out, digest_of, row_writer, write_json
from mmdist_e2e.structures import MmdistError

METRICS, PREDICTIONS = "metrics.json", "predictions.jsonl"
IOU_THRESHOLDS = (0.3, 0.5, 0.7)
GRID_STEPS = 20  # the best constant span lies on a grid of 1/20 = 0.05


@dataclass(frozen=True)
class Windows:
    """Videos too long to be read at once, cut as `GroundingModel.answer` cuts them.

    table: a row per window. starts: by video, the row and the start in seconds of each window.
    seconds: the length of a window.
    """

    table: FeatureTable
    starts: Mapping[str, Sequence[tuple[int, float]]]
    seconds: float


def video_seconds(item: Item, table: FeatureTable) -> float:
    """The duration by which `mmdist ground` turns positions into seconds: that of the features.

    Where these do not record one, that of the annotation.
    """
    return table.durations_seconds.get(item.annotation.video) or item.duration_seconds


def cut_long_videos(
    items: Sequence[Item],
    table: FeatureTable,
    places: Mapping[str, Path],
    *,
    longest_seconds: float,
) -> Windows | None:
    """The windows of the long videos among `items`; None where no video is long.

    table: of the whole videos, read from `places`. longest_seconds: the longest training video.
    """
    seconds = {item.annotation.video: video_seconds(item, table) for item in items}
    each = {video: window_starts(length, longest_seconds) for video, length in seconds.items()}
    long = [video for video, starts in each.items() if len(starts) > 1]
    if not long:
        return None
    rows: list[Array] = []
    numbered: dict[str, list[tuple[int, float]]] = {}
    for video, modalities in read_features(places, long).items():
        numbered[video] = list(enumerate(each[video], start=len(rows)))
        for start in each[video]:
            parts = []
            for one in modalities:
                # Imported arrays have times in units of the video.
                times = one.times * (seconds[video] / one.duration_seconds)
                timed = replace(one, times=times, duration_seconds=seconds[video])
                part = cut(timed, start, longest_seconds)
                parts.append(part.resample(table.data_VLF.shape[1]).data)
            rows.append(np.concatenate(parts, axis=1))
    windows = replace(
        table,
        videos=tuple(str(row) for row in range(len(rows))),
        data_VLF=torch.from_numpy(np.stack(rows)).to(table.data_VLF.device),
    )
    return Windows(windows, numbered, longest_seconds)


def answer_items(
    model: GroundingNetwork,
    items: Sequence[Item],
    table: FeatureTable,
    windows: Windows | None = None,
    *,
    progress: Progress | None = None,
) -> Predictions:
    """Answer every item as `mmdist ground` does: in fp32, long videos in windows that are merged.

    Spans are in units of the items' durations. Merged answers differ in their number of moments:
    shorter ones are padded with empty spans of score -inf and loss inf.
    """
    starts_Q = [windows.starts.get(i.annotation.video, ()) if windows else () for i in items]
    whole = [q for q, starts in enumerate(starts_Q) if not starts]

    def read(asked: Sequence[Item], where: FeatureTable) -> list[Array]:
        """[4, K] of each item: starts, ends, scores, losses."""
        if not asked:
            return []
        found = predict(model, asked, where, progress=progress)
        return list(np.stack(list(vars(found).values()), axis=1))

    seconds_Q = [video_seconds(item, table) for item in items]
    answers = dict(zip(whole, read([items[q] for q in whole], table), strict=True))
    if windows:
        asked = zip(items, starts_Q, strict=True)
        pieces = [replace(item, row=row) for item, starts in asked for row, _ in starts]
        parts = iter(read(pieces, windows.table))
        for q, starts in enumerate(starts_Q):
            if starts:
                own = [next(parts) for _ in starts]
                for part_4K, (_, start) in zip(own, starts, strict=True):
                    part_4K[:2] = part_4K[:2] * windows.seconds + start
                answers[q] = merge(np.hstack(own).T).T
                answers[q][:2] /= seconds_Q[q]
    most = max(answer.shape[1] for answer in answers.values())
    all_4QK = np.full((4, len(items), most), -np.inf)
    all_4QK[:2], all_4QK[3] = 0.0, np.inf
    for q, answer_4K in answers.items():
        all_4QK[:, q, : answer_4K.shape[1]] = answer_4K
    all_4QK[:2] *= (np.array(seconds_Q) / [item.duration_seconds for item in items])[:, None]
    return Predictions(*all_4QK)


def recall_metrics(iou_QK: Array) -> dict[str, float]:
    """R@1 and, from five moments on, R@5 at each threshold, and mIoU of the first, in percent.

    iou_QK: IoU with the annotation, best-ranked moment first. A hit is IoU >= m.
    """
    metrics = {}
    for n in (1, 5):
        if iou_QK.shape[1] >= n:
            best_Q = iou_QK[:, :n].max(axis=1)
            for m in IOU_THRESHOLDS:
                metrics[f"R@{n},IoU={m}"] = float((best_Q >= m).mean() * 100)
    metrics["mIoU"] = float(iou_QK[:, 0].mean() * 100)
    return metrics


def annotations_of(items: Sequence[Item]) -> list[Annotation]:
    """Their annotations; those without a duration get that of the features."""
    return [replace(i.annotation, duration_seconds=i.duration_seconds) for i in items]


def truth_of(items: Sequence[Item]) -> tuple[Array, Array]:
    """Annotated spans [Q, T, 2], the first repeated where a query has fewer; durations [Q]."""
    each = [item.annotation.moments for item in items]
    most = max(len(moments) for moments in each)
    spans_QT2 = np.array([m + m[:1] * (most - len(m)) for m in each], dtype=np.float64)
    return spans_QT2, np.array([i.duration_seconds for i in items], dtype=np.float64)


def prediction_iou(predictions: Predictions, items: Sequence[Item]) -> Array:
    """[Q, K]: IoU of every ranked moment with its query's annotation; 0 of padding."""
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


def random_proposal_metrics(iou_QK: Array, is_moment_QK: NDArray[np.bool_]) -> dict[str, float]:
    """Expected R@1 and mIoU of one of an answer's own moments drawn at random: exact means."""
    chance_QK = is_moment_QK / is_moment_QK.sum(axis=1, keepdims=True)

    def expected(values_QK: Array | NDArray[np.bool_]) -> float:
        return float((values_QK * chance_QK).sum(axis=1).mean() * 100)

    recalls = {f"R@1,IoU={m}": expected(iou_QK >= m) for m in IOU_THRESHOLDS}
    return recalls | {"mIoU": expected(iou_QK)}


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


def evaluate_items(
    trained: GroundingModel,
    items: Sequence[Item],
    table: FeatureTable,
    windows: Windows | None,
    progress: Progress | None,
) -> tuple[dict[str, Any], Predictions]:
    """Metrics of a model and of its four controls; and its predictions."""
    model = trained.model

    def answer(network: GroundingNetwork, asked: Sequence[Item]) -> tuple[Predictions, Array]:
        predictions = answer_items(network, asked, table, windows, progress=progress)
        return predictions, prediction_iou(predictions, items)

    predictions, iou_QK = answer(model, items)
    order = shuffled_order([item.annotation.video for item in items])
    others = [replace(i, sentence=items[j].sentence) for i, j in zip(items, order, strict=True)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        untrained = build_network(trained.recipe).to(table.data_VLF.device)
    span, constant_iou_Q = best_constant_span(*truth_of(items))
    result = {
        "metrics": recall_metrics(iou_QK),
        "controls": {
            "best constant span": recall_metrics(constant_iou_Q[:, None]),
            "random own proposal": random_proposal_metrics(iou_QK, np.isfinite(predictions.scores)),
            "untrained network": recall_metrics(answer(untrained, items)[1]),
            "shuffled queries": recall_metrics(answer(model, others)[1]),
        },
        "best_constant_span": list(span),
        "queries": len(items),
        "videos": len({item.annotation.video for item in items}),
    }
    return result, predictions


def write_predictions(path: Path, items: Sequence[Item], predictions: Predictions) -> None:
    """One row per query: video, sentence, annotation, all moments best first (seconds).

    A moment is [start, end, score of Eq. 9].
    """
    iou_QK = prediction_iou(predictions, items)
    rows = []
    for q, item in enumerate(items):
        spans_2K = np.stack([predictions.starts[q], predictions.ends[q]]) * item.duration_seconds
        moments_K3 = np.vstack([spans_2K, predictions.scores[q]]).T
        row = {
            "video": item.annotation.video,
            "sentence": item.annotation.sentence,
            "annotation": [item.annotation.start, item.annotation.end],
            **({"more_annotations": item.annotation.more} if item.annotation.more else {}),
            "duration_seconds": item.duration_seconds,
            "moments": [
                [round(value, 4) for value in moment]
                for moment in moments_K3[np.isfinite(predictions.scores[q])].tolist()
            ],
            "iou": round(float(iou_QK[q, 0]), 4),
        }
        rows.append(row)
    row_writer(path)(rows)


def evaluate_run(
    run: Path,
    *,
    features_path: Path,
    annotations_path: Path,
    flow_features_path: Path | None = None,
    durations: Path | None = None,
    protocol: str = "official",
    out: Path | None = None,
    home: Path | None = None,
    skip_missing: bool = False,
    predictions_path: Path | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluate a checkpoint folder on annotations; returns metrics, controls and their inputs.

    Writes `out`/predictions.jsonl and metrics.json. By default `out` is
    `HOME/evaluations/NAME-DIGEST`, of the annotation file's name and of all inputs, so that two
    evaluations never share a folder; home: by default `run`. flow_features_path: of flow, if not
    stored with RGB.
    skip_missing: leave out queries of videos without features, and count them in the results.
    predictions_path: a .parquet or .jsonl file for the predictions too.
    Raises MmdistError for files that do not fit together, and when `out` holds an evaluation of
    other inputs.
    """
    trained = load_checkpoint(run)
    home = (home or run) / "evaluations"
    check_out(out or home)
    annotations = load_annotations(annotations_path, durations=durations, protocol=protocol)
    if predictions_path:
        row_writer(predictions_path)  # so that what is wrong with it is said before the work
    places = places_of(trained.modalities, features_path, flow_features_path)
    skipped = {}
    if skip_missing:
        annotations, skipped["skipped"] = having_features(annotations, places)
    videos = [a.video for a in annotations]
    table = load_features(places, videos, length=trained.recipe.model.length).to(device)
    trained.check_features(table.matters)
    items = make_items(annotations, table, trained.vocabulary)
    inputs = {
        "settings": {"protocol": protocol},
        "digests": {
            "annotations": annotations_digest(annotations),
            "model": model_digest(trained),
            **{f"features ({modality})": digest for modality, digest in table.digests.items()},
        },
    }
    out = out or home / f"{annotations_path.stem}-{digest_of(inputs)[:8]}"
    if (out / METRICS).is_file():
        known = json.loads((out / METRICS).read_text(encoding="utf-8")).get("inputs", {})
        refuse_other(f"'{out}' holds an evaluation", known, inputs)
    windows = cut_long_videos(
        items, table, places, longest_seconds=float(trained.config["longest_duration_seconds"])
    )
    trained.model.to(device)
    result, predictions = evaluate_items(trained, items, table, windows, progress)
    result |= {
        "protocol": protocol_of(annotations_path, annotations_of(items)),
        "annotations": annotations_path.name,
        "recipe": trained.recipe.name,
        "seed": trained.config["seed"],
        "selected_by": trained.config["selected_by"],
        "inputs": inputs,
        **skipped,
    }
    for path in filter(None, (out / PREDICTIONS, predictions_path)):
        write_predictions(path, items, predictions)
    write_json(out / METRICS, result)
    return result | {"out": str(out)}


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
    spread = []
    for name, metrics in rows[0].items():
        values = {metric: [row[name][metric] for row in rows] for metric in metrics}
        spread.append((name, {m: (mean(v), stdev(v) if v[1:] else 0.0) for m, v in values.items()}))
    return spread
