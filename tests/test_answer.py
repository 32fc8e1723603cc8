"""Answers as objects: what they hold, how they print, and what asking wrongly costs."""

from __future__ import annotations

import html.parser
import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from make_videos import make_video

import mmdist_e2e as mm
from mmdist_e2e.cli.main import main
from mmdist_e2e.extractors import extract as extract_module
from mmdist_e2e.extractors import runner
from mmdist_e2e.grounding import answer as answer_module
from mmdist_e2e.structures import Provenance

QUERY = "person opens the door"
WARNING = "trained on a drawn world: on real video this is a guess"


@pytest.fixture
def load(tiny_run, tiny_extractor, tmp_path):
    """Loads the tiny model; counts the videos that are extracted."""

    def load(**options):
        options = {"cache": tmp_path / "cache", **options}
        return mm.load(tiny_run / "model", extractor=str(tiny_extractor), **options)

    return load


@pytest.fixture
def extracted(monkeypatch):
    """The paths of the videos that were extracted."""
    paths: list[Path] = []
    extract_video = extract_module.extract_video

    def counting(path, *arguments, **options):
        paths.append(path)
        return extract_video(path, *arguments, **options)

    monkeypatch.setattr(extract_module, "extract_video", counting)
    return paths


@pytest.fixture
def clip(tiny_run):
    return tiny_run / "videos" / "v5.mp4"


def an_answer(**changes):
    moments = (mm.Moment(1.0, 2.5, 0.25), mm.Moment(0.0, 9.0, -1.0))
    facts = {
        "video": "<b>clip</b>.mp4",
        "query": 'a "man" & <script>',
        "duration_seconds": 9.0,
        "moments": moments,
        "unknown_words": ("<i>",),
        "model": "tiny",
        "trained_on": "x < y",
        "warning": WARNING,
    }
    return mm.Answer(**{**facts, **changes})


def test_an_answer_is_a_sequence_of_its_moments():
    answer = an_answer()
    first, second = answer
    assert (answer[0], answer[-1], len(answer)) == (first, second, 2)
    assert answer[:1] == (first,)
    assert first in answer


def test_to_dict_holds_everything_in_plain_json_types():
    raw = an_answer().to_dict()
    assert json.loads(json.dumps(raw)) == raw
    assert set(raw) == set(mm.Answer.__dataclass_fields__)
    assert raw["moments"][0] == {"start": 1.0, "end": 2.5, "score": 0.25}


def test_an_answer_prints_as_a_table_with_its_warning():
    lines = str(an_answer()).splitlines()
    assert lines[2].split() == ["1", "1.00", "2.50", "0.250"]
    assert "<i>" in lines[4]
    assert lines[-1] == f"Warning: {WARNING}"
    assert "Warning" not in repr(an_answer(warning=None))


def test_html_escapes_what_users_wrote():
    tags: list[str] = []
    text: list[str] = []
    parser = html.parser.HTMLParser()
    parser.handle_starttag = lambda tag, _: tags.append(tag)
    parser.handle_data = text.append
    parser.feed(an_answer()._repr_html_())
    assert {"b", "script", "i"}.isdisjoint(tags)
    for part in ("<b>clip</b>.mp4", 'a "man" & <script>', "<i>", "x < y", WARNING):
        assert part in "\n".join(text)
    assert tags.count("td") == 12


def test_ground_says_what_was_asked_and_what_answers(load, clip, tiny_run):
    grounder = load()
    answer = grounder.ground(str(clip), "person quickly vrrkts the door", top_k=2)
    assert isinstance(answer, mm.Answer)
    assert (answer.video, answer.query) == (str(clip), "person quickly vrrkts the door")
    assert answer.unknown_words == ("vrrkts",)
    assert len(answer) == 2
    stored = mm.FeatureStore(tiny_run / "features").load("v5", "rgb")
    assert answer.duration_seconds == stored.duration_seconds
    assert "train.txt" in answer.trained_on
    assert answer.warning is None
    features = grounder.ground(stored, answer.query, top_k=2)
    assert features.moments == answer.moments


