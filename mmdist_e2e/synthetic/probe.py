"""A linear probe: do frozen features tell the world's actions apart?

    python -m mmdist_e2e.synthetic.probe --world WORLD --extractor FOLDER

Rows of the world's grounding videos are labelled with what the person does at the middle of the
row's window; softmax regression is fitted on train videos and scored on test videos, beside
chance and beside the same network with random weights. Shapes: S rows, D channels.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save_file

from mmdist_e2e.extractors.batch import Video, extract_many
from mmdist_e2e.extractors.i3d import InceptionI3d
from mmdist_e2e.extractors.networks import ExtractorSpec, describe
from mmdist_e2e.store import FeatureStore, write_json
from mmdist_e2e.structures import MmdistError
from mmdist_e2e.synthetic.clips import ACTION_NAMES
from mmdist_e2e.synthetic.world import WORLD_VERSION, Script, sample_script

TRAIN_VIDEOS, TEST_VIDEOS = 150, 75
FIT_STEPS = 400
WEIGHT_DECAY = 1e-3

Rows = tuple[NDArray[np.float32], NDArray[np.int64]]


def action_at(script: Script, seconds: float) -> str:
    """What the person does at a time; the last segment also covers the very end."""
    for segment in script.segments:
        if segment.start <= seconds < segment.end:
            return segment.action
    return script.segments[-1].action


def labelled_rows(store: FeatureStore, scripts: Sequence[Script], modality: str) -> Rows:
    """Features [S, D] of all videos and the action index of each row."""
    data, labels = [], []
    for script in scripts:
        features = store.load(script.id, modality)
        data.append(features.data)
        labels += [ACTION_NAMES.index(action_at(script, t)) for t in features.times.mean(axis=1)]
    return np.concatenate(data), np.array(labels)


def fit_and_score(train: Rows, test: Rows) -> dict[str, float]:
    """Softmax regression on standardised rows: accuracy and balanced accuracy, in percent."""
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
        predicted = layer(torch.from_numpy((test[0] - mean) / deviation)).argmax(1).numpy()
    hits = predicted == test[1]
    present = np.unique(test[1])
    return {
        "accuracy": round(100 * float(hits.mean()), 2),
        "balanced_accuracy": round(
            100 * float(np.mean([hits[test[1] == c].mean() for c in present])), 2
        ),
        "majority_chance": round(100 * float(np.bincount(test[1]).max() / len(test[1])), 2),
        "uniform_chance": round(100 / len(present), 2),
        "train_rows": len(train[1]),
        "test_rows": len(test[1]),
    }


def untrained_copy(spec: ExtractorSpec, folder: Path) -> ExtractorSpec:
    """The same network with random weights, written as a checkpoint."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = spec.config
        network = InceptionI3d(config["num_classes"], config["in_channels"], config["width"])
    folder.mkdir(parents=True, exist_ok=True)
    save_file(network.state_dict(), folder / "model.safetensors")
    write_json(folder / "config.json", {**config, "name": "untrained", "trained_on": "nothing"})
    return replace(describe(str(folder)), name="untrained")


def probe(
    world: Path,
    extractor: str,
    *,
    features: Path | None = None,
    say: Callable[[str], None],
) -> dict[str, dict[str, float]]:
    """Probe an extractor and its untrained copy on one world.

    features: store where the extractor's rows are looked for first, and kept.

    Raises MmdistError when the world is of another version or a video cannot be extracted.
    """
    facts = json.loads((world / "world.json").read_text())
    if facts["world_version"] != WORLD_VERSION:
        raise MmdistError(
            f"{world} is version {facts['world_version']} of the world; this probe knows "
            f"{WORLD_VERSION}: render it again."
        )
    scripts = [sample_script(facts["seed"], i) for i in range(facts["videos"])]
    chosen = {
        split: [s for s in scripts if s.split == split][:limit]
        for split, limit in (("train", TRAIN_VIDEOS), ("test", TEST_VIDEOS))
    }
    videos = [
        Video(s.id, world / "videos" / f"{s.id}.mp4") for s in (*chosen["train"], *chosen["test"])
    ]
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        trained = describe(extractor)
        for name, spec in (
            ("trained", trained),
            ("untrained", untrained_copy(trained, Path(scratch) / "untrained")),
        ):
            kept = features if name == "trained" else None
            store = FeatureStore(kept or Path(scratch) / f"{name}-features")
            report = extract_many(videos, spec, store)
            if report.failed:
                raise MmdistError(f"The probe stopped: {report.failed[0].cause}")
            rows = {s: labelled_rows(store, chosen[s], spec.modality) for s in chosen}
            results[name] = fit_and_score(rows["train"], rows["test"])
            say(f"{name}: {results[name]}")
    return results


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")


def main() -> None:
    """Command line of this module; see `--help`."""
    parser = argparse.ArgumentParser(description="Linear probe of an extractor on the world.")
    parser.add_argument("--world", type=Path, required=True)
    parser.add_argument("--extractor", default="world1-rgb")
    parser.add_argument("--features", type=Path, help="store of the extractor, to reuse")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    try:
        results: dict[str, Any] = probe(
            args.world, args.extractor, features=args.features, say=_say
        )
    except MmdistError as error:
        sys.exit(str(error))
    if args.json:
        write_json(args.json, results)


if __name__ == "__main__":
    main()
