from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcl.scenario.base import Masking
from fedcl.scenario.materialise import materialise
from fedcl.scenario.recurring import SCoLe
from fedcl.scenario.shares import Floats, LabelShift, LinearDecay, Overlapping, Shares, SiBlurry, cumulated
from fedcl.scenario.streams import ClassIncremental, TaskIncremental
from fedcl.scenario.task import Stream, Task

RUN: dict[str, Any] = {"num_classes": 6, "input_shape": (4,), "seed": 0}
# streams that show every sample exactly once, whatever their parameters
ONCE: list[tuple[type, dict[str, Any]]] = [
    (ClassIncremental, {"increments": [0, 4, 0, 1, 1]}),
    (TaskIncremental, {"increments": [3, 0, 0, 0, 3]}),
    (Overlapping, {"increments": [2, 1, 0, 2, 1], "overlap": 0.3}),
    (Overlapping, {"increments": [2, 1, 1, 1, 1], "overlap": 1.0}),
    (SiBlurry, {}),
    (SiBlurry, {"stochastic": False, "blurry": 1.0}),
    (SiBlurry, {"disjoint": 1.0}),
    (LinearDecay, {}),
    (LinearDecay, {"num_tasks": 7, "groups": 3, "ramp": 1.0}),
    (LinearDecay, {"num_tasks": 2, "groups": 5, "ramp": 0.0}),
    (LabelShift, {"alpha": 0.05}),
]


@dataclass(kw_only=True, eq=False)
class Given(Shares):
    table: Floats

    def shares(self) -> Floats:
        return self.table


def given_shares(table: Floats, train_masking: Masking) -> Stream:
    return Given(
        **{**RUN, "num_classes": table.shape[1]}, num_tasks=len(table), train_masking=train_masking, table=table
    )


def trained(stream: Stream) -> list[Task]:
    return [stream.train_task(k) for k in range(stream.num_tasks)]


def shares(stream: Stream, num_classes: int = 6) -> np.ndarray[Any, Any]:
    """Return the share of each class that each task owns, (T, C)."""
    table = np.zeros((stream.num_tasks, num_classes))
    for task in trained(stream):
        for label, (start, stop) in zip(task.classes, task.portions or [(0.0, 1.0)] * 99, strict=False):
            table[task.id, label] = stop - start
    return table


@given(
    st.sampled_from(ONCE),
    st.integers(0, 2**31),
    st.lists(st.integers(0, 5), max_size=120),
    st.integers(1, 7),
)
def test_every_sample_of_every_client_is_shown_exactly_once(
    kind: tuple[type, dict[str, Any]], seed: int, labels: list[int], rounds: int
) -> None:
    build, params = kind
    stream = build(**{**RUN, "seed": seed}, **params)
    y = np.asarray(labels, np.int64)
    whole = [materialise(task, y) for task in trained(stream)]
    assert sorted(np.concatenate(whole).tolist()) == list(range(len(y)))
    for task, chosen in zip(trained(stream), whole, strict=True):
        parts = [materialise(task.part(k, rounds), y) for k in range(rounds)]
        assert sorted(np.concatenate(parts).tolist()) == chosen.tolist()
        assert all(np.isin(y[part], task.classes).all() for part in parts)


@given(
    st.integers(1, 6).flatmap(
        lambda tasks: st.lists(st.lists(st.integers(0, 9), min_size=tasks, max_size=tasks), min_size=1, max_size=4)
    ),
    st.lists(st.integers(0, 3), max_size=60),
)
def test_any_matrix_of_shares_tiles_any_client(weights: list[list[int]], labels: list[int]) -> None:
    columns = [np.asarray(column, np.float64) for column in weights if sum(column)]
    if not columns:
        return
    stream = given_shares(np.stack([c / c.sum() for c in columns], axis=1), train_masking="seen")
    y = np.asarray([label for label in labels if label < len(columns)], np.int64)
    whole = [materialise(task, y) for task in trained(stream)]
    assert sorted(np.concatenate(whole).tolist()) == list(range(len(y)))


