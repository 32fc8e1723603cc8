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
from mmdist_e2e.grounding.data.features import modalities_of, open_features
from mmdist_e2e.grounding.data.published import protocol_of
from mmdist_e2e.grounding.data.text import has_known_word, is_word, tokenize
from mmdist_e2e.structures import MmdistError
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
    """Facts by split and by modality, as JSON takes them, and sentences about what is wrong."""

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
        """If anything is found, add an error "N text." with the first few found for NAMES.

        warning: for what training and evaluation accept.
        """
        if found:
            sentence = f"{len(found)} {text.replace('NAMES', some(sorted(found)))}."
            (self.warnings if warning else self.errors).append(sentence)


def check_data(
    files: Mapping[str, Path],
    *,
    features: Mapping[str, Path],
    word_vectors: WordVectors,
    durations: Sequence[Path] = (),
    protocol: str = "official",
    progress: Progress | None = None,
) -> Report:
    """Read all files; report what they hold and what is wrong with them.

    files: annotation files by split: train, val, test. features: by modality, a place as
    `open_features` takes it. durations: files of seconds by video.
    Faults of the files are errors of the report and are not raised.
    """
    report = Report()
    said: dict[str, dict[str, float]] = {}  # durations by what says them
    seconds: dict[str, float] = {}
    for path in durations:
        with report.collecting():
            found = load_durations(path)
            said[path.name] = said.get(path.name, {}) | found
            seconds |= found
    splits: dict[str, list[Annotation]] = {}
    left_out: dict[str, int] = {}
    for name, path in files.items():
        with report.collecting():
            queries, left_out[name] = read_annotations(path)
            said[name] = {a.video: a.duration_seconds for a in queries if a.duration_seconds}
            splits[name] = with_durations(queries, seconds)
    recorded = said.setdefault("the features", {})
    for modality, place in features.items() if splits else ():
        with report.collecting():
            recorded |= _check_features(report, splits, place, modality, progress)
    for name in splits:
        queries = splits[name] = with_durations(splits[name], recorded | said[name] | seconds)
        facts = report.splits.setdefault(name, {"file": files[name].name})
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
        facts["protocol"] = protocol_of(files[name], splits[name])
        facts["queries"] = len(splits[name])
        facts["queries_dropped_by_protocol"] = len(queries) - len(splits[name])
        facts["videos"] = len({a.video for a in splits[name]})
        facts |= counts
        if not unknown:
            facts["ends_past_duration"] = _check_moments(report, name, splits[name])
        facts["share_of_words_without_vector"] = _check_words(
            report, name, splits[name], word_vectors
        )
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


def check_source(path: Path, *, progress: Progress | None = None) -> Report:
    """What a source of features holds and what is wrong with it.

    Raises MmdistError when the path cannot be opened at all.
    """
    report = Report()
    for modality in modalities_of(path):
        _check_features(report, {}, path, modality, progress)
    return report


