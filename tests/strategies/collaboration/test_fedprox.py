from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from clients.strategies.fedprox import FedProx
from fedcl.base.randomness import numpy_generator
from fedcl.client.local_data import PartitionedData
from fedcl.client.runtime import ClientRuntime
from fedcl.client.state import MemoryStateStore
from fedcl.contracts.learner import Batch, Context, LocalTraining, Plugin
from fedcl.data.dataset import ArrayDataset, Dataset, Partition
from fedcl.messages import Request
from fedcl.models.flat import FlatModel
from fedcl.models.networks import MLP, Output, build_model
from fedcl.scenario.task import Task


class ProximalLoss(Plugin):
    """The proximal term as the paper writes it: part of the loss."""

    def __init__(self, mu: float) -> None:
        self.mu = mu

    def loss(self, ctx: Context, batch: Batch, out: Output) -> Tensor:
        anchors = [ctx.model.spec.view(ctx.received, spec.name) for spec in ctx.model.parameter_specs]
        squares = [((p - a) ** 2).sum() for p, a in zip(ctx.model.trainable, anchors, strict=True)]
        return self.mu / 2 * torch.stack(squares).sum()


def train(plugin: Plugin | None, freeze: bool = False) -> tuple[Tensor, Tensor]:
    """Return (received, trained) after two epochs at one client."""

    def network() -> MLP:
        return MLP(input_shape=(5,), heads=(3,), hidden=(6,))

    rng = numpy_generator("prox")
    half = ArrayDataset(rng.standard_normal((30, 5)).astype(np.float32), np.arange(30) % 3)
    everything = (np.arange(30),)
    module = build_model(network, seed=2)
    module.hidden[0].weight.requires_grad_(not freeze)
    model = FlatModel(module)
    runtime = ClientRuntime(
        model=model,
        plugins={} if plugin is None else {"plugin": lambda: plugin},
        data=PartitionedData(Dataset(half, half, ("a", "b", "c")), Partition(everything, everything), ("0",)),
        training=LocalTraining(epochs=2, batch_size=7, lr=0.1, momentum=0.5, weight_decay=0.01),
        seed=0,
        num_columns=3,
    )
    received = model.vector()
    task = Task(0, (0, 1, 2), (0, 1, 2))
    reply = runtime.visit(Request("train", "0", 0, -1, 0, 0, task, "", received), MemoryStateStore())
    assert reply.model is not None
    return received, reply.model


@pytest.mark.parametrize("mu", [0.01, 1.0])
def test_the_gradient_is_that_of_the_loss_term(mu: float) -> None:
    _, ours = train(FedProx(mu=mu))
    _, papers = train(ProximalLoss(mu))
    torch.testing.assert_close(ours, papers, rtol=1e-5, atol=1e-6)
    assert not torch.equal(ours, train(None)[1])


def test_a_stronger_pull_ends_nearer() -> None:
    distances = []
    for mu in (0.0, 0.1, 1.0, 5.0):
        received, trained = train(FedProx(mu=mu))
        distances.append(float((trained - received).norm()))
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < distances[0] / 3


def test_without_a_pull_the_bits_are_those_of_plain_training() -> None:
    assert torch.equal(train(FedProx(mu=0.0))[1], train(None)[1])


def test_frozen_tensors_are_left_alone() -> None:
    received, trained = train(FedProx(mu=0.5), freeze=True)
    assert len(received) == 6 + 6 * 3 + 3  # without the hidden layer's 30 weights
    assert not torch.equal(received, trained)


def test_a_run_with_mu_zero_is_fedavg_bit_for_bit(
    run_experiment: Callable[..., Path], metrics_hash: Callable[[Path], str]
) -> None:
    setting = ["num_clients=4", "rounds_per_task=1", "strategy/projection=none", "engine=loop"]
    plain = run_experiment("fedavg", *setting, "strategy/collaboration=fedavg")
    zero = run_experiment("zero", *setting, "strategy/collaboration=fedprox", "strategy.collaboration.client.mu=0")
    pulled = run_experiment("pulled", *setting, "strategy/collaboration=fedprox", "strategy.collaboration.client.mu=1")
    assert metrics_hash(zero) == metrics_hash(plain)
    assert metrics_hash(pulled) != metrics_hash(plain)
    assert json.loads((pulled / "summary.json").read_text())["accuracy/average"] > 0.5
