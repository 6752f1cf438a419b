"""DER, ER-ACE, UER, A-GEM and GDumb: their terms by hand, and what enters and leaves their memories."""

from __future__ import annotations

from collections import Counter
from math import log

import pytest
import torch
from torch import Tensor

from clients.learners.agem import AGEM, project
from clients.learners.der import DER, known_columns, logit_distance
from clients.learners.er_ace import ERACE, halves, joint_cross_entropy
from clients.learners.gdumb import GDumb, balanced
from clients.learners.uer import UER, cosines, head_weights
from fedcl.client.buffer import ReplayBuffer
from fedcl.client.loop import masked_cross_entropy
from fedcl.contracts.learner import Batch, Context, TaskData
from fedcl.models.flat import FlatModel
from fedcl.models.masks import columns_of
from fedcl.models.networks import MLP, Output
from fedcl.scenario.task import Task

MET = {0: (0, 1), 1: (2, 3)}
TASKS = [Task(0, (0, 1), (0, 1), mask=(0, 1)), Task(1, (2, 3), (2, 3), mask=(2, 3))]
SEEN = Task(1, (2, 3), (2, 3), mask=(0, 1, 2, 3))


def context(
    device: torch.device,
    task: Task,
    seen: dict[int, tuple[int, ...]],
    *,
    local_round: int = 0,
    heads: tuple[int, ...] = (4,),
) -> Context:
    generator = torch.Generator().manual_seed(task.id)
    x = torch.randn(12, 3, generator=generator).to(device)
    y = torch.tensor(task.columns, device=device).repeat(6)
    model = FlatModel(MLP(input_shape=(3,), heads=heads, hidden=()), device=device)
    model.load(torch.linspace(-1, 1, model.spec.size))
    return Context(
        model=model, task=task, data=TaskData(x, y), received=model.vector(), epochs=1, batch_size=4, lr=0.1, seed=0,
        client="0", local_round=local_round, is_new_task=True, task_columns=seen, num_columns=4,
    )  # fmt: skip


def whole(ctx: Context) -> Batch:
    return Batch(ctx.data.x, ctx.data.y, ctx.mask)


# -- logits in the buffer, DER ----------------------------------------------------------------------------------------


def test_logits_stay_with_their_samples() -> None:
    buffer, generator = ReplayBuffer(5), torch.Generator().manual_seed(0)
    for start in range(0, 40, 4):
        y = torch.arange(start, start + 4)
        buffer.add(y[:, None].float(), y, start // 20, generator, torch.stack([y, -y], 1).float())
    state = buffer.state()
    assert state["logits"].tolist() == [[y, -y] for y in state["y"].tolist()]
    again = ReplayBuffer(5)
    again.load(state)
    drawn = again.sample(3, generator)
    assert drawn.logits is not None
    assert drawn.logits[:, 0].tolist() == drawn.y.tolist()
    again.rewrite_logits(1, lambda x: torch.cat([x, x], 1) + 100)
    state = again.state()
    expected = [[y + 100] * 2 if y >= 20 else [y, -y] for y in state["y"].tolist()]
    assert state["logits"].tolist() == expected
    assert any(y >= 20 for y in state["y"].tolist())


def test_without_logits_there_is_no_such_column() -> None:
    buffer = ReplayBuffer(5)
    buffer.add(torch.ones(2, 1), torch.ones(2, dtype=torch.int64), 0, torch.Generator())
    buffer.rewrite_logits(0, lambda x: x)
    assert set(buffer.state()) == {"x", "y", "task", "seen"}


# Differences 1, 2 | 3, 4; known are the first row's first column and the second row's both: (1 + 9 + 16) / 3.
def test_the_distance_of_logits_worked_by_hand() -> None:
    logits, stored = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.zeros(2, 2)
    known = torch.tensor([[True, False], [True, True]])
    assert logit_distance(logits, stored, known).item() == pytest.approx(26 / 3)
    assert logit_distance(logits, stored, torch.zeros(2, 2, dtype=torch.bool)).item() == 0.0


def test_heads_that_were_not_trained_yet_are_not_held(device: torch.device) -> None:
    assert known_columns(context(device, SEEN, MET)).all()
    assert known_columns(context(device, TASKS[1], MET, heads=(2, 2))).tolist() == [
        [True, True, False, False],
        [True] * 4,
    ]


@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 0.0), (0.0, 0.7), (0.5, 0.7)])
@pytest.mark.parametrize(("task", "heads"), [(SEEN, (4,)), (TASKS[1], (2, 2))], ids=["seen", "own"])
def test_the_terms_of_der_by_a_hand_loop(
    device: torch.device, task: Task, heads: tuple[int, ...], alpha: float, beta: float
) -> None:
    der = DER(budget=12, alpha=alpha, beta=beta, replay_size=12)
    first = context(device, TASKS[0], {0: (0, 1)}, heads=heads)
    der.before_round(first)
    assert der.loss(first, whole(first), first.model(first.data.x)) is None
    first.model.flat.neg_()  # the model that the federation makes of the task
    der.after_task(first)
    ctx = context(device, task, MET, local_round=1, heads=heads)
    der.before_round(ctx)
    ctx.model.flat.mul_(0.5)
    value = der.loss(ctx, whole(ctx), ctx.model(ctx.data.x))
    assert value is not None
    distance, entropy = 0.0, 0.0
    for x, y in zip(first.data.x, first.data.y.tolist(), strict=True):
        new, old = ctx.model(x[None]).logits[0], first.model(x[None]).logits[0]
        allowed = range(4) if task is SEEN else (0, 1)
        distance += sum((new[c] - old[c]).item() ** 2 for c in allowed) / len(allowed) / 12
        entropy += (log(sum(new[c].exp().item() for c in allowed)) - new[y].item()) / 12
    assert value.item() == pytest.approx(alpha * distance + beta * entropy, rel=1e-4)


