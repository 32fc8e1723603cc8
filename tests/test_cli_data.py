"""`mmdist data check` on sound files, broken ones, and the real ones."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from mmdist_e2e.cli.main import main
from mmdist_e2e.store import FeatureStore
from mmdist_e2e.structures import Features, Provenance

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
    facts = report["features"]
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
        "1 videos have features that are not finite (b)",
        "number of channels: 3 videos of 4, 1 videos of 5",
        "'d' in", "shape [3]",
        "2 of 7 videos of train have no features (f, g)",
        "1 sentences of train have no word with a vector",
        "1 moments of train start after their video has ended, the first in 'a' (12 s of 10 s)",
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
        "1 videos have only zeros as features (a)",
        "2 videos have the same features in every row, so no moment can be found (b, c)",
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
    assert "1 videos are longer or shorter in d.json than in the features by more than 1 s (b)" in told
    assert "(b)" in told
    save_features(tmp_path / "store", "b", 20.0, "another")
    assert (
        "1 videos have features that were made in another way (b), different in extractor"
        in errors_of(*both)
    )


def test_many_unreadable_videos_are_counted(tmp_path: Path) -> None:
    broken = {video: np.zeros(3) for video in "abcdefgh"}
    features = save_arrays(tmp_path / "f", "abcdefgh", **broken)
    _, report = check("--val", write_rows(tmp_path / "v.json", rows_of("abcdefgh")),
                      "--features", features)  # fmt: skip
    assert len(report["errors"]) == 6
    assert report["errors"][-1] == "3 more videos have features that cannot be used."


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
    assert report["features"]["videos"] == report["splits"]["val"]["videos"] == 1


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
        "error: 1 of 1 videos of val have no features (c)", "1 errors, 0 warnings.",
    ):  # fmt: skip
        assert part in result.stdout, (part, result.stdout)


def test_nothing_to_check() -> None:
    result = CliRunner().invoke(main, ["data", "check"])
    assert result.exit_code == 1
    assert "give --train, --val or --test" in result.stderr


@pytest.mark.skipif("MMDIST_DATA" not in os.environ, reason="set MMDIST_DATA for the real files")
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
    assert report["features"]["channels"] == [768]
    told = errors_of(
        "--train", sta / "charades_sta_train.txt", "--test", sta / "charades_sta_test.txt",
        "--durations", sta / "durations_test.json",
    )  # fmt: skip
    assert told.startswith("5338 videos of train have no duration")
