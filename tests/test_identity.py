"""Results are identified by everything that they were made from, and by nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_train import Killed, _one_thread, bits, make_world, run

from mmdist_e2e.grounding import train
from mmdist_e2e.grounding.checkpoint import load_checkpoint
from mmdist_e2e.grounding.evaluate import evaluate_run
from mmdist_e2e.store import FeatureStore
from mmdist_e2e.structures import Features, MmdistError
from mmdist_e2e.weights.words import WordVectors, shipped_word_vectors

__all__ = ["_one_thread"]  # a fixture


@pytest.fixture
def world(tmp_path: Path) -> Path:
    make_world(tmp_path / "world", 12)
    return tmp_path / "world"


def small(world: Path, out: Path, **settings: Any) -> dict[str, Any]:
    return run(world, out, **{"hidden": 8, "feed_forward": 8, "proposals": 2, **settings})


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def nudge_features(world: Path) -> None:
    """One value of one video, which the mean of resampling still shows."""
    store = FeatureStore(world / "features")
    features = store.load("v0", "rgb")
    features.data[3, 2] += 0.01
    store.save("v0", features)


def swap_lines(world: Path) -> None:
    lines = (world / "train.txt").read_text().splitlines()
    (world / "train.txt").write_text("\n".join([lines[1], lines[0], *lines[2:]]))


def other_vectors() -> WordVectors:
    vectors = shipped_word_vectors()
    return WordVectors(vectors.name, vectors.words, vectors.vectors_VE * np.float32(1.5))


CHANGES: dict[str, tuple[Callable[[Path], None], dict[str, Any], str]] = {
    "a sentence": (
        lambda w: edit(w / "train.txt", "person", "man"), {}, r"other annotations \(train\)"
    ),
    "order": (swap_lines, {}, r"other annotations \(train\)"),
    "a validation moment": (
        lambda w: edit(w / "val.txt", " 8##", " 7.5##"), {}, r"other annotations \(validation\)"
    ),
    "features": (nudge_features, {}, r"other features \(rgb\)"),
    "word vectors": (lambda w: None, {"vectors": other_vectors()}, "other word vectors"),
    "a setting": (
        lambda w: None, {"learning_rate": 0.002}, r"learning_rate is 0\.0004 there and 0\.002 here"
    ),
    "the seed": (lambda w: None, {"seed": 7}, "seed is 0 there and 7 here"),
    "the recipe": (lambda w: None, {"recipe": "baseline"}, "recipe is cpl there and baseline here"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("interrupted", [False, True], ids=["finished", "interrupted"])
def test_a_run_of_other_inputs_is_refused_and_kept(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: str,
    interrupted: bool,
) -> None:
    apply, options, message = CHANGES[change]
    original = train.Trainer.run_epoch

    def killed(self: train.Trainer, progress: Any = None) -> dict[str, float]:
        if self.state.epoch == 1:
            raise Killed
        return original(self, progress)

    with monkeypatch.context() as patch:
        if interrupted:
            patch.setattr(train.Trainer, "run_epoch", killed)
            with pytest.raises(Killed):
                small(world, tmp_path / "run")
        else:
            small(world, tmp_path / "run")
    before = bits(tmp_path / "run")
    apply(world)
    with pytest.raises(MmdistError, match=message) as error:
        small(world, tmp_path / "run", **options)
    assert "another --out" in str(error.value)
    assert str(error.value).count(" there and ") <= 1 or change == "the recipe"
    assert bits(tmp_path / "run") == before


def test_names_of_files_do_not_matter(world: Path, tmp_path: Path) -> None:
    first = small(world, tmp_path / "run", val=world / "val.txt")
    moved = tmp_path / "elsewhere"
    shutil.copytree(world, moved)
    (moved / "val.txt").rename(moved / "other.txt")
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    again = small(moved, tmp_path / "run", val=moved / "other.txt")
    assert (first["how"], again["how"]) == ("trained", "finished before")
    assert again["history"] == first["history"]
    assert again["validation"] == first["validation"]
    assert files == {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}


def test_a_finished_run_continues_to_more_epochs(world: Path, tmp_path: Path) -> None:
    small(world, tmp_path / "run", epochs=2)
    with pytest.raises(MmdistError, match="holds a run of 2 of 2 epochs, and 1 are wanted"):
        small(world, tmp_path / "run", epochs=1)
    more = small(world, tmp_path / "run", epochs=4)
    assert [entry["epoch"] for entry in more["history"]] == [1, 2, 3, 4]
    assert more["how"] == "resumed after epoch 2"
    (told,) = more["continued"]
    assert "Epochs 1 to 2 were trained as part of 2, the following as part of 4" in told
    assert told in (tmp_path / "run" / "last" / "README.md").read_text()
    again = small(world, tmp_path / "run", epochs=4)
    assert (again["how"], again["continued"]) == ("finished before", [told])


def test_continued_equals_planned_where_no_schedule_depends_on_the_epochs(
    world: Path, tmp_path: Path
) -> None:
    constant = {"warmup_updates": 3, "negative_growth": 0.0, "dropout": 0.2}
    small(world, tmp_path / "parts", epochs=1, **constant)
    small(world, tmp_path / "parts", epochs=3, **constant)
    small(world, tmp_path / "whole", epochs=3, **constant)
    assert bits(tmp_path / "parts" / "last") == bits(tmp_path / "whole" / "last")
    assert bits(tmp_path / "parts") == bits(tmp_path / "whole")


def test_what_no_run_can_be_told_of_is_refused(world: Path, tmp_path: Path) -> None:
    small(world, tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "model")
    (tmp_path / "model" / "state.safetensors").unlink()
    with pytest.raises(MmdistError, match="a checkpoint without its training state"):
        small(world, tmp_path / "model")
    (tmp_path / "run" / "model.safetensors").unlink()
    with pytest.raises(MmdistError, match="a training state without its checkpoint"):
        small(world, tmp_path / "run")
    state = (tmp_path / "run" / "state.safetensors").read_bytes()
    assert b'\\"digests\\"' in state
    (tmp_path / "run" / "state.safetensors").write_bytes(state.replace(b"digests", b"digestZ"))
    with pytest.raises(MmdistError, match="inputs are not recorded"):
        small(world, tmp_path / "run")


@pytest.mark.parametrize("spoilt", ["features", "rate", "last update"])
def test_a_loss_that_is_not_finite_ends_training_and_saves_nothing(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoilt: str
) -> None:
    settings: dict[str, Any] = {}
    if spoilt == "features":
        store = FeatureStore(world / "features")
        features = store.load("v0", "rgb")
        features.data[:, :] = 1e30
        store.save("v0", features)
    elif spoilt == "rate":
        settings["learning_rate"] = 1e30
    else:  # every loss of the epoch is finite, the weights after it are not
        original = train.Trainer.update

        def update(self: train.Trainer, loss: torch.Tensor) -> None:
            original(self, loss)
            if self.state.updates == 2:
                next(self.model.parameters()).data[0] = float("nan")

        monkeypatch.setattr(train.Trainer, "update", update)
        settings["batch_size"] = 15  # 30 sentences: two updates an epoch
    with pytest.raises(MmdistError, match="no longer finite in epoch 1"):
        small(world, tmp_path / "run", select_by="last", **settings)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"state.safetensors"}
    monkeypatch.undo()
    if spoilt == "rate":  # nothing was made, so other settings may follow
        assert small(world, tmp_path / "run", learning_rate=1e-4)["how"] == "trained"


def lengthen(world: Path, video: str, factor: int) -> None:
    """The same rows over and over, as a video that lasts so much longer."""
    store = FeatureStore(world / "features")
    one = store.load(video, "rgb")
    times = np.concatenate([one.times + i * one.duration_seconds for i in range(factor)])
    rng = np.random.default_rng(0)
    data = np.concatenate([one.data + rng.normal(size=one.data.shape) * 0.5 for _ in range(factor)])
    seconds = one.duration_seconds * factor
    store.save(video, Features(data.astype(np.float32), times, seconds, "rgb", one.provenance))


@pytest.mark.parametrize("recipe", ["cpl", "baseline"])
def test_validation_evaluate_and_ground_give_one_answer(
    world: Path, tmp_path: Path, recipe: str
) -> None:
    """Trained in bf16, with a long video among those of validation."""
    lengthen(world, "v5", 3)
    summary = run(world, tmp_path / "run", recipe=recipe, precision="bf16", proposals=5)
    features = {"features_path": world / "features"}
    result = evaluate_run(tmp_path / "run", annotations_path=world / "val.txt", **features)
    validation = dict(summary["validation"])
    del validation["loss"]
    assert validation == pytest.approx(result["metrics"], abs=1e-9)
    model = load_checkpoint(tmp_path / "run")
    store, counts = FeatureStore(world / "features"), set()
    for line in (Path(result["out"]) / "predictions.jsonl").read_text().splitlines():
        row = json.loads(line)
        answer = model.answer({"rgb": store.load(row["video"], "rgb")}, row["sentence"])
        moments = [[m.start, m.end, m.score] for m in answer]
        np.testing.assert_allclose(row["moments"], moments, atol=2e-3)
        counts.add(len(moments))
    assert len(counts) > 1  # a merged answer has another number of moments
    assert max(moment[1] for moment in moments) <= 24


def test_answers_are_in_the_features_seconds(world: Path, tmp_path: Path) -> None:
    """As `mmdist ground` gives them, whatever duration the annotations name."""
    small(world, tmp_path / "run")
    rows = [["v5", 30.0, [3, 9], "a person sits."]]  # the features say 24 seconds
    (tmp_path / "c.json").write_text(json.dumps(rows))
    result = evaluate_run(
        tmp_path / "run", features_path=world / "features", annotations_path=tmp_path / "c.json"
    )
    (line,) = (Path(result["out"]) / "predictions.jsonl").read_text().splitlines()
    features = FeatureStore(world / "features").load("v5", "rgb")
    answer = load_checkpoint(tmp_path / "run").answer({"rgb": features}, rows[0][3])
    moments = [[m.start, m.end, m.score] for m in answer]
    np.testing.assert_allclose(json.loads(line)["moments"], moments, atol=2e-3)


def test_every_evaluation_has_its_own_folder(world: Path, tmp_path: Path) -> None:
    small(world, tmp_path / "run")
    late = [["v5", 24.0, [3, 9], "person sits"], ["v5", 24.0, [3, 25], "person reads"]]
    for folder, rows in (("a", late), ("b", late[:1])):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "test.json").write_text(json.dumps(rows))

    def evaluate(folder: str, **options: Any) -> dict[str, Any]:
        return evaluate_run(
            tmp_path / "run", features_path=world / "features",
            annotations_path=tmp_path / folder / "test.json", **options,
        )  # fmt: skip

    official, cpl, other = evaluate("a"), evaluate("a", protocol="cpl"), evaluate("b")
    nudge_features(world)
    nudged = evaluate("a")
    # v0 is not asked about, so its features do not enter.
    assert nudged["out"] == official["out"]
    lengthen(world, "v5", 2)
    longer = evaluate("a")
    results = [official, cpl, other, longer]
    assert len({result["out"] for result in results}) == 4
    for result in results:
        kept = json.loads((Path(result["out"]) / "metrics.json").read_text())
        assert kept == {k: v for k, v in result.items() if k != "out"}
    out = tmp_path / "mine"
    assert evaluate("a", out=out)["queries"] == 2
    assert evaluate("a", out=out)["queries"] == 2  # the same once more
    before = (out / "metrics.json").read_bytes()
    with pytest.raises(MmdistError, match="protocol is official there and cpl here"):
        evaluate("a", out=out, protocol="cpl")
    with pytest.raises(MmdistError, match="other annotations"):
        evaluate("b", out=out)
    assert (out / "metrics.json").read_bytes() == before
    assert (out / "predictions.jsonl").is_file()
