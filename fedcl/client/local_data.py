"""A client's own samples, gathered task by task."""

from __future__ import annotations

import functools
from collections import OrderedDict
from dataclasses import replace

import torch

from fedcl.contracts.learner import TaskData
from fedcl.data.dataset import ArrayDataset, Dataset, Indices, Partition
from fedcl.scenario.materialise import gather, restore
from fedcl.scenario.task import Task


def task_samples(dataset: Dataset, half: ArrayDataset, held: Indices, task: Task, device: torch.device) -> TaskData:
    """Return the samples of ``task`` among the positions ``held`` of ``half``, on ``device``."""
    found = gather(dataset, half, held, task)
    raw = found.raw.to(device) if found.raw.dtype == torch.uint8 else None
    restored = functools.partial(restore, dataset)
    return TaskData(found.x.to(device), found.y.to(device), raw, restored, found.positions)


class PartitionedData:
    """The samples of clients that share one array, of which each holds a part: the simulation's local data.

    The samples used last are cached on the device, up to ``cache_bytes``.
    """

    def __init__(self, dataset: Dataset, partition: Partition, clients: tuple[str, ...], cache_bytes: int = 1 << 29):
        self.dataset = dataset
        self._train = dict(zip(clients, partition.train, strict=True))
        self._test = dict(zip(clients, partition.test, strict=True))
        self._cache: OrderedDict[tuple[str, str, str], TaskData] = OrderedDict()
        self._free = cache_bytes

    def train(self, client: str, task: Task, device: torch.device) -> TaskData:
        """Return the train samples of ``task`` that the client holds; perhaps none."""
        return self._get("train", client, task, device)

    def test(self, client: str, task: Task, device: torch.device) -> TaskData:
        """Return the client's own test samples of ``task``; perhaps none."""
        return self._get("test", client, task, device)

    def num_examples(self, client: str) -> int:
        """Return how many train samples the client holds over all tasks."""
        return len(self._train[client])

    def drop(self, client: str) -> None:
        """Erase the cached copies of the client's samples; the shared array belongs to the simulation."""
        for key in [key for key in self._cache if key[1] == client]:
            self._free += _bytes(self._cache.pop(key))

    def _get(self, half: str, client: str, task: Task, device: torch.device) -> TaskData:
        removed = f"{task.without_classes}{task.without_samples}" if half == "train" else ""
        key = (half, client, f"{task.classes}{task.portions}{task.columns}{task.transform}{device}{removed}")
        data = self._cache.get(key)
        if data is not None:
            self._cache.move_to_end(key)
            return data
        if half == "train":
            data = task_samples(self.dataset, self.dataset.train, self._train[client], task, device)
        else:
            whole = replace(task, portions=None, without_classes=(), without_samples=())
            data = task_samples(self.dataset, self.dataset.test, self._test[client], whole, device)
        self._cache[key] = data
        self._free -= _bytes(data)
        while self._free < 0 and len(self._cache) > 1:
            self._free += _bytes(self._cache.popitem(last=False)[1])
        return data


def _bytes(data: TaskData) -> int:
    return data.x.nbytes + data.y.nbytes + (0 if data.raw is None else data.raw.nbytes)
