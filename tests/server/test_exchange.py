from __future__ import annotations

from asyncio import CancelledError
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict

from fedcl.base.interruption import Interrupted, Terminated, interruptible
from fedcl.client.runtime import ClientRuntime
from fedcl.client.state import NEVER, ClientStateStore
from fedcl.contracts.fields import MODEL, TensorField
from fedcl.contracts.learner import Context, Payload, Plugin, State
from fedcl.contracts.strategy import Collaboration
from fedcl.contracts.view import Query
from fedcl.messages import Reply, Request
from fedcl.server.strategy import Outgoing, Pipeline
from fedcl.simulation.host import ClientHost, Failure

BAD = "1"  # the client at fault throughout


class Counter(Plugin):
    """Counts its client's committed visits."""

    def __init__(self) -> None:
        self.count = 0

    def load(self, state: State) -> None:
        self.count = state.get("count", 0)

    def state(self) -> State:
        return {"count": self.count}

    def after_round(self, ctx: Context) -> dict[str, torch.Tensor]:
        self.count += 1
        return {}


class Raises(Counter):
    """Fails at one client after its state has changed."""

    def after_round(self, ctx: Context) -> dict[str, torch.Tensor]:
        super().after_round(ctx)
        if ctx.client == BAD:
            raise RuntimeError("out of memory, say")
        return {}


def garbling(change: Callable[[Reply], Reply]) -> type[ClientRuntime]:
    """Return a runtime whose client BAD changes each train reply; its state is staged as ever."""

    class Garbling(ClientRuntime):
        def train(self, requests: Sequence[Request], store: ClientStateStore) -> Iterator[Reply | Exception]:
            for request, reply in zip(requests, super().train(requests, store), strict=True):
                yield change(reply) if request.client == BAD and isinstance(reply, Reply) else reply

    return Garbling


def forging(change: Callable[[RecordDict], None]) -> type[ClientHost]:
    """Return a host that changes the content of BAD's reply messages."""

    class Forging(ClientHost):
        def run(self, content: RecordDict) -> Iterator[tuple[str, RecordDict | Failure]]:
            for client, reply in super().run(content):
                if client == BAD and isinstance(reply, RecordDict):
                    change(reply)
                yield client, reply

    return Forging


class Leaving(Counter):
    """Ends the process, or would, at one client and one hook."""

    def __init__(self, hook: str, error: type[BaseException]) -> None:
        super().__init__()
        self.hook, self.error = hook, error

    def _at(self, hook: str, ctx: Context) -> None:
        if (ctx.client, self.hook) == (BAD, hook):
            raise self.error("leaving")

    def setup(self, ctx: Context) -> None:
        self._at("setup", ctx)

    def before_round(self, ctx: Context) -> None:
        self._at("before_round", ctx)

    def after_step(self, ctx: Context) -> None:
        self._at("after_step", ctx)

    def after_round(self, ctx: Context) -> dict[str, torch.Tensor]:
        self._at("after_round", ctx)
        return super().after_round(ctx)


class Mute(BaseException):
    def __str__(self) -> str:
        raise SystemExit("not even this")


@pytest.mark.parametrize("cohorts", [True, False])
@pytest.mark.parametrize("error", [SystemExit, GeneratorExit, KeyboardInterrupt, CancelledError, Mute])
@pytest.mark.parametrize("hook", ["setup", "before_round", "after_step", "after_round"])
def test_a_client_that_leaves_costs_its_own_reply(
    build: Any, hook: str, error: type[BaseException], cohorts: bool
) -> None:
    with interruptible():  # as in every run: Ctrl-C does not come as a bare KeyboardInterrupt then
        system = build(plugins={"counter": lambda: Leaving(hook, error)}, cohorts=cohorts).run()
    assert_only_bad_is_missing(system, "client_failed", error.__name__)


@pytest.mark.parametrize("error", [Interrupted(), Terminated(143)])
def test_a_person_who_insists_is_no_fault_of_a_client(build: Any, error: BaseException) -> None:
    def leave(text: str) -> BaseException:
        return error

    with pytest.raises(type(error)):
        build(plugins={"counter": lambda: Leaving("after_step", leave)}).run()  # type: ignore[arg-type]


def test_an_exceptions_text_is_cleaned_and_cut(build: Any) -> None:
    class Odd(Counter):
        def before_round(self, ctx: Context) -> None:
            if ctx.client == BAD:
                raise ValueError("\ud800\x1b[2J\u202e" + "x" * 10**6)

    system = build(plugins={"counter": Odd}).run()
    assert_only_bad_is_missing(system, "client_failed", r"ValueError: \ud800\x1b[2J\u202exxx")
    assert {len(event["reason"]) for event in system.events("client_failed")} == {500}


