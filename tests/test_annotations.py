"""Annotation files of four formats, durations, protocols, and a carved validation split."""

from __future__ import annotations

import json
import os
import random
import re
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mmdist_e2e.grounding.data.annotations import (
    Annotation,
    BadLinesError,
    carve_validation,
    in_protocol,
    load_annotations,
    load_durations,
    read_annotations,
    suspicions,
    video_id,
    with_durations,
)
from mmdist_e2e.grounding.data.published import PUBLISHED, fingerprint, protocol_of
from mmdist_e2e.store import FeatureStore
from mmdist_e2e.structures import Features, MmdistError, Provenance

needs_data = pytest.mark.skipif(
    "MMDIST_DATA" not in os.environ, reason="set MMDIST_DATA for the real files"
)


def write(path: Path, value: object) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_charades_sta_lines(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.txt",
        "3MSZA 24.3 30.4##person turn a light on.\n\nmy video.mp4 0 6.9##a # of ## books\n",
    )
    durations = write(tmp_path / "d.json", {"3MSZA.mp4": 30.96})
    first, second = load_annotations(path, durations=durations)
    assert first == Annotation("3MSZA", 30.96, 24.3, 30.4, "person turn a light on.")
    assert second == Annotation("my video", None, 0.0, 6.9, "a # of ## books")


def test_cpl_rows(tmp_path: Path) -> None:
    # The content decides, not the suffix.
    for name in ("a.json", "a.txt"):
        path = write(tmp_path / name, [["v", 30, [7.3, 17.3], "person pours."]])
        assert load_annotations(path) == [Annotation("v", 30.0, 7.3, 17.3, "person pours.")]


def test_activitynet_captions(tmp_path: Path) -> None:
    videos = {
        "v_a": {"duration": 55.15, "timestamps": [[0.28, 55.16], [3, 9]], "sentences": ["x", " y"]},
        "v_b": {"duration": 7, "timestamps": [[0, 1]], "sentences": ["z"], "other": None},
    }
    for indent in (None, 1):
        path = write(tmp_path / "a.json", json.dumps(videos, indent=indent))
        assert load_annotations(path) == [
            Annotation("v_a", 55.15, 0.28, 55.16, "x"),  # an end 0.01 s late is kept
            Annotation("v_a", 55.15, 3.0, 9.0, "y"),
            Annotation("v_b", 7.0, 0.0, 1.0, "z"),
        ]


def test_backward_moments_of_activitynet_are_left_out_and_said(tmp_path: Path) -> None:
    entry = {"duration": 9, "timestamps": [[5, 2], [1, 1], [1, 2]], "sentences": ["a", "b", "c"]}
    path = write(tmp_path / "a.json", {"v": entry})
    with pytest.warns(UserWarning, match=r"2 moments that do not end after they start are left"):
        (kept,) = load_annotations(path)
    assert kept.sentence == "c"


def test_qvhighlights_lines(tmp_path: Path) -> None:
    queries = ["A girl packs up.", "A girl leaves."]
    row = {
        "qid": 2579, "duration": 150, "vid": "NUsG9BgSes0_210.0_360.0",
        "relevant_clip_ids": [41], "relevant_windows": [[0, 4], [82, 150], [10, 12]],
    }  # fmt: skip
    path = write(tmp_path / "a.jsonl", "\n".join(json.dumps(row | {"query": q}) for q in queries))
    first, second = load_annotations(path)
    # The longest first: what a single moment is wanted for takes it.
    assert first == Annotation(
        "NUsG9BgSes0_210.0_360.0", 150.0, 82.0, 150.0, "A girl packs up.", ((0, 4), (10, 12))
    )
    assert first.moments == ((82, 150), (0, 4), (10, 12))
    assert second == replace(first, sentence=queries[1])


