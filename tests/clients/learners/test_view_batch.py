"""The sampler, the views and the divergence of view-batch on numbers worked by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from clients.learners.er import ER
from clients.learners.gdumb import GDumb
from clients.learners.view_batch import ViewBatch, first_views, mirrored, shifted, views_divergence
from fedcl.client.loop import fit
from fedcl.contracts.learner import Batch, Context, LocalTraining, Plugin, TaskData
from fedcl.data.dataset import Dataset
from fedcl.models.flat import FlatModel
from fedcl.models.networks import MLP, Output
from fedcl.scenario.streams import ClassIncremental
from fedcl.scenario.task import Task


def context(device: torch.device, samples: int = 10, *, batch_size: int = 8, epochs: int = 1) -> Context:
    module = MLP(input_shape=(3,), heads=(2,), hidden=(4,))
    model = FlatModel(module, device=device)
    x = torch.arange(3.0 * samples, device=device).view(samples, 3)
    return Context(
        model=model, task=Task(0, (0, 1), (0, 1)), data=TaskData(x, torch.arange(samples, device=device) % 2),
        received=model.vector(), epochs=epochs, batch_size=batch_size, lr=0.01, seed=0, client="0", local_round=0,
        is_new_task=True, task_columns={0: (0, 1)}, num_columns=2,
    )  # fmt: skip


class Watch(Plugin):
    """What the step is trained on, in the order it was put together."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []
        self.x: list[Tensor] = []

    def loss(self, ctx: Context, batch: Batch, out: Output) -> Tensor | None:
        assert ctx.rows is not None
        self.rows.append(ctx.rows.cpu())
        self.x.append(batch.x.cpu())
        return None


def test_a_block_of_epochs_sees_each_sample_once_in_all_its_views(device: torch.device) -> None:
    learner, ctx = ViewBatch(repeats=4), context(device)
    block = []
    for _ in range(4):
        epoch = learner.indices(ctx, torch.arange(10)).view(-1, 4)
        assert torch.equal(epoch, epoch[:, :1].expand(-1, 4))
        block += epoch[:, 0].tolist()
    assert sorted(block) == list(range(10))
    again = torch.cat([learner.indices(ctx, torch.arange(10)) for _ in range(4)])[::4].tolist()
    assert sorted(again) == list(range(10))
    assert again != block


def test_the_block_goes_on_in_the_next_visit(device: torch.device) -> None:
    straight, ctx = ViewBatch(repeats=4), context(device)
    whole = [straight.indices(ctx, torch.arange(10)) for _ in range(3)]
    first = ViewBatch(repeats=4)
    first.indices(ctx, torch.arange(10))
    later = ViewBatch(repeats=4)
    later.load(first.state())
    assert torch.equal(later.indices(ctx, torch.arange(10)), whole[1])
    later.before_task(ctx)
    assert torch.equal(later.indices(ctx, torch.arange(10)), whole[0])


def test_fewer_samples_than_views_leave_no_epoch_empty(device: torch.device) -> None:
    learner, ctx = ViewBatch(repeats=4), context(device, 2)
    epochs = [learner.indices(ctx, torch.arange(2)).tolist() for _ in range(4)]
    assert sorted(epochs[0] + epochs[1]) == [0] * 4 + [1] * 4
    assert sorted(epochs[2] + epochs[3]) == [0] * 4 + [1] * 4


def test_views_belong_to_the_first_of_their_run() -> None:
    assert first_views(torch.tensor([5, 7, 7, 7, 2, 2, 5])).tolist() == [0, 1, 1, 1, 4, 4, 6]


# A batch of 6 cuts runs of 4 into 4 + 2, 2 + 4, ...: the first of each piece is left as it is.
def test_the_first_view_in_a_batch_is_the_sample_itself(device: torch.device) -> None:
    ctx, watch = context(device, batch_size=6), Watch()
    fit(ctx, [ViewBatch(repeats=4, noise=0.5), watch], LocalTraining(epochs=1, batch_size=6, lr=0.01))
    for rows, x in zip(watch.rows, watch.x, strict=True):
        first = first_views(rows) == torch.arange(len(rows))
        clean = (x == ctx.data.x.cpu()[rows]).all(1)
        assert torch.equal(first, clean)
    assert watch.rows[1].tolist()[:2] == [int(watch.rows[0][-1])] * 2


