"""Training end to end on a toy world of coloured segments: it learns, resumes, and repeats."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmdist_e2e.grounding import train
from mmdist_e2e.grounding.checkpoint import load_checkpoint
from mmdist_e2e.grounding.evaluate import evaluate_run
from mmdist_e2e.store import FeatureStore
from mmdist_e2e.structures import Features, MmdistError, Provenance
from mmdist_e2e.weights.words import WordVectors, shipped_word_vectors

ACTIONS = ("opens", "sits", "reads", "eats", "waves", "sleeps")
SMALL: dict[str, Any] = {
    "hidden": 32, "heads": 2, "layers": 1, "feed_forward": 48, "length": 16, "dropout": 0.0,
    "frame_divisor": 1.0, "diversity_prior": 0.146 * 49 / 15,
    "diversity_weight": 5 * (15 / 49) ** 2, "precision": "fp32", "epochs": 2, "batch_size": 16,
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tensors this small are slower on two threads than on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_world(root: Path, videos: int = 36, *, window: int = 16) -> None:
    """Three actions a video one after the other, each with a direction of its own."""
    directions = np.random.default_rng(0).normal(size=(len(ACTIONS), 8)) * 2
    store = FeatureStore(root / "features")
    lines: dict[str, list[str]] = {"train": [], "val": []}
    for i in range(videos):
        rng = np.random.default_rng(i + 1)
        shown = rng.choice(len(ACTIONS), 3, replace=False)
        data = np.repeat(directions[shown], 8, axis=0) + rng.normal(size=(24, 8)) * 0.3
        edges = np.linspace(0, 24.0, 25)
        provenance = Provenance({"extractor": "toy", "window": window})
        times = np.stack([edges[:-1], edges[1:]], axis=1)
        store.save(f"v{i}", Features(data.astype(np.float32), times, 24.0, "rgb", provenance))
        for k, action in enumerate(shown):
            line = f"v{i} {8 * k} {8 * k + 8}##a person {ACTIONS[action]}."
            lines["val" if i % 6 == 5 else "train"].append(line)
    for split, written in lines.items():
        (root / f"{split}.txt").write_text("\n".join(written))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("toy")
    make_world(root)
    return root


def run(
    world: Path, out: Path, *, seed: int = 0, recipe: str = "cpl", **overrides: Any
) -> dict[str, Any]:
    settings = {**SMALL, **overrides}
    return train.train_run(
        recipe_name=recipe, preset="small", features_path=world / "features",
        train_path=world / "train.txt", val_path=settings.pop("val", world / "val.txt"),
        out=out, seed=seed, carve=settings.pop("carve", 0.0),
        word_vectors=settings.pop("vectors", shipped_word_vectors()),
        tensorboard=settings.pop("tensorboard", False), overrides=settings,
    )  # fmt: skip


@pytest.mark.slow
def test_it_learns_and_answers(world: Path, tmp_path: Path) -> None:
    # Long enough for every seed: 88 to 100 over five; at 20 epochs luck decided (37 to 99).
    summary = run(
        world, tmp_path / "run", epochs=45, learning_rate=1e-3, batch_size=8, layers=2, hidden=64,
        feed_forward=64, heads=4, dropout=0.1, select_by="last",
    )  # fmt: skip
    first, last = summary["history"][0]["losses"], summary["history"][-1]["losses"]
    assert last["loss"] < 0.7 * first["loss"]
    result = evaluate_run(
        tmp_path / "run", features_path=world / "features", annotations_path=world / "train.txt"
    )
    ours, controls = result["metrics"]["R@1,IoU=0.5"], result["controls"]
    assert ours > controls["random own proposal"]["R@1,IoU=0.5"] + 20
    assert ours > controls["shuffled queries"]["R@1,IoU=0.5"] + 20
    assert ours > controls["untrained network"]["R@1,IoU=0.5"]
    written = Path(result.pop("out"))
    assert written.parent == tmp_path / "run" / "evaluations"
    assert json.loads((written / "metrics.json").read_text()) == result
    assert len((written / "predictions.jsonl").read_text().splitlines()) == result["queries"]

    model = load_checkpoint(tmp_path / "run")
    features = FeatureStore(world / "features").load("v0", "rgb")
    row = json.loads((written / "predictions.jsonl").read_text().splitlines()[0])
    moments = model.answer({"rgb": features}, row["sentence"])
    assert len(moments) == 8
    assert [m.score for m in moments] == sorted((m.score for m in moments), reverse=True)
    assert all(0 <= m.start <= m.end <= 24 for m in moments)
    # One alone answers as the evaluation did in a batch.
    flat = [[m.start, m.end, m.score] for m in moments]
    np.testing.assert_allclose(flat, row["moments"], atol=2e-3)


def test_the_baseline_learns_where_its_map_is_bright(world: Path, tmp_path: Path) -> None:
    # Six actions make half of all negatives false ones: a higher temperature bears that.
    run(
        world, tmp_path / "run", recipe="baseline", epochs=12, learning_rate=3e-3, batch_size=8,
        temperature=0.3, select_by="last",
    )  # fmt: skip
    result = evaluate_run(
        tmp_path / "run", features_path=world / "features", annotations_path=world / "val.txt"
    )
    ours, controls = result["metrics"]["mIoU"], result["controls"]
    for control in ("random own proposal", "shuffled queries", "untrained network"):
        assert ours > controls[control]["mIoU"] + 20, control
    model = load_checkpoint(tmp_path / "run")
    features = FeatureStore(world / "features").load("v5", "rgb")
    moments = model.answer({"rgb": features}, "a person opens")
    assert [m.score for m in moments] == sorted((m.score for m in moments), reverse=True)


@pytest.mark.parametrize("recipe", ["cpl", "baseline"])
def test_a_long_video_is_read_in_windows(world: Path, tmp_path: Path, recipe: str) -> None:
    run(world, tmp_path / "run", epochs=1, recipe=recipe)
    model = load_checkpoint(tmp_path / "run")
    store = FeatureStore(world / "features")
    parts = [store.load(f"v{i}", "rgb") for i in range(3)]
    data = np.concatenate([part.data for part in parts])
    times = np.concatenate([part.times + 24 * i for i, part in enumerate(parts)])
    long = Features(data, times, 72.0, "rgb", parts[0].provenance)
    moments = model.answer({"rgb": long}, "a person sits")
    assert max(m.end for m in moments) > 48
    assert all(0 <= m.start <= m.end <= 72 for m in moments)
    assert max(m.end - m.start for m in moments) <= 24
    # Windows 0, 2 and 4 are the three videos: none of their answers may be lost to a worse one.
    alone = [model.answer({"rgb": part}, "a person sits")[0].score for part in parts]
    assert moments[0].score >= max(alone) - 1e-5


def bits(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_the_same_call_gives_the_same_bits(world: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        torch.manual_seed(hash(name) % 1000)  # the caller's random state must not matter
        run(world, tmp_path / name, dropout=0.2, precision="bf16")
    run(world, tmp_path / "c", dropout=0.2, precision="bf16", seed=1)
    assert bits(tmp_path / "a" / "last") == bits(tmp_path / "b" / "last")
    assert bits(tmp_path / "a" / "last") != bits(tmp_path / "c" / "last")


class Killed(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize(
    "settings",
    [
        {"recipe": "cpl"},
        {"recipe": "baseline"},
        {"recipe": "baseline", "local_weight": 0, "score_weight": 0},
    ],
    ids=["cpl", "baseline", "without local"],
)
def test_resumed_equals_uninterrupted(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    settings = {**settings, "epochs": 4, "dropout": 0.2}
    whole = run(world, tmp_path / "whole", **settings)

    original = train.Trainer.run_epoch

    def killed(self: train.Trainer, progress: Any = None) -> dict[str, float]:
        if self.state.epoch == 2:
            original(self, progress)  # killed after its work, before it is saved
            raise Killed
        return original(self, progress)

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "run_epoch", killed)
        with pytest.raises(Killed):
            run(world, tmp_path / "parts", **settings)
    assert len(json.loads((tmp_path / "parts" / "history.json").read_text())) == 2
    parts = run(world, tmp_path / "parts", **settings)
    assert bits(tmp_path / "parts" / "last") == bits(tmp_path / "whole" / "last")
    assert bits(tmp_path / "parts") == bits(tmp_path / "whole")
    assert parts["history"] == whole["history"]
    logs = [(tmp_path / name / "history.json").read_text() for name in ("parts", "whole")]
    assert logs[0] == logs[1]
    assert (whole["how"], parts["how"]) == ("trained", "resumed after epoch 2")


def test_annotated_times_do_not_reach_training(world: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(world, moved)
    lines = (moved / "train.txt").read_text().splitlines()
    (moved / "train.txt").write_text(
        "\n".join(f"{line.split()[0]} 0 1##{line.split('##')[1]}" for line in lines)
    )
    run(world, tmp_path / "a")
    run(moved, tmp_path / "b")
    assert bits(tmp_path / "a" / "last") == bits(tmp_path / "b" / "last")


def test_without_validation_the_last_epoch_is_the_checkpoint(world: Path, tmp_path: Path) -> None:
    summary = run(world, tmp_path / "run", val=None)
    assert summary["best_epoch"] == 2
    assert "no validation" in summary["selected_by"]
    assert bits(tmp_path / "run") == bits(tmp_path / "run" / "last")


def test_the_history_holds_every_term_and_figure(world: Path, tmp_path: Path) -> None:
    told: list[str] = []
    train.train_run(
        recipe_name="baseline", features_path=world / "features", train_path=world / "train.txt",
        val_path=world / "val.txt", out=tmp_path, seed=0, word_vectors=shipped_word_vectors(),
        overrides=SMALL, progress=lambda what, *_: told.append(what),
    )  # fmt: skip
    with (tmp_path / "log.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    history = json.loads((tmp_path / "history.json").read_text())
    for row, entry in zip(rows, history, strict=True):
        assert int(row.pop("epoch")) == entry["epoch"]
        expected = {**entry["losses"]}
        expected |= {f"validation {name}": value for name, value in entry["validation"].items()}
        assert {name: float(value) for name, value in row.items()} == expected
    losses = history[-1]["losses"]
    assert losses["loss"] == pytest.approx(
        losses["reconstruction"] + losses["whole"] + losses["hinge_whole"] + losses["hinge_left"]
        + losses["hinge_right"] + SMALL["diversity_weight"] * losses["diversity"]
        + 4.5 * losses["local"], rel=1e-5,
    )  # fmt: skip
    best = history[-1]["validation"]
    assert f"R@1 {best['R@1,IoU=0.5']:.2f}, R@5 {best['R@5,IoU=0.5']:.2f}" in told[-1]


def test_tensorboard_has_the_figures_of_the_log_once_each(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was killed, resumed or finished before, and the weights are the same without."""
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    original = train.Trainer.save_state

    def killed(self: train.Trainer, *arguments: Any) -> None:
        if self.state.epoch == 2:
            raise Killed
        original(self, *arguments)

    def events(folder: Path) -> list[tuple[str, int, float]]:
        return [
            (value.tag, event.step, value.tensor.float_val[0])
            for path in sorted((folder / "tensorboard").iterdir())
            for event in loader.EventFileLoader(str(path)).Load()
            for value in event.summary.value
        ]

    run(world, tmp_path / "without", epochs=3, dropout=0.2)
    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "save_state", killed)
        with pytest.raises(Killed):
            run(world, tmp_path / "with", epochs=3, dropout=0.2, tensorboard=True)
    for how in ("resumed after epoch 1", "finished before"):
        done = run(world, tmp_path / "with", epochs=3, dropout=0.2, tensorboard=True)
        assert done["how"] == how
        with (tmp_path / "with" / "log.csv").open() as stream:
            rows = list(csv.DictReader(stream))
        expected = [
            (name, int(row["epoch"]), pytest.approx(float(value), rel=1e-6))
            for row in rows
            for name, value in row.items()
            if name != "epoch"
        ]
        assert len(rows) == 3
        assert events(tmp_path / "with") == expected
    assert bits(tmp_path / "with" / "last") == bits(tmp_path / "without" / "last")
    assert not (tmp_path / "without" / "tensorboard").exists()
    run(world, tmp_path / "without", epochs=3, dropout=0.2, tensorboard=True)  # asked for later
    assert events(tmp_path / "without") == events(tmp_path / "with")


