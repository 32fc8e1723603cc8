"""A query on features that are cached: which of our files run, and what is never imported."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from make_videos import make_video

from mmdist_e2e.cli.main import main

MOST_FILES = 14

NEVER = (
    "mmdist_e2e.grounding.train",
    "mmdist_e2e.grounding.losses",
    "mmdist_e2e.grounding.evaluate",
    "mmdist_e2e.grounding.paper",
    "mmdist_e2e.extractors.networks",
    "mmdist_e2e.extractors.extract",
    "mmdist_e2e.extractors.video",
    "mmdist_e2e.extractors.flow",
    "mmdist_e2e.cli.train",
    "cv2",
    "numba",
    "decord",
    "av",
)

PROBE = """
import inspect, json, sys
ran = set()
def watch(frame, event, argument):
    code = frame.f_code
    is_function = code.co_flags & inspect.CO_OPTIMIZED  # bodies of modules and classes are not
    is_function = is_function and code.co_name != "<dictcomp>"  # inlined from Python 3.12 on
    if event == "call" and "/mmdist_e2e/" in code.co_filename and is_function:
        ran.add(code.co_filename.rpartition("/mmdist_e2e/")[2])
sys.setprofile(watch)
from mmdist_e2e.cli.main import main
main(sys.argv[1:], standalone_mode=False)
sys.setprofile(None)
print(json.dumps([sorted(ran), sorted(sys.modules)]), file=sys.stderr)
"""


@pytest.fixture(params=["shipped", "tiny", "workspace"])
def command(request, tmp_path, monkeypatch):
    """A command line whose features are cached, or in features/ of a workspace with a run."""
    monkeypatch.setenv("MMDIST_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    if request.param == "workspace":
        run = request.getfixturevalue("tiny_run")
        for name in ("videos", "features"):
            (tmp_path / name).symlink_to(run / name)
        (tmp_path / "runs").mkdir()
        (tmp_path / "runs" / "cpl").symlink_to(run / "model")
        return ["ground", "v0.mp4", "person opens the door"]
    arguments = ["ground", str(make_video(tmp_path / "a.mp4", 30)), "person opens the door"]
    if request.param == "tiny":
        run, extractor = (request.getfixturevalue(f"tiny_{k}") for k in ("run", "extractor"))
        arguments += ["--model", str(run / "model"), "--extractor", str(extractor)]
    main(arguments, standalone_mode=False)
    return arguments


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_query_on_cached_features_takes_a_short_way(command, options):
    run = subprocess.run(
        [sys.executable, "-c", PROBE, *command, *options],
        capture_output=True,
        text=True,
        check=True,
    )
    ran, modules = json.loads(run.stderr.splitlines()[-1])
    print("\n".join(ran))  # noqa: T201
    assert "grounding/network.py" in ran
    assert len(ran) <= MOST_FILES, ran
    assert not [m for m in modules for name in NEVER if m == name or m.startswith(f"{name}.")]