def test_portions_are_rounded_to_the_nearest_sample() -> None:
    y = np.zeros(3, np.int64)
    tasks = trained(given_shares(np.array([[0.5], [0.25], [0.25]]), train_masking="all"))
    # 0, 1.5, 2.25 and 3 samples
    assert [materialise(task, y).tolist() for task in tasks] == [[0, 1], [], [2]]


def test_cumulated_by_hand_and_what_it_refuses() -> None:
    starts, stops = cumulated(np.array([[0.2, 0.0], [0.0, 1.0], [0.8, 0.0]]))
    assert starts.tolist() == [[0.0, 0.0], [0.2, 0.0], [0.2, 1.0]]
    assert stops.tolist() == [[0.2, 0.0], [0.2, 1.0], [1.0, 1.0]]
    for bad in ([[0.5], [0.6]], [[1.5], [-0.5]]):
        with pytest.raises(ValueError, match="must be >= 0 and add up to 1"):
            cumulated(np.array(bad))


def test_overlapping_by_hand() -> None:
    stream = Overlapping(**RUN, num_tasks=3, overlap=0.25, class_order=[5, 4, 3, 2, 1, 0])
    assert trained(stream) == [
        Task(0, (4, 5), (4, 5), mask=(4, 5), portions=((0.0, 0.75), (0.0, 0.75))),
        Task(1, (2, 3, 4, 5), (2, 3, 4, 5), mask=(2, 3, 4, 5), portions=((0.0, 0.75),) * 2 + ((0.75, 1.0),) * 2),
        Task(2, (0, 1, 2, 3), (0, 1, 2, 3), mask=(0, 1, 2, 3, 4, 5), portions=((0.0, 1.0),) * 2 + ((0.75, 1.0),) * 2),
    ]
    # a test takes all samples of the classes, and the columns seen
    assert stream.test_task(0, after=1) == Task(0, (4, 5), (4, 5), mask=(2, 3, 4, 5))
    assert stream.client_task(2, "c", {2}).mask == (0, 1, 2, 3)


def test_si_blurry_by_hand_with_equal_splits() -> None:
    stream = SiBlurry(**RUN, num_tasks=3, disjoint=0.5, blurry=0.3, stochastic=False)
    table = shares(stream)
    assert stream.online
    assert np.allclose(table.sum(0), 1)
    # three disjoint classes, one a task; of three blurry ones 0.7 + 0.1 at home, 0.1 in each other task
    assert sorted(np.round(np.sort(table, axis=0).T, 6).tolist()) == [[0.0, 0.0, 1.0]] * 3 + [[0.1, 0.1, 0.8]] * 3
    assert np.allclose(table.sum(1), 2)


def test_si_blurry_draws_its_splits_and_may_leave_tasks_empty() -> None:
    streams = [SiBlurry(**{**RUN, "seed": seed}, num_tasks=4, disjoint=1.0) for seed in range(8)]
    sizes = {tuple(len(task.classes) for task in trained(stream)) for stream in streams}
    assert len(sizes) > 4
    assert any(0 in size for size in sizes)
    tables = [shares(SiBlurry(**{**RUN, "seed": seed}, disjoint=0.0, blurry=0.5)) for seed in range(2)]
    for table in tables:
        rest = np.sort(table, axis=1)  # what the pool gives is the same for all classes that are not at home
        assert np.allclose(rest[:, 0], table.min(axis=1))
        assert table.min() > 0
    assert not np.allclose(tables[0], tables[1])
    assert np.array_equal(tables[0], shares(SiBlurry(**RUN, disjoint=0.0, blurry=0.5)))


