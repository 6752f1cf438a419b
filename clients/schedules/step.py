"""Step decay: the rate is multiplied by ``factor`` after every ``every`` steps or rounds of the horizon."""

from __future__ import annotations

from fedcl.contracts.optimizer import RateSchedule


class Step(RateSchedule):
    """share(t) = factor^floor(t / every)."""

    def __init__(self, *, every: int = 10, factor: float = 0.1) -> None:
        self.every, self.factor = every, factor

    def share(self, at: int, of: int) -> float:
        return float(self.factor ** (at // self.every))
