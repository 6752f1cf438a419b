from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fedcl.base.randomness import torch_generator
from fedcl.client.local_evaluation import accuracy
from fedcl.client.loop import by_batch, fit, masked_cross_entropy, ordered, owner
from fedcl.contracts.learner import Batch, Context, LocalTraining, Phase, Plugin, TaskData
from fedcl.models.networks import Output
from fedcl.scenario.task import Task

Make = Callable[..., Context]


def by_hand(ctx: Context, training: LocalTraining) -> tuple[Tensor, list[float]]:
    """The same visit as anybody would write it with torch.optim.SGD."""
    net, data = ctx.model.copy().module, ctx.data
    net.train()
    optimizer = torch.optim.SGD(
        net.parameters(), lr=training.lr, momentum=training.momentum, weight_decay=training.weight_decay, foreach=False
    )
    generator = torch_generator(ctx.seed, ctx.client, ctx.local_round, "batches")
    losses = []
    for _ in range(training.epochs):
        order = torch.randperm(len(data), generator=generator).to(ctx.device)
        for chosen in order.split(training.batch_size):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(data.x[chosen]).logits, data.y[chosen])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return torch.cat([p.detach().flatten() for p in net.parameters()]), losses


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_the_loop_is_torchs_sgd_bit_for_bit(make_context: Make, momentum: float, weight_decay: float) -> None:
    ctx = make_context()
    training = LocalTraining(epochs=3, batch_size=4, lr=0.1, momentum=momentum, weight_decay=weight_decay)
    expected, losses = by_hand(ctx, training)
    before = ctx.model.vector()
    metrics = fit(ctx, [], training)
    if ctx.device.type == "cpu":
        assert torch.equal(ctx.model.flat, expected)
    torch.testing.assert_close(ctx.model.flat, expected, rtol=1e-6, atol=1e-7)
    assert not torch.equal(ctx.model.flat, before)
    assert metrics["steps"] == len(losses) == 18
    assert metrics["loss_first"] == pytest.approx(losses[0])
    assert metrics["loss"] == pytest.approx(sum(losses) / len(losses))


def test_mixed_precision_rounds_the_products_of_a_step_and_nothing_else(make_context: Make) -> None:
    exact, mixed, again = make_context(), make_context(), make_context()
    training = LocalTraining(epochs=3, batch_size=4, lr=0.1, momentum=0.9)
    start = exact.model.vector()
    fit(exact, [], training)
    for ctx in (mixed, again):
        # asked for written-out steps, which have no such precision: the loop takes them
        metrics = fit(ctx, [], replace(training, precision="bfloat16"), fused=True)
        assert metrics["steps"] == 18
    assert torch.equal(mixed.model.flat, again.model.flat)
    assert mixed.model.flat.dtype == torch.float32
    moved = (exact.model.flat - start).norm()
    apart = (exact.model.flat - mixed.model.flat).norm()
    assert 0 < apart < 0.05 * moved  # bfloat16 has eight bits: a product is off by 0.4 % at most


def test_masked_columns_are_out_of_the_loss_and_out_of_predictions(make_context: Make) -> None:
    out = Output(torch.tensor([[1.0, 2.0, 9.0]]), torch.zeros(1, 1))
    batch = Batch(torch.zeros(1, 1), torch.tensor([0]), torch.tensor([True, True, False]))
    expected = F.cross_entropy(torch.tensor([[1.0, 2.0]]), torch.tensor([0]))
    assert masked_cross_entropy(out, batch).item() == pytest.approx(expected.item())
    rows = batch._replace(mask=torch.tensor([[True, False, False]]))
    assert masked_cross_entropy(out, rows).item() == 0.0
    ctx = make_context(Task(0, (0, 1, 2), (0, 1, 2), mask=(0, 1)))
    with torch.no_grad():
        ctx.model.flat.zero_()
        ctx.model.spec.view(ctx.model.flat, "head.bias").copy_(torch.tensor([0.0, 1.0, 2.0, 3.0]))
    assert accuracy(ctx, [], TaskData(ctx.data.x, torch.ones_like(ctx.data.y)), ctx.mask) == 1.0
    assert accuracy(ctx, [], TaskData(ctx.data.x, torch.full_like(ctx.data.y, 3)), ctx.mask) == 0.0