# the present task's samples are held to their logits from the task's end on, where these are taken again
@pytest.mark.parametrize(("refresh", "held"), [(True, False), (False, True)])
def test_within_its_task_a_sample_is_free_until_its_logits_are_taken_anew(
    device: torch.device, refresh: bool, held: bool
) -> None:
    der, ctx = DER(budget=12, alpha=1.0, refresh=refresh), context(device, TASKS[0], {0: (0, 1)})
    der.before_round(ctx)
    der.loss(ctx, whole(ctx), ctx.model(ctx.data.x))
    ctx.model.flat.mul_(2.0)
    value = der.loss(ctx, whole(ctx), ctx.model(ctx.data.x))
    assert value is not None
    assert (value.item() > 0.1) == held


def test_without_refresh_logits_are_those_of_the_stream(device: torch.device) -> None:
    der, ctx = DER(budget=20, refresh=False), context(device, TASKS[0], {0: (0, 1)})
    der.before_round(ctx)
    out = ctx.model(ctx.data.x)
    der.loss(ctx, whole(ctx), out)
    ctx.model.flat.neg_()
    der.after_task(ctx)
    assert torch.equal(der.state()["logits"], out.logits)
    assert der.loss(ctx, whole(ctx), out) is not None


# -- ER-ACE, UER ------------------------------------------------------------------------------------------------------


def test_incoming_samples_choose_among_the_classes_of_their_batch(device: torch.device) -> None:
    ace, ctx = ERACE(budget=50, replay_size=3), context(device, SEEN, MET)
    other = context(device, TASKS[0], {0: (0, 1)})
    ace._buffer.add(other.data.x, other.data.y, 0, torch.Generator())
    ace.before_round(ctx)
    new = Batch(ctx.data.x[::2], ctx.data.y[::2], ctx.mask)  # column 2 alone: nothing to choose, no loss
    batch = ace.before_step(ctx, new)
    assert len(batch.y) == 9
    out = ctx.model(batch.x)
    replayed = torch.nn.functional.cross_entropy(out.logits[6:], batch.y[6:]).item()
    assert ace.objective(ctx, batch, out).item() == pytest.approx(3 / 9 * replayed, rel=1e-5)