def test_timelens_and_charades_cg(tmp_path: Path) -> None:
    """The fields that TimeLens' loaders read, and the extra ones of Charades-CG's splits."""
    bench = {"v1": {"duration": 30.5, "spans": [[1, 2.5], [3, 4]], "queries": ["A cat.", "A dog"]}}
    assert load_annotations(write(tmp_path / "bench.json", bench)) == [
        Annotation("v1", 30.5, 1, 2.5, "A cat."), Annotation("v1", 30.5, 3, 4, "A dog"),
    ]  # fmt: skip
    video = {"source": "didemo", "video_path": "didemo/a b.mp4", "duration": 30}
    events = [{"query": "x", "span": [[1, 2], [4, 9]]}, {"query": "y", "span": [3, 5]}]
    filtered = video | {"query": "z", "span": [[0, 7]], "iou": 0.5}
    expected = [
        Annotation("didemo/a b", 30, 4, 9, "x", ((1, 2),)),
        Annotation("didemo/a b", 30, 3, 5, "y"),
        Annotation("didemo/a b", 30, 0, 7, "z"),
    ]
    records = [video | {"events": events}, filtered]
    lines = "\n".join(json.dumps(record) for record in records)
    assert load_annotations(write(tmp_path / "a.jsonl", lines)) == expected
    assert load_annotations(write(tmp_path / "a.json", records)) == expected
    composed = {"duration": 9, "timestamps": [[1, 2]], "sentences": ["x"], "novels": [{"v-n": []}]}
    assert load_annotations(write(tmp_path / "cg.json", {"v": composed})) == [
        Annotation("v", 9, 1, 2, "x")
    ]