def test_a_model_of_the_drawn_world_warns_in_python_and_on_the_command_line(
    load, clip, tiny_extractor, tiny_run, tmp_path
):
    config = json.loads((tiny_run / "model" / "config.json").read_text())
    config["trained_on"] = "our own synthetic world, version 2"
    folder = tmp_path / "model"
    folder.mkdir()
    for path in (tiny_run / "model").iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    (folder / "config.json").write_text(json.dumps(config))
    options = ["--model", folder, "--extractor", tiny_extractor, "--cache", tmp_path / "cache"]
    command = ["ground", *map(str, (clip, "person opens vrrkts", *options))]
    table = CliRunner().invoke(main, command)
    assert WARNING in table.stdout
    assert "vrrkts" in table.stdout.split("\n", 1)[1]
    run = CliRunner().invoke(main, [*command, "--json"])
    assert WARNING in json.loads(run.stdout)["warning"]
    assert json.loads(run.stdout)["unknown_words"] == ["vrrkts"]
    assert "vrrkts" in run.stderr
    model = load().model
    model.config = config
    assert WARNING in mm.Grounder(model, cache=tmp_path / "cache").ground(clip, QUERY).warning


def test_several_queries_read_the_video_once(load, clip, extracted):
    grounder = load(cache=None)
    queries = [QUERY, "person opens the box"]
    answers = grounder.ground(clip, queries)
    assert len(extracted) == 1
    assert [answer.query for answer in answers] == queries
    assert answers == [grounder.ground(clip, query) for query in queries]
    assert isinstance(grounder.ground(clip, queries[:1]), list)


@pytest.fixture
def command(clip, tiny_run, tiny_extractor, tmp_path):
    options = ["--model", tiny_run / "model", "--extractor", tiny_extractor]
    options += ["--cache", tmp_path / "cache"]

    def run(*arguments, stdin=None):
        return CliRunner().invoke(
            main, ["ground", *map(str, (clip, *arguments, *options))], input=stdin
        )

    return run


def test_queries_on_the_command_line_from_a_file_and_from_stdin(command, tmp_path):
    file = tmp_path / "queries.txt"
    # A byte order mark, Windows line ends, blank lines and a line separator inside a query.
    text = "\ufeffperson opens the box\r\n\r\n  \nperson\u2028at the door"
    file.write_text(text, encoding="utf-8", newline="")
    expected = [QUERY, "person opens the box", "person\u2028at the door"]
    several = command(QUERY, "--queries", file, "--json")
    assert [answer["query"] for answer in json.loads(several.stdout)] == expected
    single = command(QUERY, "--json")
    assert json.loads(single.stdout) == json.loads(several.stdout)[0]
    piped = command("--queries", "-", "--json", stdin="person opens the box\n")
    assert json.loads(piped.stdout) == json.loads(several.stdout)[1]
    table = command(QUERY, "person opens the box")
    assert table.stdout.count(" score") == 2
    assert table.stdout.count("Trained on: ") == 1


def test_bad_queries_are_refused_before_the_video_is_read(command, tmp_path, extracted):
    one = command(QUERY, "  ")
    assert one.exit_code == 1
    assert one.output.startswith("Error: Query 2 of 2: ")
    assert "empty" in one.output
    assert "no query" in command().output
    (tmp_path / "latin").write_bytes(b"caf\xe9 door\n")
    (tmp_path / "blank").write_text("\n \n")
    assert "not UTF-8" in command("--queries", tmp_path / "latin").output
    assert "no query" in command("--queries", tmp_path / "blank").output
    missing = command("--queries", tmp_path / "missing")
    assert "missing cannot be read" in missing.output
    assert missing.exit_code == 1
    assert extracted == []


