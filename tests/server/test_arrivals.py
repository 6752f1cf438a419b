from __future__ import annotations

import itertools
import time
from typing import Any

import pytest
import torch
from flwr.app import Message, RecordDict

from fedcl.base.tree import equal, pack, unpack
from fedcl.contracts.learner import Context, Plugin, State
from fedcl.contracts.strategy import GLOBAL
from fedcl.server.arrivals import VirtualClock, WallClock
from fedcl.server.rounds import RoundFailed
from fedcl.simulation.devices import DeviceProfile


class Counter(Plugin):
    """Remembers how many of its visits counted."""

    def __init__(self) -> None:
        self.count = 0

    def before_round(self, ctx: Context) -> None:
        self.count += 1

    def after_task(self, ctx: Context) -> None:
        self.count += 100

    def state(self) -> State:
        return {"count": self.count}

    def load(self, state: State) -> None:
        self.count = state.get("count", 0)


def slow(seconds: dict[str, float], **more: Any) -> Any:
    """Return devices with these latencies in seconds, for clients named; the others take one second."""
    return lambda client: DeviceProfile(latency=seconds.get(client, 1.0), **more)


def ages(system: Any) -> list[tuple[int, str, float]]:
    return [(row["round"], row["client"], row["value"]) for row in system.notes.rows if row["name"] == "age"]


def test_a_synchronous_round_lasts_as_long_as_its_slowest_client(build: Any) -> None:
    system = build(device=slow({"2": 7.0})).run()
    times = {row["round"]: row["virtual_time"] for row in system.notes.rows if row["name"] == "num_examples"}
    assert times == {0: 7.0, 1: 14.0, 2: 21.0, 3: 28.0}
    assert ages(system) == []


def test_time_alone_changes_no_model(build: Any) -> None:
    prompt, late = build().run(), build(device=slow({"0": 3.0, "3": 0.5})).run()
    assert torch.equal(prompt.server.global_model, late.server.global_model)


def test_with_a_deadline_late_replies_come_into_later_rounds(build: Any) -> None:
    system = build(device=slow({"1": 3.5}), deadline=2.0, finished_task="keep").run()
    # client 1 is sent in round 0 at 0.0 s and due at 3.5 s; round 0 closes at 2.0 s without it
    late = [(round_, age) for round_, client, age in ages(system) if client == "1"]
    assert late == [(1, 1.0), (3, 1.0)]
    assert system.server.now == 7.0  # rounds 1 and 3 end with client 1's reply, the last in flight
    assert all(age == 0 for _, client, age in ages(system) if client != "1")


def test_a_deadline_that_everybody_meets_is_a_synchronous_round(build: Any) -> None:
    sync, deadline = build().run(), build(deadline=100.0, device=slow({})).run()
    assert torch.equal(sync.server.global_model, deadline.server.global_model)
    assert deadline.server.now == 4.0  # nothing is waited for once all are there


def test_a_buffer_closes_a_round_at_the_kth_update(build: Any) -> None:
    system = build(device=slow({"0": 1.0, "1": 2.0, "2": 3.0, "3": 10.0}), buffer=2, finished_task="keep").run()
    rows = [(row["round"], row["client"], row["virtual_time"]) for row in system.notes.rows if row["name"] == "age"]
    # at 2.0 s clients 0 and 1 are sent again, so round 1 closes with 0 and 2 at 3.0 s, round 2 with 0 and 1 at 4.0 s
    assert rows == [(0, "0", 2.0), (0, "1", 2.0), (1, "0", 3.0), (1, "2", 3.0), (2, "0", 4.0), (2, "1", 4.0), *rows[6:]]
    assert len(rows) == 8
    assert ages(system)[3] == (1, "2", 1.0)
    came = [(row["client"], row["value"]) for row in system.notes.rows if row["name"] == "arrival"]
    assert came[:6] == [("0", 1.0), ("1", 2.0), ("0", 3.0), ("2", 3.0), ("0", 4.0), ("1", 4.0)]