GOOD = '["v", 30, [1, 2], "x"]'
QV = '{"vid": "v", "duration": 9, "query": "x", "relevant_windows": [[1, 2]]}'


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("v 1 2##ok\nv 1##no\n", "Line 2"),
        ("v 1 2 no separator\n", "Line 1"),
        ("v one 2##x\n", "Line 1 .* 'one'"),
        ("v 1 inf##x\n", "Line 1 .* 'inf'"),
        ("v 5 2##x\n", r"Line 1 .* 0 <= start <= end"),
        ("v 1 2##\n", "Line 1 .* no sentence"),
        ("v True 2##x\n", "Line 1 .* 'True'"),
        ("\n", "no annotations"),
        ("[[1]", "not readable JSON"),
        (f'[{GOOD}, ["v", 30, 1, "x"]]', "Row 2 .* no moment"),
        (f'[{GOOD}, ["v", 30, [1, 2, 3], "x"]]', "Row 2 .* moment .1.0, 2.0, 3.0.;"),
        (f'[{GOOD}, ["v", -1, [1, 2], "x"]]', "Row 2 .* duration -1"),
        (f'[{GOOD}, ["v", "?", [1, 2], "x"]]', "Row 2 .* a duration"),
        (f'[{GOOD}, ["v", 30, [1, 2], 7]]', "Row 2 .* no sentence"),
        (f'[{GOOD}, ["", 30, [1, 2], "x"]]', "Row 2 .* no video"),
        (f"[{GOOD}, 5]", "Row 2 .* is not"),
        (f'[{GOOD}, ["v", 1{"0" * 400}, [1, 2], "x"]]', "Row 2 .* a duration"),
        (f'[{GOOD}, ["v", 30, [false, 2], "x"]]', "Row 2 .* a time .* False"),
        ("[" * 100_000, "not readable JSON"),
        ("{}", "no annotations"),
        ('{"v": 30.5}', "The video 'v'"),
        ('{"v": {"duration": 9, "timestamps": [[1, 2]], "sentences": []}}', "The video 'v'"),
        ('{"v": {"duration": 9, "timestamps": [[1, 2], [3]], "sentences": ["a", "b"]}}',
         "Sentence 2 of the video 'v'"),
        (f'{QV}\n{QV.replace("9", "null, 5")}', "Line 2"),
        (f'{QV}\n{QV.replace("[[1, 2]]", "[]")}', "Line 2 .* no moment"),
        (f'{QV}\n{QV.replace("relevant_windows", "saliency")}', "Line 2 .* test split"),
        (f'{QV}\n{QV.replace("[[1, 2]]", "[[1]]")}', "Line 2"),
        ('{"video_path": "v", "duration": 9, "events": [{"query": "x", "span": [1, 2]},'
         ' {"query": "y", "span": [2, 1]}]}', "Sentence 2 of line 1 .* 0 <= start <= end"),
        ('{"video_path": "v", "duration": 9, "events": 3}', "Line 1 .* events"),
        ('{"v": {"duration": 9, "spans": [[1, 2]], "queries": []}}', "The video 'v'"),
        (f'[{GOOD}, {{"vid": "v"}}]', "Row 2 .* is not JSON with vid"),
    ],
)  # fmt: skip
def test_bad_annotations_name_the_place(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(MmdistError, match=reason):
        load_annotations(write(tmp_path / "a.json", text))


def test_all_bad_lines_are_named_together(tmp_path: Path) -> None:
    lines = ["v 1 2##ok", "A 5 1##x", "", "A x 3##x", "A 1 2 x", "v 3 4##\u2028ok", "A nan 2##x"]
    path = write(tmp_path / "a.txt", "\r\n".join(lines))
    with pytest.raises(BadLinesError) as raised:
        load_annotations(path)
    assert [line.split(" of ")[0] for line in raised.value.lines] == [
        "Line 2", "Line 4", "Line 5", "Line 7",
    ]  # fmt: skip
    assert all(line in str(raised.value) for line in raised.value.lines)
    # Of many the first are quoted and the rest counted.
    path = write(tmp_path / "a.txt", "v 1 2##ok\n" + "A 1 2 x\n" * 50)
    with pytest.raises(MmdistError, match="has 50 bad lines") as many:
        load_annotations(path)
    assert len(str(many.value).splitlines()) == 12
    assert str(many.value).endswith("40 more bad lines.")


@pytest.mark.parametrize("bad", [{1}, {2}, {1, 3}])
def test_bad_entries_of_every_format_are_named_together(tmp_path: Path, bad: set[int]) -> None:
    def pick(good: str, wrong: str) -> list[str]:
        return [wrong if number in bad else good for number in (1, 2, 3)]

    activitynet = pick('{"duration": 9, "timestamps": [[1, 2]], "sentences": ["x"]}', "{}")
    files = (
        "\n".join(pick("v 1 2##x", "v 1 2")),
        "\n".join(pick(QV, '{"vid": "v", "query":')),
        f"[{','.join(pick(GOOD, '[]'))}]",
        "{" + ",".join(f'"{n}": {one}' for n, one in enumerate(activitynet, 1)) + "}",
    )
    for text in files:
        with pytest.raises(BadLinesError) as raised:
            load_annotations(write(tmp_path / "a", text))
        assert {int(re.findall(r"\d+", line)[0]) for line in raised.value.lines} == bad
    with pytest.raises(BadLinesError) as raised:
        load_durations(write(tmp_path / "d", "id,length\n" + "\n".join(pick("a,1", "a,x"))))
    assert {int(re.findall(r"\d+", line)[0]) - 1 for line in raised.value.lines} == bad


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\r"])
def test_lines_end_at_line_feeds_alone(tmp_path: Path, separator: str) -> None:
    sentence = f"person opens{separator}the door"
    row = json.loads(QV) | {"query": sentence}
    for text in (
        f"v 1 2##{sentence}\r\nw 3 4##x\r\n",
        "\n".join(json.dumps(r, ensure_ascii=False) for r in (row, row | {"vid": "w"})),
    ):
        (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
        first, second = load_annotations(tmp_path / "a.txt")
        assert (first.sentence, second.video) == (sentence, "w")
    csv = f'id,length,scene\r\nv,5,"a{separator}b"\r\nw,6,c\r\n'
    (tmp_path / "d.csv").write_text(csv, encoding="utf-8", newline="")
    assert load_durations(tmp_path / "d.csv") == {"v": 5, "w": 6}


def test_suspicious_annotations_are_warned_of_once(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "v 1000 5000##x\nv 2 2##x\nv 3 4##x\nv.mp4 3 4##X\nw 4 9##x")
    with pytest.warns(UserWarning, match=r"a\.txt") as caught:
        assert len(load_annotations(path, durations={"v": 10.0})) == 5
    (told,) = (str(warning.message) for warning in caught)
    assert "1 annotations look like milliseconds" in told
    assert "1 annotations have a moment of length zero" in told
    assert "1 lines repeat another line" in told
    # Without durations: no usual video lasts so long.
    (late,), _ = read_annotations(write(path, "v 24300 30400##x"))
    assert suspicions([late], 0) == {"not_in_seconds": 1}
    assert suspicions([late, replace(late, start=3, end=3)], 2) == {
        "not_in_seconds": 1, "zero_length": 1, "left_out": 2,
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_annotations(write(path, "v 0 9##x\nv 0 9##y\nw 0 9##x\n"))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "latin-1"])
def test_encodings_are_read_or_named(tmp_path: Path, encoding: str) -> None:
    for name, text in (("a", "v 1 2##ok\ncafé 1 2##une tasse\n"), ("d", '{"v": 2,\n"café": 3}')):
        (tmp_path / name).write_bytes(text.encode(encoding))
    if encoding in ("utf-16-le", "latin-1"):  # no mark tells them
        for load, name in ((load_annotations, "a"), (load_durations, "d")):
            with pytest.raises(MmdistError, match=r"not readable text.* save the file as UTF-8"):
                load(tmp_path / name)
        return
    annotations = load_annotations(tmp_path / "a", durations=tmp_path / "d")
    assert [(a.video, a.duration_seconds) for a in annotations] == [("v", 2), ("café", 3)]


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(MmdistError, match="cannot be read"):
        load_annotations(tmp_path / "none.txt")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(MmdistError, match="not readable text"):
        load_annotations(tmp_path / "binary")


@pytest.mark.parametrize(
    ("name", "video"),
    [("3MSZA.mp4", "3MSZA"), ("room/a.MKV", "room/a"), ("x_210.0_360.0", "x_210.0_360.0"),
     (".mp4", ".mp4"), ("s13-d21.avi", "s13-d21"), ("cafe\u0301.mp4", "caf\u00e9")],
)  # fmt: skip
def test_video_ids(name: str, video: str) -> None:
    assert video_id(name) == video


def test_durations_of_a_charades_csv(tmp_path: Path) -> None:
    head = "id,subject,script,actions,length\n"
    text = head + '46GP8,HR43,"A person, ""cooking"".\nAnd eats.",c092 11.90 21.20,24.83\n'
    path = write(tmp_path / "Charades_v1_test.csv", text + "N11GT,0KZ7,x,,18.33\n")
    assert load_durations(path) == {"46GP8": 24.83, "N11GT": 18.33}
    annotations = load_annotations(write(tmp_path / "a.txt", "N11GT 0 5##x"), durations=path)
    assert annotations[0].duration_seconds == 18.33


def test_durations_as_activitynet_has_them(tmp_path: Path) -> None:
    videos = {"v_a": {"duration": 9.5, "subset": "training"}, "v_b.mp4": {"duration": 7}}
    for raw in (videos, {"version": "1.3", "database": videos}):
        assert load_durations(write(tmp_path / "d.json", raw)) == {"v_a": 9.5, "v_b": 7}
    assert load_durations(write(tmp_path / "d.json", {"database": 3, "v": 4})) == {
        "database": 3,
        "v": 4,
    }
    with pytest.raises(MmdistError, match=r"The video 'v' .* duration"):
        load_durations(write(tmp_path / "d.json", {"v": {"subset": "x"}}))


def test_durations_of_a_feature_store(tmp_path: Path) -> None:
    features = Features(
        np.ones((2, 3), np.float32), np.array([[0, 1], [1, 2.0]]), 12.5, "flow", Provenance({})
    )
    FeatureStore(tmp_path).save("room/a", features)
    assert load_durations(tmp_path) == {"room/a": 12.5}
    (tmp_path / "empty").mkdir()
    with pytest.raises(MmdistError, match="holds no features"):
        load_durations(tmp_path / "empty")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("id,length\na,5\nb,\n", "Line 3"),
        ("name,seconds\na,5\n", "no durations"),
        ('{"a": 5, "b": "x"}', "'b'"),
        ('{"a": 0}', "above 0"),
        ("id,length\n,5\n", "Line 2 .* no video"),
        (f'id,length\n"a{"x" * 200_000}",5\n', "Line 2 .* is not CSV"),
        ("[1]", "must map"),
        ('{"a"', "not readable JSON"),
    ],
)
def test_bad_durations_name_the_place(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(MmdistError, match=reason):
        load_durations(write(tmp_path / "d.csv", text))


def test_the_protocol_cpl_drops_late_ends() -> None:
    on_time = Annotation("v", 10.0, 1, 10.0, "x")
    late = Annotation("v", 10.0, 1, 10.01, "x")
    more = Annotation("v", 10.0, 1, 9, "x", ((9.5, 10.5),))
    assert in_protocol([late, on_time, more], "cpl") == [on_time]
    assert in_protocol([late, on_time, more], "official") == [late, on_time, more]
    unknown = Annotation("w", None, 1, 2, "x")
    with pytest.raises(MmdistError, match=r"1 videos have no duration \(w\)"):
        in_protocol([on_time, unknown], "cpl")
    assert in_protocol(with_durations([unknown], {"w": 5.0}), "cpl")[0].duration_seconds == 5
    with pytest.raises(MmdistError, match="leaves no query"):
        in_protocol([late], "cpl")
    with pytest.raises(MmdistError, match="official, cpl"):
        in_protocol([late], "charades")


def test_ids_that_are_not_valid_unicode_are_digested(tmp_path: Path) -> None:
    """JSON may hold half a surrogate pair, as names of files with strange bytes become."""
    rows = [[f"\ud800{i}", 9.0, [1, 2], "x"] for i in range(3)]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows), encoding="ascii")
    annotations = load_annotations(path)
    assert protocol_of(path, annotations).startswith("a.json")
    assert len(carve_validation(annotations)[0]) == 2


