from __future__ import annotations

import numpy as np
import pytest

from fedcl.evaluation import metrics

NAN = float("nan")

# Task 0: learned at 0.8, best at 0.9 after task 1, 0.5 at the end; 0.1 before.
# Task 1: measured at 0.75 before it was learned, learned at 0.6, improves to 0.7 at the end.
R = np.array(
    [
        [0.8, 0.75, 0.2],
        [0.9, 0.6, 0.3],
        [0.5, 0.7, 0.4],
    ]
)


def test_average_accuracy_is_the_mean_of_the_last_row_over_seen_tasks() -> None:
    assert metrics.average_accuracy(R) == pytest.approx(1.6 / 3)
    assert metrics.average_accuracy(R, after=1) == pytest.approx(0.75)
    assert metrics.average_accuracy(R, after=0) == pytest.approx(0.8)


def test_average_accuracy_over_samples_weighs_tasks_by_size() -> None:
    n = [100, 300, 600]
    assert metrics.average_accuracy(R, num_examples=n) == pytest.approx(0.05 + 0.21 + 0.24)
    assert metrics.average_accuracy(R, after=1, num_examples=n) == pytest.approx((90 + 180) / 400)


def test_average_incremental_accuracy_task_mean_and_sample_mean() -> None:
    assert metrics.average_incremental_accuracy(R) == pytest.approx((0.8 + 0.75 + 1.6 / 3) / 3)
    assert metrics.average_incremental_accuracy(R, [100, 300, 600]) == pytest.approx((0.8 + 0.675 + 0.5) / 3)
    assert metrics.average_incremental_accuracy(R, [7, 7, 7]) == pytest.approx(metrics.average_incremental_accuracy(R))


def test_the_definitions_of_forgetting_differ() -> None:
    # chaudhry: task 0 0.9 - 0.5, task 1 0.6 - 0.7; first: 0.8 - 0.5, 0.6 - 0.7; peak: 0.9 - 0.5, 0.75 - 0.7
    np.testing.assert_allclose(metrics.forgetting_by_task(R), [0.4, -0.1])
    np.testing.assert_allclose(metrics.forgetting_by_task(R, "first"), [0.3, -0.1])
    np.testing.assert_allclose(metrics.forgetting_by_task(R, "peak"), [0.4, 0.05])
    assert metrics.forgetting(R) == pytest.approx(0.15)
    assert metrics.forgetting(R, "first") == pytest.approx(0.1)
    assert metrics.forgetting(R, "peak") == pytest.approx(0.225)


def test_bwt_is_the_negative_of_first_forgetting() -> None:
    assert metrics.bwt(R) == pytest.approx(((0.5 - 0.8) + (0.7 - 0.6)) / 2)
    assert metrics.bwt(R) == pytest.approx(-metrics.forgetting(R, "first"))


def test_fwt_compares_the_upper_diagonal_with_the_untrained_model() -> None:
    assert metrics.fwt(R, [0.9, 0.1, 0.2]) == pytest.approx(((0.75 - 0.1) + (0.3 - 0.2)) / 2)
    assert np.isnan(metrics.fwt(R, None))


def test_learning_accuracy_is_the_mean_of_the_diagonal() -> None:
    assert metrics.learning_accuracy(R) == pytest.approx(0.6)


def test_one_task_has_accuracies_but_no_forgetting_and_no_transfer() -> None:
    summary = metrics.summarise([[0.7]], [0.1])
    assert summary["accuracy/average"] == summary["accuracy/average_incremental"] == 0.7
    for key in ("forgetting/chaudhry", "forgetting/first", "forgetting/peak", "bwt", "fwt"):
        assert np.isnan(summary[key]), key
    assert metrics.learning_accuracy([[0.7]]) == 0.7


