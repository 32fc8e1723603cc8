"""`mmdist reproduce`: every row once, resumable, one table beside the paper's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from filelock import FileLock
from test_cli_distill import both
from test_cli_train import SMALL, files, mmdist

from mmdist_e2e.grounding import paper as reproduce
from mmdist_e2e.grounding.paper import ROWS, SHOWN, plan, rows_of, table
from mmdist_e2e.structures import MmdistError

__all__ = ["both", "files"]  # fixtures


def run(both: Path, out: Path, *more: object) -> Result:
    data = ["--features", both / "F.hdf5", "--flow-features", both / "flow.hdf5"]
    data += ["--train", both / "A.json", "--val", both / "B.json", "--annotations", both / "C.json"]
    data += ["--glove", both / "glove.txt", "--length", 16, *SMALL, "--set=epochs=1"]
    return mmdist("reproduce", *data, "--out", out, *more)


def h5py_file(path: Path) -> Any:
    import h5py

    return h5py.File(path, "r+")


def test_the_papers_tables_have_their_rows() -> None:
    assert {row.name for row in rows_of([1])} == {"cpl", "baseline", "teacher", "student"}
    assert len(rows_of([3])) == 3
    assert len(rows_of([1, 3, 4, 5])) == len(ROWS) == 10
    with pytest.raises(MmdistError, match="valid: 1, 3, 4, 5"):
        rows_of([2])
    # Students need teachers of every seed of theirs, before them; headline rows come first.
    jobs = [(row.name, seed) for row, seed in plan(rows_of([4]), range(3), range(2))]
    assert len(jobs) == len(set(jobs)) == 3 * 3 + 2 * 2
    for seed in range(3):
        assert jobs.index(("teacher", seed)) < jobs.index(("student", seed)) < 9


@pytest.mark.slow
def test_every_row_is_trained_once_and_told(
    both: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = ["--seeds", 2, "--ablation-seeds", 1]
    dry = run(both, tmp_path, *seeds, "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert "14 of 14 trainings are left" in dry.output
    assert not any(tmp_path.iterdir())
    trained: list[tuple[str, int]] = []
    original = reproduce.train_run

    def counting(**options: object) -> object:
        if len(trained) == 5:
            raise KeyboardInterrupt
        trained.append((str(options["out"]), int(str(options["seed"]))))
        return original(**options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(reproduce, "train_run", counting)
        assert run(both, tmp_path, *seeds).exit_code != 0  # killed at the sixth
    first = (tmp_path / "table.md").read_text()
    assert "| cpl | 1 | 0, 1 |" in first
    assert "| baseline | 1, 3, 4 | 0 |" in first
    assert "baseline without" not in first
    again = run(both, tmp_path, *seeds)
    assert again.exit_code == 0, again.output
    table = (tmp_path / "table.md").read_text()
    rows, differences = table.split("Differences")
    assert [line.split(" |")[0] for line in rows.splitlines() if line.startswith("| ")][1:] == [
        f"| {row.name}" for row in ROWS
    ]
    assert differences.count("−") == len(ROWS) - 1
    assert "(54.72)" in table
    assert "C.json" in table
    settings = json.loads((tmp_path / "teacher-without-mutual-0" / "config.json").read_text())
    assert settings["mutual"]["mutual_weight"] == 0
    assert "0 of 14 trainings are left" in run(both, tmp_path, *seeds, "--dry-run").output


def test_differences_are_paired_by_seed() -> None:
    def one(recipe: str, score: float) -> dict[str, object]:
        metrics = dict.fromkeys(SHOWN, score)
        result = {"metrics": metrics, "controls": {}, "recipe": recipe, "videos": 3}
        result |= {"protocol": "p", "selected_by": "s"}
        return {"result": result, "seconds": 1.0}

    scores = {"cpl": (10.0, 12.0, 14.0), "baseline": (11.0, 15.0, 19.0)}
    done = {(n, i): one(n, score) for n, each in scores.items() for i, score in enumerate(each)}
    jobs = [(row, seed) for row in rows_of([1]) for seed in range(3)]
    lines = table(done, jobs, "toys", "preset small, L 16, 16 channels").splitlines()
    (line,) = [line for line in lines if line.startswith("| baseline − cpl")]
    # 1, 3 and 5: their mean is 3, their deviation 2, and 2 / √3 = 1.15.
    assert line == "| baseline − cpl | 3 | +3.00 | 1.15 | +1.00 +3.00 +5.00 |"
    assert "toys" in lines[0]
    assert "preset small, L 16, 16 channels" in lines[0]


def test_the_header_names_the_preset_and_few_queries_are_told_once(
    both: Path, tmp_path: Path
) -> None:
    few = ["--tables", 1, "--seeds", 1, "--set", "hidden=8"]
    paper = run(both, tmp_path, *few, "--preset", "paper")
    assert paper.exit_code == 0, paper.output
    for text in (paper.stdout, (tmp_path / "table.md").read_text()):
        assert "; preset paper, L 16, 8 channels; checkpoints" in text
    assert paper.stderr.count("There are only") == 1
    assert "--preset paper --length 16" in (tmp_path / "cpl-0" / "README.md").read_text()
    small = run(both, tmp_path, *few)
    assert small.exit_code == 1
    assert "dropout is 0.1 there and 0.3 here" in small.output


def test_two_calls_share_a_folder(both: Path, tmp_path: Path) -> None:
    """What one is at the other passes over, and a lock that is left behind stops nobody."""
    few = ["--tables", "3", "--seeds", 1, "--set", "hidden=8"]
    (tmp_path / ".locks").mkdir()
    with FileLock(tmp_path / ".locks" / "baseline-0"):
        shared = run(both, tmp_path, *few)
    assert shared.exit_code == 0, shared.output
    assert "baseline, seed 0: another call is training it" in shared.output
    assert {path.name for path in tmp_path.glob("base*")} == {
        "baseline-without-local-0",
        "baseline-without-global-0",
    }
    again = run(both, tmp_path, *few)
    assert again.exit_code == 0, again.output
    assert (tmp_path / "baseline-0" / "reproduced.json").is_file()


def test_rows_of_other_inputs_are_named_and_refused(both: Path, tmp_path: Path) -> None:
    few = ["--tables", "1", "--seeds", 1]
    assert run(both, tmp_path / "rows", *few).exit_code == 0
    table = (tmp_path / "rows" / "table.md").read_text()
    world = tmp_path / "world"
    shutil.copytree(both, world)

    def refused(*more: object) -> str:
        for dry in ([], ["--dry-run"]):
            result = run(world, tmp_path / "rows", *few, *more, *dry)
            assert result.exit_code == 1
            assert "finished" in result.output
        assert (tmp_path / "rows" / "table.md").read_text() == table
        return " ".join(result.output.split())

    assert "0 of 4 trainings are left" in run(world, tmp_path / "rows", *few, "--dry-run").output
    told = refused("--set", "dropout=0.25")
    assert "holds 4 finished runs of other inputs: cpl-0 (" in told
    assert "dropout is 0.3 there and 0.25 here" in told
    told = refused("--set", "distill_weight=0.5")  # a setting of the student alone
    assert "holds 1 finished runs of other inputs: student-0 (" in told
    with h5py_file(world / "flow.hdf5") as flow:  # read by the teacher and by who learns from it
        flow["v0"][0, 0] += 1
    told = refused()
    assert "teacher-0 (other features (flow)), student-0 (other features (flow))" in told
    shutil.copy(both / "flow.hdf5", world)
    rows = json.loads((world / "C.json").read_text())
    rows[0][2][1] -= 1
    (world / "C.json").write_text(json.dumps(rows))
    assert refused().count("(other annotations (test))") == 4
    shutil.copy(both / "C.json", world)
    done = tmp_path / "rows" / "cpl-0" / "reproduced.json"
    known = json.loads(done.read_text())
    del known["inputs"]  # as older versions wrote it
    done.write_text(json.dumps(known))
    assert "cpl-0 (its inputs are not recorded" in refused()


def test_mistakes_are_told(both: Path, tmp_path: Path) -> None:
    wrong = run(both, tmp_path, "--tables", "one")
    assert wrong.exit_code == 1
    assert "1,3,4,5" in wrong.output
    wrong = run(both, tmp_path, "--set", "temprature=1")
    assert wrong.exit_code == 1
    assert "No row has a setting 'temprature'" in wrong.output
    for option in ("--train", "--flow-features"):  # the last of an option counts
        wrong = run(both, tmp_path, option, tmp_path / "none")
        assert wrong.exit_code == 1
        assert wrong.output.count("none") == 1
        assert not any(tmp_path.iterdir())


def test_one_row_that_fails_does_not_stop_the_others(both: Path, tmp_path: Path) -> None:
    (tmp_path / "baseline-0").write_text("a file where a run belongs")
    failed = run(both, tmp_path, "--tables", "1", "--seeds", 1)
    assert failed.exit_code == 1
    assert "baseline, seed 0 failed" in failed.output
    table = (tmp_path / "table.md").read_text()
    assert "| cpl |" in table
    assert "| student |" in table


def test_no_student_learns_from_a_teacher_that_failed(both: Path, tmp_path: Path) -> None:
    (tmp_path / "teacher-0").mkdir()
    for path in (both / "teacher").iterdir():  # a checkpoint is there, but not of this call
        if path.is_file():
            shutil.copy(path, tmp_path / "teacher-0")
    failed = run(both, tmp_path, "--tables", "1", "--seeds", 1)
    assert failed.exit_code == 1
    assert "teacher, seed 0 failed: " in failed.output
    assert "epochs is 2 there and 1 here" in failed.output
    assert "student, seed 0 failed: its teacher" in failed.output
    assert "| baseline |" in (tmp_path / "table.md").read_text()
