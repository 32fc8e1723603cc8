"""`mmdist weights`: the list, and public files converted to folders that extractors load."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner, Result

from mmdist_e2e.cli.main import main
from mmdist_e2e.extractors.networks.c3d import C3D
from mmdist_e2e.extractors.networks.i3d import InceptionI3d
from mmdist_e2e.extractors.profiles import describe, profile_of
from mmdist_e2e.extractors.runner import load_network
from mmdist_e2e.weights.download import file_sha256
from mmdist_e2e.weights.registry import (
    ENTRIES,
    cached_folder,
    checkpoint_folder,
    is_available,
    read_config,
)


def weights(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["weights", *map(str, arguments)])


def sentence(result: Result) -> str:
    """The error of a command: one line, no traceback."""
    assert result.exit_code == 1, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    lines = result.output.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


@pytest.fixture
def narrow(monkeypatch, tmp_path):
    """A narrow c3d-sports1m-mm whose public file is at hand, in OpenMMLab's form."""
    monkeypatch.setenv("MMDIST_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(2)
    state = C3D(0, 1 / 64).state_dict()
    theirs = {"conv1": "conv1a", "conv2": "conv2a"}
    public = {}
    for key, value in state.items():
        layer, kind = key.split(".")
        name = f"{theirs.get(layer, layer)}.conv" if layer.startswith("conv") else layer
        public[f"{name}.{kind}"] = value
    file = tmp_path / "c3d.pth"
    torch.save({"state_dict": public, "meta": {}}, file)
    entry = ENTRIES["c3d-sports1m-mm"]
    entry = replace(entry, config={**entry.config, "width": 1 / 64}, sha256=file_sha256(file))
    monkeypatch.setitem(ENTRIES, entry.name, entry)
    return entry, file, state, public


def without_digest(monkeypatch, entry):
    entry = replace(entry, sha256=None)
    monkeypatch.setitem(ENTRIES, entry.name, entry)
    return entry


def test_a_public_file_becomes_a_folder_that_extractors_load(narrow, tmp_path):
    entry, file, state, _ = narrow
    result = weights("convert", entry.name, file, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert entry.sha256 in result.output
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    spec = describe(str(tmp_path / "out"))
    assert spec.name == entry.name
    assert "Sports-1M" in spec.trained_on
    assert str(tmp_path) not in (tmp_path / "out" / "config.json").read_text()
    loaded = load_network(spec).state_dict()
    assert list(loaded) == list(state)
    for key, value in state.items():
        assert torch.equal(loaded[key], value)


def test_the_command_that_the_error_tells_makes_the_name_work(narrow, monkeypatch):
    entry, file, _, _ = narrow
    entry = without_digest(monkeypatch, entry)
    assert not is_available(entry)
    result = weights("convert", entry.name, file, "--out", cached_folder(entry))
    assert result.exit_code == 0, result.output
    assert is_available(entry)
    assert read_config(checkpoint_folder(entry.name))["name"] == entry.name


def test_a_wrong_digest_converts_nothing(narrow, monkeypatch, tmp_path):
    entry, file, _, _ = narrow
    right = entry.sha256
    convert = ("convert", entry.name, file, "--out", tmp_path / "out")
    assert "not abc" in sentence(weights(*convert, "--digest", "abc"))
    assert "not 0000" in sentence(weights(*convert, "--digest", "0" * 64))
    without_digest(monkeypatch, entry)
    assert "not 0000" in sentence(weights(*convert, "--digest", "0" * 64))
    assert not (tmp_path / "out").exists()
    assert weights(*convert, "--digest", right.upper()).exit_code == 0
    with file.open("ab") as stream:
        stream.write(b"x")
    monkeypatch.setitem(ENTRIES, entry.name, entry)
    assert f"not {right}" in sentence(weights("convert", entry.name, file, "--out", tmp_path / "b"))
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fc7.weight": None}, "missing fc7.weight)"),
        ({"fc8.weight": torch.zeros(2, 64)}, "unexpected fc8.weight)"),
        ({"fc7.bias": torch.zeros(65)}, "of another shape fc7.bias [65] for [64])"),
        ({"fc6.bias": torch.full((64,), float("nan"))}, "not finite fc6.bias)"),
    ],
)
def test_weights_of_another_network_are_refused(narrow, monkeypatch, tmp_path, change, message):
    entry, file, _, public = narrow
    without_digest(monkeypatch, entry)
    changed = {key: value for key, value in (public | change).items() if value is not None}
    torch.save(changed, file)
    result = weights("convert", entry.name, file, "--out", tmp_path / "out")
    assert message in sentence(result)
    assert not (tmp_path / "out").exists()