def test_without_the_tensorboard_package_nothing_is_started(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "find_spec", lambda name: None)
    with pytest.raises(MmdistError, match=r"pip install 'mmdist-e2e\[tensorboard\]'"):
        run(world, tmp_path / "run", tensorboard=True)
    assert not (tmp_path / "run").exists()


def test_a_limited_vocabulary_keeps_the_most_frequent_words(world: Path, tmp_path: Path) -> None:
    """The others are read, and are neither predicted nor scored."""
    run(world, tmp_path / "all", epochs=1)
    run(world, tmp_path / "few", epochs=1, vocabulary_limit=4)
    kept = [
        json.loads((tmp_path / name / "vocabulary.json").read_text())["words"]
        for name in ("all", "few")
    ]
    assert kept[1] == kept[0][:4]
    assert len(kept[0]) > 4
    few = load_checkpoint(tmp_path / "few")
    assert few.recipe.model.vocabulary_size == 4
    sentence = few.vocabulary.encode(f"person {kept[0][-1]}")
    assert sentence.tokens == ("person", kept[0][-1])
    assert sentence.ids_W[1] == 0


def test_validation_is_carved_by_video_where_none_is_given(world: Path, tmp_path: Path) -> None:
    summary = run(world, tmp_path / "run", val=None, carve=0.2)
    assert "6 of 30 videos" in summary["selected_by"]
    assert summary["queries"] == 72
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["selected_by"] == summary["selected_by"]
    assert config["trained_on"].startswith("72 sentences of train.txt (90 queries")
    assert "R@1,IoU=0.5" in config["validation"]
    with pytest.raises(MmdistError, match=r"carve is 0\.2 there and 0\.1 here"):
        run(world, tmp_path / "run", val=None, carve=0.1)