# softmax(ln 3, 0) = (3/4, 1/4) against (1/2, 1/2): KL = 3/4 ln(3/2) + 1/4 ln(1/2)
def test_the_divergence_worked_by_hand() -> None:
    first = torch.tensor([[math.log(3.0), 0.0], [1.0, 1.0]], requires_grad=True)
    other = torch.tensor([[2.0, 2.0], [7.0, 7.0]], requires_grad=True)
    value = views_divergence(first, other)
    assert value.item() == pytest.approx((0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2)
    value.backward()
    assert first.grad is None
    assert other.grad is not None
    # the gradient of KL(p || softmax(z)) is softmax(z) - p, over 2 pairs
    assert other.grad[0].tolist() == pytest.approx([-0.125, 0.125])


def test_the_loss_is_the_weighted_divergence_of_the_views(device: torch.device) -> None:
    ctx = context(device, 2, batch_size=4)
    learner = ViewBatch(repeats=2, weight=3.0, start=1, noise=0.0)
    logits = torch.tensor([[math.log(3.0), 0.0], [2.0, 2.0], [0.0, 0.0], [5.0, 5.0]], device=device)
    losses = []
    for ctx.epoch in range(2):
        learner.indices(ctx, torch.arange(2))
        ctx.order = torch.tensor([0, 0, 1, 1], device=device)
        batch = learner.before_step(ctx, Batch(ctx.data.x[ctx.order], ctx.data.y[ctx.order], None))
        losses.append(learner.loss(ctx, batch, Output(logits, logits)))
    assert losses[0] is None  # epochs before `start`
    assert losses[1] is not None
    assert losses[1].item() == pytest.approx(3.0 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2)


def test_images_move_by_whole_pixels_and_zeros_come_in() -> None:
    x = torch.arange(1.0, 10.0).view(1, 1, 3, 3)
    moved = shifted(x.expand(200, 1, 3, 3), 1, torch.Generator().manual_seed(0))
    down_right = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 2.0], [0.0, 4.0, 5.0]])
    up = torch.tensor([[4.0, 5.0, 6.0], [7.0, 8.0, 9.0], [0.0, 0.0, 0.0]])
    kinds = {tuple(image.flatten().tolist()) for image in moved}
    assert len(kinds) == 9
    assert {tuple(image.flatten().tolist()) for image in (x, down_right, up)} <= kinds


def test_half_of_the_images_are_mirrored() -> None:
    x = torch.tensor([[[[1.0, 2.0]]]]).expand(400, 1, 1, 2)
    flipped = mirrored(x, torch.Generator().manual_seed(0))[:, 0, 0]
    assert {tuple(row) for row in flipped.tolist()} == {(1.0, 2.0), (2.0, 1.0)}
    assert 150 < int((flipped[:, 0] == 2.0).sum()) < 250


@pytest.mark.parametrize("order", [("er", "view_batch"), ("view_batch", "er"), ("gdumb", "view_batch")])
def test_it_goes_with_replay_in_either_order(
    blobs: Dataset, make_client: Callable[..., Any], order: tuple[str, str]
) -> None:
    plugins = {"er": partial(ER, budget=9), "view_batch": ViewBatch, "gdumb": partial(GDumb, budget=9)}
    stream = ClassIncremental(num_classes=6, input_shape=blobs.input_shape, seed=0, num_tasks=3)
    script = [(kind, task) for task in range(2) for kind in ("train", "train", "task_end")]
    client = make_client(blobs, stream, {name: plugins[name] for name in order})
    models = list(client.run(script))
    assert torch.isfinite(models[-1]).all()