def test_in_the_first_task_er_ace_is_er(device: torch.device) -> None:
    ace, ctx = ERACE(budget=50, replay_size=3), context(device, TASKS[0], {0: (0, 1)})
    ace.before_round(ctx)
    ace.before_step(ctx, whole(ctx))
    batch = ace.before_step(ctx, Batch(ctx.data.x[::2], ctx.data.y[::2], ctx.mask))
    out = ctx.model(batch.x)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :2], batch.y).item()
    assert ace.objective(ctx, batch, out).item() == pytest.approx(expected, rel=1e-5)


def test_columns_of_targets_and_halves() -> None:
    mask = torch.tensor([[True, False], [True, True], [False, True]])
    batch = Batch(torch.zeros(3, 1), torch.tensor([0, 0, 1]), mask)
    (new, _), (past, past_out) = halves(batch, Output(torch.eye(3, 2), torch.ones(3, 1)), 2)
    assert columns_of(new.y, 2).tolist() == [True, False]
    assert new.mask is not None
    assert new.mask.tolist() == mask[:2].tolist()
    assert past.y.tolist() == [1]
    assert past_out.logits.tolist() == [[0.0, 0.0]]


# Cross-entropies ln 2 (one sample) and ln 3 (three samples).
def test_the_joint_entropy_is_a_mean_over_samples() -> None:
    new = (Batch(torch.zeros(1, 1), torch.tensor([0]), torch.tensor([True, True, False])), torch.zeros(1, 3))
    past = (Batch(torch.zeros(3, 1), torch.tensor([0, 1, 2]), None), torch.zeros(3, 3))
    both = [(batch, Output(logits, logits)) for batch, logits in (new, past)]
    assert joint_cross_entropy(both[0], both[1]).item() == pytest.approx((log(2) + 3 * log(3)) / 4)


# cos((3, 4), (1, 0)) = 0.6, cos((3, 4), (0, 2)) = 0.8: norms do not count.
def test_cosines_worked_by_hand() -> None:
    weights = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert cosines(torch.tensor([[3.0, 4.0]]), weights)[0].tolist() == pytest.approx([0.6, 0.8])


def test_uer_takes_angles_for_the_new_and_logits_for_the_replayed(device: torch.device) -> None:
    uer, ctx = UER(budget=50, replay_size=12, scale=5.0), context(device, SEEN, MET)
    uer.before_round(ctx)
    first = uer.before_step(ctx, whole(ctx))
    alone = uer.objective(ctx, first, ctx.model(first.x))
    weights = head_weights(ctx.model.module)
    scaled = 5.0 * torch.nn.functional.cosine_similarity(ctx.data.x[:, None], weights[None], dim=2)
    by_angle = torch.nn.functional.cross_entropy(scaled, ctx.data.y)
    assert alone.item() == pytest.approx(by_angle.item(), rel=1e-5)
    second = uer.before_step(ctx, whole(ctx))
    out = ctx.model(second.x)
    by_logit = torch.nn.functional.cross_entropy(out.logits[12:], second.y[12:])
    assert uer.objective(ctx, second, out).item() == pytest.approx((by_angle + by_logit).item() / 2, rel=1e-5)


def test_the_weights_of_all_heads_stand_one_below_the_other() -> None:
    network = MLP(input_shape=(3,), heads=(2, 1), hidden=())
    assert torch.equal(head_weights(network)[2:], network.heads[1].weight)  # type: ignore[arg-type]
    assert head_weights(network).shape == (3, 3)


# -- A-GEM ------------------------------------------------------------------------------------------------------------


# g = (1, 0 | -3), g_ref = (1, 1 | 1): g . g_ref = -2, g_ref . g_ref = 3; g + 2/3 g_ref.
def test_the_projection_worked_by_hand() -> None:
    grads = [torch.tensor([1.0, 0.0]), torch.tensor([[-3.0]])]
    reference = [torch.ones(2), torch.ones(1, 1)]
    project(grads, reference)
    assert torch.cat([g.flatten() for g in grads]).tolist() == pytest.approx([5 / 3, 2 / 3, -7 / 3])
    assert sum(g.sum().item() for g in grads) == pytest.approx(0.0, abs=1e-6)
    agreeing = [torch.tensor([1.0, 0.0]), torch.tensor([[3.0]])]
    project(agreeing, reference)
    assert [g.tolist() for g in agreeing] == [[1.0, 0.0], [[3.0]]]


