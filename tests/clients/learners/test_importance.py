"""L2, MAS, SI and feature distillation on numbers worked by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clients.learners.feature_distillation import FeatureDistillation, feature_distance
from clients.learners.l2 import L2, held_elements
from clients.learners.mas import MAS, sensitivity
from clients.learners.si import SI
from fedcl.contracts.learner import Batch, Context, TaskData
from fedcl.models.flat import FlatModel
from fedcl.models.networks import MLP, Output, build_model
from fedcl.models.transformer import ViT
from fedcl.scenario.task import Task

NOTHING: tuple[Batch, Output] = (None, None)  # type: ignore[assignment]


def linear(device: torch.device, heads: tuple[int, ...] = (2,), hidden: tuple[int, ...] = ()) -> FlatModel:
    module = build_model(lambda: MLP(input_shape=(2,), heads=heads, hidden=hidden), seed=0)
    return FlatModel(module, device=device)


def context(model: FlatModel, x: Tensor, seen: dict[int, tuple[int, ...]], columns: int = 2) -> Context:
    task = max(seen)
    return Context(
        model=model, task=Task(task, seen[task], seen[task]), received=model.vector(), epochs=1, batch_size=2, lr=0.1,
        data=TaskData(x, torch.zeros(len(x), dtype=torch.int64, device=x.device)), seed=0, client="0", local_round=0,
        is_new_task=True, task_columns=seen, num_columns=columns,
    )  # fmt: skip


# -- L2 ---------------------------------------------------------------------------------------------------------------


# Distances are 1 everywhere; of the head (weights 2 x 2, bias 2) row 0 alone has been met: 3 elements.
def test_the_uniform_pull_worked_by_hand(device: torch.device) -> None:
    model = linear(device)
    ctx = context(model, torch.ones(1, 2, device=device), {0: (0,)})
    l2 = L2(weight=0.5)
    l2.setup(ctx)
    assert l2.loss(ctx, *NOTHING) is None
    l2.after_task(ctx)
    later = L2(weight=0.5)
    later.load(l2.state())
    with torch.no_grad():
        model.flat.add_(1.0)
    later.setup(ctx)
    loss = later.loss(ctx, *NOTHING)
    assert loss is not None
    assert loss.item() == pytest.approx(1.5)
    weight, bias = torch.autograd.grad(loss, model.trainable)
    assert torch.allclose(weight, torch.tensor([[1.0, 1.0], [0.0, 0.0]], device=device))
    assert torch.allclose(bias, torch.tensor([1.0, 0.0], device=device))


def test_scope_and_heads_of_their_own(device: torch.device) -> None:
    ctx = context(linear(device, (1, 2), (3,)), torch.ones(1, 2, device=device), {0: (0,), 1: (1, 2)}, 3)
    # hidden.0: weight 6, bias 3; heads.0: weight 3, bias 1; heads.1: weight 6, bias 2
    assert held_elements(ctx, ".*", [0, 2]).tolist() == [1.0] * 13 + [0.0] * 3 + [1.0] * 3 + [0.0, 1.0]
    assert held_elements(ctx, r"^(?!heads?\.)", [0, 2]).tolist() == [1.0] * 9 + [0.0] * 12
    assert torch.equal(held_elements(ctx, None, [0, 2]), held_elements(ctx, ".*", [0, 2]))
    cosine = FlatModel(MLP(input_shape=(2,), heads=(1, 2), hidden=(), head="cosine"), device=device)
    # heads.0: weight 2, scale 1; heads.1: weight 4, scale 1
    scaled = context(cosine, torch.ones(1, 2, device=device), {0: (0,), 1: (1, 2)}, 3)
    assert held_elements(scaled, None, [0, 2]).tolist() == [1.0] * 3 + [0.0, 0.0] + [1.0] * 3
    with pytest.raises(ValueError, match=r"learner\.l2\.scope='attn': matches no tensor .* hidden\.0\.weight"):
        held_elements(ctx, "attn", [])
    with pytest.raises(ValueError, match=r"learner\.l2\.scope='\(': must be a regular expression"):
        L2(scope="(")


# Two blocks of width 2: query, key, value and out have 4 weights and 2 biases each, 48 elements of attention in all.
def test_the_scope_attn_holds_the_attention_of_a_vit_and_nothing_else(device: torch.device) -> None:
    vit = ViT(input_shape=(1, 4, 4), heads=(2,), patch=2, dim=2, depth=2, attention_heads=1)
    model = FlatModel(vit, device=device)
    ctx = context(model, torch.ones(1, 1, 4, 4, device=device), {0: (0, 1)})
    l2 = L2(weight=0.25, scope="attn")
    l2.check(model)
    l2.after_task(ctx)
    l2.setup(ctx)
    with torch.no_grad():
        model.flat.add_(1.0)
    loss = l2.loss(ctx, *NOTHING)
    assert loss is not None
    assert loss.item() == pytest.approx(0.25 * 48)
    names = [name for name, _ in vit.named_parameters()]
    pulls = dict(zip(names, torch.autograd.grad(loss, model.trainable), strict=True))
    held = {name for name, pull in pulls.items() if pull.any()}
    layers = [f"{layer}.{kind}" for layer in ("query", "key", "value", "out") for kind in ("weight", "bias")]
    assert held == {f"blocks.{k}.attn.{layer}" for k in (0, 1) for layer in layers}
    for name in held:
        torch.testing.assert_close(pulls[name], torch.full_like(pulls[name], 0.5))
    with pytest.raises(ValueError, match=r"learner\.l2\.scope='attn': matches no tensor .* hidden\.0\.weight"):
        L2(scope="attn").check(linear(device, hidden=(3,)))


# -- MAS --------------------------------------------------------------------------------------------------------------


# W = [[1, 2], [3, 4]], b = 0. For x = (1, 1): o = (3, 7), d||o||^2/dW = 2 o x^T; for x = (-1, 1): o = (1, 1).
def test_the_sensitivity_worked_by_hand(device: torch.device) -> None:
    model = linear(device)
    model.load(torch.tensor([1.0, 2.0, 3.0, 4.0, 0.0, 0.0]))
    x = torch.tensor([[1.0, 1.0], [-1.0, 1.0]], device=device)
    assert sensitivity(model, x, (0, 1)).tolist() == pytest.approx([4.0, 4.0, 8.0, 8.0, 4.0, 8.0])
    assert sensitivity(model, x, (0,)).tolist() == pytest.approx([4.0, 4.0, 0.0, 0.0, 4.0, 0.0])


def test_the_sensitivity_is_that_of_a_loop_over_samples(device: torch.device) -> None:
    model = linear(device, (3,), (5,))
    x = torch.randn(7, 2, generator=torch.Generator().manual_seed(0)).to(device)
    total = torch.zeros(model.num_parameters, device=device)
    for sample in x:
        norm = model(sample[None]).logits.square().sum()
        total += torch.cat([g.abs().flatten() for g in torch.autograd.grad(norm, model.trainable)])
    torch.testing.assert_close(sensitivity(model, x, (0, 1, 2)), total / 7)


def test_importances_of_tasks_are_added(device: torch.device) -> None:
    model = linear(device)
    model.load(torch.tensor([1.0, 2.0, 3.0, 4.0, 0.0, 0.0]))
    ctx = context(model, torch.tensor([[1.0, 1.0]], device=device), {0: (0, 1)})
    mas = MAS(weight=2.0, decay=0.5)
    mas.after_task(ctx)
    mas.after_task(ctx)
    assert mas.state()["importance"][0].tolist() == pytest.approx([9.0, 9.0, 21.0, 21.0, 9.0, 21.0])
    with torch.no_grad():
        model.flat[0] += 2.0
    loss = mas.loss(ctx, *NOTHING)
    assert loss is not None
    assert loss.item() == pytest.approx(2.0 * 9.0 * 4.0)


# -- SI ---------------------------------------------------------------------------------------------------------------


# One step: g = (1, 2), dtheta = (-2, -0.5): path = (2, 1), way^2 = (4, 0.25); Omega = 2 / 4.5 and 1 / 0.75.
def test_the_way_counts_squared(device: torch.device) -> None:
    model = linear(device)
    ctx = context(model, torch.ones(1, 2, device=device), {0: (0, 1)})
    si = SI(damping=0.5)
    si.before_round(ctx)
    gradient = torch.tensor([[1.0, 2.0], [0.0, 0.0]], device=device)
    si.after_backward(ctx, [gradient, torch.zeros(2, device=device)])
    with torch.no_grad():
        model.flat[:2] += torch.tensor([-2.0, -0.5], device=device)
    si.after_step(ctx)
    si.after_task(ctx)
    assert si.state()["importance"][0, :2].tolist() == pytest.approx([2 / 4.5, 1 / 0.75])


# Two steps: g = (2, -1), dtheta = (-0.5, 0.5), then g = (1, 1), dtheta = (-0.5, 0.5); all else stands still.
# path = (1 + 0.5, 0.5 - 0.5), way = (-1, 1); Omega = 1.5 / (1 + 0.5) = 1 and 0.
def test_the_path_integral_worked_by_hand(device: torch.device) -> None:
    model = linear(device)
    ctx = context(model, torch.ones(1, 2, device=device), {0: (0, 1)})
    si = SI(weight=3.0, damping=0.5)
    si.before_round(ctx)
    for first, second in ((2.0, -1.0), (1.0, 1.0)):
        weight = torch.tensor([[first, second], [0.0, 0.0]], device=device)
        si.after_backward(ctx, [weight, torch.zeros(2, device=device)])
        with torch.no_grad():
            model.flat[:2] += torch.tensor([-0.5, 0.5], device=device)
        si.after_step(ctx)
    assert si.state()["path"].tolist() == pytest.approx([1.5, 0.0, 0.0, 0.0, 0.0, 0.0], abs=1e-6)
    si.after_task(ctx)
    assert set(si.state()) == {"importance", "anchor"}
    assert si.state()["importance"][0].tolist() == pytest.approx([1.0, 0.0, 0.0, 0.0, 0.0, 0.0], abs=1e-6)
    with torch.no_grad():
        model.flat[0] += 2.0
    loss = si.loss(ctx, *NOTHING)
    assert loss is not None
    assert loss.item() == pytest.approx(3.0 * 1.0 * 4.0)
    # the penalty's own gradient, 2 c Omega (theta - theta~) = 12, is no part of the next path
    si.before_round(ctx)
    si.after_backward(ctx, [torch.tensor([[13.0, 0.0], [0.0, 0.0]], device=device), torch.zeros(2, device=device)])
    with torch.no_grad():
        model.flat[0] -= 1.0
    si.after_step(ctx)
    assert si.state()["path"][0].item() == pytest.approx(1.0)


def test_gradients_as_one_vector_are_those_of_what_is_learned(device: torch.device) -> None:
    module = MLP(input_shape=(2,), heads=(2,), hidden=())
    module.head.weight.requires_grad_(False)
    model = FlatModel(module, device=device)
    assert model.flatten([torch.tensor([5.0, 6.0], device=device)]).tolist() == [5, 6]


# -- feature distillation ---------------------------------------------------------------------------------------------


def test_the_distance_of_features_worked_by_hand(device: torch.device) -> None:
    student = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    assert feature_distance(student, torch.tensor([[0.0, 0.0], [3.0, 0.0]])).item() == pytest.approx((5 + 9) / 2)


def test_features_are_held_where_the_last_task_left_them(device: torch.device) -> None:
    model = linear(device, (2,), (3,))
    ctx = context(model, torch.ones(2, 2, device=device), {0: (0, 1)})
    batch = Batch(ctx.data.x, ctx.data.y, None)
    learner = FeatureDistillation(weight=2.0)
    learner.before_round(ctx)
    assert learner.loss(ctx, batch, model(batch.x)) is None
    learner.after_task(ctx)
    learner.before_round(ctx)
    still = learner.loss(ctx, batch, model(batch.x))
    moved = learner.loss(ctx, batch, Output(model(batch.x).logits, model(batch.x).features + 1.0))
    assert still is not None
    assert moved is not None
    assert still.item() == pytest.approx(0.0)
    assert moved.item() == pytest.approx(2.0 * 3)
