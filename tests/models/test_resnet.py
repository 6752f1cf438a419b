from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fedcl.contracts.learner import LocalTraining
from fedcl.models.flat import FlatModel, Spec
from fedcl.models.networks import build_model
from fedcl.models.resnet import BatchNorm2d, ResNet
from strategies.staleness.inversion import Simulation

IMAGE = (3, 16, 16)


def small(norm: str = "batch", blocks: Sequence[int] = (1, 1), **params: Any) -> ResNet:
    def make() -> ResNet:
        return ResNet(
            input_shape=IMAGE, heads=params.pop("heads", (4,)), blocks=blocks, width=4, norm=norm, groups=2, **params
        )

    return build_model(make, seed=0)


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randn((count, *IMAGE), generator=torch.Generator().manual_seed(seed))


def warmed() -> FlatModel:
    """Return a model whose running statistics have moved."""
    model = FlatModel(small())
    model.train()
    model(images(8))
    model.eval()
    return model


def test_resnet18_on_imagenet_has_its_published_size() -> None:
    network = ResNet(input_shape=(3, 224, 224), heads=(1000,), blocks=(2, 2, 2, 2), stem="imagenet", norm="batch")
    assert sum(p.numel() for p in network.parameters()) == 11_689_512
    names = [tensor.name for tensor in Spec.of(network)]
    assert {"conv1.weight", "bn1.weight", "layer2.0.downsample.0.weight", "layer4.1.bn2.running_var"} <= set(names)


@pytest.mark.parametrize(("blocks", "features"), [((1, 1, 1), 16), ((1, 1, 1, 1), 32)])
@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize("stem", ["small", "imagenet"])
def test_shapes(blocks: tuple[int, ...], features: int, norm: str, stem: str) -> None:
    out = small(norm, blocks, stem=stem, heads=(2, 3))(images(2))
    assert out.logits.shape == (2, 5)
    assert out.features.shape == (2, features)


def test_strides_halve_the_image_from_the_second_stage_on() -> None:
    seen = []
    network = small(blocks=(1, 1, 1))
    for stage in network.stages:
        network.get_submodule(stage).register_forward_hook(lambda module, args, out: seen.append(out.shape[2]))
    network(images(2))
    assert seen == [16, 8, 4]


def test_norm_tensors_are_marked() -> None:
    spec = Spec.of(small())
    marked = {tensor.name for tensor in spec if tensor.norm}
    assert marked == {t.name for t in spec if "bn" in t.name or "downsample.1" in t.name}
    assert {t.name.rpartition(".")[2] for t in spec if t.norm} == {"weight", "bias", "running_mean", "running_var"}
    assert not any(tensor.norm for tensor in Spec.of(small("none")))


def test_a_single_value_a_channel_is_normalised_by_the_running_statistics() -> None:
    layer = BatchNorm2d(2)
    with pytest.raises(ValueError, match="more than 1 value"):
        nn.BatchNorm2d(2)(torch.ones(1, 2, 1, 1))
    assert layer.running_mean is not None
    layer.running_mean.copy_(torch.tensor([1.0, 3.0]))
    out = layer(torch.tensor([2.0, 2.0]).view(1, 2, 1, 1))
    torch.testing.assert_close(out.flatten(), torch.tensor([1.0, -1.0]), atol=1e-4, rtol=0)
    assert layer.running_mean.tolist() == [1.0, 3.0]
    layer(torch.zeros(1, 2, 2, 1))
    torch.testing.assert_close(layer.running_mean, torch.tensor([0.9, 2.7]))


def test_running_statistics_are_in_the_vector_and_a_twin_has_its_own() -> None:
    model = warmed()
    copy_model = model.copy()
    before = copy_model.vector()
    model.train()
    model(images(8, seed=1))
    assert torch.equal(copy_model.vector(), before)
    moved = (model.vector() != before).nonzero().flatten()
    assert {model.spec.tensor_at(int(i)).name.rpartition(".")[2] for i in moved} == {"running_mean", "running_var"}
    model.load(before)
    model.eval()
    copy_model.eval()
    assert torch.equal(model(images(3)).logits, copy_model(images(3)).logits)


def test_functional_calls_in_evaluation_read_the_statistics_they_are_given() -> None:
    model = warmed()
    state = {tensor.name: model.spec.view(model.vector(), tensor.name) for tensor in model.spec}
    x = images(2)
    same = functional_call(model.module, state, (x,)).logits
    torch.testing.assert_close(same, model(x).logits)
    state["bn1.running_mean"] = state["bn1.running_mean"] + 1.0
    before = model.vector()
    assert not torch.allclose(functional_call(model.module, state, (x,)).logits, same)
    assert torch.equal(model.vector(), before)


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_gradients_of_single_samples_add_up_to_the_batch_gradient(norm: str) -> None:
    model = FlatModel(small(norm))
    model.eval()
    params = dict(model.module.named_parameters())
    buffers = dict(model.module.named_buffers())

    def loss(params: dict[str, Tensor], sample: Tensor) -> Tensor:
        logits: Tensor = functional_call(model.module, {**params, **buffers}, (sample[None],)).logits
        return logits.square().sum()

    x = images(3)
    each = vmap(grad(loss), in_dims=(None, 0))(params, x)
    (whole,) = torch.autograd.grad(model(x).logits.square().sum(), [model.trainable[0]])
    torch.testing.assert_close(each["conv1.weight"].sum(0), whole, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("clients", [1, 2])
def test_inversion_differentiates_through_local_steps_with_batch_norm(clients: int) -> None:
    model = warmed()
    trained = torch.arange(model.spec.size) < model.num_parameters
    simulation = Simulation(model.module, model.spec, trained, LocalTraining(lr=0.05), None)
    plan = [torch.tensor([[0, 1]] * clients), torch.tensor([[2, 3]] * clients)]
    x = images(4 * clients).view(clients, 4, *IMAGE).requires_grad_()
    y = torch.randn(clients, 4, 4, generator=torch.Generator().manual_seed(1))
    base = model.vector().repeat(clients, 1)
    moved = simulation.changes(base, x, y, plan, differentiable=True)
    (gradient,) = torch.autograd.grad(moved.square().sum(), x)
    assert gradient.isfinite().all()
    assert (gradient.flatten(1).abs().sum(1) > 0).all()
    assert moved[:, model.num_parameters :].abs().sum() == 0  # the statistics stay


def test_frozen_batch_norm_keeps_its_statistics_while_the_rest_moves_its_own() -> None:
    model = FlatModel(small(freeze=r"^(conv1|bn1|layer1)\."))
    model.train()
    before = model.vector()
    model(images(8))
    moved = {model.spec.tensor_at(int(i)).name for i in (model.vector() != before).nonzero()}
    assert moved
    assert all(name.startswith("layer2.") for name in moved)
    copy_model = model.copy()
    copy_model.train()
    assert not copy_model.module.get_submodule("bn1").training
    assert copy_model.module.get_submodule("layer2.0.bn1").training
    assert {"bn1.weight", "bn1.running_mean", "layer1.0.bn1.running_var"} < model.fixed.keys()
    assert all(tensor.name.startswith(("layer2.", "head.")) for tensor in model.spec)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"input_shape": (64,)}, r"model=resnet: samples of shape \(64,\)"),
        ({"width": 6, "groups": 4}, r"model\.width=6, model\.groups=4"),
    ],
)
def test_bad_parameters_name_their_key(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResNet(**({"input_shape": IMAGE, "heads": (2,), "blocks": (1,), "width": 4, "groups": 2} | params))
