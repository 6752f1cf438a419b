from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from fedcl.contracts.learner import LocalTraining
from fedcl.models.flat import FlatModel, Spec
from fedcl.models.networks import Network, build_model
from fedcl.models.transformer import Attention, CharTransformer, CodeEmbedding, ViT
from strategies.staleness.inversion import Simulation

SMALL: dict[str, Any] = {"dim": 8, "depth": 1, "attention_heads": 2}


def vit() -> ViT:
    return build_model(lambda: ViT(input_shape=(1, 8, 8), heads=(3,), patch=4, **SMALL), seed=0)


def reader() -> CharTransformer:
    return build_model(lambda: CharTransformer(input_shape=(5,), heads=(6,), **SMALL), seed=0)


def samples(network: Network, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if isinstance(network, ViT):
        return torch.randn(count, 1, 8, 8, generator=generator)
    return torch.randint(0, 6, (count, 5), generator=generator).float()


def test_attention_is_what_torch_computes() -> None:
    layer = build_model(lambda: Attention(8, 2), seed=0)
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    q, k, v = (layer(x).unflatten(2, (2, 4)).transpose(1, 2) for layer in (layer.query, layer.key, layer.value))
    expected = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(3, 5, 8)
    torch.testing.assert_close(layer(x), layer.out(expected))


def test_vit_cuts_patches_and_puts_the_class_token_first() -> None:
    network = vit()
    x = samples(network, 2)
    out = network(x)
    assert out.logits.shape == (2, 3)
    assert out.features.shape == (2, 8)
    assert network.positions.shape == (5, 8)
    weight, bias = network.patches.weight, network.patches.bias
    assert bias is not None
    by_hand = (x[0, :, 0:4, 4:8] * weight).sum((1, 2, 3)) + bias  # the second patch: top right
    torch.testing.assert_close(network.patches(x)[0].flatten(1)[:, 1], by_hand)


def test_reader_depends_on_order_and_ends_at_the_last_character() -> None:
    network = reader()
    there, back = network(torch.tensor([[0.0, 1, 2, 3, 4]])).logits, network(torch.tensor([[1.0, 0, 2, 3, 4]])).logits
    assert not torch.allclose(there, back)
    assert network.embedding.weight.shape == (6, 8)


def test_codes_are_looked_up_and_interpolated_between() -> None:
    layer = CodeEmbedding(3, 2)
    w = layer.weight.detach()
    x = torch.tensor([[0.0, 2.0, 0.25, -4.0, 9.0]], requires_grad=True)
    expected = torch.stack([w[0], w[2], 0.75 * w[0] + 0.25 * w[1], w[0], w[2]])
    torch.testing.assert_close(layer(x)[0], expected)
    (slope,) = torch.autograd.grad(layer(x)[0, 2].sum(), x)
    assert slope[0, 2].item() == pytest.approx(float((w[1] - w[0]).sum()), rel=1e-5)


@pytest.mark.parametrize("network", [vit(), reader()], ids=["vit", "reader"])
def test_names_scopes_and_norms(network: Network) -> None:
    spec = Spec.of(network)
    attention = [tensor.name for tensor in spec if "attn" in tensor.name]
    assert len(attention) == 8
    assert "blocks.0.attn.query.weight" in attention
    assert {tensor.name for tensor in spec if tensor.norm} == {
        f"{layer}.{kind}" for layer in ("blocks.0.norm1", "blocks.0.norm2", "norm") for kind in ("weight", "bias")
    }


@pytest.mark.parametrize("make", [vit, reader])
def test_gradients_can_be_taken_by_sample_and_through_gradient_steps(make: Any) -> None:
    model = FlatModel(make())
    model.eval()
    x = samples(model.module, 3)  # type: ignore[arg-type]
    params = dict(model.module.named_parameters())

    def loss(params: dict[str, Tensor], sample: Tensor) -> Tensor:
        logits: Tensor = functional_call(model.module, params, (sample[None],)).logits
        return logits.square().sum()

    each = vmap(grad(loss), in_dims=(None, 0))(params, x)
    (whole,) = torch.autograd.grad(model(x).logits.square().sum(), [model.module.positions])
    torch.testing.assert_close(each["positions"].sum(0), whole, rtol=1e-3, atol=1e-4)
    made_up = (x + 0.3).expand(2, *x.shape).clone().requires_grad_()
    trained = torch.ones(model.spec.size, dtype=torch.bool)
    simulation = Simulation(model.module, model.spec, trained, LocalTraining(lr=0.1), None)
    wanted = torch.zeros(2, 3, len(model(x).logits[0]))
    plan = [torch.tensor([[0, 1, 2]] * 2)]
    moved = simulation.changes(model.vector().repeat(2, 1), made_up, wanted, plan, differentiable=True)
    (gradient,) = torch.autograd.grad(moved.square().sum(), made_up)
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ViT(input_shape=(64,), heads=(2,)), r"model=vit: samples of shape \(64,\)"),
        (
            lambda: ViT(input_shape=(1, 8, 9), heads=(2,)),
            r"model\.patch=4: must divide the image's height 8 and width 9",
        ),
        (
            lambda: ViT(input_shape=(1, 8, 8), heads=(2,), dim=10),
            r"model\.attention_heads=4: must divide model\.dim=10",
        ),
        (lambda: CharTransformer(input_shape=(1, 8, 8), heads=(2,)), "model=char_transformer: samples of shape"),
        (lambda: CharTransformer(input_shape=(8,), heads=(5,), vocabulary=4), r"model\.vocabulary=4.*5 classes"),
    ],
)
def test_bad_parameters_name_their_key(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
