"""One simulated device: how long a local round takes, when it is available, which replies it loses. Virtual seconds."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedcl.base import randomness
from fedcl.config.value_rules import parse_rule, show

# What each number of a profile may be, in the grammar of the configuration files; null stands for no limit.
RULES = {
    "step_seconds": "number >= 0",
    "speed": "number > 0",
    "down": "number > 0 or null",
    "up": "number > 0 or null",
    "latency": "number >= 0",
    "period": "number > 0 or null",
    "duty": "number in (0, 1]",
    "phase": "number >= 0",
    "dropout": "number in [0, 1]",
}
PARSED = {name: parse_rule(rule, name) for name, rule in RULES.items()}


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """One device. The defaults are an ideal one: it takes no time, is always available, and loses no reply.

    Attributes
    ----------
    step_seconds
        Seconds of one optimizer step on the reference device, whose speed is 1.
    speed
        Relative to the reference device; bigger is faster.
    down, up
        Bytes per second to and from the device; may be infinite.
    latency
        Seconds that a local round takes besides its steps and bytes.
    period, duty, phase
        The device is there at time t while (t + phase) mod period < duty * period (seconds, fraction, seconds);
        always, if the period is None.
    dropout
        Probability that a train message gets no reply.

    Raises
    ------
    ValueError
        If a number is out of its range (:data:`RULES`).
    """

    step_seconds: float = 0.0
    speed: float = 1.0
    down: float = math.inf
    up: float = math.inf
    latency: float = 0.0
    period: float | None = None
    duty: float = 1.0
    phase: float = 0.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in RULES:
            value = getattr(self, name)
            value = None if name in ("down", "up") and value == math.inf else value
            if not PARSED[name].accepts(value):
                raise ValueError(f"devices.{name}={show(value)}: must be {PARSED[name].text}")

    def duration(self, steps: int, bytes_down: int, bytes_up: int) -> float:
        """Return the seconds of a local round: of its bytes down, its steps and its bytes up, and the latency."""
        compute = steps * self.step_seconds / self.speed
        return self.latency + bytes_down / self.down + compute + bytes_up / self.up

    def available(self, t: float) -> bool:
        """Whether the device is there at time ``t`` >= 0."""
        return self.period is None or (t + self.phase) % self.period < self.duty * self.period

    def available_from(self, t: float) -> float:
        """Return the earliest time from ``t`` >= 0 on at which :meth:`available` says yes; earliest but for rounding.

        Raises
        ------
        ValueError
            If ``t`` is so large that no float lies in the next window.
        """
        if self.period is None or self.available(t):
            return t
        start = t + (self.period - (t + self.phase) % self.period)
        if self.available(start):
            return start
        # Rounding put `start` just outside its window. Between `t`, which is outside too, and the window's middle the
        # answer changes once, so halving finds the first float that is in.
        outside, inside = t, start + self.duty * self.period / 2
        if not self.available(inside):
            raise ValueError(
                f"devices.period={self.period}: a window of {self.duty * self.period} s is too short for a clock at {t}"
            )
        while outside < (middle := outside + (inside - outside) / 2) < inside:
            if self.available(middle):
                inside = middle
            else:
                outside = middle
        return inside

    def drops(self, seed: int, client: str, local_round: int) -> bool:
        """Whether the reply of a local round is lost; one draw for each (seed, client, local round)."""
        return uniform(seed, client, local_round, "devices.dropout") < self.dropout


def uniform(*parts: object) -> float:
    """Return the number in (0, 1), neither bound ever, that belongs to ``parts``."""
    return ((randomness.key(*parts) >> 11) + 0.5) / 2**52
