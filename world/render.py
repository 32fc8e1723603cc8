"""Scripts to frames: the stage plays a script, the camera films it.

`render_frames(script)` yields every frame; `Film` renders any frame alone, which is what
snippets and contact sheets need. Shapes: H W C, RGB uint8.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from world.acts import Actor
from world.figure import draw_hat, draw_person, head_of, sample_body
from world.furniture import draw_before, draw_behind, draw_broom, draw_carried
from world.pen import FINENESS, ROOM_HEIGHT, Pen, framed, turned
from world.rooms import grain, paint_background, sample_room
from world.stage import Moment, Scene
from world.story import ROOM_WIDTH, after
from world.unrest import Unrest
from world.world import HEIGHT, IDLE, WIDTH, Script, Segment

Frame_HWC = NDArray[np.uint8]

_PACE = 46.0  # units a second when walking at leisure
_NOISES = 8


@dataclass(frozen=True)
class _Beat:
    """A segment with the scene it begins in; idle ones walk from the scene's x to `goal`."""

    segment: Segment
    scene: Scene
    goal: float
    facing: int
    walk_start: float
    walk_end: float


class Film:
    """One script's frames, in any order; equal scripts give equal frames."""

    def __init__(self, script: Script, *, noise: bool = True) -> None:
        rng = np.random.default_rng(np.random.SeedSequence(script.look))
        self.script = script
        self._room = sample_room(rng, script.contents)
        self._body = sample_body(rng)
        self._actor = Actor(self._room, self._body)
        apart = np.random.default_rng(np.random.SeedSequence((*script.look, 3)))
        self._unrest = Unrest(apart, script.duration_seconds)
        self._mirrored = bool(rng.random() < 0.5)
        self._beats = self._plan(rng)
        self._scale = FINENESS * WIDTH / ROOM_WIDTH
        self._background = self._paint(rng)
        self._canvas = np.empty_like(self._background)
        self._pen = Pen(self._canvas, self._scale)
        self._set_light(rng)
        self._set_camera(rng)
        if not noise:
            self._noise *= 0.0

    def __iter__(self) -> Iterator[Frame_HWC]:
        return (self.frame(i) for i in range(self.script.frames))

    def frame(self, index: int) -> Frame_HWC:
        """Render frame `index`: [H, W, 3] uint8 RGB."""
        seconds = index / self.script.fps
        moment = self._moment_at(seconds)
        np.copyto(self._canvas, self._background)
        self._draw(moment, seconds)
        return self._expose(index, moment)

    def pose(self, index: int) -> NDArray[np.float32]:
        """Where the person's joints and the thing in use are in frame `index`.

        Returns hip, head, near hand, far hand and what is carried (the near hand if nothing is)
        as x, y in shares of the picture's width and height, from its top left; then how far
        anything is open, and lit: [12].
        """
        moment = self._moment_at(index / self.script.fps)
        pose = moment.pose
        thing = moment.carried[0][1] if moment.carried else pose.near_hand
        joints = (pose.hip, head_of(self._body, pose), pose.near_hand, pose.far_hand, thing)
        middle, zoom = (self._camera_x[index], self._camera_y[index]), self._zoom[index]
        values = []
        for x, y in joints:
            across = (x - middle[0]) * zoom / ROOM_WIDTH + 0.5
            values += [1.0 - across if self._mirrored else across]
            values += [(y - middle[1]) * zoom / ROOM_HEIGHT + 0.5]
        levels = (sum(moment.opened.values()), sum(moment.lit.values()))
        return np.array([*values, *levels], dtype=np.float32)

    def _plan(self, rng: np.random.Generator) -> list[_Beat]:
        """Say where the person is: each idle segment ends where the next action begins."""
        script, actor = self.script, self._actor
        at = dict(self._room.at)
        segments = script.segments
        facing = int(rng.choice([-1, 1]))
        x = float(rng.uniform(30, ROOM_WIDTH - 30))
        if script.initial.seat is not None:
            facing = self._room.side[script.initial.seat]
            x = at[script.initial.seat] + facing * 11.0
        scene = Scene(state=script.initial, at=at, x=x, facing=facing)
        first = next(segment for segment in segments if segment.action != IDLE)
        if script.initial.seat is None:
            # No further away than there is time to walk; at times from outside the picture.
            x, toward = actor.stand(first.action, first.object, scene)
            far = _PACE * 0.8 * first.start
            if far > 0.0:
                low, high = max(-18.0, x - far), min(ROOM_WIDTH + 18.0, x + far)
                x, toward = float(rng.uniform(low, high)), facing
            scene = Scene(state=scene.state, at=at, x=x, facing=toward)
        beats = []
        for i, segment in enumerate(segments):
            if segment.action != IDLE:
                beats.append(_Beat(segment, scene, scene.x, scene.facing, 0.0, 0.0))
                state = after(segment.action, segment.object, scene.state)
                scene = actor.done(segment.action, segment.object, scene, state)
                continue
            goal, facing = scene.x, scene.facing
            if i + 1 < len(segments):
                goal, facing = actor.stand(segments[i + 1].action, segments[i + 1].object, scene)
            elif scene.state.seat is None and rng.random() < 0.5:
                far = _PACE * 0.8 * (segment.end - segment.start)
                low, high = max(20.0, scene.x - far), min(ROOM_WIDTH - 20.0, scene.x + far)
                goal = float(rng.uniform(min(low, scene.x), max(high, scene.x)))
                facing = 1 if goal > scene.x else -1
            gap = segment.end - segment.start
            needed = min(gap, abs(goal - scene.x) / (_PACE * float(rng.uniform(0.85, 1.2))))
            start = segment.start + float(rng.uniform(0.3, 1.0)) * (gap - needed)
            beats.append(_Beat(segment, scene, goal, facing, start, start + needed))
            scene = Scene(state=scene.state, at=scene.at, x=goal, facing=facing)
        return beats

    def _moment_at(self, seconds: float) -> Moment:
        beat = self._beats[-1]
        for candidate in self._beats:
            if seconds < candidate.segment.end:
                beat = candidate
                break
        segment, scene = beat.segment, beat.scene
        since = seconds - segment.start
        if segment.action != IDLE:
            u = min(1.0, since / max(segment.end - segment.start, 1e-6))
            clock = self._unrest.clock(since)
            return self._actor.perform(segment.action, segment.object, scene, u, clock)
        distance = beat.goal - scene.x
        length = max(beat.walk_end - beat.walk_start, 1e-6)
        gone = min(max((seconds - beat.walk_start) / length, 0.0), 1.0)
        walking = 0.0 < gone < 1.0 and abs(distance) > 0.5
        facing = scene.facing if gone <= 0.0 else beat.facing
        if walking:
            facing = 1 if distance > 0 else -1
        return self._actor.idle(
            scene,
            seconds,
            x=scene.x + distance * gone,
            facing=facing,
            walk=abs(distance) * gone if walking else 0.0,
            gesture=None if walking else self._unrest.gesture(seconds),
        )

    def _paint(self, rng: np.random.Generator) -> NDArray[np.uint8]:
        shape = (FINENESS * HEIGHT, FINENESS * WIDTH, 3)
        canvas = np.zeros(shape, np.uint8)
        paint_background(Pen(canvas, self._scale), self._room, rng)
        textured = canvas * grain(rng, shape, float(rng.uniform(0.0, 0.06)))
        return np.asarray(np.clip(textured, 0, 255), np.uint8)

    def _draw(self, moment: Moment, seconds: float) -> None:
        pen, room = self._pen, self._room
        absent = frozenset(moment.absent)
        self._unrest.draw_behind(pen, seconds)
        draw_behind(pen, room, moment.at, moment.opened, moment.lit, absent, seconds)
        hook = moment.loose_hat
        if hook is not None:
            draw_hat(pen, self._body, hook[0], hook[1], moment.pose.facing)
        draw_person(pen, self._body, moment.pose)
        draw_before(pen, room, moment.at, moment.opened, absent)
        for thing, place, angle, phase in moment.carried:
            if thing == "broom":
                draw_broom(pen, room, place, angle)
            elif thing == "cloth":
                cloth = ((-6.5, -1.5), (6.0, -2.5), (7.0, 2.5), (-6.0, 3.0))
                pen.polygon(turned(cloth, place, angle), room.colours["cloth"])
            else:
                draw_carried(pen, room, thing, place, angle, phase)
            pen.disc(moment.pose.near_hand, 2.4, self._body.skin)
        self._unrest.draw_before(pen, seconds)

    def _set_light(self, rng: np.random.Generator) -> None:
        y, x = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float32)
        radius = np.hypot((x - WIDTH / 2) / (WIDTH / 2), (y - HEIGHT / 2) / (HEIGHT / 2))
        vignette = 1.0 - float(rng.uniform(0.0, 0.22)) * radius**2
        slope = 1.0 + float(rng.uniform(-0.12, 0.12)) * (x / WIDTH - 0.5)
        has_lamp = "lamp" in self._room.at
        level = float(rng.uniform(0.46, 0.86) if has_lamp else rng.uniform(0.52, 1.08))
        cast = 1.0 + rng.uniform(-0.16, 0.16, 3)
        self._ambient = (level * (vignette * slope)[..., None] * cast).astype(np.float32)
        self._xs, self._ys = x, y
        self._drift = (float(rng.uniform(0.0, 0.06)), float(rng.uniform(0.1, 0.5)))
        strength = float(rng.uniform(1.0, 6.0))
        self._noise = rng.standard_normal((_NOISES, HEIGHT, WIDTH, 3), dtype=np.float32) * strength

    def _set_camera(self, rng: np.random.Generator) -> None:
        frames = self.script.frames
        track = np.array([self._moment_at(i / self.script.fps).pose.hip[0] for i in range(frames)])
        reach = round(self.script.fps * 1.6)
        padded = np.pad(track, reach, mode="edge")
        smooth = np.convolve(padded, np.hanning(2 * reach + 3)[1:-1], mode="valid")
        smooth /= np.hanning(2 * reach + 3)[1:-1].sum()
        seconds = np.arange(frames) / self.script.fps
        off_x, off_y, nearer = self._unrest.camera(seconds)
        zoom = rng.uniform(1.27, 1.45) * nearer
        follow = rng.uniform(0.85, 1.0)
        half_x, half_y = ROOM_WIDTH / 2 / zoom, ROOM_HEIGHT / 2 / zoom
        middle = ROOM_WIDTH / 2
        x = middle + follow * (smooth - middle) + rng.uniform(-5, 5) + off_x
        y = rng.uniform(61.0, 65.0) + off_y
        self._camera_x = np.clip(x, half_x + 0.5, ROOM_WIDTH - half_x - 0.5)
        self._camera_y = np.clip(y, half_y + 0.5, ROOM_HEIGHT - half_y - 0.5)
        self._zoom = zoom

    def _expose(self, index: int, moment: Moment) -> Frame_HWC:
        """Film the canvas: frame it, average it down, light it, add the sensor's noise."""
        zoom = float(self._zoom[index])
        x, y = float(self._camera_x[index]), float(self._camera_y[index])
        size = (FINENESS * WIDTH, FINENESS * HEIGHT)
        shift = np.array(
            [
                [zoom, 0.0, size[0] / 2 - zoom * x * self._scale],
                [0.0, zoom, size[1] / 2 - zoom * y * self._scale],
            ]
        )
        small = framed(self._canvas, shift, WIDTH, HEIGHT)
        swing, pace = self._drift
        seconds = index / self.script.fps
        light = self._ambient * (1.0 + swing * np.sin(seconds * pace * 6.28))
        light *= self._unrest.light(seconds, self._xs, WIDTH)[..., None]
        for thing, strength, spread in (("lamp", 0.56, 2600.0), ("television", 0.16, 900.0)):
            level = moment.lit.get(thing, 0.0)
            if level > 0.0:
                px = (moment.at[thing] - x) * zoom * WIDTH / ROOM_WIDTH + WIDTH / 2
                py = (44.0 - y) * zoom * WIDTH / ROOM_WIDTH + HEIGHT / 2
                far = (self._xs - px) ** 2 + (self._ys - py) ** 2
                glow = (level * strength * spread) / (spread + far)
                warm = (1.0, 0.93, 0.78) if thing == "lamp" else (0.85, 0.95, 1.1)
                light = light + glow[..., None] * np.array(warm, np.float32)
        lit = small * light + self._noise[(index * 5) % _NOISES]
        picture = np.clip(lit, 0, 255).astype(np.uint8)
        return np.ascontiguousarray(picture[:, ::-1]) if self._mirrored else picture


def render_frames(script: Script) -> Iterator[Frame_HWC]:
    """Yield every frame of `script`: [H, W, 3] uint8 RGB, `script.frames` of them."""
    return iter(Film(script))
