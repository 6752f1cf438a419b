"""EWC, MAS and SI with importances summed over clients: what many clients hold is worth what one would make of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from clients.learners.ewc import EWC
from clients.learners.mas import MAS
from clients.learners.quadratic import summands, summed
from clients.learners.si import SI
from fedcl.contracts.learner import Batch, Context, Plugin, TaskData
from fedcl.contracts.requests import ForgetRequest
from fedcl.contracts.statistics import Statistics
from fedcl.contracts.view import Query, Response
from fedcl.messages import Reply
from fedcl.models.flat import FlatModel
from fedcl.models.networks import MLP, Output
from fedcl.scenario.task import Task
from fedcl.server.validation import Expected, rejection

NOTHING: tuple[Batch, Output] = (None, None)  # type: ignore[assignment]


def context(device: torch.device, rows: slice = slice(None), *, task: int = 0, shift: float = 0.0) -> Context:
    """A client that holds some rows of a task's samples, with the model that the task ended with."""
    generator = torch.Generator().manual_seed(10 * task)
    x = torch.randn(12, 3, generator=generator).to(device)[rows]
    y = torch.arange(12, device=device)[rows] % 2 + 2 * task
    module = MLP(input_shape=(3,), heads=(4,), hidden=(5,))
    model = FlatModel(module, device=device)
    with torch.no_grad():
        model.flat.copy_(torch.linspace(-1.0, 1.0, model.spec.size) + shift)
    columns = (2 * task, 2 * task + 1)
    return Context(
        model=model, task=Task(task, columns, columns), data=TaskData(x, y), received=model.vector(), epochs=1,
        batch_size=4, lr=0.1, seed=0, client="0", local_round=0, is_new_task=True, task_columns={task: columns},
        num_columns=4,
    )  # fmt: skip


def message(learner: type[Plugin], tasks: Sequence[Sequence[Context]]) -> dict[str, Tensor]:
    """Return what the server sends along after each task's clients, in turn, have been asked."""
    statistics = Statistics([build(learner)])
    for clients in tasks:
        (query,) = statistics.queries({str(i): ctx.received for i, ctx in enumerate(clients)})
        responses = []
        for i, ctx in enumerate(clients):
            plugin = build(learner)
            plugin.setup(ctx)
            responses.append(Response(str(i), len(ctx.data), plugin.respond(ctx, query.name, {})))
            came = Reply(len(ctx.data), payload=responses[-1].tensors)
            assert rejection(came, Expected.of("query", ctx.model.spec, query.response)) is None
        statistics.consume(query, responses)
    return statistics.message()


def build(learner: type[Plugin]) -> Plugin:
    return EWC(weight=3.0, mode="separate", aggregate=True) if learner is EWC else MAS(weight=3.0, aggregate=True)


def pull(plugin: Plugin, ctx: Context, payload: dict[str, Tensor]) -> tuple[float, list[Tensor]]:
    """Return the penalty and its gradients."""
    plugin.setup(replace(ctx, payload=payload))
    value = plugin.loss(ctx, *NOTHING)
    assert value is not None
    return value.item(), list(torch.autograd.grad(value, ctx.model.trainable))


@pytest.mark.parametrize("learner", [EWC, MAS])
def test_two_clients_pull_as_one_with_all_their_samples(device: torch.device, learner: type[Plugin]) -> None:
    apart = message(learner, [[context(device, slice(4)), context(device, slice(4, None))]])
    whole = message(learner, [[context(device)]])
    moved = context(device, shift=0.3)
    value, grads = pull(build(learner), moved, apart)
    expected, expected_grads = pull(build(learner), moved, whole)
    assert value == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(grads, expected_grads)


@pytest.mark.parametrize("learner", [EWC, MAS])
def test_one_task_of_one_client_is_the_learner_itself(device: torch.device, learner: type[Plugin]) -> None:
    alone = EWC(weight=3.0) if learner is EWC else MAS(weight=3.0)
    alone.after_task(context(device))
    moved = context(device, shift=0.3)
    value, grads = pull(build(learner), moved, message(learner, [[context(device)]]))
    expected, expected_grads = pull(alone, moved, {})
    assert value == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(grads, expected_grads)