def test_arguments_of_a_wrong_type_are_one_sentence(load, clip, extracted):
    grounder = load()
    rgb = mm.Features(
        np.zeros((3, 4), np.float32), np.zeros((3, 2)), 3.0, "rgb", Provenance.external("x")
    )
    for wrong in (5, None, [clip], b"clip.mp4", {"rgb": 5}, {"flow": rgb}, {5: rgb}, {}):
        with pytest.raises(mm.MmdistError):
            grounder.ground(wrong, QUERY)
    for wrong in (5, None, [], [QUERY, 5], [None], b"door", [[QUERY]], ""):
        with pytest.raises(mm.MmdistError):
            grounder.ground(clip, wrong)
    for wrong in (0, -1, 1.5, "5", True, None):
        with pytest.raises(mm.MmdistError, match="top_k"):
            grounder.ground(clip, QUERY, top_k=wrong)
    for wrong in (5, None, [clip]):
        with pytest.raises(mm.MmdistError, match="video"):
            grounder.encode(wrong)
        with pytest.raises(mm.MmdistError, match="video"):
            mm.extract(wrong)
    assert extracted == []
    assert len(grounder.ground(clip, QUERY, top_k=np.int64(1))) == 1
    for option, wrong in (
        ("device", 5),
        ("device", "abacus"),
        ("precision", None),
        ("cache", 5),
        ("cache", ["a"]),
        ("extractor", 5),
        ("extractor", [5]),
    ):
        with pytest.raises(mm.MmdistError, match=option):
            mm.load(**{option: wrong})
    with pytest.raises(mm.MmdistError, match="model"):
        mm.load(5)
    with pytest.raises(mm.MmdistError, match="model"):
        mm.Grounder("folder")


@pytest.mark.parametrize(
    "changes",
    [
        {"data": [[1.0]]},
        {"data": np.array([["a"]])},
        {"times": None},
        {"duration_seconds": "1"},
        {"modality": ["rgb"]},
    ],
)
def test_features_of_a_wrong_type_are_one_sentence(changes):
    right = {
        "data": np.zeros((1, 1), np.float32),
        "times": np.zeros((1, 2)),
        "duration_seconds": 1.0,
        "modality": "rgb",
        "provenance": Provenance.external("x"),
    }
    mm.Features(**right)
    with pytest.raises(mm.MmdistError):
        mm.Features(**{**right, **changes})


def test_without_a_cache_nothing_is_kept(load, clip, extracted, tmp_path, monkeypatch):
    monkeypatch.setenv("MMDIST_CACHE", str(tmp_path / "users"))
    grounder = load(cache=None)
    assert grounder.ground(clip, QUERY) == grounder.ground(clip, QUERY)
    assert len(extracted) == 2
    assert list(tmp_path.iterdir()) == []
    load(cache=True).ground(clip, QUERY)
    assert list((tmp_path / "users").rglob("*.npz"))


def test_an_unwritable_cache_costs_one_warning(load, clip, command, tmp_path):
    expected = load(cache=None).ground(clip, QUERY)
    (tmp_path / "cache").write_text("a file, where a folder cannot be made")
    grounder = load()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert grounder.ground(clip, QUERY) == expected
        grounder.ground(make_video(tmp_path / "b.mp4", 20), QUERY)
    assert ["cannot be written" in str(each.message) for each in warned] == [True]
    run = command(QUERY, "--json")
    assert run.exit_code == 0
    assert json.loads(run.stdout)["query"] == QUERY
    assert run.stderr.count("Warning: ") == 1


def test_without_a_writable_home_there_is_an_answer(load, clip, monkeypatch):
    for name in ("MMDIST_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/proc/nothing")
    grounder = load(cache=True)
    with pytest.warns(UserWarning, match="cannot be written"):
        assert grounder.ground(clip, QUERY)


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 no zip", None])
def test_damaged_cache_files_are_made_again(load, clip, extracted, tmp_path, damage):
    expected = load().ground(clip, QUERY)
    (file,) = (tmp_path / "cache").rglob("*.npz")
    whole = file.read_bytes()
    file.write_bytes(whole[:-100] if damage is None else damage)
    assert load().ground(clip, QUERY) == expected
    assert len(extracted) == 2
    load().ground(clip, QUERY)
    assert len(extracted) == 2


