from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import clients.strategies.scaffold
import strategies.collaboration.scaffold
from fedcl.base.randomness import numpy_generator
from fedcl.base.tree import equal
from fedcl.client.local_data import PartitionedData
from fedcl.client.runtime import ClientRuntime
from fedcl.client.state import NEVER, MemoryStateStore
from fedcl.contracts.learner import LocalTraining
from fedcl.contracts.requests import ForgetRequest
from fedcl.contracts.strategy import GLOBAL, Update
from fedcl.data.dataset import ArrayDataset, Dataset, Partition
from fedcl.messages import Reply, Request
from fedcl.models.flat import FlatModel
from fedcl.models.networks import MLP, build_model
from fedcl.scenario.task import Task
from fedcl.server.strategy import Pipeline, check_payloads

CLIENTS = ("0", "1", "2")
LR = 0.2
TASK = Task(0, (0, 1, 2), (0, 1, 2))


def network() -> MLP:
    return MLP(input_shape=(5,), heads=(3,), hidden=(4,))


def samples(client: str) -> tuple[Tensor, Tensor]:
    """Client k holds 6 + 3k samples, mostly of class k."""
    k = int(client)
    rng = numpy_generator("scaffold", client)
    y = np.where(rng.random(6 + 3 * k) < 0.8, k, rng.integers(0, 3, 6 + 3 * k))
    x = rng.standard_normal((len(y), 5)) + np.eye(3, 5)[y]
    return torch.from_numpy(x.astype(np.float32)), torch.from_numpy(y.astype(np.int64))


@dataclass
class Federation:
    """Server half and clients, without messages: full batches, so that nothing is random."""

    server_lr: float = 1.0
    epochs: int = 3
    weight_decay: float = 0.0
    version: int = 0
    clients: tuple[str, ...] = CLIENTS
    visits: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        parts = [samples(client) for client in CLIENTS]
        half = ArrayDataset(torch.cat([x for x, _ in parts]).numpy(), torch.cat([y for _, y in parts]).numpy())
        edges = np.cumsum([0, *(len(y) for _, y in parts)])
        held = tuple(np.arange(a, b) for a, b in pairwise(edges))
        model = FlatModel(build_model(network, seed=3))
        self.spec = model.spec
        self.store = MemoryStateStore()
        self.runtime = ClientRuntime(
            model=model,
            plugins={"half": clients.strategies.scaffold.Scaffold},
            data=PartitionedData(Dataset(half, half, ("a", "b", "c")), Partition(held, held), CLIENTS),
            training=LocalTraining(epochs=self.epochs, batch_size=100, lr=LR, weight_decay=self.weight_decay),
            seed=0,
            num_columns=3,
        )
        self.part = strategies.collaboration.scaffold.Scaffold(server_lr=self.server_lr)
        self.pipeline = Pipeline(collaboration=self.part)
        self.pipeline.setup(self.spec)
        self.global_model = model.vector()

    def model_of(self, client: str) -> Tensor:
        return self.global_model

    def visit(self, client: str) -> Update:
        (out,) = self.pipeline.outgoing([client], self)  # type: ignore[arg-type]
        visit = self.visits.get(client, NEVER) + 1
        request = Request("train", client, visit, visit - 1, 0, 0, TASK, "", out.model, out.payload)
        reply: Reply = self.runtime.visit(request, self.store)
        self.store.commit(client, visit)
        self.visits[client] = visit
        assert reply.model is not None
        n = reply.num_examples
        return Update(client, visit, GLOBAL, 0, out.model, reply.model, n, float(n), 0, 0, payload=reply.payload)

    def run(self, present: Iterable[str] = CLIENTS) -> None:
        updates = [self.visit(client) for client in present]
        self.global_model = self.pipeline.aggregate(updates, self)[GLOBAL]  # type: ignore[arg-type]

    def own(self, client: str) -> Tensor:
        if client not in self.visits:
            return torch.zeros(self.spec.size)
        control: Tensor = self.store.load(client, self.visits[client])["plugins"]["half"]["control"]
        return control

    @property
    def control(self) -> Tensor:
        return self.part.state_dict()["control"]  # type: ignore[no-any-return]


class Paper:
    """Algorithm 1 with option II, written down line by line in float64."""

    def __init__(self, start: Tensor, epochs: int, weight_decay: float, server_lr: float) -> None:
        self.x = start.double()
        self.c = torch.zeros_like(self.x)
        self.c_i = {client: torch.zeros_like(self.x) for client in CLIENTS}
        self.epochs, self.weight_decay, self.server_lr = epochs, weight_decay, server_lr
        self.module = network().double()

    def gradient(self, y: Tensor, client: str) -> Tensor:
        inputs, labels = samples(client)
        torch.nn.utils.vector_to_parameters(y, self.module.parameters())
        loss = F.cross_entropy(self.module(inputs.double()).logits, labels)
        gradients = torch.autograd.grad(loss, list(self.module.parameters()))
        return torch.cat([g.flatten() for g in gradients]) + self.weight_decay * y

    def run(self, present: Iterable[str]) -> None:
        delta_y, delta_c = [], []
        for client in present:
            y = self.x.clone()
            for _ in range(self.epochs):
                y = y - LR * (self.gradient(y, client) - self.c_i[client] + self.c)
            renewed = self.c_i[client] - self.c + (self.x - y) / (self.epochs * LR)
            delta_y.append(y - self.x)
            delta_c.append(renewed - self.c_i[client])
            self.c_i[client] = renewed
        self.x = self.x + self.server_lr * torch.stack(delta_y).mean(0)
        self.c = self.c + torch.stack(delta_c).sum(0) / len(CLIENTS)


