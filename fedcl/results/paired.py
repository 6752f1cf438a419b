"""Whether two configurations differ, from the seeds that both were run with: a paired t test and an exact one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from scipy.special import stdtr

from fedcl.results.intervals import half_width

MAX_EXACT = 16
"""Pairs up to which all sign flips are tried: 2^15 sums take a third of a second."""


@dataclass(frozen=True)
class PairedTest:
    """The differences over shared seeds, tested.

    ``difference`` is their mean; ``half_width`` half the width of its 95 % interval; ``p_t`` the two-sided p-value of
    Student's paired t test; ``p_exact`` that of the exact sign-flip permutation test, None for more than ``MAX_EXACT``
    pairs. A single pair has a difference only, and no pair has none.
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
    if spread == 0.0:  # t is infinite, or undefined if nothing differs
        p_t = 1.0 if mean == 0.0 else 0.0
    else:
        t = mean * math.sqrt(len(differences)) / spread
        p_t = 2 * float(stdtr(len(differences) - 1, -abs(t)))
    exact = sign_flip_p(differences) if len(differences) <= MAX_EXACT else None
    return PairedTest(len(differences), mean, half_width(differences), p_t, exact)


def sign_flip_p(differences: Sequence[float]) -> float:
    """Return the exact two-sided p-value: the share of the 2^n sign patterns whose sum is at least as far from 0.

    It assumes only that a difference is as likely as its negative. With n pairs it is never below 2 / 2^n.

    Raises
    ------
    ValueError
        Without any difference, or with more than ``MAX_EXACT``.
    """
    if not 1 <= len(differences) <= MAX_EXACT:
        raise ValueError(f"{len(differences)} differences: must be 1 to {MAX_EXACT}")
    observed = abs(math.fsum(differences))
    slack = 1e-12 * math.fsum(map(abs, differences))  # rounding depends on the order of summation
    first, rest = differences[0], differences[1:]
    # flipping all signs changes nothing, so the first keeps its own
    ways = product((1, -1), repeat=len(rest))
    flipped = (math.fsum((first, *(s * d for s, d in zip(signs, rest, strict=True)))) for signs in ways)
    as_far = sum(abs(total) >= observed - slack for total in flipped)
    return as_far / float(2 ** len(rest))
