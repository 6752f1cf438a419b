from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcl.scenario.asynchrony import Asynchronous, Shifted, Shuffled
from fedcl.scenario.population import Availability, Growing
from fedcl.scenario.schedule import Listed, Span, Synchronous, stage_ends
from fedcl.scenario.streams import ClassIncremental
from fedcl.server.curriculum import Curriculum

CLIENTS = [str(i) for i in range(12)]
RUN: dict[str, Any] = {"num_tasks": 4, "rounds_per_task": 3, "clients": CLIENTS, "seed": 0}
KINDS = [Synchronous, Shuffled, Shifted, Asynchronous, Growing, Availability]


def lengths(spans: Any) -> list[int]:
    return [span.stop - span.start for span in spans]


@given(
    st.sampled_from(KINDS),
    st.integers(1, 5).flatmap(
        lambda tasks: st.tuples(
            st.just(tasks), st.one_of(st.integers(1, 5), st.lists(st.integers(1, 5), min_size=tasks, max_size=tasks))
        )
    ),
    st.integers(1, 9),
    st.integers(0, 2**32 - 1),
)
def test_every_schedule_is_a_whole(
    kind: type[Listed], tasks: tuple[int, int | list[int]], num_clients: int, seed: int
) -> None:
    num_tasks, rounds = tasks
    build: Any = kind
    run: dict[str, Any] = {
        "num_tasks": num_tasks,
        "rounds_per_task": rounds,
        "clients": CLIENTS[:num_clients],
        "seed": seed,
    }
    schedule, again = build(**run), build(**run)
    ends = [r for r in range(schedule.num_rounds) if schedule.stage(r).ends]
    assert len(ends) == num_tasks
    assert ends[-1] == schedule.num_rounds - 1
    assert [schedule.stage(r).index for r in ends] == list(range(num_tasks))
    for client in run["clients"]:
        spans = schedule.spans(client)
        assert list(spans) == list(again.spans(client))
        assert all(0 <= a.start < a.stop <= b.start for a, b in pairwise(spans))
        assert all(0 <= span.task_id < num_tasks and span.stop <= schedule.num_rounds for span in spans)
        seen: list[int] = []
        for server_round in range(schedule.num_rounds):
            position = schedule.position(client, server_round)
            if position is not None:
                seen += [position.task_id] if position.task_id not in seen else []
                inside = [span for span in spans if span.start <= server_round < span.stop]
                assert [span.task_id for span in inside] == [position.task_id]
                assert position.is_last == (server_round == inside[0].stop - 1)
            assert schedule.seen(client, server_round) == tuple(seen)
    for outside in (-1, schedule.num_rounds):
        for ask in (schedule.position, schedule.seen):
            with pytest.raises(IndexError, match="outside"):
                ask(run["clients"][0], outside)


def test_stage_ends_by_hand() -> None:
    slow = [Span(0, 0, 4), Span(1, 4, 9)]
    quick = [Span(1, 0, 2), Span(0, 2, 4)]
    assert stage_ends({"a": slow, "b": quick}, 2) == [3, 8]
    # whoever never finishes a second task does not hold the others up, but must have finished its first
    assert stage_ends({"a": quick, "b": [Span(0, 0, 9)]}, 2) == [7, 8]
    # nobody finishes a third task: the stages that are left share the end of the run
    assert stage_ends({"a": quick, "b": []}, 3) == [1, 2, 3]
    with pytest.raises(ValueError, match="the run has 4 rounds for 5 tasks"):
        stage_ends({"a": quick}, 5)


def test_shuffled_gives_each_client_its_own_order() -> None:
    schedule = Shuffled(**{**RUN, "rounds_per_task": [1, 2, 3, 4]})
    orders = {client: [span.task_id for span in schedule.spans(client)] for client in CLIENTS}
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) > 6
    # the number of rounds goes with the task, whenever a client comes to it
    assert all(lengths(schedule.spans(c)) == [task + 1 for task in orders[c]] for c in CLIENTS)
    assert schedule.num_rounds == 10
    other = Shuffled(**{**RUN, "seed": 1})
    assert [[s.task_id for s in other.spans(c)] for c in CLIENTS] != list(orders.values())
    # a client's order does not depend on who else is there
    assert Shuffled(**{**RUN, "clients": ["7"]}).spans("7") == Shuffled(**RUN).spans("7")


def test_shuffled_with_some_tasks_only() -> None:
    schedule = Shuffled(**RUN, tasks_per_client=2)
    assert all(len(schedule.spans(client)) == 2 for client in CLIENTS)
    assert schedule.num_rounds == 6
    assert schedule.stage_ends == [2, 3, 4, 5]
    with pytest.raises(ValueError, match=r"scenario\.schedule\.tasks_per_client=5: must be null or in \[1, 4\]"):
        Shuffled(**RUN, tasks_per_client=5)
    with pytest.raises(ValueError, match=r"3 rounds for 4 tasks.*raise rounds_per_task"):
        Shuffled(**RUN, tasks_per_client=1)