def test_linear_decay_by_hand() -> None:
    # two groups in four windows; the ramp is half a group long, so it fills the two windows at the border halfway
    table = shares(LinearDecay(**RUN, num_tasks=4, groups=2, ramp=0.5))
    # from 0.75 to 1 the first group falls from 1 to 1/2: 1/4 + 1/4 * 3/4; the second one rises likewise
    first = [0.5, 0.4375, 0.0625, 0.0]
    assert np.allclose(table[:, :3], np.array(first)[:, None])
    assert np.allclose(table[:, 3:], np.array(first[::-1])[:, None])
    sharp = shares(LinearDecay(**RUN, num_tasks=2, ramp=0.0))
    assert np.allclose(sharp, [[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]])


def test_label_shift_keeps_all_classes_and_changes_their_proportions() -> None:
    even, uneven = (shares(LabelShift(**RUN, alpha=alpha)) for alpha in (1000.0, 0.1))
    assert np.allclose(even, 0.2, atol=0.05)
    assert np.allclose(uneven.sum(0), 1)
    assert uneven.max(axis=0).mean() > 0.6
    assert trained(LabelShift(**RUN))[0].mask is None


def test_scole_draws_classes_again_and_again() -> None:
    stream = SCoLe(**RUN, num_tasks=200)
    tasks = trained(stream)
    assert all(len(set(task.classes)) == 2 and task.mask == task.classes and task.portions is None for task in tasks)
    counts = np.bincount([label for task in tasks for label in task.classes], minlength=6)
    assert counts.sum() == 400
    assert counts.min() > 40
    rare = np.sort(
        np.bincount(
            [c for t in trained(SCoLe(**RUN, num_tasks=200, entropy_decrease=12.0)) for c in t.classes], minlength=6
        )
    )
    assert rare[0] < 25 < 100 < rare[-1]
    assert stream.test_task(3, after=[3]).mask == tasks[3].classes


# (1 - i f)^e, f = 0.05: 1, 0.9025, 0.81, 0.7225, 0.64, 0.5625 of e = 2
@pytest.mark.parametrize(
    ("num_classes", "entropy", "weights"),
    [(6, 2.0, [1.0, 0.9025, 0.81, 0.7225, 0.64, 0.5625]), (40, 1.0, [1.0 - i / 40 for i in range(40)])],
)
def test_scole_draws_rare_classes_as_often_as_published(num_classes: int, entropy: float, weights: list[float]) -> None:
    draws = 12_000
    run = {**RUN, "num_classes": num_classes, "num_tasks": draws, "classes_per_task": 1, "entropy_decrease": entropy}
    counts = np.bincount([task.classes[0] for task in trained(SCoLe(**run))], minlength=num_classes)
    expected = draws * np.array(weights) / sum(weights)
    # four standard deviations of a count
    assert np.all(np.abs(np.sort(counts)[::-1] - expected) < 4 * np.sqrt(expected) + 1)


def test_scole_with_fresh_samples_shows_each_once() -> None:
    stream = SCoLe(**RUN, num_tasks=30, classes_per_task=3, fresh=True)
    drawn = {label for task in trained(stream) for label in task.classes}
    y = np.repeat(np.arange(6), 41)
    shown = np.concatenate([materialise(task, y) for task in trained(stream)])
    assert sorted(shown.tolist()) == np.flatnonzero(np.isin(y, list(drawn))).tolist()
    assert trained(stream)[0].portions is not None


@pytest.mark.parametrize(
    ("kind", "params", "message"),
    [
        (Overlapping, {"num_tasks": 4}, r"scenario\.num_tasks=4: must divide the 6 classes"),
        (LinearDecay, {"groups": 7}, r"scenario\.groups=7: must give 1 to 6 groups"),
        (SCoLe, {"classes_per_task": 7}, r"scenario\.classes_per_task=7: must be in \[1, 6\]"),
    ],
)
def test_bad_parameters_of_blurry_streams_name_their_key(kind: type, params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**RUN, **params)
