from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from clients.learners.ewc import EWC, FisherKind, fisher_diagonal
from clients.learners.quadratic import penalty
from fedcl.contracts.learner import Context, TaskData
from fedcl.models.flat import FlatModel
from fedcl.models.networks import Output
from fedcl.scenario.task import Task


class Logistic(nn.Module):
    """p(column 1) = sigmoid(w . x): logits (0, w . x)."""

    def __init__(self, weights: list[float]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(weights))

    def forward(self, x: Tensor) -> Output:
        score = x @ self.w
        return Output(torch.stack([torch.zeros_like(score), score], dim=1), x)


def logistic(device: torch.device, *weights: float) -> FlatModel:
    return FlatModel(Logistic(list(weights)), device=device)


def context(model: FlatModel, x: Tensor, y: Tensor, *, batch_size: int = 2) -> Context:
    return Context(
        model=model, task=Task(0, (0, 1), (0, 1)), data=TaskData(x, y), received=model.vector(), epochs=1,
        batch_size=batch_size, lr=0.1, seed=0, client="0", local_round=0, is_new_task=True, task_columns={0: (0, 1)},
        num_columns=2,
    )  # fmt: skip


@pytest.fixture
def samples(device: torch.device) -> tuple[Tensor, Tensor]:
    """At w = 0 both columns have probability 1/2, so a sample's gradient is (1/2 - y) x."""
    return torch.tensor([[1.0, 0.0], [0.0, 2.0]], device=device), torch.tensor([1, 0], device=device)


# Gradients at w = 0: (-0.5, 0) and (0, 1). Their squares' mean; the square of their mean.
@pytest.mark.parametrize(
    ("kind", "batch", "expected"),
    [("per_sample", 2, [0.125, 0.5]), ("per_batch", 2, [0.0625, 0.25]), ("per_batch", 1, [0.125, 0.5])],
)
def test_the_fisher_worked_by_hand(
    device: torch.device, samples: tuple[Tensor, Tensor], kind: FisherKind, batch: int, expected: list[float]
) -> None:
    fisher = fisher_diagonal(logistic(device, 0.0, 0.0), *samples, None, kind=kind, batch=batch)
    assert fisher.tolist() == expected


def test_columns_that_are_masked_out_carry_no_information(device: torch.device, samples: tuple[Tensor, Tensor]) -> None:
    x, y = samples
    mask = torch.tensor([False, True], device=device)
    fisher = fisher_diagonal(logistic(device, 0.0, 0.0), x, torch.ones_like(y), mask, kind="per_sample", batch=2)
    assert fisher.tolist() == [0.0, 0.0]


# F = (0.125, 0.5), distance (1, -1), lambda = 4: the sum is 0.625; its gradient without lambda is (0.25, -1).
@pytest.mark.parametrize(("half", "value", "gradient"), [(True, 1.25, [0.5, -2.0]), (False, 2.5, [1.0, -4.0])])
def test_the_penalty_worked_by_hand(
    device: torch.device, samples: tuple[Tensor, Tensor], half: bool, value: float, gradient: list[float]
) -> None:
    model = logistic(device, 0.0, 0.0)
    ctx = context(model, *samples)
    ewc = EWC(weight=4.0, half=half)
    assert ewc.loss(ctx, None, None) is None  # type: ignore[arg-type]
    ewc.after_task(ctx)
    model.load(torch.tensor([1.0, -1.0]))
    loss = ewc.loss(ctx, None, None)  # type: ignore[arg-type]
    assert loss is not None
    assert loss.item() == pytest.approx(value)
    (grad,) = torch.autograd.grad(loss, model.trainable)
    assert grad.tolist() == gradient


def test_the_penalty_is_the_sum_over_anchors_and_tensors(device: torch.device) -> None:
    layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    layers[2].bias.requires_grad_(False)
    model = FlatModel(layers, device=device)
    generator = torch.Generator().manual_seed(0)
    fisher, anchor = (torch.rand(3, model.num_parameters, generator=generator).to(device) for _ in range(2))
    value = penalty(model, fisher, anchor, 0.7)
    grads = torch.autograd.grad(2.0 * value, model.trainable)
    expected = torch.zeros((), device=device)
    for parameter, spec in zip(model.trainable, model.parameter_specs, strict=True):
        for f, a in zip(fisher, anchor, strict=True):
            piece = slice(spec.start, spec.stop)
            expected = expected + 0.7 * (f[piece] * (parameter.flatten() - a[piece]) ** 2).sum()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grads, torch.autograd.grad(2.0 * expected, model.trainable))


def test_frozen_parameters_have_no_fisher(device: torch.device) -> None:
    model = logistic(device, 0.0, 0.0)
    module = nn.Sequential()  # a frozen tensor before and after the trained one
    module.first, module.body, module.last = nn.Linear(2, 2), model.module, nn.Linear(1, 1)
    for layer in (module.first, module.last):
        layer.requires_grad_(False)
    module.forward = lambda x: module.body(x)  # type: ignore[method-assign]
    whole = FlatModel(module, device=device)
    x, y = torch.tensor([[1.0, 2.0]], device=device), torch.tensor([1], device=device)
    for kind in ("per_sample", "per_batch"):
        fisher = fisher_diagonal(whole, x, y, None, kind=kind, batch=1)
        where = whole.spec["body.w"]
        assert fisher[where.start : where.stop].tolist() == [0.25, 1.0]
        assert len(fisher) == 2


@pytest.mark.parametrize("mode", ["online", "separate"])
def test_two_tasks_online_and_separate(device: torch.device, samples: tuple[Tensor, Tensor], mode: str) -> None:
    ewc = EWC(weight=2.0, mode=mode, decay=0.5)  # type: ignore[arg-type]
    model = logistic(device, 0.0, 0.0)
    ewc.after_task(context(model, *samples))
    model.load(torch.tensor([0.0, 3.0]))
    again = torch.tensor([[4.0, 0.0]], device=device), torch.tensor([1], device=device)
    ewc.after_task(context(model, *again))  # one sample with score 0: its gradient is (-2, 0)
    state = ewc.state()
    if mode == "online":
        assert state["importance"].tolist() == [[0.5 * 0.125 + 4.0, 0.25]]
        assert state["anchor"].tolist() == [[0.0, 3.0]]
    else:
        assert state["importance"].tolist() == [[0.125, 0.5], [4.0, 0.0]]
        assert state["anchor"].tolist() == [[0.0, 0.0], [0.0, 3.0]]
    loss = ewc.loss(context(model, *samples), None, None)  # type: ignore[arg-type]
    assert loss is not None
    # at (0, 3) only the first anchor's second weight is away from home
    assert loss.item() == pytest.approx(0.0 if mode == "online" else 0.5 * 9.0)
