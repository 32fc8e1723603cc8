"""What ships: it loads, says what it is, answers on the example clip and on real videos."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import mmdist_e2e as mm
from mmdist_e2e.cli.main import main
from mmdist_e2e.extractors.profiles import describe
from mmdist_e2e.store import FeatureStore
from mmdist_e2e.weights.registry import (
    DEFAULT_EXTRACTORS,
    ENTRIES,
    SHIPPED_MODEL,
    SHIPPED_ROOT,
    read_config,
)
from world.world import WORLD_VERSION, sample_script

EXAMPLES = Path(__file__).parents[1] / "examples"
DATA = os.environ.get("MMDIST_DATA")
REAL = {"Y1HGC": 30.62, "v_GGSY1Qvo990": 18.16, "v_ZNVhz7ctTq0": 14.05}  # id -> seconds
needs_data = pytest.mark.skipif(DATA is None, reason="MMDIST_DATA does not name the real videos")


def test_what_ships_is_small_and_has_cards():
    sizes = [path.stat().st_size for path in SHIPPED_ROOT.rglob("*") if path.is_file()]
    assert sum(sizes) < 40e6
    for entry in ENTRIES.values():
        if entry.kind == "shipped":
            assert (SHIPPED_ROOT / entry.name / "README.md").is_file()
            assert "synthetic world" in describe(entry.name).trained_on
    assert (SHIPPED_MODEL / "README.md").is_file()


def test_the_shipped_model_reads_what_the_shipped_network_gives():
    matters = read_config(SHIPPED_MODEL)["features"]["rgb"]
    assert matters == describe(DEFAULT_EXTRACTORS["rgb"]).matters


def test_the_shipped_model_says_that_it_knows_the_synthetic_world_alone():
    model = mm.load().model
    assert f"synthetic world, version {WORLD_VERSION}" in model.trained_on
    assert "on real video this is a guess" in str(model.warning)


def test_the_example_is_test_video_0_of_the_world():
    example = json.loads((EXAMPLES / "example.json").read_text())
    script = next(s for s in (sample_script(0, i) for i in range(20)) if s.split == "test")
    first = script.queries[0]
    assert example["video"] == script.id
    assert example["query"] == first.sentence
    assert example["moment"] == pytest.approx([first.start, first.end], abs=0.01)
    assert (EXAMPLES / example["clip"]).stat().st_size < 500_000


@pytest.mark.slow
def test_the_example_is_answered(tmp_path):
    example = json.loads((EXAMPLES / "example.json").read_text())
    moments = mm.load(cache=tmp_path).ground(EXAMPLES / example["clip"], example["query"], top_k=8)
    assert len(moments) == 8
    assert all(0 <= m.start < m.end <= example["duration_seconds"] + 0.1 for m in moments)
    assert moments.warning is not None


@pytest.mark.slow
def test_the_readmes_example_runs_as_it_stands(tmp_path):
    """As a script without a main guard, in a folder that holds a clip of that name."""
    readme = (EXAMPLES.parent / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    (tmp_path / "mine.py").write_text(code)
    shutil.copy(EXAMPLES / "example.mp4", tmp_path / "clip.mp4")
    run = subprocess.run(
        [sys.executable, "mine.py"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "MMDIST_CACHE": str(tmp_path / "cache")},
        check=False,
    )
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) == 6
    assert all(" s  " in line for line in lines[:5])
    example = json.loads((EXAMPLES / "example.json").read_text())
    rows = round(example["duration_seconds"] * 12 / 8)  # 12 frames a second, a row every 8
    assert lines[5].startswith(f"({rows}, 256)")


@needs_data
@pytest.mark.slow
def test_real_videos_are_extracted_whole_and_once(tmp_path):
    folder = str(Path(str(DATA)) / "videos")
    command = ["extract", folder, "--modality", "rgb,flow", "--out", str(tmp_path)]
    first = CliRunner().invoke(main, command)
    assert first.exit_code == 0, first.output
    store, stamps = FeatureStore(tmp_path), {}
    for video, seconds in REAL.items():
        rgb, flow = (store.load(video, modality) for modality in ("rgb", "flow"))
        np.testing.assert_array_equal(rgb.times, flow.times)
        for features in (rgb, flow):
            assert np.isfinite(features.data).all()
            assert features.data.std(axis=0).max() > 0.01
            assert features.times[0, 0] == 0.0
            assert features.times[-1, 1] == features.duration_seconds
            # The annotated durations are those of the sound or the container: a little longer.
            assert features.duration_seconds == pytest.approx(seconds, abs=0.3)
            assert len(features.data) == pytest.approx(seconds * 12 / 8, abs=2)
            path = store.path(video, features.modality)
            stamps[path] = path.stat().st_mtime_ns
    second = CliRunner().invoke(main, command)
    assert second.exit_code == 0
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())


@needs_data
@pytest.mark.slow
def test_a_real_video_is_answered_with_a_warning_of_what_the_model_knows(tmp_path):
    clip = Path(str(DATA)) / "videos" / "Y1HGC.mp4"
    query = "person drinking a glass of water"
    run = CliRunner().invoke(main, ["ground", str(clip), query, "--cache", str(tmp_path)])
    assert run.exit_code == 0, run.output
    assert "synthetic world" in run.stdout
    assert "on real video this is a guess" in run.stdout
