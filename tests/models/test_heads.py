from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedcl.models.chain import chain_of
from fedcl.models.flat import FlatModel, Spec
from fedcl.models.heads import CosineHead, RandomFeatures, SimplexHead, simplex
from fedcl.models.networks import MLP, LeNet, Network, build_model
from fedcl.models.resnet import ResNet
from fedcl.models.transformer import CharTransformer, ViT


def mlp(**params: Any) -> MLP:
    return build_model(lambda: MLP(**({"input_shape": (4,), "heads": (3,), "hidden": (5,)} | params)), seed=0)


def inputs(count: int = 6) -> Tensor:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(0))


def test_cosine_logits_by_hand() -> None:
    head = CosineHead(2, 2, scale=4.0)
    head.load_state_dict({"weight": torch.tensor([[3.0, 4.0], [0.0, -2.0]])})
    torch.testing.assert_close(head(torch.tensor([[10.0, 0.0]])), torch.tensor([[2.4, 0.0]]))
    torch.testing.assert_close(head(torch.tensor([[0.0, 5.0]])), torch.tensor([[3.2, -4.0]]))


def test_cosine_scale_is_learned_unless_it_is_given() -> None:
    learned, fixed = Spec.of(mlp(head="cosine")), Spec.of(mlp(head="cosine", head_scale=7.0))
    assert [t.name for t in learned][-2:] == ["head.weight", "head.scale"]
    assert learned["head.scale"].shape == ()
    assert [t.name for t in fixed][-1:] == ["head.weight"]
    network = mlp(head="cosine")
    network(inputs()).logits[:, 0].sum().backward()
    assert isinstance(network.head, CosineHead)
    assert network.head.scale.grad is not None
    assert network.head.scale.grad != 0


def test_cosine_logits_do_not_depend_on_norms() -> None:
    head = CosineHead(4, 3)
    before = head(inputs())
    with torch.no_grad():
        head.weight[1] *= 100
    torch.testing.assert_close(head(3 * inputs()), before)
    assert before.abs().max() <= 10.0 + 1e-5


@pytest.mark.parametrize("vertices", [2, 3, 10, 100])
def test_simplex_vertices_are_unit_vectors_equally_far_apart(vertices: int) -> None:
    points = simplex(vertices)
    assert points.shape == (vertices, vertices - 1)
    expected = torch.full((vertices, vertices), -1 / (vertices - 1)).fill_diagonal_(1.0)
    torch.testing.assert_close((points.double() @ points.double().T).float(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(points.sum(0), torch.zeros(vertices - 1), atol=1e-5, rtol=0)


def test_simplex_head_is_fixed_and_outside_the_vector() -> None:
    model = FlatModel(mlp(head="simplex", heads=(2, 3)))
    assert [t.name for t in model.spec] == ["hidden.0.weight", "hidden.0.bias", "embed.weight", "embed.bias"]
    out = model(inputs())
    assert out.features.shape == (6, 4)
    assert isinstance(model.module, MLP)
    rows = [head.weight for head in model.module.heads if isinstance(head, SimplexHead)]
    assert [tuple(row.shape) for row in rows] == [(2, 4), (3, 4)]
    torch.testing.assert_close(torch.cat(rows), simplex(5))
    torch.testing.assert_close(out.logits, out.features @ simplex(5).T)
    copy_model = model.copy()
    torch.testing.assert_close(copy_model(inputs()).logits, out.logits)


def test_random_features_are_drawn_once_with_the_weights_and_are_no_state() -> None:
    model = FlatModel(mlp(head="random", head_width=50))
    assert [t.name for t in model.spec] == ["hidden.0.weight", "hidden.0.bias", "head.weight", "head.bias"]
    assert model.spec["head.weight"].shape == (3, 50)
    expand = model.module.get_submodule("expand")
    assert isinstance(expand, RandomFeatures)
    assert torch.equal(expand.matrix, mlp(head="random", head_width=50).expand.matrix)
    assert 0.8 < float(expand.matrix.var()) * 5 < 1.2
    features = torch.tensor([[1.0, 0, 0, 0, 0], [0, -2.0, 0, 0, 0]])
    expected = torch.stack([expand.matrix[0].clamp(min=0), (-2 * expand.matrix[1]).clamp(min=0)])
    torch.testing.assert_close(expand(features), expected)
    assert model(inputs()).features.shape == (6, 50)
    torch.testing.assert_close(model.copy()(inputs()).logits, model(inputs()).logits)


def test_a_head_on_unit_features_reads_their_direction_alone() -> None:
    model = FlatModel(mlp(head="unit"))
    assert [t.name for t in model.spec] == ["hidden.0.weight", "hidden.0.bias", "head.weight", "head.bias"]
    unit = model.module.get_submodule("unit")
    features = torch.tensor([[3.0, 4.0], [0.0, -2.0], [0.0, 0.0]])
    torch.testing.assert_close(unit(features), torch.tensor([[0.6, 0.8], [0.0, -1.0], [0.0, 0.0]]))
    out = model(inputs())
    torch.testing.assert_close(out.features.norm(dim=1), torch.ones(6))
    assert isinstance(model.module, MLP)
    torch.testing.assert_close(out.logits, model.module.head(out.features))
    assert chain_of(model.module) is None, "a step that is written down knows plain heads only"


@pytest.mark.parametrize("kind", ["linear", "cosine", "simplex", "random", "unit"])
@pytest.mark.parametrize("heads", [(4,), (2, 2)])
@pytest.mark.parametrize(
    ("network", "shape", "params"),
    [
        (MLP, (1, 16, 16), {}),
        (LeNet, (1, 16, 16), {}),
        (ResNet, (1, 16, 16), {"blocks": (1,), "width": 4, "groups": 2}),
        (ViT, (1, 16, 16), {"dim": 8, "depth": 1}),
        (CharTransformer, (7,), {"dim": 8, "depth": 1}),
    ],
)
def test_every_network_takes_every_head(
    network: type[Network], shape: tuple[int, ...], params: dict[str, Any], heads: tuple[int, ...], kind: str
) -> None:
    wide = {"head_width": 11} if kind == "random" else {}
    made = build_model(lambda: network(input_shape=shape, heads=heads, head=kind, **params, **wide), seed=0)  # type: ignore[call-arg]
    x = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0))
    out = made(x)
    assert out.logits.shape == (3, 4)
    parts = [made.head] if len(heads) == 1 else list(made.heads)
    for head, columns in zip(parts, heads, strict=True):
        assert isinstance(head, nn.Module)
        assert head.weight.shape == (columns, out.features.shape[1])  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"head": "random"}, r"model\.head_width=None: must be >= 1 with model\.head=random"),
        ({"head_width": 5}, r"model\.head_width=5: .*null with others"),
        ({"head": "random", "head_width": 5, "head_scale": 2.0}, "a random head has no scale"),
        ({"head": "unit", "head_scale": 2.0}, "a unit head has no scale"),
        ({"head_scale": 2.0}, r"model\.head_scale=2\.0: must be null, a linear head has no scale"),
        ({"head": "simplex", "heads": (1,)}, r"model\.head=simplex: needs at least 2 classes"),
    ],
)
def test_bad_heads_name_their_key(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mlp(**params)
