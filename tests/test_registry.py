"""Weights by name: fetched from a server on loopback, verified, converted, refused when wrong."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from mmdist_e2e.extractors.i3d import InceptionI3d
from mmdist_e2e.extractors.networks import SnippetNetwork, describe
from mmdist_e2e.structures import MmdistError
from mmdist_e2e.weights import registry
from mmdist_e2e.weights.registry import ENTRIES, checkpoint_folder, git_blob_sha1


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    root = tmp_path / "served"
    root.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(root)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield root, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def entry(served, monkeypatch, tmp_path):
    """The public I3D entry, narrow and served here, in a release's form: no counters."""
    root, url = served
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
    network = SnippetNetwork(spec, device="cpu", precision="fp32")
    for key, value in state.items():
        torch.testing.assert_close(network.network.state_dict()[key], value)


def test_a_wrong_file_is_discarded(entry):
    narrow, root, _ = entry
    with (root / "net.pt").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(MmdistError, match="digest"):
        checkpoint_folder(narrow.name)
    cache = registry.cache_folder()
    assert [p for p in cache.rglob("*") if p.is_file()] == []


def test_no_network_is_one_sentence(entry, monkeypatch):
    narrow, _, _ = entry
    monkeypatch.setitem(ENTRIES, narrow.name, replace(narrow, url="http://127.0.0.1:9/net.pt"))
    with pytest.raises(MmdistError, match="a network is needed"):
        checkpoint_folder(narrow.name)


def test_git_blob_digest_is_gits(tmp_path):
    (tmp_path / "x").write_bytes(b"hello\n")
    assert git_blob_sha1(tmp_path / "x") == "ce013625030ba8dba906f756967f9e9ca394464a"


def test_an_unknown_name_lists_the_valid_ones():
    with pytest.raises(MmdistError, match=r"world1-rgb, i3d-rgb-imagenet"):
        checkpoint_folder("i3d-rgb-imagnet")


def test_a_folder_that_is_no_extractor_is_named(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(MmdistError, match="not an extractor"):
        describe(str(tmp_path))
