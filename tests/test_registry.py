"""Weights by name: fetched from a server on loopback, verified, converted, refused when wrong."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from serve import Server

from mmdist_e2e.extractors.networks.i3d import InceptionI3d
from mmdist_e2e.extractors.profiles import Preprocessing, describe
from mmdist_e2e.extractors.runner import load_network
from mmdist_e2e.structures import MmdistError
from mmdist_e2e.weights import registry
from mmdist_e2e.weights.download import Entry, check_digest, fetch, file_sha256, git_blob_sha1
from mmdist_e2e.weights.registry import (
    ENTRIES,
    PUBLIC,
    checkpoint_folder,
    openmmlab_c3d_key,
    read_config,
    read_state,
)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "served").mkdir()
    server = Server(tmp_path / "served")
    yield server
    server.close()


@pytest.fixture
def entry(served, monkeypatch, tmp_path):
    """The public I3D entry, narrow and served here, in a release's form: no counters."""
    root, url = served.root, served.url
    torch.manual_seed(1)
    state = InceptionI3d(7, 3, 0.125).state_dict()
    state = {key: value for key, value in state.items() if "num_batches" not in key}
    torch.save(state, root / "net.pt")
    original = ENTRIES["i3d-rgb-charades"]
    config = {**original.config, "width": 0.125, "num_classes": 7}
    narrow = replace(
        original, config=config, url=f"{url}/net.pt", git_sha1=git_blob_sha1(root / "net.pt")
    )
    monkeypatch.setitem(ENTRIES, narrow.name, narrow)
    monkeypatch.setenv("MMDIST_CACHE", str(tmp_path / "cache"))
    return narrow, root, state


def test_a_public_file_is_fetched_once_verified_and_converted(entry):
    narrow, root, state = entry
    folder = checkpoint_folder(narrow.name)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    (root / "net.pt").unlink()  # a second use needs no network
    spec = describe(narrow.name)
    assert "public weights" in spec.trained_on
    loaded = load_network(spec).state_dict()
    for key, value in state.items():
        assert torch.equal(loaded[key], value)
    assert read_config(folder)["name"] == narrow.name


@pytest.mark.parametrize("kind", ["git_sha1", "sha256"])
def test_a_wrong_file_is_discarded(entry, kind, monkeypatch):
    narrow, root, _ = entry
    if kind == "sha256":
        sha256 = file_sha256(root / "net.pt")
        narrow = replace(narrow, git_sha1=None, sha256=sha256)
        monkeypatch.setitem(ENTRIES, narrow.name, narrow)
    with (root / "net.pt").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(MmdistError, match=f"not {getattr(narrow, kind)}"):
        checkpoint_folder(narrow.name)
    assert files_in(registry.cache_folder()) == []


