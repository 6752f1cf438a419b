"""How fast, how well connected and how often there each simulated device is, in virtual seconds.

A profile depends on the seed and the client alone, and so does every draw here: neither who else takes part nor when
anything is computed changes it. (The one exception is said at :class:`Tiers`.) Nothing measures time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import accumulate
from statistics import NormalDist
from typing import Any

from fedcl.base import randomness
from fedcl.simulation.profile import DeviceProfile, uniform
from fedcl.simulation.trace import Trace

__all__ = ["DeviceProfile", "Homogeneous", "Ideal", "LogNormal", "Tiers", "Trace"]


class Ideal:
    """Nothing takes any time, and every device is always available."""

    def __init__(self, *, clients: Sequence[str], seed: int) -> None:
        del clients, seed

    def profile(self, client: str) -> DeviceProfile:
        """Return the ideal profile."""
        return DeviceProfile()


class Homogeneous:
    """The same device for everyone.

    Parameters
    ----------
    clients, seed
        The run's clients and seed.
    step_seconds, speed, down, up, latency, period, duty, dropout
        As in :class:`DeviceProfile`; ``down`` and ``up`` None: infinitely fast.
    phase
        None: uniform in [0, period), drawn for each client, so that devices do not all leave at once.
    """

    def __init__(
        self,
        *,
        clients: Sequence[str],
        seed: int,
        step_seconds: float = 0.01,
        speed: float = 1.0,
        down: float | None = 1e6,
        up: float | None = 1e6,
        latency: float = 0.0,
        period: float | None = None,
        duty: float = 1.0,
        phase: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        del clients
        self._seed = seed
        self._phase = phase
        self._common = DeviceProfile(
            step_seconds, speed, _rate(down), _rate(up), latency, period, duty, phase or 0.0, dropout
        )

    def profile(self, client: str) -> DeviceProfile:
        """Return the common profile in the client's phase."""
        return _in_phase(self._common, self._phase, self._seed, client)


class LogNormal:
    """Speeds exp(sigma z) and bandwidths median * exp(bandwidth_sigma z'), z and z' standard normal for each client.

    A client's two bandwidths share one z': who is slow to receive is slow to send.

    Parameters
    ----------
    sigma, bandwidth_sigma
        Standard deviations of the logarithms, in [0, 10]; 0 makes every client the median one.
    down, up
        Medians in bytes per second; None: infinitely fast. The median speed is 1.
    clients, seed, step_seconds, latency, period, duty, phase, dropout
        As in :class:`Homogeneous`.
    """

    def __init__(
        self,
        *,
        clients: Sequence[str],
        seed: int,
        sigma: float = 0.5,
        bandwidth_sigma: float = 0.5,
        step_seconds: float = 0.01,
        down: float | None = 1e6,
        up: float | None = 1e6,
        latency: float = 0.0,
        period: float | None = None,
        duty: float = 1.0,
        phase: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        del clients
        self._seed = seed
        self._sigmas = (sigma, bandwidth_sigma)
        self._phase = phase
        self._median = DeviceProfile(
            step_seconds, 1.0, _rate(down), _rate(up), latency, period, duty, phase or 0.0, dropout
        )

    def profile(self, client: str) -> DeviceProfile:
        """Return the median profile times the client's two factors."""
        speed, bandwidth = (
            math.exp(sigma * NormalDist().inv_cdf(uniform(self._seed, client, purpose)))
            for sigma, purpose in zip(self._sigmas, ("devices.speed", "devices.bandwidth"), strict=True)
        )
        median = self._median
        own = replace(median, speed=speed, down=median.down * bandwidth, up=median.up * bandwidth)
        return _in_phase(own, self._phase, self._seed, client)


class Tiers:
    """A few kinds of devices, each with its share of the clients.

    Parameters
    ----------
    tiers
        One mapping a tier: ``share`` and any attribute of :class:`DeviceProfile`; an absent one is as in
        :class:`Homogeneous`. Shares sum to 1.
    exact
        True: the counts are the shares times the number of clients, rounded by largest remainder (ties: the earlier
        tier), and clients are assigned to the tiers in the order of their hash; so a client's tier depends on who the
        run's clients are. False: its tier depends on its own hash alone, and the shares hold only on average.
    clients, seed
        The run's clients and seed.
    """

    def __init__(
        self, *, clients: Sequence[str], seed: int, tiers: Sequence[Mapping[str, Any]], exact: bool = True
    ) -> None:
        shares = [Fraction(str(tier["share"])) for tier in tiers]  # the decimal numbers that were written
        if abs(float(sum(shares)) - 1) > 1e-6:
            raise ValueError(f"devices.tiers: the shares sum to {float(sum(shares)):g}: must be 1")
        self._seed = seed
        kinds = [{name: value for name, value in tier.items() if name != "share"} for tier in tiers]
        self._kinds = [Homogeneous(clients=clients, seed=seed, **kind) for kind in kinds]
        self._bounds = [float(bound / sum(shares)) for bound in accumulate(shares)]
        self._assigned = _assign(clients, shares, seed) if exact else None

    def profile(self, client: str) -> DeviceProfile:
        """Return the profile of the client's tier; with ``exact``, KeyError for who is none of the run's clients."""
        if self._assigned is not None:
            return self._kinds[self._assigned[client]].profile(client)
        draw = uniform(self._seed, client, "devices.tier")
        return self._kinds[next(i for i, bound in enumerate(self._bounds) if draw < bound)].profile(client)


def _assign(clients: Sequence[str], shares: Sequence[Fraction], seed: int) -> dict[str, int]:
    """Return client -> tier, the tiers filled one after another in the order of the clients' hashes."""
    quotas = [share / sum(shares) * len(clients) for share in shares]
    counts = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(shares)), key=lambda i: (counts[i] - quotas[i], i))
    for i in by_remainder[: len(clients) - sum(counts)]:
        counts[i] += 1
    order = sorted(clients, key=lambda client: (randomness.key(seed, client, "devices.tier"), client))
    tiers = [i for i, count in enumerate(counts) for _ in range(count)]
    return dict(zip(order, tiers, strict=True))


def _rate(bytes_per_second: float | None) -> float:
    return math.inf if bytes_per_second is None else bytes_per_second


def _in_phase(profile: DeviceProfile, phase: float | None, seed: int, client: str) -> DeviceProfile:
    if profile.period is None or phase is not None:
        return profile
    return replace(profile, phase=profile.period * uniform(seed, client, "devices.phase"))
