"""The person as a body in a room: standing, sitting, bending, carrying, stepping.

What every action needs and none of them decides: `acts.py` says where the hands go.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import cos, hypot, sin

from world.figure import GROUND, Body, Pose, shoulder_of
from world.furniture import BOX_FOOT, BROOM_HOME, SEAT_FOOT, SEAT_HEIGHT
from world.pen import Point, lerp
from world.rooms import TABLE_TOP, Room
from world.story import State

GRIP = {  # from a thing's foot to where the hand holds it
    "cup": (0.0, -4.0),
    "book": (0.0, -2.0),
    "phone": (0.0, -2.5),
    "sandwich": (1.0, -2.0),
    "bag": (0.0, -16.0),
    "box": (0.0, -11.0),
}


@dataclass(frozen=True)
class Scene:
    """How things are before an action: the story's state, places, and where the person stands."""

    state: State
    at: dict[str, float]
    x: float
    facing: int


@dataclass
class Moment:
    """Everything that is drawn of one instant. carried: (thing, foot or grip, angle, phase)."""

    pose: Pose
    at: dict[str, float]
    opened: dict[str, float]
    lit: dict[str, float]
    absent: set[str] = field(default_factory=set)
    carried: list[tuple[str, Point, float, float]] = field(default_factory=list)
    loose_hat: tuple[Point, float] | None = None


def share(u: float, start: float, end: float) -> float:
    """Return how far u has come from start to end, 0 to 1, gently at both ends."""
    t = min(max((u - start) / max(end - start, 1e-9), 0.0), 1.0)
    return t * t * (3.0 - 2.0 * t)


def steady(u: float, start: float, end: float) -> float:
    """Return the same at a nearly even pace, for motions to be seen all along."""
    t = min(max((u - start) / max(end - start, 1e-9), 0.0), 1.0)
    return 0.75 * t + 0.25 * t * t * (3.0 - 2.0 * t)


