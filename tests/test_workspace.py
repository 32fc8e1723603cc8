"""A workspace by convention: commands as typed in a folder of videos/ and annotations/."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from make_videos import make_video
from safetensors import safe_open
from safetensors.numpy import save_file
from test_cli_train import SMALL, mmdist

from mmdist_e2e.cli.main import COMMANDS
from mmdist_e2e.extractors import extract as extract_module
from mmdist_e2e.grounding.train import Trainer
from mmdist_e2e.store import FeatureStore
from mmdist_e2e.structures import Features, MmdistError, Provenance
from mmdist_e2e.workspace import RECIPES, fill, newest_run

VIDEOS = "abcdef"
QUERY = "person opens the door"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, where commands run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MMDIST_CACHE", str(tmp_path / "cache"))
    return tmp_path


def touch(*paths: str) -> None:
    for path in map(Path, paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def found(*names: str) -> dict[str, str | None]:
    """What `fill` finds for these names; as text."""
    given: dict[str, Path | None] = dict.fromkeys(names)
    fill("test", given)
    return {name: str(path) if path else None for name, path in given.items()}


@pytest.mark.parametrize(
    ("files", "train", "val", "test"),
    [
        ("train.txt val.txt test.txt", "train.txt", "val.txt", "test.txt"),
        ("train_data.json test_data.json", "train_data.json", None, "test_data.json"),
        ("charades_sta_train.txt charades_sta_test.txt", *("charades_sta_train.txt", None),
         "charades_sta_test.txt"),
        ("train.json val_1.json val_2.json", "train.json", "val_1.json", "val_2.json"),
        ("train.json x_val_1.json", "train.json", "x_val_1.json", None),
        ("highlight_dev_release.jsonl TEST.json", None, "highlight_dev_release.jsonl", "TEST.json"),
        ("charadesTrain.txt Validation.txt", "charadesTrain.txt", "Validation.txt", None),
        ("mine.txt test.jsonl", "mine.txt", None, "test.jsonl"),
        ("captions.json", "captions.json", None, None),
        ("train.txt mine.txt other.txt", "train.txt", None, None),
        ("latest.txt", "latest.txt", None, None),  # holds "test", and is not a word of it
        ("trainval_train_val.json", "trainval_train_val.json", None, None),
        ("train.txt glove.6B.txt durations_test.json README.txt ._test.txt", "train.txt", None,
         None),
        ("train.csv notes.md", None, None, None),
    ],
)  # fmt: skip
def test_splits_are_told_by_words_of_names(files, train, val, test):
    touch(*(f"annotations/{name}" for name in files.split()))
    told = found("train", "val", "test")
    expected = {"train": train, "val": val, "test": test}
    assert told == {k: v and f"annotations/{v}" for k, v in expected.items()}


def test_a_test_file_takes_val_2_out_of_the_rule():
    touch("annotations/val_1.json", "annotations/val_2.json", "annotations/test.json")
    with pytest.raises(MmdistError, match=r"--val could be annotations/val_1.json or annota"):
        found("val", "test")


@pytest.mark.parametrize(
    ("files", "rgb", "flow"),
    [
        ("a.rgb.npz", ".", None),
        ("kitchen/a.rgb.npz kitchen/a.flow.npz", ".", "."),
        ("a.rgb.npz flow.hdf5", ".", "flow.hdf5"),
        ("rgb.hdf5 flow.h5", "rgb.hdf5", "flow.h5"),
        ("i3d_rgb.hdf5 I3D-Flow.hdf5 pca.hdf5", "i3d_rgb.hdf5", "I3D-Flow.hdf5"),
        ("activitynet.hdf5", "activitynet.hdf5", None),
        ("c3d.hdf5 flow.hdf5", "c3d.hdf5", "flow.hdf5"),
        ("rgb/a.npy flow/a.npy", "rgb", "flow"),
        ("a.npy kitchen/b.npy", ".", None),
        ("a.npy flow/a.npy", ".", "flow"),
        ("rgb/a.rgb.npz flow/a.flow.npz", "rgb", "flow"),
        ("flow/a.npy", None, "flow"),
        ("notes.txt", None, None),
    ],
)
def test_features_are_found_by_modality(files, rgb, flow):
    touch(*(f"features/{name}" for name in files.split()))
    expected = {"rgb": rgb, "flow": flow}
    wanted = {k: v and str(Path("features") / v) for k, v in expected.items()}
    assert found("rgb", "flow") == wanted


@pytest.mark.parametrize(
    ("files", "option", "both"),
    [
        ("annotations/train.txt annotations/train.json", "--train", "train.json train.txt"),
        ("annotations/a.txt annotations/b.txt", "--train", "a.txt b.txt"),
        ("annotations/dev.txt annotations/val.txt", "--val", "dev.txt val.txt"),
        ("annotations/glove.pkl annotations/glove.6B.txt", "--glove", "glove.6B.txt glove.pkl"),
        ("annotations/durations_a.json annotations/durations_b.csv", "--durations",
         "durations_a.json durations_b.csv"),
        ("features/x.rgb.npz features/rgb.hdf5", "--features", "features rgb.hdf5"),
        ("features/i3d.hdf5 features/c3d.hdf5", "--features", "c3d.hdf5 i3d.hdf5"),
        ("features/flow.hdf5 features/flow/a.npy", "--flow-features", "flow flow.hdf5"),
    ],
)  # fmt: skip
def test_two_that_fit_are_both_named_with_the_option(files, option, both):
    touch(*files.split(), "features/z.rgb.npz" if "flow" in files else "annotations/test.txt")
    with pytest.raises(MmdistError, match=f"{option} could be ") as caught:
        found("rgb", "flow", "train", "val", "glove", "durations")
    assert all(name in str(caught.value) for name in both.split())
    given = {name: Path("given") for name in ("rgb", "train", "val", "glove", "durations")}
    assert fill("test", given) == ""  # options always win, and nothing is looked for
    assert set(given.values()) == {Path("given")}


def test_word_vectors_and_durations():
    assert found("glove", "durations") == {"glove": None, "durations": None}
    touch("annotations/glove.pkl", "annotations/durations_test.csv", "annotations/durations.txt")
    assert found("glove", "durations") == {
        "glove": "annotations/glove.pkl", "durations": "annotations/durations_test.csv"
    }  # fmt: skip


def test_flow_is_not_looked_for_beside_features_that_are_given():
    touch("features/a.flow.npz")
    given: dict[str, Path | None] = {"rgb": Path("own"), "flow": None}
    assert fill("test", given, "flow") == ""
    assert given["flow"] is None
    given = {"rgb": None, "flow": Path("own")}
    touch("features/a.rgb.npz")
    assert fill("test", given) == "Found in this folder: --features features"


@pytest.mark.parametrize(
    ("command", "missing", "options"),
    [
        ("extract", ["videos (videos/)"], "PATHS"),
        ("data check", ["training annotations (annotations/train.txt)"], "--train"),
        ("train baseline", ["rgb features (features/)", "training annotations ("],
         "--features, --train"),
        ("train teacher", ["rgb features (features/)", "flow features (features/)", "training ann"],
         "--features, --flow-features, --train"),
        ("train student", ["finished teacher (runs/teacher/)", "rgb features", "training ann"],
         "--teacher, --features, --train"),
        ("evaluate", ["finished run (runs/", "rgb features (features/)", "test annotations ("],
         "RUNS, --features, --annotations"),
        ("reproduce", ["rgb features", "flow features", "training annotations", "test annot"],
         "--features, --flow-features, --train, --annotations"),
    ],
)  # fmt: skip
def test_all_that_is_missing_is_told_at_once(folder, command, missing, options):
    run = mmdist(*command.split())
    assert run.exit_code == 1
    first, *example = run.output.splitlines()
    assert first.startswith(f"Error: mmdist {command} looked in {folder} and did not find: ")
    assert all(what in first for what in missing), first
    assert first.endswith(f" Give {options}, or make:")
    places = {what.partition("(")[2].rstrip(")") for what in missing} - {""}
    assert all(any(line.startswith(f"  {p}") for line in example) for p in places), run.output
    assert not [path for path in folder.iterdir() if path.name == "runs"]


def test_a_teacher_without_flow_is_told_what_is_there_and_how_to_extract_flow():
    touch("features/a.rgb.npz", "annotations/train.txt", "annotations/train.json")
    run = mmdist("train", "teacher")
    assert run.exit_code == 1
    for part in (
        "did not find: flow features (features/)", "It found: --features features.",
        "mmdist extract videos/ --modality rgb,flow",
        "--train could be annotations/train.json or annotations/train.txt",
    ):  # fmt: skip
        assert part in run.output


def write_run(name: str, recipe: str, *, at: int, epoch: int | None = None, of: int = 3) -> Path:
    """A folder that looks like a run, finished `at` this time; epoch: of its training state."""
    run = Path("runs") / name
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"kind": "grounding", "name": recipe}))
    if epoch is not None:
        state = {"identity": {"settings": {"epochs": of}}, "progress": {"epoch": epoch}}
        meta = {key: json.dumps(value) for key, value in state.items()}
        save_file({"x": np.zeros(1)}, run / "state.safetensors", metadata=meta)
    for path in run.iterdir():
        os.utime(path, (at, at))
    return run


def test_a_student_answers_before_a_teacher_and_the_newest_of_them():
    assert newest_run(*RECIPES) is None
    write_run("cpl", "cpl", at=90, epoch=3)
    write_run("baseline", "baseline", at=80, epoch=3)
    teacher = write_run("teacher", "teacher", at=50, epoch=3)
    assert newest_run(*RECIPES) == teacher
    assert newest_run("cpl", "baseline") == Path("runs/cpl")
    student = write_run("z", "student", at=10, epoch=3)
    assert newest_run(*RECIPES) == student
    newer = write_run("a", "student", at=20, epoch=3)
    write_run("unfinished", "student", at=99, epoch=2)
    write_run("continued", "student", at=99, epoch=3, of=5)
    damaged = write_run("damaged", "student", at=99, epoch=3)
    (damaged / "state.safetensors").write_bytes(b"damaged")
    (damaged / "state.safetensors").touch()
    assert newest_run(*RECIPES) == newer
    os.utime(student / "state.safetensors", (30, 30))  # its best epoch was early, its end late
    assert newest_run(*RECIPES) == student
    converted = write_run("converted", "student", at=40)  # by mmdist weights convert
    assert newest_run(*RECIPES) == converted
    (Path("runs") / "other").mkdir()
    (Path("runs") / "other" / "config.json").write_text('{"network": "i3d"}')
    (Path("runs") / "file").touch()
    assert newest_run(*RECIPES) == converted
    (student / "config.json").write_text("{")
    with pytest.raises(MmdistError, match=f"{student} is not a checkpoint folder: config.json"):
        newest_run(*RECIPES)


def write_features(videos: str = VIDEOS, *modalities: str) -> None:
    rng = np.random.default_rng(0)
    edges = np.linspace(0, 10, 17)
    times = np.stack([edges[:-1], edges[1:]], axis=1)
    for video in videos:
        for modality in modalities or ("rgb", "flow"):
            data = rng.normal(size=(16, 6 if modality == "rgb" else 4)).astype(np.float32)
            made = Provenance({"extractor": f"x-{modality}"}, {}, {"digest": video})
            FeatureStore(Path("features")).save(video, Features(data, times, 10.0, modality, made))


def write_annotations(**videos: str) -> None:
    Path("annotations").mkdir(exist_ok=True)
    for split, names in videos.items():
        lines = [f"{v} {k} {k + 4}##person opens the {'door' if k else 'box'}.\n"
                 for v in names for k in (0, 4)]  # fmt: skip
        Path(f"annotations/{split}.txt").write_text("".join(lines))


def train(recipe: str, *more: object) -> Result:
    return mmdist("train", recipe, "--length", 16, "--epochs", 2, *SMALL, *more)


@pytest.fixture
def material() -> None:
    write_features()
    write_annotations(train="abcd", val="e", test="f")


def test_train_and_evaluate_find_everything(material):
    run = train("teacher", "--seed", 2)
    assert run.exit_code == 0, run.output
    assert run.stderr.startswith(
        "Found in this folder: --features features --train annotations/train.txt --val "
        "annotations/val.txt --out runs/teacher-seed2\n"
    )
    assert "on val.txt" in run.stdout
    run = train("student")
    assert run.exit_code == 0, run.output
    assert "--teacher runs/teacher-seed2 --features features" in run.stderr
    assert "runs/student: recipe student, seed 0" in run.stdout
    run = mmdist("evaluate", "--json")
    assert run.exit_code == 0, run.output
    assert "runs/student --features features --annotations annotations/test.txt" in run.stderr
    assert json.loads(run.stdout)["annotations"] == "test.txt"
    Path("annotations/test.txt").unlink()
    run = mmdist("evaluate", "runs/teacher-seed2", "--json")
    assert run.exit_code == 0, run.output
    assert "folder: --features features --annotations annotations/val.txt" in run.stderr
    result = json.loads(run.stdout)
    assert (result["annotations"], result["recipe"]) == ("val.txt", "teacher")


def test_explicit_options_win(material):
    (Path("mine")).mkdir()
    shutil.copy("annotations/train.txt", "mine/lines.txt")
    shutil.copytree("features", "mine/store")
    run = train(
        "baseline", "--train", "mine/lines.txt", "--features", "mine/store", "--out", "mine/run",
        "--carve", 0.3,
    )  # fmt: skip
    assert run.exit_code == 0, run.output
    assert "Found" not in run.stderr
    assert "carved" in run.stdout
    assert not Path("runs").exists()
    run = mmdist("evaluate", "mine/run", "--annotations", "mine/lines.txt")
    assert run.exit_code == 0, run.output
    assert "Found in this folder: --features features\n" in run.stderr
    config = json.loads(Path("mine/run/config.json").read_text())
    assert config["trained_on"].startswith("6 sentences of lines.txt")


def test_durations_and_word_vectors_of_the_workspace_are_used(material):
    Path("annotations/durations.json").write_text(json.dumps(dict.fromkeys(VIDEOS, 5.0)))
    words = ("person", "opens", "the", "door", "box", ".")
    Path("annotations/glove.mine.txt").write_text(
        "".join(f"{w} 1 {i}\n" for i, w in enumerate(words))
    )
    run = train("cpl", "--protocol", "cpl", "--carve", 0)
    assert run.exit_code == 0, run.output
    assert "4 queries" in run.stdout  # of 8: the others end after 5 seconds
    assert "--glove annotations/glove.mine.txt --durations annotations/durations.json" in run.stderr
    config = json.loads(Path("runs/cpl/config.json").read_text())
    assert config["word_vectors"]["name"] == "glove.mine"


def test_a_training_that_was_interrupted_is_resumed_and_not_used(
    material, monkeypatch: pytest.MonkeyPatch
):
    original = Trainer.run_epoch

    def once(self, *arguments):
        if self.state.epoch:
            raise KeyboardInterrupt
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "run_epoch", once)
        assert train("teacher").exit_code != 0
    assert Path("runs/teacher/config.json").is_file()
    for command in (["train", "student"], ["evaluate"]):
        run = mmdist(*command)
        assert run.exit_code == 1
        assert "did not find: finished" in run.output
        assert "made, or resumed, by: mmdist train teacher" in run.output
    assert "resumed after epoch 1" in train("teacher").stdout
    assert train("student").exit_code == 0


def test_data_check_reads_all_that_is_there(material):
    run = mmdist("data", "check", "--json")
    assert run.exit_code == 0, run.output
    report = json.loads(run.stdout)
    assert list(report["splits"]) == ["train", "val", "test"]
    assert {m: facts["channels"] for m, facts in report["features"].items()} == {
        "rgb": [6], "flow": [4]
    }  # fmt: skip
    for modality, video in (("flow", "a"), ("rgb", "b"), ("flow", "b")):
        FeatureStore(Path("features")).path(video, modality).unlink()
    run = mmdist("data", "check")
    assert run.exit_code == 1
    lines = [line for line in run.stdout.splitlines() if "extract them" in line]
    assert [line.split(" (")[0] for line in lines] == [
        "error: 1 of 4 videos of train have no rgb features",
        "error: 2 of 4 videos of train have no flow features",
    ]
    table = run.stdout
    assert "x-rgb" in table
    assert "x-flow" in table
    one = json.loads(mmdist("data", "check", "--json", "--modality", "flow").stdout)
    assert one["features"]["flow"]["channels"] == [4]
    one = json.loads(mmdist("data", "check", "--json", "--features", "features").stdout)
    assert one["features"]["rgb"]["channels"] == [6]
    shutil.rmtree("features")
    assert "No features are given or in features/" in mmdist("data", "check").stderr


def test_data_check_takes_every_file_of_durations(material):
    Path("annotations/durations_train.json").write_text(json.dumps(dict.fromkeys("abcd", 20.0)))
    Path("annotations/durations_test.json").write_text(json.dumps({"f": 30.0}))
    run = mmdist("data", "check")
    assert run.exit_code == 0, run.output
    assert run.stderr.count("--durations annotations/durations_") == 2
    wrong = [line for line in run.stdout.splitlines() if "longer or shorter" in line]
    assert [line.split(" than in the features")[0].split()[-1] for line in wrong] == [
        "durations_test.json", "durations_train.json"
    ]  # fmt: skip


def test_extract_takes_videos(folder, tiny_extractor):
    (folder / "videos" / "kitchen").mkdir(parents=True)
    make_video(folder / "videos" / "kitchen" / "a.mp4", 30)
    run = mmdist("extract", "--extractor", tiny_extractor)
    assert run.exit_code == 0, run.output
    assert "Found in this folder: videos\n" in run.stderr
    assert "Features are written to features.\n" in run.stderr
    assert FeatureStore(folder / "features").videos("rgb") == ["kitchen/a"]


@pytest.fixture
def trained(tiny_run: Path) -> Callable[..., Result]:
    """A workspace with a run of the tiny extractor; runs `mmdist ground`, by default on v4.mp4."""
    shutil.copytree(tiny_run / "videos", "videos/kitchen")
    shutil.copytree(tiny_run / "features", "features/kitchen")
    shutil.copytree(tiny_run / "model", "runs/first")

    def ask(*more: object, clip: str = "kitchen/v4.mp4") -> Result:
        return mmdist("ground", clip, QUERY, *more)

    return ask


def must_not_decode(*_: object, **__: object) -> None:
    raise AssertionError("features were extracted before")


@pytest.mark.parametrize(
    "clip", ["kitchen/v4.mp4", "videos/kitchen/v4.mp4", "../{}/videos/kitchen/v4.mp4"]
)
def test_features_that_are_there_are_reused(trained, folder, monkeypatch, clip):
    """By an extractor that is not in the registry, and is not given: it could not be run."""
    monkeypatch.setattr(extract_module, "extract_video", must_not_decode)
    run = trained(clip=clip.format(folder.name))
    assert run.exit_code == 0, run.output
    assert not list(folder.glob("cache/features/*"))
    absolute = trained(clip=str(folder / "videos" / "kitchen" / "v4.mp4"))
    assert absolute.exit_code == 0, absolute.output
    for path in (folder / "features").rglob("v4.*"):
        path.unlink()
    run = trained()
    assert run.exit_code == 1
    assert "give the extractor's folder" in run.output


def test_features_of_a_file_in_no_folder_are_found_by_its_stem(trained, folder, monkeypatch):
    (folder / "features" / "kitchen" / "v4.rgb.npz").rename(folder / "features" / "clip.rgb.npz")
    shutil.move(folder / "videos" / "kitchen" / "v4.mp4", folder / "clip.mp4")
    monkeypatch.setattr(extract_module, "extract_video", must_not_decode)
    assert trained(clip="clip.mp4").exit_code == 0


def test_stale_features_are_not_reused(trained, folder, tiny_extractor):
    make_video(folder / "videos" / "kitchen" / "v4.mp4", 33)  # another video of the same name
    run = trained()
    assert run.exit_code == 1
    assert "give the extractor's folder" in run.output  # it would be extracted
    run = trained("--extractor", tiny_extractor, "--json")
    assert run.exit_code == 0, run.output
    assert json.loads(run.stdout)["duration_seconds"] == pytest.approx(33 / 25, abs=0.01)
    assert list(folder.glob("cache/features/*"))


def test_features_of_another_making_are_not_reused(trained, folder):
    store = FeatureStore(folder / "features")
    made = store.load("kitchen/v4", "rgb")
    matters = {**made.provenance.matters, "stride": 4}
    other = Provenance(matters, made.provenance.info, made.provenance.source)
    store.save("kitchen/v4", Features(made.data, made.times, made.duration_seconds, "rgb", other))
    run = trained()
    assert run.exit_code == 1
    assert "give the extractor's folder" in run.output


def test_the_answer_names_the_newest_finished_run(trained, folder):
    shutil.copytree("runs/first", "runs/second")
    for name, at in (("first", 2_000_000_000), ("second", 1_900_000_000)):
        for file in ("config.json", "state.safetensors"):
            os.utime(folder / "runs" / name / file, (at, at))
    assert "Model: cpl (seed 0, rgb, 16 channels), runs/first\n" in trained().stdout
    run = trained("--json")
    assert json.loads(run.stdout)["model"].endswith(", runs/first")
    assert run.stderr == "Found in this folder: --model runs/first\n"
    state = folder / "runs" / "first" / "state.safetensors"
    with safe_open(state, framework="np") as file:
        meta = file.metadata()
    progress = json.loads(meta["progress"]) | {"epoch": 1}
    save_file({"x": np.zeros(1)}, state, metadata=meta | {"progress": json.dumps(progress)})
    assert "channels), runs/second\n" in trained().stdout
    explicit = trained("--model", "runs/first").stdout
    assert "Model: cpl (seed 0, rgb, 16 channels)\n" in explicit
    (folder / "runs" / "second" / "model.safetensors").write_bytes(b"damaged")
    run = trained()
    assert run.exit_code == 1
    assert "The checkpoint 'runs/second' cannot be loaded" in run.output
    assert len(run.output.strip().splitlines()) == 1


def test_without_a_finished_run_the_shipped_model_answers(folder):
    make_video(folder / "clip.mp4", 30)
    write_run("student", "student", at=1, epoch=1)
    run = mmdist("ground", "clip.mp4", QUERY)
    assert run.exit_code == 0, run.output
    assert "Model: student (seed 0, rgb, 128 channels)\n" in run.stdout


@pytest.mark.parametrize(
    ("command", "defaults"),
    [
        ("train student", "features/]|annotations/]|runs/]|runs/RECIPE"),
        ("train teacher", "features/]|annotations/]|annotations/glove*|annotations/durations*"),
        ("evaluate", "newest finished run in runs/|features/]|test file in annotations/"),
        ("data check", "training file in annotations/|test file in annotations/|all of features/"),
        ("reproduce", "features/]|annotations/]|runs/paper]"),
        ("ground", "newest finished run in runs/|default: features]"),
        ("extract", "by default of videos/|default: features]"),
    ],
)
def test_help_says_the_defaults(command, defaults):
    text = " ".join(mmdist(*command.split(), "--help").output.split())
    assert command.split()[0] in COMMANDS
    assert all(default in text for default in defaults.split("|")), text


@pytest.mark.slow
def test_six_commands_as_typed(folder):
    """With the extractors that ship; only the number of epochs is not the default."""
    (folder / "videos" / "kitchen").mkdir(parents=True)
    for number, video in enumerate(("clip", "one", "two", "kitchen/three")):
        make_video(folder / "videos" / f"{video}.mp4", 50 + 10 * number)
    (folder / "annotations").mkdir()
    (folder / "annotations" / "train.txt").write_text(
        "clip 0.2 1.0##person opens the door.\none 0.5 1.5##person sits on a chair.\n"
        "two 0.1 1.2##person puts on a hat.\n"
    )
    (folder / "annotations" / "test.txt").write_text(
        "kitchen/three 0.5 2##person opens the door.\n"
    )
    outputs = []
    for command in (
        "extract videos/ --modality rgb,flow", "data check", "train teacher --epochs 1",
        "train student --epochs 1", "evaluate",
    ):  # fmt: skip
        run = mmdist(*command.split())
        assert run.exit_code == 0, run.output
        outputs.append(run.output)
    assert "runs/student --features features --annotations annotations/test.txt" in outputs[-1]
    run = mmdist("ground", "clip.mp4", "person opens door")
    assert run.exit_code == 0, run.output
    assert ", runs/student\n" in run.stdout
    assert not (folder / "cache" / "features").exists()
