"""What is wrong with annotations and features, found in seconds instead of during training.

Shape suffixes: Q queries, T moments of a query, S rows of one video, F feature channels.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmdist_e2e.grounding.data.annotations import (
    NAMED_AT_MOST,
    Annotation,
    BadLinesError,
    describe_suspicions,
    in_protocol,
    load_durations,
    protocol_of,
    read_annotations,
    some,
    suspicions,
    with_durations,
)
from mmdist_e2e.grounding.data.features import FeatureSource, open_features
from mmdist_e2e.grounding.data.text import MAX_WORDS, has_known_word, is_word, tokenize
from mmdist_e2e.structures import MmdistError, Provenance, differences
from mmdist_e2e.weights.words import WordVectors

Array = NDArray[np.float64]
Progress = Callable[[str, int, int], None]  # what, done, of how many
# Moments [Q, T, 2] and durations [Q] -> metrics of the best answer that is the same for all.
ConstantAnswer = Callable[[Array, Array], Mapping[str, Any]]

FEW_QUERIES = 100
MANY_UNKNOWN = 0.02  # warn of a larger share of words without a vector
APART_SECONDS = 1.0  # warn of two durations of one video that differ by more
HUGE = 1e4  # features of usual networks stay below a few hundred

FAULTS = {  # of the features of a video: what they are, and whether training refuses them
    "not_finite": ("features that are not finite", True),
    "of_zeros": ("only zeros as features", False),
    "constant": ("the same features in every row, so no moment can be found", False),
    "of_one_row": ("a single row of features, so no moment can be found", False),
}


@dataclass
class Report:
    """Facts by subject, as JSON takes them, and sentences about what is wrong."""

    splits: dict[str, dict[str, Any]] = field(default_factory=dict)
    features: dict[str, Any] = field(default_factory=dict)
    words: dict[str, dict[str, Any]] = field(default_factory=dict)
    overlaps: dict[str, dict[str, int]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Errors and warnings that are raised inside become sentences of this report."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                yield
            except BadLinesError as error:
                self.errors += error.lines
            except MmdistError as error:
                self.errors.append(str(error))
        self.warnings += [str(warning.message) for warning in caught]


def check_data(
    files: Mapping[str, Path],
    *,
    features_path: Path | None,
    word_vectors: WordVectors,
    constant_answer: ConstantAnswer,
    durations: Sequence[Path] = (),
    modality: str = "rgb",
    protocol: str = "official",
    progress: Progress | None = None,
) -> Report:
    """Read all files; report what they hold and what is wrong with them.

    files: annotation files by split: train, val, test. durations: files of seconds by video.
    Faults of the files are errors of the report and are not raised.
    """
    report = Report()
    seconds: dict[str, float] = {}
    for path in durations:
        with report.collecting():
            seconds |= load_durations(path)
    splits: dict[str, list[Annotation]] = {}
    left_out: dict[str, int] = {}
    for name, path in files.items():
        with report.collecting():
            parsed = read_annotations(path)
            splits[name] = with_durations(parsed.annotations, seconds)
            left_out[name] = len(parsed.left_out)
    if features_path is not None and splits:
        with report.collecting():
            known = _check_features(report, splits, features_path, modality, progress)
            for name, read in splits.items():
                splits[name] = [
                    a if a.duration_seconds else with_durations([a], known)[0] for a in read
                ]
    for name, read in splits.items():
        counts = suspicions(read) | {"left_out": left_out[name]}
        if found := describe_suspicions(counts):
            report.warnings.append(f"{name}: {found}.")
        unknown = sorted({a.video for a in read if not a.duration_seconds})
        if unknown:
            report.errors.append(
                f"{len(unknown)} videos of {name} have no duration, neither in the annotations nor "
                f"in the features ({some(unknown)}); give --durations."
            )
        else:
            with report.collecting():
                splits[name] = in_protocol(read, protocol)
        facts = report.splits[name] = {
            "file": files[name].name,
            "protocol": protocol_of(files[name], splits[name]),
            "queries": len(splits[name]),
            "queries_dropped_by_protocol": len(read) - len(splits[name]),
            "videos": len({a.video for a in splits[name]}),
            **counts,
        }
        _check_sentences(report, name, splits[name], word_vectors)
        if not unknown:
            truth_QT2, durations_Q = _check_moments(report, name, splits[name])
            if name != "train":
                facts["best_constant_span"] = dict(constant_answer(truth_QT2, durations_Q))
    _check_overlaps(report, splits)
    _check_words(report, splits, word_vectors)
    return report


def _check_features(
    report: Report,
    splits: Mapping[str, Sequence[Annotation]],
    path: Path,
    modality: str,
    progress: Progress | None,
) -> dict[str, float]:
    """Read the features of all videos; gives the durations that they record.

    Raises MmdistError when the path cannot be opened at all.
    """
    videos = sorted({a.video for queries in splits.values() for a in queries})
    each: dict[str, dict[str, Any]] = {}
    unreadable: list[str] = []
    with open_features(path, modality) as source:
        for done, video in enumerate(videos, start=1):
            if video in source.names:
                try:
                    each[video] = _feature_facts(source, video)
                except MmdistError as error:
                    unreadable.append(str(error))
            if progress:
                progress("reading features", done, len(videos))
        missing = set(videos) - source.names.keys()
        unused = len(source.names.keys() - set(videos))
    channels = Counter(facts["channels"] for facts in each.values())
    made_by: Mapping[str, Any] = next((facts["matters"] for facts in each.values()), {})
    unlike = Counter("; ".join(differences(made_by, f["matters"])) for f in each.values())
    faulty = {name: [v for v, f in each.items() if f["fault"] == name] for name in FAULTS}
    largest = max((facts["largest"] for facts in each.values()), default=0.0)
    report.features = {
        "kind": source.kind,
        "made_by": dict(made_by),
        "videos": len(videos) - len(missing),
        "videos_missing": len(missing),
        "videos_unused": unused,
        "videos_unreadable": len(unreadable),
        **{f"videos_{name}": len(found) for name, found in faulty.items()},
        "channels": sorted(channels),
        "dtypes": sorted({facts["dtype"] for facts in each.values()}),
        "rows": _spread([facts["rows"] for facts in each.values()] or [0]),
        "largest_value": largest,
    }
    report.errors += unreadable[:NAMED_AT_MOST]
    if (rest := len(unreadable) - NAMED_AT_MOST) > 0:
        report.errors.append(f"{rest} more videos have features that cannot be used.")
    for name, (text, is_refused) in FAULTS.items():
        if found := faulty[name]:
            sentences = report.errors if is_refused else report.warnings
            sentences.append(f"{len(found)} videos have {text} ({some(found)}).")
    if len(channels) > 1:
        counts = ", ".join(f"{n} videos of {c}" for c, n in sorted(channels.items()))
        report.errors.append(f"Features differ in their number of channels: {counts}.")
    if how := "; ".join(f"in {n} videos {text}" for text, n in unlike.most_common(3) if text):
        report.errors.append(f"Features were not all made in one way: {how}.")
    if largest > HUGE:
        report.warnings.append(f"Features reach {largest:.3g}, far more than usual ones.")
    for name, queries in splits.items():
        of_split = {a.video for a in queries}
        if lacking := sorted(of_split & missing):
            report.errors.append(
                f"{len(lacking)} of {len(of_split)} videos of {name} have no features "
                f"({some(lacking)}); extract them, or leave them out of the annotations."
            )
    known = {v: facts["duration"] for v, facts in each.items() if facts["duration"]}
    said = {a.video: a.duration_seconds for queries in splits.values() for a in queries}
    if apart := sorted(v for v in known if abs((said[v] or known[v]) - known[v]) > APART_SECONDS):
        report.warnings.append(
            f"{len(apart)} videos are longer or shorter in the annotations than in the features by "
            f"more than {APART_SECONDS:g} s ({some(apart)}); are they the same videos?"
        )
    return known


def _feature_facts(source: FeatureSource, video: str) -> dict[str, Any]:
    """Facts about the features of one video. Raises MmdistError when they cannot be read."""
    duration = None
    if source.kind == "store":
        features = source.features(video)
        raw_SF, matters = features.data, features.provenance.matters
        duration = features.duration_seconds
    else:
        raw_SF, matters = source.array(video), Provenance.external(source.kind).matters
    with np.errstate(over="ignore"):
        data_SF = raw_SF.astype(np.float32)
    fault = None
    if not np.isfinite(data_SF).all():
        fault = "not_finite"
    elif not data_SF.any():
        fault = "of_zeros"
    elif len(data_SF) == 1:
        fault = "of_one_row"
    elif (data_SF == data_SF[0]).all():
        fault = "constant"
    return {
        "fault": fault,
        "duration": duration,
        "matters": matters,
        "rows": len(raw_SF),
        "channels": raw_SF.shape[1],
        "dtype": str(raw_SF.dtype),
        "largest": 0.0 if fault == "not_finite" else float(np.abs(data_SF).max()),
    }


def _check_sentences(
    report: Report, name: str, annotations: Sequence[Annotation], vectors: WordVectors
) -> None:
    tokens = [tokenize(a.sentence) for a in annotations]
    report.splits[name] |= {
        "words_per_query": _spread([sum(map(is_word, each)) for each in tokens]),
        "queries_cut_at_20_words": sum(sum(t in vectors for t in e) > MAX_WORDS for e in tokens),
        "queries_of_several_moments": sum(bool(a.more) for a in annotations),
    }
    silent = [a.sentence for a in annotations if not has_known_word(a.sentence, vectors)]
    if silent:
        report.errors.append(
            f"{len(silent)} sentences of {name} have no word with a vector in '{vectors.name}', "
            f"the first: '{silent[0]}'; leave them out, or give more word vectors with --glove."
        )
    if name != "train" and len(annotations) < FEW_QUERIES:
        report.warnings.append(
            f"{name} has {len(annotations)} queries: one of them is "
            f"{100 / len(annotations):.1f} points of R@1."
        )


def _check_moments(
    report: Report, name: str, annotations: Sequence[Annotation]
) -> tuple[Array, Array]:
    """Also gives all moments [Q, T, 2], the first repeated where a query has fewer; durations."""
    most = max(len(a.moments) for a in annotations)
    moments = [a.moments + a.moments[:1] * (most - len(a.moments)) for a in annotations]
    truth_QT2 = np.array(moments, dtype=np.float64)
    durations_Q = np.array([a.duration_seconds for a in annotations], dtype=np.float64)
    late_Q = truth_QT2[:, :, 1].max(axis=1) - durations_Q
    is_outside_Q = truth_QT2[:, :, 0].max(axis=1) >= durations_Q
    late = int((late_Q > 0).sum())
    report.splits[name] |= {
        "duration_seconds": _spread(durations_Q),
        "moment_share_of_video": _spread((truth_QT2[:, 0, 1] - truth_QT2[:, 0, 0]) / durations_Q),
        "ends_past_duration": late,
        "largest_past_duration_seconds": max(0.0, float(late_Q.max())),
    }
    if is_outside_Q.any():
        first = annotations[int(is_outside_Q.argmax())]
        report.errors.append(
            f"{is_outside_Q.sum()} moments of {name} start after their video has ended, the first "
            f"in '{first.video}' ({max(first.moments)[0]:g} s of {first.duration_seconds:g} s); "
            f"check that times and durations are both seconds, of the same video."
        )
    elif late:
        report.warnings.append(
            f"{late} queries of {name} end past their video, by {late_Q.max():.2f} s at most; the "
            f"protocol official keeps them and cpl drops them, so name the protocol beside every "
            f"number."
        )
    return truth_QT2, durations_Q


def _spread(values: NDArray[Any] | Sequence[float]) -> dict[str, float]:
    low, median, high = (float(v) for v in np.quantile(values, (0.0, 0.5, 1.0)))
    return {"min": low, "median": median, "mean": float(np.mean(values)), "max": high}


def _check_overlaps(report: Report, splits: Mapping[str, Sequence[Annotation]]) -> None:
    for one, other in combinations(splits, 2):
        shared = sorted({a.video for a in splits[one]} & {a.video for a in splits[other]})
        known = {tuple(tokenize(a.sentence)) for a in splits[one]}
        equal = sum(tuple(tokenize(a.sentence)) in known for a in splits[other])
        # queries: those of the second whose sentence the first has too, of any video
        report.overlaps[f"{one}, {other}"] = {"videos": len(shared), "queries": equal}
        if shared:
            sentence = f"{len(shared)} videos are in both {one} and {other} ({some(shared)})"
            if one == "train":
                report.errors.append(f"{sentence}; split by video.")
            else:
                report.warnings.append(f"{sentence}; choices made on {one} have seen them.")


def _check_words(
    report: Report, splits: Mapping[str, Sequence[Annotation]], vectors: WordVectors
) -> None:
    counts = {
        name: Counter(t for a in annotations for t in tokenize(a.sentence) if is_word(t))
        for name, annotations in splits.items()
    }
    for name, words in counts.items():
        total = max(1, words.total())
        unknown = Counter({w: n for w, n in words.items() if w not in vectors})
        share = unknown.total() / total
        frequent = [w for w, _ in unknown.most_common(NAMED_AT_MOST)]
        facts = report.words[name] = {
            "distinct_words": len(words),
            "share_without_vector": share,
            "most_frequent_without_vector": frequent,
        }
        if share > MANY_UNKNOWN:
            report.warnings.append(
                f"{share:.1%} of the words of {name} have no vector in '{vectors.name}' and are "
                f"not read ({', '.join(frequent)} most often); --glove takes larger ones."
            )
        if name != "train" and "train" in counts:
            unseen = sum(n for w, n in words.items() if w in vectors and w not in counts["train"])
            facts["share_unseen_in_training"] = unseen / total