PARTICIPATION = [CLIENTS, ("0", "2"), ("1",), CLIENTS, ("0", "1")]


@pytest.mark.parametrize(
    ("epochs", "weight_decay", "server_lr"), [(1, 0.0, 1.0), (3, 0.0, 1.0), (4, 0.1, 1.0), (3, 0.0, 0.5)]
)
def test_rounds_equal_the_paper(epochs: int, weight_decay: float, server_lr: float) -> None:
    ours = Federation(server_lr=server_lr, epochs=epochs, weight_decay=weight_decay)
    paper = Paper(ours.global_model, epochs, weight_decay, server_lr)
    for present in PARTICIPATION:
        ours.run(present)
        paper.run(present)
        torch.testing.assert_close(ours.global_model.double(), paper.x, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.control, paper.c, rtol=1e-4, atol=2e-5)
        for client in CLIENTS:
            torch.testing.assert_close(ours.own(client).double(), paper.c_i[client], rtol=1e-4, atol=2e-5)
    assert float(ours.control.norm()) > 0.01


def test_the_servers_variate_is_the_mean_of_all_clients() -> None:
    federation = Federation()
    for present in PARTICIPATION:
        federation.run(present)
        mean = torch.stack([federation.own(client).double() for client in CLIENTS]).mean(0)
        torch.testing.assert_close(federation.control, mean, rtol=0, atol=1e-6)


def test_the_first_round_is_uncorrected() -> None:
    federation = Federation()
    update = federation.visit("1")
    plain = Federation()
    plain.runtime.plugins = {}
    received = plain.global_model
    reply = plain.runtime.visit(Request("train", "1", 0, NEVER, 0, 0, TASK, "", received), plain.store)
    assert reply.model is not None
    assert torch.equal(update.model, reply.model)


def test_both_halves_declare_the_same_payloads() -> None:
    check_payloads(strategies.collaboration.scaffold.Scaffold.payloads, [clients.strategies.scaffold.Scaffold()])


def test_everybody_is_sent_the_same_tensors() -> None:
    federation = Federation()
    federation.run()
    first, second = federation.pipeline.outgoing(["0", "1"], federation)  # type: ignore[arg-type]
    assert all(first.payload[name] is second.payload[name] for name in ("control", "control_epoch"))
    assert first.payload["control"].dtype == torch.float32
    torch.testing.assert_close(first.payload["control"].double(), federation.control)


def test_a_visit_without_variate_is_refused() -> None:
    federation = Federation()
    request = Request("train", "0", 0, NEVER, 0, 0, TASK, "", federation.global_model)
    with pytest.raises(ValueError, match="control variate"):
        federation.runtime.visit(request, federation.store)


def test_forgetting_starts_all_variates_over() -> None:
    federation = Federation()
    federation.run()
    assert federation.part.forget(ForgetRequest("r", "client", clients=("2",))).outcome == "reset"
    assert not federation.control.any()
    update = federation.visit("0")
    fresh = Federation()
    fresh.global_model = federation.global_model
    expected = fresh.visit("0")  # as a client that was never visited
    # the batch is drawn in another order, no more
    torch.testing.assert_close(update.model, expected.model, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(federation.own("0"), expected.payload["control_delta"], rtol=1e-4, atol=1e-5)


def test_state_of_the_server_half() -> None:
    federation = Federation()
    federation.run()
    federation.part.forget(ForgetRequest("r", "client"))
    federation.run()
    other = strategies.collaboration.scaffold.Scaffold()
    other.setup(federation.spec)
    other.load_state_dict(federation.part.state_dict())
    ours, theirs = federation.part.message_for("0", federation), other.message_for("0", federation)  # type: ignore[arg-type]
    assert equal(ours[1], theirs[1])
    assert theirs[1]["control_epoch"].tolist() == [1]
    assert other.metrics() == federation.part.metrics()


SETTING = [
    "scenario=joint",
    "strategy/projection=none",
    "client.epochs=5",
    "client.optimizer.lr=0.1",
    "model.hidden=[64]",
    "data.partition.alpha=0.1",
    "num_clients=6",
    "rounds_per_task=8",
    "evaluation.every=0",
    "checkpoint.every=0",
]


def test_a_whole_run_gains_on_uniform_fedavg(run_experiment: Callable[..., Path]) -> None:
    import json

    def accuracy(name: str, *chosen: str) -> float:
        folder = run_experiment(name, *SETTING, *chosen)
        return float(json.loads((folder / "summary.json").read_text())["accuracy/average"])

    plain = accuracy("fedavg", "strategy/collaboration=fedavg", "strategy.collaboration.server.weighting=uniform")
    assert accuracy("scaffold", "strategy/collaboration=scaffold") > plain
