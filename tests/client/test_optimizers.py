"""Optimizers, schedules, clipping and accumulation, against torch and numbers worked by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from clients.optimizers.adam import Adam, AdamW
from clients.optimizers.rmsprop import RMSprop
from clients.schedules.cosine import Cosine
from clients.schedules.linear import Linear
from clients.schedules.rewarm import Rewarm
from clients.schedules.step import Step
from fedcl.base.tree import clone
from fedcl.client.loop import fit
from fedcl.client.lr_schedule import RoundRates, TaskDecay
from fedcl.client.moves import clip
from fedcl.client.stacked import fit_stacked
from fedcl.client.torch_optimizer import TorchOptimizer
from fedcl.contracts.learner import Context, LocalTraining
from fedcl.contracts.optimizer import LocalOptimizer, RateSchedule
from fedcl.scenario.schedule import Synchronous

Make = Callable[..., Context]
Factory = Callable[[], LocalOptimizer]

PAIRS: dict[str, tuple[Factory, type[torch.optim.Optimizer], Mapping[str, Any]]] = {
    "adam": (lambda: Adam(weight_decay=0.1), torch.optim.Adam, {"weight_decay": 0.1}),
    "adamw": (lambda: AdamW(weight_decay=0.1, beta1=0.8), torch.optim.AdamW, {"weight_decay": 0.1, "betas": (0.8, 0.999)}),  # noqa: E501
    "rmsprop": (lambda: RMSprop(weight_decay=0.1, momentum=0.9), torch.optim.RMSprop, {"weight_decay": 0.1, "momentum": 0.9}),  # noqa: E501
    "torch": (lambda: TorchOptimizer(lambda p: torch.optim.Adagrad(p, lr=1.0)), torch.optim.Adagrad, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_steps_agree_with_torch(name: str) -> None:
    make, theirs, settings = PAIRS[name]
    draws = torch.Generator().manual_seed(1)
    own: list[Tensor] = [torch.randn(3, 4, generator=draws), torch.randn(5, generator=draws)]
    other = [tensor.clone().requires_grad_() for tensor in own]
    ours, reference = make(), theirs(other, lr=0.01, **settings)  # type: ignore[call-arg]
    for number in range(12):
        grads = [torch.randn(t.shape, generator=draws) for t in own]
        for tensor, grad in zip(other, grads, strict=True):
            tensor.grad = grad.clone()
        reference.step()
        if number == 6:  # it goes on in another local round
            state, ours = clone(ours.state()), make()
            ours.load(state)
        ours.step(own, grads, 0.01)
    for tensor, same in zip(own, other, strict=True):
        torch.testing.assert_close(tensor, same.detach(), rtol=0, atol=1e-7)


def test_schedules_by_hand() -> None:
    assert [Step(every=2, factor=0.5).share(t, 9) for t in range(5)] == [1, 1, 0.5, 0.5, 0.25]
    assert [Linear(end=0.2).share(t, 4) for t in range(4)] == pytest.approx([1, 0.8, 0.6, 0.4])
    assert [Cosine().share(t, 4) for t in range(4)] == pytest.approx([1, 0.8535534, 0.5, 0.1464466])
    assert [Rewarm().share(t - 1, 100) for t in (1, 50, 100)] == pytest.approx([1, 0.5571402, 0.1])
    assert [Rewarm(warmup=0.5, end=0.5).share(t, 4) for t in range(4)] == pytest.approx([0.5, 1, 0.75, 0.5])
    assert Rewarm(warmup=1.0).share(0, 1) == 1


@pytest.mark.parametrize(
    ("horizon", "shares"),
    [("task", [1, 0.75, 0.5, 0.25, 1, 0.5]), ("run", [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])],
)
def test_rounds_of_the_task_or_of_the_run(horizon: Literal["task", "run"], shares: list[float]) -> None:
    tasks = Synchronous(num_tasks=2, rounds_per_task=[4, 2])
    rates = RoundRates(TaskDecay(0.2, 0.5, tasks), Linear(), horizon, tasks)
    decayed = [0.2, 0.2, 0.2, 0.2, 0.1, 0.1]
    expected = [rate * share for rate, share in zip(decayed, shares, strict=True)]
    assert [rates("a", server_round) for server_round in range(6)] == pytest.approx(expected)


class Recorded(LocalOptimizer):
    """Notes the rates it is given."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def step(self, params: list[Tensor], grads: list[Tensor], lr: float) -> None:
        self.rates.append(lr)

    def state(self) -> dict[str, Any]:
        return {}

    def load(self, state: dict[str, Any]) -> None:
        pass


