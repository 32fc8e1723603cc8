"""Parameters of TV-L1 and the sizes of its pyramid, the same for every backend."""

from __future__ import annotations

from dataclasses import dataclass

from mmdist_e2e.structures import MmdistError

MINIMUM_SIDE_PIXELS = 16

# OpenCV stops early when its updates become small. The native solver runs this many iterations per
# warp instead, with this primal step: on real videos the result is closer to the converged flow
# (docs/flow.md). Other numbers give other features, so the provenance of flow holds them.
NATIVE_ITERATIONS = 40
PRIMAL_STEP = 0.6
NATIVE_SOLVER = f"Chambolle-Pock, {NATIVE_ITERATIONS} iterations, primal step {PRIMAL_STEP}"


@dataclass(frozen=True)
class TVL1Settings:
    """Parameters of the solver, for intensities 0–255; the defaults of OpenCV's CUDA class.

    tau: time step, of OpenCV only. lambda_: weight of the data term. theta: coupling. scales,
    scale_step: the pyramid. warps, iterations: per scale and per warp. epsilon: OpenCV stops when
    the mean squared update of the flow is below ε², the native solver after `NATIVE_ITERATIONS`; 0
    disables both.
    """

    tau: float = 0.25
    lambda_: float = 0.15
    theta: float = 0.3
    scales: int = 5
    scale_step: float = 0.8
    warps: int = 5
    iterations: int = 300
    epsilon: float = 0.01

    def __post_init__(self) -> None:
        positive = (self.tau, self.lambda_, self.theta, self.scales, self.warps, self.iterations)
        if min(positive) <= 0 or not 0 < self.scale_step < 1 or self.epsilon < 0:
            raise MmdistError(
                f"TV-L1 needs positive settings, a scale step between 0 and 1, and an epsilon of "
                f"at least 0; got {self}."
            )

    @property
    def native_iterations(self) -> int:
        """Iterations per warp of the native solver."""
        return min(self.iterations, NATIVE_ITERATIONS) if self.epsilon > 0 else self.iterations


def pyramid(height: int, width: int, settings: TVL1Settings) -> list[tuple[int, int]]:
    """Height and width of each level, finest first; only the first may have a side below 16."""
    sizes = [(height, width)]
    while len(sizes) < settings.scales:
        height, width = round(height * settings.scale_step), round(width * settings.scale_step)
        if min(height, width) < MINIMUM_SIDE_PIXELS:
            break
        sizes.append((height, width))
    return sizes
