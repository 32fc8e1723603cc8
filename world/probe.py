"""A linear probe: how well frozen features separate the world's actions.

    python -m world probe --world WORLD --extractor RGB --extractor FLOW

Rows of the world's grounding videos are labelled with what the person does at the middle of the
row's window; softmax regression is fitted on train videos and scored on test videos, and
compared with chance and with the same networks with random weights. With an extractor of each
modality it is fitted on rgb, on flow, and on both concatenated. Shapes: S rows, D channels,
K classes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save_file

from mmdist_e2e.extractors.batch import extract_many
from mmdist_e2e.extractors.profiles import ExtractorSpec, describe
from mmdist_e2e.extractors.runner import build
from mmdist_e2e.extractors.search import Video
from mmdist_e2e.store import FeatureStore, write_json
from mmdist_e2e.structures import MmdistError
from world.clips import ACTION_NAMES
from world.story import OPPOSITES
from world.world import WORLD_VERSION, Script, sample_script

TRAIN_VIDEOS, TEST_VIDEOS = 150, 75
FIT_STEPS = 400
WEIGHT_DECAY = 1e-3
BOTH = "both"

Rows = tuple[NDArray[np.float32], NDArray[np.int64]]


def action_at(script: Script, seconds: float) -> str:
    """What the person does at a time; the last segment also covers the very end."""
    for segment in script.segments:
        if segment.start <= seconds < segment.end:
            return segment.action
    return script.segments[-1].action


def labelled_rows(
    store: FeatureStore, scripts: Sequence[Script], modalities: Sequence[str]
) -> dict[str, Rows]:
    """Features [S, D] of all videos and the action index of each row, by modality.

    For several modalities, "both" has their channels concatenated.
    Raises MmdistError when the modalities' rows are not of the same times.
    """
    data: dict[str, list[NDArray[np.float32]]] = {modality: [] for modality in modalities}
    labels: list[int] = []
    for script in scripts:
        features = [store.load(script.id, modality) for modality in modalities]
        times = features[0].times
        for modality, rows in zip(modalities, features, strict=True):
            if not np.array_equal(rows.times, times):
                raise MmdistError(
                    f"The rows of {modalities[0]} and {modality} of {script.id} are not of the "
                    f"same times; probe extractors of one fps, window and stride."
                )
            data[modality].append(rows.data)
        labels += [ACTION_NAMES.index(action_at(script, t)) for t in times.mean(axis=1)]
    tables = {modality: np.concatenate(parts) for modality, parts in data.items()}
    if len(modalities) > 1:
        tables[BOTH] = np.concatenate(list(tables.values()), axis=1)
    return {modality: (table, np.array(labels)) for modality, table in tables.items()}


def fit(train: Rows, test: Rows) -> NDArray[np.float32]:
    """Softmax regression on standardised rows; returns the logits [S, K] of the test rows."""
    mean, deviation = train[0].mean(axis=0), train[0].std(axis=0) + 1e-6
    inputs, targets = (torch.from_numpy((train[0] - mean) / deviation), torch.from_numpy(train[1]))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = torch.nn.Linear(inputs.shape[1], len(ACTION_NAMES))
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02, weight_decay=WEIGHT_DECAY)
    for _ in range(FIT_STEPS):
        loss = F.cross_entropy(layer(inputs), targets)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        logits: NDArray[np.float32] = layer(torch.from_numpy((test[0] - mean) / deviation)).numpy()
    return logits


def score(logits_SK: NDArray[np.float32], labels_S: NDArray[np.int64]) -> dict[str, Any]:
    """What a fitted probe classifies correctly, in percent.

    accuracy of rows; balanced_accuracy, the mean of recall; recall by action; and opposites, for
    each pair of opposite actions the accuracy on their rows when only these two are the choice
    (the mean of the two actions, so that guessing gives 50). Actions that no row shows are left
    out.
    """
    hits = logits_SK.argmax(axis=1) == labels_S
    shown = {k: labels_S == k for k in np.unique(labels_S).tolist()}
    recall = {k: float(hits[rows].mean()) for k, rows in shown.items()}
    opposites = {}
    for pair in OPPOSITES:
        first, second = (ACTION_NAMES.index(action) for action in pair)
        if first in shown and second in shown:
            ahead = logits_SK[:, first] > logits_SK[:, second]
            right = (ahead[shown[first]].mean() + (~ahead[shown[second]]).mean()) / 2
            opposites[" / ".join(pair)] = _percent(right)
    return {
        "accuracy": _percent(hits.mean()),
        "balanced_accuracy": _percent(np.mean(list(recall.values()))),
        "recall": {ACTION_NAMES[k]: _percent(value) for k, value in recall.items()},
        "opposites": opposites,
    }


def _percent(share: Any) -> float:
    return round(100 * float(share), 2)


def untrained_copy(spec: ExtractorSpec, folder: Path) -> ExtractorSpec:
    """The same network with random weights, written as a checkpoint."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build(spec.config)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(network.state_dict(), folder / "model.safetensors")
    write_json(
        folder / "config.json", {**spec.config, "name": "untrained", "trained_on": "nothing"}
    )
    return replace(describe(str(folder)), name="untrained")