class Mover:
    """One person in one room, as a body."""

    def __init__(self, room: Room, body: Body) -> None:
        self.room = room
        self.body = body

    def _free(self, scene: Scene) -> str:
        return "near" if scene.state.held is None else "far"

    def _home(self, thing: str, scene: Scene) -> Point:
        if thing == "broom":
            return (scene.at[thing], BROOM_HOME)
        return (scene.at[thing], BOX_FOOT if thing in ("bag", "box") else TABLE_TOP)

    def _seat(self, thing: str, scene: Scene) -> Point:
        way = self.room.side[thing]
        back = 3.5 if thing == "chair" else 6.0
        return (scene.at[thing] - way * back, SEAT_FOOT - SEAT_HEIGHT[thing] - 4.5)

    def _hip(self, scene: Scene, x: float) -> tuple[Point, float]:
        seat = scene.state.seat
        if seat is not None:
            return self._seat(seat, scene), -0.12
        return (x, GROUND - 2.0 - self.body.hip_height), 0.03

    def _carry(self, thing: str, hip: Point, lean: float, facing: int) -> Point:
        """Return where the hand is that carries a thing about."""
        shoulder = shoulder_of(self.body, hip, lean, facing)
        forward, down = {
            "box": (13.0, 19.0),
            "bag": (5.0, 21.0),
            "broom": (10.0, 15.0),
            "book": (12.0, 10.0),
        }.get(thing, (12.5, 7.0))
        return (shoulder[0] + facing * forward, shoulder[1] + down)

    def _moment(
        self,
        scene: Scene,
        hip: Point,
        lean: float,
        facing: int,
        hands: dict[str, tuple[Point, float]],
        seconds: float,
        *,
        x: float,
        walk: float = 0.0,
        nod: float = 0.0,
        planted: bool = False,
    ) -> Moment:
        """Complete an instant: bend to what is far, hang idle arms, step, and carry along.

        hands: where a hand goes and how much of the way there it has come.
        """
        state, size = scene.state, self.body.size
        seated = state.seat is not None
        upright = shoulder_of(self.body, hip, lean, facing)
        stride = sin(walk / 7.5) if walk else 0.0
        targets: dict[str, Point] = {}
        for hand, phase in (("near", 1.0), ("far", -1.0)):
            swing = phase * stride * 6.0
            rest = (upright[0] + facing * 2.0 + swing, upright[1] + 23.5 * size - abs(swing) * 0.3)
            if seated:
                rest = (hip[0] + facing * 11.0, hip[1] - 5.0)
            if state.held is not None and (hand == "near" or state.held == "box"):
                rest = self._carry(state.held, hip, lean, facing)
            goal, come = hands.get(hand, (rest, 0.0))
            targets[hand] = lerp(rest, goal, come)
        bend = 0.0
        if not planted:
            for target in targets.values():
                bend = max(bend, self._bend(hip, lean, facing, target, seated))
        bent_hip, bent_lean = self._bent(hip, lean, facing, bend, seated)
        carried = []
        if state.held is not None:
            foot = targets["near"]
            if state.held != "broom":
                grip = GRIP[state.held]
                foot = (foot[0] - grip[0], foot[1] - grip[1])
            carried.append((state.held, foot, 0.05 * facing if state.held == "broom" else 0.0, 0.0))
        near_foot, far_foot = self._feet(scene, x, facing, walk, seated, planted)
        pose = Pose(
            hip=(bent_hip[0], bent_hip[1] - 0.8 * abs(stride)),
            lean=bent_lean,
            facing=facing,
            near_hand=targets["near"],
            far_hand=targets["far"],
            near_foot=near_foot,
            far_foot=far_foot,
            nod=nod,
            hat=0.0 if state.wears_hat else None,
        )
        return Moment(
            pose=pose,
            at=dict(scene.at),
            opened={t: float(t in state.opened) for t in scene.at},
            lit={t: float(t in state.lit) for t in scene.at},
            absent={state.held} if state.held else set(),
            carried=carried,
            loose_hat=((scene.at["hat"], 52.0), 0.0)
            if "hat" in scene.at and not state.wears_hat
            else None,
        )

    def _feet(
        self, scene: Scene, x: float, facing: int, walk: float, seated: bool, planted: bool
    ) -> tuple[Point, Point]:
        floor = GROUND - 2.0
        if seated and scene.state.seat is not None:
            x = scene.at[scene.state.seat] + self.room.side[scene.state.seat] * 13.0
            return (x, floor), (x + facing * 2.0, floor)
        if planted or not walk:
            return (x - facing * 2.5, floor), (x + facing * 3.0, floor)
        step, lift = 8.5 * sin(walk / 7.5), 3.0 * cos(walk / 7.5)
        return (
            (x - step * facing, floor - max(0.0, -lift)),
            (x + step * facing, floor - max(0.0, lift)),
        )

    def _bent(
        self, hip: Point, lean: float, facing: int, bend: float, seated: bool
    ) -> tuple[Point, float]:
        if seated:
            return hip, lean + 0.9 * bend
        return (hip[0] - facing * 4.0 * bend, hip[1] + 15.0 * bend), lean + 1.1 * bend

    def _bend(self, hip: Point, lean: float, facing: int, target: Point, seated: bool) -> float:
        """Return the least bending, 0 to 1, that brings `target` within an arm's reach."""
        low, high = 0.0, 1.0
        reach = self.body.arm * 0.97
        for step in range(8):
            middle = 0.0 if step == 0 else (low + high) / 2
            bent_hip, bent_lean = self._bent(hip, lean, facing, middle, seated)
            shoulder = shoulder_of(self.body, bent_hip, bent_lean, facing)
            near = hypot(target[0] - shoulder[0], target[1] - shoulder[1] - 1.3) <= reach
            if step == 0 and near:
                return 0.0
            low, high = (low, middle) if near else (middle, high)
        return high