def test_shifted_spreads_the_starts() -> None:
    schedule = Shifted(**RUN, max_lag=11)
    assert sorted(schedule.spans(client)[0].start for client in CLIENTS) == list(range(12))
    assert all(lengths(schedule.spans(client)) == [3, 3, 3, 3] for client in CLIENTS)
    assert schedule.stage_ends == [13, 16, 19, 22]
    late = next(client for client in CLIENTS if schedule.spans(client)[0].start == 11)
    assert schedule.position(late, 10) is None
    assert schedule.seen(late, 10) == ()
    assert Shifted(**RUN, max_lag=0).stage_ends == Synchronous(**RUN).stage_ends


def test_asynchronous_draws_lengths_between_its_bounds() -> None:
    schedule = Asynchronous(**{**RUN, "rounds_per_task": 5}, shortest=0.5, longest=1.5)
    drawn = [length for client in CLIENTS for length in lengths(schedule.spans(client))]
    assert set(drawn) == set(range(2, 9))
    assert all([s.task_id for s in schedule.spans(client)] == [0, 1, 2, 3] for client in CLIENTS)
    slowest = max(schedule.spans(client)[-1].stop for client in CLIENTS)
    assert schedule.num_rounds == slowest
    assert Asynchronous(**RUN, shortest=1.0, longest=1.0).stage_ends == Synchronous(**RUN).stage_ends
    with pytest.raises(ValueError, match=r"scenario\.schedule\.shortest=2\.0, longest=1\.5"):
        Asynchronous(**RUN, shortest=2.0)


def test_growing_with_glfcs_numbers() -> None:
    clients = [str(i) for i in range(120)]
    schedule = Growing(num_tasks=10, rounds_per_task=10, clients=clients, seed=0, start=0.25, stay=0.1)
    positions = [[schedule.position(client, 10 * task) for client in clients] for task in range(10)]
    present = [sum(p is not None for p in row) for row in positions]
    assert present == [30 + 10 * task for task in range(10)]
    current = [sum(p is not None and p.task_id == task for p in row) for task, row in enumerate(positions)]
    # ten new ones and, of those who were there, 90 %
    assert current == [30, *(10 + present[t - 1] - round(0.1 * present[t - 1]) for t in range(1, 10))]
    assert schedule.stage_ends == [10 * task + 9 for task in range(10)]
    everybody = [schedule.spans(client) for client in clients]
    assert any(lengths(spans)[0] == 20 for spans in everybody)  # stayed, then went on to the task of the time
    # whoever stays longer skips what it missed
    assert all(b.task_id == b.start // 10 for spans in everybody for b in spans)


def test_growing_at_its_limits() -> None:
    together = Growing(**RUN, start=1.0, stay=0.0)
    assert all(list(together.spans(client)) == list(Synchronous(**RUN).spans("any")) for client in CLIENTS)
    never = Growing(**RUN, start=1.0, stay=1.0)
    assert all(list(never.spans(client)) == [Span(0, 0, 12)] for client in CLIENTS)


def test_availability_draws_who_has_a_task() -> None:
    schedule = Availability(**RUN, share=0.25)
    curriculum = Curriculum(ClassIncremental(num_classes=4, input_shape=(4,), seed=0, num_tasks=4), schedule)
    groups = [frozenset(curriculum.active(CLIENTS, server_round)) for server_round in range(12)]
    assert all(len(group) == 3 for group in groups)
    assert [len(set(groups[3 * task : 3 * task + 3])) for task in range(4)] == [1] * 4
    assert len(set(groups)) > 1
    assert len(Availability(**{**RUN, "clients": CLIENTS[:1]}, share=0.1).spans("0")) == 4


def test_a_curriculum_tells_who_is_where_and_what_it_has_seen() -> None:
    stream = ClassIncremental(num_classes=8, input_shape=(4,), seed=0, num_tasks=4)
    schedule = Shifted(num_tasks=4, rounds_per_task=2, clients=["a", "b"], seed=0, max_lag=3)
    curriculum = Curriculum(stream, schedule)
    early, late = sorted(["a", "b"], key=lambda client: schedule.spans(client)[0].start)
    assert [curriculum.active(["a", "b"], r) for r in (0, 3, 10)] == [[early], ["a", "b"], [late]]
    assert curriculum.ended(["a", "b"], 1) == {early: 0}
    assert curriculum.ended(["a", "b"], 4) == {late: 0}
    assert curriculum.seen(["a", "b"], 4) == [0, 1, 2]
    task = curriculum.task(late, 4)
    assert task is not None
    assert (task.id, task.mask) == (0, (0, 1))
    assert curriculum.task(late, 0) is curriculum.task(early, 10) is None


def test_an_online_stream_shows_another_part_in_each_round() -> None:
    stream = ClassIncremental(num_classes=2, input_shape=(4,), seed=0, num_tasks=1, online=True)
    curriculum = Curriculum(stream, Synchronous(num_tasks=1, rounds_per_task=4))
    parts = [curriculum.task("a", r) for r in range(4)]
    assert [part.portions for part in parts if part] == [((k / 4, (k + 1) / 4),) * 2 for k in range(4)]
    whole = curriculum.whole_task("a", 2)
    assert whole is not None
    assert whole.portions is None