def test_counters_of_batch_norm_may_be_missing(monkeypatch, tmp_path):
    original = ENTRIES["i3d-flow-charades"]
    config = {**original.config, "width": 0.125, "num_classes": 3}
    entry = replace(original, config=config, git_sha1=None)
    monkeypatch.setitem(ENTRIES, entry.name, entry)
    state = InceptionI3d(3, 2, 0.125).state_dict()
    counters = {key for key in state if key.endswith("num_batches_tracked")}
    assert counters
    torch.save({k: v for k, v in state.items() if k not in counters}, tmp_path / "net.pt")
    convert = ("convert", entry.name, tmp_path / "net.pt", "--out", tmp_path / "out")
    assert weights(*convert).exit_code == 0
    del state["logits.conv3d.bias"]
    torch.save(state, tmp_path / "net.pt")
    assert "missing logits.conv3d.bias)" in sentence(weights(*convert))


def test_mistakes_are_one_sentence(narrow, tmp_path):
    entry, file, _, _ = narrow
    out = ("--out", tmp_path / "out")
    unknown = sentence(weights("convert", "c3d", file, *out))
    assert "'c3d' is unknown" in unknown
    assert "c3d-sports1m-mm, c3d-sports1m, slow_r50" in unknown
    for other in ("cpl-charades", "activitynet-pca"):
        assert f"{other!r} is unknown" in sentence(weights("convert", other, file, *out))
    assert "ships with mmdist" in sentence(weights("convert", "world2-rgb", file, *out))
    missing = sentence(weights("convert", entry.name, tmp_path / "none.pth", *out))
    assert str(tmp_path / "none.pth") in missing
    assert entry.url in missing
    (tmp_path / "file").touch()
    assert "is a file" in sentence(weights("convert", entry.name, file, "--out", tmp_path / "file"))


def test_the_list_names_every_entry_and_what_is_available(narrow):
    entry, file, _, _ = narrow

    def rows() -> dict[str, list[str]]:
        result = weights("list")
        assert result.exit_code == 0, result.output
        cells = ([c.strip() for c in line.split("│")] for line in result.output.splitlines())
        return {row[0]: row[1:] for row in cells if row[0]}

    before = rows()
    assert set(ENTRIES) <= set(before)
    assert before["world2-rgb"][:4] == ["shipped", "rgb", "i3d", "ships"]
    assert before["i3d-flow-charades"][:4] == ["public", "flow", "i3d", "no"]
    assert before["student-world2"][::3] == ["model", "ships"]
    assert before["cpl-charades"][::3] == ["model", "no"]
    assert before["activitynet-pca"][::3] == ["file", "no, supply it"]
    assert before["slow_r50"][:4] == ["public", "rgb", "pytorchvideo", "no, supply it"]
    assert before[entry.name][3] == "no"
    assert "Apache-2.0" in before[entry.name][4]
    weights("convert", entry.name, file, "--out", cached_folder(entry))
    assert rows()[entry.name][3] == "yes"


