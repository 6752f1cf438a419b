"""FPF and k-FPF on numbers worked by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from clients.learners.fpf import FPF, KFPF, balanced_batches, mean_changes
from fedcl.client.buffer import Replayed
from fedcl.contracts.learner import Context, TaskData
from fedcl.data.dataset import Dataset
from fedcl.models.flat import FlatModel
from fedcl.models.networks import MLP
from fedcl.scenario.streams import ClassIncremental
from fedcl.scenario.task import Task


def context(device: torch.device, *, task: int = 0, batch_size: int = 4) -> Context:
    model = FlatModel(MLP(input_shape=(2,), heads=(2,), hidden=(3, 3)), device=device)
    with torch.no_grad():
        model.flat.copy_(torch.randn(model.spec.size, generator=torch.Generator().manual_seed(2)))
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(task)).to(device)
    return Context(
        model=model, task=Task(task, (0, 1), (0, 1)), data=TaskData(x, torch.arange(6, device=device) % 2),
        received=model.vector(), epochs=1, batch_size=batch_size, lr=0.1, seed=0, client="0", local_round=task,
        is_new_task=True, task_columns={task: (0, 1)}, num_columns=2,
    )  # fmt: skip


def begin(learner: FPF, ctx: Context) -> None:
    learner.setup(ctx)
    learner.before_task(ctx)
    learner.before_round(ctx)


# hidden.0: 6 + 3, hidden.1: 9 + 3, head: 6 + 2
def test_the_change_of_a_module_is_the_mean_over_its_elements(device: torch.device) -> None:
    spec = context(device).model.spec
    change = torch.cat([torch.full((6,), 1.0), torch.full((3,), -4.0), torch.zeros(12), torch.full((8,), -0.5)])
    assert mean_changes(spec, change) == pytest.approx({"hidden.0": 2.0, "hidden.1": 0.0, "head": 0.5})
    heads = FlatModel(MLP(input_shape=(2,), heads=(1, 1), hidden=())).spec
    assert mean_changes(heads, torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])) == pytest.approx({"heads": 0.5})


@pytest.mark.parametrize(("modules", "expected"), [(1, {"hidden.1"}), (2, {"hidden.1", "head"})])
def test_the_modules_that_moved_most_are_tuned_and_no_others(
    device: torch.device, modules: int, expected: set[str]
) -> None:
    ctx, learner = context(device), FPF(modules=modules, steps=3)
    begin(learner, ctx)
    with torch.no_grad():
        ctx.model.flat[9:21] += 0.3  # hidden.1
        ctx.model.flat[21:] += 0.1
        ctx.model.flat[:9] += 0.05
    before = ctx.model.vector()
    assert learner.after_round(ctx) == {}
    moved = {s.name.rpartition(".")[0] for s in ctx.model.spec if not torch.equal(*(v[s.start : s.stop] for v in (
        ctx.model.flat, before)))}  # fmt: skip
    assert moved == expected
    # the fine-tuning itself is no change of the visit
    assert learner.state()["changes"] == pytest.approx({"hidden.0": 0.05, "hidden.1": 0.3, "head": 0.1}, abs=1e-6)
    later = FPF(modules=modules, steps=3)
    later.load(learner.state())
    follow = context(device, task=1)
    begin(later, follow)
    with torch.no_grad():
        follow.model.flat[:9] += 0.5
    before = follow.model.vector()
    later.after_round(follow)
    assert later.state()["changes"]["hidden.0"] == pytest.approx(0.55, abs=1e-6)
    assert torch.equal(follow.model.flat[9:21], before[9:21]) == (modules == 1)


def test_a_scope_chooses_instead_and_must_match(device: torch.device) -> None:
    ctx, learner = context(device), FPF(scope=r"^hidden\.0", steps=2)
    begin(learner, ctx)
    before = ctx.model.vector()
    learner.after_round(ctx)
    assert torch.equal(ctx.model.flat[9:], before[9:])
    assert not torch.equal(ctx.model.flat[:9], before[:9])
    with pytest.raises(ValueError, match=r"learner\.k_fpf\.scope='attn': matches no tensor"):
        KFPF(scope="attn").check(ctx.model)


def test_fine_tuning_lowers_the_loss_on_memory(device: torch.device) -> None:
    ctx, learner = context(device), FPF(steps=200, modules=3, lr=0.5)
    ctx.data.x = torch.tensor([[-1.0, 1.0], [1.0, -1.0]], device=device).repeat(3, 1)
    begin(learner, ctx)

    def loss() -> float:
        return torch.nn.functional.cross_entropy(ctx.model(ctx.data.x).logits, ctx.data.y).item()

    first = loss()
    learner.after_round(ctx)
    assert loss() < 0.2 * first


# one sample of class 1 among nine: half of what is drawn
def test_classes_are_drawn_equally_often(device: torch.device) -> None:
    ctx = context(device, batch_size=100)
    y = torch.tensor([0] * 8 + [1], device=device)
    held = Replayed(torch.arange(9.0, device=device)[:, None], y, torch.zeros_like(y))
    drawn = torch.cat([batch.y for batch in balanced_batches(ctx, held, 20)])
    assert len(drawn) == 2000
    assert 900 < int(drawn.sum()) < 1100


# Visits of 6 steps: k fine-tunings in the 6 or 12 steps of 1 or 2 visits.
@pytest.mark.parametrize(
    ("times", "visits", "expected"), [(1, 1, [[6]] * 3), (2, 1, [[3, 6]] * 3), (3, 2, [[4], [2, 6], [4]])]
)
def test_fine_tuning_is_due_evenly(device: torch.device, times: int, visits: int, expected: list[list[int]]) -> None:
    counted: list[list[int]] = []
    state: dict[str, Any] = {}
    for visit in range(3):
        ctx, learner = context(device, batch_size=2), KFPF(times=times, visits=visits, steps=1, modules=3)
        ctx.epochs = 2
        learner.load(state)
        learner.setup(ctx)
        if visit == 0:
            learner.before_task(ctx)
        at = []
        for ctx.step in range(1, 7):
            before = ctx.model.vector()
            learner.after_step(ctx)
            if not torch.equal(before, ctx.model.flat):
                at.append(ctx.step)
        counted.append(at)
        learner.after_round(ctx)
        state = learner.state()
    assert counted == expected


# by hand: training moves every element by 1 before and by 2 after a fine-tuning in the middle of the visit
def test_a_fine_tuning_on_the_way_is_no_change_of_the_visit(device: torch.device) -> None:
    ctx, learner = context(device), KFPF(times=2, visits=1, steps=3, modules=3, lr=0.5)
    ctx.epochs = 2
    begin(learner, ctx)
    for ctx.step, moved in ((1, 1.0), (2, 2.0)):
        with torch.no_grad():
            ctx.model.flat.add_(moved)
        before = ctx.model.vector()
        learner.after_step(ctx)
        assert torch.equal(before, ctx.model.flat) == (ctx.step == 1)
    learner.after_round(ctx)
    assert learner.state()["changes"] == pytest.approx({"hidden.0": 3.0, "hidden.1": 3.0, "head": 3.0}, abs=1e-5)


def test_memory_and_counts_travel(blobs: Dataset, make_client: Callable[..., Any]) -> None:
    stream = ClassIncremental(num_classes=6, input_shape=blobs.input_shape, seed=0, num_tasks=3)
    client = make_client(blobs, stream, {"k_fpf": partial(KFPF, budget=12, steps=2)})
    list(client.run([("train", 0), ("task_end", 0), ("train", 1), ("train", 1)]))
    state = client.state["k_fpf"]
    assert torch.bincount(state["buffer"]["y"]).tolist() == [3, 3, 3, 3]
    assert state["steps"] == 2 * 2 * 6