def test_a_buffer_of_one_is_fully_asynchronous(build: Any) -> None:
    system = build(device=slow({"3": 1.5}), buffer=1, finished_task="keep").run()
    assert [client for _, client, _ in ages(system)] == ["0", "1", "2", "3"]
    assert [age for _, _, age in ages(system)] == [0.0, 1.0, 2.0, 3.0]
    assert system.server.version == 4


def test_updates_beyond_the_maximum_age_and_of_finished_tasks_are_dropped_and_counted(build: Any) -> None:
    system = build(plugins={"counter": Counter}, device=slow({"1": 3.5}), deadline=2.0, max_age=0).run()
    reasons = [(event["round"], event["client"], event["reason"]) for event in system.events("update_dropped")]
    assert reasons == [(1, "1", "older than async.max_age=0"), (3, "1", "older than async.max_age=0")]
    assert "1" not in system.exchange.committed or system.exchange.committed["1"] == 0
    other = build(device=slow({"1": 4.5}), deadline=2.0).run()
    assert [event["reason"] for event in other.events("update_dropped")] == ["task 0 is over"]


def test_one_message_a_client_is_in_flight(build: Any) -> None:
    system = build(device=slow({"1": 3.5}), deadline=2.0).run()
    assert system.exchange.visits["1"] == 2
    task = system.server.curriculum.stream.train_task(0)
    recipients = [(out, system.exchange.request("train", out, task, 0, 0)) for out in system.server._outgoing(["0"])]
    system.server.arrivals.dispatch(recipients, 0)
    with pytest.raises(ValueError, match="already has a message in flight"):
        system.server.arrivals.dispatch(recipients, 0)


def test_a_client_away_at_a_tasks_end_concludes_it_when_it_is_back(build: Any) -> None:
    system = build(
        plugins={"counter": Counter},
        device=slow({"1": 4.5}),
        deadline=2.0,
        boundary_visits=True,
        finished_task="keep",
    ).run()
    # task 0 ends at 4.0 s with client 1 on its way; at 6.0 s it is back, its update counts, and it concludes task 0
    first = system.store.load("1", system.exchange.committed["1"])["plugins"]["counter"]["count"]
    assert first == 101
    assert system.server.state.pending_task_end == {
        "1": 3
    }  # the last round ends the last task with it on its way again


def test_availability_moves_the_clock_and_nothing_else_does(build: Any) -> None:
    night = DeviceProfile(period=100.0, duty=0.1, phase=50.0)  # there in [50, 60), [150, 160), ...
    system = build(device=lambda client: night).run()
    times = sorted({row["virtual_time"] for row in system.notes.rows if row["name"] == "num_examples"})
    assert times == [50.0]


def test_a_device_that_drops_out_costs_its_reply(build: Any) -> None:
    system = build(device=lambda client: DeviceProfile(latency=2.0, dropout=1.0 if client == "2" else 0.0)).run()
    failed = system.events("client_failed")
    assert {event["client"] for event in failed} == {"2"}
    assert {event["reason"] for event in failed} == {"the device dropped out"}
    assert system.server.version == 4


def test_when_every_device_drops_out_the_run_stops(build: Any) -> None:
    with pytest.raises(RoundFailed):
        build(device=lambda client: DeviceProfile(dropout=1.0)).run()


def test_an_edit_outdates_what_is_in_flight(build: Any) -> None:
    system = build(device=slow({"1": 3.5}), deadline=2.0)

    def edit(server_round: int) -> None:
        if server_round == 0:
            system.server.edit({GLOBAL: system.server.global_model})

    system.server.run(edit)
    assert system.events("update_dropped")[0]["reason"] == "the model was edited since"


