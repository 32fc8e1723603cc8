"""What is wrong with annotations and features, found in seconds instead of during training.

Shape suffixes: S rows of one video, F feature channels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmdist_e2e.grounding.answer import Progress
from mmdist_e2e.grounding.data.annotations import (
    NAMED_AT_MOST,
    Annotation,
    BadLinesError,
    describe_suspicions,
    in_protocol,
    load_durations,
    read_annotations,
    some,
    suspicions,
    with_durations,
)
from mmdist_e2e.grounding.data.features import FeatureSource, modalities_of, open_features
from mmdist_e2e.grounding.data.published import protocol_of
from mmdist_e2e.grounding.data.text import has_known_word, is_word, tokenize
from mmdist_e2e.structures import MmdistError, Provenance
from mmdist_e2e.weights.words import WordVectors

MANY_UNKNOWN = 0.02  # warn of a larger share of words without a vector
APART_SECONDS = 1.0  # warn of two durations of one video that differ by more
USUAL_STRIDES = (4, 8, 16)  # frames between rows of published features
RATE_TOLERANCE = 0.1  # warn of rows per second that differ from the median by a larger share
ROUNDED_ROWS = 2  # that a short video may have more or less
RATIOS = {
    a / b: f"{a}/{b}" for a, b in ((30, 25), (25, 30), (30, 24), (24, 30), (60, 30), (30, 60))
}


@dataclass
class Report:
    """Facts by subject, as JSON takes them, and sentences about what is wrong."""

    splits: dict[str, dict[str, Any]] = field(default_factory=dict)
    features: dict[str, Any] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """What is raised inside becomes an error of this report."""
        try:
            yield
        except BadLinesError as error:
            self.errors += error.lines
        except MmdistError as error:
            self.errors.append(str(error))

    def tell(self, found: Collection[str], text: str, *, warning: bool = False) -> None:
        """If anything is found, add an error "N text." with the names found for NAMES.

        warning: for what training and evaluation accept.
        """
        if found:
            sentence = f"{len(found)} {text.replace('NAMES', some(sorted(found)))}."
            (self.warnings if warning else self.errors).append(sentence)


def check_data(
    files: Mapping[str, Path],
    *,
    features: Path | None,
    word_vectors: WordVectors,
    durations: Sequence[Path] = (),
    modality: str = "rgb",
    protocol: str = "official",
    progress: Progress | None = None,
) -> Report:
    """Read all files; report what they hold and what is wrong with them.

    files: annotation files by split: train, val, test. features: a place as `open_features` takes
    it. durations: files of seconds by video.
    Faults of the files are errors of the report and are not raised.
    """
    report = Report()
    seconds: dict[str, float] = {}
    said: dict[str, dict[str, float]] = {}  # durations by what says them
    for path in durations:
        with report.collecting():
            seconds |= (found := load_durations(path))
            said[path.name] = said.get(path.name, {}) | found
    splits: dict[str, list[Annotation]] = {}
    left_out: dict[str, int] = {}
    for name, path in files.items():
        with report.collecting():
            queries, left_out[name] = read_annotations(path)
            said[name] = {a.video: a.duration_seconds for a in queries if a.duration_seconds}
            splits[name] = with_durations(queries, seconds)
    if features is not None and splits:
        with report.collecting():
            seconds = _check_features(report, splits, features, modality, progress)
            said["the features"] = seconds
            for name, queries in splits.items():
                lacking = {a.video for a in queries if not a.duration_seconds}
                splits[name] = with_durations(queries, {v: seconds.get(v) for v in lacking})
    for name, queries in splits.items():
        counts = suspicions(queries, left_out[name])
        if counts:
            report.warnings.append(f"{name}: {describe_suspicions(counts)}.")
        unknown = {a.video for a in queries if not a.duration_seconds}
        report.tell(
            unknown,
            f"videos of {name} have no duration, neither in the annotations nor in the features "
            "(NAMES); give --durations",
        )
        if not unknown:
            with report.collecting():
                splits[name] = in_protocol(queries, protocol)
        report.splits[name] = {
            "file": files[name].name,
            "protocol": protocol_of(files[name], splits[name]),
            "queries": len(splits[name]),
            "queries_dropped_by_protocol": len(queries) - len(splits[name]),
            "videos": len({a.video for a in splits[name]}),
            **counts,
        }
        if not unknown:
            _check_moments(report, name, splits[name])
        _check_words(report, name, splits[name], word_vectors)
    for one, other in combinations(said, 2):
        known = said[one].keys() & said[other].keys()
        report.tell(
            {v for v in known if abs(said[one][v] - said[other][v]) > APART_SECONDS},
            f"videos are longer or shorter in {one} than in {other} by more than "
            f"{APART_SECONDS:g} s (NAMES); check that they are the same videos",
            warning=True,
        )
    for one, other in combinations(splits, 2):
        shared = {a.video for a in splits[one]} & {a.video for a in splits[other]}
        sentences = {tuple(tokenize(a.sentence)) for a in splits[one]}
        equal = sum(tuple(tokenize(a.sentence)) in sentences for a in splits[other])
        report.splits[other][f"shared_with_{one}"] = {"videos": len(shared), "sentences": equal}
        both = f"videos are in both {one} and {other} (NAMES); split by video"
        report.tell(shared, both, warning=one != "train")
    return report


def _check_features(
    report: Report,
    splits: Mapping[str, Sequence[Annotation]],
    path: Path,
    modality: str,
    progress: Progress | None,
) -> dict[str, float]:
    """Read the features of all videos of the splits; gives the durations that they record.

    Without splits, of all videos that have features. Raises MmdistError when the path cannot be
    opened at all.
    """
    said = {a.video: a.duration_seconds for queries in splits.values() for a in queries}
    each: dict[str, _VideoFacts] = {}
    unreadable: list[str] = []
    with open_features(path, modality) as source:
        said = said or dict.fromkeys(source.names)
        for done, video in enumerate(sorted(said), start=1):
            if video in source.names:
                try:
                    each[video] = _facts_of(source, video)
                except MmdistError as error:
                    unreadable.append(str(error))
            if progress:
                progress("reading features", done, len(said))
    missing = said.keys() - source.names.keys()
    channels = Counter(facts.channels for facts in each.values())
    made_by = next((facts.matters for facts in each.values()), {})
    report.features = {
        "kind": source.kind,
        "modality": modality,
        "made_by": dict(made_by),
        "videos": len(said) - len(missing),
        "videos_missing": len(missing),
        "videos_unused": len(source.names.keys() - said.keys()),
        "videos_unreadable": len(unreadable),
        "videos_with_duration": sum(facts.duration is not None for facts in each.values()),
        "rows": sum(facts.rows for facts in each.values()),
        "channels": sorted(channels),
    }
    report.errors += unreadable[:NAMED_AT_MOST]
    if (rest := len(unreadable) - NAMED_AT_MOST) > 0:
        report.errors.append(f"{rest} more videos have features that cannot be used.")
    for name, queries in splits.items():
        videos = {a.video for a in queries}
        report.tell(
            videos & missing,
            f"of {len(videos)} videos of {name} have no features (NAMES); extract them, or give "
            f"--skip-missing to train and evaluate",
        )
    for fault in dict.fromkeys(facts.fault for facts in each.values() if facts.fault):
        faulty = {video for video, facts in each.items() if facts.fault == fault}
        report.tell(faulty, f"videos have {fault}", warning=fault != NOT_FINITE)
    if len(channels) > 1:
        counts = ", ".join(f"{n} videos of {c}" for c, n in sorted(channels.items()))
        report.errors.append(f"Features differ in their number of channels: {counts}.")
    if unlike := {video for video, facts in each.items() if facts.matters != made_by}:
        other = each[min(unlike)].matters
        keys = sorted(k for k in {**made_by, **other} if made_by.get(k) != other.get(k))
        report.tell(
            unlike,
            "videos have features that were made in another way (NAMES), "
            f"different in {', '.join(keys)}; extract all videos alike",
        )
    known = {v: facts.duration for v, facts in each.items() if facts.duration is not None}
    rows = {video: facts.rows for video, facts in each.items()}
    lengths = {v: known.get(v) or said[v] for v in rows}
    report.features |= _rate_facts(rows, lengths)
    foreign = str(made_by.get("extractor")).startswith("external:")
    if foreign and "implied_fps" in report.features:  # of our own, the provenance tells
        _check_rates(report, rows, lengths)
    return known


def check_source(path: Path, *, progress: Progress | None = None) -> dict[str, Report]:
    """By modality, what a source of features holds and what is wrong with it.

    Raises MmdistError when the path cannot be opened at all.
    """
    reports = {modality: Report() for modality in modalities_of(path)}
    for modality, report in reports.items():
        _check_features(report, {}, path, modality, progress)
    return reports


def _rate_facts(rows: Mapping[str, int], seconds: Mapping[str, float | None]) -> dict[str, Any]:
    """Rows per second of video, and the fps that they imply, from videos of known duration.

    Where all videos have one number of rows, these were spread evenly and imply no fps.
    """
    rates = [count / length for video, count in rows.items() if (length := seconds.get(video))]
    if len(rows) > 1 and len(set(rows.values())) == 1:
        return {"rows_in_every_video": next(iter(rows.values()))}
    if not rates:
        return {}
    median = float(np.median(rates))
    spread = {"median": median, "min": min(rates), "max": max(rates)}
    fps = {f"at stride {stride}": stride * median for stride in USUAL_STRIDES}
    facts = {"rows_per_second": spread, "implied_fps": fps}
    return {name: {k: round(v, 3) for k, v in each.items()} for name, each in facts.items()}


def _check_rates(
    report: Report, rows: Mapping[str, int], seconds: Mapping[str, float | None]
) -> None:
    """Warn of videos whose rows per second are far from the median, by the likely reason."""
    median = report.features["rows_per_second"]["median"]
    outliers: dict[str, set[str]] = {}
    for video, count in rows.items():
        expected = median * (seconds[video] or 0)
        if abs(count - expected) > max(RATE_TOLERANCE * expected, ROUNDED_ROWS) and expected:
            fits = [name for r, name in RATIOS.items() if abs(count / expected / r - 1) < 0.02]
            outliers.setdefault(f", by about {fits[0]}" if fits else "", set()).add(video)
    for ratio, videos in sorted(outliers.items()):
        report.tell(
            videos,
            f"videos have rows per second more than {RATE_TOLERANCE:.0%} off the median of "
            f"{median:.3g}{ratio} (NAMES); check at which fps their frames were taken",
            warning=True,
        )


NOT_FINITE = "features that are not finite (NAMES)"


class _VideoFacts(NamedTuple):
    rows: int
    fault: str | None
    duration: float | None
    matters: Mapping[str, Any]
    channels: int


def _facts_of(source: FeatureSource, video: str) -> _VideoFacts:
    """Raises MmdistError when the features of the video cannot be read."""
    duration = None
    if source.timed(video):
        features = source.features(video)
        raw_SF: NDArray[Any] = features.data
        matters, duration = features.provenance.matters, features.duration_seconds
    else:
        raw_SF, matters = source.array(video), Provenance.external(source.kind).matters
    with np.errstate(over="ignore"):
        data_SF = raw_SF.astype(np.float32)
    fault = None
    if not np.isfinite(data_SF).all():
        fault = NOT_FINITE
    elif not data_SF.any():
        fault = "only zeros as features (NAMES)"
    elif (data_SF == data_SF[0]).all():
        fault = "the same features in every row, so no moment can be found (NAMES)"
    return _VideoFacts(len(raw_SF), fault, duration, matters, raw_SF.shape[1])


def _check_moments(report: Report, name: str, queries: Sequence[Annotation]) -> None:
    starts = {a: max(start for start, _ in a.moments) for a in queries}
    outside = [a for a in queries if starts[a] >= (a.duration_seconds or 0)]
    late = [
        max(e for _, e in a.moments) - (a.duration_seconds or 0) for a in queries if a.ends_late
    ]
    report.splits[name]["ends_past_duration"] = len(late)
    if outside:
        first = outside[0]
        report.errors.append(
            f"{len(outside)} moments of {name} start after their video has ended, the first in "
            f"'{first.video}' ({starts[first]:g} s of {first.duration_seconds:g} s); "
            f"check that times and durations are in seconds, and of the same video."
        )
    elif late:
        report.warnings.append(
            f"{len(late)} queries of {name} end past their video, by {max(late):.2f} s at most; "
            f"the protocol official keeps them and cpl drops them, so name the protocol beside "
            f"every number."
        )


def _check_words(
    report: Report, name: str, queries: Sequence[Annotation], vectors: WordVectors
) -> None:
    words = Counter(token for a in queries for token in tokenize(a.sentence) if is_word(token))
    unknown = Counter({word: n for word, n in words.items() if word not in vectors})
    share = unknown.total() / max(1, words.total())
    report.splits[name]["share_of_words_without_vector"] = share
    report.tell(
        [a.sentence for a in queries if not has_known_word(a.sentence, vectors)],
        f"sentences of {name} have no word with a vector in '{vectors.name}' (NAMES); leave "
        f"them out, or give more word vectors with --glove",
    )
    if share > MANY_UNKNOWN:
        frequent = ", ".join(word for word, _ in unknown.most_common(NAMED_AT_MOST))
        report.warnings.append(
            f"{share:.1%} of the words of {name} have no vector in '{vectors.name}' and are "
            f"not read ({frequent} most often); --glove takes larger ones."
        )
