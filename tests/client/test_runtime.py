from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fedcl.base.tree import clone, equal
from fedcl.client.runtime import ClientRuntime
from fedcl.client.session import check_learner
from fedcl.client.state import NEVER, MemoryStateStore
from fedcl.contracts.learner import Batch, Context, Plugin, State
from fedcl.messages import Reply, Request
from fedcl.models.networks import Output
from fedcl.scenario.task import Task

TASKS = [Task(0, (0, 1), (0, 1), mask=(0, 1)), Task(1, (2, 3), (2, 3), mask=(0, 1, 2, 3))]
Make = Callable[..., ClientRuntime]


class Counter(Plugin):
    """Counts visits and steps, and keeps the last batch's sum in a tensor it writes in place."""

    queries = ("count",)

    def __init__(self, *, fail_at: int = -1) -> None:
        self.fail_at = fail_at
        self.log: list[str] = []
        self.total = torch.zeros(1)
        self.visits = 0

    def setup(self, ctx: Context) -> None:
        self.total = self.total.to(ctx.device)

    def before_task(self, ctx: Context) -> None:
        self.log.append(f"before_task {ctx.task.id}")

    def before_round(self, ctx: Context) -> None:
        self.log.append(f"before_round {ctx.local_round}")

    def after_round(self, ctx: Context) -> dict[str, Tensor]:
        self.visits += 1
        self.log.append(f"after_round {sorted(ctx.task_columns)}")
        return {}

    def after_task(self, ctx: Context) -> None:
        self.log.append(f"after_task {ctx.task.id} {torch.equal(ctx.model.flat, ctx.received)}")

    def before_step(self, ctx: Context, batch: Batch) -> Batch:
        self.total += batch.x.sum()
        if ctx.step == self.fail_at:
            raise ArithmeticError("the client broke")
        return batch

    def respond(self, ctx: Context, name: str, request: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"count": torch.tensor([float(self.visits)]) + request["plus"]}

    def state(self) -> State:
        return {"log": self.log, "total": self.total, "visits": self.visits}

    def load(self, state: State) -> None:
        if state:
            self.log, self.total, self.visits = state["log"], state["total"], state["visits"]


def ask(
    runtime: ClientRuntime,
    store: MemoryStateStore,
    kind: str,
    *,
    task: int = 0,
    visit: int = 0,
    committed: int = NEVER,
    client: str = "0",
    model: Tensor | None = None,
    **extra: Any,
) -> Reply:
    sent = torch.linspace(-0.5, 0.5, runtime.model.spec.size) if model is None else model
    request = Request(kind, client, visit, committed, 0, 0, TASKS[task], model=sent, **extra)  # type: ignore[arg-type]
    return runtime.visit(request, store)


def test_the_life_of_a_client(make_runtime: Make) -> None:
    runtime, store = make_runtime({"counter": Counter}), MemoryStateStore()
    script = [("train", 0), ("train", 0), ("task_end", 0), ("train", 1)]
    for visit, (kind, task) in enumerate(script):
        ask(runtime, store, kind, task=task, visit=visit, committed=visit - 1)
        store.commit("0", visit)
    state = store.load("0", 3)
    assert state["plugins"]["counter"]["log"] == [
        "before_task 0", "before_round 0", "after_round [0]", "before_round 1", "after_round [0]",
        "after_task 0 True", "before_task 1", "before_round 3", "after_round [0, 1]",
    ]  # fmt: skip
    assert state["tasks"] == {"0": [0, 1], "1": [2, 3]}
    response = ask(runtime, store, "query", committed=3, name="count", payload={"plus": torch.tensor([0.5])})
    assert response.payload["count"].tolist() == [3.5]
    assert response.num_examples == 15


def test_a_retried_visit_starts_again_and_ends_the_same(make_runtime: Make) -> None:
    runtime, store = make_runtime({"counter": Counter}), MemoryStateStore()
    ask(runtime, store, "train")
    store.commit("0", 0)
    first = ask(runtime, store, "train", visit=1, committed=0)
    staged = clone(store.load("0", 1))
    again = ask(runtime, store, "train", visit=1, committed=0)
    assert equal(store.load("0", 1), staged)
    assert first.model is not None
    assert again.model is not None
    assert torch.equal(first.model, again.model)
    assert store.load("0", 0)["plugins"]["counter"]["visits"] == 1


def test_a_rejected_visit_leaves_no_trace(make_runtime: Make) -> None:
    runtime, store = make_runtime({"counter": Counter}), MemoryStateStore()
    for visit in range(3):  # the server accepts none of them
        store.commit("0", NEVER)
        ask(runtime, store, "train", visit=visit, committed=NEVER)
        assert store.load("0", visit)["plugins"]["counter"]["log"][0] == "before_task 0"
        assert store.load("0", visit)["plugins"]["counter"]["visits"] == 1


@pytest.mark.parametrize("step", [0, 2])
def test_a_client_that_raises_leaves_its_state_untouched(make_runtime: Make, step: int) -> None:
    store = MemoryStateStore()
    ask(make_runtime({"counter": Counter}), store, "train")
    store.commit("0", 0)
    before = clone(store.load("0", 0))
    broken = make_runtime({"counter": lambda: Counter(fail_at=step)})
    with pytest.raises(ArithmeticError, match="the client broke"):
        ask(broken, store, "train", visit=1, committed=0)
    assert equal(store.load("0", 0), before)
    assert not store.has("0", 1)