class Nonsense(Counter):
    """Returns at one client what no message can hold."""

    def after_round(self, ctx: Context) -> Any:
        super().after_round(ctx)
        return {"x": object(), 3: None} if ctx.client == BAD else {}


@pytest.mark.parametrize("cohorts", [True, False])
def test_what_fits_in_no_message_costs_its_own_reply(build: Any, cohorts: bool) -> None:
    system = build(plugins={"counter": Nonsense}, cohorts=cohorts).run()
    assert_only_bad_is_missing(system, "client_failed", "Error")


def spoil(position: int, value: float) -> Callable[[Reply], Reply]:
    def change(reply: Reply) -> Reply:
        assert reply.model is not None
        model = reply.model.clone()
        model[position] = value
        return replace(reply, model=model)

    return change


def assert_only_bad_is_missing(system: Any, kind: str, names: str) -> None:
    """Four rounds were played; BAD's four replies were refused by name; the rest trained and its state counts."""
    events = system.events(kind)
    assert [(e["client"], e["round"], e["message"]) for e in events] == [(BAD, r, "train") for r in range(4)]
    for event in events:
        assert names in event["reason"]
    assert len(system.notes.events) == 4
    assert system.server.version == 4
    assert bool(torch.isfinite(system.server.global_model).all())
    trained = {row["client"] for row in system.notes.rows if row["name"] == "num_examples"}
    assert trained == {"0", "2", "3"}
    assert system.exchange.visits[BAD] == 4  # every visit has a number of its own
    assert system.exchange.committed.get(BAD, NEVER) == NEVER
    assert system.store.load("0", system.exchange.committed["0"])["plugins"]["counter"] == {"count": 4}


@pytest.mark.parametrize("cohorts", [True, False])
def test_a_client_that_raises_costs_its_own_reply(build: Any, cohorts: bool) -> None:
    system = build(plugins={"counter": Raises}, cohorts=cohorts).run()
    assert_only_bad_is_missing(system, "client_failed", "RuntimeError: out of memory, say")


@pytest.mark.parametrize("cohorts", [True, False])
@pytest.mark.parametrize(
    ("change", "names"),
    [
        (spoil(0, float("nan")), "tensor hidden.0.weight holds nan at position 0"),
        (spoil(12, float("inf")), "tensor hidden.0.bias holds inf at position 0"),
        (lambda reply: replace(reply, model=reply.model[:1]), "shape (1,)"),
        (lambda reply: replace(reply, model=reply.model[None]), "shape (1, 31)"),
        (lambda reply: replace(reply, model=reply.model.double()), "torch.float64"),
        (lambda reply: replace(reply, model=None), "no model"),
        (lambda reply: replace(reply, num_examples=-3), "num_examples=-3"),
        (lambda reply: replace(reply, num_examples=10**12), "num_examples=1000000000000"),
        (lambda reply: replace(reply, num_examples=float("nan")), "num_examples=nan"),
        (lambda reply: replace(reply, num_examples=float("inf")), "num_examples=inf"),
        (lambda reply: replace(reply, num_examples=2.5), "num_examples=2.5"),
        (lambda reply: replace(reply, metrics={"loss": float("nan")}), "metric loss"),
        (lambda reply: replace(reply, metrics={}), "metric loss is missing"),
        (lambda reply: replace(reply, metrics=reply.metrics | {"surprise": 1.0}), "surprise"),
        (lambda reply: replace(reply, payload={"gift": torch.ones(2)}), "gift"),
        (lambda reply: replace(reply, note="[]"), "unexpected note"),
    ],
)
def test_a_reply_at_fault_is_rejected_by_name(build: Any, cohorts: bool, change: Any, names: str) -> None:
    system = build(plugins={"counter": Counter}, runtime_class=garbling(change), cohorts=cohorts).run()
    assert_only_bad_is_missing(system, "reply_rejected", names)


def extra_key(content: RecordDict) -> None:
    content.array_records["arrays"]["more"] = Array(np.zeros(1, np.float32))


def other_key(content: RecordDict) -> None:
    content["arrays"] = ArrayRecord({"weights": content["arrays"]["flat"]})


def extra_record(content: RecordDict) -> None:
    content["secrets"] = MetricRecord({"a": 1})


def no_metrics(content: RecordDict) -> None:
    del content["metrics"]


def no_weight(content: RecordDict) -> None:
    content["metrics"] = MetricRecord({"loss": 1.0})


def list_weight(content: RecordDict) -> None:
    content["metrics"] = MetricRecord({"num-examples": [1, 2]})


