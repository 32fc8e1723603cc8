"""`mmdist train baseline`, then `mmdist evaluate`, on HDF5 features and CPL rows, as people do."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from mmdist_e2e.cli.main import main
from mmdist_e2e.grounding import evaluate as evaluation

ACTIONS = ("opens", "sits", "reads", "eats")
SMALL = ["--preset=small"] + [
    f"--set={setting}"
    for setting in (
        "hidden=16", "heads=2", "layers=1", "feed_forward=24", "frame_divisor=1", "batch_size=8",
        "precision=fp32",
    )
]  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features, annotations of three splits and word vectors of a world of two actions a video."""
    h5py = pytest.importorskip("h5py")
    root = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(len(ACTIONS), 6))
    rows: dict[str, list[object]] = {"A": [], "B": [], "C": []}
    with h5py.File(root / "F.hdf5", "w") as file:
        for i in range(20):
            shown = rng.choice(len(ACTIONS), 2, replace=False)
            noise = rng.normal(size=(16, 6)) * 0.1
            data = np.repeat(directions[shown], 8, axis=0) + noise
            file[f"v{i}"] = data.astype(np.float16)
            for k, action in enumerate(shown):
                span, sentence = [10.0 * k, 10.0 * k + 10], f"person {ACTIONS[action]}."
                rows["BC"[i % 2] if i >= 14 else "A"].append([f"v{i}", 20.0, span, sentence])
    for name, split in rows.items():
        (root / f"{name}.json").write_text(json.dumps(split))
    words = ("person", ".", *ACTIONS)
    lines = [f"{w} {' '.join(f'{x:.4f}' for x in rng.normal(size=4))}" for w in words]
    (root / "glove.txt").write_text("\n".join(lines) + "\n")
    return root


def mmdist(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def train(files: Path, out: Path, *more: object, recipe: str = "baseline") -> Result:
    data = ["--features", files / "F.hdf5", "--train", files / "A.json"]
    words = ["--glove", files / "glove.txt", "--length", 16, "--epochs", 2]
    return mmdist("train", recipe, *data, *words, "--out", out, *SMALL, *more)


def evaluate(files: Path, run: Path, *more: object) -> dict[str, object]:
    data = ["--features", files / "F.hdf5", "--annotations", files / "C.json"]
    result = mmdist("evaluate", run, *data, "--json", *more)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)  # nothing but JSON on stdout


def test_train_with_val_then_evaluate(files: Path, tmp_path: Path) -> None:
    run = train(files, tmp_path, "--val", files / "B.json", "--seed", 3)
    assert run.exit_code == 0, run.output
    assert "recipe baseline, seed 3, 28 queries" in run.stdout
    assert "on B.json" in run.stdout
    result = evaluate(files, tmp_path)
    assert (result["recipe"], result["seed"], result["queries"]) == ("baseline", 3, 6)
    assert set(result["controls"]) == {
        "best constant span", "random own proposal", "untrained network", "shuffled queries"
    }  # fmt: skip
    assert result["metrics"].keys() >= {"R@1,IoU=0.5", "R@5,IoU=0.5", "mIoU"}
    assert evaluate(files, tmp_path, "--device", "cpu") == result


def test_without_val_a_part_of_training_chooses(files: Path, tmp_path: Path) -> None:
    run = train(files, tmp_path, "--carve", 0.3)
    assert run.exit_code == 0, run.output
    assert "carved from the training videos: 4 of 14 videos" in run.stdout
    assert "20 queries" in run.stdout
    assert "carved" in str(evaluate(files, tmp_path)["selected_by"])
    assert "--carve 0.3" in (tmp_path / "README.md").read_text()
    none = train(files, tmp_path / "none", "--carve", 0)
    assert "the last epoch (no validation)" in none.stdout
    assert "--carve 0" in (tmp_path / "none" / "README.md").read_text()
    both = train(files, tmp_path / "both", "--carve", 0.1, "--val", files / "B.json")
    assert both.exit_code == 1
    assert "--carve" in both.output


@pytest.mark.parametrize(
    "settings",
    [
        ["local_weight=0", "score_weight=0"],  # without local
        ["contrast_weight=0"],  # without global
        ["depth=1", "kernel=5", "query=mean", "select_by=val_recall"],
        ["top_divisor=8", "temperature=0.2", "ranking=inside"],
        ["contrast_whole=0", "negatives=0", "diversity_weight=0"],
    ],
)
def test_every_switch_trains_and_answers(files: Path, tmp_path: Path, settings: list[str]) -> None:
    run = train(files, tmp_path, "--epochs", 1, *(f"--set={s}" for s in settings))
    assert run.exit_code == 0, run.output
    config = json.loads((tmp_path / "config.json").read_text())
    parts = [config[p] for p in ("model", "loss", "local", "matching")]
    kept = {k: v for part in parts for k, v in part.items()} | config["training"]
    for setting in settings:
        name, _, value = setting.partition("=")
        assert str(kept[name]).lower() in (
            value,
            f"{value}.0",
            {"0": "false", "1": "true"}.get(value),
        )
        assert f"--set {name}=" in (tmp_path / "README.md").read_text()
    assert evaluate(files, tmp_path)["queries"] == 6