def test_state_in_the_store_is_on_the_cpu_and_shared_with_nobody(make_runtime: Make) -> None:
    kept: list[Tensor] = []

    class Leaky(Counter):
        def state(self) -> State:
            kept.append(self.total)
            return super().state()

    store = MemoryStateStore()
    ask(make_runtime({"leaky": Leaky}), store, "train")
    total = store.load("0", 0)["plugins"]["leaky"]["total"]
    assert total.device.type == "cpu"
    before = total.clone()
    kept[0].add_(1.0)
    assert torch.equal(total, before)


def test_what_was_sent_is_never_written_to(make_runtime: Make) -> None:
    runtime = make_runtime()
    sent = torch.linspace(-0.5, 0.5, runtime.model.spec.size)
    kept = sent.clone()
    reply = ask(runtime, MemoryStateStore(), "train", model=sent)
    assert reply.model is not None
    assert torch.equal(sent, kept)
    assert not torch.equal(reply.model, sent)


def test_clients_differ_and_the_runtime_remembers_none(make_runtime: Make) -> None:
    runtime, store = make_runtime({"counter": Counter}), MemoryStateStore()
    alone = ask(make_runtime({"counter": Counter}), MemoryStateStore(), "train", client="1")
    first = ask(runtime, store, "train", client="0")
    after = ask(runtime, store, "train", client="1")
    assert alone.model is not None
    assert after.model is not None
    assert first.model is not None
    assert torch.equal(alone.model, after.model)
    assert not torch.equal(first.model, after.model)
    assert (first.num_examples, after.num_examples) == (15, 1)


def test_no_samples_no_training(make_runtime: Make) -> None:
    runtime, store = make_runtime({"counter": Counter}), MemoryStateStore()
    sent = torch.linspace(-0.5, 0.5, runtime.model.spec.size)
    reply = ask(runtime, store, "train", client="2", model=sent)
    assert reply.num_examples == 0
    assert reply.model is not None
    assert torch.equal(reply.model.cpu(), sent)
    assert store.load("2", 0)["plugins"]["counter"]["log"] == []
    assert ask(runtime, store, "task_end", client="2", visit=1).num_examples == 0
    assert ask(runtime, store, "query", client="2", name="count", payload={}).payload == {}


def test_personal_accuracy_before_and_after_training(make_runtime: Make) -> None:
    plain = ask(make_runtime(), MemoryStateStore(), "train").metrics
    assert set(plain) == {"loss", "loss_first", "steps", "samples_trained"}
    metrics = ask(make_runtime(personal=True), MemoryStateStore(), "train").metrics
    assert set(metrics) == {"loss", "loss_first", "steps", "samples_trained", "accuracy_received", "accuracy_trained"}
    assert metrics["accuracy_trained"] >= metrics["accuracy_received"]
    assert metrics["loss_first"] == plain["loss_first"]
    reply = ask(make_runtime(), MemoryStateStore(), "evaluate")
    assert reply.metrics["accuracy"] == metrics["accuracy_received"]
    assert reply.num_examples == 8
    assert ask(make_runtime(), MemoryStateStore(), "evaluate", client="2").num_examples == 0


def test_random_draws_are_keyed_by_seed_client_local_round_and_purpose(make_context: Callable[..., Context]) -> None:
    def draw(purpose: str = "batches", **key: Any) -> list[float]:
        return torch.rand(4, generator=make_context(**key).rng(purpose)).tolist()

    assert draw() == draw()
    others = [draw(seed=1), draw(client="1"), draw(local_round=1), draw("replay")]
    assert all(other != draw() for other in others)
    assert len({tuple(other) for other in others}) == 4
    ctx = make_context()
    assert ctx.rng("a") is ctx.rng("a")  # one stream goes on
    state = torch.random.get_rng_state()
    ctx.rng("b").manual_seed(1)
    assert torch.equal(torch.random.get_rng_state(), state)


class Other(Counter):
    pass


class OwnObjective(Plugin):
    def objective(self, ctx: Context, batch: Batch, out: Output) -> Tensor:
        return out.logits.sum()


class OwnObjectiveToo(OwnObjective):
    pass


def test_learners_that_cannot_live_together_are_refused_before_anything_runs() -> None:
    check_learner({"a": Counter, "b": OwnObjective})
    with pytest.raises(ValueError, match="Counter and Other both respond to 'count'"):
        check_learner({"a": Counter, "b": Other})
    with pytest.raises(ValueError, match="OwnObjective and OwnObjectiveToo both define 'objective'"):
        check_learner({"a": OwnObjective, "b": OwnObjectiveToo})


def test_messages_that_make_no_sense(make_runtime: Make) -> None:
    runtime, store = make_runtime({"counter": Counter}), MemoryStateStore()
    with pytest.raises(ValueError, match="no plugin of this client responds to 'colour'"):
        ask(runtime, store, "query", name="colour")
    with pytest.raises(ValueError, match="cannot respond to a message of kind 'hello'"):
        ask(runtime, store, "hello")
    with pytest.raises(ValueError, match="needs a model and a task"):
        runtime.visit(Request("train", "0", 0, NEVER, 0, 0, TASKS[0]), store)
    with pytest.raises(ValueError, match="vector has shape"):
        ask(runtime, store, "train", model=torch.zeros(3))
    with pytest.raises(KeyError):
        ask(runtime, store, "train", visit=5, committed=4)