def raw(data: bytes, dtype: str = "float32", stype: str = "numpy.ndarray") -> Callable[[RecordDict], None]:
    def change(content: RecordDict) -> None:
        content["arrays"] = ArrayRecord({"flat": Array(dtype, (31,), stype, data)})

    return change


def strings(content: RecordDict) -> None:
    content["arrays"] = ArrayRecord({"flat": Array(np.array(["a"] * 31))})


GOOD = Array(np.zeros(31, np.float32)).data


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (extra_key, "['flat', 'more']"),
        (other_key, "['weights']"),
        (extra_record, "unknown record 'secrets'"),
        (no_metrics, "no 'metrics' record"),
        (no_weight, "'num-examples'"),
        (list_weight, "num_examples=[1, 2]"),
        (raw(b""), "unreadable 'flat'"),
        (raw(b"garbage"), "unreadable 'flat'"),
        (raw(GOOD[:-9]), "unreadable 'flat'"),
        (
            raw(
                GOOD.replace(
                    b"(31,)",
                    b"(9**",
                ),
                stype="numpy.ndarray",
            ),
            "unreadable 'flat'",
        ),
        (raw(GOOD, stype="pickle"), "unreadable 'flat'"),
        (strings, "unreadable 'flat'"),
    ],
)
def test_a_malformed_message_is_rejected_by_name(build: Any, change: Any, names: str) -> None:
    system = build(plugins={"counter": Counter}, host_class=forging(change)).run()
    assert_only_bad_is_missing(system, "reply_rejected", names)


def test_a_pickle_is_not_opened(build: Any, tmp_path: Any) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (open, (str(tmp_path / "exploded"), "w"))

    from io import BytesIO

    buffer = BytesIO()
    np.save(buffer, np.array([Bomb()], dtype=object), allow_pickle=True)
    system = build(plugins={"counter": Counter}, host_class=forging(raw(buffer.getvalue(), dtype="object"))).run()
    assert_only_bad_is_missing(system, "reply_rejected", "unreadable 'flat'")
    assert not (tmp_path / "exploded").exists()


def test_a_second_reply_to_one_message_is_dropped(build: Any) -> None:
    class Repeats(ClientHost):
        def run(self, content: RecordDict) -> Iterator[tuple[str, RecordDict | Failure]]:
            for client, reply in super().run(content):
                yield client, reply
                if client == BAD and isinstance(reply, RecordDict):
                    again = RecordDict(dict(reply))
                    again["arrays"] = ArrayRecord({"flat": Array(np.full(31, 1e6, np.float32))})
                    yield client, again

    once, twice = build().run(), build(host_class=Repeats).run()
    assert torch.equal(once.server.global_model, twice.server.global_model)
    assert [e["client"] for e in twice.events("reply_rejected")] == [BAD] * 4


def test_a_client_without_samples_of_the_task_takes_no_part_and_keeps_its_state(build: Any) -> None:
    system = build(plugins={"counter": Counter}).run()
    assert system.notes.events == []  # the last client holds nothing of task 1
    rounds = [row["round"] for row in system.notes.rows if row["name"] == "num_examples" and row["client"] == "3"]
    assert rounds == [0, 1]
    assert system.exchange.committed["3"] == 3
    assert system.store.load("3", 3)["plugins"]["counter"] == {"count": 2}


class Sums(Collaboration):
    payloads = (Payload("tally", "up", MODEL),)


def tallying(shape: tuple[int, ...] | None) -> type[Plugin]:
    class Tally(Counter):
        payloads = Sums.payloads

        def after_round(self, ctx: Context) -> dict[str, torch.Tensor]:
            super().after_round(ctx)
            if ctx.client != BAD:
                return {"tally": torch.ones(ctx.model.flat.shape)}
            return {} if shape is None else {"tally": torch.ones(shape)}

    return Tally


@pytest.mark.parametrize(("shape", "names"), [(None, "payload tally is missing"), ((1,), "(1,)"), ((31, 1), "(31, 1)")])
def test_a_declared_payload_must_come_and_fit(build: Any, shape: tuple[int, ...] | None, names: str) -> None:
    strategy = Pipeline(collaboration=Sums())
    strategy.setup(build().server.spec)
    system = build(strategy=strategy, plugins={"counter": tallying(shape)}).run()
    assert_only_bad_is_missing(system, "reply_rejected", names)


