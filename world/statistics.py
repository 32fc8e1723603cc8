"""Statistics of the world's annotations, to compare with those of Charades-STA."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from world.world import IDLE, Script


def statistics_of(scripts: Sequence[Script]) -> dict[str, Any]:
    """Return moment fractions, words, queries, the best constant span, and counts of actions.

    Fractions are of the video's duration; the best constant span is given with its R@1 in
    percent at IoU 0.5, fitted on the very annotations it is scored on.
    """
    spans_Q2 = np.array(
        [
            (q.start / s.duration_seconds, q.end / s.duration_seconds)
            for s in scripts
            for q in s.queries
        ]
    )
    sentences = [q.sentence.rstrip(".").split() for s in scripts for q in s.queries]
    fractions = spans_Q2[:, 1] - spans_Q2[:, 0]
    span, recall = best_constant_span(spans_Q2)
    actions = Counter(g.action for s in scripts for g in s.segments if g.action != IDLE)
    return {
        "videos": len(scripts),
        "queries": len(sentences),
        "queries_per_video": round(len(sentences) / len(scripts), 3),
        "actions_per_video": round(sum(actions.values()) / len(scripts), 3),
        "moment_fraction_mean": round(float(fractions.mean()), 4),
        "moment_fraction_p10": round(float(np.quantile(fractions, 0.1)), 4),
        "moment_fraction_p90": round(float(np.quantile(fractions, 0.9)), 4),
        "words_per_query": round(float(np.mean([len(words) for words in sentences])), 3),
        "vocabulary": len({word for words in sentences for word in words}),
        "best_constant_span": span,
        "best_constant_span_recall": round(recall, 2),
        "performed": dict(sorted(actions.items())),
    }


def best_constant_span(
    spans_Q2: NDArray[np.float64], *, threshold: float = 0.5, step: float = 0.05
) -> tuple[tuple[float, float], float]:
    """Return the one (start, end) that hits the most spans at IoU >= threshold, and its percent."""
    grid = np.linspace(0.0, 1.0, round(1 / step) + 1)
    best, best_recall = (0.0, 1.0), -1.0
    for i, start in enumerate(grid):
        for end in grid[i + 1 :]:
            left = np.maximum(spans_Q2[:, 0], start)
            shared = np.clip(np.minimum(spans_Q2[:, 1], end) - left, 0.0, None)
            union = (spans_Q2[:, 1] - spans_Q2[:, 0]) + (end - start) - shared
            recall = 100.0 * float(np.mean(shared / union >= threshold))
            if recall > best_recall:
                best, best_recall = (round(float(start), 2), round(float(end), 2)), recall
    return best, best_recall