def test_two_tasks_pull_as_two_penalties_do(device: torch.device) -> None:
    """The gradient is the mean of both penalties' own, since both tasks have as many samples; the value has a constant
    less."""
    tasks = [[context(device)], [context(device, task=1, shift=0.2)]]
    alone = EWC(weight=3.0, mode="separate")
    for (ctx,) in tasks:
        alone.after_task(ctx)
    moved = context(device, shift=0.3)
    _, grads = pull(build(EWC), moved, message(EWC, tasks))
    _, expected = pull(alone, moved, {})
    torch.testing.assert_close(grads, [grad / 2 for grad in expected], rtol=1e-4, atol=1e-6)


# F = (2, 0) at (1, 5) over 3 samples, F = (1, 0) at (4, 7) over 1: F = 7/4 at (6 + 4)/7
def test_the_sums_worked_by_hand() -> None:
    parts = [
        summands(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 5.0]), 3),
        summands(torch.tensor([1.0, 0.0]), torch.tensor([4.0, 7.0]), 1),
    ]
    payload = {f"q/{name}": (parts[0][name] + parts[1][name]).float() for name in parts[0]}
    sums = summed(payload, "q", torch.device("cpu"))
    assert sums is not None
    assert sums[0].tolist() == [1.75, 0.0]
    assert sums[1].tolist() == pytest.approx([10 / 7, 0.0])
    assert summed({}, "q", torch.device("cpu")) is None
    with pytest.raises(ValueError, match="the sums of 'q' must come together: q/importance, q/pull, q/count"):
        summed({"q/count": torch.tensor(1.0)}, "q", torch.device("cpu"))


def test_it_is_declared_only_where_it_is_asked_for() -> None:
    for plugin in (EWC(), MAS(), SI()):
        assert (plugin.queries, plugin.sums, plugin.payloads) == ((), {}, ())
    for plugin in (EWC(mode="separate", aggregate=True), MAS(aggregate=True), SI(aggregate=True)):
        (name,) = plugin.sums
        assert plugin.queries == (name,)
        assert [(p.name, p.direction) for p in plugin.payloads] == [(name, "down")]


def test_what_sums_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match=r"learner\.ewc\.aggregate=true: needs learner\.ewc\.mode=separate"):
        EWC(aggregate=True)
    with pytest.raises(ValueError, match=r"learner\.mas\.decay=0\.5: must be 1 with learner\.mas\.aggregate=true"):
        MAS(decay=0.5, aggregate=True)


def test_a_client_keeps_nothing_of_its_own(device: torch.device) -> None:
    for plugin in (EWC(mode="separate", aggregate=True), MAS(aggregate=True)):
        plugin.after_task(context(device))
        assert plugin.state() == {}
        assert plugin.loss(context(device), *NOTHING) is None


# One step: g = 2, dtheta = -1 for the first weight: path 2, way 1, Omega = 2 / (1 + 1) = 1.
def test_the_paths_of_clients_are_weighed_by_their_samples(device: torch.device) -> None:
    statistics = Statistics([SI(aggregate=True)])
    responses = []
    for i, (rows, gradient) in enumerate([(slice(8), 2.0), (slice(8, 12), 6.0)]):
        ctx, si = context(device, rows), SI(aggregate=True, damping=1.0)
        si.setup(ctx)
        si.before_round(ctx)
        grads = [torch.zeros_like(p) for p in ctx.model.trainable]
        grads[0].view(-1)[0] = gradient
        si.after_backward(ctx, grads)
        with torch.no_grad():
            ctx.model.flat[0] -= 1.0
        si.after_step(ctx)
        asked = SI(aggregate=True, damping=1.0)
        asked.load(si.state())
        asked.after_task(ctx)
        later = SI(aggregate=True, damping=1.0)
        later.load(asked.state())
        responses.append(Response(str(i), len(ctx.data), later.respond(context(device, rows), "path_importance", {})))
        assert later.respond(context(device, rows, task=1), "path_importance", {}) == {}  # no part in that task
    statistics.consume(Query("path_importance", {}, {}), responses)
    moved = context(device)
    with torch.no_grad():
        moved.model.flat[0] += 2.0
    value, grads = pull(SI(weight=0.5, aggregate=True), moved, statistics.message())
    omega = (8 * 1.0 + 4 * 3.0) / 12
    assert value == pytest.approx(0.5 * omega * 4.0, rel=1e-5)
    assert grads[0].view(-1)[0].item() == pytest.approx(0.5 * omega * 4.0, rel=1e-5)
    assert statistics.forget(ForgetRequest("r", "client", ("0",))).outcome == "reset"
    assert statistics.message() == {}
