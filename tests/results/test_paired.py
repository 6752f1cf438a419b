from __future__ import annotations

import math

import pytest

from fedcl.results.paired import MAX_EXACT, paired_test, sign_flip_p


def test_sign_flips_by_hand() -> None:
    # of the four ways to sign (1, 3) up to all signs round, |sums| 4 and 2: only the observed 4 is as far out
    assert sign_flip_p([1.0, 3.0]) == 0.5
    # |sums| of (1, 2, 3): 6 4 2 0, observed 6
    assert sign_flip_p([1.0, 2.0, 3.0]) == 0.25
    # observed |1 - 2 + 3| = 2, and 6 4 2 are as far out
    assert sign_flip_p([1.0, -2.0, 3.0]) == 0.75
    assert sign_flip_p([0.1, 0.2, 0.3, 0.4, 0.5]) == 2 / 2**5
    assert sign_flip_p([5.0]) == 1.0
    with pytest.raises(ValueError, match="must be 1 to"):
        sign_flip_p([1.0] * (MAX_EXACT + 1))


def test_a_paired_test_by_hand() -> None:
    # differences 1 2 3: mean 2, deviation 1, t = 2 sqrt(3) = 3.4641 with 2 degrees: p = 1 - t / sqrt(2 + t^2)
    found = paired_test([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    t = 2 * math.sqrt(3)
    assert found.pairs == 3
    assert found.difference == 2.0
    assert found.half_width == pytest.approx(4.302653 / math.sqrt(3))
    assert found.p_t == pytest.approx(1 - t / math.sqrt(2 + t * t))
    assert found.p_exact == 0.25


def test_too_few_or_equal_pairs() -> None:
    one = paired_test([1.0], [0.5])
    assert (one.pairs, one.difference, one.p_t, one.p_exact) == (1, 0.5, None, None)
    assert paired_test([], []).difference is None
    assert paired_test([1.0, 2.0], [1.0, 2.0]).p_t == 1.0
    assert paired_test([2.0, 3.0], [1.0, 2.0]).p_t == 0.0
    with pytest.raises(ValueError, match="must be pairs"):
        paired_test([1.0], [])
