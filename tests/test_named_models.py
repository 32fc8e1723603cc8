"""Models by name: fetched from a server on loopback with what they need, converted, and asked."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from make_cpl import CONFIG, cpl_tensors, glove
from make_videos import make_video

import mmdist_e2e as mm
from mmdist_e2e.cli.main import main
from mmdist_e2e.extractors.networks.c3d import C3D
from mmdist_e2e.extractors.networks.i3d import InceptionI3d
from mmdist_e2e.extractors.profiles import describe
from mmdist_e2e.grounding.checkpoint import load_checkpoint
from mmdist_e2e.structures import Features, MmdistError, Provenance
from mmdist_e2e.weights import words
from mmdist_e2e.weights.download import git_blob_sha1
from mmdist_e2e.weights.pull import model_folder, pull
from mmdist_e2e.weights.registry import ENTRIES, cached_folder, damage, read_config

CHARADES = ("i3d-rgb-charades", "cpl-vocabulary-charades", "cpl-charades")
NARROW = {"width": 0.125, "num_classes": 7, "preprocessing": {"size": 32}}
QUERY = "person opens the door."


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)])


def sentence(result: Result) -> str:
    """The error of a command: exit code 1, no traceback."""
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    return result.output


def place(root: Path, name: str) -> Path:
    """Where the server keeps the public file of a name."""
    path = root / ENTRIES[name].url.split("/", 3)[3]
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def write_cpl(root: Path, data: str, dataset: str, features: int) -> None:
    config = copy.deepcopy(CONFIG)
    config["dataset"]["dataset"] = dataset
    content = {"num_updates": 7, "config": config, "model_parameters": cpl_tensors(features)}
    torch.save(content, place(root, f"cpl-{data}"))
    place(root, f"cpl-vocabulary-{data}").write_bytes(pickle.dumps(glove(), protocol=4))


def know(monkeypatch, name: str, path: Path | None, **config: object) -> None:
    """Let the registry know the digest of a stand-in, and its network's shape."""
    entry = ENTRIES[name]
    changes = {"git_sha1": git_blob_sha1(path)} if path else {}
    changes |= {"config": {**entry.config, **config}} if config else {}
    monkeypatch.setitem(ENTRIES, name, replace(entry, **changes))


@pytest.fixture
def charades(server, monkeypatch):
    """cpl-charades, its vocabulary and a narrow i3d-rgb-charades as they are published."""
    torch.manual_seed(1)
    torch.save(InceptionI3d(7, 3, 0.125).state_dict(), place(server.root, CHARADES[0]))
    write_cpl(server.root, "charades", "CharadesSTA", 128)
    know(monkeypatch, CHARADES[0], place(server.root, CHARADES[0]), **NARROW)
    for name in CHARADES[1:]:
        know(monkeypatch, name, place(server.root, name))
    return server


@pytest.fixture
def activitynet(server, monkeypatch, tmp_path):
    """cpl-activitynet and its vocabulary; the user's files: a narrow C3D, and a PCA of 512."""
    write_cpl(server.root, "activitynet", "ActivityNet", 500)
    for name in ("cpl-vocabulary-activitynet", "cpl-activitynet"):
        know(monkeypatch, name, place(server.root, name))
    know(monkeypatch, "c3d-sports1m", None, width=1 / 8, num_classes=3)
    torch.manual_seed(2)
    torch.save(C3D(3, 1 / 8).state_dict(), tmp_path / "c3d.pickle")
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(512, 512)))[0]
    np.savez(tmp_path / "pca.npz", x_mean=np.zeros(512), U=basis)
    return server


@pytest.fixture
def clip(tmp_path):
    return make_video(tmp_path / "clip.mp4", 48, rate=24)


