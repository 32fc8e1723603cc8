"""What is wrong with features and annotations, said before an hour of training is spent."""

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

from mmdist_e2e.grounding.data.annotations import (
    NAMED_AT_MOST,
    Annotation,
    in_protocol,
    load_annotations,
    load_durations,
    protocol_of,
    some,
    with_durations,
)
from mmdist_e2e.grounding.data.features import FeatureSource, open_features
from mmdist_e2e.grounding.data.text import MAX_WORDS, has_known_word, is_word, tokenize
from mmdist_e2e.grounding.evaluate import best_constant_span, recall_metrics
from mmdist_e2e.structures import MmdistError, Provenance, differences
from mmdist_e2e.weights.words import WordVectors

Progress = Callable[[str, int, int], None]  # what, done, of how many

HUGE = 1e4  # features of usual networks stay below a few hundred


@dataclass
class FeatureFacts:
    """Facts about the features of some videos; lists of strings hold ids of videos.

    present: how many of the videos have features; unused: how many others lie there.
    matters: the provenance of the first; unlike: how others differ, with their number.
    zero_rows: in videos that have other rows too. unreadable: what was raised, one a video.
    """

    kind: str
    present: int = 0
    unused: int = 0
    missing: list[str] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    channels: Counter[int] = field(default_factory=Counter)
    dtypes: Counter[str] = field(default_factory=Counter)
    matters: Mapping[str, Any] = field(default_factory=dict)
    unlike: Counter[str] = field(default_factory=Counter)
    durations_seconds: dict[str, float] = field(default_factory=dict)
    largest: float = 0.0
    zero_rows: int = 0
    unreadable: list[str] = field(default_factory=list)
    not_finite: list[str] = field(default_factory=list)
    zero: list[str] = field(default_factory=list)
    constant: list[str] = field(default_factory=list)
    single: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The figures, as JSON takes them."""
        rows = self.rows or [0]
        return {
            "kind": self.kind,
            "videos": self.present,
            "videos_missing": len(self.missing),
            "videos_unused": self.unused,
            "channels": sorted(self.channels),
            "dtypes": sorted(self.dtypes),
            "made_by": dict(self.matters),
            "rows": {"min": min(rows), "median": float(np.median(rows)), "max": max(rows)},
            "largest_value": self.largest,
            "rows_of_zeros": self.zero_rows,
            "videos_unreadable": len(self.unreadable),
            "videos_not_finite": len(self.not_finite),
            "videos_of_zeros": len(self.zero),
            "videos_constant": len(self.constant),
            "videos_of_one_row": len(self.single),
        }


def inspect_features(
    path: Path, videos: Sequence[str], modality: str, progress: Progress | None = None
) -> FeatureFacts:
    """Read the features of `videos` and judge them.

    Raises MmdistError when the place cannot be opened at all.
    """
    with open_features(path, modality) as source:
        facts = FeatureFacts(source.kind)
        facts.missing = [video for video in videos if video not in source.names]
        facts.unused = len(source.names.keys() - set(videos))
        facts.present = len(videos) - len(facts.missing)
        for done, video in enumerate(videos, start=1):
            if video in source.names:
                try:
                    _inspect(source, video, facts)
                except MmdistError as error:
                    facts.unreadable.append(str(error))
            if progress:
                progress("reading features", done, len(videos))
    _judge(facts)
    return facts


def _inspect(source: FeatureSource, video: str, facts: FeatureFacts) -> None:
    if source.kind == "store":
        features = source.features(video)
        raw_SF, matters = features.data, features.provenance.matters
        facts.durations_seconds[video] = features.duration_seconds
    else:
        raw_SF, matters = source.array(video), Provenance.external(source.kind).matters
    facts.matters = facts.matters or matters
    unlike = differences(facts.matters, matters)
    if unlike:
        facts.unlike["; ".join(unlike)] += 1
    facts.rows.append(len(raw_SF))
    facts.channels[raw_SF.shape[1]] += 1
    facts.dtypes[str(raw_SF.dtype)] += 1
    data_SF = raw_SF.astype(np.float32)
    if not np.isfinite(data_SF).all():
        facts.not_finite.append(video)
        return
    facts.largest = max(facts.largest, float(np.abs(data_SF).max()))
    is_zero_S = ~data_SF.any(axis=1)
    if is_zero_S.all():
        facts.zero.append(video)
    elif len(data_SF) == 1:
        facts.single.append(video)
    elif (data_SF == data_SF[0]).all():
        facts.constant.append(video)
    else:
        facts.zero_rows += int(is_zero_S.sum())


def _judge(facts: FeatureFacts) -> None:
    """Turn figures into sentences."""
    facts.errors += facts.unreadable[:NAMED_AT_MOST]
    if len(facts.unreadable) > NAMED_AT_MOST:
        rest = len(facts.unreadable) - NAMED_AT_MOST
        facts.errors.append(f"{rest} more videos have features that cannot be used.")
    if facts.not_finite:
        facts.errors.append(
            f"{len(facts.not_finite)} videos have features that are not finite "
            f"({some(facts.not_finite)}); make them again."
        )
    if len(facts.channels) > 1:
        counts = ", ".join(f"{n} videos of {c}" for c, n in sorted(facts.channels.items()))
        facts.errors.append(f"Features differ in their number of channels: {counts}.")
    if facts.unlike:
        how = "; ".join(f"in {n} videos {text}" for text, n in facts.unlike.most_common(3))
        facts.errors.append(f"Features were not all made in one way: {how}; extract them alike.")
    for videos, what in (
        (facts.zero, "have nothing but zeros"),
        (facts.constant, "have the same row everywhere, so no moment can be told"),
        (facts.single, "have a single row, so no moment can be told"),
    ):
        if videos:
            facts.warnings.append(f"{len(videos)} videos {what} ({some(videos)}).")
    if facts.zero_rows:
        facts.warnings.append(f"{facts.zero_rows} rows are all zeros, in videos that have others.")
    if facts.largest > HUGE:
        facts.warnings.append(
            f"Features reach {facts.largest:.3g}, far more than usual; training may diverge, so "
            f"check how they were made."
        )


Splits = dict[str, list[Annotation]]

FEW_QUERIES = 100

MANY_UNKNOWN = 0.02  # a larger share of words without a vector is remarked

APART_SECONDS = 1.0  # two durations of one video further apart than this are remarked


@dataclass
class Report:
    """Facts by subject, in figures that JSON takes, and sentences on what is wrong."""

    splits: dict[str, dict[str, Any]] = field(default_factory=dict)
    features: dict[str, Any] = field(default_factory=dict)
    words: dict[str, dict[str, Any]] = field(default_factory=dict)
    overlaps: dict[str, dict[str, int]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """What is raised or warned of inside becomes a sentence of this report."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                yield
            except MmdistError as error:
                self.errors.append(str(error))
        self.warnings += [str(warning.message) for warning in caught]


