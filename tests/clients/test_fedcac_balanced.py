from __future__ import annotations

import math

import pytest
import torch

from clients.strategies.fedcac import BalancedCriticalMask
from fedcl.base.randomness import torch_generator
from fedcl.client.loop import masked_cross_entropy
from fedcl.contracts.learner import Batch, Context, TaskData
from fedcl.models.flat import FlatModel
from fedcl.models.networks import MLP, Output, build_model
from fedcl.scenario.task import Task

# one client holds three samples of class 0 and one of class 2
TARGETS = torch.tensor([0, 0, 2, 0])


def context(task: int = 0, y: torch.Tensor = TARGETS, mask: tuple[int, ...] | None = None) -> Context:
    model = FlatModel(build_model(lambda: MLP(input_shape=(2,), heads=[3], hidden=[]), seed=0))
    x = torch.randn(len(y), 2, generator=torch_generator("x"))
    return Context(
        model=model,
        task=Task(task, (0, 1, 2), (0, 1, 2), mask),
        data=TaskData(x, y),
        received=model.vector(),
        epochs=1,
        batch_size=4,
        lr=0.1,
        seed=0,
        client="0",
        local_round=0,
        is_new_task=True,
        task_columns={task: (0, 1, 2)},
        num_columns=3,
    )


def test_the_loss_by_hand() -> None:
    plugin, ctx = BalancedCriticalMask(smoothing=1.0), context()
    plugin.before_round(ctx)
    out = Output(torch.zeros(1, 3), torch.zeros(1, 1))
    # equal logits: the probabilities are the smoothed frequencies (3 + 1, 0 + 1, 1 + 1) / 7
    for label, expected in ((0, 4 / 7), (1, 1 / 7), (2, 2 / 7)):
        loss = plugin.objective(ctx, Batch(ctx.data.x[:1], torch.tensor([label]), None), out)
        assert float(loss) == pytest.approx(-math.log(expected), abs=1e-6)
    allowed = torch.tensor([True, True, False])
    loss = plugin.objective(ctx, Batch(ctx.data.x[:1], torch.tensor([1]), allowed), out)
    assert float(loss) == pytest.approx(-math.log(1 / 5), abs=1e-6)


def test_predictions_add_what_all_tasks_held() -> None:
    plugin, ctx = BalancedCriticalMask(smoothing=0.5), context()
    plain = ctx.model(ctx.data.x).logits
    assert torch.equal(plugin.predict(ctx, ctx.data.x), plain)  # nothing is known yet
    plugin.before_round(ctx)
    plugin.before_round(ctx)  # the same task again counts once
    first = plugin.predict(ctx, ctx.data.x) - plain
    torch.testing.assert_close(first, torch.tensor([3.5, 0.5, 1.5]).log().expand(4, 3))
    plugin.before_round(context(task=1, y=torch.tensor([1, 1])))
    later = BalancedCriticalMask(smoothing=0.5)
    later.load(plugin.state())
    second = later.predict(ctx, ctx.data.x) - plain
    torch.testing.assert_close(second, torch.tensor([3.5, 2.5, 1.5]).log().expand(4, 3))


def test_a_step_outside_a_local_round_is_an_error() -> None:
    ctx = context()
    out = Output(torch.zeros(4, 3), torch.zeros(4, 1))
    with pytest.raises(RuntimeError, match="a local round that never began"):
        BalancedCriticalMask().objective(ctx, Batch(ctx.data.x, ctx.data.y, None), out)


def test_clients_with_opposite_mixtures_agree() -> None:
    # Two classes that overlap. Weights learned at 9 to 1 and at 1 to 9 differ in the bias by twice log 9; balanced they
    # do not, as the frequencies are in the adjustment.
    biases: dict[bool, list[float]] = {True: [], False: []}
    for balanced, found in biases.items():
        for counts in ((900, 100), (100, 900)):
            y = torch.repeat_interleave(torch.tensor([0, 1]), torch.tensor(counts))
            x = torch.randn(1000, 1, generator=torch_generator(counts)) + (2.0 * y - 1)[:, None]
            found.append(bias_of(x, y, balanced))
    assert abs(biases[True][0] - biases[True][1]) < 0.6
    assert biases[False][0] - biases[False][1] > 3.0


def bias_of(x: torch.Tensor, y: torch.Tensor, balanced: bool) -> float:
    """Return how far class 0 is ahead of class 1 at x = 0 after gradient descent on all samples."""
    ctx = context(y=y)
    ctx.data = TaskData(x, y)
    plugin = BalancedCriticalMask()
    plugin.before_round(ctx)
    layer = torch.nn.Linear(1, 3)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    for _ in range(300):
        batch, out = Batch(x, y, None), Output(layer(x), x)
        loss = plugin.objective(ctx, batch, out) if balanced else masked_cross_entropy(out, batch)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return float(layer.bias.detach()[0] - layer.bias.detach()[1])


@pytest.mark.parametrize(("mix", "expected"), [(0.0, 2.0), (0.5, 3.0), (0.75, 3.5), (1.0, 4.0)])
def test_predictions_come_from_between_trained_and_merged(mix: float, expected: float) -> None:
    plugin, ctx = BalancedCriticalMask(mix=mix), context()
    plugin.before_round(ctx)
    ctx.model.load(torch.full_like(ctx.received, 2.0))
    prior = (torch.tensor([3, 0, 1]) + 1.0).log()
    at = ctx.data.x.sum(1, keepdim=True) + 1  # every weight and bias w: the logits are w (x_1 + x_2 + 1)
    torch.testing.assert_close(plugin.predict(ctx, ctx.data.x), 2 * at + prior)  # its own, just trained
    plugin.after_round(ctx)
    later = BalancedCriticalMask(mix=mix)
    later.load(plugin.state())
    merged = torch.full_like(ctx.received, 4.0)
    ctx.model.load(merged)
    torch.testing.assert_close(later.predict(ctx, ctx.data.x), expected * at + prior)
    assert torch.equal(ctx.model.flat, merged)
