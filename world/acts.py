"""How each action is done: for any moment of it, the pose and what becomes of the things.

`u` runs from 0 to 1 over an action. The second of two opposites (closes, puts down, stands up,
turns off, takes off) is the first one backwards, so that nothing but the direction of time
tells them apart; pushing and pulling share their poses and differ in the way they go.
"""

from __future__ import annotations

from math import cos, pi, sin

from world.figure import head_of, shoulder_of
from world.furniture import BOX_FOOT, SEAT_FOOT, SEAT_HEIGHT, handle_of, lying_angle
from world.loops import Loops
from world.pen import lerp
from world.rooms import PUSH_DISTANCE
from world.stage import GRIP, Moment, Scene, share, steady
from world.story import ROOM_WIDTH, State

_REACH, _RETRACT = 0.18, 0.1  # shares of an action before and after its tell-tale part
_BACKWARDS = {
    "closes": "opens",
    "puts down": "picks up",
    "stands up": "sits down",
    "turns off": "turns on",
    "takes off": "puts on",
}


class Actor(Loops):
    """One person in one room; a pure function of scene, action and u."""

    # Where an action begins, and what it leaves behind.

    def stand(self, action: str, thing: str | None, scene: Scene) -> tuple[float, int]:
        """Return where to stand for an action and which way to face."""
        if scene.state.seat is not None:
            return scene.x, scene.facing
        in_hand = action in ("drinks", "reads", "sweeps") and scene.state.held == thing
        if thing is None or in_hand:
            return min(max(scene.x, 24.0), ROOM_WIDTH - 24.0), scene.facing
        x, way = scene.at[thing], self.room.side[thing]
        forward = _BACKWARDS.get(action, action)
        if forward == "opens":
            if thing == "laptop":
                return x + way * 17.0, -way
            opened = 1.0 if action == "closes" else 0.0
            return self._swing_x(thing, x, opened), -way
        if forward == "sits down":
            return x + way * 11.0, way
        if action in ("pushes", "pulls"):
            return self._push_stand(action, thing, scene)
        gap = {"television": 24.0, "lamp": 15.0, "hat": 10.0, "broom": 12.0}.get(thing)
        if gap is not None:
            return x + way * gap, -way
        gap = {"box": 15.0, "bag": 12.0}.get(thing, 14.0)
        side = 1 if scene.x >= x else -1
        if not 10.0 <= x + side * gap <= ROOM_WIDTH - 10.0:
            side = -side
        return x + side * gap, -side

    def done(self, action: str, thing: str | None, scene: Scene, state: State) -> Scene:
        """Return the scene after an action that led to `state`."""
        at, x, facing = dict(scene.at), scene.x, scene.facing
        if action in ("pushes", "pulls") and thing is not None:
            shift = self._push_shift(action, thing, scene)
            at[thing] += shift
            x += shift
        elif action in ("opens", "closes") and thing not in (None, "laptop"):
            assert thing is not None
            x = self._swing_x(thing, at[thing], float(action == "opens"))
        elif action in ("sits down", "stands up") and thing is not None:
            x, facing = at[thing] + self.room.side[thing] * 11.0, self.room.side[thing]
        return Scene(state=state, at=at, x=x, facing=facing)

    # What one instant looks like.

    def idle(
        self,
        scene: Scene,
        seconds: float,
        *,
        x: float,
        facing: int,
        walk: float,
        gesture: tuple[str, float] | None = None,
    ) -> Moment:
        """Standing, sitting or walking; walk is the path walked so far in units, 0 standing.

        gesture: where a free hand goes for no reason ("ahead", "head" or "down") and how far it
        has come, 0 to 1.
        """
        hip, lean = self._hip(scene, x)
        sway = 0.5 * sin(seconds * 1.7) + 0.3 * sin(seconds * 0.9 + 1.0)
        hip = (hip[0] + (sway if scene.state.seat is None else 0.2 * sway), hip[1])
        nod = 0.25 * sin(seconds * 0.8)
        hands = {}
        if gesture is not None and scene.state.held != "box":
            kind, come = gesture
            shoulder = shoulder_of(self.body, hip, lean, facing)
            forward, down = {"ahead": (20.0, 6.0), "head": (7.0, -9.0), "down": (16.0, 34.0)}[kind]
            hands[self._free(scene)] = ((shoulder[0] + facing * forward, shoulder[1] + down), come)
        return self._moment(scene, hip, lean, facing, hands, seconds, walk=walk, nod=nod, x=x)

    def perform(
        self, action: str, thing: str | None, scene: Scene, u: float, seconds: float
    ) -> Moment:
        """Return the instant `u` in [0, 1] of an action that began in `scene`.

        seconds: time since it began, for what repeats itself.
        """
        forward = _BACKWARDS.get(action)
        if forward is not None:
            assert thing is not None
            before = self._before(action, thing, scene)
            return self.perform(forward, thing, before, 1.0 - u, seconds)
        match action:
            case "opens":
                return self._open(str(thing), scene, u)
            case "picks up":
                return self._pick_up(str(thing), scene, u)
            case "sits down":
                return self._sit(str(thing), scene, u)
            case "turns on":
                return self._turn_on(str(thing), scene, u, seconds)
            case "pushes" | "pulls":
                return self._push(action, str(thing), scene, u)
            case "puts on":
                return self._put_on(scene, u, seconds)
            case "waves":
                return self._wave(scene, u, seconds)
            case "wipes":
                return self._wipe(scene, u, seconds)
            case "sweeps":
                return self._sweep(scene, u, seconds)
        return self._consume(action, str(thing), scene, u, seconds)

    def _before(self, action: str, thing: str, scene: Scene) -> Scene:
        """Return the scene from which the forward action leads to `scene`."""
        s, only = scene.state, frozenset({thing})
        state = State(
            held=None if action == "puts down" else s.held,
            seat=None if action == "stands up" else s.seat,
            opened=s.opened - only if action == "closes" else s.opened,
            lit=s.lit - only if action == "turns off" else s.lit,
            wears_hat=False if action == "takes off" else s.wears_hat,
            moved=s.moved,
        )
        x = scene.x
        if action == "closes" and thing != "laptop":
            x = self._swing_x(thing, scene.at[thing], 0.0)
        return Scene(state=state, at=scene.at, x=x, facing=scene.facing)

    def _swing_x(self, thing: str, x: float, opened: float) -> float:
        """Return where one stands while a leaf is `opened`: one follows its handle a little."""
        shut = handle_of(self.room, thing, x, 0.0)[0]
        now = handle_of(self.room, thing, x, opened)[0]
        return shut + 0.5 * (now - shut) + self.room.side[thing] * 14.0

    def _open(self, thing: str, scene: Scene, u: float) -> Moment:
        opened = steady(u, _REACH, 1.0 - _RETRACT)
        x = scene.x
        if thing != "laptop":
            x = self._swing_x(thing, scene.at[thing], opened)
        handle = handle_of(self.room, thing, scene.at[thing], opened)
        hold = share(u, 0.0, _REACH) * (1.0 - share(u, 1.0 - _RETRACT, 1.0))
        hip, lean = self._hip(scene, x)
        moment = self._moment(
            scene, hip, lean, scene.facing, {self._free(scene): (handle, hold)}, 0.0, x=x,
            walk=x - scene.x,
        )  # fmt: skip
        moment.opened[thing] = opened
        return moment

    def _pick_up(self, thing: str, scene: Scene, u: float) -> Moment:
        taken = u > 0.22
        lift = steady(u, 0.22, 0.96)
        grip = GRIP.get(thing, (0.0, 0.0))
        home = self._home(thing, scene)
        hip, lean = self._hip(scene, scene.x)
        carry = self._carry(thing, hip, lean, scene.facing)
        there = (home[0] + grip[0], home[1] + grip[1])
        hand = lerp(there, carry, lift)
        reach = share(u, 0.0, 0.22)
        hands = {"near": (hand, reach)}
        if thing == "box":
            hands["far"] = (hand, reach)
        moment = self._moment(scene, hip, lean, scene.facing, hands, 0.0, x=scene.x)
        moment.absent.add(thing)
        if thing == "broom":
            start = lying_angle(self.room)
            angle = start + (0.05 * scene.facing - start) * lift
            moment.carried.append((thing, lerp(home, carry, lift), angle, 0.0))
        else:
            foot = (hand[0] - grip[0], hand[1] - grip[1]) if taken else home
            moment.carried.append((thing, foot, 0.0, 0.0))
        return moment

    def _sit(self, thing: str, scene: Scene, u: float) -> Moment:
        down = steady(u, 0.12, 0.9)
        way = self.room.side[thing]
        stand, _ = self._hip(scene, scene.at[thing] + way * 11.0)
        seat = self._seat(thing, scene)
        back = share(down, 0.0, 0.85)
        hip = (
            stand[0] + (seat[0] - stand[0]) * back,
            stand[1] + (seat[1] - stand[1]) * down,
        )
        lean = 0.6 * sin(pi * share(u, 0.0, 0.95)) - 0.12 * down
        knee = (hip[0] + way * 10.0, hip[1] - 5.0)
        rest = share(u, 0.5, 0.9)
        hands = {h: (knee, rest) for h in ("near", "far") if not (scene.state.held and h == "near")}
        feet = scene.at[thing] + way * 13.0
        return self._moment(scene, hip, lean, way, hands, 0.0, x=feet, planted=True)

    def _turn_on(self, thing: str, scene: Scene, u: float, seconds: float) -> Moment:
        level = steady(u, _REACH, 1.0 - _RETRACT)
        x, way = scene.at[thing], self.room.side[thing]
        busy = share(u, _REACH * 0.8, _REACH) * (1.0 - share(u, 1.0 - _RETRACT, 1.0))
        tug = busy * 1.5 * (1.0 - cos(seconds * 5.0))
        knob = (x + way * 5.0, 56.0 + tug) if thing == "lamp" else (x + way * (12.5 + tug), 66.0)
        hold = share(u, 0.0, _REACH) * (1.0 - share(u, 1.0 - _RETRACT, 1.0))
        hip, lean = self._hip(scene, scene.x)
        hands = {self._free(scene): (knob, hold)}
        moment = self._moment(scene, hip, lean, scene.facing, hands, 0.0, x=scene.x)
        moment.lit[thing] = level
        return moment

    def _push_stand(self, action: str, thing: str, scene: Scene) -> tuple[float, int]:
        x = scene.at[thing]
        gap = 20.0 if thing == "chair" else 19.0
        if thing == "chair":
            side = -self.room.side[thing]  # behind its back
        else:
            side = 1 if scene.x >= x else -1
            way = side if action == "pulls" else -side
            if not 22.0 <= x + way * PUSH_DISTANCE <= ROOM_WIDTH - 22.0:
                side = -side
        return x + side * gap, -side

    def _push_shift(self, action: str, thing: str, scene: Scene) -> float:
        """Return how far the thing goes, as far as the room lets it."""
        way = scene.facing if action == "pushes" else -scene.facing
        x = scene.at[thing]
        room = (ROOM_WIDTH - 16.0 - x) if way > 0 else x - 16.0
        if action == "pulls":  # whoever pulls walks ahead of it
            room -= 14.0
        return way * float(min(PUSH_DISTANCE, max(room, 10.0)))

    def _push(self, action: str, thing: str, scene: Scene, u: float) -> Moment:
        shift = self._push_shift(action, thing, scene) * steady(u, _REACH, 1.0 - _RETRACT)
        x = scene.x + shift
        place = scene.at[thing] + shift
        if thing == "chair":
            grip = (place - scene.facing * 8.5, SEAT_FOOT - SEAT_HEIGHT["chair"] - 22.0)
        else:
            grip = (place - scene.facing * 7.0, BOX_FOOT - 17.0)
        hold = share(u, 0.0, _REACH) * (1.0 - share(u, 1.0 - _RETRACT, 1.0))
        hip, lean = self._hip(scene, x)
        effort = 0.28 * hold * (1.0 if action == "pushes" else -0.25)
        moment = self._moment(
            scene, hip, lean + effort, scene.facing, {"near": (grip, hold), "far": (grip, hold)},
            0.0, x=x, walk=shift,
        )  # fmt: skip
        moment.at[thing] = place
        return moment

    def _put_on(self, scene: Scene, u: float, seconds: float) -> Moment:
        hook = (scene.at["hat"], 52.0)
        hip, lean = self._hip(scene, scene.x)
        plain = self._moment(scene, hip, lean, scene.facing, {}, 0.0, x=scene.x).pose
        head = head_of(self.body, plain)
        crown = (head[0], head[1] - 3.6 * self.body.size)
        lift = steady(u, 0.18, 0.7)
        arch = -5.0 * sin(pi * lift)
        hat = lerp(hook, crown, lift)
        hat = (hat[0], hat[1] + arch)
        fuss = share(u, 0.68, 0.74) * (1.0 - share(u, 0.86, 0.92))
        tilt = 0.22 * fuss * sin(seconds * 6.0)
        hold = share(u, 0.0, 0.18) * (1.0 - share(u, 0.88, 1.0))
        brim = (hat[0] + scene.facing * 6.0, hat[1] + 1.0)
        help_ = share(u, 0.4, 0.62) * (1.0 - share(u, 0.88, 1.0))
        other = (hat[0] - scene.facing * 4.0, hat[1] + 1.0)
        hands = {"near": (brim, hold), "far": (other, help_)}
        moment = self._moment(scene, hip, lean, scene.facing, hands, 0.0, x=scene.x)
        moment.loose_hat = (hat, tilt)
        return moment
