"""The linear probe: its labels, its scores, what it refuses, and its table."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mmdist_e2e.store import FeatureStore
from mmdist_e2e.structures import Features, MmdistError, Provenance
from world import probe as probe_module
from world.clips import ACTION_NAMES
from world.probe import action_at, fit, labelled_rows, probe, score, table
from world.story import OPPOSITES
from world.world import WORLD_VERSION, Script, sample_script

K = len(ACTION_NAMES)


def save_rows(store: FeatureStore, script: Script, modality: str, data: np.ndarray) -> None:
    edges = np.linspace(0, script.duration_seconds, len(data) + 1)
    times = np.stack([edges[:-1], edges[1:]], axis=1)
    features = Features(
        data=data.astype(np.float32),
        times=times,
        duration_seconds=script.duration_seconds,
        modality=modality,
        provenance=Provenance(matters={}, info={}, source={}),
    )
    store.save(script.id, features)


def test_action_at_reads_the_script():
    script = sample_script(0, 8)
    for segment in script.segments:
        assert action_at(script, (segment.start + segment.end) / 2) == segment.action
    assert action_at(script, script.duration_seconds) == script.segments[-1].action


def test_rows_of_both_modalities_stand_side_by_side(tmp_path):
    store = FeatureStore(tmp_path)
    scripts = [sample_script(0, 8), sample_script(0, 9)]
    for index, script in enumerate(scripts):
        save_rows(store, script, "rgb", np.full((30, 2), index))
        save_rows(store, script, "flow", np.full((30, 3), 10 + index))
    rows = labelled_rows(store, scripts, ["rgb", "flow"])
    assert list(rows) == ["rgb", "flow", "both"]
    assert rows["both"][0][[0, 59]].tolist() == [[0, 0, 10, 10, 10], [1, 1, 11, 11, 11]]
    middle = 3.5 * scripts[1].duration_seconds / 30
    for _, labels in rows.values():
        assert ACTION_NAMES[labels[33]] == action_at(scripts[1], middle)
    assert list(labelled_rows(store, scripts, ["flow"])) == ["flow"]


def test_rows_of_other_times_are_refused(tmp_path):
    store, script = FeatureStore(tmp_path), sample_script(0, 8)
    save_rows(store, script, "rgb", np.zeros((30, 2)))
    save_rows(store, script, "flow", np.zeros((15, 2)))
    with pytest.raises(MmdistError, match="one fps, window and stride"):
        labelled_rows(store, [script], ["rgb", "flow"])


def test_the_probe_finds_what_is_linear_and_nothing_in_noise(monkeypatch):
    monkeypatch.setattr(probe_module, "FIT_STEPS", 100)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, K, 1200)
    codes = rng.normal(size=(K, 32))
    clear = (codes[labels] + 0.1 * rng.normal(size=(1200, 32))).astype(np.float32)
    noise = rng.normal(size=(1200, 32)).astype(np.float32)
    train, test = slice(0, 800), slice(800, None)
    scores = [
        score(fit((rows[train], labels[train]), (rows[test], labels[test])), labels[test])
        for rows in (clear, noise)
    ]
    assert scores[0]["accuracy"] > 95
    assert scores[1]["accuracy"] < 3 * 100 / K


def test_scores_are_what_they_say():
    opens, closes, waves = (ACTION_NAMES.index(name) for name in ("opens", "closes", "waves"))
    labels = np.array([opens] * 4 + [closes] * 2 + [waves] * 2)
    logits = np.zeros((8, K), dtype=np.float32)
    logits[:, waves] = 5  # every row is told to wave
    logits[0, opens] = 9  # but one that opens
    logits[1:3, opens] = 1  # two more are nearer to opening than to closing
    logits[3, closes] = logits[4, closes] = logits[5, opens] = 1
    scores = score(logits, labels)
    assert scores["accuracy"] == 37.5  # 3 of 8
    assert scores["recall"] == {"opens": 25.0, "closes": 0.0, "waves": 100.0}
    assert scores["balanced_accuracy"] == 41.67
    assert scores["opposites"] == {"opens / closes": 62.5}  # (3/4 + 1/2) / 2


def test_every_pair_of_opposites_is_scored_once_all_actions_are_shown():
    scores = score(np.eye(K, dtype=np.float32), np.arange(K))
    assert scores["opposites"] == {" / ".join(pair): 100.0 for pair in OPPOSITES}


def world_of(folder, videos: int, version: int = WORLD_VERSION) -> None:
    facts = {"world_version": version, "seed": 0, "videos": videos}
    (folder / "world.json").write_text(json.dumps(facts))


def test_the_probe_compares_modalities_and_untrained_copies(tmp_path, monkeypatch):
    """Rows are made up where extraction would be: rgb knows nothing, flow knows every action."""
    world_of(tmp_path, 40)
    rng = np.random.default_rng(0)

    def extract_many(videos, specs, store):
        for video in videos:
            script = sample_script(0, int(video.id[-5:]))
            middles = (np.arange(30) + 0.5) * script.duration_seconds / 30
            for spec in specs:
                rows = rng.normal(size=(30, K))
                if spec.modality == "flow" and spec.name != "untrained":
                    codes = [ACTION_NAMES.index(action_at(script, t)) for t in middles]
                    rows = np.eye(K)[codes] + 0.01 * rows
                save_rows(store, script, spec.modality, rows)
        return Report

    class Report:
        failed = ()

    class Spec:
        def __init__(self, modality: str, name: str = "trained") -> None:
            self.modality, self.name = modality, name

    monkeypatch.setattr(probe_module, "extract_many", extract_many)
    monkeypatch.setattr(probe_module, "FIT_STEPS", 50)
    monkeypatch.setattr(probe_module, "describe", Spec)
    monkeypatch.setattr(
        probe_module, "untrained_copy", lambda spec, folder: Spec(spec.modality, "untrained")
    )
    results = probe(tmp_path, ["rgb", "flow"], say=lambda line: None)
    assert (results["train_rows"], results["test_rows"]) == (28 * 30, 8 * 30)
    accuracy = {
        name: {m: results[name][m]["accuracy"] for m in results[name]}
        for name in ("trained", "untrained")
    }
    assert accuracy["trained"]["flow"] > 95
    assert accuracy["trained"]["both"] > 90
    assert max(*accuracy["untrained"].values(), accuracy["trained"]["rgb"]) < 60
    assert json.loads(json.dumps(results)) == results
    lines = table(results)
    assert [cell.strip() for cell in lines[0].split("|")[2:-1]] == ["rgb", "flow", "both"]
    assert len({len(line) for line in lines}) == 1
    wanted = [str(accuracy["trained"][m]) for m in ("rgb", "flow", "both")]
    assert [cell.strip() for cell in lines[2].split("|")[2:-1]] == wanted
    assert any("untrained" in line for line in lines)
    alone = probe(tmp_path, ["rgb", "flow"], untrained=False, say=lambda line: None)
    assert "untrained" not in alone
    assert alone["trained"].keys() == results["trained"].keys()
    assert len(table(alone)) == len(lines) - 2


def test_the_probe_refuses_another_version_of_the_world(tmp_path):
    world_of(tmp_path, 1, version=99)
    with pytest.raises(MmdistError, match="version 99"):
        probe(tmp_path, ["world2-rgb"], say=lambda line: None)


def test_the_probe_refuses_two_extractors_of_one_modality(tmp_path):
    world_of(tmp_path, 1)
    with pytest.raises(MmdistError, match="one extractor per modality; these are all rgb"):
        probe(tmp_path, ["world2-rgb", "world2-rgb"], say=lambda line: None)
