from __future__ import annotations

import pytest
import torch

from fedcl.models.flat import FlatModel, Spec
from fedcl.models.networks import MLP, Dropout, LeNet, build_model


def test_one_head_is_called_head_and_is_shared() -> None:
    spec = Spec.of(MLP(input_shape=(1, 8, 8), heads=(10,), hidden=(16,)))
    assert [t.name for t in spec] == ["hidden.0.weight", "hidden.0.bias", "head.weight", "head.bias"]
    assert spec["hidden.0.weight"].shape == (16, 64)
    assert all(t.task is None for t in spec)


def test_several_heads_are_concatenated_in_order_and_owned_by_their_task() -> None:
    network = MLP(input_shape=(4,), heads=(2, 3, 1), hidden=(5,))
    x = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    out = network(x)
    assert out.logits.shape == (7, 6)
    assert out.features.shape == (7, 5)
    torch.testing.assert_close(out.logits[:, 2:5], network.heads[1](out.features))
    assert [t.task for t in Spec.of(network)] == [None, None, 0, 0, 1, 1, 2, 2]


def test_fot_network_has_its_published_size() -> None:
    network = MLP(input_shape=(1, 28, 28), heads=(10,), hidden=(400, 400, 400), dropout=(0.2, 0.5, 0.5))
    assert sum(p.numel() for p in network.parameters()) == 785 * 400 + 2 * 401 * 400 + 401 * 10
    assert [layer.p for layer in network.dropouts if isinstance(layer, Dropout)] == [0.2, 0.5, 0.5]


# 44,426 and 62,006 are the usual counts of this LeNet on MNIST and CIFAR-10.
@pytest.mark.parametrize(("shape", "count"), [((1, 28, 28), 44_426), ((3, 32, 32), 62_006), ((1, 16, 20), None)])
def test_lenet_takes_images(shape: tuple[int, int, int], count: int | None) -> None:
    network = LeNet(input_shape=shape, heads=(10,))
    out = network(torch.zeros(2, *shape))
    assert out.logits.shape == (2, 10)
    assert out.features.shape == (2, 84)
    assert count is None or sum(p.numel() for p in network.parameters()) == count


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 15, 32), (64,)])
def test_lenet_says_what_does_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="model=lenet: samples of shape"):
        LeNet(input_shape=shape, heads=(10,))


def test_bad_parameters_name_their_key() -> None:
    with pytest.raises(ValueError, match=r"heads=\(\)"):
        MLP(input_shape=(4,), heads=())
    with pytest.raises(ValueError, match=r"model\.dropout=\[0\.1, 0\.1\]"):
        MLP(input_shape=(4,), heads=(2,), hidden=(3,), dropout=(0.1, 0.1))


def test_dropout_repeats_with_its_generator_and_leaves_the_global_one_alone() -> None:
    model = FlatModel(MLP(input_shape=(4,), heads=(2,), hidden=(64,), dropout=(0.5,)))
    x = torch.ones(8, 4)
    before = torch.random.get_rng_state()
    outputs = []
    for seed in (1, 1, 2):
        model.set_generator(torch.Generator().manual_seed(seed))
        outputs.append(model(x).features)
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_dropout_keeps_the_mean_and_scales_what_it_keeps() -> None:
    layer = Dropout(0.25)
    layer.set_generator(torch.Generator().manual_seed(0))
    out = layer(torch.ones(100_000))
    assert set(out.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    # Four standard errors of a Bernoulli(0.75) / 0.75 mean over 100,000 draws.
    assert abs(out.mean().item() - 1.0) < 4 * (0.25 / 0.75 / 100_000) ** 0.5


def test_dropout_is_the_identity_in_eval_and_refuses_to_train_without_generator() -> None:
    layer = Dropout(0.5)
    x = torch.ones(3, 5)
    with pytest.raises(RuntimeError, match="set_generator"):
        layer(x)
    layer.eval()
    assert layer(x) is x


def test_build_model_depends_on_the_seed_alone() -> None:
    def factory() -> MLP:
        return MLP(input_shape=(4,), heads=(2,))

    torch.rand(3)
    before = torch.random.get_rng_state()
    first = FlatModel(build_model(factory, seed=3)).vector()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(FlatModel(build_model(factory, seed=3)).vector(), first)
    assert not torch.equal(FlatModel(build_model(factory, seed=4)).vector(), first)