def test_columns_masked_in_training_do_not_move(make_context: Make) -> None:
    ctx = make_context(Task(0, (0, 1, 2), (0, 1, 2), mask=(0, 1, 2)))
    before = ctx.model.vector()
    fit(ctx, [], LocalTraining())
    weight, old = (ctx.model.spec.view(vector, "head.weight") for vector in (ctx.model.flat, before))
    assert torch.equal(weight[3], old[3])
    assert not torch.equal(weight[:3], old[:3])


def test_columns_of_a_batchs_own_classes_by_hand() -> None:
    """Targets 0 and 2 of logits (0, 9, 0, 9): -ln(1/2) each, for columns 1 and 3 are no class of the batch."""
    out = Output(torch.tensor([[0.0, 9.0, 0.0, 9.0]] * 2), torch.zeros(2, 1))
    batch = Batch(torch.zeros(2, 1), torch.tensor([0, 2]), None)
    assert masked_cross_entropy(out, by_batch(batch, 4)).item() == pytest.approx(0.6931472)
    # a row with columns of its own keeps to them: each sample is alone with its target
    rows = batch._replace(mask=torch.tensor([[True, True, False, False], [False, False, True, True]]))
    assert by_batch(rows, 4).mask.tolist() == [[True, False, False, False], [False, False, True, False]]  # type: ignore[union-attr]
    assert masked_cross_entropy(out, by_batch(rows, 4)).item() == 0.0


class Masks(Plugin):
    """Adds a sample of class 2 to every batch, and keeps the columns that the loss is given."""

    def __init__(self) -> None:
        self.seen: list[Tensor | None] = []

    def before_step(self, ctx: Context, batch: Batch) -> Batch:
        return Batch(torch.cat([batch.x, batch.x[:1]]), torch.cat([batch.y, batch.y.new_full((1,), 2)]), batch.mask)

    def loss(self, ctx: Context, batch: Batch, out: Output) -> None:
        self.seen.append(batch.mask)


def test_samples_that_plugins_add_count_as_the_batchs_and_an_objective_keeps_its_columns(make_context: Make) -> None:
    task = Task(0, (0, 1, 2), (0, 1, 2), mask=(0, 1, 2), by_batch=True)
    for extra, columns in (([], [True, False, True, False]), ([Objective("o")], [True, True, True, False])):
        ctx, masks = make_context(task), Masks()
        ctx.data.x, ctx.data.y = ctx.data.x[:2], torch.zeros_like(ctx.data.y[:2])
        metrics = fit(ctx, [masks, *extra], LocalTraining(batch_size=2))
        assert [None if mask is None else mask.tolist() for mask in masks.seen] == [columns]
        assert metrics["loss"] < 100


class Scribe(Plugin):
    """Writes down every hook it is called by."""

    log: ClassVar[list[str]] = []

    def __init__(self, name: str) -> None:
        self.name = name

    def note(self, hook: str) -> None:
        self.log.append(f"{hook}:{self.name}")

    def before_step(self, ctx: Context, batch: Batch) -> Batch:
        self.note("before_step")
        return batch

    def loss(self, ctx: Context, batch: Batch, out: Output) -> Tensor | None:
        self.note("loss")
        return None

    def after_backward(self, ctx: Context, grads: list[Tensor]) -> None:
        self.note("after_backward")

    def after_step(self, ctx: Context) -> None:
        self.note("after_step")


class Replay(Scribe):
    phase = Phase.DATA


class Weigh(Scribe):
    phase = Phase.WEIGHT


class Objective(Scribe):
    phase = Phase.OBJECTIVE

    def objective(self, ctx: Context, batch: Batch, out: Output) -> Tensor:
        self.note("objective")
        return 2.0 * masked_cross_entropy(out, batch)


class Rival(Plugin):
    phase = Phase.OBJECTIVE

    def objective(self, ctx: Context, batch: Batch, out: Output) -> Tensor:
        return out.logits.sum()


def test_hooks_run_by_phase_not_by_listing(make_context: Make) -> None:
    Scribe.log.clear()
    plugins = ordered([Weigh("w"), Scribe("r2"), Objective("o"), Replay("d"), Scribe("r1")])
    assert [plugin.name for plugin in plugins] == ["d", "o", "r2", "r1", "w"]  # type: ignore[attr-defined]
    ctx = make_context()
    ctx.data.x, ctx.data.y = ctx.data.x[:4], ctx.data.y[:4]
    fit(ctx, plugins, LocalTraining(batch_size=4))
    everybody = ["d", "o", "r2", "r1", "w"]
    expected = [f"before_step:{name}" for name in everybody] + ["objective:o"]
    for hook in ("loss", "after_backward", "after_step"):
        expected += [f"{hook}:{name}" for name in everybody]
    assert Scribe.log == expected