@pytest.mark.parametrize("shape", [Linear(), Step(every=1, factor=0.5)])
def test_the_rate_changes_within_a_local_round(make_context: Make, shape: RateSchedule) -> None:
    ctx, recorded = make_context(), Recorded()
    ctx.lr = 0.2
    fit(ctx, [], LocalTraining(epochs=2, batch_size=8, optimizer=lambda: recorded, schedule=shape))  # 23: 3 + 3 steps
    assert recorded.rates == pytest.approx([0.2 * shape.share(t, 6) for t in range(6)])
    assert ctx.lr == 0.2


def test_clipping_is_torchs() -> None:
    for norm in (0.5, 50.0):
        grads = [torch.full((2, 2), 3.0), torch.tensor([4.0, -1.0])]
        params = [torch.zeros_like(g).requires_grad_() for g in grads]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        torch.nn.utils.clip_grad_norm_(params, norm)
        clip(grads, norm)
        for param, grad in zip(params, grads, strict=True):
            assert param.grad is not None
            assert torch.equal(param.grad, grad)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_accumulated_batches_are_a_large_one(make_context: Make, momentum: float) -> None:
    # 23 samples: batches of 4, 4 | 4, 4 | 4, 3: the remainder is a step of 7
    many, large = make_context(), make_context()
    many.batch_size, large.batch_size = 4, 8
    parts = fit(many, [], LocalTraining(epochs=2, batch_size=4, momentum=momentum, accumulate=2))
    whole = fit(large, [], LocalTraining(epochs=2, batch_size=8, momentum=momentum))
    torch.testing.assert_close(many.model.flat, large.model.flat, rtol=0, atol=1e-6)
    assert parts == pytest.approx(whole, rel=1e-5)
    assert many.step == large.step == 6


STACKED = {
    "adam": LocalTraining(epochs=2, batch_size=4, optimizer=Adam),
    "adamw clipped": LocalTraining(epochs=2, batch_size=4, optimizer=lambda: AdamW(weight_decay=0.1), clip_norm=0.3),
    "rmsprop": LocalTraining(epochs=2, batch_size=4, optimizer=RMSprop),
    "sgd clipped": LocalTraining(epochs=2, batch_size=4, momentum=0.9, weight_decay=0.01, clip_norm=0.3),
}


@pytest.mark.parametrize("differentiated", [False, True])
@pytest.mark.parametrize("name", STACKED)
def test_stacks_agree_with_the_loop(
    make_context: Make, name: str, differentiated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, ends = STACKED[name], []
    together = [make_context(client=client) for client in "ab"]
    for client in "ab":
        ctx = make_context(client=client)
        ctx.lr = 0.01
        fit(ctx, [], training)
        ends.append(ctx.model.vector())
    for ctx in together:
        ctx.lr = 0.01
    if differentiated:
        monkeypatch.setattr("fedcl.client.stacked.chain_of", lambda module: None)
    trained = fit_stacked(together, [ctx.received for ctx in together], training)
    for (vector, _), end in zip(trained, ends, strict=True):
        torch.testing.assert_close(vector, end, rtol=1e-4, atol=1e-5)


def test_a_clip_that_cuts_nothing_is_no_clip(make_context: Make) -> None:
    plain = LocalTraining(epochs=2, batch_size=4, momentum=0.9, weight_decay=0.01)
    one, two = make_context(), make_context()
    fit(one, [], plain)
    fit(two, [], replace(plain, clip_norm=1e9))
    assert torch.equal(one.model.flat, two.model.flat)
