"""The whole way with tiny networks: a clip and a sentence to moments, and what people get wrong."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from make_videos import make_video

import mmdist_e2e as mm
from mmdist_e2e.cli.main import main
from mmdist_e2e.extractors import extract as extract_module
from mmdist_e2e.extractors.profiles import describe
from mmdist_e2e.extractors.video.reader import Decoder
from mmdist_e2e.grounding.answer import GroundingModel
from mmdist_e2e.grounding.data.annotations import world_of
from mmdist_e2e.store import FeatureStore


def ground(root: Path, extractor: Path, *arguments: object) -> Result:
    options = ["--model", root / "model", "--extractor", extractor, "--cache", root / "cache"]
    return CliRunner().invoke(main, ["ground", *map(str, (*arguments, *options))])


@pytest.fixture
def grounder(tiny_run, tiny_extractor, tmp_path):
    return mm.load(tiny_run / "model", extractor=str(tiny_extractor), cache=tmp_path / "cache")


def test_an_answer_is_a_ranked_table_inside_the_video(tiny_run, tiny_extractor):
    clip = tiny_run / "videos" / "v5.mp4"
    table = ground(tiny_run, tiny_extractor, clip, "person opens door")
    assert table.exit_code == 0, table.output
    assert "Trained on: " in table.output
    run = ground(tiny_run, tiny_extractor, clip, "person opens door", "--json", "--top-k", 2)
    answer = json.loads(run.stdout)
    moments = answer["moments"]
    assert len(moments) == 2
    scores = [moment["score"] for moment in moments]
    assert scores == sorted(scores, reverse=True)
    duration = FeatureStore(tiny_run / "features").load("v5", "rgb").duration_seconds
    for moment in moments:
        assert 0 <= moment["start"] <= moment["end"] <= duration + 1e-3
    first = next(line for line in table.output.splitlines() if line.strip().startswith("1 "))
    # Both are rounded, to three places and to two.
    assert float(first.split()[1]) == pytest.approx(moments[0]["start"], abs=0.0055)


def test_a_second_question_is_answered_from_the_cache(grounder, tiny_run, monkeypatch):
    clip = tiny_run / "videos" / "v4.mp4"
    first = grounder.ground(clip, "person opens door")

    def must_not_decode(*_: object, **__: object) -> None:
        raise AssertionError("features were cached")

    monkeypatch.setattr(extract_module, "extract_video", must_not_decode)
    assert grounder.ground(clip, "person opens door") == first
    assert grounder.ground(grounder.encode(clip), "person opens door").moments == first.moments


@pytest.fixture
def two_modalities(tiny_extractor, tiny_flow_extractor, tmp_path, monkeypatch):
    """A grounder whose model reads rgb and flow; passes of decoding are counted."""
    passes: list[object] = []
    frames = Decoder.frames

    def counting(self, *arguments, **options):
        passes.append(arguments)
        return frames(self, *arguments, **options)

    monkeypatch.setattr(Decoder, "frames", counting)
    folders = {"rgb": str(tiny_extractor), "flow": str(tiny_flow_extractor)}
    matters = {m: describe(f, mode="dense").matters for m, f in folders.items()}
    config = {"modalities": ["rgb", "flow"], "features": matters}
    model = GroundingModel(torch.nn.Identity(), None, None, config)

    def make(*modalities: str) -> mm.Grounder:
        given = [folders[modality] for modality in modalities]
        return mm.Grounder(model, extractor=given, cache=tmp_path / "cache")

    return make, model, passes


def test_every_modality_a_model_reads_comes_from_one_pass(two_modalities, tmp_path):
    make, model, passes = two_modalities
    clip = make_video(tmp_path / "a.mp4", 30, rate=12)
    grounder = make("flow", "rgb")
    features = grounder.encode(clip)
    assert {m: dict(f.provenance.matters) for m, f in features.items()} == model.matters
    assert [len(features[m].data) for m in ("rgb", "flow")] == [3, 3]
    grounder.encode(clip)
    make("flow", "rgb").encode(clip)
    assert len(passes) == 1
    for path in (tmp_path / "cache").rglob("*.flow.npz"):
        path.unlink()
    again = make("flow", "rgb").encode(clip)
    assert len(passes) == 2
    np.testing.assert_array_equal(again["flow"].data, features["flow"].data)


def test_extractors_that_a_model_does_not_read_or_cannot_name(
    two_modalities, tiny_run, tiny_flow_extractor, tmp_path
):
    make, model, _ = two_modalities
    with pytest.raises(mm.MmdistError, match="trained on 'tiny-flow' features"):
        make("rgb").encode(tmp_path / "a.mp4")
    model.matters["flow"]["pca"] = "0123456789abcdef"
    with pytest.raises(mm.MmdistError, match="mmdist pull activitynet-pca --from FILE"):
        make("rgb", "flow").encode(tmp_path / "a.mp4")
    clip = tiny_run / "videos" / "v0.mp4"
    run = ground(tiny_run, tiny_flow_extractor, clip, "person opens door")
    assert run.exit_code == 1
    assert "gives flow, and this model reads rgb" in run.output


def test_a_replaced_clip_is_read_again(grounder, tmp_path):
    clip = make_video(tmp_path / "a.mp4", 30)
    short = grounder.encode(clip)["rgb"]
    make_video(clip, 90)
    assert grounder.encode(clip)["rgb"].duration_seconds > 2 * short.duration_seconds


def test_features_of_another_making_are_refused_with_the_difference(grounder, tiny_run):
    features = grounder.encode(tiny_run / "videos" / "v0.mp4")["rgb"]
    matters = {**features.provenance.matters, "stride": 4}
    other = replace(features, provenance=replace(features.provenance, matters=matters))
    with pytest.raises(mm.MmdistError, match="stride is 4 where the model needs 8"):
        grounder.ground(other, "person opens door")


@pytest.mark.parametrize(
    ("query", "words"),
    [("", "empty"), ("   ", "empty"), ("qwxz vrrkt", "known|None of the words")],
)
def test_queries_without_a_known_word_fail_before_any_decoding(
    tiny_run, tiny_extractor, query, words, monkeypatch
):
    monkeypatch.setattr(extract_module, "extract_video", None)
    run = ground(tiny_run, tiny_extractor, tiny_run / "videos" / "v0.mp4", query)
    assert run.exit_code == 1
    assert run.output.startswith("Error: ")
    assert any(word in run.output for word in words.split("|")), run.output


@pytest.mark.parametrize(
    ("clip", "words"),
    [("missing.mp4", "does not exist"), ("text.mp4", "text.mp4"), ("empty.mp4", "empty")],
)
def test_unreadable_clips_are_one_sentence(tiny_run, tiny_extractor, tmp_path, clip, words):
    (tmp_path / "text.mp4").write_text("hello\n" * 100)
    (tmp_path / "empty.mp4").touch()
    run = ground(tiny_run, tiny_extractor, tmp_path / clip, "person opens door")
    assert run.exit_code == 1
    assert words in run.output
    assert len(run.output.strip().splitlines()) == 1


def test_top_k_and_model_folder_are_checked(tiny_run, tiny_extractor, tmp_path):
    clip = tiny_run / "videos" / "v0.mp4"
    bad_k = ground(tiny_run, tiny_extractor, clip, "person opens door", "--top-k", 0)
    assert bad_k.exit_code == 1
    assert "top_k must be at least 1" in bad_k.output
    run = CliRunner().invoke(main, ["ground", str(clip), "person", "--model", str(tmp_path)])
    assert run.exit_code == 1
    assert str(tmp_path) in run.output


def test_an_unguarded_script_works(tiny_run, tiny_extractor, tmp_path):
    """The README's example, as a file without a main guard, in another working directory."""
    script = tmp_path / "mine.py"
    script.write_text(
        "import mmdist_e2e as mm\n"
        f"grounder = mm.load({str(tiny_run / 'model')!r}, cache={str(tmp_path / 'c')!r},\n"
        f"                   extractor={str(tiny_extractor)!r})\n"
        f"for m in grounder.ground({str(tiny_run / 'videos' / 'v1.mp4')!r}, 'person opens door'):\n"
        "    print(f'{m.start:.2f} {m.end:.2f} {m.score:.3f}')\n"
    )
    run = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) == 3


