from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fedcl.config.instantiate import build
from fedcl.scenario.domains import DomainColoured, DomainCorrupted, DomainPermuted, DomainRotated
from fedcl.scenario.materialise import materialise, targets
from fedcl.scenario.streams import ClassIncremental, Joint, TaskIncremental
from fedcl.scenario.task import Stream, Task

SCENARIOS = sorted((Path(__file__).parents[2] / "configs" / "scenario").glob("*.yaml"))
IMAGES: dict[str, Any] = {"num_classes": 10, "input_shape": (1, 8, 8), "seed": 0}


def trained(stream: Stream) -> list[Task]:
    return [stream.train_task(k) for k in range(stream.num_tasks)]


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_every_scenario_yaml_makes_a_stream_whose_records_survive_the_wire(path: Path) -> None:
    node = {
        key: value for key, value in yaml.safe_load(path.read_text()).items() if key not in ("_allowed_", "defaults")
    }
    stream = build(node, at="scenario", **IMAGES)
    assert stream.num_tasks == node["num_tasks"]
    for task in trained(stream):
        assert Task.from_json(task.to_json()) == task
        for after in range(stream.num_tasks):
            tested = stream.test_task(task.id, after=after)
            assert Task.from_json(tested.to_json()) == tested
            assert (tested.id, tested.classes, tested.columns) == (task.id, task.classes, task.columns)
            assert tested.mask is None or set(tested.columns) <= set(tested.mask)
            assert max(tested.columns) < sum(stream.heads)
            assert tested.portions is None
    for outside in (-1, stream.num_tasks):
        with pytest.raises(IndexError, match="outside"):
            stream.train_task(outside)
        with pytest.raises(IndexError, match="outside"):
            stream.test_task(0, after=outside)


def test_class_incremental_by_hand() -> None:
    stream = ClassIncremental(num_classes=6, input_shape=(4,), seed=0, num_tasks=3, class_order=[5, 0, 3, 1, 2, 4])
    assert stream.heads == (6,)
    assert trained(stream) == [
        Task(0, (5, 0), (5, 0), mask=(0, 5)),
        Task(1, (3, 1), (3, 1), mask=(0, 1, 3, 5)),
        Task(2, (2, 4), (2, 4), mask=(0, 1, 2, 3, 4, 5)),
    ]
    assert stream.test_task(0, after=0).mask == (0, 5)
    assert stream.test_task(0, after=2).mask == (0, 1, 2, 3, 4, 5)
    # A task ahead is judged among the columns up to its own, so that forward transfer can be measured.
    assert stream.test_task(1, after=0).mask == (0, 1, 3, 5)


def test_class_incremental_masking_changes_training_only() -> None:
    task = ClassIncremental(**IMAGES, train_masking="task")
    everything = ClassIncremental(**IMAGES, train_masking="all")
    assert [t.mask for t in trained(task)] == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
    assert [t.mask for t in trained(everything)] == [None] * 5
    assert task.test_task(0, after=1).mask == everything.test_task(0, after=1).mask == (0, 1, 2, 3)


def test_masking_by_batch_leaves_the_columns_seen_and_says_so_to_clients() -> None:
    stream = ClassIncremental(**IMAGES, train_masking="batch")
    assert stream.train_task(1) == replace(ClassIncremental(**IMAGES).train_task(1), by_batch=True)
    assert stream.client_task(2, "a", {0, 2}).mask == (0, 1, 4, 5)
    assert stream.test_task(0, after=1).mask == (0, 1, 2, 3)
    assert Task.from_json(stream.train_task(1).to_json()).by_batch
    assert "by_batch" not in ClassIncremental(**IMAGES).train_task(1).to_json()
    # one class of each task: what a client has seen is what it has learned itself
    own = ClassIncremental(**IMAGES, train_masking="batch", classes_per_client=1)
    assert len(own.client_task(1, "a", {0, 1}).mask or ()) == 2


def test_task_incremental_gives_each_task_its_head() -> None:
    stream = TaskIncremental(num_classes=6, input_shape=(4,), seed=0, num_tasks=2, class_order=[5, 0, 3, 1, 2, 4])
    assert stream.heads == (3, 3)
    assert trained(stream) == [
        Task(0, (5, 0, 3), (0, 1, 2), mask=(0, 1, 2), head=0),
        Task(1, (1, 2, 4), (3, 4, 5), mask=(3, 4, 5), head=1),
    ]
    assert stream.test_task(0, after=1) == stream.train_task(0)
    assert stream.test_task(1, after=0) == stream.train_task(1)