@pytest.mark.parametrize(
    "mode",
    [{}, {"deadline": 2.0}, {"buffer": 2}, {"buffer": 1, "max_age": 2}],
    ids=["sync", "deadline", "buffer", "async"],
)
@pytest.mark.parametrize("stop", [0, 1, 2])
def test_resumed_with_messages_in_flight_equals_uninterrupted(build: Any, mode: dict[str, Any], stop: int) -> None:
    settings = {
        "plugins": {"counter": Counter},
        "device": slow({"1": 3.5, "3": 1.25}),
        "boundary_visits": True,
        "finished_task": "keep",
        **mode,
    }
    whole, cut, resumed = build(**settings), build(**settings), build(**settings)
    whole.run()
    saved: dict[str, Any] = {}

    def note(server_round: int) -> None:
        if server_round == stop:
            saved["server"] = pack(cut.server.state_dict())
            saved["clients"] = {c: (v, cut.store.load(c, v)) for c, v in cut.exchange.committed.items()}

    cut.server.run(note)
    for client, (visit, state) in saved["clients"].items():
        resumed.store.stage(client, visit, state)
    resumed.server.load_state_dict(unpack(*saved["server"]))
    resumed.run()
    assert equal(resumed.server.state_dict(), whole.server.state_dict())
    after = [row for row in whole.notes.rows if row["round"] > stop]
    assert [row for row in resumed.notes.rows if row["round"] > stop] == after


def test_bases_are_kept_only_while_someone_trains_from_them(build: Any) -> None:
    system = build(device=slow({"1": 3.5}), deadline=2.0)
    kept: list[int] = []
    system.server.run(lambda _: kept.append(len({id(f.out.model) for f in system.server.arrivals.flights.values()})))
    assert kept == [1, 0, 1, 0]


def test_the_virtual_clock_never_goes_back() -> None:
    clock = VirtualClock()
    clock.advance(5.0)
    clock.advance(3.0)
    assert clock.now == 5.0


@pytest.mark.parametrize("mode", [{}, {"buffer": 2}, {"deadline": 30.0}], ids=["sync", "buffer", "deadline"])
def test_the_same_loop_takes_a_wall_clock(build: Any, mode: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    reads = itertools.count(1000.0)  # a second passes from each look at the clock to the next
    monkeypatch.setattr(time, "monotonic", lambda: next(reads))
    system = build(finished_task="keep", **mode)
    system.server.arrivals.clock = WallClock()
    system.run()
    assert system.server.version == 4
    assert 0.0 < system.server.now < next(reads) - 1000.0
    counted = [row for row in system.notes.rows if row["name"] == "num_examples"]
    assert len(counted) == (8 if mode.get("buffer") else 4 + 4 + 3 + 3)  # client 3 has nothing of the second task


def test_a_wall_clock_goes_on_where_a_resumed_run_stopped() -> None:
    clock = WallClock()
    clock.advance(0.05)
    first = clock.now
    assert first >= 0.05
    assert WallClock(now=first + 100.0).now >= first + 100.0


def test_ten_thousand_seconds_of_waiting_cost_none(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def sleep(seconds: float) -> None:
        raise AssertionError(f"slept {seconds} s")

    monkeypatch.setattr(time, "sleep", sleep)
    assert build(device=slow({"2": 2500.0})).run().server.now == 10_000.0


def test_a_fault_stands_at_the_time_it_was_known(build: Any) -> None:
    # a visit takes three steps of two seconds, so that round r is over at 6 (r + 1)
    system = build(device=lambda client: DeviceProfile(step_seconds=2.0, dropout=1.0 if client == "1" else 0.0)).run()
    lost = [(event["round"], event["virtual_time"]) for event in system.events("client_failed")]
    assert lost == [(0, 6.0), (1, 12.0), (2, 18.0), (3, 24.0)]
    system.exchange._read([Message(RecordDict(), dst_node_id=7, message_type="train")])
    [event] = system.events("reply_rejected")
    assert (event["round"], event["virtual_time"]) == (4, 24.0)
