"""Refresh learning and the EMA coefficient on numbers worked by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from clients.learners.ema import EMA, coefficient
from clients.learners.refresh import Refresh, ascent
from fedcl.base.randomness import torch_generator
from fedcl.client.loop import masked_cross_entropy
from fedcl.contracts.learner import Batch, Context, TaskData
from fedcl.data.dataset import Dataset
from fedcl.models.flat import FlatModel
from fedcl.models.networks import MLP
from fedcl.scenario.streams import ClassIncremental
from fedcl.scenario.task import Task


def context(device: torch.device) -> Context:
    model = FlatModel(MLP(input_shape=(2,), heads=(2,), hidden=()), device=device)
    model.load(torch.tensor([3.0, 0.0, 0.0, 4.0, 1.0, 1.0]))
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]], device=device)
    return Context(
        model=model, task=Task(0, (0, 1), (0, 1)), data=TaskData(x, torch.tensor([0, 1], device=device)),
        received=model.vector(), epochs=1, batch_size=2, lr=0.1, seed=0, client="0", local_round=0, is_new_task=True,
        task_columns={0: (0, 1)}, num_columns=2,
    )  # fmt: skip


# -- refresh ----------------------------------------------------------------------------------------------------------


def test_the_ascent_is_as_long_as_the_weights() -> None:
    moves = ascent([torch.tensor([3.0, 4.0]), torch.tensor([2.0])], [torch.tensor([0.0, -2.0]), torch.zeros(1)], 0.01)
    assert moves[0].tolist() == pytest.approx([0.0, -5.0])
    assert moves[1].tolist() == [0.0]


def test_a_perturbation_climbs_the_batchs_loss(device: torch.device) -> None:
    ctx = context(device)
    batch = Batch(ctx.data.x, ctx.data.y, None)
    weight, bias = torch.autograd.grad(masked_cross_entropy(ctx.model(batch.x), batch), ctx.model.trainable)
    before = masked_cross_entropy(ctx.model(batch.x), batch).item()
    assert Refresh(delta=0.1, noise=0.0).before_step(ctx, batch) is batch
    change = ctx.model.flat - ctx.received
    torch.testing.assert_close(change[:4].view(2, 2), 0.1 * 5.0 * weight / weight.norm())
    torch.testing.assert_close(change[4:], 0.1 * 2.0**0.5 * bias / bias.norm())
    assert masked_cross_entropy(ctx.model(batch.x), batch).item() > before


def test_the_noise_is_normal_and_as_large_as_asked(device: torch.device) -> None:
    changes = []
    for noise in (0.0, 0.5):
        ctx = context(device)
        Refresh(delta=0.1, noise=noise).before_step(ctx, Batch(ctx.data.x, ctx.data.y, None))
        changes.append(ctx.model.flat - ctx.received)
    xi = torch.randn(6, generator=torch_generator(0, "0", 0, "refresh")).to(device)
    torch.testing.assert_close(changes[1] - changes[0], 0.1 * 0.5 * xi, rtol=1e-4, atol=1e-6)


def test_what_earlier_tasks_depend_on_moves_less(device: torch.device) -> None:
    batch = Batch(context(device).data.x, context(device).data.y, None)
    changes = []
    for fisher in (None, torch.tensor([0.0, 1.0, 2.0, 3.0, 0.0, 0.0], device=device)):
        ctx, learner = context(device), Refresh(delta=0.1, noise=0.5, damping=2.0)
        learner.load({} if fisher is None else {"fisher": fisher})
        learner.before_step(ctx, batch)
        changes.append(ctx.model.flat - ctx.received)
    torch.testing.assert_close(changes[1], changes[0] / torch.tensor([1.0, 3.0, 5.0, 7.0, 1.0, 1.0], device=device))


def test_fisher_information_of_tasks_is_added(device: torch.device) -> None:
    ctx, learner = context(device), Refresh()
    learner.after_task(ctx)
    once = learner.state()["fisher"].clone()
    learner.after_task(ctx)
    assert torch.equal(learner.state()["fisher"], 2 * once)
    # the mean over batches of the squared mean gradient: one batch
    batch = Batch(ctx.data.x, ctx.data.y, None)
    grads = torch.autograd.grad(masked_cross_entropy(ctx.model(batch.x), batch), ctx.model.trainable)
    torch.testing.assert_close(once, torch.cat([g.flatten() for g in grads]).square())


# -- EMA --------------------------------------------------------------------------------------------------------------


# a = 1 + 3 = 4, b = 2 + 1 = 3, c = 4: alpha = 2 (1 + 3) / (4 x 4) = 1/2; with c = 1 it is 2, out of range
def test_the_coefficient_worked_by_hand() -> None:
    average, weight = torch.tensor([0.0, 0.0]), torch.tensor([1.0, -3.0])
    gradient = torch.tensor([2.0, -1.0])
    assert coefficient(average, weight, gradient, torch.tensor([0.0, 1.0]), 0.01).item() == pytest.approx(0.5)
    assert coefficient(average, weight, gradient, torch.tensor([1.0, -1.0]), 0.01).item() == pytest.approx(0.01)
    assert coefficient(average, average, gradient, gradient, 0.01).item() == pytest.approx(0.01)


def test_the_average_is_what_is_sent(device: torch.device) -> None:
    ctx, learner = context(device), EMA(fallback=0.25)
    learner.before_round(ctx)

    def step(change: float, gradient: Tensor) -> None:
        learner.after_backward(ctx, [gradient, torch.zeros(2, device=device)])
        with torch.no_grad():
            ctx.model.flat.add_(change)
        learner.after_step(ctx)

    step(1.0, torch.zeros(2, 2, device=device))
    # every average is a quarter of the way; then a = 4 x 2.75 = 11, b = 8, c = 8: alpha = 18/88; biases fall back
    step(2.0, torch.full((2, 2), 2.0, device=device))
    trained = ctx.model.vector() - ctx.received
    assert trained.tolist() == pytest.approx([3.0] * 6)
    assert learner.after_round(ctx) == {}
    sent = ctx.model.flat - ctx.received
    weight = 0.25 + 18 / 88 * 2.75
    assert sent.tolist() == pytest.approx([weight] * 4 + [0.25 + 0.25 * 2.75] * 2)


def test_a_fixed_coefficient(blobs: Dataset, make_client: Callable[..., Any]) -> None:
    stream = ClassIncremental(num_classes=6, input_shape=blobs.input_shape, seed=0, num_tasks=3)

    def change(**plugins: Callable[[], Any]) -> Tensor:
        client = make_client(blobs, stream, plugins, epochs=1, batch_size=1000)
        before = client.runtime.model.vector()
        (after,) = client.run([("train", 0)])
        return after - before

    # one step: the average goes a third of its way
    torch.testing.assert_close(change(ema=partial(EMA, alpha=1 / 3)), change() / 3, rtol=1e-3, atol=1e-6)
