"""Accuracy of a model on every task's test data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

import numpy as np
import torch
from torch import Tensor

from fedcl.data.dataset import Dataset
from fedcl.evaluation.predictions import allow, score
from fedcl.models.flat import FlatModel
from fedcl.scenario.materialise import gather
from fedcl.scenario.task import Stream, Task


class Evaluator:
    """Evaluates model vectors on the tasks of a stream, with the test half of a data set.

    A task's samples are gathered, normalised and transformed once, and stay on the device. A sample whose logits are
    not finite counts as wrong; ``undefined`` maps tasks to the number of such samples in the last call.
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
        """Return, for each of ``tasks``, the share of its test samples that ``vector`` (P,) predicts right.

        ``after`` is the task the stream has reached, or all tasks it has reached: it determines the columns that a
        prediction may choose from. A task without test samples is left out.
        """
        self._load(vector)
        result = {}
        for task_id in tasks:
            right, _ = self._right(self._stream.test_task(task_id, after=after))
            if len(right):
                result[task_id] = int(right.sum()) / len(right)
        return result

    @torch.no_grad()
    def accuracy_by_class(self, vector: Tensor, tasks: Collection[int]) -> dict[int, float]:
        """Return the accuracy of ``vector`` (P,) on each class of ``tasks``, which are those reached so far."""
        self._load(vector)
        hits: Counter[int] = Counter()
        total: Counter[int] = Counter()
        for task_id in tasks:
            task = self._stream.test_task(task_id, after=tasks)
            right, y = (tensor.cpu() for tensor in self._right(task))
            for label, column in zip(task.classes, task.columns, strict=True):
                hits[label] += int(right[y == column].sum())
                total[label] += int((y == column).sum())
        return {label: hits[label] / count for label, count in total.items() if count}

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

    def _load(self, vector: Tensor) -> None:
        self._model.load(vector)
        self._model.eval()
        self.undefined.clear()

    def _right(self, task: Task) -> tuple[Tensor, Tensor]:
        """Return which samples of ``task`` are predicted right, bool (N,), and their columns (N,)."""
        x, y = self._task_samples(task)

        def logits_of(part: Tensor) -> Tensor:
            return allow(self._model(part).logits, task.mask)

        right, defined = score(logits_of, x, y, batch_size=self._batch_size)
        if not bool(defined.all()):
            self.undefined[task.id] = int((~defined).sum())
        return right, y
