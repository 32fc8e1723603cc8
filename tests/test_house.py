"""Imports flow one way, and light things stay light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "mmdist_e2e"
ROOMS = (
    "structures",
    "store",
    "weights",
    "extractors",
    "grounding",
    "pipeline",
    "workspace",
    "cli",
)
MAY_IMPORT = {
    "structures": set(),
    "store": {"structures"},
    "weights": {"structures", "store"},
    "extractors": {"structures", "store", "weights"},
    "grounding": {"structures", "store", "weights"},
    "pipeline": {"structures", "store", "weights", "extractors", "grounding"},
    "workspace": {"structures", "store", "weights", "grounding"},
    "cli": {*ROOMS},
}
ONLY_HERE = {  # library -> the files that may know it
    "click": {"cli"},
    "rich": {"cli"},
    "decord": {"extractors/video/worker.py"},
    "av": {"extractors/video/"},
    "cv2": {"extractors/flow/opencv.py"},
    "numba": {"extractors/flow/cpu.py"},
    "triton": {"extractors/flow/gpu.py"},
    "pytorchvideo": {"extractors/networks/pytorchvideo.py"},
    "ray": {"extractors/engines/ray.py"},
    "fsspec": {"extractors/remote.py"},
}


def imports_of(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, lazily or not."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


FILES = sorted(ROOT.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_flow_one_way(path):
    room = room_of(path)
    if room in ("__init__", "__main__"):
        return
    if path.relative_to(ROOT).as_posix() in ("weights/cpl.py", "weights/pull.py"):
        room = "cli"  # they make a grounding checkpoint of public files
    used = {name.split(".")[1] for name in imports_of(path) if name.startswith("mmdist_e2e.")}
    strangers = {name for name in used if name in ROOMS} - MAY_IMPORT[room] - {room}
    assert not strangers, f"{room} must not import {strangers}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_libraries_stay_in_their_rooms(path):
    place = path.relative_to(ROOT).as_posix()
    for name in imports_of(path):
        library = name.split(".")[0]
        homes = ONLY_HERE.get(library)
        assert homes is None or any(place.startswith(home) for home in homes), (
            f"{place} imports {library}, which only {homes} may know"
        )


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_files_stay_short(path):
    assert len(path.read_text().splitlines()) <= 600


def test_imports_have_no_circle():
    """Among our files, lazy imports and those under TYPE_CHECKING included."""
    names = {f"mmdist_e2e.{p.relative_to(ROOT).with_suffix('').as_posix()}": p for p in FILES}
    names = {n.replace("/", ".").removesuffix(".__init__"): p for n, p in names.items()}
    graph = {name: (imports_of(path) & names.keys()) - {name} for name, path in names.items()}
    graph.pop("mmdist_e2e")  # the package's face names everything, and is named by its version
    while graph:
        leaves = {name for name, used in graph.items() if not used & graph.keys()}
        assert leaves, f"these files import each other in a circle: {sorted(graph)}"
        graph = {name: used for name, used in graph.items() if name not in leaves}


def modules_after(code: str) -> set[str]:
    probe = f"import sys\n{code}\nprint('\\n'.join(sys.modules))"
    run = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


@pytest.mark.parametrize(
    "code",
    [
        "import mmdist_e2e",
        "import mmdist_e2e.cli.main",
        "from mmdist_e2e import Features, Moment, FeatureStore",
        "import mmdist_e2e.extractors.video.worker",
        "import mmdist_e2e.extractors.video, mmdist_e2e.extractors.batch",
        "import mmdist_e2e.grounding.config",
    ],
)
def test_light_things_never_import_torch(code):
    loaded = modules_after(code)
    assert "torch" not in loaded
    assert "numpy" in loaded or code == "import mmdist_e2e"


def test_help_never_imports_torch():
    code = (
        "from mmdist_e2e.cli.main import main\n"
        "import contextlib, io\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        "    main(['--help'], standalone_mode=False)"
    )
    assert "torch" not in modules_after(code)


def test_public_names_all_load():
    import mmdist_e2e as mm

    assert {"load", "extract", "Features", "Moment"} <= set(dir(mm))
    for name in dir(mm):
        assert getattr(mm, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = mm.nonsense


def test_the_docs_name_every_dependency_but_opencv():
    """docs/flow.md tells how to install beside an OpenCV that somebody built with CUDA."""
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["project"]
    needed = {re.split(r"[<>=]", line)[0] for line in project["dependencies"]}
    page = (ROOT.parent / "docs" / "flow.md").read_text()
    listed = re.search(r"^pip install (torch .*)$", page, re.M)
    assert listed is not None
    assert set(listed[1].split()) == needed - {"opencv-contrib-python-headless"}
