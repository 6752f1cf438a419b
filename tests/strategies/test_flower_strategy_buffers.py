"""Flower's strategies and the statistics of batch normalisation, which are no weights."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideFixedClipping,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedYogi,
    QFedAvg,
)
from torch import Tensor, nn

from fedcl.contracts.strategy import GLOBAL, Update
from fedcl.models.flat import Spec
from fedcl.server.flower_strategy import FlowerAdapter
from fedcl.simulation.compat import identity

SPEC = Spec.of(nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1)))
(MEAN, VARIANCE) = (tensor for tensor in SPEC if tensor.kind == "buffer")
NODES = {"0": 1, "1": 2}
FEW: dict[str, Any] = {"fraction_evaluate": 0.0, "min_train_nodes": 1, "min_available_nodes": 1}


@pytest.fixture(autouse=True)
def _identity() -> Iterator[None]:
    with identity(1):
        yield


def run_one(strategy: Any, rounds: int = 1) -> tuple[Tensor, list[Tensor]]:
    """Let two clients with 1 and 3 samples send models whose mean and variance fall; return the result and theirs."""
    stock = FlowerAdapter(strategy, seed=0, nodes=NODES, selected=2)
    stock.setup(SPEC)
    model = torch.full((SPEC.size,), 1.0)
    sent: list[Tensor] = []
    for version in range(rounds):
        view: Any = SimpleNamespace(global_model=model, version=version)
        outgoing = stock.outgoing(list(NODES), view)
        sent = [model - 0.25, model - 0.5]
        for vector, variance in zip(sent, (0.5, 0.1), strict=True):
            vector[VARIANCE.start] = variance
        updates = [
            Update(out.client, version, GLOBAL, version, model, vector, n, float(n), 0, 0, metrics={"loss": 1.0})
            for out, vector, n in zip(outgoing, sent, (1, 3), strict=True)
        ]
        model = stock.aggregate(updates, view)[GLOBAL]
    return model, sent


@pytest.mark.parametrize(
    "strategy",
    [
        lambda: FedAdam(**FEW, eta=0.1),
        lambda: FedYogi(**FEW, eta=0.1),
        lambda: FedAdagrad(**FEW, eta=0.1),
        lambda: FedAvgM(**FEW, server_learning_rate=2.0, server_momentum=0.9),
        lambda: QFedAvg(client_learning_rate=0.1, q=0.2, train_loss_key="loss", **FEW),
    ],
    ids=["FedAdam", "FedYogi", "FedAdagrad", "FedAvgM", "QFedAvg"],
)
def test_a_strategy_that_steps_leaves_statistics_as_the_clients_mean(strategy: Any) -> None:
    model, sent = run_one(strategy(), rounds=2)
    # 1 sample and 3: the mean of 0.5 and 0.1, which two steps along the change would not stop at
    assert float(model[VARIANCE.start]) == pytest.approx((0.5 + 3 * 0.1) / 4)
    assert float(model[MEAN.start]) == pytest.approx(float(sent[0][MEAN.start] + 3 * sent[1][MEAN.start]) / 4)
    mean = (sent[0] + 3 * sent[1]) / 4
    assert not torch.allclose(model[: MEAN.start], mean[: MEAN.start]), "the weights step"


@pytest.mark.parametrize("strategy", [FedAvg, FedMedian])
def test_what_only_averages_or_chooses_is_left_as_it_is(strategy: Any) -> None:
    model, sent = run_one(strategy(**FEW))
    weight = 0.75 if strategy is FedAvg else 0.5
    torch.testing.assert_close(model, (1 - weight) * sent[0] + weight * sent[1])


def test_noise_on_statistics_is_refused() -> None:
    private = DifferentialPrivacyServerSideFixedClipping(
        FedAvg(**FEW), noise_multiplier=1.0, clipping_norm=1.0, num_sampled_clients=2
    )
    with pytest.raises(ValueError, match=r"DifferentialPrivacyServerSideFixedClipping: adds noise to 1\.running_mean"):
        FlowerAdapter(private, seed=0, nodes=NODES, selected=2).setup(SPEC)
    FlowerAdapter(private, seed=0, nodes=NODES, selected=2).setup(Spec.of(nn.Linear(2, 1)))