def test_the_first_call_fetches_and_a_later_one_needs_no_network(charades, clip, tmp_path):
    ground = ("ground", clip, QUERY, "--model", "cpl-charades", "--json", "--cache")
    first = run(*ground, tmp_path / "a")
    assert first.exit_code == 0, first.output
    assert len(charades.requests) == len(set(charades.paths)) == 3
    answer = json.loads(first.stdout)
    assert len(answer["moments"]) == 4
    assert answer["trained_on"] == ("Charades-STA by CPL's public code, CPL's released file")
    assert "home videos" in answer["warning"]
    for name in CHARADES:
        assert f"downloading {name}" in first.stderr
    charades.close()
    second = run(*ground, tmp_path / "b")
    assert second.exit_code == 0, second.output
    assert second.stdout == first.stdout
    assert second.stderr == ""
    assert len(charades.requests) == 3
    left = {path.name for path in (tmp_path / "cache/weights").iterdir()}
    assert left == {*CHARADES, *(f"{name}.lock" for name in CHARADES)}


def test_the_model_reads_what_its_extractor_makes_by_its_profile(charades, clip):
    grounder = mm.load("cpl-charades", cache=None)
    matters = describe("i3d-rgb-charades").matters
    assert grounder.model.matters == {"rgb": matters}
    assert grounder.model.recipe.model.length == 32  # as the checkpoint says
    features = grounder.encode(clip)["rgb"]
    assert features.provenance.matters == matters
    assert grounder.ground(features, QUERY).moments == grounder.ground(clip, QUERY).moments
    with pytest.raises(MmdistError, match="extractor is 'world2-rgb' where the model needs"):
        grounder.ground(mm.extract(clip), QUERY)


def published(kind: str, channels: int = 128) -> Features:
    rows = np.random.default_rng(0).normal(size=(40, channels)).astype(np.float32)
    times = np.stack([np.arange(40), np.arange(1, 41)], 1) / 2
    return Features(rows, times, 20.0, "rgb", Provenance.external(kind))


