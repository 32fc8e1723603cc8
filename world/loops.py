"""Actions that repeat rather than change something: waving, wiping, sweeping, drinking, reading.

`u` runs from 0 to 1 over an action, `seconds` drives the repetition.
"""

from __future__ import annotations

from math import cos, pi, sin

from world.figure import GROUND, shoulder_of
from world.furniture import lying_angle
from world.pen import lerp
from world.rooms import TABLE_TOP
from world.stage import GRIP, Moment, Mover, Scene, share


class Loops(Mover):
    """The repeated actions of one person in one room."""

    def _wave(self, scene: Scene, u: float, seconds: float) -> Moment:
        hip, lean = self._hip(scene, scene.x)
        up = share(u, 0.0, 0.14) * (1.0 - share(u, 0.9, 1.0))
        shoulder = shoulder_of(self.body, hip, lean, scene.facing)
        swing = 0.75 * sin(seconds * 2 * pi * 0.9)
        reach = self.body.arm * 0.9
        angle = 0.55 + swing * 0.75
        hand = (shoulder[0] + scene.facing * sin(angle) * reach, shoulder[1] - cos(angle) * reach)
        hands = {self._free(scene): (hand, up)}
        return self._moment(scene, hip, lean, scene.facing, hands, 0.0, x=scene.x, nod=-0.2)

    def _wipe(self, scene: Scene, u: float, seconds: float) -> Moment:
        hip, lean = self._hip(scene, scene.x)
        on = share(u, 0.0, 0.14) * (1.0 - share(u, 0.9, 1.0))
        stroke = sin(seconds * 2 * pi * 0.6)
        middle = scene.at["table"] + scene.facing * 2.0
        place = (middle + 11.0 * stroke, TABLE_TOP - 1.0 + cos(seconds * 2 * pi * 1.2))
        hands = {"near": (place, on)}
        moment = self._moment(
            scene, hip, lean + 0.25 * on, scene.facing, hands, 0.0, x=scene.x, nod=0.5 * on
        )
        moment.carried.append(("cloth", moment.pose.near_hand, 0.4 * stroke, 0.0))
        return moment

    def _sweep(self, scene: Scene, u: float, seconds: float) -> Moment:
        from_floor = scene.state.held != "broom"
        hip, lean = self._hip(scene, scene.x)
        facing = scene.facing
        carry = self._carry("broom", hip, lean, facing)
        edge = 0.25 if from_floor else 0.08
        on = share(u, edge * 0.8, edge * 1.4) * (1.0 - share(u, 1 - edge * 1.2, 1 - edge * 0.7))
        stroke = sin(seconds * 2 * pi * 0.65)
        angle = -facing * (0.3 + 0.42 * stroke)
        # The bristles stay on the floor, 32 units from the grip.
        grip = (hip[0] + facing * (11.0 + 4.0 * stroke), GROUND - 32.0 * cos(angle))
        held, held_angle = carry, 0.05 * facing
        reach = 1.0
        if from_floor:
            home = self._home("broom", scene)
            out = share(u, 0.13, edge) * (1.0 - share(u, 1 - edge, 0.87))
            lying = lying_angle(self.room)
            held, held_angle = lerp(home, carry, out), lying + (held_angle - lying) * out
            reach = share(u, 0.0, 0.13) * (1.0 - share(u, 0.87, 1.0))
        place = lerp(held, grip, on)
        tilt = held_angle + (angle - held_angle) * on
        high = (place[0] + sin(tilt) * 11.0, place[1] - cos(tilt) * 11.0)
        hands = {"near": (place, reach), "far": (high, on)}
        moment = self._moment(
            scene, hip, lean + 0.3 * on, facing, hands, 0.0, x=scene.x, nod=0.5 * on,
            walk=6.0 * on * sin(seconds * 0.8),
        )  # fmt: skip
        moment.absent.add("broom")
        moment.carried = [("broom", place, tilt, 0.0)]
        return moment

    def _consume(self, action: str, thing: str, scene: Scene, u: float, seconds: float) -> Moment:
        """Drink, eat or read: take the thing from its place if it is there, put it back."""
        from_home = scene.state.held != thing
        hip, lean = self._hip(scene, scene.x)
        facing = scene.facing
        shoulder = shoulder_of(self.body, hip, lean, facing)
        head = (shoulder[0] + facing * 1.0, shoulder[1] - 9.6 * self.body.size)
        mouth = (head[0] + facing * 7.5, head[1] + 2.5)
        carry = self._carry(thing, hip, lean, facing)
        begin, end = (0.2, 0.88) if from_home else (0.06, 0.95)
        on = share(u, begin, begin + 0.07) * (1.0 - share(u, end - 0.07, end))
        nod, angle, phase = 0.0, 0.0, 0.0
        if action == "reads":
            page = (shoulder[0] + facing * 15.0, shoulder[1] + 6.0 + 0.5 * sin(seconds * 2.2))
            hand, nod = lerp(carry, page, on), 0.55 * on
            angle, phase = facing * 0.15 * on, 0.0
            if on > 0.3:
                turn = (seconds / 1.7) % 1.0
                phase = 1.0 + share(turn, 0.35, 0.95) * 0.999
        else:
            period = 2.6 if action == "drinks" else 1.7
            beat = 0.5 - 0.5 * cos(seconds * 2 * pi / period)
            up = on * share(beat, 0.05, 0.6)
            hand = lerp(carry, mouth, up)
            if action == "drinks":
                tip = on * share(beat, 0.45, 1.0)
                angle, nod = -facing * 1.15 * tip, -0.55 * tip
                hand = (hand[0], hand[1] - 2.5 * tip)
            else:
                phase = 0.9 * share(u, begin, end) * 0.75
                nod = 0.18 * on * sin(seconds * 9.0)
                angle = -facing * 0.2 * up
        grip, home = GRIP[thing], self._home(thing, scene)
        there = (home[0] + grip[0], home[1] + grip[1])
        reach = 1.0
        if from_home:
            out = share(u, 0.1, 0.2) * (1.0 - share(u, 0.88, 0.95))
            hand = lerp(there, hand, out)
            reach = share(u, 0.0, 0.1) * (1.0 - share(u, 0.95, 1.0))
        hands = {"near": (hand, reach)}
        if action == "reads":
            hands["far"] = ((hand[0] + facing * 5.0, hand[1] - 0.5), on)
        moment = self._moment(scene, hip, lean, facing, hands, 0.0, x=scene.x, nod=nod)
        moment.absent.add(thing)
        if from_home and not 0.1 <= u <= 0.95:
            foot, angle = home, 0.0
        else:
            back = (grip[0] * cos(angle) - grip[1] * sin(angle),
                    grip[0] * sin(angle) + grip[1] * cos(angle))  # fmt: skip
            foot = (hand[0] - back[0], hand[1] - back[1])
        moment.carried = [(thing, foot, angle, phase)]
        return moment
