"""Frames, snippets and files of the synthetic world."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from math import hypot
from pathlib import Path

import numpy as np
import pytest

from mmdist_e2e.extractors.video.reader import Decoder
from mmdist_e2e.grounding.data.annotations import load_annotations
from mmdist_e2e.structures import MmdistError
from world import make
from world.acts import Actor
from world.clips import ACTION_NAMES, OBJECT_NAMES, sample_clip, sample_clip_script
from world.contact import contact_sheet
from world.figure import middle_joint, sample_body
from world.render import Film, render_frames
from world.rooms import sample_room
from world.stage import Scene
from world.story import ACTIONS, COMBINATIONS, OPPOSITES, after, state_for
from world.world import HEIGHT, WIDTH, WORLD_VERSION, sample_script


def scene_for(action: str, thing: str | None, seed: int) -> tuple[Actor, Scene]:
    rng = np.random.default_rng(seed)
    contents = tuple(sorted({thing or "door", "table", "chair", "cup", "hat", "box"}))
    room = sample_room(rng, contents)
    actor = Actor(room, sample_body(rng))
    scene = Scene(state_for(action, thing, rng, contents), dict(room.at), 70.0, 1)
    x, facing = actor.stand(action, thing, scene)
    return actor, replace(scene, x=x, facing=facing)


def test_the_same_script_gives_the_same_frames_in_any_order() -> None:
    script = sample_script(3, 8)
    some = list(islice(render_frames(script), 30))
    again = Film(script)
    assert all((again.frame(i) == some[i]).all() for i in (29, 0, 17))
    other = next(render_frames(sample_script(4, 8)))
    assert np.abs(other.astype(int) - some[0]).mean() > 5
    assert some[0].shape == (HEIGHT, WIDTH, 3)
    assert some[0].dtype == np.uint8


def test_neither_person_nor_camera_jumps() -> None:
    for index in range(10):
        film = Film(sample_script(1, index))
        hips = [film._moment_at(i / 12).pose.hip for i in range(film.script.frames)]
        assert np.abs(np.diff(np.array(hips), axis=0)).max() < 10.0, film.script.id
        assert np.abs(np.diff(film._camera_x)).max() < 6.0


def test_a_sensor_is_never_quiet_and_light_is_neither_out_nor_blinding() -> None:
    for index in range(6):
        film = Film(sample_script(1, index))
        one, two = film.frame(0).astype(int), film.frame(1).astype(int)
        assert np.abs(two - one).mean() > 0.2
        assert 40 < one.mean() < 225


@pytest.mark.parametrize("action", ACTIONS)
def test_actions_begin_and_end_as_their_scenes_say(action: str) -> None:
    """What is open, lit, held and where everything stands agrees with the story's state."""
    for thing in COMBINATIONS[action]:
        actor, scene = scene_for(action, thing, 11)
        then = actor.done(action, thing, scene, after(action, thing, scene.state))
        for u, at in ((0.0, scene), (1.0, then)):
            shown = actor.perform(action, thing, at if u == 0.0 else scene, u, 5.0 * u)
            rest = actor.idle(at, 0.0, x=at.x, facing=at.facing, walk=0.0)
            assert shown.at == pytest.approx(rest.at), (action, thing, u)
            assert shown.opened == rest.opened
            assert shown.lit == rest.lit
            held = {t: place for t, place, *_ in rest.carried}
            for t, place, *_ in shown.carried:
                if t in held:
                    assert hypot(place[0] - held[t][0], place[1] - held[t][1]) < 3.0
            hips = shown.pose.hip, rest.pose.hip
            assert hypot(hips[0][0] - hips[1][0], hips[0][1] - hips[1][1]) < 3.0


@pytest.mark.parametrize("action", ACTIONS)
def test_actions_move_smoothly_and_throughout(action: str) -> None:
    for thing in COMBINATIONS[action]:
        actor, scene = scene_for(action, thing, 12)
        seconds, fps = 5.0, 12
        shown = [
            actor.perform(action, thing, scene, i / (seconds * fps), i / fps)
            for i in range(int(seconds * fps) + 1)
        ]
        points = np.array(
            [
                (
                    *m.pose.hip,
                    *m.pose.near_hand,
                    *m.pose.far_hand,
                    *m.opened.values(),
                    *m.lit.values(),
                )
                for m in shown
            ]
        )
        steps = np.abs(np.diff(points, axis=0))
        assert steps.max() < 13.0, (action, thing)
        middle = steps[int(0.25 * len(steps)) : int(0.85 * len(steps))].sum(axis=1)
        window = np.convolve(middle, np.ones(16), mode="valid")
        assert window.min() > 0.15, "1.3 seconds within it show that something happens"


