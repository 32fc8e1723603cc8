"""The checker of ratios, and that every benchmark it runs can still be loaded. Nothing is timed."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
BASH = shutil.which("bash")
FLOORS = json.loads((FOLDER / "floors.json").read_text())


@pytest.fixture
def load(monkeypatch):
    """Imports a script of benchmarks/ by its name."""
    monkeypatch.syspath_prepend(FOLDER)

    def by_name(name):
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look there
        spec.loader.exec_module(module)
        return module

    return by_name


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_every_script_imports_what_exists(load, path):
    try:
        load(path.stem)
    except ModuleNotFoundError as error:
        module = error.name.partition(".")[0]
        if module == "mmdist_e2e" or (FOLDER / f"{module}.py").exists():
            raise
        pytest.skip(f"needs {module}")


def write_benchmark(folder, *runs):
    """A script that prints the lines of its first run, then of its second, …"""
    (folder / "bench_fake.py").write_text(
        f"from pathlib import Path\nruns, count = {runs!r}, Path(__file__).with_name('count')\n"
        "done = len(count.read_text()) if count.exists() else 0\n"
        "count.write_text('x' * (done + 1))\nprint(runs[done])\n"
    )


@pytest.mark.parametrize(
    ("runs", "passes", "count"),
    [
        (["a part: ratio 2.5\nother: ratio 0.1"], True, 1),
        (["a part: ratio 1.9", "a part: ratio 2"], True, 2),  # a busy machine: once more
        (["a part: ratio 1.9", "a part: ratio 1"], False, 2),
        (["a part: 7", "nothing"], False, 2),
    ],
)
def test_a_ratio_below_its_floor_or_missing_fails(
    load, tmp_path, monkeypatch, capsys, runs, passes, count
):
    checker = load("check")
    monkeypatch.setattr(checker, "FOLDER", tmp_path)
    write_benchmark(tmp_path, *runs)
    assert checker.check({"bench_fake.py": {"a part": 2}}) is passes
    assert len((tmp_path / "count").read_text()) == count
    printed = capsys.readouterr().out
    assert ("BELOW" in printed) is not passes
    assert ("missing" in printed) is ("7" in runs[0])


def test_the_exit_code_tells_and_slow_ones_run_only_if_asked(load, tmp_path, monkeypatch):
    checker = load("check")
    monkeypatch.setattr(checker, "FOLDER", tmp_path)
    write_benchmark(tmp_path, *["fast: ratio 1\nslow: ratio 1"] * 9)
    floors = {"quick": {"bench_fake.py": {"fast": 1}}, "slow": {"bench_fake.py": {"slow": 2}}}
    (tmp_path / "floors.json").write_text(json.dumps(floors))
    for options, code in (([], 0), (["--all"], 1), (["--al"], "Unknown: --al; valid: --all.")):
        monkeypatch.setattr(sys, "argv", ["check.py", *options])
        with pytest.raises(SystemExit) as exit_:
            checker.main()
        assert exit_.value.code == code
    assert len((tmp_path / "count").read_text()) == 1 + (1 + 2)  # the slow one fails twice


def test_floors_name_scripts_and_cases_that_exist(load):
    cases = load("bench_extract").CASES
    for group in FLOORS.values():
        for command, floors in group.items():
            assert (FOLDER / command.split()[0]).is_file()
            assert all(floor > 0 for floor in floors.values())
            extracted = {name.split()[1] for name in floors if name.startswith("extract ")}
            assert extracted <= set(cases)


def test_of_one_network_the_two_libraries_take_the_same_keys_and_values(load):
    """Against the names in video_features' source: their BatchNorm adds 1e-5, ours 1e-3."""
    ours = load("common").random_i3d().state_dict()
    theirs = load("bench_video_features").their_weights(ours)
    assert {
        "conv3d_1a_7x7.conv3d.weight", "conv3d_2c_3x3.batch3d.running_var",
        "mixed_3b.branch_0.conv3d.weight", "mixed_3b.branch_1.0.conv3d.weight",
        "mixed_4f.branch_1.1.batch3d.bias", "mixed_5c.branch_2.1.batch3d.running_mean",
        "mixed_5c.branch_3.1.conv3d.weight", "conv3d_0c_1x1.conv3d.bias",
    } <= set(theirs)  # fmt: skip
    assert len(theirs) == len(ours)
    our_variance = ours["Mixed_3b.b0.bn.running_var"] + 1e-3
    assert (
        theirs["mixed_3b.branch_0.batch3d.running_var"] + 1e-5 - our_variance
    ).abs().max() < 1e-6


@pytest.mark.skipif(BASH is None, reason="needs bash")
def test_the_gpu_script_is_valid_and_names_scripts_that_exist():
    script = FOLDER / "gpu.sh"
    assert subprocess.run([BASH, "-n", str(script)], check=False).returncode == 0
    named = [word for word in script.read_text().split() if word.endswith(".py")]
    assert named
    assert all((FOLDER / name).is_file() for name in named)