def test_the_reference_is_of_finished_tasks(device: torch.device) -> None:
    agem, first = AGEM(budget=50, replay_size=12), context(device, TASKS[0], {0: (0, 1)})
    agem.before_round(first)
    grads = [torch.ones_like(p) for p in first.model.trainable]
    agem.after_backward(first, grads)
    assert all((g == 1).all() for g in grads)
    agem.after_task(first)
    assert sorted(agem.state()["y"].tolist()) == [0] * 6 + [1] * 6
    ctx = context(device, SEEN, MET, local_round=1)
    agem.before_round(ctx)
    loss = torch.nn.functional.cross_entropy(ctx.model(first.data.x).logits, first.data.y)
    past = torch.autograd.grad(loss, ctx.model.trainable)
    grads = [-g for g in past]  # straight against the past: nothing is left
    agem.after_backward(ctx, grads)
    assert max(g.abs().max().item() for g in grads) < 1e-6


# -- GDumb ------------------------------------------------------------------------------------------------------------


def kept(held: list[int], arriving: list[int], budget: int) -> list[int]:
    targets = [*held, *arriving]
    return [targets[i] for i in balanced(held, arriving, budget, torch.Generator().manual_seed(0))]


def test_memory_stays_balanced_as_classes_arrive() -> None:
    assert kept([], [0] * 5, 3) == [0, 0, 0]
    assert kept([], [0, 1] * 5, 4) == [0, 1, 0, 1]
    assert Counter(kept([0] * 6, [1] * 9 + [2] * 9, 6)) == {0: 2, 1: 2, 2: 2}
    assert Counter(kept([0] * 6, [1], 6)) == {0: 5, 1: 1}
    assert kept([0, 0], [0, 0], 2) == [0, 0]
    assert len(kept([], list(range(5)), 3)) == 3


def test_every_batch_is_of_memory(device: torch.device) -> None:
    gdumb, ctx = GDumb(budget=4), context(device, TASKS[0], {0: (0, 1)})
    gdumb.before_task(ctx)
    gdumb.before_round(ctx)
    memory = {tuple(row) for row in gdumb.state()["x"].tolist()}
    assert len(memory) == 4
    assert sorted(gdumb.state()["y"].tolist()) == [0, 0, 1, 1]
    batch = gdumb.before_step(ctx, whole(ctx))
    assert {tuple(row) for row in batch.x.tolist()} == memory
    later = context(device, TASKS[1], MET, local_round=1)
    gdumb.before_task(later)
    gdumb.before_round(later)
    batch = gdumb.before_step(later, whole(later))
    assert sorted(batch.y.tolist()) == [0, 1, 2, 3]
    assert batch.mask is not None
    rows: dict[int, Tensor] = dict(zip(batch.y.tolist(), batch.mask, strict=True))
    assert rows[0].tolist() == [True, True, False, False]
    assert rows[3].tolist() == [False, False, True, True]


# the gradient of the step is the opposite of the past's own, taken among the past task's columns: nothing of it is left
def test_a_gem_asks_past_samples_among_their_own_columns(device: torch.device) -> None:
    agem = AGEM(budget=12, replay_size=12)
    agem.after_task(context(device, TASKS[0], {0: (0, 1)}))
    past, ctx = context(device, TASKS[0], {0: (0, 1)}), context(device, TASKS[1], MET, local_round=1)
    loss = masked_cross_entropy(ctx.model(past.data.x), Batch(past.data.x, past.data.y, past.mask))
    grads = [-gradient for gradient in torch.autograd.grad(loss, list(ctx.model.trainable))]
    agem.before_round(ctx)
    agem.after_backward(ctx, grads)
    for gradient in grads:
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0.0, atol=1e-6)
