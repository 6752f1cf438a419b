"""Accuracy of a model on every task's test data, from tensors that stay on the device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

import numpy as np
import torch
from torch import Tensor

from fedcl.data.dataset import Dataset
from fedcl.models.flat import FlatModel
from fedcl.scenario.materialise import gather
from fedcl.scenario.task import Stream, Task


class Evaluator:
    """Tests model vectors on the tasks of a stream, with the test half of a data set.

    A task's samples are gathered, normalised and transformed once. A sample for which the model's answer is no number
    counts as wrong; ``undefined`` maps the tasks that the last call found such samples of to how many.
    """

    def __init__(self, dataset: Dataset, stream: Stream, model: FlatModel, *, batch_size: int = 1024) -> None:
        self._dataset = dataset
        self._stream = stream
        self._model = model
        self._batch_size = batch_size
        self._samples: dict[int, tuple[Tensor, Tensor]] = {}
        self.undefined: dict[int, int] = {}

    @torch.no_grad()
    def accuracy(self, vector: Tensor, tasks: list[int], *, after: int | Collection[int]) -> dict[int, float]:
        """Return, for each of ``tasks``, the share of its test samples that ``vector`` (P,) gets right.

        ``after`` is the task the stream has reached, or all tasks that have been: it decides which columns a prediction
        may choose from. A task without test samples is left out.
        """
        self._model.load(vector)
        self._model.eval()
        self.undefined.clear()
        result = {}
        for task_id in tasks:
            task = self._stream.test_task(task_id, after=after)
            x, y = self._task_samples(task)
            if len(y):
                result[task_id] = int(self._hits(task, x, y).sum()) / len(y)
        return result

    @torch.no_grad()
    def accuracy_by_class(self, vector: Tensor, tasks: Collection[int]) -> dict[int, float]:
        """Return the accuracy of ``vector`` (P,) on each class of ``tasks``, which are those that have been reached."""
        self._model.load(vector)
        self._model.eval()
        self.undefined.clear()
        right: Counter[int] = Counter()
        total: Counter[int] = Counter()
        for task_id in tasks:
            task = self._stream.test_task(task_id, after=tasks)
            x, y = self._task_samples(task)
            hits = self._hits(task, x, y).cpu()
            for label, column in zip(task.classes, task.columns, strict=True):
                mine = y.cpu() == column
                right[label] += int(hits[mine].sum())
                total[label] += int(mine.sum())
        return {label: right[label] / count for label, count in total.items() if count}

    def num_samples(self, task_id: int) -> int:
        """Return how many test samples a task has."""
        return len(self._task_samples(self._stream.test_task(task_id, after=task_id))[1])

    def _task_samples(self, task: Task) -> tuple[Tensor, Tensor]:
        cached = self._samples.get(task.id)
        if cached is None:
            half = self._dataset.test
            found = gather(self._dataset, half, np.arange(len(half)), task)
            cached = self._samples[task.id] = (found.x.to(self._model.device), found.y.to(self._model.device))
        return cached

    def _hits(self, task: Task, x: Tensor, y: Tensor) -> Tensor:
        """Return which samples are predicted right, bool (N,)."""
        columns = None if task.mask is None else torch.tensor(task.mask, device=x.device)
        hits = torch.zeros(len(y), dtype=torch.bool, device=x.device)
        undefined = torch.zeros((), dtype=torch.int64, device=x.device)
        for start in range(0, len(y), self._batch_size):
            rows = slice(start, start + self._batch_size)
            logits = self._model(x[rows]).logits
            largest = (logits if columns is None else logits[:, columns]).max(1)
            predicted = largest.indices if columns is None else columns[largest.indices]
            defined = largest.values.isfinite()
            hits[rows] = (predicted == y[rows]) & defined
            undefined += (~defined).sum()
        if int(undefined):
            self.undefined[task.id] = int(undefined)
        return hits
