"""`mmdist train teacher`, then `mmdist train student --teacher RUN`, as people do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from test_cli_train import SMALL, files, mmdist, train

from mmdist_e2e.grounding import teacher as distill
from mmdist_e2e.grounding.answer import Progress, predict
from mmdist_e2e.grounding.checkpoint import load_checkpoint
from mmdist_e2e.grounding.data.annotations import load_annotations
from mmdist_e2e.grounding.data.batches import batches, make_items
from mmdist_e2e.grounding.data.features import load_features
from mmdist_e2e.grounding.train import Trainer
from mmdist_e2e.structures import Features, Provenance

__all__ = ["files"]  # a fixture


@pytest.fixture(scope="module")
def both(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same files with flow, of four channels, in a file of its own; and a teacher's run."""
    import h5py

    root = tmp_path_factory.mktemp("both")
    for path in files.iterdir():
        shutil.copy(path, root)
    rng = np.random.default_rng(1)
    with h5py.File(root / "F.hdf5") as rgb, h5py.File(root / "flow.hdf5", "w") as flow:
        mixing = rng.normal(size=(6, 4))
        for video in rgb:
            flow[video] = (rgb[video][()].astype(np.float32) @ mixing).astype(np.float16)
    run = train(root, root / "teacher", "--flow-features", root / "flow.hdf5", recipe="teacher")
    assert run.exit_code == 0, run.output
    return root


def learn(both: Path, out: Path, *more: object) -> Result:
    flow = ["--flow-features", both / "flow.hdf5", "--teacher", both / "teacher"]
    return train(both, out, *flow, *more, recipe="student")


def test_a_student_skips_what_its_teacher_cannot_read(both: Path, tmp_path: Path) -> None:
    """Videos without flow, which the student itself does not read."""
    import h5py

    first = json.loads((both / "A.json").read_text())[0][0]
    with h5py.File(both / "flow.hdf5") as flow, h5py.File(tmp_path / "f.hdf5", "w") as some:
        for video in set(flow) - {first}:
            some[video] = flow[video][()]
    lacking = ["--flow-features", tmp_path / "f.hdf5", "--epochs", 1]
    told = learn(both, tmp_path / "s", *lacking)
    assert told.exit_code == 1
    assert "1 of" in told.output
    assert "no flow features" in told.output
    run = learn(both, tmp_path / "s", *lacking, "--skip-missing")
    assert run.exit_code == 0, run.output
    assert "train: left out 2 queries of 1 videos" in run.stdout


def test_a_teacher_reads_two_modalities(both: Path, tmp_path: Path) -> None:
    config = json.loads((both / "teacher" / "config.json").read_text())
    assert config["modalities"] == ["rgb", "flow"]
    assert config["mutual"]["channels"] == [6, 4]
    assert config["model"]["feature_dim"] == 10
    data = ["--annotations", both / "C.json", "--features", both / "F.hdf5"]
    result = mmdist(
        "evaluate", both / "teacher", *data, "--flow-features", both / "flow.hdf5", "--json"
    )
    assert json.loads(result.stdout)["recipe"] == "teacher"
    # Without --flow-features RGB would be read twice.
    twice = mmdist("evaluate", both / "teacher", *data, "--json")
    assert twice.exit_code == 1
    assert "--flow-features" in twice.output
    for flow in ([], ["--flow-features", both / "F.hdf5"]):
        assert train(both, tmp_path / "t", *flow, recipe="teacher").exit_code == 1
        assert not (tmp_path / "t").exists()
    model = load_checkpoint(both / "teacher")
    rows = np.ones((16, 6), np.float32)
    edges = np.linspace(0, 20, 17)
    times = np.stack([edges[:-1], edges[1:]], axis=1)
    provenance = Provenance.external("hdf5")
    rgb = Features(rows, times, 20.0, "rgb", provenance)
    flow = Features(rows[:, :4], times, 20.0, "flow", provenance)
    moments = model.answer({"flow": flow, "rgb": rgb}, "person opens.")
    assert len(moments) == 8
    with pytest.raises(Exception, match="needs flow features; these are rgb"):
        model.answer({"rgb": rgb}, "person opens.")


def test_a_student_answers_without_flow(both: Path, tmp_path: Path) -> None:
    run = learn(both, tmp_path / "student")
    assert run.exit_code == 0, run.output
    assert "--teacher teacher --train A.json" in (tmp_path / "student" / "README.md").read_text()
    history = (tmp_path / "student" / "history.json").read_text()
    assert "distill_global" in history
    assert "distill_local" in history
    moved = tmp_path / "alone"
    moved.mkdir()
    shutil.copytree(tmp_path / "student", moved / "student")
    shutil.copy(both / "F.hdf5", moved)
    shutil.copy(both / "C.json", moved)
    shutil.rmtree(tmp_path / "student")
    data = ["--features", moved / "F.hdf5", "--annotations", moved / "C.json"]
    result = mmdist("evaluate", moved / "student", *data, "--json")
    assert result.exit_code == 0, result.output
    assert list(load_checkpoint(moved / "student").modalities) == ["rgb"]