def test_the_protocol_of_other_files_is_told_by_late_ends(tmp_path: Path) -> None:
    path = tmp_path / "my.txt"
    on_time, late = Annotation("v", 9.0, 1, 9, "x"), Annotation("v", 9.0, 1, 9.5, "x")
    assert protocol_of(path, [on_time]) == "my.txt (1 queries, cpl: no late ends)"
    assert protocol_of(path, [on_time, late]) == "my.txt (2 queries, official: 1 late ends kept)"
    assert "unknown" in protocol_of(path, [Annotation("v", None, 1, 9, "x"), late])
    # The number of queries alone says nothing.
    many = [Annotation("v", 9.0, 0, i / 1000, "x") for i in range(3158)]
    assert protocol_of(path, many).startswith("my.txt")


def test_a_fingerprint_is_of_the_content() -> None:
    one, two = Annotation("v", 9.0, 1.0, 2.5, "A dog."), Annotation("w", None, 0.0, 3.0, "A cat.")
    same = [Annotation("w", 4.0, 0, 3.001, "a cat"), Annotation("v", 9.0, 1, 2.5, "a  DOG .")]
    assert fingerprint([one, two]) == fingerprint(same)
    for changed in (
        [one], [one, one, two], [one, Annotation("w", None, 0.0, 3.1, "A cat.")],
        [one, Annotation("x", None, 0, 3, "A cat.")], [one, Annotation("w", None, 0, 3, "A rat.")],
        [one, Annotation("w", None, 0, 3, "A cat.", ((4, 5),))],
    ):  # fmt: skip
        assert fingerprint(changed) != fingerprint([one, two])