def test_opposites_are_each_other_backwards() -> None:
    for action, opposite in OPPOSITES:
        if action == "pushes":
            continue
        for thing in COMBINATIONS[action]:
            actor, scene = scene_for(action, thing, 13)
            then = actor.done(action, thing, scene, after(action, thing, scene.state))
            for u in (0.1, 0.4, 0.8):
                there = actor.perform(action, thing, scene, u, 1.0)
                back = actor.perform(opposite, thing, then, 1.0 - u, 1.0)
                assert there.opened == pytest.approx(back.opened), (action, thing)
                assert there.lit == pytest.approx(back.lit)
                assert there.pose.near_hand == pytest.approx(back.pose.near_hand)


def test_a_middle_joint_keeps_both_bones_lengths() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        a, b = rng.uniform(-10, 0, 2), rng.uniform(2, 10, 2)
        x, y = middle_joint((a[0], a[1]), (b[0], b[1]), 15.0, 16.0, 1)
        assert hypot(x - a[0], y - a[1]) == pytest.approx(15.0)
        assert hypot(x - b[0], y - b[1]) == pytest.approx(16.0)


def test_snippets_are_repeatable_balanced_and_show_their_action() -> None:
    frames, action, thing, poses = sample_clip(0, 3, frames=8)
    again = sample_clip(0, 3, frames=8)
    assert frames.shape == (8, HEIGHT, WIDTH, 3)
    assert (again[0] == frames).all()
    assert again[1:3] == (action, thing)
    assert (again.poses_TP == poses).all()
    assert poses.shape[0] == 8
    assert not (sample_clip(1, 3, frames=8)[0] == frames).all()
    drawn = []
    for index in range(len(ACTION_NAMES)):
        script, which = sample_clip_script(0, index)
        drawn.append(script.segments[which].action)
        assert script.segments[which].object in (None, *OBJECT_NAMES)
        assert script.look[:3] != sample_script(0, index).look[:3] or len(script.look) == 4
        assert script.look != sample_script(0, index).look
    assert sorted(drawn) == sorted(ACTION_NAMES)


@pytest.mark.slow
def test_a_world_on_disk_parses_and_is_kept(tmp_path: Path) -> None:
    done: list[float] = []
    summary = make.make_world(tmp_path, videos=9, seed=2, workers=1, progress=done.append)
    assert summary["rendered"] == 9
    assert done[-1] == 9
    scripts = [sample_script(2, i) for i in range(9)]
    for split in ("train", "val", "test"):
        path = make.annotation_path(tmp_path, split)
        read = load_annotations(path, durations=tmp_path / "durations.json")
        expected = [(s.id, *q) for s in scripts if s.split == split for q in s.queries]
        assert len(read) == len(expected)
        for line, (video, start, end, sentence) in zip(
            path.read_text().splitlines(), expected, strict=True
        ):
            assert line == f"{video} {start:.1f} {end:.1f}##{sentence}"
    world = json.loads((tmp_path / "world.json").read_text())
    assert world["world_version"] == WORLD_VERSION
    files = sorted((tmp_path / "videos").iterdir())
    assert [f.stem for f in files] == [s.id for s in scripts]
    with Decoder() as decoder:
        info = decoder.probe(files[0])
        assert (info.width, info.height, info.fps) == (WIDTH, HEIGHT, 12.0)
        assert info.frame_count == scripts[0].frames
        first = next(iter(decoder.frames(files[0], fps=None))).frames_NHWC[0].astype(int)
    assert np.abs(first - next(render_frames(scripts[0]))).mean() < 12

    # A second run renders what is missing or broken and nothing else.
    before = {f: f.stat().st_mtime_ns for f in files}
    whole = files[4].read_bytes()
    files[3].unlink()
    files[4].write_bytes(whole[: len(whole) // 2])
    assert make.make_world(tmp_path, videos=9, seed=2)["rendered"] == 2
    assert files[4].read_bytes() == whole
    kept = [f for f in files if f.stat().st_mtime_ns == before[f]]
    assert kept == [f for f in files if f not in (files[3], files[4])]


def test_worlds_do_not_depend_on_how_many_workers_made_them(tmp_path: Path) -> None:
    make.make_world(tmp_path / "one", videos=2, seed=3, workers=1)
    make.make_world(tmp_path / "two", videos=2, seed=3, workers=2)
    for file in sorted((tmp_path / "one").rglob("*.*")):
        assert (
            file.read_bytes()
            == (tmp_path / "two" / file.relative_to(tmp_path / "one")).read_bytes()
        )


def test_people_are_told_what_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(MmdistError, match="at least one video"):
        make.make_world(tmp_path, videos=0, seed=0)
    with pytest.raises(MmdistError, match="seed"):
        make.make_world(tmp_path, videos=1, seed=-1)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(MmdistError, match="cannot be made"):
        make.make_world(tmp_path / "file", videos=1, seed=0)


@pytest.mark.slow
def test_the_contact_sheet_fits_in_the_repository(tmp_path: Path) -> None:
    contact_sheet(tmp_path / "world.png", 0)
    assert (tmp_path / "world.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "world.png").stat().st_size < 1_500_000
