from __future__ import annotations

from math import log

import pytest
import torch
from torch import Tensor

from clients.learners.lwf import LwF, column_groups, distillation
from fedcl.contracts.learner import Batch, Context, TaskData
from fedcl.models.flat import FlatModel
from fedcl.models.networks import MLP, Output
from fedcl.scenario.task import Task

LN3 = log(3.0)


def logits(*rows: list[float]) -> Tensor:
    return torch.tensor(rows)


# softmax(0, ln 3) = (1/4, 3/4) against (1/2, 1/2): KL = (ln 2 + ln 2/3) / 2 = ln(4/3) / 2.
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_divergence_worked_by_hand(temperature: float) -> None:
    student, teacher = logits([0.0, temperature * LN3]), logits([5.0, 5.0])
    value = distillation(student, teacher, [[0, 1]], temperature)
    assert value.item() == pytest.approx(log(4 / 3) / 2)


def test_the_direction_is_from_teacher_to_student() -> None:
    student, teacher = logits([0.0, 0.0]), logits([0.0, LN3])
    expected = 0.25 * log(0.25 / 0.5) + 0.75 * log(0.75 / 0.5)
    assert distillation(student, teacher, [[0, 1]], 1.0).item() == pytest.approx(expected)


def test_mean_over_the_batch_and_sum_over_groups() -> None:
    student = logits([0.0, LN3, 0.0, LN3], [0.0, 0.0, 0.0, LN3])
    teacher = torch.zeros(2, 4)
    once = log(4 / 3) / 2
    assert distillation(student, teacher, [[0, 1]], 1.0).item() == pytest.approx(once / 2)
    assert distillation(student, teacher, [[0, 1], [2, 3]], 1.0).item() == pytest.approx(once / 2 + once)


def test_the_gradient_at_temperature_t_is_q_minus_p_over_t() -> None:
    student = logits([0.0, 2 * LN3]).requires_grad_()
    distillation(student, logits([0.0, 0.0]), [[0, 1]], 2.0).backward()
    assert student.grad is not None
    assert student.grad[0].tolist() == pytest.approx([(0.25 - 0.5) / 2, (0.75 - 0.5) / 2])


def context(heads: tuple[int, ...], seen: dict[int, tuple[int, ...]], device: torch.device) -> Context:
    model = FlatModel(MLP(input_shape=(3,), heads=heads, hidden=()), device=device)
    task = max(seen)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, generator=generator).to(device)
    return Context(
        model=model, task=Task(task, (0, 1), seen[task], head=task if len(heads) > 1 else 0),
        data=TaskData(x, torch.zeros(5, dtype=torch.int64, device=device)), received=model.vector(), epochs=1,
        batch_size=5, lr=0.1, seed=0, client="0", local_round=0, is_new_task=False, task_columns=seen,
        num_columns=sum(heads),
    )  # fmt: skip


def test_one_head_is_one_softmax_and_own_heads_are_one_each(device: torch.device) -> None:
    seen = {0: (2, 0), 1: (3, 1)}
    assert column_groups(context((4,), seen, device)) == [[0, 1, 2, 3]]
    assert column_groups(context((2, 2), {0: (0, 1), 1: (2, 3)}, device)) == [[0, 1], [2, 3]]
    assert column_groups(context((3,), {0: (0, 1, 2), 1: (0, 1, 2)}, device)) == [[0, 1, 2]]


@pytest.mark.parametrize(("t_squared", "factor"), [(False, 1.0), (True, 4.0)])
def test_only_old_columns_are_distilled(device: torch.device, t_squared: bool, factor: float) -> None:
    lwf = LwF(weight=3.0, t_squared=t_squared)
    first = context((4,), {0: (0, 1)}, device)
    batch = Batch(first.data.x, first.data.y, None)
    lwf.before_round(first)
    assert lwf.loss(first, batch, first.model(batch.x)) is None
    lwf.after_task(first)
    later = context((4,), {0: (0, 1), 1: (2, 3)}, device)
    lwf.load(lwf.state())
    lwf.before_round(later)
    with torch.no_grad():
        old = later.teacher(batch.x).logits
    same = lwf.loss(later, batch, Output(old + torch.tensor([0.0, 0.0, 9.0, -9.0], device=device), batch.x))
    moved = lwf.loss(later, batch, Output(old + torch.tensor([0.0, 1.0, 0.0, 0.0], device=device), batch.x))
    assert same is not None
    assert moved is not None
    assert same.item() == pytest.approx(0.0, abs=1e-6)
    p = torch.softmax(old[:, :2] / 2, 1)
    q = torch.softmax((old[:, :2] + torch.tensor([0.0, 1.0], device=device)) / 2, 1)
    assert moved.item() == pytest.approx(3.0 * factor * (p * (p / q).log()).sum(1).mean().item(), rel=1e-4)


def test_the_teacher_does_not_move_with_the_student(device: torch.device) -> None:
    lwf = LwF()
    ctx = context((4,), {0: (0, 1)}, device)
    lwf.after_task(ctx)
    before = lwf.state()["teacher"].clone()
    lwf.before_round(ctx)
    with torch.no_grad():
        ctx.model.flat.add_(1.0)
    assert torch.equal(lwf.state()["teacher"], before)
    assert not torch.equal(ctx.teacher(ctx.data.x).logits, ctx.model(ctx.data.x).logits)
