"""Linear decay from the whole rate towards ``end`` times it, which is reached when the horizon is over."""

from __future__ import annotations

from fedcl.contracts.optimizer import RateSchedule


class Linear(RateSchedule):
    """share(t) = 1 - (1 - end) t / T, for t = 0 ... T - 1."""

    def __init__(self, *, end: float = 0.0) -> None:
        self.end = end

    def share(self, at: int, of: int) -> float:
        return 1.0 - (1.0 - self.end) * at / of
