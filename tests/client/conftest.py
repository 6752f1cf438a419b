from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest
import torch

from fedcl.client.local_data import PartitionedData
from fedcl.client.runtime import ClientRuntime
from fedcl.contracts.learner import Context, LocalTraining, Plugin, TaskData
from fedcl.data.dataset import ArrayDataset, Dataset, Partition
from fedcl.models.flat import FlatModel
from fedcl.models.networks import MLP, build_model
from fedcl.scenario.task import Task

TASK = Task(0, (0, 1, 2), (0, 1, 2))


def model(device: torch.device, hidden: Sequence[int] = (7,)) -> FlatModel:
    return FlatModel(build_model(lambda: MLP(input_shape=(5,), heads=(4,), hidden=hidden), seed=1), device=device)


@pytest.fixture
def dataset() -> Dataset:
    """23 train and 12 test samples of four classes, of which the last is never trained."""
    rng = np.random.default_rng(0)
    halves = []
    for count in (23, 12):
        y = np.arange(count) % 3
        halves.append(ArrayDataset(rng.normal(size=(count, 5)).astype(np.float32) + y[:, None].astype(np.float32), y))
    return Dataset(halves[0], halves[1], tuple("abcd"))


@pytest.fixture
def make_context(dataset: Dataset, device: torch.device) -> Callable[..., Context]:
    def build(
        task: Task = TASK, *, seed: int = 0, client: str = "0", local_round: int = 0, new: bool = True
    ) -> Context:
        flat = model(device)
        data = TaskData(torch.from_numpy(dataset.train.x).to(device), torch.from_numpy(dataset.train.y).to(device))
        return Context(
            model=flat, task=task, data=data, received=flat.vector(), epochs=2, batch_size=4, lr=0.1, seed=seed,
            client=client, local_round=local_round, is_new_task=new,
            task_columns={task.id: task.columns}, num_columns=4,
        )  # fmt: skip

    return build


@pytest.fixture
def make_runtime(dataset: Dataset, device: torch.device) -> Callable[..., ClientRuntime]:
    """Return a builder of a runtime for client 0, who holds nearly everything, 1 with one sample, 2 without any."""

    def build(plugins: Mapping[str, Callable[[], Plugin]] = {}, *, personal: bool = False) -> ClientRuntime:
        train = (np.arange(22), np.arange(22, 23), np.arange(0))
        test = (np.arange(12), np.arange(1), np.arange(0))
        return ClientRuntime(
            model=model(device),
            plugins=plugins,
            data=PartitionedData(dataset, Partition(train, test), ("0", "1", "2")),
            training=LocalTraining(epochs=2, batch_size=4, lr=0.1, momentum=0.9),
            seed=0,
            num_columns=4,
            personal_evaluation=personal,
        )

    return build