class _Facts(NamedTuple):
    """Of the features of one video. made: what must be the same for all videos."""

    rows: int
    made: Mapping[str, Any]
    seconds: float | None  # None where they are not recorded
    rows_are_equal: bool


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
    wanted = {a.video: a.duration_seconds for queries in splits.values() for a in queries}
    each: dict[str, _Facts] = {}
    unreadable: list[str] = []
    with open_features(path, modality) as source:
        wanted = wanted or dict.fromkeys(source.names)
        missing = wanted.keys() - source.names.keys()
        for done, video in enumerate(sorted(wanted.keys() - missing), start=1):
            try:
                features = source.features(video)
            except MmdistError as error:
                unreadable.append(str(error))
            else:
                data_SF = features.data
                seconds = features.duration_seconds if source.timed(video) else None
                equal = bool((data_SF == data_SF[0]).all())
                each[video] = _Facts(len(data_SF), features.made, seconds, equal)
            if progress:
                progress(f"reading {modality} features", done, len(wanted.keys() - missing))
    made_by: Mapping[str, Any] = next((one.made for one in each.values()), {})
    known = {video: one.seconds for video, one in each.items() if one.seconds is not None}
    report.features[modality] = facts = {
        "kind": source.kind,
        "made_by": {key: value for key, value in made_by.items() if key != "channels"},
        "videos": len(wanted) - len(missing),
        "videos_missing": len(missing),
        "videos_unused": len(source.names.keys() - wanted.keys()),
        "videos_unreadable": len(unreadable),
        "videos_with_duration": len(known),
        "rows": sum(one.rows for one in each.values()),
        "channels": sorted({one.made["channels"] for one in each.values()}),
    }
    report.errors += unreadable[:NAMED_AT_MOST]
    if (rest := len(unreadable) - NAMED_AT_MOST) > 0:
        report.errors.append(f"{rest} more videos have {modality} features that cannot be used.")
    for name, queries in splits.items():
        videos = {a.video for a in queries}
        report.tell(
            videos & missing,
            f"of {len(videos)} videos of {name} have no {modality} features (NAMES); extract them, "
            f"or give --skip-missing to train and evaluate",
        )
    report.tell(
        {video for video, one in each.items() if one.rows_are_equal},
        f"videos have the same {modality} features in every row, so no moment can be found (NAMES)",
        warning=True,
    )
    if unlike := {video for video, one in each.items() if one.made != made_by}:
        other = each[min(unlike)].made
        keys = sorted(k for k in {**made_by, **other} if made_by.get(k) != other.get(k))
        report.tell(
            unlike,
            f"videos have {modality} features that were made in another way (NAMES), different "
            f"in {', '.join(keys)}; extract all videos alike",
        )
    lengths = {v: seconds for v in each if (seconds := known.get(v) or wanted[v])}
    if len(each) > 1 and len({one.rows for one in each.values()}) == 1:
        # Rows that were spread evenly imply no frame rate.
        facts["rows_in_every_video"] = next(iter(each.values())).rows
    elif lengths:
        rates = {video: each[video].rows / length for video, length in lengths.items()}
        median = float(np.median(list(rates.values())))
        spread = {"median": median, "min": min(rates.values()), "max": max(rates.values())}
        fps = {f"at stride {stride}": stride * median for stride in USUAL_STRIDES}
        facts["rows_per_second"] = {name: round(value, 3) for name, value in spread.items()}
        facts["implied_fps"] = {name: round(value, 3) for name, value in fps.items()}
        if str(made_by.get("extractor")).startswith("external:"):  # else the provenance tells
            _check_rates(report, rates, lengths, modality)
    return known


def _check_rates(
    report: Report, rates: Mapping[str, float], seconds: Mapping[str, float], modality: str
) -> None:
    """Warn of videos whose rows per second are far from the median, by the likely reason."""
    median = float(np.median(list(rates.values())))
    outliers: dict[str, set[str]] = {}
    for video, rate in rates.items():
        off = rate / median
        if abs(off - 1) > max(RATE_TOLERANCE, ROUNDED_ROWS / (median * seconds[video])):
            fits = [name for ratio, name in RATIOS.items() if abs(off / ratio - 1) < 0.02]
            outliers.setdefault(f", by about {fits[0]}" if fits else "", set()).add(video)
    for ratio, videos in sorted(outliers.items()):
        report.tell(
            videos,
            f"videos have {modality} rows per second more than {RATE_TOLERANCE:.0%} off the median "
            f"of {median:.3g}{ratio} (NAMES); check at which fps their frames were taken",
            warning=True,
        )


def _check_moments(report: Report, name: str, queries: Sequence[Annotation]) -> int:
    """How many queries end past their video. All need a duration."""
    seconds = [a.duration_seconds or 0.0 for a in queries]
    latest = [max(start for start, _ in a.moments) for a in queries]
    report.tell(
        [
            f"'{a.video}': {start:g} s of {length:g} s"
            for a, start, length in zip(queries, latest, seconds, strict=True)
            if start >= length
        ],
        f"moments of {name} start after their video has ended (NAMES); check that times and "
        f"durations are in seconds, and of the same video",
    )
    past = [
        max(end for _, end in a.moments) - length
        for a, length in zip(queries, seconds, strict=True)
        if a.ends_late
    ]
    report.tell(
        [f"{late:.2f}" for late in past],
        f"queries of {name} end past their video, by {max(past, default=0):.2f} s at most; "
        f"the protocol official keeps them and cpl drops them, so name the protocol beside every "
        f"number",
        warning=True,
    )
    return len(past)


def _check_words(
    report: Report, name: str, queries: Sequence[Annotation], vectors: WordVectors
) -> float:
    """The share of words without a vector."""
    words = Counter(token for a in queries for token in tokenize(a.sentence) if is_word(token))
    unknown = Counter({word: n for word, n in words.items() if word not in vectors})
    share = unknown.total() / max(1, words.total())
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
    return share
