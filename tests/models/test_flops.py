from __future__ import annotations

import torch

from fedcl.models.flops import flops
from fedcl.models.networks import MLP, LeNet
from fedcl.models.resnet import ResNet


def test_a_multiply_add_counts_two() -> None:
    network = MLP(input_shape=(1, 2, 3), heads=(2, 3), hidden=(4,))
    assert flops(network, (1, 2, 3)) == 2 * (6 * 4 + 4 * 5)


def test_lenet_by_hand() -> None:
    convolutions = 24 * 24 * 6 * 25 + 8 * 8 * 16 * 6 * 25
    assert flops(LeNet(input_shape=(1, 28, 28), heads=(10,)), (1, 28, 28)) == 2 * (
        convolutions + 256 * 120 + 120 * 84 + 84 * 10
    )


def test_the_model_is_left_as_it_was() -> None:
    network = ResNet(input_shape=(1, 8, 8), heads=(2,), blocks=(1,), width=2, norm="batch")
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert flops(network, (1, 8, 8)) > 0
    assert network.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
