"""CDP: the channel that tells the forgotten class apart is pruned, and puts out nothing any more."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from clients.unlearners.cdp import CDP, activation_sums, outputs, scores
from fedcl.contracts.unlearner import Samples
from fedcl.models.flat import FlatModel
from fedcl.models.networks import MLP, LeNet, build_model
from fedcl.models.resnet import ResNet
from fedcl.models.transformer import ViT
from tests.clients.serving import NOTHING, Serving

CLASSES = 4


def one_channel_a_class() -> FlatModel:
    """Return a network in which hidden channel c sees input c alone, channel 4 all inputs, channel 5 nothing."""
    model = FlatModel(MLP(input_shape=(CLASSES,), heads=(CLASSES,), hidden=(CLASSES + 2,)))
    weight = torch.zeros(CLASSES + 2, CLASSES)
    weight[:CLASSES] = torch.eye(CLASSES)
    weight[CLASSES] = 1.0
    model.spec.view(model.flat, "hidden.0.weight").copy_(weight)
    model.spec.view(model.flat, "hidden.0.bias").copy_(torch.tensor([0.1] * (CLASSES + 1) + [-1.0]))
    return model


def dealt(*, forgotten: int = 2, each: int = 6) -> dict[str, tuple[Samples, Samples]]:
    """Return one-hot inputs, by class, at two clients of which only one has the forgotten class."""
    y = torch.arange(CLASSES).repeat(each)
    samples = Samples(torch.eye(CLASSES)[y], y)
    first = torch.arange(len(y)) < len(y) // 2
    gone = y == forgotten
    return {"0": (samples.at(gone), samples.at(first & ~gone)), "1": (NOTHING, samples.at(~first & ~gone))}


@pytest.mark.parametrize("forgotten", range(CLASSES))
def test_the_channel_of_the_class_is_pruned_and_no_other(forgotten: int) -> None:
    model = one_channel_a_class()
    serving = Serving(CDP(sparsity=0.1), model, dealt(forgotten=forgotten))
    edited = serving.serve()
    weight = model.spec.view(edited, "hidden.0.weight")
    before = model.spec.view(serving.initial, "hidden.0.weight")
    changed = (weight != before).any(1).nonzero().flatten().tolist()
    assert changed == [forgotten]
    assert not weight[forgotten].any()
    assert not model.spec.view(edited, "hidden.0.bias")[forgotten]
    head = model.spec["head.weight"].start
    assert torch.equal(edited[head:], serving.initial[head:])
    assert serving.unlearner.metrics() == {"pruned": pytest.approx(1 / 6)}
    model.load(edited)
    assert not model(torch.eye(CLASSES)).features[:, forgotten].any()


def test_channels_that_tell_nothing_apart_are_never_pruned() -> None:
    """However large the share: neither the channel that all classes use alike, nor the one that none uses."""
    serving = Serving(CDP(sparsity=0.9), one_channel_a_class(), dealt())
    weight = serving.spec.view(serving.serve(), "hidden.0.weight")
    assert weight[CLASSES].tolist() == [1.0] * CLASSES
    assert serving.unlearner.metrics() == {"pruned": pytest.approx(4 / 6)}


def test_scores_by_hand() -> None:
    activation = torch.tensor([[3.0, 1.0], [0.0, 1.0], [0.0, 2.0], [0.0, 2.0]]).double()
    # channel 0: one class is above its mean 0.75; channel 1: two are above 1.5
    expected = torch.tensor([[0.75 * math.log(2), 0.25 * math.log(4 / 3)], [0.0, math.log(4 / 3)]]).double()
    torch.testing.assert_close(scores(activation)[:2], expected)


def test_sums_are_the_same_however_samples_are_dealt() -> None:
    net = build_model(lambda: MLP(input_shape=(CLASSES,), heads=(CLASSES,), hidden=(7, 5)), seed=3)
    y = torch.arange(24) % CLASSES
    samples = Samples(torch.randn(24, CLASSES, generator=torch.Generator().manual_seed(0)), y)
    gone, first = y == 1, torch.arange(24) < 5
    apart = {
        "0": (samples.at(gone & first), samples.at(~gone & first)),
        "1": (samples.at(gone & ~first), samples.at(~gone & ~first)),
    }
    edits = []
    for held in (apart, {"0": (samples.at(gone), samples.at(~gone))}):
        edits.append(Serving(CDP(sparsity=0.3), FlatModel(net), held).serve())
    assert torch.equal(*edits)
    assert not torch.equal(edits[0], FlatModel(net).vector())


@pytest.mark.parametrize(
    ("norm", "named"),
    [("batch", ["conv1+bn1", "layer1.0.conv1+layer1.0.bn1"]), ("group", ["bn1", "layer1.0.bn1"]), ("none", ["conv1"])],
)
def test_activations_are_of_the_normalised_and_cut_off_outputs(norm: str, named: list[str]) -> None:
    settings: dict[str, Any] = {"input_shape": (1, 8, 8), "heads": (3,), "blocks": [1], "width": 4, "groups": 2}
    model = FlatModel(build_model(lambda: ResNet(norm=norm, **settings), seed=0))
    samples = Samples(torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(6) % 3)
    sums = activation_sums(model, samples, 3, batch_size=4)
    assert set(named) <= sums.keys()
    assert len(sums) == 3
    net: Any = model.module
    with torch.no_grad():
        first = torch.relu(net.bn1(net.conv1(samples.x))).mean((2, 3)).double()
    expected = torch.stack([first[samples.y == c].sum(0) for c in range(3)])
    torch.testing.assert_close(sums[named[0]], expected, rtol=1e-5, atol=1e-6)
    assert all(not layer._forward_hooks for layer in net.modules())


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_a_pruned_channel_of_a_convolution_puts_out_nothing(norm: str) -> None:
    settings: dict[str, Any] = {"input_shape": (1, 8, 8), "heads": (3,), "blocks": [1], "width": 4, "groups": 2}
    model = FlatModel(build_model(lambda: ResNet(norm=norm, **settings), seed=0))
    model.flat.add_(0.05 * torch.randn(model.spec.size, generator=torch.Generator().manual_seed(2)).abs())
    y = torch.arange(24) % 3
    x = torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(1)) + 2.0 * (y == 1)[:, None, None, None]
    samples = Samples(x, y)
    unlearner = CDP(sparsity=0.25)
    serving = Serving(unlearner, model, {"0": (samples.at(y == 1), samples.at(y != 1))})
    edited = serving.serve()
    sums = unlearner.local(serving.context("0", serving.initial), "activations").tensors
    model.load(edited)
    with outputs(model.module) as put_out, torch.no_grad():
        model(samples.x)
    silenced = 0
    for layer, out in put_out.items():
        chosen = unlearner.select(sums, layer)
        assert not out[:, chosen].any()
        silenced += int(chosen.sum())
    assert silenced > 0


def test_lenet_has_its_four_hidden_layers() -> None:
    model = FlatModel(LeNet(input_shape=(1, 16, 16), heads=(2, 2)))
    assert set(activation_sums(model, Samples(torch.zeros(2, 1, 16, 16), torch.tensor([0, 3])), 4)) == {
        "conv1", "conv2", "fc1", "fc2",
    }  # fmt: skip


def test_without_the_class_nothing_changes() -> None:
    serving = Serving(CDP(), one_channel_a_class(), {"0": (NOTHING, dealt()["1"][1])})
    assert torch.equal(serving.serve(), serving.initial)


def test_models_without_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="no hidden layer"):
        CDP().check(FlatModel(MLP(input_shape=(4,), heads=(3,), hidden=())))
    vit = FlatModel(ViT(input_shape=(1, 8, 8), heads=(3,), patch=4, dim=8, depth=1, attention_heads=2))
    with pytest.raises(ValueError, match="without attention"):
        CDP().check(vit)