def test_tasks_not_yet_learned_need_not_be_measured_but_then_fwt_is_unknown() -> None:
    lower = np.where(np.tril(np.ones_like(R)) > 0, R, NAN)
    summary = metrics.summarise(lower, [0.1, 0.1, 0.1])
    assert summary["forgetting/chaudhry"] == pytest.approx(0.15)
    assert summary["forgetting/peak"] == pytest.approx((0.4 + 0.0) / 2)
    assert summary["bwt"] == pytest.approx(-0.1)
    assert np.isnan(summary["fwt"])


@pytest.mark.parametrize("kind", metrics.KINDS)
def test_a_measurement_that_a_formula_needs_is_never_filled_in(kind: metrics.Kind) -> None:
    holey = R.copy()
    holey[0, 0] = NAN
    assert np.isnan(metrics.forgetting(holey, kind))
    assert np.isnan(metrics.forgetting_by_task(holey, kind)).tolist() == [True, False]


def test_summarise_has_the_documented_keys_and_agrees_with_the_single_functions() -> None:
    baseline = [0.0, 0.1, 0.2]
    assert metrics.summarise(R, baseline) == {
        "accuracy/average": metrics.average_accuracy(R),
        "accuracy/average_incremental": metrics.average_incremental_accuracy(R),
        "forgetting/chaudhry": metrics.forgetting(R, "chaudhry"),
        "forgetting/first": metrics.forgetting(R, "first"),
        "forgetting/peak": metrics.forgetting(R, "peak"),
        "bwt": metrics.bwt(R),
        "fwt": metrics.fwt(R, baseline),
    }


def test_the_matrix_is_not_modified() -> None:
    before = R.copy()
    metrics.summarise(R, [0.1, 0.1, 0.1])
    np.testing.assert_array_equal(R, before)


@pytest.mark.parametrize(("count", "worst"), [(3, 0.0), (19, 0.0), (20, 0.5), (30, 1.0)])
def test_worst_tenth_is_at_least_one_client(count: int, worst: float) -> None:
    values = {f"c{i}": float(i) for i in reversed(range(count))}
    numbers = metrics.personal(values)
    assert numbers["personal/accuracy_worst10"] == worst
    assert numbers["personal/accuracy_mean"] == pytest.approx((count - 1) / 2)


def test_personal_numbers_without_clients_or_with_an_unmeasured_one_are_unknown() -> None:
    assert np.isnan(list(metrics.personal({}).values())).all()
    assert np.isnan(list(metrics.personal({"a": 0.5, "b": NAN}).values())).all()


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 3\)"):
        metrics.average_accuracy(np.ones((2, 3)))
    with pytest.raises(ValueError, match=r"shape \(0, 0\)"):
        metrics.bwt(np.ones((0, 0)))
    with pytest.raises(ValueError, match="chaudhry, first, peak"):
        metrics.forgetting(R, "best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_examples"):
        metrics.average_accuracy(R, num_examples=[1, 2])
    with pytest.raises(ValueError, match="baseline"):
        metrics.fwt(R, [0.1])


BASELINE = [0.9, 0.1, 0.2]


def _without(rows: tuple[int, ...] = (), columns: tuple[int, ...] = ()) -> np.ndarray:
    matrix = R.copy()
    matrix[list(rows)] = NAN
    matrix[:, list(columns)] = NAN
    return matrix