def test_evaluate_prints_the_model_and_four_controls(tiny_run, tmp_path):
    options = ["--features", tiny_run / "features", "--annotations", tiny_run / "test.txt"]
    command = ["evaluate", tiny_run / "model", *options, "--out", tmp_path]
    run = CliRunner().invoke(main, [*map(str, command), "--json"])
    assert run.exit_code == 0, run.output
    result = json.loads(run.stdout)
    assert len(result["controls"]) == 4
    for metrics in (result["metrics"], *result["controls"].values()):
        assert all(0 <= value <= 100 for value in metrics.values())
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    hits = np.mean([row["iou"] >= 0.5 for row in rows]) * 100
    assert hits == pytest.approx(result["metrics"]["R@1,IoU=0.5"])


def test_only_a_world_is_called_one(tmp_path):
    train = tmp_path / "train.txt"
    assert world_of(train) is None
    for other in ("{}", "[1]", "no json"):
        (tmp_path / "world.json").write_text(other)
        assert world_of(train) is None
    (tmp_path / "world.json").write_text('{"world_version": 1, "seed": 7}')
    assert world_of(train) == "our own synthetic world, version 1 (seed 7, train.txt)"


def test_the_cards_command_can_be_copied(tiny_run, monkeypatch):
    """Typed where its files are, it names the same run again: nothing is left to do."""
    card = (tiny_run / "model" / "README.md").read_text()
    command = re.search(r"\*\*Command\*\*: `(.*)`", card)[1]
    assert str(tiny_run) not in card
    assert str(tiny_run) not in (tiny_run / "model" / "config.json").read_text()
    monkeypatch.chdir(tiny_run)
    again = CliRunner().invoke(main, shlex.split(command)[1:])
    assert again.exit_code == 0, again.output
    assert "model: finished before" in again.output
    assert command.startswith("mmdist train cpl --preset paper ")