def probe(
    world: Path,
    extractors: Sequence[str],
    *,
    features: Path | None = None,
    untrained: bool = True,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Probe extractors, one per modality, and their untrained copies on one world.

    features: store of the extractors' rows, reused and extended. untrained: False skips the
    untrained copies, which have to extract all videos and take minutes.

    Returns {"train_rows", "test_rows", "chance": {"majority", "uniform"}, "trained": {modality:
    what `score` gives}, "untrained": the same, if wanted}.
    Raises MmdistError when the world is of another version, two extractors are of one modality
    or of different times, or a video cannot be extracted.
    """
    facts = json.loads((world / "world.json").read_text())
    if facts["world_version"] != WORLD_VERSION:
        raise MmdistError(
            f"{world} is version {facts['world_version']} of the world; this probe knows "
            f"{WORLD_VERSION}: render it again."
        )
    specs = [describe(extractor) for extractor in extractors]
    modalities = [spec.modality for spec in specs]
    if len(set(modalities)) < len(modalities):
        raise MmdistError(
            f"The probe takes one extractor per modality; these are all {modalities[0]}: "
            f"{', '.join(extractors)}."
        )
    scripts = [sample_script(facts["seed"], i) for i in range(facts["videos"])]
    chosen = {
        split: [s for s in scripts if s.split == split][:limit]
        for split, limit in (("train", TRAIN_VIDEOS), ("test", TEST_VIDEOS))
    }
    videos = [
        Video(s.id, world / "videos" / f"{s.id}.mp4") for s in (*chosen["train"], *chosen["test"])
    ]
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        probes = {"trained": specs}
        if untrained:
            probes["untrained"] = [
                untrained_copy(s, Path(scratch) / f"untrained-{s.modality}") for s in specs
            ]
        for name, probed in probes.items():
            kept = features if name == "trained" else None
            store = FeatureStore(kept or Path(scratch) / f"{name}-features")
            report = extract_many(videos, probed, store)
            if report.failed:
                raise MmdistError(f"The probe stopped: {report.failed[0].cause}")
            train = labelled_rows(store, chosen["train"], modalities)
            test = labelled_rows(store, chosen["test"], modalities)
            results[name] = {m: score(fit(train[m], test[m]), test[m][1]) for m in train}
            labels = test[modalities[0]][1]
            results["train_rows"], results["test_rows"] = len(train[modalities[0]][1]), len(labels)
            results["chance"] = {
                "majority": _percent(np.bincount(labels).max() / len(labels)),
                "uniform": _percent(1 / len(np.unique(labels))),
            }
            hits = ", ".join(f"{m} {scores['accuracy']} %" for m, scores in results[name].items())
            say(f"{name}: accuracy {hits}")
    return results


def table(results: Mapping[str, Any]) -> list[str]:
    """Lines of a Markdown table of what `probe` returns, in percent, one column per modality."""
    trained, chance, untrained = results["trained"], results["chance"], results.get("untrained")
    columns = list(trained)
    rows: list[tuple[str, list[float]]] = []
    for key, chances in (("accuracy", "majority"), ("balanced_accuracy", "uniform")):
        name = key.replace("_", " ")
        rows.append((name, [trained[c][key] for c in columns]))
        if untrained is not None:
            rows.append((f"{name}, untrained networks", [untrained[c][key] for c in columns]))
        rows.append((f"{name}, chance", [chance[chances]] * len(columns)))
    for key, title in (("opposites", "of two: "), ("recall", "recall: ")):
        for name in trained[columns[0]][key]:
            rows.append((title + name, [trained[c][key][name] for c in columns]))
    width = max(len(title) for title, _ in rows)
    lines = [f"| {'':{width}} | " + " | ".join(f"{column:>6}" for column in columns) + " |"]
    lines.append(f"|{'-' * (width + 2)}" + "|-------:" * len(columns) + "|")
    lines += [
        f"| {title:{width}} | " + " | ".join(f"{value:>6}" for value in values) + " |"
        for title, values in rows
    ]
    return lines


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")


def main() -> None:
    """Command line of this module; see `--help`."""
    parser = argparse.ArgumentParser(description="Linear probe of extractors on the world.")
    parser.add_argument("--world", type=Path, required=True)
    parser.add_argument(
        "--extractor", action="append", required=True, help="name or folder; once per modality"
    )
    parser.add_argument("--features", type=Path, help="store of the extractors, to reuse")
    parser.add_argument("--no-untrained", action="store_true", help="leave that control out")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    results = probe(
        args.world,
        args.extractor,
        features=args.features,
        untrained=not args.no_untrained,
        say=_say,
    )
    for line in table(results):
        _say(line)
    if args.json:
        write_json(args.json, results)