def check_data(
    files: Mapping[str, Path],
    *,
    features_path: Path | None,
    word_vectors: WordVectors,
    durations: Sequence[Path] = (),
    modality: str = "rgb",
    protocol: str = "official",
    progress: Progress | None = None,
) -> Report:
    """Read all files and say what they hold and what is wrong with them.

    files: annotation files by split: train, val, test. durations: files of seconds by video.
    What the files get wrong is among the report's errors; nothing of it is raised.
    """
    report = Report()
    seconds: dict[str, float] = {}
    for path in durations:
        with report.collecting():
            seconds |= load_durations(path)
    splits: Splits = {}
    for name, path in files.items():
        with report.collecting():
            splits[name] = load_annotations(path, durations=seconds)
    if features_path is not None and splits:
        videos = sorted({a.video for annotations in splits.values() for a in annotations})
        with report.collecting():
            facts = inspect_features(features_path, videos, modality, progress)
            report.features = facts.to_json()
            report.errors += facts.errors
            report.warnings += facts.warnings
            _check_missing(report, splits, facts)
            splits = _take_durations(report, splits, facts)
    for name, read in splits.items():
        if _has_durations(report, name, read):
            with report.collecting():
                splits[name] = in_protocol(read, protocol)
        report.splits[name] = {
            "file": files[name].name,
            "protocol": protocol_of(files[name], splits[name]),
            "queries": len(splits[name]),
            "queries_dropped_by_protocol": len(read) - len(splits[name]),
            "videos": len({a.video for a in splits[name]}),
        }
        _check_sentences(report, name, splits[name], word_vectors)
        if all(a.duration_seconds for a in splits[name]):
            _check_moments(report, name, splits[name])
    _check_overlaps(report, splits)
    _check_words(report, splits, word_vectors)
    return report


def _check_missing(report: Report, splits: Splits, facts: FeatureFacts) -> None:
    for name, queries in splits.items():
        videos = {a.video for a in queries}
        missing = sorted(videos & set(facts.missing))
        if missing:
            report.errors.append(
                f"{len(missing)} of {len(videos)} videos of {name} have no features "
                f"({some(missing)}); extract them, or leave them out of the annotations."
            )


def _take_durations(report: Report, splits: Splits, facts: FeatureFacts) -> Splits:
    """Durations from the features where the annotations have none; else both must agree."""
    known = facts.durations_seconds
    apart = {
        a.video
        for annotations in splits.values()
        for a in annotations
        if a.duration_seconds and a.video in known
        and abs(a.duration_seconds - known[a.video]) > APART_SECONDS
    }  # fmt: skip
    if apart:
        report.warnings.append(
            f"{len(apart)} videos are longer or shorter in the annotations than in the features by "
            f"more than {APART_SECONDS:g} s ({some(sorted(apart))}); are they the same videos?"
        )
    return {
        name: [a if a.duration_seconds else with_durations([a], known)[0] for a in annotations]
        for name, annotations in splits.items()
    }


def _has_durations(report: Report, name: str, annotations: Sequence[Annotation]) -> bool:
    unknown = sorted({a.video for a in annotations if not a.duration_seconds})
    if unknown:
        report.errors.append(
            f"{len(unknown)} videos of {name} have no duration, neither in the annotations nor in "
            f"the features ({some(unknown)}); give --durations."
        )
    return not unknown