def test_task_incremental_with_one_masked_head() -> None:
    stream = TaskIncremental(**IMAGES, num_tasks=2, head="single", train_masking="all")
    assert stream.heads == (10,)
    assert stream.train_task(1) == Task(1, (5, 6, 7, 8, 9), (5, 6, 7, 8, 9), mask=None, head=0)
    assert stream.test_task(1, after=0).mask == (5, 6, 7, 8, 9)


@given(
    st.integers(0, 2**31), st.sampled_from([1, 2, 3, 4, 6, 12]), st.sampled_from([ClassIncremental, TaskIncremental])
)
def test_every_class_is_in_exactly_one_task(
    seed: int, num_tasks: int, kind: type[ClassIncremental] | type[TaskIncremental]
) -> None:
    stream = kind(num_classes=12, input_shape=(4,), seed=seed, num_tasks=num_tasks, class_order="shuffled")
    tasks = trained(stream)
    assert sorted(c for task in tasks for c in task.classes) == list(range(12))
    assert sorted(c for task in tasks for c in task.columns) == list(range(12))
    again = kind(num_classes=12, input_shape=(4,), seed=seed, num_tasks=num_tasks, class_order="shuffled")
    assert trained(again) == tasks
    for task in tasks:
        start = sum(stream.heads[: task.head])
        assert set(task.columns) <= set(range(start, start + stream.heads[task.head]))


def test_increments_share_out_the_classes_unequally() -> None:
    stream = ClassIncremental(num_classes=6, input_shape=(4,), seed=0, num_tasks=4, increments=[0, 3, 0, 3])
    assert trained(stream) == [
        Task(0, (), (), mask=()),
        Task(1, (0, 1, 2), (0, 1, 2), mask=(0, 1, 2)),
        Task(2, (), (), mask=(0, 1, 2)),
        Task(3, (3, 4, 5), (3, 4, 5), mask=(0, 1, 2, 3, 4, 5)),
    ]
    assert stream.test_task(0, after=0).mask == ()
    heads = TaskIncremental(num_classes=6, input_shape=(4,), seed=0, num_tasks=4, increments=[0, 1, 0, 5])
    assert heads.heads == (1, 5)
    assert [task.head for task in trained(heads)] == [0, 0, 0, 1]
    assert [task.columns for task in trained(heads)] == [(), (0,), (), (1, 2, 3, 4, 5)]


def test_an_empty_task_has_no_samples_anywhere() -> None:
    empty = Task(0, (), ())
    y = np.array([0, 1, 1], np.int64)
    for task in (empty, empty.part(1, 3), Task(0, (), (), portions=())):
        chosen = materialise(task, y)
        assert chosen.dtype == np.int64
        assert chosen.tolist() == []
        columns = targets(task, y[chosen])
        assert columns.dtype == np.int64
        assert columns.tolist() == []
        assert Task.from_json(task.to_json()) == task
    with pytest.raises(ValueError, match="label 0 is not a class of task 0"):
        targets(empty, y)


def test_classes_per_client_are_drawn_for_each_client_and_task() -> None:
    stream = ClassIncremental(**IMAGES, num_tasks=2, classes_per_client=3)
    own = {client: stream.client_task(1, client, {0, 1}) for client in "abcdefgh"}
    for client, task in own.items():
        earlier = stream.client_task(0, client, {0})
        assert len(task.classes) == len(earlier.classes) == 3
        assert set(task.classes) < set(stream.train_task(1).classes)
        assert task.columns == task.classes
        # the mask is what this client has learned, not what the others have
        assert earlier.mask == earlier.classes
        assert task.mask == tuple(sorted(earlier.classes + task.classes))
    assert len({task.classes for task in own.values()}) > 3
    assert stream.client_task(1, "a", {0, 1}) == own["a"]
    assert stream.client_task(1, "a", {1}).mask == own["a"].classes
    assert stream.test_task(1, after=1).classes == (5, 6, 7, 8, 9)
    everything = ClassIncremental(**IMAGES, num_tasks=2, classes_per_client=9)
    assert everything.client_task(1, "a", {1}) == ClassIncremental(**IMAGES, num_tasks=2).client_task(1, "a", {1})
    assert ClassIncremental(**IMAGES, train_masking="all", classes_per_client=1).client_task(1, "a", {1}).mask is None
    only = ClassIncremental(**IMAGES, train_masking="task", classes_per_client=1).client_task(1, "a", {0, 1})
    assert only.mask == only.classes


