"""`mmdist reproduce`: every row once, resumable, one table beside the paper's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import Result
from test_cli_distill import both
from test_cli_train import SMALL, files, mmdist

from mmdist_e2e.grounding import reproduce
from mmdist_e2e.grounding.reproduce import ROWS, plan, rows_of
from mmdist_e2e.structures import MmdistError

__all__ = ["both", "files"]  # fixtures


def run(both: Path, out: Path, *more: object) -> Result:
    data = ["--features", both / "F.hdf5", "--flow-features", both / "flow.hdf5"]
    data += ["--train", both / "A.json", "--val", both / "B.json", "--annotations", both / "C.json"]
    data += ["--glove", both / "glove.txt", "--length", 16, *SMALL, "--set=epochs=1"]
    return mmdist("reproduce", *data, "--out", out, *more)


def test_the_papers_tables_have_their_rows() -> None:
    assert {row.name for row in rows_of([1])} == {"cpl", "baseline", "teacher", "student"}
    assert len(rows_of([3])) == 3
    assert len(rows_of([1, 3, 4, 5])) == len(ROWS) == 10
    with pytest.raises(MmdistError, match="valid: 1, 3, 4, 5"):
        rows_of([2])
    # Students need teachers of every seed of theirs, before them.
    jobs = plan(rows_of([4]), range(3), range(2))
    names = [row.name for row, _ in jobs]
    assert names.count("teacher") == names.count("student") == 3
    assert names.count("student without local distillation") == 2
    assert names.index("student") > max(i for i, name in enumerate(names) if name == "teacher")


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
    assert "| teacher |" not in first
    again = run(both, tmp_path, *seeds)
    assert again.exit_code == 0, again.output
    table = (tmp_path / "table.md").read_text()
    assert [line.split(" |")[0] for line in table.splitlines() if line.startswith("| ")][1:] == [
        f"| {row.name}" for row in ROWS
    ]
    assert "(54.72)" in table
    assert "C.json" in table
    settings = json.loads((tmp_path / "teacher-without-mutual-0" / "config.json").read_text())
    assert settings["mutual"]["mutual_weight"] == 0
    assert "0 of 14 trainings are left" in run(both, tmp_path, *seeds, "--dry-run").output


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