# Each number worked by hand from R above; the end is always the last row, whichever task it belongs to.
LEFT_OUT = {
    # the last task has no test samples: both others are earlier ones, and are looked at after it
    "last task": (
        _without(columns=(2,)),
        {
            "accuracy/average": (0.5 + 0.7) / 2,
            "accuracy/average_incremental": (0.8 + (0.9 + 0.6) / 2 + (0.5 + 0.7) / 2) / 3,
            "forgetting/chaudhry": ((0.9 - 0.5) + (0.6 - 0.7)) / 2,
            "forgetting/first": ((0.8 - 0.5) + (0.6 - 0.7)) / 2,
            "forgetting/peak": ((0.9 - 0.5) + (0.75 - 0.7)) / 2,
            "bwt": ((0.5 - 0.8) + (0.7 - 0.6)) / 2,
            "fwt": 0.75 - 0.1,
        },
        (0.8 + 0.6) / 2,
    ),
    # a middle one: its row still shows task 0 at its best
    "middle task": (
        _without(columns=(1,)),
        {
            "accuracy/average": (0.5 + 0.4) / 2,
            "accuracy/average_incremental": (0.8 + 0.9 + (0.5 + 0.4) / 2) / 3,
            "forgetting/chaudhry": 0.9 - 0.5,
            "forgetting/first": 0.8 - 0.5,
            "forgetting/peak": 0.9 - 0.5,
            "bwt": 0.5 - 0.8,
            "fwt": 0.3 - 0.2,
        },
        (0.8 + 0.4) / 2,
    ),
    # the first: after it nothing that was seen can be tested
    "first task": (
        _without(columns=(0,)),
        {
            "accuracy/average": (0.7 + 0.4) / 2,
            "accuracy/average_incremental": (0.6 + (0.7 + 0.4) / 2) / 2,
            "forgetting/chaudhry": 0.6 - 0.7,
            "forgetting/first": 0.6 - 0.7,
            "forgetting/peak": 0.75 - 0.7,
            "bwt": 0.7 - 0.6,
            "fwt": ((0.75 - 0.1) + (0.3 - 0.2)) / 2,
        },
        (0.6 + 0.4) / 2,
    ),
    # nothing was measured after task 1: maxima are over the other moments, but when it was learned is unknown
    "middle moment": (
        _without(rows=(1,)),
        {
            "accuracy/average": (0.5 + 0.7 + 0.4) / 3,
            "accuracy/average_incremental": (0.8 + (0.5 + 0.7 + 0.4) / 3) / 2,
            "forgetting/chaudhry": NAN,
            "forgetting/first": NAN,
            "forgetting/peak": ((0.8 - 0.5) + (0.75 - 0.7)) / 2,
            "bwt": NAN,
            "fwt": NAN,
        },
        NAN,
    ),
    # no earlier moment stands in for the end
    "last moment": (
        _without(rows=(2,)),
        {
            "accuracy/average": NAN,
            "accuracy/average_incremental": NAN,
            "forgetting/chaudhry": NAN,
            "forgetting/first": NAN,
            "forgetting/peak": NAN,
            "bwt": NAN,
            "fwt": ((0.75 - 0.1) + (0.3 - 0.2)) / 2,
        },
        NAN,
    ),
}


@pytest.mark.parametrize("what", LEFT_OUT)
def test_moments_and_tests_are_left_out_independently_of_each_other(what: str) -> None:
    matrix, expected, learning = LEFT_OUT[what]
    assert metrics.summarise(matrix, BASELINE) == pytest.approx(expected, nan_ok=True)
    assert metrics.learning_accuracy(matrix) == pytest.approx(learning, nan_ok=True)


def test_forgetting_is_over_the_moments_that_were_measured() -> None:
    matrix = np.full((4, 4), 0.5)
    matrix[:, 0] = [0.7, NAN, 0.9, 0.4]
    matrix[1] = NAN
    assert metrics.forgetting_by_task(matrix)[0] == pytest.approx(0.9 - 0.4)
    matrix[2, 0] = NAN  # others were measured at that moment, this task was not: that is no moment left out
    assert np.isnan(metrics.forgetting_by_task(matrix)[0])


def test_sample_means_weigh_only_tasks_with_test_samples() -> None:
    tested = _without(columns=(2,))
    expected = (0.8 + (90 + 180) / 400 + (50 + 210) / 400) / 3
    assert metrics.average_incremental_accuracy(tested, [100, 300, 0]) == pytest.approx(expected)
    with pytest.raises(ValueError, match="> 0 for each task that was tested"):
        metrics.average_incremental_accuracy(R, [100, 0, 600])


def test_nothing_measured_is_nothing_known() -> None:
    numbers = metrics.summarise(np.full((2, 2), NAN), [NAN, NAN])
    assert np.isnan(list(numbers.values())).all()
    assert np.isnan(metrics.learning_accuracy(np.full((2, 2), NAN)))
