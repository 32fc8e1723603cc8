"""Features exported, read by other programs' rules, and imported again; rows of answers."""

from __future__ import annotations

import errno
import json
import os
import pickle
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from conftest import write_source

from mmdist_e2e.cli.main import main
from mmdist_e2e.grounding.data.features import load_features, open_features
from mmdist_e2e.store import FeatureStore, row_writer
from mmdist_e2e.structures import Features, MmdistError, Provenance

h5py = pytest.importorskip("h5py", reason="needs the extra hdf5")
WAYS = [("hdf5", "charades"), ("hdf5", "activitynet"), ("npy", "charades")]


def mmdist(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def done(*arguments: object) -> Result:
    result = mmdist(*arguments)
    assert result.exit_code == 0, result.output
    return result


def sentence(*arguments: object) -> str:
    """The error of a command: one sentence, no traceback."""
    result = mmdist(*arguments)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    return next(line for line in result.output.splitlines() if line.startswith("Error: "))


def extracted(
    rows: int, *, fps: float = 12.0, modality: str = "rgb", window: int = 16, **matters: Any
) -> Features:
    """As mmdist extract makes them of a video at `fps`, whose last windows run past its end."""
    data = np.random.default_rng(rows).normal(size=(rows, 6)).astype(np.float32)
    seconds = ((rows - 1) * 8 + 5) / fps
    matters = {"extractor": "toy", "fps": 25.0, "stride": 8, "window": window, **matters}
    source = {"bytes": rows, "digest": "é"}
    made = Provenance(matters, {"effective_fps": fps, "trained_on": "toys"}, source)
    return Features(data, made.row_times(rows, seconds), seconds, modality, made)


def irregular(rows: int) -> Features:
    """Rows at times of their own, as no grid gives them."""
    data = np.random.default_rng(rows).normal(size=(rows, 6)).astype(np.float32)
    edges = np.sort(np.random.default_rng(1).uniform(0, 90, rows + 1))
    times = np.stack([edges[:-1], edges[1:]], axis=1)
    return Features(data, times, 90.1, "rgb", Provenance({"extractor": "external:hand"}))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Videos in folders, of other alphabets, at several rates, with one row, and irregular."""
    root = tmp_path / "store"
    videos = {
        "3MSZA": extracted(40), "room/café": extracted(9, fps=19.62), "one": extracted(1),
        "hand": irregular(5000), "v_a.b": extracted(77, fps=30000 / 1001, window=15),
    }  # fmt: skip
    for video, features in videos.items():
        FeatureStore(root).save(video, features)
    return root


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.mark.parametrize(("form", "layout"), WAYS)
def test_export_then_import_gives_the_same_store(
    store: Path, tmp_path: Path, form: str, layout: str
) -> None:
    target = tmp_path / "out"
    done("features", "export", store, "--to", target, "--format", form, "--layout", layout)
    done("features", "import", target, "--out", tmp_path / "back")
    # Arrays, times, durations and the whole provenance: the files are the same, bit for bit.
    assert contents(tmp_path / "back") == contents(store)
    # A second call changes nothing; another content is refused, and nothing is left behind.
    before = contents(tmp_path)
    done("features", "export", store, "--to", target, "--format", form, "--layout", layout)
    done("features", "import", target, "--out", tmp_path / "back")
    assert contents(tmp_path) == before
    FeatureStore(store).save("one", extracted(2))
    before = contents(tmp_path)
    again = ("features", "export", store, "--to", target, "--format", form, "--layout", layout)
    assert "exists and holds something else" in sentence(*again)
    assert "one.rgb.npz exists" in sentence("features", "import", store, "--out", tmp_path / "back")
    assert contents(tmp_path) == before


def test_an_export_is_read_as_the_store_is(store: Path, tmp_path: Path) -> None:
    """Durations, provenance and digests: a model and a finished run see no difference."""
    done("features", "export", store, "--to", tmp_path / "f.hdf5", "--format", "hdf5")
    done("features", "export", store, "--to", tmp_path / "npy", "--format", "npy")
    videos = ["3MSZA", "one", "v_a.b"]
    FeatureStore(store).save("v_a.b", extracted(77, fps=30000 / 1001))
    expected = load_features({"rgb": store}, videos[:2], length=8)
    for path in (tmp_path / "f.hdf5", tmp_path / "npy"):
        table = load_features({"rgb": path}, videos[:2], length=8)
        assert table.durations_seconds == expected.durations_seconds
        assert (table.matters, table.digests) == (expected.matters, expected.digests)
        with pytest.raises(MmdistError, match="are those of rgb; give the ones of flow"):
            load_features({"flow": path}, videos[:2], length=8)


def test_hdf5_is_what_cpl_opens(store: Path, tmp_path: Path) -> None:
    """As its datasets/charades_sta.py and datasets/activitynet.py index the file."""
    for layout in ("charades", "activitynet"):
        path = tmp_path / f"{layout}.hdf5"
        done("features", "export", store, "--to", path, "--format", "hdf5", "--layout", layout)
        with h5py.File(path, "r") as file:
            for video in ("3MSZA", "room/café", "one"):
                node = file[video] if layout == "charades" else file[video]["c3d_features"]
                array = np.asarray(node)
                assert array.dtype == np.float32
                stored = FeatureStore(store).load(video, "rgb").data
                np.testing.assert_array_equal(array, stored)


@pytest.mark.parametrize("fps", [12.0, 24.0, 19.62, 30000 / 1001])
def test_opentad_and_actionformer_compute_our_times(tmp_path: Path, fps: float) -> None:
    features = extracted(30, fps=fps)
    FeatureStore(tmp_path / "store").save("v", features)
    folder = tmp_path / "out"
    done("features", "export", tmp_path / "store", "--to", folder, "--format", "opentad")
    assert np.array_equal(np.load(folder / "v.npy"), features.data)
    facts = json.loads((folder / "features.json").read_text())["database"]["v"]
    assert facts["duration"] == features.duration_seconds
    assert (facts["subset"], facts["annotations"]) == ("all", [])
    row = np.arange(30)
    # OpenTAD, convert_to_seconds: (segment · snippet_stride + offset_frames) / fps, where fps is
    # given for the data set or is frame / duration of the video.
    for rate in (facts["fps"], facts["frame"] / facts["duration"]):
        opentad = (row * facts["feature_stride"] + facts["offset_frames"]) / rate
        np.testing.assert_allclose(opentad, features.times[:, 0] + 8 / fps, rtol=1e-12)
    # ActionFormer: half a window is the offset, in units of the stride.
    stride, window = facts["feature_stride"], facts["num_frames"]
    actionformer = (row + 0.5 * window / stride) * stride / facts["fps"]
    np.testing.assert_allclose(actionformer, features.times[:, 0] + 8 / fps, rtol=1e-12)
    # Rows that the end of the video does not cut have their center there.
    whole = features.times[:, 1] - features.times[:, 0] > 15.9 / fps
    assert whole.sum() == 28
    np.testing.assert_allclose(opentad[whole], features.times.mean(axis=1)[whole], rtol=1e-12)


def test_opentad_needs_a_grid(store: Path, tmp_path: Path) -> None:
    told = sentence("features", "export", store, "--to", tmp_path / "o", "--format", "opentad")
    assert "'hand'" in told
    assert not (tmp_path / "o").exists()


def foreign(path: Path, **arrays: np.ndarray) -> Path:
    """HDF5 or .npy files of another program."""
    return write_source(path, path.suffix.removeprefix(".") or "npy", arrays)


@pytest.mark.parametrize("name", ["f.hdf5", "f"])
def test_foreign_features_get_durations_and_times(tmp_path: Path, name: str) -> None:
    rng = np.random.default_rng(0)
    arrays = {"a": rng.normal(size=(10, 4)).astype(np.float16), "b": rng.normal(size=(7, 4))}
    source, out = foreign(tmp_path / name, **arrays), tmp_path / "out"
    ask = ("features", "import", source, "--out", out, "--modality", "flow")
    assert "2 of 2 videos" in sentence(*ask)
    (tmp_path / "d.json").write_text('{"a": 20.5}')
    ask = (*ask, "--durations", tmp_path / "d.json")
    assert "1 of 2 videos in" in sentence(*ask)
    assert "(b); give --durations" in sentence(*ask)
    assert not out.exists()
    (tmp_path / "d.json").write_text('{"a": 20.5, "b": 9}')
    done(*ask)
    made = FeatureStore(out).load("a", "flow")
    assert np.array_equal(made.data, arrays["a"].astype(np.float32))
    np.testing.assert_allclose(made.times[:, 0], np.arange(10) * 2.05)
    np.testing.assert_allclose(made.times[:, 1], np.arange(1, 11) * 2.05)
    kind = "hdf5" if name.endswith("hdf5") else "npy"
    assert made.provenance.matters == {"extractor": f"external:{kind}"}
    # Training on the store needs no --durations.
    table = load_features({"flow": out}, ["a", "b"], length=4)
    assert table.durations_seconds == {"a": 20.5, "b": 9.0}

    grid = ("--fps", 15, "--stride", 16, "--window", 16)
    assert "exists and holds something else" in sentence(*ask, *grid)
    ask = (*ask[:4], tmp_path / "grid", *ask[5:], *grid, "--offset", 4)
    assert "give all three" in sentence(*ask[:-6])
    done(*ask)
    made = FeatureStore(tmp_path / "grid").load("a", "flow")
    start = (np.arange(10) * 16 + 4) / 15
    np.testing.assert_allclose(made.times[:, 0], start)
    np.testing.assert_allclose(made.times[:-1, 1], (start + 16 / 15)[:-1])
    assert made.times[-1, 1] == 20.5  # the last row ends with the video
    # These fields go out again as they came.
    out = tmp_path / "o"
    done("features", "export", tmp_path / "grid", "--to", out, "--format", "opentad",
         "--modality", "flow")  # fmt: skip
    facts = json.loads((out / "features.json").read_text())["database"]["b"]
    assert [facts[k] for k in ("feature_stride", "offset_frames", "fps")] == [16, 12, 15]


def test_two_modalities_share_a_store(tmp_path: Path) -> None:
    one, two = extracted(5), extracted(6, modality="flow")
    for features in (one, two):
        FeatureStore(tmp_path / "both").save("v", features)
    for modality in ("rgb", "flow"):
        path = tmp_path / f"{modality}.hdf5"
        done("features", "export", tmp_path / "both", "--to", path, "--format", "hdf5",
             "--modality", modality)  # fmt: skip
        done("features", "import", path, "--out", tmp_path / "back", "--modality", modality)
    assert contents(tmp_path / "back") == contents(tmp_path / "both")
    told = sentence("features", "import", tmp_path / "flow.hdf5", "--out", tmp_path / "x")
    assert "are those of flow; give the ones of rgb" in told


@pytest.mark.parametrize("fault", ["value", "flush", "size"])
@pytest.mark.parametrize("form", ["hdf5", "npy", "import"])
def test_nothing_is_written_by_halves(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, fault: str
) -> None:
    """A bad value in the last video; a disk that is full at the end, or in the middle."""
    if fault == "value":
        bad = foreign(tmp_path / "bad", a=np.ones((3, 2)), b=np.full((3, 2), np.nan))
        store = bad
        (tmp_path / "d.json").write_text('{"a": 1, "b": 1}')
    ask = ["export", store, "--to", tmp_path / "o", "--format", form]
    if form == "import":
        ask = ["import", store, "--out", tmp_path / "o"]
        ask += ["--durations", tmp_path / "d.json"] if fault == "value" else []
    before = contents(tmp_path)
    if fault == "size":  # in a process of its own: files of at most 4,000 bytes
        command = [sys.executable, "-m", "mmdist_e2e.cli.main", "features", *map(str, ask)]

        def small() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))

        run = subprocess.run(command, capture_output=True, text=True, preexec_fn=small)
        assert run.returncode == 1
        assert "could not be written" in run.stderr, run.stderr
        assert "Traceback" not in run.stderr
    elif fault == "flush":

        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
        assert "No space left" in sentence("features", *ask)
    else:
        assert "'b'" in sentence("features", *ask)
    assert contents(tmp_path) == before
    assert not (tmp_path / "o").exists()


def test_the_current_folder_is_a_target_as_any_other(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("npy", "back"):
        (tmp_path / kind).mkdir()
        monkeypatch.chdir(tmp_path / kind)
        made = ("export", store, "--to", ".", "--format", "npy")
        done("features", *(made if kind == "npy" else ("import", tmp_path / "npy", "--out", ".")))
    assert contents(tmp_path / "back") == contents(store)
    # What a killed call leaves is no video.
    for folder, name in (("back", "3MSZA.rgb.npz"), ("npy", "3MSZA.npy")):
        left = tmp_path / folder / ".tmp-0123456789ab" / name
        left.parent.mkdir()
        left.write_bytes((tmp_path / folder / name).read_bytes())
        with open_features(tmp_path / folder) as source:
            assert len(source.names) == 5


def test_names_that_hdf5_cannot_hold_together(tmp_path: Path) -> None:
    for video in ("a", "a/b"):
        FeatureStore(tmp_path / "s").save(video, extracted(3))
    ask = ("features", "export", tmp_path / "s", "--format", "hdf5", "--to", tmp_path / "f.hdf5")
    assert "export them as npy" in sentence(*ask)
    done("features", "export", tmp_path / "s", "--format", "npy", "--to", tmp_path / "f")


def test_what_a_source_holds(store: Path, tmp_path: Path) -> None:
    for video in ("room/café", "one", "hand"):
        FeatureStore(store).path(video, "rgb").unlink()
    FeatureStore(store).save("v_a.b", extracted(77, fps=24.0))
    done("features", "export", store, "--to", tmp_path / "f.hdf5", "--format", "hdf5")
    done("features", "export", store, "--to", tmp_path / "npy", "--format", "npy")

    def info(path: Path) -> dict[str, Any]:
        """Of the one modality that is there."""
        report = json.loads(done("features", "info", path, "--json").stdout)
        (facts,) = report["features"].values()
        return facts | {"said": report["errors"] + report["warnings"]}

    found = [info(path) for path in (store, tmp_path / "f.hdf5", tmp_path / "npy")]
    assert [one.pop("kind") for one in found] == ["store", "hdf5", "npy"]
    assert found[0] == found[1] == found[2]
    facts = found[0]
    assert (facts["videos"], facts["rows"], facts["channels"]) == (2, 117, [6])
    rates = [len(f.data) / f.duration_seconds for f in (extracted(40), extracted(77, fps=24.0))]
    assert facts["rows_per_second"]["min"] == pytest.approx(min(rates), abs=1e-3)
    assert facts["implied_fps"]["at stride 8"] == pytest.approx(8 * np.mean(rates), abs=1e-2)
    assert facts["made_by"] == {"extractor": "toy", "fps": 25.0, "stride": 8, "window": 16}
    assert facts["said"] == []
    text = done("features", "info", store).stdout
    assert "extractor: toy, fps: 25.0, stride: 8, window: 16" in text
    assert info(store / "3MSZA.rgb.npz")["rows"] == 40
    arrays = {"a": np.ones((3, 2)), "b": np.full((3, 2), np.nan), "c": np.full((3, 2), 1e300)}
    plain = foreign(tmp_path / "plain", d=np.ones((3, 2)), **arrays)
    facts = info(plain)
    assert (facts["videos_with_duration"], facts["rows_in_every_video"]) == (0, 3)
    assert facts["made_by"] == {"extractor": "external:npy"}
    # "c" overflows as float32.
    for video, told in zip("bc", facts["said"], strict=False):
        assert f"rgb features of '{video}' in" in told
        assert "must be finite; 3 of 3 rows are not" in told
    assert info(plain / "a.npy")["rows"] == 3
    FeatureStore(store).save("other", extracted(5, modality="flow"))
    both = json.loads(done("features", "info", store, "--json").stdout)
    assert [(name, each["rows"]) for name, each in both["features"].items()] == [
        ("rgb", 117), ("flow", 5),
    ]  # fmt: skip
    assert "no features at" in sentence("features", "info", tmp_path / "none")
    (tmp_path / "x.npz").write_bytes(b"no")
    assert "not a whole feature file" in sentence("features", "info", tmp_path / "x.npz")


def test_damaged_records_are_named(tmp_path: Path) -> None:
    FeatureStore(tmp_path / "s").save("v", extracted(3))
    done("features", "export", tmp_path / "s", "--to", tmp_path / "n", "--format", "npy")
    record = json.loads((tmp_path / "n" / "features.json").read_text())
    del record["database"]["v"]["duration"]
    (tmp_path / "n" / "features.json").write_text(json.dumps(record))
    told = json.loads(done("features", "info", tmp_path / "n", "--json").stdout)["errors"]
    assert "'v' in" in told[0]
    for text in ("{", '{"database": 3}'):
        (tmp_path / "n" / "features.json").write_text(text)
        assert "restore it, or move it away" in sentence("features", "info", tmp_path / "n")
    for text in ("[1]", '{"other": 1}', '{"database": {"w": {}}}'):  # of somebody else
        (tmp_path / "n" / "features.json").write_text(text)
        with open_features(tmp_path / "n") as source:
            assert not source.timed("v")


def test_rows_as_parquet_and_json_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra parquet")
    rows = [{"video": "é", "moments": [[0.5, 1.0, 0.25]]}, {"video": "b", "moments": [], "more": 1}]
    row_writer(tmp_path / "r.parquet")(rows)
    assert parquet.read_table(tmp_path / "r.parquet").to_pylist() == [
        rows[0] | {"more": None},
        rows[1],
    ]
    row_writer(tmp_path / "r.jsonl")(rows)
    lines = (tmp_path / "r.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows
    row_writer(tmp_path / "r.jsonl")([])
    assert (tmp_path / "r.jsonl").read_bytes() == b""
    with pytest.raises(MmdistError, match=r"valid: \.parquet, \.jsonl"):
        row_writer(tmp_path / "r.csv")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        MmdistError, match=r"needs pyarrow; run pip install 'mmdist-e2e\[parquet\]'"
    ):
        row_writer(tmp_path / "r.parquet")


def test_answers_and_predictions_as_parquet(tiny_run: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra parquet")
    run, features = tiny_run / "model", tiny_run / "features"
    done("evaluate", run, "--features", features, "--annotations", tiny_run / "test.txt",
         "--out", tmp_path / "e", "--predictions", tmp_path / "p.parquet")  # fmt: skip
    lines = (tmp_path / "e" / "predictions.jsonl").read_text().splitlines()
    assert parquet.read_table(tmp_path / "p.parquet").to_pylist() == [json.loads(x) for x in lines]
    told = sentence("evaluate", run, "--features", features, "--annotations",
                    tiny_run / "test.txt", "--predictions", tmp_path / "p.csv")  # fmt: skip
    assert "valid: .parquet, .jsonl" in told


def test_moments_as_parquet(tiny_run: Path, tiny_extractor: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra parquet")
    ask = ["ground", tiny_run / "videos" / "v5.mp4", "person opens the box", "a door"]
    ask += ["--model", tiny_run / "model", "--extractor", tiny_extractor]
    ask += ["--cache", tmp_path / "cache", "--top-k", 2, "--json"]
    answers = json.loads(done(*ask, "--out", tmp_path / "m.parquet").stdout)
    rows = parquet.read_table(tmp_path / "m.parquet").to_pylist()
    assert [(row["query"], row["rank"]) for row in rows] == [
        (answer["query"], rank + 1) for answer in answers for rank in range(len(answer["moments"]))
    ]
    for row, moment in zip(rows, (m for a in answers for m in a["moments"]), strict=True):
        assert row["video"] == answers[0]["video"]
        for name in ("start", "end", "score"):
            assert row[name] == pytest.approx(moment[name], abs=1e-3)
    assert "The suffix of" in sentence(*ask, "--out", tmp_path / "m.csv")


def partly(root: Path, tmp_path: Path) -> list[object]:
    """Features without those of v0 and v5."""
    for video in ("v1", "v2", "v3", "v4"):
        features = FeatureStore(root / "features").load(video, "rgb")
        FeatureStore(tmp_path / "part").save(video, features)
    return ["--features", tmp_path / "part"]


TINY = [
    f"--set={setting}"
    for setting in ("hidden=16", "heads=2", "layers=1", "feed_forward=32", "proposals=3")
]


def test_queries_of_missing_videos_are_skipped_and_counted(tiny_run: Path, tmp_path: Path) -> None:
    part = partly(tiny_run, tmp_path)
    data = [*part, "--train", tiny_run / "train.txt", "--val", tiny_run / "test.txt"]
    train = ["train", "cpl", *data, "--length", 48, "--epochs", 1, *TINY]
    told = sentence(*train, "--out", tmp_path / "r")
    assert "2 of 6 videos have no rgb features" in told
    assert "--skip-missing" in told
    result = done(*train, "--out", tmp_path / "r", "--skip-missing")
    assert "train: left out 1 queries of 1 videos without features" in result.stdout
    assert "recipe cpl, seed 0, 3 queries" in result.stdout
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    left_out = {"queries": 1, "videos": 1}
    assert (config["queries"], config["skipped"]) == (3, {"train": left_out, "val": left_out})
    # What is trained on is what counts: the same queries without the option are the same run.
    lines = (tiny_run / "train.txt").read_text().splitlines(keepends=True)
    (tmp_path / "train.txt").write_text("".join(lines[1:]))
    (tmp_path / "test.txt").write_text((tiny_run / "test.txt").read_text().splitlines()[0])
    same = [*part, "--train", tmp_path / "train.txt", "--val", tmp_path / "test.txt"]
    again = done("train", "cpl", *same, *train[-9:], "--out", tmp_path / "r")
    assert "finished before" in again.stdout

    run = tiny_run / "model"
    ask = ["evaluate", run, *part, "--annotations", tiny_run / "test.txt", "--json"]
    assert "--skip-missing" in sentence(*ask)
    result = done(*ask, "--skip-missing", "--out", tmp_path / "e")
    metrics = json.loads((tmp_path / "e" / "metrics.json").read_text())
    assert (metrics["queries"], metrics["skipped"]) == (1, left_out)
    said = done(*ask[:-1], "--skip-missing", "--out", tmp_path / "e")
    assert "test.txt: left out 1 queries of 1 videos without features" in said.stderr
    none = tmp_path / "none.txt"
    none.write_text("x 1 2##person opens\n")
    assert "No video of the annotations has features" in sentence(
        "evaluate", run, *part, "--annotations", none, "--skip-missing"
    )


@pytest.mark.parametrize("form", ["lines", "json", "pickle"])
def test_the_words_to_predict_come_from_a_file(tiny_run: Path, tmp_path: Path, form: str) -> None:
    words = ["door", "Person", "qqzxv", "door", "the"]
    file = tmp_path / "words.txt"
    if form == "lines":
        file.write_text("\n".join(words) + "\n\n")
    elif form == "json":
        file = tmp_path / "words.json"
        file.write_text(json.dumps(words))
    else:
        counts = Counter({"the": 1, "door": 7, "person": 3, "qqzxv": 9})
        file.write_bytes(pickle.dumps({"w2id": {}, "id2vec": {}, "counter": counts}))
    data = ["--features", tiny_run / "features", "--train", tiny_run / "train.txt", "--carve", 0]
    train = ["train", "cpl", *data, "--length", 48, "--epochs", 1, *TINY, "--out", tmp_path / "r"]
    done(*train, "--vocabulary", file)
    known = json.loads((tmp_path / "r" / "vocabulary.json").read_text())["words"]
    assert known == ["door", "person", "the"]
    assert "vocabulary" in sentence(*train)  # a run of other words
    if form != "pickle":
        file.write_text("\n" if form == "lines" else "[]")
        assert "holds no words" in sentence(*train, "--vocabulary", file)
    file.write_bytes(b"\x80no" if form == "pickle" else b"\xff" if form == "lines" else b"{}[")
    assert "glove.pkl" in sentence(*train, "--vocabulary", file)