def files_in(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"]


@pytest.mark.parametrize(
    ("path", "reason"), [(":9/net.pt", "Connection refused"), ("/none.pt", "404 Client Error")]
)
def test_a_failed_download_is_one_sentence(entry, monkeypatch, path, reason):
    narrow, _, _ = entry
    base = "http://127.0.0.1" if path.startswith(":") else narrow.url.removesuffix("/net.pt")
    monkeypatch.setitem(ENTRIES, narrow.name, replace(narrow, url=base + path))
    with pytest.raises(MmdistError, match="connect to the network and try again") as caught:
        checkpoint_folder(narrow.name)
    message = str(caught.value)
    assert repr(narrow.name) in message
    assert base + path in message
    assert reason in message
    assert " object at 0x" not in message
    assert files_in(registry.cache_folder()) == []


FETCHING = """
import os, sys, time
from dataclasses import replace
from pathlib import Path
from mmdist_e2e.weights.registry import ENTRIES, checkpoint_folder
import requests, torch  # slow imports first, so that the processes really meet
entry = ENTRIES["i3d-rgb-charades"]
ENTRIES[entry.name] = replace(entry, url=sys.argv[1], git_sha1=None, sha256=sys.argv[2])
Path(sys.argv[3]).touch()
while not Path(sys.argv[4]).exists():
    time.sleep(0.005)
print(checkpoint_folder(entry.name))
"""


@pytest.mark.slow
def test_two_processes_download_once(entry, served, tmp_path):
    narrow, root, _ = entry
    served.delay = 0.5
    sha256, ready, go = file_sha256(root / "net.pt"), tmp_path / "ready", tmp_path / "go"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", FETCHING, narrow.url, sha256, f"{ready}{i}", go],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    while not all(Path(f"{ready}{i}").exists() for i in range(2)):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.02)
    go.touch()
    folder = tmp_path / "cache/weights/i3d-rgb-charades"
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert out.strip() == str(folder)
    assert served.paths == ["/net.pt"]
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_a_cache_that_cannot_be_written_is_one_sentence(entry, served, monkeypatch, tmp_path):
    narrow, _, _ = entry
    (tmp_path / "file").touch()
    for cache in (tmp_path / "file", Path("/proc/nonexistent")):
        monkeypatch.setenv("MMDIST_CACHE", str(cache))
        with pytest.raises(MmdistError, match="set MMDIST_CACHE to a folder") as caught:
            checkpoint_folder(narrow.name)
        assert str(cache) in str(caught.value)
        assert repr(narrow.name) in str(caught.value)
    assert served.requests == []


@pytest.fixture
def big(served, tmp_path) -> tuple[Entry, Path, bytes]:
    """An entry of a megabyte, where its partial file is, and its content."""
    content = np.random.default_rng(0).bytes(1_000_000)
    (served.root / "big").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    entry = Entry("big", "file", "", url=f"{served.url}/big", sha256=digest)
    return entry, tmp_path / f"{digest}.part", content


def test_an_interrupted_download_is_continued(big, served):
    entry, part, content = big
    served.drop_after = 300_000
    with pytest.raises(MmdistError, match="which continues after the ") as caught:
        fetch(entry, part.parent)
    kept = part.stat().st_size
    assert f"{kept:,}" in str(caught.value)
    assert part.read_bytes() == content[:kept]
    assert len(served.requests) == 3  # it continues by itself, but not for ever
    served.drop_after = None
    seen: list[tuple[str, int, int]] = []
    fetch(entry, part.parent, lambda *step: seen.append(step))
    assert part.read_bytes() == content
    assert served.requests[-1] == ("/big", f"bytes={kept}-")
    assert served.sent < len(content) + 4 * 16384  # less than a block is lost with a connection
    assert seen[-1] == ("downloading big (MB)", 1, 1)
    before = len(served.requests)
    fetch(entry, part.parent)  # whole: a process was killed before it was used
    assert len(served.requests) == before


def test_a_dropped_connection_alone_does_not_fail(big, served):
    entry, part, content = big
    served.drop_after = 600_000
    fetch(entry, part.parent)
    assert part.read_bytes() == content
    assert len(served.requests) == 2


def test_a_server_that_sends_no_parts_starts_again(big, served):
    entry, part, content = big
    served.ranges = False
    part.write_bytes(content[:400_000])
    fetch(entry, part.parent)
    assert part.read_bytes() == content


@pytest.mark.parametrize("length", [400_000, 1_000_000, 1_000_001])
def test_a_partial_file_of_something_else_is_deleted(big, length):
    entry, part, content = big
    part.write_bytes(b"x" * length)
    if length < len(content):
        with pytest.raises(MmdistError, match=r"it is not the file 'big'.* was deleted"):
            fetch(entry, part.parent)
        assert not part.exists()
    fetch(entry, part.parent)
    assert part.read_bytes() == content


class FullDisk(io.FileIO):
    """A file on a disk that takes two blocks."""

    def write(self, block: bytes) -> int:
        if self.tell() > 100_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(block)


def test_a_full_disk_leaves_nothing_half_written(big, monkeypatch):
    entry, part, _ = big
    real = Path.open

    def full(path: Path, mode: str = "r", *args: object) -> object:
        return FullDisk(path, mode) if path == part and "r" not in mode else real(path, mode, *args)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(
        MmdistError, match=r"No space left on device.*make room, or set MMDIST_CACHE"
    ):
        fetch(entry, part.parent)
    assert not part.exists()


def test_a_mirror_replaces_scheme_and_host(big, served, monkeypatch):
    entry, part, content = big
    monkeypatch.setenv("MMDIST_MIRROR", f"{served.url}/")
    fetch(replace(entry, url="https://nowhere.invalid/big?raw=true"), part.parent)
    assert part.read_bytes() == content


def test_a_profile_that_changed_is_renewed_without_a_download(entry, served):
    folder = checkpoint_folder(entry[0].name)
    path = folder / "config.json"
    now = json.loads(path.read_text())
    path.write_text(json.dumps({**now, "fps": 3.0, "gone": 1}))
    assert read_config(checkpoint_folder(entry[0].name)) == now
    path.write_text("{}")
    with pytest.raises(MmdistError, match="not an extractor"):
        describe(entry[0].name)
    assert len(served.requests) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's own cache folder")
def test_the_cache_is_in_the_platforms_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("MMDIST_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert registry.cache_folder() == tmp_path / ".cache" / "mmdist"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert registry.cache_folder() == tmp_path / "xdg" / "mmdist"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # a user without a home folder
    assert registry.cache_folder() == Path("/.cache/mmdist")


def test_git_blob_digest_is_gits(tmp_path):
    (tmp_path / "x").write_bytes(b"hello\n")
    assert git_blob_sha1(tmp_path / "x") == "ce013625030ba8dba906f756967f9e9ca394464a"


def test_an_unknown_name_lists_the_valid_ones():
    with pytest.raises(MmdistError, match="'i3d-rgb-imagnet' is unknown; valid: ") as caught:
        checkpoint_folder("i3d-rgb-imagnet")
    assert "Did you mean 'i3d-rgb-imagenet'?" in str(caught.value)
    assert all(name in str(caught.value) for name in ("world2-rgb", "world2-flow"))
    assert all(entry.name in str(caught.value) for entry in PUBLIC)
    assert "cpl-charades" not in str(caught.value)


def test_a_folder_that_is_no_extractor_is_named(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(MmdistError, match="not an extractor"):
        describe(str(tmp_path))


def test_the_digests_are_those_of_git_and_of_sha256(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"hello\n" * 1000)
    right = file_sha256(path)
    assert right == hashlib.sha256(path.read_bytes()).hexdigest()
    entry = replace(PUBLIC[0], git_sha1=git_blob_sha1(path), sha256=right)
    check_digest(entry, path)
    check_digest(replace(entry, git_sha1=None), path)
    check_digest(replace(entry, git_sha1=None, sha256=None), path)
    for wrong in ({"git_sha1": "0" * 40}, {"sha256": "0" * 64}):
        with pytest.raises(MmdistError, match=r"not 0000.* download it again"):
            check_digest(replace(entry, **wrong), path)


def test_weights_without_a_digest_are_never_fetched(served, monkeypatch, tmp_path):
    (served.root / "net.pt").write_bytes(b"whatever")
    monkeypatch.setenv("MMDIST_CACHE", str(tmp_path / "my cache"))
    entry = replace(ENTRIES["slow_r50"], url=f"{served.url}/net.pt")
    monkeypatch.setitem(ENTRIES, entry.name, entry)
    with pytest.raises(MmdistError, match="mmdist pull slow_r50 --from FILE"):
        checkpoint_folder("slow_r50")
    assert not (tmp_path / "my cache").exists()
    assert served.requests == []


@pytest.mark.parametrize("entry", PUBLIC, ids=lambda entry: entry.name)
def test_public_entries_are_whole(entry):
    assert ENTRIES[entry.name] is entry
    assert re.fullmatch("[0-9a-f]{40}", entry.git_sha1 or "0" * 40)
    assert re.fullmatch("[0-9a-f]{64}", entry.sha256 or "0" * 64)
    assert entry.url.startswith("https://") or not entry.digest
    config = entry.config
    assert config["modality"] in ("rgb", "flow")
    assert config["fps"] is None or config["fps"] > 0  # None: the video's own
    assert 1 <= config["stride"] <= config["window"]
    if config["modality"] == "rgb":
        preprocessing = Preprocessing(**config["preprocessing"])
        assert config["network"] != "c3d" or (preprocessing.size, config["window"]) == (112, 16)
    if config["network"] == "pytorchvideo":
        assert config["backbone"] == entry.name
        assert preprocessing.mean == pytest.approx((114.75,) * 3)
        assert preprocessing.std == pytest.approx((57.375,) * 3)


def test_flow_networks_read_two_channels_of_bounded_flow():
    from mmdist_e2e.extractors.flow.fields import FlowPreprocessing

    flow = [entry for entry in PUBLIC if entry.config["modality"] == "flow"]
    assert [entry.name for entry in flow] == ["i3d-flow-imagenet", "i3d-flow-charades"]
    for entry in flow:
        assert entry.config["in_channels"] == 2
        assert entry.git_sha1 != ENTRIES[entry.name.replace("flow", "rgb")].git_sha1
        assert entry.url.endswith(f"flow_{entry.name.rsplit('-', 1)[1]}.pt")
        preprocessing = FlowPreprocessing(**entry.config["preprocessing"])
        assert (preprocessing.size, preprocessing.crop) == (224, 224)
        assert preprocessing.shorter_side == (256 if "imagenet" in entry.name else None)
        assert preprocessing.bound == 20.0


def test_openmmlabs_names_become_ours():
    from mmdist_e2e.extractors.networks.c3d import C3D

    with torch.device("meta"):
        ours = list(C3D(0).state_dict())
    stages = ("1a", "2a", "3a", "3b", "4a", "4b", "5a", "5b")
    layers = [*(f"conv{stage}.conv" for stage in stages), "fc6", "fc7"]
    theirs = [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    assert [openmmlab_c3d_key(key) for key in theirs] == ours


def test_wrappers_of_public_files_are_taken_off(tmp_path):
    state = {"a.weight": torch.arange(6.0).reshape(2, 3).T}
    for wrapped in (state, {"model_state": state, "cfg": "x"}, {"state_dict": state, "epoch": 3}):
        torch.save(wrapped, tmp_path / "net.pt")
        read = read_state(PUBLIC[0], tmp_path / "net.pt")
        assert list(read) == ["a.weight"]
        assert torch.equal(read["a.weight"], state["a.weight"])
        assert read["a.weight"].is_contiguous()


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_files_that_hold_no_weights_are_one_sentence_and_run_nothing(tmp_path):
    path = tmp_path / "net.pt"
    torch.save({"a": torch.zeros(100)}, path)
    whole = path.read_bytes()
    for content in (b"text", b"", whole[: len(whole) // 2], bytes(range(256)) * 9, whole[40:]):
        path.write_bytes(content)
        with pytest.raises(MmdistError, match="without running its code"):
            read_state(PUBLIC[0], path)
    torch.save({"a": Evil(tmp_path / "touched")}, path)
    with pytest.raises(MmdistError, match="without running its code"):
        read_state(PUBLIC[0], path)
    assert not (tmp_path / "touched").exists()
    for content in ([1, 2], {"a": 1}, {1: torch.zeros(1)}):
        torch.save(content, path)
        with pytest.raises(MmdistError, match="table of named weights"):
            read_state(PUBLIC[0], path)