def test_a_map_answers_words_that_training_never_rebuilt(world: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"epochs": 1, "recipe": "baseline"}
    words = ("a", "person", ".", *ACTIONS, "unseen")
    rows = np.random.default_rng(0).normal(size=(len(words), 6)).astype(np.float32)
    features = {"rgb": FeatureStore(world / "features").load("v0", "rgb")}
    run(world, tmp_path / "map", vectors=WordVectors("mine", words, rows), **settings)
    model = load_checkpoint(tmp_path / "map")
    moments = model.answer(features, "unseen")
    assert len({m.score for m in moments}) > 1
    assert all(abs(m.score) <= 3.0 for m in moments)  # γ · cosine, r_p = 0


def test_a_checkpoint_carries_word_vectors_that_are_not_shipped(
    world: Path, tmp_path: Path
) -> None:
    words = ("a", "person", ".", *ACTIONS, "unseen")
    rows = np.random.default_rng(0).normal(size=(len(words), 6)).astype(np.float32)
    run(world, tmp_path / "run", epochs=1, vectors=WordVectors("mine", words, rows))
    model = load_checkpoint(tmp_path / "run")
    assert model.recipe.model.word_dim == 6
    np.testing.assert_array_equal(model.vocabulary.vectors.vectors_VE, rows)
    assert model.vocabulary.encode("unseen person").ids_W[0] == 0
    with pytest.raises(MmdistError, match="was trained on"):
        model.check_query("unseen")
    (tmp_path / "run" / "words.safetensors").unlink()
    with pytest.raises(MmdistError, match=r"words\.safetensors"):
        load_checkpoint(tmp_path / "run")


