"""LiNeS, HFT and GPM on numbers worked by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from clients.learners.gpm import GPM, grown, input_grams, project_layer
from clients.learners.hft import HFT, frozen_units
from clients.learners.lines import LiNeS
from fedcl.contracts.learner import Context, TaskData
from fedcl.data.dataset import Dataset
from fedcl.models.flat import FlatModel
from fedcl.models.networks import MLP, LeNet
from fedcl.scenario.streams import TaskIncremental
from fedcl.scenario.task import Task


def context(model: FlatModel, x: Tensor, y: Tensor | None = None, *, task: int = 0, local_round: int = 0) -> Context:
    y = torch.zeros(len(x), dtype=torch.int64, device=x.device) if y is None else y
    return Context(
        model=model, task=Task(task, (0, 1), (0, 1)), data=TaskData(x, y), received=model.vector(), epochs=1,
        batch_size=2, lr=0.1, seed=0, client="0", local_round=local_round, is_new_task=True, task_columns={0: (0, 1)},
        num_columns=2,
    )  # fmt: skip


# -- LiNeS ------------------------------------------------------------------------------------------------------------


def test_the_change_of_a_visit_is_scaled(device: torch.device) -> None:
    model = FlatModel(MLP(input_shape=(1,), heads=(1,), hidden=(1,)), device=device)
    ctx = context(model, torch.ones(1, 1, device=device))
    with torch.no_grad():
        model.flat.add_(2.0)
    assert LiNeS(shallow=0.25).after_round(ctx) == {}
    change = model.flat - ctx.received
    torch.testing.assert_close(change, torch.tensor([0.5, 0.5, 2.0, 2.0], device=device))


# -- HFT --------------------------------------------------------------------------------------------------------------


def test_half_of_the_units_with_their_biases(device: torch.device) -> None:
    model = FlatModel(MLP(input_shape=(3,), heads=(2, 2), hidden=(6,)), device=device)
    frozen = frozen_units(model, 0.5, torch.Generator().manual_seed(0)).float()
    full = torch.cat([frozen, torch.zeros(model.spec.size - len(frozen), device=device)])
    weight, bias = model.spec.view(full, "hidden.0.weight"), model.spec.view(full, "hidden.0.bias")
    assert bias.sum() == 3
    assert torch.equal(weight, bias[:, None].expand(6, 3))
    assert full[24:].sum() == 0  # heads


# of 6 units 0.3 x 6 = 1.8 and 0.4 x 6 = 2.4
@pytest.mark.parametrize(("share", "units"), [(0.0, 0), (0.3, 2), (0.4, 2), (1.0, 6)])
def test_the_number_of_frozen_units_is_the_nearest(device: torch.device, share: float, units: int) -> None:
    model = FlatModel(MLP(input_shape=(3,), heads=(4,), hidden=(6,)), device=device)
    frozen = frozen_units(model, share, torch.Generator().manual_seed(0))
    assert int(frozen.sum()) == units * 4  # three weights and a bias each


def test_a_single_head_trains_whole(device: torch.device) -> None:
    model = FlatModel(MLP(input_shape=(3,), heads=(4,), hidden=(6,)), device=device)
    frozen = frozen_units(model, 1.0, torch.Generator().manual_seed(0))
    assert frozen.tolist() == [True] * 24 + [False] * 28  # 6 x 3 + 6, then the head's 4 x 6 + 4


def test_frozen_units_stay_and_others_move(device: torch.device) -> None:
    model = FlatModel(MLP(input_shape=(3,), heads=(2,), hidden=(6,)), device=device)
    moved = []
    for visit in range(2):
        ctx, hft = context(model, torch.ones(1, 3, device=device), local_round=visit), HFT(share=0.5)
        hft.before_round(ctx)
        with torch.no_grad():
            model.flat.add_(1.0)
        hft.after_step(ctx)
        change = model.flat - ctx.received
        assert set(change.round().tolist()) == {0.0, 1.0}
        assert torch.equal(model.flat[change == 0], ctx.received[change == 0])
        moved.append(model.spec.view(change.round(), "hidden.0.bias"))
    assert not torch.equal(*moved)


# -- GPM --------------------------------------------------------------------------------------------------------------


def test_each_finished_task_raises_the_share_that_a_basis_is_to_hold(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares: list[float] = []

    def noting(basis_DK: Tensor, gram_DD: Tensor, share: float) -> Tensor:
        shares.append(share)
        return grown(basis_DK, gram_DD, share)

    monkeypatch.setattr("clients.learners.gpm.grown", noting)
    model = FlatModel(MLP(input_shape=(3,), heads=(2,), hidden=()), device=device)
    gpm = GPM(epsilon=0.7, increment=0.2)
    for _ in range(3):
        gpm.after_task(context(model, torch.eye(3, device=device)))
    assert shares == pytest.approx([0.7, 0.9, 1.0])


# Energies 6, 3, 1 along the axes. 60 % needs the first; holding it, 90 % of all is 3/4 of what is left: the second.
def test_bases_grow_to_the_share_worked_by_hand() -> None:
    gram, empty = torch.diag(torch.tensor([6.0, 3.0, 1.0], dtype=torch.float64)), torch.zeros(3, 0, dtype=torch.float64)
    one = grown(empty, gram, 0.6)
    assert one.abs().T.tolist() == [pytest.approx([1.0, 0.0, 0.0])]
    assert grown(one, gram, 0.6).shape == (3, 1)
    two = grown(one, gram, 0.9)
    assert two.abs().T.tolist() == [pytest.approx([1.0, 0.0, 0.0]), pytest.approx([0.0, 1.0, 0.0])]
    assert grown(empty, gram, 0.95).shape == (3, 3)
    assert grown(empty, gram, 0.0).shape == (3, 0)
    assert grown(torch.eye(3, dtype=torch.float64), gram, 1.0).shape == (3, 3)


# Input (1, 0) with a bias spans (1, 0, 1)/sqrt 2: of the row (4, 5 | 2) it takes (3, 0 | 3).
def test_a_bias_is_the_weight_of_an_input_of_one() -> None:
    weight, bias = torch.tensor([[4.0, 5.0]]), torch.tensor([2.0])
    project_layer(weight, bias, torch.tensor([[0.5**0.5], [0.0], [0.5**0.5]]))
    assert weight[0].tolist() == pytest.approx([1.0, 5.0])
    assert bias.tolist() == pytest.approx([-1.0])


def test_grams_are_those_of_each_layers_inputs(device: torch.device) -> None:
    model = FlatModel(MLP(input_shape=(2,), heads=(2, 2), hidden=(3,)), device=device)
    x = torch.randn(300, 2, generator=torch.Generator().manual_seed(0)).to(device)
    grams = input_grams(context(model, x), r"^(?!heads\.)")
    assert set(grams) == {"hidden.0"}
    rows = torch.cat([x, torch.ones(300, 1, device=device)], 1).double()
    torch.testing.assert_close(grams["hidden.0"], rows.T @ rows, rtol=1e-5, atol=1e-3)
    assert set(input_grams(context(model, x), ".*")) == {"hidden.0", "heads.0", "heads.1"}
    with pytest.raises(ValueError, match=r"learner\.gpm\.layers='attn': matches no trainable"):
        input_grams(context(model, x), "attn")


def test_convolutions_have_a_basis_of_patches(device: torch.device) -> None:
    model = FlatModel(LeNet(input_shape=(1, 28, 28), heads=(2,)), device=device)
    ctx = context(model, torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(0)).to(device))
    gpm = GPM(epsilon=0.5)
    gpm.after_task(ctx)
    convolution = next(name for name, p in model.module.named_parameters() if p.ndim == 4).removesuffix(".weight")
    assert gpm.state()["bases"][convolution].shape[0] == 26
    grads = [torch.randn(p.shape, generator=torch.Generator().manual_seed(1)).to(device) for p in model.trainable]
    gpm.after_backward(ctx, grads)
    rows = torch.cat([grads[0].flatten(1), grads[1][:, None]], 1)
    assert (rows @ gpm.state()["bases"][convolution]).abs().max() < 1e-5


def test_answers_to_the_past_stay_what_they_were(blobs: Dataset, make_client: Callable[..., Any]) -> None:
    tasks = TaskIncremental(num_classes=6, input_shape=blobs.input_shape, seed=0, num_tasks=3)
    script = [("train", 0), ("task_end", 0), ("train", 1), ("train", 1)]
    drift = {}
    for name, plugins in {"naive": {}, "gpm": {"gpm": partial(GPM, epsilon=1.0)}}.items():
        client = make_client(blobs, tasks, plugins, hidden=(32,))
        models = list(client.run(script))
        model = client.runtime.model
        x = torch.from_numpy(blobs.train.x[[y in tasks.train_task(0).classes for y in blobs.train.y]]).to(model.device)
        outputs = []
        for vector in (models[1], models[-1]):
            model.load(vector)
            model.eval()
            outputs.append(model(x).features.detach())
        drift[name] = (outputs[1] - outputs[0]).abs().max().item()
    assert drift["naive"] > 0.05
    assert drift["gpm"] < 1e-4