def test_models_that_share_a_cache_do_not_displace_each_other(
    load, clip, extracted, tiny_extractor, tmp_path
):
    windows, dense = load(), load()
    dense.model.config = json.loads(json.dumps(dense.model.config))
    dense.model.config["features"]["rgb"].update(mode="dense", stride=8, window=16)
    first = windows.encode(clip)["rgb"].provenance.matters, dense.encode(clip)["rgb"]
    assert first[0]["mode"] != first[1].provenance.matters["mode"]
    for model in (windows.model, dense.model, windows.model):
        mm.Grounder(model, extractor=str(tiny_extractor), cache=tmp_path / "cache").encode(clip)
    assert len(extracted) == 2


def test_a_clip_is_known_by_its_content_however_it_is_called(load, clip, extracted, tmp_path):
    expected = load().ground(clip, QUERY)
    for name in ("x" * 251, "ä" * 125, ".hidden", "a b.c"):
        copy = tmp_path / f"{name}.mp4"
        copy.write_bytes(clip.read_bytes())
        assert load().ground(copy, QUERY).moments == expected.moments
    assert len(extracted) == 1
    assert max(len(p.name) for p in (tmp_path / "cache").rglob("*")) < 100


def test_a_replaced_clip_of_equal_size_and_time_is_noticed(load, clip, extracted, tmp_path):
    copy = tmp_path / "a.mp4"
    raw = clip.read_bytes()
    copy.write_bytes(raw)
    grounder = load()
    grounder.ground(copy, QUERY)
    stat = copy.stat()
    copy.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    os.utime(copy, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    grounder.ground(copy, QUERY)
    assert len(extracted) == 2


def test_an_extractor_of_other_weights_is_refused_before_extraction(
    load, clip, tiny_extractor, extracted, tmp_path
):
    from safetensors.torch import load_file, save_file

    other = tmp_path / "tiny"
    other.mkdir()
    (other / "config.json").write_bytes((tiny_extractor / "config.json").read_bytes())
    state = {k: v + 1 for k, v in load_file(tiny_extractor / "model.safetensors").items()}
    save_file(state, other / "model.safetensors")
    grounder = mm.Grounder(load().model, extractor=other)
    with pytest.raises(mm.MmdistError, match=r"weights is .* where the model needs"):
        grounder.ground(clip, QUERY)
    assert extracted == []


def test_the_device_reaches_the_grounding_model(load, monkeypatch):
    monkeypatch.setattr(runner, "resolve_device", lambda device: device)
    grounder = load(device="meta")
    assert {p.device.type for p in grounder.model.model.parameters()} == {"meta"}


@pytest.mark.cuda
def test_a_gpu_gives_the_same_answer(load, clip):
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    features = load().encode(clip)
    expected = load(device="cpu").ground(features, QUERY)
    grounder = load(device="cuda")
    got = grounder.ground(features, QUERY)
    assert grounder.model.model.mask_vec.is_cuda
    for one, other in zip(got, expected, strict=True):
        assert (one.start, one.end) == pytest.approx((other.start, other.end), abs=1e-3)


def test_a_query_runs_in_one_thread_and_restores_the_number(load, clip, monkeypatch):
    grounder, seen = load(), []
    predict_batch = answer_module.predict_batch

    def watching(*arguments):
        seen.append(torch.get_num_threads())
        return predict_batch(*arguments)

    monkeypatch.setattr(answer_module, "predict_batch", watching)
    features = grounder.encode(clip)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        grounder.ground(features, QUERY)
        assert torch.get_num_threads() == 3
        monkeypatch.setattr(answer_module, "predict_batch", None)
        with pytest.raises(TypeError):
            grounder.ground(features, QUERY)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert seen == [1]


def test_types_ship():
    assert (Path(mm.__file__).parent / "py.typed").is_file()
