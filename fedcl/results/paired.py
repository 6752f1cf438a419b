"""Whether two configurations differ, from the seeds that both were run with: a paired t test and an exact one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from fedcl.results.intervals import half_width

MAX_EXACT = 16
"""Pairs up to which all sign flips are tried: 2^15 sums take a third of a second."""


@dataclass(frozen=True)
class PairedTest:
    """What the differences over shared seeds say.

    ``difference`` is their mean; ``half_width`` half the width of its 95 % interval; ``p_t`` the two-sided p-value of
    Student's paired t test; ``p_exact`` that of the exact sign-flip permutation test, None beyond ``MAX_EXACT`` pairs.
    With one pair or none all but ``pairs`` and ``difference`` are None, without any the difference is too.
    """

    pairs: int
    difference: float | None = None
    half_width: float | None = None
    p_t: float | None = None
    p_exact: float | None = None


def paired_test(values: Sequence[float], baseline: Sequence[float]) -> PairedTest:
    """Test whether ``values`` differ from ``baseline``, both aligned by seed; fewer than two pairs are no test.

    Raises
    ------
    ValueError
        If they are of different lengths.
    """
    if len(values) != len(baseline):
        raise ValueError(f"{len(values)} values for {len(baseline)} of the baseline: must be pairs")
    differences = [value - base for value, base in zip(values, baseline, strict=True)]
    if len(differences) < 2:
        return PairedTest(len(differences), differences[0] if differences else None)
    mean, spread = statistics.fmean(differences), statistics.stdev(differences)
    if spread == 0.0:  # t is without bounds, or without meaning where nothing differs at all
        p_t = 1.0 if mean == 0.0 else 0.0
    else:
        p_t = two_sided_p(mean * math.sqrt(len(differences)) / spread, len(differences) - 1)
    exact = sign_flip_p(differences) if len(differences) <= MAX_EXACT else None
    return PairedTest(len(differences), mean, half_width(differences), p_t, exact)


def two_sided_p(t: float, degrees: int) -> float:
    """Return P(|T| >= |t|) for Student's t with a whole number of degrees of freedom.

    The finite sums of Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 (odd) and 26.7.4 (even).

    Raises
    ------
    ValueError
        With less than one degree of freedom.
    """
    if degrees < 1:
        raise ValueError(f"degrees={degrees}: must be >= 1")
    angle = math.atan(abs(t) / math.sqrt(degrees))
    square = math.cos(angle) ** 2
    odd = degrees % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0 if degrees == 1 else term
    for k in range(2 + odd, degrees - 1, 2):
        term *= (k - 1) / k * square
        total += term
    inside = 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
    return min(max(1.0 - inside, 0.0), 1.0)


def sign_flip_p(differences: Sequence[float]) -> float:
    """Return the exact two-sided p-value: how many of the 2^n ways to sign the differences sum up as far from 0.

    It asks for nothing but that a difference is as likely as its negative, and with n pairs is never below 2 / 2^n.

    Raises
    ------
    ValueError
        Without any difference, or with more than ``MAX_EXACT``.
    """
    if not 1 <= len(differences) <= MAX_EXACT:
        raise ValueError(f"{len(differences)} differences: must be 1 to {MAX_EXACT}")
    observed = abs(math.fsum(differences))
    slack = 1e-12 * math.fsum(map(abs, differences))  # the same sum in another order may be rounded otherwise
    first, rest = differences[0], differences[1:]
    # turning all signs round changes nothing, so the first keeps its own
    flipped = (math.fsum((first, *(s * d for s, d in zip(signs, rest, strict=True)))) for signs in _signs(len(rest)))
    as_far = sum(abs(total) >= observed - slack for total in flipped)
    return as_far / float(2 ** len(rest))


def _signs(count: int) -> product[tuple[int, ...]]:
    return product((1, -1), repeat=count)