def test_misspelt_settings_are_refused_with_the_valid_ones(files: Path, tmp_path: Path) -> None:
    run = train(files, tmp_path, "--set", "temprature=0.1")
    assert run.exit_code == 1
    assert "no setting 'temprature'" in run.output
    assert "temperature" in run.output
    run = train(files, tmp_path, "--set", "temperature=0.1", recipe="cpl")
    assert run.exit_code == 1
    assert "'cpl' has no setting 'temperature'" in run.output


@pytest.mark.parametrize("value", ["0", "-3", "2.5", "nan", "abc"])
def test_a_length_that_is_not_valid_is_refused(files: Path, tmp_path: Path, value: str) -> None:
    run = train(files, tmp_path, f"--set=length={value}")
    assert run.exit_code == 1
    assert "length must be a whole number at least 1; got" in run.output


def test_the_settings_are_one_table_that_marks_what_differs(files: Path, tmp_path: Path) -> None:
    run = train(files, tmp_path, "--set", "temperature=0.1", "--carve", 0)
    assert run.exit_code == 0, run.output
    lines = run.stderr.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("epoch 1"))
    assert max(map(len, lines[: first - 1])) <= 80
    rows = {name: told for name, *told in (re.split(r"\s*│\s*", x.strip()) for x in lines[:first])}
    assert rows["length"] == ["16", "200"]
    assert rows["ranking"] == ["contrast", "inside"]
    assert rows["heads"] == ["2", "4"]
    assert rows["local_weight"] == ["4.5", ""]
    assert rows["temperature"] == ["0.1", "0.15 (ours)"]  # the paper gives none
    assert rows["warmup_updates"] == ["1", "400"]  # a tenth of ten updates
    assert rows["select_by"] == ["last", "val_loss (ours)"]
    config = json.loads((tmp_path / "config.json").read_text())
    parts = [part for part in config.values() if isinstance(part, dict)]
    assert {name for name in rows if any(name in part for part in parts)} > {"dropout", "epochs"}
    assert "only" not in run.stderr  # `small` needs no advice
    again = train(files, tmp_path, "--set", "temperature=0.1", "--carve", 0)
    assert "heads" not in again.stderr  # nothing is trained


def test_the_papers_preset_is_the_default_and_says_how_small_did(
    files: Path, tmp_path: Path
) -> None:
    data = ["--features", files / "F.hdf5", "--train", files / "A.json", "--epochs", 1]
    tiny = ["--set=hidden=16", "--set=layers=1", "--set=feed_forward=16", "--set=proposals=2"]
    run = mmdist("train", "baseline", *data, *tiny, "--out", tmp_path)
    assert run.exit_code == 0, run.output
    assert "There are only 26 training queries." in run.stderr
    assert "`--preset small` had" in run.stderr
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model"]["length"] == 200
    assert config["local"]["ranking"] == "inside"
    assert config["command"].startswith("mmdist train baseline --preset paper --length 200 ")
    assert config["command"].endswith("--set proposals=2 --set epochs=1")
    near = mmdist("train", "baseline", *data, "--out", tmp_path / "b", "--preset", "papr")
    assert near.exit_code == 2
    assert "'paper'" in near.output


def test_a_finished_run_is_said_to_be_finished(files: Path, tmp_path: Path) -> None:
    first = train(files, tmp_path)
    again = train(files, tmp_path)
    assert again.exit_code == 0, again.output
    assert f"{tmp_path}: finished before" in again.stdout
    assert again.stdout.endswith(first.stdout)
    more = train(files, tmp_path, "--epochs", 3)
    assert more.exit_code == 0, more.output
    assert "Epochs 1 to 2 were trained as part of 2, the following as part of 3" in more.stdout
    assert "of 3 (chosen by" in more.stdout
    fewer = train(files, tmp_path, "--epochs", 2)
    assert fewer.exit_code == 1
    assert "ask for more than 3 with --epochs" in fewer.output
    other = train(files, tmp_path, "--epochs", 3, "--train", files / "B.json")
    assert other.exit_code == 1
    assert "other annotations (train)" in other.output


@pytest.mark.parametrize("command", ["train", "evaluate", "reproduce"])
def test_an_unusable_out_is_refused_before_any_work(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    (tmp_path / "file").write_text("no folder")
    out = ["--out", tmp_path / "file"]
    if command == "train":
        result = train(files, tmp_path, *out, "--glove", tmp_path / "none")
    elif command == "evaluate":
        assert train(files, tmp_path / "run").exit_code == 0
        monkeypatch.setattr(evaluation, "load_features", pytest.fail)
        data = ["--features", files / "F.hdf5", "--annotations", files / "C.json"]
        result = mmdist("evaluate", tmp_path / "run", *data, *out)
    else:
        data = ["--features", tmp_path / "none", "--train", files / "A.json"]
        result = mmdist("reproduce", *data, "--annotations", files / "C.json", *out)
    assert result.exit_code == 1
    assert "--out" in result.output
    assert "none" not in result.output


def test_a_loss_that_is_not_finite_is_one_sentence(files: Path, tmp_path: Path) -> None:
    run = train(files, tmp_path, "--set", "learning_rate=1e30")
    assert run.exit_code == 1
    assert "no longer finite in epoch 1" in run.output
    assert "Traceback" not in run.output
    assert not (tmp_path / "model.safetensors").exists()


def test_help_says_what_the_checkpoint_is_chosen_on() -> None:
    text = " ".join(mmdist("train", "baseline", "--help").output.split())
    assert "train with --carve 0.1, then run `mmdist evaluate" in text
    assert "set aside to choose the checkpoint on" in text
