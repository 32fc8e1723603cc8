"""Clips and their flow, augmentation, helpers, resuming, and tiny pretrainings from end to end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mmdist_e2e.extractors.profiles import describe
from mmdist_e2e.extractors.runner import SnippetNetwork
from mmdist_e2e.structures import MmdistError
from world import clipset, flowset
from world.clips import ACTION_NAMES, OBJECT_NAMES
from world.clipset import (
    JOINT_VALUES,
    JOINTS,
    POSE_TARGETS,
    augment,
    batches,
    motion_targets,
    place_targets,
    render_clips,
)
from world.flowset import augment_flow, flow_clips, flow_of, flow_windows
from world.pretrain import Pretrainer, PretrainSettings, losses, pretrain
from world.resume import Run
from world.world import WORLD_VERSION

TINY = PretrainSettings(
    clips=20, validation_clips=6, width=0.125, stages=((32, 1, 0.6), (48, 1, 0.85)), batch=10
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


def test_flow_of_clips_points_to_the_next_frame_and_repeats_the_last():
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.uniform(0, 255, (1, 1, 14, 18)))
    wall = torch.nn.functional.interpolate(coarse, (120, 160), mode="bicubic")[0, 0]
    wall_HW = wall.clamp(0, 255).round().to(torch.uint8).numpy()
    # The window goes up and to the left, so what it shows goes down and to the right.
    shots = [wall_HW[10 - t : 106 - t, 20 - 2 * t : 148 - 2 * t] for t in range(3)]
    clips_NTHWC = np.repeat(np.stack(shots)[None, ..., None], 3, axis=4)
    flow = flow_of(clips_NTHWC)
    assert flow.shape == (1, 3, 96, 128, 2)
    assert flow.dtype == np.float16
    inside = flow[0, :, 10:-10, 10:-10].astype(np.float32)
    np.testing.assert_allclose(np.median(inside, axis=(1, 2)), [[2, 1]] * 3, atol=0.1)
    np.testing.assert_array_equal(flow[:, 1], flow[:, 2])
    assert not np.array_equal(flow[:, 0], flow[:, 1])


@pytest.mark.slow
def test_killed_flow_resumes_after_its_last_complete_block(tmp_path, monkeypatch):
    solved: list[int] = []

    def stub(clips_NTHWC):
        solved.append(len(clips_NTHWC))
        if sum(solved) == 4 and len(solved) == 2:
            raise KeyboardInterrupt
        return clips_NTHWC[..., :2].astype(np.float16) / 16

    monkeypatch.setattr(flowset, "flow_of", stub)
    monkeypatch.setattr(flowset, "FLOW_BLOCK", 2)
    options = {"seed": 5, "count": 5, "workers": 1, "progress": lambda line: None}
    with pytest.raises(KeyboardInterrupt):
        flow_clips(tmp_path, **options)
    made = flow_clips(tmp_path, **options)
    assert solved == [2, 2, 2, 1]  # the second block again, the first not
    frames = render_clips(tmp_path, **options).clips_NTHWC
    np.testing.assert_array_equal(made.clips_NTHWC, frames[..., :2].astype(np.float16) / 16)
    again = flow_clips(tmp_path, **options)
    assert len(solved) == 4
    np.testing.assert_array_equal(again.clips_NTHWC, made.clips_NTHWC)
    assert not list(tmp_path.glob("*.part.*"))


def test_flow_in_the_mirror_goes_the_other_way_and_stays_in_pixels():
    clips = torch.empty(24, 16, 96, 128, 2, dtype=torch.float16)
    clips[..., 0], clips[..., 1] = 2.0, -1.0
    marked, poses = marked_clips(24)
    clips[..., 1] -= 39.0 * (marked[..., 0] > 0)  # where the person is, far out of bounds
    generator = torch.Generator().manual_seed(1)
    fields, moved = augment_flow(clips, poses, 64, generator, smallest_crop=0.5)
    assert fields.shape == (24, 2, 16, 64, 64)
    across, down = fields[:, 0, 0, 0, 0] * 8, fields[:, 1, 0, 0, 0] * 8
    torch.testing.assert_close(across.abs(), -2 * down)
    assert 0.8 <= down.abs().min() < 0.9 < 1.1 < down.abs().max() <= 1.2
    assert 6 < int((across > 0).sum()) < 18
    assert fields.min() == -1
    for b in range(24):
        rows, columns = torch.nonzero(fields[b, 1, 8] == -1, as_tuple=True)
        assert (columns.float().mean() + 0.5) / 64 == pytest.approx(float(moved[b, 8, 0]), abs=0.04)
        assert (rows.float().mean() + 0.5) / 64 == pytest.approx(float(moved[b, 8, 1]), abs=0.04)


def test_flow_in_training_is_flow_in_extraction(monkeypatch):
    """A whole clip at its own speed is what the extractor will give the network, or its mirror."""
    monkeypatch.setattr(flowset, "GAIN", 0.0)
    rng = np.random.default_rng(0)
    clips = rng.normal(scale=4, size=(6, 16, 96, 128, 2)).astype(np.float16)
    poses = torch.full((6, 16, 12), 0.5)
    generator = torch.Generator().manual_seed(0)
    seen, _ = augment_flow(torch.from_numpy(clips), poses, 112, generator, smallest_crop=1.0)
    windows = flow_windows(clips)
    mirrored = windows.flip(4) * torch.tensor([-1.0, 1.0]).reshape(2, 1, 1, 1)
    alike = [torch.allclose(a, b, atol=1e-3) for a, b in zip(seen, windows, strict=True)]
    turned = [torch.allclose(a, b, atol=1e-3) for a, b in zip(seen, mirrored, strict=True)]
    assert all(a != b for a, b in zip(alike, turned, strict=True))
    assert any(alike)
    assert any(turned)


@pytest.mark.parametrize("modality", ["rgb", "flow"])
def test_every_loss_term_reaches_the_stem(modality):
    torch.manual_seed(0)
    settings = replace(TINY, modality=modality)
    model = Pretrainer(settings)
    frames = torch.rand(2, model.network.in_channels, 16, 32, 32)
    labels = torch.tensor([[1, 2], [3, 4]])
    # The logits begin at zero, which lets nothing through until their first step.
    torch.nn.init.normal_(model.network.logits.conv3d.weight)
    for name in ("action", "object", "place", "motion"):
        model.zero_grad()
        terms = losses(model, frames, torch.rand(2, 16, 12), labels, settings)
        terms[name].backward()
        gradient = model.network.Conv3d_1a_7x7.conv3d.weight.grad
        assert gradient is not None
        assert gradient.abs().sum() > 0, name


def tiny_run(seed: int) -> Run:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Conv3d(2, 4, 3), torch.nn.BatchNorm3d(4), torch.nn.Dropout(0.5), torch.nn.Flatten()
    ).to(memory_format=torch.channels_last_3d)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=8)
    return Run(model, optimizer, schedule, torch.Generator().manual_seed(seed))


def steps(run: Run, count: int) -> None:
    for _ in range(count):
        clip = torch.rand(3, 2, 4, 5, 5, generator=run.generator)
        run.optimizer.zero_grad()
        run.model(clip).square().mean().backward()
        run.optimizer.step()
        run.schedule.step()


def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(tmp_path):
    whole = tiny_run(0)
    steps(whole, 8)
    killed = tiny_run(0)
    steps(killed, 5)
    killed.save(tmp_path / "state", {"stages": ((64, 1, 0.5),)}, 5)
    resumed = tiny_run(1)
    assert resumed.load(tmp_path / "none", {}) == 0
    assert resumed.load(tmp_path / "state", {"stages": ((64, 1, 0.5),)}) == 5
    steps(resumed, 3)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_a_state_of_other_settings_or_a_damaged_one_is_refused(tmp_path):
    run = tiny_run(0)
    steps(run, 1)
    run.save(tmp_path / "state", {"seed": 0, "clips": 5}, 1)
    with pytest.raises(MmdistError, match="differs in seed;"):
        run.load(tmp_path / "state", {"seed": 1, "clips": 5})
    (tmp_path / "state").write_bytes((tmp_path / "state").read_bytes()[:100])
    with pytest.raises(MmdistError, match="damaged"):
        run.load(tmp_path / "state", {"seed": 0, "clips": 5})


@pytest.mark.slow
def test_a_second_cycle_continues_the_first_and_resumes_to_the_bit(tmp_path):
    def run(name: str, cycles: int, progress: clipset.Progress) -> dict[str, torch.Tensor]:
        settings = replace(TINY, cycles=cycles)
        cache = tmp_path / "clips"
        pretrain(tmp_path / name, settings, cache=cache, workers=2, progress=progress)
        return load_file(tmp_path / name / "state.safetensors")

    def quiet(line: str) -> None:
        pass

    def until(epoch: int) -> clipset.Progress:
        def progress(line: str) -> None:
            if line.startswith(f"epoch {epoch} "):
                raise KeyboardInterrupt

        return progress

    once, twice = run("once", 1, quiet), run("twice", 2, quiet)
    assert any(not torch.equal(once[k], twice[k]) for k in once if k.startswith("model."))
    for epoch in (2, 3):  # at the end of the first cycle, and within the second
        with pytest.raises(KeyboardInterrupt):
            run("killed", 2, until(epoch))
        state = load_file(tmp_path / "killed" / "state.safetensors")
        if epoch == 2:
            assert all(torch.equal(once[k], state[k]) for k in once)
    killed = run("killed", 2, quiet)
    assert all(torch.equal(twice[k], killed[k]) for k in twice)


@pytest.mark.slow
@pytest.mark.parametrize("modality", ["rgb", "flow"])
def test_a_tiny_pretraining_gives_an_extractor(tmp_path, modality):
    said: list[str] = []
    out = tmp_path / "net"

    def killed_after_the_first_epoch(line: str) -> None:
        if line.startswith("epoch 1"):
            raise KeyboardInterrupt

    def run(out: Path, progress: clipset.Progress) -> dict[str, object]:
        settings = replace(TINY, modality=modality)
        return pretrain(out, settings, cache=tmp_path / "clips", workers=2, progress=progress)

    with pytest.raises(KeyboardInterrupt):
        run(out, killed_after_the_first_epoch)
    assert not (out / "config.json").exists()
    figures = run(out, said.append)
    assert said[0] == "resuming after epoch 1 of 2"
    config = json.loads((out / "config.json").read_text())
    accuracy = figures["validation_action_accuracy"]
    assert config["pretraining"]["validation_action_accuracy"] == accuracy
    assert len(config["classes"]) == len(ACTION_NAMES) + len(OBJECT_NAMES)
    card = (out / "README.md").read_text()
    assert str(accuracy) in card
    assert f"# world{WORLD_VERSION}-{modality}\n" in card
    assert ("TV-L1" in card) == (modality == "flow")
    spec = describe(str(out))
    assert spec.modality == modality
    assert "synthetic world" in spec.trained_on
    network = SnippetNetwork(spec, device="cpu", precision="fp32")
    stream = network.input_stream()
    video = np.random.default_rng(0).integers(0, 256, (16, 96, 128, 3), dtype=np.uint8)
    pieces = [*stream.push(torch.from_numpy(video)), *stream.finish()]
    rows = network.rows(torch.cat(pieces)[None])
    assert rows.shape == (1, 128)
    assert np.isfinite(rows).all()
