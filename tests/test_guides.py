"""Every command of docs/guides/, as typed, with stand-ins for what cannot be downloaded here."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from make_videos import make_video
from test_named_models import know, place, write_cpl

from mmdist_e2e.cli.main import main
from mmdist_e2e.extractors.networks.c3d import C3D
from mmdist_e2e.extractors.networks.i3d import InceptionI3d

GUIDES = Path(__file__).parents[1] / "docs" / "guides"
pytestmark = pytest.mark.slow


def commands(guide: str) -> list[list[str]]:
    """The lines of a guide's code blocks, in order."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", (GUIDES / guide).read_text(), re.M | re.S)
    lines = [shlex.split(line) for kind, text in blocks if not kind for line in text.splitlines()]
    assert lines
    assert {line[0] for line in lines} == {"mmdist"}
    return [line[1:] for line in lines]


def follow(guide: str) -> dict[str, str]:
    """Run a guide's commands in the current folder; what each printed."""
    printed = {}
    for command in commands(guide):
        # Paper-sized networks, but one epoch: the point is that the commands fit together.
        short = ["--epochs", "1"] if command[0] == "train" else []
        short += ["--set", "epochs=1"] if command[0] == "reproduce" else []
        result = CliRunner().invoke(main, [*command, *short])
        assert result.exit_code == 0, (command, result.output, result.exception)
        printed[shlex.join(command)] = result.output
    return printed


@pytest.fixture
def project(server, tmp_path, monkeypatch):
    """An empty folder to work in; gives the server that stands for the public ones."""
    folder = tmp_path / "project"
    (folder / "videos").mkdir(parents=True)
    monkeypatch.chdir(folder)
    return server


def serve_i3d(server, monkeypatch, data: str) -> None:
    for modality, channels in (("rgb", 3), ("flow", 2)):
        name = f"i3d-{modality}-{data}"
        torch.manual_seed(0)
        torch.save(InceptionI3d(4, channels, 0.125).state_dict(), place(server.root, name))
        know(monkeypatch, name, place(server.root, name), width=0.125, num_classes=4)


def serve_cpl(server, monkeypatch, data: str, dataset: str, features: int) -> None:
    write_cpl(server.root, data, dataset, features)
    for name in (f"cpl-{data}", f"cpl-vocabulary-{data}"):
        know(monkeypatch, name, place(server.root, name))


def serve_annotations(server, monkeypatch, data: str, **splits: list[str]) -> None:
    """Rows of CPL for these videos, which are written into videos/."""
    sentences = ("person opens the door.", "a person opens a cup.", "the cup opens.")
    for number, (split, names) in enumerate(splits.items()):
        rows = [[name, 2.0, [0.5, 1.5], text] for name in names for text in sentences]
        path = place(server.root, f"{data}-{split}")
        path.write_text(json.dumps(rows))
        know(monkeypatch, f"{data}-{split}", path)
        for index, name in enumerate(names):
            make_video(Path("videos") / f"{name}.mp4", 20 + 5 * (index + number), rate=10)


def test_own_videos(project, monkeypatch):
    serve_i3d(project, monkeypatch, "imagenet")
    Path("annotations").mkdir()
    Path("videos/kitchen").mkdir()
    for split, names in {"train": ["a", "b", "c"], "val": ["d"], "test": ["kitchen/one"]}.items():
        lines = []
        for name in names:
            make_video(Path("videos") / f"{name}.mp4", 20 + len(lines), rate=10)
            lines.append(f"{name} 0.5 1.5##person opens the fridge.")
        Path(f"annotations/{split}.txt").write_text("\n".join(lines) + "\n")
    printed = follow("own-videos.md")
    answer = printed["ground videos/kitchen/one.mp4 'person opens the fridge'"]
    assert "runs/student" in answer
    assert "Trained on: 3 sentences of train.txt" in answer


def test_charades_sta(project, monkeypatch):
    serve_i3d(project, monkeypatch, "charades")
    serve_cpl(project, monkeypatch, "charades", "CharadesSTA", 128)
    train = [f"T{n}" for n in range(10)]
    serve_annotations(project, monkeypatch, "charades-sta", train=train, test=["AAAAA", "BBBBB"])
    printed = follow("charades-sta.md")
    assert "24 fps" in printed["weights show i3d-rgb-charades"]
    rows = np.load("features/AAAAA.rgb.npz")["data"]
    frames = len(range(20 + 5)) * 24 / 10  # of 10 fps
    assert len(rows) == -(-int(frames) // 8) - 1
    for run in ("runs/baseline", "runs/student", "cpl-charades"):
        assert "model" in printed[f"evaluate {run}"]
    # Results of a model from the cache are in the project.
    assert len(list(Path("runs/cpl-charades/evaluations").glob("*/metrics.json"))) == 1
    config = json.loads(Path("runs/student/config.json").read_text())
    assert (config["model"]["length"], config["model"]["hidden"]) == (200, 256)
    table = printed["reproduce --tables 1 --seeds 3"]
    assert "| student | 1, 4 | 0, 1, 2 |" in table


def test_activitynet(project, monkeypatch):
    serve_cpl(project, monkeypatch, "activitynet", "ActivityNet", 500)
    serve_annotations(
        project, monkeypatch, "activitynet-captions",
        train=["v_a", "v_b", "v_gone"], val=["v_c"], test=["v_one"],
    )  # fmt: skip
    Path("videos/v_gone.mp4").unlink()
    know(monkeypatch, "c3d-sports1m", None, width=1 / 8, num_classes=3)
    torch.manual_seed(2)
    torch.save(C3D(3, 1 / 8).state_dict(), "c3d.pickle")
    h5py = pytest.importorskip("h5py")
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(512, 512)))[0]
    with h5py.File("PCA_activitynet_v1-3.hdf5", "w") as file:
        file["data/x_mean"] = file["x_mean"] = np.zeros(512)
        file["data/U"] = file["U"] = basis
    printed = follow("activitynet.md")
    assert np.load("features/v_one.rgb.npz")["data"].shape[1] == 500
    assert "left out" in printed["train baseline --preset paper-activitynet --skip-missing"]
    config = json.loads(Path("runs/baseline/config.json").read_text())
    assert config["loss"]["diversity_weight"] == 0.1  # of CPL on ActivityNet Captions
