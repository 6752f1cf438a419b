"""A collaboration and its clients without messages, and what they should come to, by a module of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module

from fedcl.base.randomness import numpy_generator, torch_generator
from fedcl.client.local_data import PartitionedData
from fedcl.client.runtime import ClientRuntime
from fedcl.client.state import NEVER, MemoryStateStore
from fedcl.contracts.learner import LocalTraining, Plugin
from fedcl.contracts.strategy import GLOBAL, Collaboration, Update
from fedcl.data.dataset import ArrayDataset, Dataset, Partition
from fedcl.messages import Reply, Request
from fedcl.models.flat import FlatModel, Spec
from fedcl.models.networks import MLP, build_model
from fedcl.scenario.task import Task
from fedcl.server.strategy import Pipeline

CLIENTS = ("0", "1", "2")
LR = 0.2
TASK = Task(0, (0, 1, 2), (0, 1, 2))


def network() -> MLP:
    return MLP(input_shape=(5,), heads=(3,), hidden=(4,))


def samples(client: str) -> tuple[Tensor, Tensor]:
    """Client k holds 6 + 3k samples, mostly of class k."""
    k = int(client)
    rng = numpy_generator("personalised", client)
    y = np.where(rng.random(6 + 3 * k) < 0.8, k, rng.integers(0, 3, 6 + 3 * k))
    x = rng.standard_normal((len(y), 5)) + np.eye(3, 5)[y]
    return torch.from_numpy(x.astype(np.float32)), torch.from_numpy(y.astype(np.int64))


@dataclass
class Federation:
    """A collaboration and its clients, without messages: full batches, so that nothing is random."""

    part: Collaboration
    half: Callable[[], Plugin] | None = None
    epochs: int = 3
    momentum: float = 0.0
    weight_decay: float = 0.0
    measured: bool = False
    version: int = 0
    clients: tuple[str, ...] = CLIENTS
    visits: dict[str, int] = field(default_factory=dict)
    build: Callable[[], Module] = network
    samples: Callable[[str], tuple[Tensor, Tensor]] = samples

    def __post_init__(self) -> None:
        parts = [self.samples(client) for client in CLIENTS]
        half = ArrayDataset(torch.cat([x for x, _ in parts]).numpy(), torch.cat([y for _, y in parts]).numpy())
        edges = np.cumsum([0, *(len(y) for _, y in parts)])
        held = tuple(np.arange(a, b) for a, b in pairwise(edges))
        model = FlatModel(build_model(self.build, seed=3))
        self.spec = model.spec
        self.store = MemoryStateStore()
        self.runtime = ClientRuntime(
            model=model,
            plugins={} if self.half is None else {"half": self.half},
            data=PartitionedData(Dataset(half, half, ("a", "b", "c")), Partition(held, held), CLIENTS),
            training=LocalTraining(self.epochs, 100, LR, self.momentum, self.weight_decay),
            seed=0,
            num_columns=3,
            personal_evaluation=self.measured,
        )
        self.pipeline = Pipeline(collaboration=self.part)
        self.pipeline.setup(self.spec)
        self.models = {GLOBAL: model.vector()}

    @property
    def global_model(self) -> Tensor:
        return self.models[GLOBAL]

    def model_of(self, client: str) -> Tensor:
        return self.model_at(self.pipeline.target_of(client, self))  # type: ignore[arg-type]

    def model_at(self, target: str) -> Tensor:
        return self.models.get(target, self.global_model)

    def rng(self, purpose: str) -> torch.Generator:
        return torch_generator("federation", self.version, purpose)

    def request(self, kind: str, client: str) -> Request:
        visit = self.visits.get(client, NEVER) + 1
        return Request(kind, client, visit, visit - 1, 0, 0, TASK, "", self.model_of(client))  # type: ignore[arg-type]

    def visit(self, client: str) -> tuple[Update, Reply]:
        target, sent = self.part.message_for(client, self)  # type: ignore[arg-type]
        request = replace(self.request("train", client), payload=sent)
        reply = self.runtime.visit(request, self.store)
        self.store.commit(client, request.visit)
        self.visits[client] = request.visit
        assert reply.model is not None
        assert request.model is not None
        n, payload = reply.num_examples, reply.payload
        update = Update(
            client, request.visit, target, 0, request.model, reply.model, n, float(n), 0, 0, payload=payload
        )
        return update, reply

    def run(self, present: tuple[str, ...] = CLIENTS) -> None:
        updates = [self.visit(client)[0] for client in present]
        self.models |= self.pipeline.aggregate(updates, self)  # type: ignore[arg-type]

    def own(self, client: str) -> dict[str, Tensor]:
        return self.store.load(client, self.visits[client])["plugins"]["half"]  # type: ignore[no-any-return]

    def accuracy(self, client: str) -> float:
        return self.runtime.visit(self.request("evaluate", client), self.store).metrics["accuracy"]


def gradient(vector: Tensor, client: str) -> Tensor:
    """Return the gradient of the client's loss at ``vector``, in float64 and by a module of its own."""
    module = network().double()
    torch.nn.utils.vector_to_parameters(vector.double(), module.parameters())
    x, y = samples(client)
    loss = F.cross_entropy(module(x.double()).logits, y)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))])


def loss_at(vector: Tensor, client: str) -> float:
    """Return the client's loss at ``vector``, in float64."""
    module = network().double()
    torch.nn.utils.vector_to_parameters(vector.double(), module.parameters())
    x, y = samples(client)
    with torch.no_grad():
        return float(F.cross_entropy(module(x.double()).logits, y))


def accuracy_of(vector: Tensor, client: str) -> float:
    module = network()
    torch.nn.utils.vector_to_parameters(vector.float(), module.parameters())
    x, y = samples(client)
    return float((module(x).logits.argmax(1) == y).double().mean())


def descend(vector: Tensor, client: str, steps: int, where: Tensor | float = 1.0) -> Tensor:
    vector = vector.double()
    for _ in range(steps):
        vector = vector - LR * where * gradient(vector, client)
    return vector


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-5)


def head_of(spec: Spec) -> Tensor:
    mask = torch.zeros(spec.size, dtype=torch.bool)
    mask[spec["head.weight"].start : spec["head.bias"].stop] = True
    return mask