def test_shuffled_order_depends_on_the_seed() -> None:
    orders = {
        tuple(
            c
            for t in trained(ClassIncremental(num_classes=10, input_shape=(4,), seed=seed, class_order="shuffled"))
            for c in t.classes
        )
        for seed in range(5)
    }
    assert len(orders) == 5


def test_domain_streams_keep_classes_and_change_the_input() -> None:
    permuted, rotated = DomainPermuted(**IMAGES), DomainRotated(**IMAGES, num_tasks=4, max_degrees=90)
    for stream in (permuted, rotated):
        assert stream.heads == (10,)
        assert all(t.classes == t.columns == tuple(range(10)) and t.mask is None for t in trained(stream))
        assert stream.train_task(0).transform is None
        assert stream.test_task(2, after=0) == stream.train_task(2)
    assert [t.transform for t in trained(rotated)[1:]] == [{"name": "rotate", "degrees": d} for d in (30.0, 60.0, 90.0)]
    seeds = [
        t.transform["seed"] for s in (0, 1) for t in trained(DomainPermuted(**{**IMAGES, "seed": s})) if t.transform
    ]
    assert len(set(seeds)) == 8


def test_coloured_domains_turn_hues_or_else_dim_and_brighten() -> None:
    colour = DomainColoured(num_classes=10, input_shape=(3, 8, 8), seed=0, num_tasks=4, strength=0.5)
    assert [t.transform for t in trained(colour)] == [
        None,
        *({"name": "hue", "degrees": d} for d in (30.0, 60.0, 90.0)),
    ]
    grey = trained(DomainColoured(**IMAGES, num_tasks=3))
    assert grey[0].transform is None
    assert [t.transform["contrast"] for t in grey if t.transform] == pytest.approx([0.65, 0.3])
    assert [t.transform["brightness"] for t in grey if t.transform] == pytest.approx([0.35, 0.7])


def test_corrupted_domains_grade_one_kind_or_take_the_kinds_in_turn() -> None:
    graded = trained(DomainCorrupted(**IMAGES, num_tasks=6, corruption="blur", severity=5))
    assert [t.transform for t in graded] == [None, *({"name": "blur", "severity": s} for s in (1, 2, 3, 4, 5))]
    coarse = trained(DomainCorrupted(**IMAGES, num_tasks=3, corruption="contrast", severity=3))
    assert [t.transform["severity"] for t in coarse if t.transform] == [2, 3]
    mixed = [t.transform for t in trained(DomainCorrupted(**IMAGES, num_tasks=6, severity=4)) if t.transform]
    assert [t["name"] for t in mixed] == ["noise", "blur", "contrast", "pixelate", "noise"]
    assert {t["severity"] for t in mixed} == {4}
    assert mixed[0]["seed"] != mixed[4]["seed"]


def test_joint_is_one_task_with_everything() -> None:
    assert trained(Joint(**IMAGES)) == [Task(0, tuple(range(10)), tuple(range(10)))]


@pytest.mark.parametrize(
    ("kind", "params", "message"),
    [
        (ClassIncremental, {"num_tasks": 3}, r"scenario\.num_tasks=3: must divide the 10 classes"),
        (ClassIncremental, {"class_order": [0, 1]}, r"scenario\.class_order=\[0, 1\]: must be null, shuffled, or"),
        (ClassIncremental, {"class_order": "random"}, r"scenario\.class_order=random"),
        (ClassIncremental, {"increments": [5, 5]}, r"scenario\.increments=\[5, 5\]: must have 5 entries"),
        (ClassIncremental, {"increments": [1, 1, 1, 1, 1]}, r"scenario\.increments=.* add up to the 10 classes"),
        (DomainColoured, {"input_shape": (64,)}, r"scenario=domain_coloured: needs images"),
        (DomainCorrupted, {"input_shape": (64,)}, r"scenario=domain_corrupted: needs images"),
        (DomainRotated, {"input_shape": (64,)}, r"scenario=domain_rotated: needs images"),
    ],
)
def test_bad_parameters_name_their_key(kind: type, params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**{**IMAGES, **params})
