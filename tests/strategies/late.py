"""Two real clients of a small network, whose updates can be late."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedcl.base.randomness import numpy_generator, torch_generator
from fedcl.client.local_data import PartitionedData
from fedcl.client.runtime import ClientRuntime
from fedcl.client.state import MemoryStateStore
from fedcl.contracts.learner import LocalTraining
from fedcl.contracts.strategy import GLOBAL, LocalWork, Update
from fedcl.data.dataset import ArrayDataset, Dataset, Partition
from fedcl.messages import Request
from fedcl.models.flat import FlatModel, Spec
from fedcl.models.networks import MLP, build_model
from fedcl.scenario.streams import ClassIncremental
from strategies.staleness.gradient_inversion import GradientInversion

CLIENTS = ("a", "b")
EACH = 12  # samples a client
FULL = LocalTraining(epochs=5, batch_size=EACH, lr=0.1)
STREAM = ClassIncremental(num_tasks=1, num_classes=4, input_shape=(6,), seed=0)


def network(dropout: float = 0.0) -> FlatModel:
    def build() -> MLP:
        return MLP(input_shape=(6,), heads=(4,), hidden=(16,), dropout=(dropout,))

    return FlatModel(build_model(build, seed=1))


@lru_cache
def dataset() -> Dataset:
    """Client a holds classes 0 and 1, client b classes 2 and 3."""
    rng = numpy_generator("inversion tests")
    y = np.repeat(np.arange(4), EACH // 2)
    x = (rng.standard_normal((2 * EACH, 6)) + 2 * np.eye(6)[y]).astype(np.float32)
    part = ArrayDataset(x, y.astype(np.int64))
    return Dataset(part, part, ("p", "q", "r", "s"))


def train(client: str, model: Tensor, training: LocalTraining, visit: int = 0) -> Tensor:
    """Return what a real client makes of ``model``."""
    parts = tuple(np.arange(EACH * k, EACH * (k + 1)) for k in range(2))
    runtime = ClientRuntime(
        model=network(),
        plugins={},
        data=PartitionedData(dataset(), Partition(parts, parts), CLIENTS),
        training=training,
        seed=0,
        num_columns=4,
    )
    request = Request("train", client, visit, -1, 0, 0, STREAM.train_task(0))
    reply = runtime.visit(replace(request, model=model), MemoryStateStore())
    assert reply.model is not None
    return reply.model


@dataclass
class View:
    """A server between two rounds."""

    global_model: Tensor
    version: int = 10
    spec: Spec = field(default_factory=lambda: network().spec)
    now: float = 0.0
    clients: tuple[str, ...] = CLIENTS
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def model_of(self, client: str) -> Tensor:
        return self.global_model

    def rng(self, purpose: str) -> torch.Generator:
        return torch_generator(0, self.version, purpose)

    def compute(self, fn: Callable[..., Any], *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args))
        return future


def part(training: LocalTraining = FULL, **settings: Any) -> GradientInversion:
    made = GradientInversion(**{"samples": EACH, "iterations": 300, **settings})
    made.setup(network().spec)
    made.bind(LocalWork(network(dropout=0.5), training, STREAM, (6,)))
    return made


def update(base: Tensor, age: int, training: LocalTraining = FULL, client: str = "a", visit: int = 0) -> Update:
    model = train(client, base, training, visit)
    return Update(client, visit, GLOBAL, 10 - age, base, model, EACH, float(EACH), 0, 0, age)


def shifted(base: Tensor, steps: int = 8) -> Tensor:
    """Return the model after client b has moved it some visits away: what happens meanwhile."""
    for visit in range(steps):
        base = train("b", base, FULL, visit)
    return base


def cosine_distance(a: Tensor, b: Tensor) -> float:
    return 1 - float(F.cosine_similarity(a.double(), b.double(), dim=0))


def relative(a: Tensor, b: Tensor) -> float:
    return float(torch.linalg.vector_norm(a.double() - b) / torch.linalg.vector_norm(b))


MOMENTUM = LocalTraining(epochs=3, batch_size=EACH, lr=0.05, momentum=0.9, weight_decay=0.01)
BATCHES = LocalTraining(epochs=2, batch_size=4, lr=0.05)
