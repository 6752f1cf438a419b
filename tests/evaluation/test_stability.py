from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcl.evaluation.stability import (
    aggregation_drop,
    anytime_accuracy,
    min_accuracy,
    windowed_forgetting,
    windowed_plasticity,
    worst_case_accuracy,
)

NAN = float("nan")
# task 0 is learned with the second evaluation, task 1 with the fifth, task 2 with the last
CURVE = np.array(
    [
        [0.5, NAN, NAN],
        [0.9, NAN, NAN],
        [0.4, 0.3, NAN],
        [0.7, 0.8, NAN],
        [0.8, 0.9, NAN],
        [0.6, 0.2, 0.7],
        [0.7, 0.6, 1.0],
    ]
)
LEARNED = [1, 4, 6]


def test_the_lowest_after_each_earlier_task_was_learned() -> None:
    assert min_accuracy(CURVE, LEARNED) == pytest.approx((0.4 + 0.2) / 2)
    # task 0's own rise does not count, and with two tasks learned only task 0 is an earlier one
    assert min_accuracy(CURVE[:5], [1, 4, -1]) == pytest.approx(0.4)


def test_worst_case_weighs_the_present_task_with_the_others_lowest() -> None:
    assert worst_case_accuracy(CURVE, LEARNED) == pytest.approx(1.0 / 3 + 2 / 3 * 0.3)
    assert worst_case_accuracy(CURVE[:2], [1, -1, -1]) == pytest.approx(0.9)
    assert math.isnan(worst_case_accuracy(CURVE[:1], [-1, -1, -1]))


def test_a_test_from_before_a_task_was_learned_is_no_low_point() -> None:
    # task 0 stood at 0.1 before it was learned, and with the test that it was learned with; since then 0.6 at least
    curve = np.array([[0.1, 0.0], [0.2, 0.0], [0.8, 0.0], [0.6, 0.9]])
    assert min_accuracy(curve, [1, 3]) == pytest.approx(0.6)


def test_a_task_without_test_samples_is_left_out_and_still_makes_the_others_earlier_ones() -> None:
    # the last one: 0.4 and 0.2 are the others' lowest, and how the present task stands is unknown
    curve = CURVE.copy()
    curve[:, 2] = NAN
    assert min_accuracy(curve, LEARNED) == pytest.approx((0.4 + 0.2) / 2)
    assert math.isnan(worst_case_accuracy(curve, LEARNED))
    # an earlier one: 0.4 alone is left, and two tasks have test samples
    curve = CURVE.copy()
    curve[:, 1] = NAN
    assert min_accuracy(curve, LEARNED) == pytest.approx(0.4)
    assert worst_case_accuracy(curve, LEARNED) == pytest.approx(1.0 / 2 + 1 / 2 * 0.4)
    # one that has test samples but was not measured since it was learned is unknown, not left out
    curve = CURVE.copy()
    curve[5:, 1] = NAN
    assert math.isnan(min_accuracy(curve, LEARNED))


def test_windows_by_hand() -> None:
    # largest drop of neighbours: 0.5, 0.7, none; in three evaluations the same but for the last column
    assert windowed_forgetting(CURVE, 2) == pytest.approx((0.5 + 0.7 + 0.0) / 3)
    assert windowed_plasticity(CURVE, 2) == pytest.approx((0.4 + 0.5 + 0.3) / 3)
    assert windowed_plasticity(CURVE, 3) == pytest.approx((0.4 + 0.6 + 0.3) / 3)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=12), st.integers(2, 15))
def test_windows_are_what_the_definition_says(values: list[float], window: int) -> None:
    pairs = [(i, j) for j in range(len(values)) for i in range(max(0, j - window + 1), j + 1)]
    curve = np.array(values)[:, None]
    assert windowed_forgetting(curve, window) == pytest.approx(max(values[i] - values[j] for i, j in pairs))
    assert windowed_plasticity(curve, window) == pytest.approx(max(values[j] - values[i] for i, j in pairs))


def test_means_over_what_was_measured() -> None:
    assert anytime_accuracy(CURVE[:3]) == pytest.approx((0.5 + 0.9 + 0.35) / 3)
    assert aggregation_drop([0.9, 0.8, NAN], [0.5, 0.9, 0.1]) == pytest.approx((0.4 - 0.1) / 2)
    assert math.isnan(aggregation_drop([NAN], [0.5]))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(7, 3\)"):
        min_accuracy(CURVE, [0, 1])
    with pytest.raises(ValueError, match="window=1"):
        windowed_forgetting(CURVE, 1)