def test_published_features_are_read_as_well(charades, tmp_path):
    h5py = pytest.importorskip("h5py")
    grounder = mm.load("cpl-charades", cache=None)
    moments = grounder.ground(published("hdf5"), QUERY).moments
    assert grounder.ground(published("npy"), QUERY).moments == moments
    with pytest.raises(MmdistError, match="extractor is 'external:other' where the model needs"):
        grounder.ground(published("other"), QUERY)
    with pytest.raises(MmdistError, match=r"\[32, 128\].*\[32, 64\]"):
        grounder.ground(published("hdf5", 64), QUERY)
    rows = [["v", 20.0, [1.0, 9.0], QUERY]]
    (tmp_path / "test.json").write_text(json.dumps(rows))
    for channels in (128, 64):
        with h5py.File(tmp_path / f"{channels}.hdf5", "w") as file:
            file["v"] = published("hdf5", channels).data
    evaluate = ("evaluate", "cpl-charades", "--annotations", tmp_path / "test.json", "--json")
    result = run(*evaluate, "--features", tmp_path / "128.hdf5", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["queries"] == 1
    wrong = run(*evaluate, "--features", tmp_path / "64.hdf5", "--out", tmp_path / "wrong")
    assert "[32, 64]" in sentence(wrong)


def test_everything_that_the_user_must_bring_is_named_at_once(activitynet, clip, tmp_path):
    ground = ("ground", clip, QUERY, "--model", "cpl-activitynet", "--json")
    message = sentence(run(*ground))
    assert activitynet.requests == []
    commands = [line.strip() for line in message.splitlines() if "mmdist pull" in line]
    assert [line.split(" --from")[0] for line in commands] == [
        "mmdist pull c3d-sports1m", "mmdist pull activitynet-pca",
    ]  # fmt: skip
    assert "c3d.pickle" in commands[0]
    assert "activity-net.org" in commands[1]
    assert run("pull", "c3d-sports1m", "--from", tmp_path / "c3d.pickle").exit_code == 0
    assert "activitynet-pca" in sentence(run(*ground))
    assert "c3d-sports1m" not in sentence(run(*ground))
    assert "as a PCA file" in sentence(run("pull", "activitynet-pca", "--from", clip))
    assert run("pull", "activitynet-pca", "--from", tmp_path / "pca.npz").exit_code == 0
    result = run(*ground)
    assert result.exit_code == 0, result.output
    assert "ActivityNet Captions" in json.loads(result.stdout)["trained_on"]
    grounder = mm.load("cpl-activitynet", cache=None)
    features = grounder.encode(clip)["rgb"]
    assert features.data.shape[1] == 500
    assert features.provenance.matters["pca"] == grounder.model.matters["rgb"]["pca"]
    assert features.provenance.matters["layer"] == "fc7"


def test_a_model_follows_its_extractor_when_that_is_replaced(activitynet, clip, tmp_path):
    for name, file in (("c3d-sports1m", "c3d.pickle"), ("activitynet-pca", "pca.npz")):
        pull(name, file=tmp_path / file)
    before = load_checkpoint(model_folder("cpl-activitynet")).matters["rgb"]
    torch.save(C3D(3, 1 / 8).state_dict(), tmp_path / "c3d.pickle")
    pull("c3d-sports1m", file=tmp_path / "c3d.pickle")
    after = load_checkpoint(model_folder("cpl-activitynet")).matters["rgb"]
    assert {key for key in before if before[key] != after[key]} == {"weights"}
    assert mm.load("cpl-activitynet", cache=None).ground(clip, QUERY).moments
    (cached_folder(ENTRIES["activitynet-pca"]) / "config.json").unlink()
    grounder = mm.load(str(cached_folder(ENTRIES["cpl-activitynet"])), cache=None)
    with pytest.raises(MmdistError, match="mmdist pull activitynet-pca --from FILE"):
        grounder.ground(clip, QUERY)


@pytest.mark.parametrize("name", CHARADES)
def test_a_tampered_file_is_refused_before_it_is_read(charades, clip, name, monkeypatch):
    place(charades.root, name).write_bytes(b"\x80tampered")
    opened: list[str] = []
    for module, function in ((torch, "load"), (words, "load_restricted")):
        real = getattr(module, function)
        monkeypatch.setattr(
            module, function, lambda p, real=real, **k: opened.append(str(p)) or real(p, **k)
        )
    message = sentence(run("ground", clip, QUERY, "--model", "cpl-charades"))
    assert f"it is not the file '{name}'" in message
    assert not [path for path in opened if name in path or str(ENTRIES[name].git_sha1) in path]
    assert len(opened) == (name != CHARADES[0])  # the extractor, which is fetched first
    assert "was deleted" in message
    assert not cached_folder(ENTRIES[name]).joinpath("config.json").exists()


def test_an_interrupted_download_is_continued_by_the_next_call(charades, clip):
    ground = ("ground", clip, QUERY, "--model", "cpl-charades", "--json")
    sizes = [place(charades.root, name).stat().st_size for name in CHARADES]
    charades.drop_after = max(sizes) // 4
    message = sentence(run(*ground))
    assert "which continues after the" in message
    assert len(list(cached_folder(ENTRIES["cpl-charades"]).parent.glob("*.part"))) == 1
    charades.drop_after = None
    assert run(*ground).exit_code == 0
    assert sum(sizes) <= charades.sent < sum(sizes) + 4 * 16384
    assert not list(cached_folder(ENTRIES["cpl-charades"]).parent.glob("*.part"))


def test_without_a_network_it_is_one_sentence(charades, clip):
    charades.close()
    message = sentence(run("ground", clip, QUERY, "--model", "cpl-charades"))
    assert len(message.strip().splitlines()) == 1
    assert "'i3d-rgb-charades' could not be downloaded" in message
    assert "Connection refused" in message
    assert "--from FILE" in message


def test_an_offline_machine_takes_all_from_files(charades, clip, tmp_path):
    charades.close()
    files = {name: place(charades.root, name) for name in CHARADES}
    for name, file in files.items():
        result = run("pull", name, "--from", file)
        assert result.exit_code == 0, result.output
        line = result.stdout.splitlines()[-1]
        assert line.startswith(f"{name}: {file.stat().st_size:,} bytes, SHA-256 ")
        assert line.endswith(str(cached_folder(ENTRIES[name])))
    assert run("ground", clip, QUERY, "--model", "cpl-charades").exit_code == 0
    wrong = run("pull", "cpl-charades", "--from", files["cpl-vocabulary-charades"])
    assert "it is not the file 'cpl-charades'" in sentence(wrong)
    assert damage(cached_folder(ENTRIES["cpl-charades"])) == ""  # what was there is kept


def test_pull_gets_a_model_with_its_needs(charades):
    result = run("pull", "cpl-charades", "world2-rgb")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == [*CHARADES, "world2-rgb"]
    assert run("pull", "cpl-charades").stdout.splitlines() == lines[:3]
    assert len(charades.requests) == 3


def test_unknown_names_offer_the_nearest(clip):
    for command in (
        ("ground", clip, QUERY, "--model", "cpl-charade"),
        ("evaluate", "cpl-charade", "--features", clip, "--annotations", clip),
        ("pull", "cpl-charade"),
        ("weights", "show", "cpl-charade"),
        ("weights", "verify", "cpl-charade"),
    ):
        assert "Did you mean 'cpl-charades'?" in sentence(run(*command))
    with pytest.raises(MmdistError, match="Did you mean 'cpl-activitynet'"):
        mm.load("cpl-activitynets")
    with pytest.raises(MmdistError, match="'world2-rgb' is unknown"):
        mm.load("world2-rgb")
    assert mm.load("student-world2").model.trained_on == mm.load().model.trained_on


def test_the_digests_of_a_model_are_recorded(charades):
    folder = model_folder("cpl-charades")
    config = read_config(folder)
    assert set(config["files"]) == {"model.safetensors", "words.safetensors"}
    assert config["source"]["bytes"] == place(charades.root, "cpl-charades").stat().st_size
    assert config["source"]["released"]
    assert damage(folder) == ""
    card = (folder / "README.md").read_text()
    assert "`i3d-rgb-charades` or `external:hdf5` or `external:npy`" in " ".join(card.split())


ASKING = """
import json, sys
from dataclasses import replace
from mmdist_e2e.cli.main import main
from mmdist_e2e.weights.registry import ENTRIES
for name, (digest, config) in json.loads(sys.argv[1]).items():
    entry = ENTRIES[name]
    ENTRIES[name] = replace(entry, git_sha1=digest, config=config or entry.config)
main(sys.argv[2:])
"""


@pytest.mark.slow
def test_two_processes_ask_at_once_and_each_file_is_fetched_once(charades, clip, tmp_path):
    known = {name: (ENTRIES[name].git_sha1, ENTRIES[name].config) for name in CHARADES}
    command = ["ground", str(clip), QUERY, "--model", "cpl-charades", "--json"]
    charades.delay = 0.3
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ASKING, json.dumps(known), *command],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    assert len(charades.requests) == len(set(charades.paths)) == 3


@pytest.mark.slow
def test_the_networks_real_shape(server, monkeypatch, tmp_path):
    """I3D at full width on three seconds, and a model of its 1,024 channels."""
    clip = make_video(tmp_path / "clip.mp4", 72, rate=24, width=64, height=48)
    torch.manual_seed(3)
    torch.save(InceptionI3d(157, 3).state_dict(), place(server.root, CHARADES[0]))
    write_cpl(server.root, "charades", "CharadesSTA", 1024)
    for name in CHARADES:
        know(monkeypatch, name, place(server.root, name))
    result = run("ground", clip, QUERY, "--model", "cpl-charades", "--json")
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.stdout)["moments"]) == 4
