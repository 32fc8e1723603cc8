"""Stand-ins: random extractors, features of other programs, the server of public files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serve import Server


def write_source(path: Path, kind: str, arrays: dict[str, np.ndarray]) -> Path:
    """An HDF5 file or a folder of .npy files."""
    if kind == "hdf5":
        h5py = pytest.importorskip("h5py", reason="needs the extra hdf5")
        with h5py.File(path, "w") as file:
            for video, array in arrays.items():
                file[video] = array
        return path
    path.mkdir()
    for video, array in arrays.items():
        np.save(path / f"{video}.npy", array)
    return path


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server on loopback in place of the public ones, and an empty cache."""
    (tmp_path / "served").mkdir()
    server = Server(tmp_path / "served")
    monkeypatch.setenv("MMDIST_MIRROR", server.url)
    monkeypatch.setenv("MMDIST_CACHE", str(tmp_path / "cache"))
    yield server
    server.close()


def make_extractor(folder: Path, **changes: Any) -> Path:
    """A checkpoint folder of a random I3D of 128 features that reads 32² frames at 12 fps."""
    import torch
    from safetensors.torch import save_file

    from mmdist_e2e.extractors.networks.i3d import InceptionI3d

    config = {
        "name": folder.name,
        "network": "i3d",
        "in_channels": 3,
        "width": 0.125,
        "num_classes": 4,
        "modality": "rgb",
        "fps": 12.0,
        "window": 16,
        "stride": 8,
        "preprocessing": {"size": 32},
        "trained_on": "nothing: random weights for tests",
        **changes,
    }
    torch.manual_seed(0)
    network = InceptionI3d(config["num_classes"], config["in_channels"], config["width"])
    folder.mkdir(parents=True)
    save_file(network.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    """Change a checkpoint's config.json and nothing else."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture(scope="session")
def tiny_extractor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random I3D of `make_extractor`."""
    return make_extractor(tmp_path_factory.mktemp("extractor") / "tiny")


@pytest.fixture(scope="session")
def tiny_flow_extractor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its twin for flow, computed on frames of the shorter side 16 and read at 32²."""
    return make_extractor(
        tmp_path_factory.mktemp("extractor") / "tiny-flow",
        in_channels=2,
        modality="flow",
        preprocessing={"shorter_side": 16, "size": 32},
    )


@pytest.fixture(scope="session")
def tiny_run(tiny_extractor: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with six clips, their features, annotations, and a tiny model trained on them."""
    from click.testing import CliRunner
    from make_videos import make_video

    from mmdist_e2e.cli.main import main

    root = tmp_path_factory.mktemp("run")
    (root / "videos").mkdir()
    lines = []
    for i in range(6):
        make_video(root / "videos" / f"v{i}.mp4", 40 + 10 * i)
        lines.append(f"v{i} 0.2 1.0##person opens the {'door' if i % 2 else 'box'}.")
    (root / "train.txt").write_text("\n".join(lines[:4]) + "\n")
    (root / "test.txt").write_text("\n".join(lines[4:]) + "\n")
    common = ["--out", str(root / "features"), "--extractor", str(tiny_extractor)]
    common += ["--workers", "0"]
    extracted = CliRunner().invoke(main, ["extract", str(root / "videos"), *common])
    assert extracted.exit_code == 0, extracted.output
    model = ["--out", str(root / "model"), "--features", str(root / "features")]
    model += ["--train", str(root / "train.txt"), "--val", str(root / "test.txt")]
    model += ["--length", "48"]
    for small in ("hidden=16", "heads=2", "layers=1", "feed_forward=32", "proposals=3", "epochs=2"):
        model += ["--set", small]
    trained = CliRunner().invoke(main, ["train", "cpl", *model])
    assert trained.exit_code == 0, trained.output
    return root