def test_a_killed_student_ends_like_one_that_was_not(
    both: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Trainer.run_epoch

    def killed(self: Trainer, progress: Progress | None = None) -> dict[str, float]:
        if self.state.epoch == 1:
            raise KeyboardInterrupt
        return original(self, progress)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "run_epoch", killed)
        assert learn(both, tmp_path / "a", "--epochs", 2).exit_code != 0
    resumed = learn(both, tmp_path / "a", "--epochs", 2)
    assert "resumed after epoch 1" in resumed.output
    assert learn(both, tmp_path / "b", "--epochs", 2).exit_code == 0
    weights = [(tmp_path / name / "last" / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]


def test_a_student_of_another_teacher_is_refused(both: Path, tmp_path: Path) -> None:
    """Of other weights, of other words for the same weights, or that read other flow."""
    assert learn(both, tmp_path / "run").exit_code == 0
    world = tmp_path / "world"
    shutil.copytree(both, world)
    assert learn(world, tmp_path / "run").exit_code == 0  # the same in another place
    words = json.loads((world / "teacher" / "vocabulary.json").read_text())
    words["words"][:2] = words["words"][1::-1]
    (world / "teacher" / "vocabulary.json").write_text(json.dumps(words))
    refused = learn(world, tmp_path / "run")
    assert refused.exit_code == 1
    assert "other inputs: other teacher." in refused.output
    shutil.rmtree(world / "teacher")
    flow = ["--flow-features", world / "flow.hdf5", "--seed", 1]
    assert train(world, world / "teacher", *flow, recipe="teacher").exit_code == 0
    assert "other inputs: other teacher." in learn(world, tmp_path / "run").output
    shutil.rmtree(world / "teacher")
    shutil.copytree(both / "teacher", world / "teacher")
    import h5py

    with h5py.File(world / "flow.hdf5", "r+") as file:
        file["v0"][0, 0] += 1
    refused = learn(world, tmp_path / "run")
    assert refused.exit_code == 1
    assert "other features for the teacher (flow)" in refused.output


def test_its_answers_are_what_it_answers(both: Path) -> None:
    teacher = load_checkpoint(both / "teacher")
    annotations = load_annotations(both / "A.json")
    places = {"rgb": both / "F.hdf5", "flow": both / "flow.hdf5"}
    table = load_features(places, [a.video for a in annotations], length=16)
    answers = distill.teach(teacher, annotations, table)
    items = make_items(annotations, table, teacher.vocabulary)
    first = predict(teacher.model, items, table)
    starts = (answers.centers_B - answers.widths_B / 2).clamp_min(0)
    np.testing.assert_allclose(starts, first.starts[:, 0], atol=1e-6)
    order = [3, 0, 5]
    batch = next(batches(items, table, 3, order))
    taught = answers.of(batch.items_B)
    np.testing.assert_array_equal(taught.maps_BL, answers.maps_BL[order])
    assert answers.maps_BL.shape == (len(items), 16)


def test_a_student_without_a_fitting_teacher_is_refused(both: Path, tmp_path: Path) -> None:
    none = train(both, tmp_path / "none", recipe="student")
    assert none.exit_code != 0
    assert "--teacher" in none.output
    other = learn(both, tmp_path / "other", "--length", 8, "--set=frame_divisor=1")
    assert other.exit_code == 1
    assert "give --length 16" in other.output
    assert train(both, tmp_path / "cpl", recipe="cpl").exit_code == 0
    silent = train(both, tmp_path / "s", "--teacher", tmp_path / "cpl", recipe="student")
    assert silent.exit_code == 1
    assert "no activation map" in silent.output
    single = train(both, tmp_path / "t", "--modality", "rgb", recipe="teacher")
    assert single.exit_code == 1
    assert "two modalities" in single.output
    assert train(both, tmp_path / "u", "--modality", "sound", recipe="teacher").exit_code == 1


@pytest.mark.slow
def test_from_mp4_a_teacher_takes_both_and_a_student_rgb_alone(
    tiny_run: Path, tiny_extractor: Path, tiny_flow_extractor: Path, tmp_path: Path
) -> None:
    extractors = ["--extractor", tiny_extractor, "--extractor", tiny_flow_extractor]
    made = mmdist(
        "extract", tiny_run / "videos", "--modality", "rgb,flow", *extractors, "--workers", 0,
        "--out", tmp_path / "features",
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    data = ["--features", tmp_path / "features", "--train", tiny_run / "train.txt", "--carve", 0]
    small = [*SMALL, "--epochs", 1, "--length", 48, "--set=proposals=3"]
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    run = mmdist("train", "teacher", *data, *small, "--out", teacher)
    assert run.exit_code == 0, run.output
    run = mmdist("train", "student", *data, *small, "--out", student, "--teacher", teacher)
    assert run.exit_code == 0, run.output
    clip, cache = tiny_run / "videos" / "v0.mp4", tmp_path / "cache"

    def answers(model: Path, *given: object) -> int:
        query = "person opens the door"
        answer = mmdist("ground", clip, query, "--model", model, *given, "--json", "--cache", cache)
        assert answer.exit_code == 0, answer.output
        return len(json.loads(answer.stdout)["moments"])

    assert answers(student, *extractors[:2]) == 3
    assert not list(cache.rglob("*.flow.npz"))
    assert answers(teacher, *extractors) == 3
    assert list(cache.rglob("*.flow.npz"))
    for flow in (tmp_path / "features").rglob("*.flow.npz"):
        flow.unlink()
    shutil.rmtree(teacher)
    assert answers(student, *extractors[:2]) == 3
