from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedcl.base.tree import pack, unpack
from fedcl.client.local_data import PartitionedData
from fedcl.client.runtime import ClientRuntime
from fedcl.client.state import NEVER, MemoryStateStore
from fedcl.contracts.learner import LocalTraining, Plugin
from fedcl.data.dataset import ArrayDataset, Dataset, Partition
from fedcl.messages import Request
from fedcl.models.flat import FlatModel
from fedcl.models.networks import MLP, build_model
from fedcl.scenario.task import Stream

Factories = Mapping[str, Callable[[], Plugin]]


@dataclass
class Client:
    """One client and the server's end of its visits: what it trains becomes the model it starts from next."""

    runtime: ClientRuntime
    stream: Stream
    store: MemoryStateStore = field(default_factory=MemoryStateStore)
    visit: int = 0
    committed: int = NEVER

    def run(self, script: Sequence[tuple[str, int]], *, rebuild: bool = False) -> Iterator[Tensor]:
        """Do each (kind, task) of the script, and yield the model after it."""
        model = self.runtime.model.vector()
        for kind, task_id in script:
            task = self.stream.train_task(task_id)
            request = Request(kind, "0", self.visit, self.committed, 0, 0, task, model=model.clone())  # type: ignore[arg-type]
            reply = self.runtime.visit(request, self.store)
            self.store.commit("0", self.visit)
            self.committed, self.visit = self.visit, self.visit + 1
            model = model if reply.model is None else reply.model.clone()
            if rebuild:
                self.move_house()
            yield model

    def move_house(self) -> None:
        """Carry the client's state to a new store the way a checkpoint does."""
        if self.store.has("0", self.committed):
            state = unpack(*pack(self.store.load("0", self.committed)))
            self.store = MemoryStateStore()
            self.store.stage("0", self.committed, state)

    @property
    def state(self) -> dict[str, dict[str, Tensor]]:
        return self.store.load("0", self.committed)["plugins"]  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def blobs() -> Dataset:
    """Six classes in eight dimensions, far enough apart to learn in a few steps."""
    rng = np.random.default_rng(5)
    centres = rng.normal(size=(6, 8)) * 2.0
    halves = []
    for each in (14, 10):
        y = np.repeat(np.arange(6), each)
        halves.append(ArrayDataset((centres[y] + rng.normal(size=(len(y), 8))).astype(np.float32), y.astype(np.int64)))
    return Dataset(halves[0], halves[1], tuple("abcdef"))


@pytest.fixture(scope="session")
def make_client(device: torch.device) -> Callable[..., Client]:
    """Return a builder of a client that holds all of a data set."""

    def build(
        dataset: Dataset,
        stream: Stream,
        plugins: Factories,
        *,
        hidden: Sequence[int] = (16,),
        seed: int = 0,
        **training: float,
    ) -> Client:
        everything = Partition((np.arange(len(dataset.train)),), (np.arange(len(dataset.test)),))
        module = build_model(lambda: MLP(input_shape=dataset.input_shape, heads=stream.heads, hidden=hidden), seed=seed)
        runtime = ClientRuntime(
            model=FlatModel(module, device=device),
            plugins=plugins,
            data=PartitionedData(dataset, everything, ("0",)),
            training=LocalTraining(**{"epochs": 2, "batch_size": 5, "momentum": 0.5, **training}),  # type: ignore[arg-type]
            seed=seed,
            num_columns=sum(stream.heads),
        )
        return Client(runtime, stream)

    return build


SCRIPT = [(kind, task) for task in range(3) for kind in ("train", "train", "task_end")]
RunExperiment = Callable[..., tuple[list[Tensor], dict[str, dict[str, Tensor]]]]


@pytest.fixture(scope="module")
def played(blobs: Dataset, make_client: Callable[..., Client]) -> RunExperiment:
    """Return a function that plays three tasks with a learner, once a module, and gives the models and its state."""
    known: dict[tuple[str, type[Stream]], tuple[list[Tensor], dict[str, dict[str, Tensor]]]] = {}

    def run_one(name: str, plugins: Factories, kind: Any) -> tuple[list[Tensor], dict[str, dict[str, Tensor]]]:
        if (name, kind) not in known:
            stream = kind(num_classes=blobs.num_classes, input_shape=blobs.input_shape, seed=0, num_tasks=3)
            client = make_client(blobs, stream, plugins)
            models = [model.clone() for model in client.run(SCRIPT)]
            known[name, kind] = models, client.state if client.store.has("0", client.committed) else {}
        return known[name, kind]

    return run_one
