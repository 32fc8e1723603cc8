"""`mmdist weights convert cpl`: a checkpoint of CPL's public code becomes a folder of ours."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from make_cpl import BY_RANK, Files, cpl_tensors, glove
from make_videos import make_video

from mmdist_e2e.cli.main import main
from mmdist_e2e.extractors.profiles import describe
from mmdist_e2e.grounding.checkpoint import load_checkpoint
from mmdist_e2e.grounding.data.text import tokenize
from mmdist_e2e.structures import Features, Provenance
from mmdist_e2e.weights import cpl as convert
from mmdist_e2e.weights.download import file_sha256, git_blob_sha1
from mmdist_e2e.weights.registry import ENTRIES
from mmdist_e2e.weights.words import load_restricted


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_the_folder_holds_the_same_network(files):
    result = files.convert()
    assert result.exit_code == 0, result.output
    assert file_sha256(files.model) in result.output
    assert "not the file that CPL released" in result.output
    loaded = load_checkpoint(files.out)
    state = loaded.model.state_dict()
    assert set(state) == set(files.content["model_parameters"])
    for name, tensor in files.content["model_parameters"].items():
        assert torch.equal(state[name], tensor), name
    assert sorted(p.name for p in files.out.iterdir()) == [
        "README.md", "config.json", "model.safetensors", "vocabulary.json", "words.safetensors",
    ]  # fmt: skip


def test_shape_and_settings_are_the_files_own(files):
    assert files.convert().exit_code == 0
    recipe = load_checkpoint(files.out).recipe
    shape = {
        "feature_dim": 12, "word_dim": 5, "vocabulary_size": 6, "length": 32, "hidden": 16,
        "heads": 2, "layers": 2, "feed_forward": 32, "proposals": 4, "sharpness": 7.0,
        "frame_divisor": 4.0, "dropout": 0.2,
    }  # fmt: skip
    assert shape.items() <= vars(recipe.model).items()
    loss = {
        "contrast_weight": 2.0, "diversity_weight": 0.5, "diversity_prior": 0.13,
        "margin_whole": 0.2, "margin_negatives": 0.25, "negative_growth": 0.0,
        "reconstruction_weight": 0.5, "whole_weight": 0.5,
    }  # fmt: skip
    assert loss.items() <= vars(recipe.loss).items()
    training = {"epochs": 11, "batch_size": 16, "learning_rate": 3e-4, "warmup_updates": 70}
    assert training.items() <= vars(recipe.training).items()
    assert recipe.name == "cpl"
    assert recipe.local is None  # ranks by reconstruction alone


def test_settings_that_a_file_lacks_are_the_published_ones(files):
    files.content["config"] = {"dataset": {"dataset": "CharadesSTA"}}
    assert files.convert().exit_code == 0
    recipe = load_checkpoint(files.out).recipe
    assert (recipe.model.length, recipe.model.heads, recipe.model.sharpness) == (200, 4, 9.0)
    assert (recipe.model.kept_frames, recipe.loss.diversity_prior) == (50, pytest.approx(0.146))


def test_ids_are_frequency_ranks_and_ties_keep_their_order(files):
    assert files.convert().exit_code == 0
    vocabulary = load_checkpoint(files.out).vocabulary
    assert list(vocabulary.words) == BY_RANK[:6]
    sentence = vocabulary.encode("A person opens the cup.")
    # "a" is rarer than the six words that are kept: CPL drops it.
    assert sentence.tokens == ("person", "opens", "the", "cup", ".")
    assert sentence.ids_W.tolist() == [2, 4, 5, 6, 1]
    assert sentence.vectors_WE[:, 0].tolist() == [6, 5, 1, 4, 3]  # rows of id2vec, not ids


def test_the_card_and_the_config_say_where_it_comes_from(files):
    assert files.convert().exit_code == 0
    card = " ".join((files.out / "README.md").read_text().split())
    for fact in (
        file_sha256(files.model), "not the file that CPL released", "Charades-STA",
        "i3d-rgb-charades", "12 channels at 32 positions", "external:hdf5",
        "6 most frequent", "test sentences", "on the test split", "reconstruction alone",
    ):  # fmt: skip
        assert fact in card, fact
    config = json.loads((files.out / "config.json").read_text())
    assert config["features"] == {"rgb": {"extractor": "external:hdf5"}}
    assert config["longest_duration_seconds"] == 194.33
    assert str(files.folder) not in card + json.dumps(config)


def test_it_answers_and_evaluates(files, tmp_path):
    h5py = pytest.importorskip("h5py")
    assert files.convert().exit_code == 0
    rng = np.random.default_rng(0)
    rows = [
        [f"v{i}", 20.0 + i, [1.0, 9.0], f"a person opens the {word}."]
        for i, word in enumerate(("door", "cup", "door", "cup"))
    ]
    (tmp_path / "test.json").write_text(json.dumps(rows))
    with h5py.File(tmp_path / "features.hdf5", "w") as file:
        for video, *_ in rows:
            file[video] = rng.normal(size=(40, 12)).astype(np.float32)
    result = CliRunner().invoke(
        main,
        ["evaluate", str(files.out), "--features", str(tmp_path / "features.hdf5"),
         "--annotations", str(tmp_path / "test.json"), "--json"],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["queries"] == 4
    features = Features(
        rng.normal(size=(40, 12)).astype(np.float32),
        np.stack([np.arange(40), np.arange(1, 41)], 1) / 2,
        20.0,
        "rgb",
        Provenance.external("hdf5"),
    )
    moments = load_checkpoint(files.out).answer({"rgb": features}, "a person opens the door")
    assert len(moments) == 4
    assert all(0 <= m.start < m.end <= 20 for m in moments)
    assert [m.score for m in moments] == sorted((m.score for m in moments), reverse=True)


def test_it_can_be_made_for_an_extractors_features(files, tiny_extractor, tmp_path):
    files.content["model_parameters"] = cpl_tensors(features=128)
    assert files.convert("--extractor", tiny_extractor).exit_code == 0
    loaded = load_checkpoint(files.out)
    assert loaded.matters == {"rgb": describe(str(tiny_extractor)).matters}
    assert "`tiny`" in (files.out / "README.md").read_text()
    clip = tmp_path / "clip.mp4"
    make_video(clip, 40)
    options = ["--model", str(files.out), "--extractor", str(tiny_extractor), "--json"]
    options += ["--cache", str(tmp_path / "cache")]
    result = CliRunner().invoke(main, ["ground", str(clip), "a person opens the door", *options])
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.stdout)["moments"]) == 4
    assert "Charades-STA by CPL's public code" in result.stdout
    assert files.convert("--extractor", "external:npy").exit_code == 0
    assert load_checkpoint(files.out).matters == {"rgb": {"extractor": "external:npy"}}


def test_an_extractor_of_other_features_is_refused(files, tiny_extractor):
    message = files.refusal("--extractor", tiny_extractor)
    assert "12 channels" in message
    assert "gives 128" in message
    assert "unknown" in files.refusal("--extractor", "i3d-nonsense")


def without(name: str):
    return lambda files: files.content["model_parameters"].pop(name)


def with_tensor(name: str, tensor: torch.Tensor):
    return lambda files: files.content["model_parameters"].update({name: tensor})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("trans.decoder1.decoder_layers.1.fc2.bias"),
         "(missing trans.decoder1.decoder_layers.1.fc2.bias)"),
        (without("frame_fc.weight"), "'frame_fc.weight'"),
        (with_tensor("extra", torch.zeros(1)), "(unexpected extra)"),
        (with_tensor("start_vec", torch.zeros(4)), "of another shape start_vec [4] for [5]"),
        (with_tensor("frame_fc.weight", torch.zeros(3)), "does not hold the weights"),
        (with_tensor("pred_vec", torch.full((12,), float("nan"))), "(not finite pred_vec)"),
        (lambda f: f.content.pop("model_parameters"), "no model_parameters and config"),
        (lambda f: f.content["config"].pop("dataset"), "dataset None"),
        (lambda f: f.content["config"]["dataset"].update(dataset="TACoS"), "'TACoS'"),
        (lambda f: f.content["config"]["model"]["config"].update(sigma="x"), "sharpness"),
        (lambda f: f.content["config"]["dataset"].update(max_num_frames="x"), "length"),
        (lambda f: f.content["config"]["dataset"].update(max_num_frames=4), "lower the frame"),
        (lambda f: f.words.pop("counter"), "(w2id, id2vec and counter)"),
        (lambda f: f.words["w2id"].pop("door"), "does not hold CPL's vocabulary"),
        (lambda f: f.words.update(glove({"door": 2, "cup": 1})), "counts 2 words"),
        (lambda f: f.words.update(glove(width=4)), "word vectors of 4 numbers"),
        (lambda f: f.words["id2vec"].__setitem__(2, np.full(5, np.inf, np.float32)), "finite"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_are_refused(files, change, message):
    change(files)
    assert message in files.refusal()


def test_other_files_are_refused(files, tmp_path):
    files.convert()
    real, words = files.model.read_bytes(), files.vocabulary
    for name in ("README.md", "config.json", "model.safetensors", "vocabulary.json"):
        (files.out / name).unlink()
    (files.out / "words.safetensors").unlink()
    files.out.rmdir()
    model, text = tmp_path / "model.pt", tmp_path / "glove.txt"
    text.write_text("door 1 2 3\n")
    assert "no file" in files.refused(files.run(model, "--vocabulary", words))
    for content in (b"", b"not a checkpoint", real[: len(real) // 2]):
        model.write_bytes(content)
        message = files.refused(files.run(model, "--vocabulary", words))
        assert "does not hold a CPL checkpoint" in message
    model.write_bytes(real)
    assert "needs --vocabulary" in files.refused(files.run(model))
    assert "cannot be read" in files.refused(files.run(model, "--vocabulary", tmp_path / "none"))
    assert "cannot be read as a pickle" in files.refused(files.run(model, "--vocabulary", text))


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_code_in_either_file_is_never_run(files, tmp_path):
    trace = tmp_path / "ran"
    files.content["more"] = Bomb(trace)
    assert "without running its code" in files.refusal()
    del files.content["more"]
    files.words["more"] = Bomb(trace)
    assert "may be malicious" in files.refusal()
    assert not trace.exists()


def test_a_digest_is_checked_first(files):
    files.convert()
    assert "not 0000" in files.convert("--digest", "0" * 64).output
    assert files.convert("--digest", file_sha256(files.model)).exit_code == 0


def test_options_of_cpl_are_refused_elsewhere(files, tmp_path):
    files.convert()
    command = ["weights", "convert", "i3d-rgb-charades", str(files.model), "--out", str(tmp_path)]
    result = CliRunner().invoke(main, [*command, "--vocabulary", str(files.vocabulary)])
    assert result.exit_code == 1
    assert "belong to 'cpl'" in result.output


def test_released_files_belong_together(files, monkeypatch, tmp_path):
    files.convert()
    shutil.rmtree(files.out)
    names = ("cpl-charades", "cpl-vocabulary-charades", "cpl-vocabulary-activitynet")
    originals = {name: ENTRIES[name] for name in names}
    model_id, vocabulary_id = map(git_blob_sha1, (files.model, files.vocabulary))

    def know(*ids: str) -> None:
        for name, git_sha1 in zip(names, ids, strict=True):
            monkeypatch.setitem(ENTRIES, name, replace(originals[name], git_sha1=git_sha1))

    know(model_id, "f" * 40, "e" * 40)
    refused = files.refusal()
    assert "is not a file that CPL released; this checkpoint needs the vocabulary of" in refused
    assert "Charades-STA: cpl-vocabulary-charades" in refused
    know(model_id, "f" * 40, vocabulary_id)
    assert "is cpl-vocabulary-activitynet; this checkpoint needs" in files.refusal()
    know(model_id, vocabulary_id, "e" * 40)
    assert "by CPL's public code, CPL's released file" in files.convert().output
    assert "CPL's released file" in (files.out / "README.md").read_text()


@pytest.mark.skipif("MMDIST_DATA" not in os.environ, reason="set MMDIST_DATA for the real files")
def test_the_real_vocabulary():
    root = Path(os.environ["MMDIST_DATA"]) / "charades_sta"
    assert git_blob_sha1(root / "glove.pkl") == ENTRIES["cpl-vocabulary-charades"].git_sha1
    vocabulary = convert.read_vocabulary(root / "glove.pkl", 1111, 300)
    assert len(vocabulary) == len(vocabulary.vectors.words) == 1111
    assert vocabulary.words[:4] == (".", "person", "a", "the")
    assert vocabulary.vectors.dim == 300
    counts = load_restricted(root / "glove.pkl")["counter"]
    assert list(vocabulary.words) == sorted(counts, key=lambda word: -counts[word])[:1111]
    rows = json.loads((root / "cpl_train.json").read_text())
    assert max(row[1] for row in rows) == convert.DATASETS["CharadesSTA"].longest_seconds
    # CPL counted training and test sentences, and our tokenizer finds the words that it found.
    rows += json.loads((root / "cpl_test.json").read_text())
    ours = Counter(token for row in rows for token in tokenize(row[3]) if token in counts)
    assert sum(counts.values()) == 99_901
    assert (ours - counts).total() + (counts - ours).total() < 150
