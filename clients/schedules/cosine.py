"""Cosine decay from the whole rate towards ``end`` times it, which is reached when the horizon is over.

Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", ICLR 2017, equation (5): with horizon
``task`` every task is a restart.
"""

from __future__ import annotations

import math

from fedcl.contracts.optimizer import RateSchedule


class Cosine(RateSchedule):
    """share(t) = end + (1 - end) (1 + cos(pi t / T)) / 2, for t = 0 ... T - 1."""

    def __init__(self, *, end: float = 0.0) -> None:
        self.end = end

    def share(self, at: int, of: int) -> float:
        return self.end + (1.0 - self.end) * (1.0 + math.cos(math.pi * at / of)) / 2