def test_an_objective_stands_in_for_cross_entropy(make_context: Make) -> None:
    Scribe.log.clear()
    doubled, plain = make_context(), make_context()
    doubled.lr = plain.lr / 2
    fit(doubled, [Objective("o")], LocalTraining())
    fit(plain, [], LocalTraining())
    torch.testing.assert_close(doubled.model.flat, plain.model.flat)


def test_two_objectives_are_refused_by_name(make_context: Make) -> None:
    with pytest.raises(ValueError, match=r"learner: Objective and Rival both define 'objective': choose one"):
        owner([Objective("o"), Rival()], "objective")
    assert owner([Scribe("s")], "objective") is None


class Edits(Plugin):
    phase = Phase.GRADIENT

    def loss(self, ctx: Context, batch: Batch, out: Output) -> Tensor | None:
        return 3.0 * sum((p.square().sum() for p in ctx.model.trainable), start=torch.zeros((), device=ctx.device))

    def after_backward(self, ctx: Context, grads: list[Tensor]) -> None:
        for grad, parameter in zip(grads, ctx.model.trainable, strict=True):
            grad.sub_(6.0 * parameter.detach())


def test_loss_terms_add_up_and_gradients_can_be_edited(make_context: Make) -> None:
    edited, plain = make_context(), make_context()
    metrics = fit(edited, [Edits()], LocalTraining())
    reference = fit(plain, [], LocalTraining())
    torch.testing.assert_close(edited.model.flat, plain.model.flat)
    assert metrics["loss"] > reference["loss"]


class Oracle(Plugin):
    def predict(self, ctx: Context, x: Tensor) -> Tensor:
        return F.one_hot(torch.full((len(x),), 2, device=x.device), 4).float()


def test_predictions_may_have_an_owner(make_context: Make) -> None:
    ctx = make_context()
    share = (ctx.data.y == 2).float().mean().item()
    assert accuracy(ctx, [Oracle()], ctx.data, ctx.mask) == pytest.approx(share)


def test_a_teacher_is_asked_once_a_step_and_stays_what_it_was(make_context: Make) -> None:
    ctx = make_context()
    with pytest.raises(RuntimeError, match="no teacher"):
        ctx.teacher(ctx.data.x)
    ctx.set_teacher(ctx.received)
    first = ctx.teacher(ctx.data.x)
    assert ctx.teacher(ctx.data.x) is first
    assert torch.equal(first.logits, ctx.model(ctx.data.x).logits)
    with torch.no_grad():
        ctx.model.flat.add_(1.0)
    again = ctx.teacher(ctx.data.x.clone())
    assert torch.equal(again.logits, first.logits)
    assert not again.logits.requires_grad
    ctx.set_teacher(ctx.model.vector())
    assert not torch.equal(ctx.teacher(ctx.data.x).logits, first.logits)


class Sampler(Plugin):
    """The first half of each epoch's samples, twice."""

    def indices(self, ctx: Context, order: Tensor) -> Tensor:
        return order[: len(order) // 2].repeat(2)


class Same(Plugin):
    def indices(self, ctx: Context, order: Tensor) -> Tensor:
        return order


class Watch(Plugin):
    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def before_step(self, ctx: Context, batch: Batch) -> Batch:
        assert ctx.rows is not None
        assert torch.equal(batch.x, ctx.data.x[ctx.rows])
        self.seen.append(ctx.rows.cpu())
        return batch


def test_a_sampler_says_what_an_epoch_sees(make_context: Make) -> None:
    ctx, watch = make_context(), Watch()
    metrics = fit(ctx, [Sampler(), watch], LocalTraining(epochs=2, batch_size=4))
    order = torch.randperm(23, generator=torch_generator(ctx.seed, ctx.client, ctx.local_round, "batches"))
    assert torch.cat(watch.seen[:6]).tolist() == order[:11].tolist() * 2
    assert metrics["steps"] == 2 * 6


def test_a_sampler_that_changes_nothing_changes_no_bit(make_context: Make) -> None:
    plain, same = make_context(), make_context()
    fit(plain, [], LocalTraining(epochs=2, batch_size=4))
    fit(same, [Same()], LocalTraining(epochs=2, batch_size=4))
    assert torch.equal(plain.model.flat, same.model.flat)


def test_two_samplers_are_refused(make_context: Make) -> None:
    with pytest.raises(ValueError, match="Sampler and Same both define 'indices'"):
        fit(make_context(), [Sampler(), Same()], LocalTraining())