def enlarged(factor: float) -> type[Plugin]:
    """Return a plugin that tallies, BAD ``factor`` times as much as the others."""

    class Enlarged(Counter):
        payloads = Sums.payloads
        queries = ("mean",)

        def after_round(self, ctx: Context) -> dict[str, torch.Tensor]:
            super().after_round(ctx)
            return {"tally": torch.full(ctx.model.flat.shape, factor if ctx.client == BAD else 1.0)}

        def respond(self, ctx: Context, name: str, request: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {"mean": torch.full((2,), factor if ctx.client == BAD else 1.0)}

    return Enlarged


@pytest.mark.parametrize("cohorts", [True, False])
def test_a_payload_far_larger_than_the_others_names_its_client(build: Any, cohorts: bool) -> None:
    strategy = Pipeline(collaboration=Sums())
    strategy.setup(build().server.spec)
    plain = build(strategy=strategy, plugins={"tally": enlarged(9.0)}, cohorts=cohorts).run()
    assert plain.notes.events == []
    system = build(strategy=strategy, plugins={"tally": enlarged(11.0)}, cohorts=cohorts).run()
    assert [(e["client"], e["round"], e["payload"]) for e in system.notes.events] == [
        (BAD, r, "tally") for r in range(4)
    ]
    assert all(e["kind"] == "payload_outlier" for e in system.notes.events)
    assert all(e["norm"] == pytest.approx(11 * e["median"]) for e in system.notes.events)


def test_an_answer_far_larger_than_the_others_names_its_client(build: Any) -> None:
    for factor, named in ((9.0, []), (40.0, [(BAD, "mean/mean")])):
        system = build(plugins={"answers": enlarged(factor)})
        models = dict.fromkeys(("0", "1", "2", "3"), system.server.global_model)
        query = Query("mean", models, {"mean": TensorField((2,))})
        task = system.server.curriculum.stream.train_task(0)
        responses = system.exchange.ask(query, lambda client, task=task: task, 0, 0)
        assert len(responses) == 4
        assert [(e["client"], e["payload"]) for e in system.events("payload_outlier")] == named


def test_a_query_is_answered_in_its_order_by_those_with_data(build: Any) -> None:
    class Answers(Plugin):
        queries = ("mean",)

        def respond(self, ctx: Context, name: str, request: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            if ctx.client == "2":
                raise RuntimeError("no")
            return {"mean": ctx.data.x.mean() * request["factor"]}

    system = build(plugins={"answers": Answers})
    model = system.server.global_model
    query = Query(
        "mean", dict.fromkeys(("3", "2", "0", "1"), model), {"mean": TensorField(())}, {"factor": torch.tensor(0.0)}
    )
    responses = system.exchange.ask(query, lambda client: system.server.curriculum.stream.train_task(1), 0, 0)
    assert [(a.client, a.num_examples, a.tensors["mean"].item()) for a in responses] == [("0", 4, 0), ("1", 6, 0)]
    assert [e["client"] for e in system.events("client_failed")] == ["2"]
    assert system.exchange.visits == {}  # a question is no visit
    assert system.exchange.committed == {}


def test_the_same_bits_with_and_without_cohort_messages(build: Any) -> None:
    together = build(plugins={"counter": Counter}, cohorts=True).run()
    apart = build(plugins={"counter": Counter}, cohorts=False).run()
    assert torch.equal(together.server.global_model, apart.server.global_model)
    assert together.notes.rows == apart.notes.rows
    assert together.exchange.bytes_up == apart.exchange.bytes_up
    assert together.exchange.bytes_down == apart.exchange.bytes_down
    per_model = 31 * 4
    assert together.exchange.bytes_down == 4 * 4 * per_model


def test_recipients_with_different_models_or_payloads_share_no_message(build: Any, monkeypatch: Any) -> None:
    system = build()
    sent: list[Any] = []
    push = system.grid.push_messages

    def noting(messages: Any) -> Any:
        sent.extend(messages)
        return push(sent)

    monkeypatch.setattr(system.grid, "push_messages", noting)
    shared, own = torch.zeros(31), torch.ones(31)
    variate = torch.zeros(3)
    outgoing = [
        Outgoing("0", "*", shared, {"c": variate}),
        Outgoing("1", "*", shared, {"c": variate}),
        Outgoing("2", "2", own, {"c": variate}),
        Outgoing("3", "*", shared, {"c": variate.clone()}),
    ]
    task = system.server.curriculum.stream.train_task(0)
    replies = system.exchange.tell("evaluate", outgoing, lambda _: task, 0, 0)
    assert [m.content["fedcl"]["clients"] for m in sent] == [["0", "1"], ["2"], ["3"]]
    assert [m.metadata.dst_node_id for m in sent] == [100, 102, 103]
    assert list(replies) == ["0", "1", "2", "3"]