def test_verify_names_what_is_damaged_and_how_to_repair_it(narrow, monkeypatch):
    entry, file, _, _ = narrow
    assert entry.name not in weights("verify").output
    assert f"mmdist pull {entry.name}" in sentence(weights("verify", entry.name))
    assert CliRunner().invoke(main, ["pull", entry.name, "--from", str(file)]).exit_code == 0
    everything = weights("verify")
    assert everything.exit_code == 0, everything.output
    for name in (entry.name, "world2-rgb", "world2-flow", "student-world2"):
        assert f"{name}: as recorded" in everything.output.splitlines()
    tensors = cached_folder(entry) / "model.safetensors"
    whole = tensors.read_bytes()
    repair = f"delete {tensors.parent} and run: mmdist pull {entry.name}"
    for content in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:-1], b"", None):
        tensors.unlink() if content is None else tensors.write_bytes(content)
        result = weights("verify")
        assert result.exit_code == 1
        assert "student-world2: as recorded" in result.output
        assert f"Error: {entry.name}: model.safetensors" in result.output
        assert repair in result.output
        assert weights("verify", "world2-rgb").exit_code == 0
    tensors.write_bytes(whole)
    assert weights("verify", entry.name, tensors.parent).exit_code == 0
    for text in ("{", "{}"):
        (tensors.parent / "config.json").write_text(text)
        assert repair in sentence(weights("verify", entry.name))
    without_digest(monkeypatch, entry)
    assert f"mmdist pull {entry.name} --from FILE" in sentence(weights("verify", entry.name))
    assert "restore it" in sentence(weights("verify", tensors.parent))


@pytest.mark.parametrize("name", ENTRIES)
def test_show_tells_licences_and_where_from(name, monkeypatch, tmp_path):
    monkeypatch.setenv("MMDIST_CACHE", str(tmp_path))
    entry = ENTRIES[name]
    result = weights("show", name)
    assert result.exit_code == 0, result.output
    lines = dict(line.split(":", 1) for line in result.output.splitlines())
    shown = {key: value.strip() for key, value in lines.items()}
    assert shown["licence"] == entry.facts.rpartition("; ")[2]
    assert shown["training data"]
    if entry.ships:
        assert shown["folder"] == str(cached_folder(entry))
        assert "drawn by mmdist" in shown["training data"]
        return
    assert shown["address"] == entry.url
    assert (entry.digest or "unknown: supply the file") in shown["digest"]
    bring = "" if entry.digest else " --from FILE"
    assert shown["folder"] == f"not in the cache; get it with: mmdist pull {name}{bring}"
    assert shown.get("needs", "") == ", ".join(entry.needs)


def test_show_tells_the_terms_of_the_training_data_and_the_profile(narrow):
    entry, file, _, _ = narrow
    charades = weights("show", "i3d-rgb-charades").output
    for words in ("ImageNet: non-commercial", "Kinetics: list of videos CC BY 4.0"):
        assert words in charades
    assert "Charades: non-commercial research" in charades
    assert "repository gives no licence" in weights("show", "cpl-charades").output
    profile = profile_of(ENTRIES["i3d-rgb-charades"].config)
    assert profile
    assert all(f"{key}:" in charades and value in charades for key, value in profile.items())
    CliRunner().invoke(main, ["pull", entry.name, "--from", str(file)])
    size = f"{file.stat().st_size:,} bytes, SHA-256 {entry.sha256}"
    assert size in weights("show", entry.name).output


def test_the_digest_of_a_file_that_the_user_brings(narrow, monkeypatch):
    entry, file, _, _ = narrow
    without_digest(monkeypatch, entry)
    pull = ["pull", entry.name, "--from", str(file), "--digest"]
    assert "not 0000" in sentence(CliRunner().invoke(main, [*pull, "0" * 64]))
    assert not is_available(entry)
    assert CliRunner().invoke(main, [*pull, file_sha256(file)]).exit_code == 0
    assert is_available(entry)
    for wrong in (["slow_r50", "x3d_s", *pull[2:4]], [entry.name, "--digest", "0" * 64]):
        assert "is for one NAME" in sentence(CliRunner().invoke(main, ["pull", *wrong]))
    ships = CliRunner().invoke(main, ["pull", "world2-rgb", *pull[2:4]])
    assert "ships with mmdist" in sentence(ships)


def test_the_list_needs_no_torch():
    code = (
        "import sys\n"
        "from mmdist_e2e.cli.main import main\n"
        "main(['weights', 'list'], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