def _check_sentences(
    report: Report, name: str, annotations: Sequence[Annotation], vectors: WordVectors
) -> None:
    counts = [sum(map(is_word, tokenize(a.sentence))) for a in annotations]
    same = Counter((a.video, a.moments, a.sentence.lower()) for a in annotations)
    duplicates = sum(count - 1 for count in same.values())
    cut = sum(sum(t in vectors for t in tokenize(a.sentence)) > MAX_WORDS for a in annotations)
    report.splits[name] |= {
        "words_per_query": {
            "min": min(counts), "median": float(np.median(counts)), "max": max(counts),
        },
        "queries_cut_at_20_words": cut,
        "duplicates": duplicates,
        "queries_of_several_moments": sum(bool(a.more) for a in annotations),
    }  # fmt: skip
    silent = [a.sentence for a in annotations if not has_known_word(a.sentence, vectors)]
    if silent:
        report.errors.append(
            f"{len(silent)} sentences of {name} have no word with a vector in '{vectors.name}', "
            f"the first: '{silent[0]}'; leave them out, or give more word vectors with --glove."
        )
    if duplicates:
        report.warnings.append(f"{duplicates} lines of {name} repeat another line.")
    if name != "train" and len(annotations) < FEW_QUERIES:
        report.warnings.append(
            f"{name} has {len(annotations)} queries: one of them is "
            f"{100 / len(annotations):.1f} points of R@1."
        )


def _check_moments(report: Report, name: str, annotations: Sequence[Annotation]) -> None:
    most = max(len(a.moments) for a in annotations)  # where a query has fewer, one is repeated
    moments = [a.moments + a.moments[:1] * (most - len(a.moments)) for a in annotations]
    truth_QT2 = np.array(moments, dtype=np.float64)
    durations_Q = np.array([a.duration_seconds for a in annotations], dtype=np.float64)
    shares = (truth_QT2[:, 0, 1] - truth_QT2[:, 0, 0]) / durations_Q
    late = truth_QT2[:, :, 1].max(axis=1) - durations_Q
    is_outside = truth_QT2[:, :, 0].max(axis=1) >= durations_Q
    outside = [a for a, is_ in zip(annotations, is_outside, strict=True) if is_]
    facts = report.splits[name]
    facts |= {
        "duration_seconds": _spread(durations_Q),
        "moment_share_of_video": _spread(shares),
        "ends_past_duration": int((late > 0).sum()),
        "largest_past_duration_seconds": max(0.0, float(late.max())),
    }
    if name != "train":
        span, iou_Q = best_constant_span(truth_QT2, durations_Q)
        facts["best_constant_span"] = {"span": list(span), **recall_metrics(iou_Q[:, None])}
    if outside:
        report.errors.append(
            f"{len(outside)} moments of {name} start after their video has ended, the first in "
            f"'{outside[0].video}' ({max(outside[0].moments)[0]:g} s of "
            f"{outside[0].duration_seconds:g} s); "
            f"check that times and durations are both seconds, of the same video."
        )
    elif facts["ends_past_duration"]:
        report.warnings.append(
            f"{facts['ends_past_duration']} queries of {name} end past their video, by "
            f"{late.max():.2f} s at most; the protocol official keeps them and cpl drops them, so "
            f"name the protocol beside every number."
        )


def _spread(values: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, float]:
    low, median, high = (float(v) for v in np.quantile(values, (0.0, 0.5, 1.0)))
    return {"min": low, "median": median, "mean": float(values.mean()), "max": high}


def _check_overlaps(report: Report, splits: Splits) -> None:
    for one, other in combinations(splits, 2):
        videos = {a.video for a in splits[one]} & {a.video for a in splits[other]}
        known = {tuple(tokenize(a.sentence)) for a in splits[one]}
        equal = sum(tuple(tokenize(a.sentence)) in known for a in splits[other])
        # queries: those of the second whose very sentence the first has too, of any video
        report.overlaps[f"{one}, {other}"] = {"videos": len(videos), "queries": equal}
        if not videos:
            continue
        sentence = f"{len(videos)} videos are in both {one} and {other} ({some(sorted(videos))})"
        if one == "train":
            report.errors.append(f"{sentence}; split by video.")
        else:
            report.warnings.append(f"{sentence}; choices made on {one} have seen them.")


def _check_words(report: Report, splits: Splits, vectors: WordVectors) -> None:
    counts = {
        name: Counter(t for a in annotations for t in tokenize(a.sentence) if is_word(t))
        for name, annotations in splits.items()
    }
    for name, words in counts.items():
        unknown = Counter({w: n for w, n in words.items() if w not in vectors})
        share = unknown.total() / max(1, words.total())
        frequent = [w for w, _ in unknown.most_common(NAMED_AT_MOST)]
        report.words[name] = {
            "distinct": len(words),
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
            report.words[name]["share_unseen_in_training"] = unseen / max(1, words.total())