def many_annotations(videos: int = 200) -> list[Annotation]:
    return [
        Annotation(f"v{i}", 9.0, 0, q + 1, f"sentence {q}")
        for i in range(videos)
        for q in range(1 + i % 5)
    ]


def test_validation_is_carved_by_video_whatever_the_order() -> None:
    annotations = many_annotations()
    *carved, report = carve_validation(annotations, 0.1, seed=3)
    train, val = ({a.video for a in part} for part in carved)
    assert len(val) == 20
    assert not train & val
    assert train | val == {a.video for a in annotations}
    assert [a for a in annotations if a.video in val] == carved[1]  # the file's order
    assert sum(map(len, carved)) == len(annotations)
    assert f"20 of 200 videos, {len(carved[1])} of 600 queries (seed 3)" in report

    shuffled = random.Random(0).sample(annotations, len(annotations))
    again = carve_validation(shuffled, 0.1, seed=3)[1]
    assert {a.video for a in again} == val
    assert {a.video for a in carve_validation(annotations, 0.1, seed=4)[1]} != val
    # A larger share holds the smaller one, and one video more moves one video at most.
    assert val < {a.video for a in carve_validation(annotations, 0.2, seed=3)[1]}
    more = [*annotations, Annotation("new", 9.0, 0, 1, "x")]
    assert len(val - {a.video for a in carve_validation(more, 0.1, seed=3)[1]}) <= 1


