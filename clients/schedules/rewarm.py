"""Re-warming: for each task the rate rises linearly, then falls along a cosine.

Ibrahim et al., "Simple and Scalable Strategies to Continually Pre-train Large Language Models", TMLR 2024, section 3.
They count steps from 0, where the rate is 0; here t counts from 1, since a round without a rate would be wasted.
"""

from __future__ import annotations

import math

from fedcl.contracts.optimizer import RateSchedule


class Rewarm(RateSchedule):
    """With t = 1 ... T and W = warmup T, rounded and at least 1.

    share(t) = t / W for t <= W, then end + (1 - end) (1 + cos(pi (t - W) / (T - W))) / 2, which ends with ``end``.
    """

    def __init__(self, *, warmup: float = 0.01, end: float = 0.1) -> None:
        self.warmup, self.end = warmup, end

    def share(self, at: int, of: int) -> float:
        t, warm = at + 1, max(1, round(self.warmup * of))
        if t <= warm:
            return t / warm
        return self.end + (1.0 - self.end) * (1.0 + math.cos(math.pi * (t - warm) / (of - warm))) / 2
