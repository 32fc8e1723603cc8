"""Two processes train as one does: the same losses from the same global batches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_cli_distill import both
from test_cli_train import SMALL, files, mmdist, train

from mmdist_e2e.grounding.losses import match_log_probability

__all__ = ["both", "files"]  # fixtures


def several(count: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """`mmdist …` by torchrun in so many processes on the CPU."""
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(count), "--standalone"]
    return subprocess.run(
        [sys.executable, *torchrun, "-m", "mmdist_e2e.cli.main", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def history(run: Path) -> list[dict[str, dict[str, float]]]:
    loaded: list[dict[str, dict[str, float]]] = json.loads((run / "history.json").read_text())
    return loaded


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "count", "size", "settings"),
    [
        ("baseline", 2, 8, ()),
        ("baseline", 2, 8, ("--set=local_weight=0", "--set=score_weight=0")),  # an unused branch
        ("teacher", 2, 9, ()),
        ("student", 3, 9, ()),
    ],
)
def test_the_losses_are_those_of_one_process(
    both: Path, tmp_path: Path, recipe: str, count: int, size: int, settings: tuple[str, ...]
) -> None:
    # 28 sentences: a last batch of 4 of 8, and of 1 of 9, which leaves a process without rows.
    data = ["--features", both / "F.hdf5", "--train", both / "A.json", "--val", both / "B.json"]
    data += ["--glove", both / "glove.txt", "--length", 16, "--epochs", 2, "--seed", 3, *SMALL]
    data += ["--set=dropout=0", f"--set=batch_size={size}", "--device", "cpu", *settings]
    if recipe != "baseline":
        data += ["--flow-features", both / "flow.hdf5"]
    if recipe == "student":
        data += ["--teacher", both / "teacher"]
    alone = mmdist("train", recipe, *data, "--out", tmp_path / "alone")
    assert alone.exit_code == 0, alone.output
    together = several(count, "train", recipe, *data, "--out", tmp_path / "together")
    assert together.returncode == 0, together.stderr
    assert together.stdout.count("best epoch") == 1
    assert "Warning" not in together.stderr
    for one, many in zip(history(tmp_path / "alone"), history(tmp_path / "together"), strict=True):
        assert one["losses"].keys() == many["losses"].keys()
        for term, value in one["losses"].items():
            assert many["losses"][term] == pytest.approx(value, abs=1e-5), term
        assert many["validation"] == pytest.approx(one["validation"], abs=1e-3)


def test_own_sentences_of_a_share() -> None:
    torch.manual_seed(0)
    fit, negatives = torch.randn(6, 6), torch.rand(6, 6) < 0.7
    whole = match_log_probability(fit, 0.3, negatives)
    own = torch.tensor([2, 3])
    part = match_log_probability(fit[own], 0.3, negatives[own], own)
    np.testing.assert_allclose(part, whole[own], rtol=1e-6)


def test_one_process_needs_no_torchrun(files: Path, tmp_path: Path) -> None:
    assert train(files, tmp_path).exit_code == 0
    assert not torch.distributed.is_initialized()