def test_the_carved_share_is_a_draw_without_favour() -> None:
    annotations = many_annotations()
    drawn = [carve_validation(annotations, 0.25, seed=s)[1] for s in range(40)]
    counts = [sum(any(a.video == f"v{i}" for a in val) for val in drawn) for i in range(200)]
    # Binomial(40, 1/4): mean 10, deviation 2.7.
    assert np.mean(counts) == 10
    assert 2.0 < np.std(counts) < 3.5


def test_small_and_impossible_splits() -> None:
    pair = many_annotations(2)
    for fraction in (0.01, 0.99):
        assert all(carve_validation(pair, fraction))
    with pytest.raises(MmdistError, match="One video"):
        carve_validation(many_annotations(1))
    for fraction in (0.0, 1.0, -1, float("nan")):
        with pytest.raises(MmdistError, match="between 0 and 1"):
            carve_validation(pair, fraction)


@needs_data
def test_the_two_protocols_of_charades_sta() -> None:
    root = Path(os.environ["MMDIST_DATA"]) / "charades_sta"
    text, durations = root / "charades_sta_test.txt", root / "durations_test.json"
    official = load_annotations(text, durations=durations)
    made = load_annotations(text, durations=durations, protocol="cpl")
    published = load_annotations(root / "cpl_test.json")
    assert (len(official), len(published)) == (3_720, 3_158)
    assert made == published  # query for query
    assert protocol_of(text, official) == "charades_sta official"
    assert protocol_of(text, made) == protocol_of(text, published) == "charades_sta cpl"
    assert protocol_of(text, load_annotations(text)) == "charades_sta official"  # no durations
    assert protocol_of(text, official[1:]).endswith("(3719 queries, official: 562 late ends kept)")
    train = load_annotations(root / "charades_sta_train.txt")
    assert len(train) == 12_408
    assert fingerprint(train) in PUBLISHED
    assert protocol_of(text, load_annotations(root / "cpl_train.json")).endswith("training split")


@needs_data
def test_activitynet_as_published() -> None:
    root = Path(os.environ["MMDIST_DATA"]) / "activitynet"
    for name, count, late in (("val_1", 17_505, 134), ("val_2", 17_031, 111)):
        annotations = load_annotations(root / f"{name}.json")
        raw = json.loads((root / f"{name}.json").read_text())
        assert len(annotations) == count == sum(len(v["sentences"]) for v in raw.values())
        assert sum(a.ends_late for a in annotations) == late
        assert name in protocol_of(root / f"{name}.json", annotations)
