"""`mmdist data pull` from loopback; `mmdist data check` on sound, broken and real files."""

from __future__ import annotations

import errno
import json
import os
import threading
import unicodedata
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from mmdist_e2e.cli.main import main
from mmdist_e2e.store import FeatureStore
from mmdist_e2e.structures import Features, Provenance
from mmdist_e2e.weights.download import git_blob_sha1
from mmdist_e2e.weights.registry import ENTRIES

needs_data = pytest.mark.skipif(
    "MMDIST_DATA" not in os.environ, reason="set MMDIST_DATA for the real files"
)

Row = list[Any]


def check(*arguments: object) -> tuple[int, dict[str, Any]]:
    """Exit code and report of `mmdist data check --json`."""
    result = CliRunner().invoke(main, ["data", "check", "--json", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result.exit_code, json.loads(result.stdout)


def write_rows(path: Path, rows: list[Row]) -> Path:
    path.write_text(json.dumps(rows))
    return path


def rows_of(videos: str, sentence: str = "person opens the door.") -> list[Row]:
    return [[video, 10.0, [2.0, 6.0], sentence] for video in videos]


def save_arrays(folder: Path, videos: str, **changed: np.ndarray) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for video in videos:
        array = changed.get(video, rng.normal(size=(6, 4)).astype(np.float16))
        np.save(folder / f"{video}.npy", array)
    return folder


def test_sound_files(tmp_path: Path) -> None:
    val = rows_of("ccc", "a person runs") + rows_of("d")
    for row, end in zip(val, (6, 7, 8, 9), strict=True):
        row[2][1] = end
    train = write_rows(tmp_path / "train.json", rows_of("ab"))
    code, report = check(
        "--features", save_arrays(tmp_path / "f", "abcdef"),
        "--train", train, "--val", write_rows(tmp_path / "val.json", val),
    )  # fmt: skip
    assert code == 0, report
    assert report["errors"] == []
    assert report["warnings"] == []
    split = report["splits"]["val"]
    assert (split["queries"], split["videos"]) == (4, 2)
    assert split["protocol"] == "val.json (4 queries, cpl: no late ends)"
    facts = report["features"]["rgb"]
    assert (facts["videos"], facts["videos_unused"], facts["channels"]) == (4, 2, [4])
    assert facts["made_by"] == {"extractor": "external:npy"}
    assert report["splits"]["train"]["share_of_words_without_vector"] == 0
    assert split["shared_with_train"] == {"videos": 0, "sentences": 1}


def errors_of(*arguments: object) -> str:
    code, report = check(*arguments)
    assert code == 1
    return "\n".join(report["errors"])


def warnings_of(*arguments: object) -> str:
    code, report = check(*arguments)
    assert code == 0, report["errors"]
    return "\n".join(report["warnings"])


def test_every_error_is_told_at_once(tmp_path: Path) -> None:
    nan = np.zeros((6, 4), np.float32)
    nan[2, 1] = np.nan
    features = save_arrays(
        tmp_path / "f", "abcde", b=nan, c=np.ones((6, 5)), d=np.zeros(3), e=np.ones((2, 4))
    )
    train = rows_of("abcdefg") + rows_of("a", "zzgrmpf .") + [["a", 10.0, [12, 13], "a person"]]
    (tmp_path / "val.txt").write_text("a 1 2##person runs\nv 1 two##x\nv 2 1##x\nv 1 2 x\n")
    told = errors_of(
        "--features", features, "--train", write_rows(tmp_path / "t.json", train),
        "--val", tmp_path / "val.txt", "--test", write_rows(tmp_path / "x.json", rows_of("ab")),
        "--durations", tmp_path / "none.json",
    )  # fmt: skip
    for part in (
        "Line 2 of", "val.txt' has a time that is not a number: 'two'", "Line 3 of", "Line 4 of",
        "none.json' cannot be read",
        "'b' in", "1 of 6 rows are not",
        "1 videos have rgb features that were made in another way (c), different in channels",
        "'d' in", "shape [3]",
        "2 of 7 videos of train have no rgb features (f, g)",
        "1 sentences of train have no word with a vector",
        "1 moments of train start after their video has ended ('a': 12 s of 10 s)",
        "2 videos are in both train and test (a, b); split by video",
    ):  # fmt: skip
        assert part in told, part


def test_what_is_taken_but_odd_is_warned_of(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(6, 4))
    features = save_arrays(
        tmp_path / "f", "abcdef", a=np.zeros((6, 4)), b=np.ones((6, 4)), c=rows[:1]
    )
    late = [["f", 10.0, [2, 10.5], "a person runs qqzx"], ["f", 10.0, [2, 10.5], "A person falls"]]
    val, test = rows_of("abcde"), rows_of("ab") + 3 * late
    told = warnings_of(
        "--features", features, "--val", write_rows(tmp_path / "v.json", val),
        "--test", write_rows(tmp_path / "t.json", test),
    )  # fmt: skip
    for part in (
        "3 videos have the same rgb features in every row, so no moment can be found (a, b, c)",
        "test: 4 lines repeat another line.",
        "6 queries of test end past their video, by 0.50 s at most",
        "of the words of test have no vector in 'glove-6b-50d-20k' and are not read (qqzx",
        "2 videos are in both val and test (a, b)",
    ):
        assert part in told, part


def test_the_protocol_cpl_drops_late_ends(tmp_path: Path) -> None:
    rows = [*rows_of("abc"), ["a", 10.0, [2, 10.5], "person runs"]]
    _, report = check("--val", write_rows(tmp_path / "v.json", rows), "--protocol", "cpl")
    split = report["splits"]["val"]
    assert (split["queries"], split["queries_dropped_by_protocol"]) == (3, 1)
    assert split["protocol"] == "v.json (3 queries, cpl: no late ends)"


def save_features(root: Path, video: str, seconds: float, extractor: str = "x") -> None:
    data = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    times = np.array([[0, seconds / 2], [seconds / 2, seconds]])
    provenance = Provenance({"extractor": extractor})
    FeatureStore(root).save(video, Features(data, times, seconds, "rgb", provenance))


def test_durations_come_from_the_store_where_the_file_has_none(tmp_path: Path) -> None:
    for video, seconds in (("a", 8.0), ("b", 20.0)):
        save_features(tmp_path / "store", video, seconds)
    (tmp_path / "v.txt").write_text("a 2 4##person runs\nb 5 10##person runs away\n")
    assert "2 videos of val have no duration" in errors_of("--val", tmp_path / "v.txt")
    both = ("--val", tmp_path / "v.txt", "--features", tmp_path / "store")
    assert check(*both)[0] == 0
    (tmp_path / "d.json").write_text('{"a": 8.5, "b": 25}')
    told = warnings_of(*both, "--durations", tmp_path / "d.json")
    assert (
        "1 videos are longer or shorter in d.json than in the features by more than 1 s (b)" in told
    )
    assert "(b)" in told
    save_features(tmp_path / "store", "b", 20.0, "another")
    assert (
        "1 videos have rgb features that were made in another way (b), different in extractor"
        in errors_of(*both)
    )


def test_many_unreadable_videos_are_counted(tmp_path: Path) -> None:
    broken = {video: np.zeros(3) for video in "abcdefgh"}
    features = save_arrays(tmp_path / "f", "abcdefgh", **broken)
    _, report = check("--val", write_rows(tmp_path / "v.json", rows_of("abcdefgh")),
                      "--features", features)  # fmt: skip
    assert len(report["errors"]) == 6
    assert report["errors"][-1] == "3 more videos have rgb features that cannot be used."


def test_every_bad_line_is_an_error_of_its_own(tmp_path: Path) -> None:
    """mmdist data check is the place to see them all, however many."""
    (tmp_path / "v.txt").write_text("".join(f"v 1 2##ok {i}\nv 1 2 {i}\n" for i in range(60)))
    _, report = check("--val", tmp_path / "v.txt")
    assert [int(e.split()[1]) for e in report["errors"]] == list(range(2, 121, 2))


def test_suspicions_are_counted(tmp_path: Path) -> None:
    spans = [[5, 2], [1, 2], [1, 2], [4000, 9000], [3, 3]]
    video = {"duration": 9, "timestamps": spans, "sentences": ["man"] * 2 + ["Man", "run", "x"]}
    (tmp_path / "v.json").write_text(json.dumps({"v": video}))
    code, report = check("--val", tmp_path / "v.json")
    facts = report["splits"]["val"]
    counts = {k: facts.get(k) for k in ("not_in_seconds", "zero_length", "duplicates", "left_out")}
    assert list(counts.values()) == [1, None, 1, 2]
    assert "1 annotations look like milliseconds or frame numbers" in report["warnings"][0]
    assert "2 moments that do not end after they start are left out" in report["warnings"][0]
    assert code == 1  # for the moment that starts after its video
    # Durations of the features tell milliseconds too.
    save_features(tmp_path / "store", "a", 8.0)
    (tmp_path / "t.txt").write_text("a 500 900##person runs\na 3 3##person runs\n")
    _, report = check("--val", tmp_path / "t.txt", "--features", tmp_path / "store")
    facts = report["splits"]["val"]
    assert (facts["not_in_seconds"], facts["zero_length"]) == (1, 1)


def test_one_video_in_two_unicode_forms(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    features = save_arrays(tmp_path / "f", "")
    np.save(features / f"{decomposed}.npy", np.random.default_rng(0).normal(size=(6, 4)))
    (tmp_path / "v.txt").write_text(f"{composed} 1 2##person runs\n{decomposed}.mp4 3 4##a cup")
    (tmp_path / "d.json").write_text(json.dumps({decomposed: 9.0}))
    code, report = check(
        "--val", tmp_path / "v.txt", "--features", features, "--durations", tmp_path / "d.json"
    )
    assert code == 0, report["errors"]
    assert report["features"]["rgb"]["videos"] == report["splits"]["val"]["videos"] == 1


def test_a_late_end_of_any_moment_counts(tmp_path: Path) -> None:
    row = {
        "vid": "v",
        "duration": 10,
        "query": "person runs",
        "relevant_windows": [[0, 9], [6, 11]],
    }
    (tmp_path / "v.jsonl").write_text(json.dumps(row))
    _, report = check("--val", tmp_path / "v.jsonl")
    assert report["splits"]["val"]["ends_past_duration"] == 1
    assert "end past their video, by 1.00 s at most" in report["warnings"][0]


def test_what_a_person_reads(tmp_path: Path) -> None:
    arguments = ["data", "check", "--features", str(save_arrays(tmp_path / "f", "ab"))]
    arguments += ["--train", str(write_rows(tmp_path / "t[1].json", rows_of("ab")))]
    arguments += ["--val", str(write_rows(tmp_path / "v.json", rows_of("c")))]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    for part in (
        "t[1].json", "external:npy", "videos missing", "videos: 0, sentences: 1",
        "shared with train",
        "error: 1 of 1 videos of val have no rgb features (c)", "1 errors, 0 warnings.",
    ):  # fmt: skip
        assert part in result.stdout, (part, result.stdout)


def test_nothing_to_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["data", "check"])
    assert result.exit_code == 1
    assert f"looked in {tmp_path} and did not find: training annotations" in result.stderr


def save_rates(folder: Path, **fps: float) -> tuple[Path, list[Row]]:
    """Rows of a stride of 8 frames, and annotations of videos of 30 to 40 s."""
    seconds = {video: 30.0 + i for i, video in enumerate(fps)}
    rng = np.random.default_rng(0)
    arrays = {v: rng.normal(size=(round(seconds[v] * fps[v] / 8), 4)) for v in fps}
    save_arrays(folder, "".join(fps), **arrays)
    return folder, [[v, seconds[v], [2.0, 6.0], f"person opens door {v}."] for v in fps]


def test_rows_per_second_of_foreign_features(tmp_path: Path) -> None:
    fps = dict.fromkeys("abcdefgh", 25.0) | {"i": 30.0, "j": 30.0, "k": 50.0}
    features, rows = save_rates(tmp_path / "f", **fps)
    files = ("--features", features, "--val", write_rows(tmp_path / "v.json", rows))
    code, report = check(*files)
    assert code == 0
    facts = report["features"]["rgb"]
    assert facts["rows_per_second"]["median"] == pytest.approx(25 / 8, rel=0.02)
    assert facts["implied_fps"]["at stride 8"] == pytest.approx(25, rel=0.02)
    assert facts["implied_fps"]["at stride 16"] == pytest.approx(50, rel=0.02)
    told = "\n".join(report["warnings"])
    median = f"{facts['rows_per_second']['median']:.3g}"
    off = f"videos have rgb rows per second more than 10% off the median of {median}"
    assert f"2 {off}, by about 30/25 (i, j); check at which fps" in told
    assert f"1 {off}, by about 60/30 (k); check" in told
    assert len(report["warnings"]) == 2
    # Agreement is silent; short videos may be a row off.
    features, rows = save_rates(tmp_path / "g", **dict.fromkeys("abcdefgh", 25.0))
    np.save(features / "z.npy", np.random.default_rng(1).normal(size=(5, 4)))
    rows.append(["z", 1.2, [0.1, 1.0], "person runs."])
    _, report = check("--features", features, "--val", write_rows(tmp_path / "w.json", rows))
    assert report["warnings"] == []
    assert "implied fps" in CliRunner().invoke(main, ["data", "check", *map(str, files)]).stdout


def test_rows_that_were_resampled_imply_no_fps(tmp_path: Path) -> None:
    rows = [["a", 10.0, [2.0, 6.0], "person runs."], ["b", 30.0, [2.0, 6.0], "person falls."]]
    files = ("--features", save_arrays(tmp_path / "f", "ab"))
    _, report = check(*files, "--val", write_rows(tmp_path / "v.json", rows))
    assert report["features"]["rgb"]["rows_in_every_video"] == 6
    assert "implied_fps" not in report["features"]["rgb"]
    assert report["warnings"] == []


def test_durations_that_differ_between_sources(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text('{"a": 10.2, "b": 14}')
    (tmp_path / "two.json").write_text('{"a": 10, "b": 14.5, "c": 3}')
    rows = write_rows(tmp_path / "t.json", rows_of("ab"))
    more = ("--durations", tmp_path / "one.json", "--durations", tmp_path / "two.json")
    told = warnings_of("--test", rows, *more)
    assert "1 videos are longer or shorter in one.json than in test by more than 1 s (b)" in told
    assert "than in two.json" not in told


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def published(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """The folder of a server on loopback that stands for CPL's data folder."""
    monkeypatch.setenv("MMDIST_CACHE", str(tmp_path_factory.mktemp("cache")))
    root = tmp_path / "served"
    for name, entry in list(ENTRIES.items()):
        if entry.kind == "file" and entry.digest:
            path = root / str(entry.url).split("/", 3)[3]
            path.parent.mkdir(parents=True, exist_ok=True)
            write_rows(path, [[name, 9.0, [1, 2], "person runs."]])
            monkeypatch.setitem(ENTRIES, name, replace(entry, git_sha1=git_blob_sha1(path)))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(root)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("MMDIST_MIRROR", f"http://127.0.0.1:{server.server_port}")
    yield root / "minghangz/cpl/raw/main/data"
    server.shutdown()


def pull(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["data", "pull", *map(str, arguments)])


def refused(result: Result) -> str:
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    return result.output


def test_annotations_are_pulled_by_name(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = pull("activitynet-captions")
    assert result.exit_code == 0, result.output
    assert "ActivityNet Captions in CPL's rows (protocol official" in result.output
    assert "not be redistributed; get them at activity-net.org" in result.output
    assert "Next: mmdist extract" in result.output
    names = ("train", "val", "test")
    folder = tmp_path / "annotations"
    assert sorted(p.name for p in folder.iterdir()) == sorted(f"{n}.json" for n in names)
    for name in names:
        served = published / "activitynet" / f"{name}_data.json"
        assert (folder / f"{name}.json").read_bytes() == served.read_bytes()
    # What is there already is kept without a network, and what is missing is fetched.
    (folder / "val.json").unlink()
    (published / "activitynet" / "test_data.json").unlink()
    assert pull("activitynet-captions").exit_code == 0
    assert (folder / "val.json").is_file()
    assert pull("cpl-vocabulary-charades").exit_code == 0
    assert (folder / "glove.pkl").is_file()
    # Another data set would overwrite it.
    told = refused(pull("charades-sta"))
    assert "annotations/train.json exists and holds something else" in told
    assert "allenai" in pull("charades-sta", "--out", "c").output
    assert "Did you mean 'charades-sta'?" in refused(pull("charades-std", "--out", "d"))


@pytest.mark.parametrize("fault", ["tampered", "gone", "no network", "full disk"])
def test_a_failed_pull_leaves_nothing(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    file = published / "charades" / "test.json"  # the second of the two
    if fault == "tampered":
        file.write_text(file.read_text() + " ")
        told = "digest"
    elif fault == "gone":
        file.unlink()
        told = "404"
    elif fault == "no network":
        monkeypatch.setenv("MMDIST_MIRROR", "http://127.0.0.1:9")
        told = "could not be downloaded"
    else:

        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
        told = "No space left"
    before = sorted(tmp_path.rglob("*"))
    assert told in refused(pull("charades-sta", "--out", tmp_path / "annotations"))
    assert sorted(tmp_path.rglob("*")) == before


@needs_data
def test_published_files_are_known_by_their_digests() -> None:
    root = Path(os.environ["MMDIST_DATA"]) / "charades_sta"
    for name in ("train", "test"):
        known = ENTRIES[f"charades-sta-{name}"]
        assert git_blob_sha1(root / f"cpl_{name}.json") == known.git_sha1
    _, report = check("--train", root / "charades_sta_train.txt")
    assert report["splits"]["train"]["protocol"].startswith("charades_sta official, training")


@needs_data
def test_real_files() -> None:
    pytest.importorskip("h5py", reason="needs the extra hdf5")
    root = Path(os.environ["MMDIST_DATA"])
    clip, sta = root / "charades_clip", root / "charades_sta"
    code, report = check(
        "--features", clip / "features.hdf5", "--train", clip / "train.json",
        "--val", clip / "val.json", "--glove", sta / "glove.pkl",
    )  # fmt: skip
    assert (code, report["errors"], report["warnings"]) == (0, [], [])
    assert [report["splits"][s]["queries"] for s in ("train", "val")] == [1910, 433]
    assert report["features"]["rgb"]["channels"] == [768]
    told = errors_of(
        "--train", sta / "charades_sta_train.txt", "--test", sta / "charades_sta_test.txt",
        "--durations", sta / "durations_test.json",
    )  # fmt: skip
    assert told.startswith("5338 videos of train have no duration")