def test_checkpoints_refuse_what_does_not_fit(world: Path, tmp_path: Path) -> None:
    run(world, tmp_path / "run", epochs=1)
    model = load_checkpoint(tmp_path / "run")
    assert "seed 0" in model.name
    assert "train.txt" in model.trained_on
    make_world(tmp_path / "other", 6, window=32)
    with pytest.raises(MmdistError, match="window is 32 where the model needs 16"):
        evaluate_run(
            tmp_path / "run", features_path=tmp_path / "other" / "features",
            annotations_path=tmp_path / "other" / "val.txt",
        )  # fmt: skip
    with pytest.raises(MmdistError, match="needs rgb"):
        model.answer({}, "person opens")
    (tmp_path / "run" / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(MmdistError, match="cannot be loaded"):
        load_checkpoint(tmp_path / "run")
    with pytest.raises(MmdistError, match="not a checkpoint"):
        load_checkpoint(tmp_path)


def test_a_video_in_both_splits_is_refused(world: Path, tmp_path: Path) -> None:
    with pytest.raises(MmdistError, match="both the training and the validation"):
        run(world, tmp_path / "run", val=world / "train.txt")


def test_learning_rate_and_negatives() -> None:
    rates = [train.learning_rate(n, peak=4e-4, warmup=400) for n in range(2000)]
    assert rates[0] == 1e-7
    assert rates[200] == pytest.approx(1e-7 + 0.5 * (4e-4 - 1e-7))
    assert rates[400] == pytest.approx(4e-4)
    assert rates[1600] == pytest.approx(2e-4)
    assert [train.negative_ratio(e, 4, 0.5) for e in (1, 4, 9)] == [0.5, 1.0, 1.0]
    assert train.negative_ratio(1, 30, 0.0) == 1.0
