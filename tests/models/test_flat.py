from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fedcl.models.flat import FlatModel, Spec, TensorSpec
from fedcl.models.networks import MLP, Network, Output


class Normalised(Network):
    """Linear, batch norm, two heads: every kind of tensor that a flat vector holds."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.attach_heads(4, (2, 3))

    def forward(self, x: Tensor) -> Output:
        return self.classify(self.norm(self.body(x)))


def tiny() -> FlatModel:
    model = FlatModel(MLP(input_shape=(2,), heads=(2,), hidden=()))
    model.load(torch.tensor([1.0, 2.0, 3.0, 4.0, 10.0, 20.0]))
    return model


def test_vector_written_by_hand_gives_the_logits_computed_by_hand() -> None:
    out = tiny()(torch.tensor([[1.0, -1.0]]))
    assert out.logits.tolist() == [[1 - 2 + 10, 3 - 4 + 20]]
    assert out.features.tolist() == [[1.0, -1.0]]


def test_writing_flat_changes_the_module_and_a_step_on_the_module_changes_flat() -> None:
    model = tiny()
    model.flat[4] = 0.0
    assert model(torch.tensor([[1.0, -1.0]])).logits[0, 0].item() == -1.0
    model(torch.ones(1, 2)).logits[0, 1].backward()
    torch.optim.SGD(model.trainable, lr=0.5).step()
    assert model.flat.tolist() == [1.0, 2.0, 2.5, 3.5, 0.0, 19.5]


def test_vector_is_a_copy() -> None:
    model = tiny()
    copy = model.vector()
    model.flat.zero_()
    assert copy.tolist() == [1.0, 2.0, 3.0, 4.0, 10.0, 20.0]
    assert not copy.requires_grad


def test_layout_has_parameters_first_then_float_buffers_without_integers() -> None:
    spec = Spec.of(Normalised())
    assert list(spec) == [
        TensorSpec("body.weight", (4, 3), 0, 12, "parameter", None),
        TensorSpec("body.bias", (4,), 12, 16, "parameter", None),
        TensorSpec("norm.weight", (4,), 16, 20, "parameter", None, norm=True),
        TensorSpec("norm.bias", (4,), 20, 24, "parameter", None, norm=True),
        TensorSpec("heads.0.weight", (2, 4), 24, 32, "parameter", 0),
        TensorSpec("heads.0.bias", (2,), 32, 34, "parameter", 0),
        TensorSpec("heads.1.weight", (3, 4), 34, 46, "parameter", 1),
        TensorSpec("heads.1.bias", (3,), 46, 49, "parameter", 1),
        TensorSpec("norm.running_mean", (4,), 49, 53, "buffer", None, norm=True),
        TensorSpec("norm.running_var", (4,), 53, 57, "buffer", None, norm=True),
    ]
    assert spec.size == 57
    assert len(spec) == 10


def test_batch_norm_statistics_live_in_the_vector() -> None:
    torch_module = Normalised()
    model = FlatModel(torch_module)
    assert model.num_parameters == 49
    assert model.flat[53:57].tolist() == [1.0] * 4
    model.train()
    x = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    model(x)
    expected = 0.1 * torch_module.body(x).mean(0)
    torch.testing.assert_close(model.flat[49:53], expected.detach())
    assert torch_module.norm.num_batches_tracked is not None
    assert torch_module.norm.num_batches_tracked.item() == 1
    model.load(torch.zeros(57))
    assert torch_module.norm.running_var is not None
    assert torch_module.norm.running_var.tolist() == [0.0] * 4


def test_non_persistent_buffers_stay_outside_the_vector() -> None:
    module = Normalised()
    module.register_buffer("positions", torch.ones(7), persistent=False)
    assert Spec.of(module).size == 57


def test_spec_views_and_positions() -> None:
    spec = Spec.of(Normalised())
    vector = torch.arange(57.0)
    view = spec.view(vector, "heads.1.weight")
    assert view.shape == (3, 4)
    assert view[0].tolist() == [34.0, 35.0, 36.0, 37.0]
    view.zero_()
    assert vector[34:46].abs().sum() == 0
    for index in range(57):
        found = spec.tensor_at(index)
        assert found.start <= index < found.stop
    for outside in (-1, 57):
        with pytest.raises(IndexError, match="outside"):
            spec.tensor_at(outside)
    with pytest.raises(ValueError, match=r"\(56,\).*\(57,\)"):
        spec.view(torch.zeros(56), "body.bias")


def test_what_belongs_to_a_normalisation_layer_is_marked_by_the_layer_and_not_by_its_name() -> None:
    layers = {
        "a": nn.GroupNorm(1, 2),
        "b": nn.LayerNorm(2),
        "c": nn.InstanceNorm1d(2, affine=True),
        "norm": nn.Linear(2, 2),
    }
    marked = {tensor.name for tensor in Spec.of(nn.ModuleDict(layers)) if tensor.norm}
    assert marked == {f"{name}.{kind}" for name in "abc" for kind in ("weight", "bias")}
    assert Spec.of(nn.BatchNorm2d(3))["running_var"].norm
    assert not Spec.of(nn.Linear(2, 2))["weight"].norm


def test_spec_refuses_gaps() -> None:
    with pytest.raises(ValueError, match="does not fill"):
        Spec([TensorSpec("a", (2,), 1, 3, "parameter", None)])


@pytest.mark.parametrize("vector", [torch.zeros(5), torch.zeros(6, dtype=torch.float64), torch.zeros(2, 3)])
def test_load_refuses_another_shape_or_dtype(vector: Tensor) -> None:
    model = tiny()
    before = model.vector()
    with pytest.raises(ValueError, match=r"needs \(6,\)"):
        model.load(vector)
    assert torch.equal(model.flat, before)


def test_flat_model_refuses_what_it_cannot_hold_or_reproduce() -> None:
    with pytest.raises(ValueError, match=r"0\.weight is torch\.float64"):
        FlatModel(nn.Sequential(nn.Linear(2, 2).double()))
    with pytest.raises(ValueError, match=r"layer 1 is torch's Dropout"):
        FlatModel(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)))


def test_frozen_parameters_stay_frozen() -> None:
    module = Normalised()
    module.body.weight.requires_grad_(False)
    model = FlatModel(module)
    assert [p.requires_grad for p in module.parameters()] == [False] + [True] * 7
    assert len(model.trainable) == 7
    assert [spec.name for spec in model.parameter_specs][:1] == ["body.bias"]
    assert list(model.fixed) == ["body.weight"]
    assert (model.num_fixed, model.spec.size) == (module.body.weight.numel(), 57 - module.body.weight.numel())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_the_vector_and_the_module_share_memory() -> None:
    model = FlatModel(Normalised(), device="cuda")
    model.load(torch.ones(57))
    assert model.flat.is_cuda
    assert all(p.is_cuda and p.eq(1).all() for p in model.trainable)
