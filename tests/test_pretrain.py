"""Clips, augmentation, helpers, a tiny pretraining from end to end, and the linear probe."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from mmdist_e2e.extractors.networks import SnippetNetwork, describe
from mmdist_e2e.structures import MmdistError
from mmdist_e2e.synthetic import clipset
from mmdist_e2e.synthetic.clips import ACTION_NAMES, OBJECT_NAMES
from mmdist_e2e.synthetic.clipset import (
    JOINT_VALUES,
    JOINTS,
    POSE_TARGETS,
    augment,
    batches,
    motion_targets,
    place_targets,
    render_clips,
)
from mmdist_e2e.synthetic.pretrain import Pretrainer, PretrainSettings, losses, pretrain
from mmdist_e2e.synthetic.probe import action_at, fit_and_score, probe
from mmdist_e2e.synthetic.world import sample_script

TINY = PretrainSettings(
    clips=38, validation_clips=19, width=0.125, stages=((32, 1, 0.6), (48, 1, 0.85)), batch=19
)


def marked_clips(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Black clips [B, T, H, W, C] with a white square where every joint is."""
    rng = np.random.default_rng(0)
    clips = np.zeros((count, 16, 96, 128, 3), dtype=np.uint8)
    poses = np.zeros((count, 16, 12), dtype=np.float32)
    for b in range(count):
        x, y = rng.uniform(0.35, 0.65, 2)
        column, row = int(x * 128), int(y * 96)
        clips[b, :, row - 2 : row + 3, column - 2 : column + 3] = 255
        poses[b, :, 0:JOINT_VALUES:2], poses[b, :, 1:JOINT_VALUES:2] = x, y
    return torch.from_numpy(clips), torch.from_numpy(poses)


def test_poses_follow_the_crop_and_the_mirror():
    clips, poses = marked_clips(24)
    generator = torch.Generator().manual_seed(1)
    frames, moved = augment(clips, poses, 64, generator, smallest_crop=0.5)
    assert frames.shape == (24, 3, 16, 64, 64)
    assert frames.min() >= -1
    assert frames.max() <= 1
    assert (moved[:, 0, 0] - poses[:, 0, 0]).abs().max() > 0.05  # something did move
    for b in range(24):
        picture = frames[b, :, 8].mean(dim=0)
        rows, columns = torch.nonzero(picture > (picture.max() + picture.min()) / 2, as_tuple=True)
        assert (columns.float().mean() + 0.5) / 64 == pytest.approx(float(moved[b, 8, 0]), abs=0.02)
        assert (rows.float().mean() + 0.5) / 64 == pytest.approx(float(moved[b, 8, 1]), abs=0.02)


def test_place_targets_name_the_cell_of_each_joint():
    poses = torch.rand(3, 16, 12) * 1.4 - 0.2  # some lie outside the picture
    cells = place_targets(poses, 4, 5, 7)
    assert cells.shape == (3, 4, JOINTS)
    for b in range(3):
        for t in range(4):
            for j in range(JOINTS):
                x, y = poses[b, 4 * t + 2, 2 * j : 2 * j + 2].tolist()
                column, row = min(max(int(x * 7 // 1), 0), 6), min(max(int(y * 5 // 1), 0), 4)
                assert cells[b, t, j] == row * 7 + column


def test_motion_targets_do_not_see_where_the_person_is():
    poses = torch.rand(4, 16, 12)
    shifted = poses.clone()
    shifted[..., 0:JOINT_VALUES:2] += 0.3
    shifted[..., 1:JOINT_VALUES:2] -= 0.1
    assert motion_targets(poses).shape == (4, POSE_TARGETS)
    torch.testing.assert_close(motion_targets(poses), motion_targets(shifted))
    shifted[:, 1, 4] += 0.2  # a hand that moves otherwise is seen
    assert not torch.allclose(motion_targets(poses), motion_targets(shifted))


def test_batches_hold_every_clip_at_most_once():
    seen = np.concatenate(list(batches(50, 8, torch.Generator().manual_seed(0))))
    assert len(seen) == 48
    assert len(set(seen.tolist())) == 48


def test_clips_are_rendered_once(tmp_path, monkeypatch):
    said: list[str] = []
    first = render_clips(tmp_path, seed=5, count=3, workers=1, progress=said.append)
    monkeypatch.setattr(clipset, "sample_clip", None)
    again = render_clips(tmp_path, seed=5, count=3, workers=1, progress=said.append)
    np.testing.assert_array_equal(first.clips_NTHWC, again.clips_NTHWC)
    np.testing.assert_array_equal(first.poses_NTP, again.poses_NTP)
    assert len(first) == 3
    assert said == ["rendered 3 of 3 clips"]


def test_every_loss_term_reaches_the_stem():
    torch.manual_seed(0)
    model = Pretrainer(TINY)
    labels = torch.tensor([[1, 2], [3, 4]])
    # The logits begin at zero, which lets nothing through until their first step.
    torch.nn.init.normal_(model.network.logits.conv3d.weight)
    for name in ("action", "object", "place", "motion"):
        model.zero_grad()
        terms = losses(model, torch.rand(2, 3, 16, 32, 32), torch.rand(2, 16, 12), labels, TINY)
        terms[name].backward()
        gradient = model.network.Conv3d_1a_7x7.conv3d.weight.grad
        assert gradient is not None
        assert gradient.abs().sum() > 0, name


@pytest.mark.slow
def test_a_tiny_pretraining_gives_an_extractor(tmp_path):
    said: list[str] = []
    out = tmp_path / "net"
    figures = pretrain(out, TINY, cache=tmp_path / "clips", workers=2, progress=said.append)
    config = json.loads((out / "config.json").read_text())
    assert (
        config["pretraining"]["validation_action_accuracy"]
        == (figures["validation_action_accuracy"])
    )
    assert len(config["classes"]) == len(ACTION_NAMES) + len(OBJECT_NAMES)
    assert str(figures["validation_action_accuracy"]) in (out / "README.md").read_text()
    spec = describe(str(out))
    assert "synthetic world" in spec.trained_on
    network = SnippetNetwork(spec, device="cpu", precision="fp32")
    rows = network.rows(np.zeros((2, 16, 112, 112, 3), dtype=np.uint8))
    assert rows.shape == (2, 128)
    assert np.isfinite(rows).all()


def test_action_at_reads_the_script():
    script = sample_script(0, 8)
    for segment in script.segments:
        assert action_at(script, (segment.start + segment.end) / 2) == segment.action
    assert action_at(script, script.duration_seconds) == script.segments[-1].action


def test_the_probe_finds_what_is_linear_and_nothing_in_noise():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, len(ACTION_NAMES), 1200)
    codes = rng.normal(size=(len(ACTION_NAMES), 32))
    clear = (codes[labels] + 0.1 * rng.normal(size=(1200, 32))).astype(np.float32)
    noise = rng.normal(size=(1200, 32)).astype(np.float32)
    split = (slice(0, 800), slice(800, None))
    clear_score = fit_and_score(*((clear[s], labels[s]) for s in split))
    noise_score = fit_and_score(*((noise[s], labels[s]) for s in split))
    assert clear_score["accuracy"] > 95
    assert noise_score["accuracy"] < 3 * noise_score["uniform_chance"]


def test_the_probe_refuses_another_version_of_the_world(tmp_path):
    (tmp_path / "world.json").write_text(json.dumps({"world_version": 99, "seed": 0, "videos": 1}))
    with pytest.raises(MmdistError, match="version 99"):
        probe(tmp_path, "world1-rgb", say=lambda line: None)
