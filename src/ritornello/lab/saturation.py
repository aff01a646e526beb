"""How a loss settles with loops: L(T) = floor + height · exp(−rate · T), fitted by least squares."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

RATES = np.geomspace(1e-2, 1e1, 121)


@dataclass(frozen=True)
class Saturation:
    """r2: the share of the variance over loops that the curve explains; 0 where nothing varies."""

    floor: float
    height: float
    rate: float  # per loop
    r2: float

    def left(self, loops: float) -> float:
        """Of what the curve has above its floor at one loop, the share still there at `loops`."""
        return math.exp(-self.rate * (loops - 1))

    @property
    def falls(self) -> bool:
        """Whether it is a curve that comes down at a rate of its own: a straight line takes the least there is."""
        return self.height > 0 and 1.1 * RATES[0] < self.rate < RATES[-1] / 1.1

    def loops_until(self, share: float) -> float:
        """Loops at which no more than `share` is left."""
        return 1 - math.log(share) / self.rate


def fit(loops: Sequence[float], losses: Sequence[float]) -> Saturation:
    """The rate by search between a hundredth and ten, floor and height by linear least squares at each."""
    rate, floor, height, r2 = _search(loops, losses, lambda x, rate: np.exp(-rate * (x - 1)))
    return Saturation(floor, height * math.exp(rate), rate, r2)


def power_r2(loops: Sequence[float], losses: Sequence[float]) -> float:
    """What a rival of as many numbers explains: floor + height · T^(−power)."""
    return _search(loops, losses, lambda x, power: x**-power)[-1]


def _search(
    loops: Sequence[float], losses: Sequence[float], decay: Callable[[np.ndarray, float], np.ndarray]
) -> tuple[float, float, float, float]:
    """Rate, floor, height, R²."""
    from scipy.optimize import minimize_scalar

    x, y = np.asarray(loops, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    assert len(x) == len(y) > 3, "three numbers are fitted"

    def solve(rate: float) -> tuple[float, float, float]:
        design = np.stack([np.ones_like(x), decay(x, rate)], axis=1)
        (floor, height), *_ = np.linalg.lstsq(design, y, rcond=None)
        return float(((design @ (floor, height) - y) ** 2).sum()), float(floor), float(height)

    best = int(np.argmin([solve(rate)[0] for rate in RATES]))
    around = math.log(RATES[max(best - 1, 0)]), math.log(RATES[min(best + 1, len(RATES) - 1)])
    found = minimize_scalar(lambda log_rate: solve(math.exp(log_rate))[0], bounds=around, method="bounded")
    rate = math.exp(float(found.x))
    squares, floor, height = solve(rate)
    spread = float(((y - y.mean()) ** 2).sum())
    return rate, floor, height, 1 - squares / spread if spread > 0 else 0.0
