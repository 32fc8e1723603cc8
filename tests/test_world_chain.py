"""The chain of `make world` at the size of a toy: render, extract, reproduce."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from mmdist_e2e.cli.main import main
from mmdist_e2e.store import FeatureStore
from world.world import WORLD_VERSION, sample_script

REPOSITORY = Path(__file__).parents[1]
SMALL = ("hidden=16", "heads=2", "layers=1", "feed_forward=24", "proposals=3", "epochs=1")


def world(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "world", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def mmdist(*arguments: object) -> str:
    done = CliRunner().invoke(main, [str(a) for a in arguments])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.slow
def test_a_rendered_world_is_extracted_and_reproduced(
    tmp_path: Path, tiny_extractor: Path, tiny_flow_extractor: Path
) -> None:
    made, features, rows = tmp_path / "world", tmp_path / "features", tmp_path / "rows"
    rendered = world("render", "--videos", 10, "--out", made)
    assert rendered.returncode == 0, rendered.stderr
    assert "rendered: 10" in rendered.stdout
    again = world("render", "--videos", 10, "--out", made)  # resumes: nothing is left
    assert "rendered: 0" in again.stdout

    networks = ["--extractor", tiny_extractor, "--extractor", tiny_flow_extractor]
    mmdist("extract", made / "videos", "--modality", "rgb,flow", *networks, "--out", features)
    store = FeatureStore(features)
    for script in (sample_script(0, i) for i in range(10)):
        for modality in ("rgb", "flow"):
            loaded = store.load(script.id, modality)
            assert loaded.duration_seconds == pytest.approx(script.duration_seconds, abs=0.1)

    data = ["--features", features, "--annotations", made / "world_sta_test.txt"]
    for split in ("train", "val"):
        data += [f"--{split}", made / f"world_sta_{split}.txt"]
    settings = [f"--set={setting}" for setting in SMALL]
    only = ["--tables", 1, "--seeds", 1, "--length", 16]
    shown = mmdist("reproduce", *data, *only, *settings, "--out", rows)
    table = (rows / "table.md").read_text()
    source = f"our own synthetic world, version {WORLD_VERSION} (seed 0, world_sta_test.txt)"
    assert source in table
    assert source in shown
    for row in ("cpl", "baseline", "teacher", "student"):
        assert f"| {row} |" in table
    assert "synthetic world" in (rows / "student-0" / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope"], "There is no command 'nope'; valid: render, pretrain, probe, glove, ship."),
        (["render", "--videos", 0, "--out", "x"], "A world has at least one video; got 0."),
        (["ship", "/nowhere"], "There is no folder '/nowhere'; run make world first."),
    ],
)
def test_mistakes_are_one_sentence(arguments: list[object], message: str) -> None:
    done = world(*arguments)
    assert done.returncode == 1
    assert done.stderr.strip() == message
