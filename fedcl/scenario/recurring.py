"""Streams in which classes come back."""

# T = tasks, C = classes
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedcl.base.randomness import numpy_generator
from fedcl.scenario.base import Masking, SingleHead
from fedcl.scenario.shares import homes, portioned
from fedcl.scenario.task import Task

_FACTOR = 0.05  # by which the probability of each next rare class falls


@dataclass(kw_only=True, eq=False, repr=False)
class SCoLe(SingleHead):
    """Many short tasks with a few classes each, drawn again every time: classes come back.

    Lesort et al., "Challenging Common Assumptions about Catastrophic Forgetting and Knowledge Accumulation", CoLLAs
    2023. With ``entropy_decrease`` e, some classes are rare: the i-th of them, in an order drawn by the run's seed, is
    drawn with p proportional to (1 - i f)^e, where f = 0.05 as in the official code, and 1 / C for more than 20 classes
    (theirs has 0.01 for 100).

    Parameters
    ----------
    num_tasks
        Number of tasks.
    classes_per_task
        Classes of each task, drawn without replacement.
    entropy_decrease
        The exponent e > 0, or None for equal probabilities.
    fresh
        Whether a class that comes back brings samples that have not been shown yet, an equal part each time, instead
        of all its samples again. A class that is never drawn then leaves its samples unused either way.
    train_masking, online
        As for :class:`~fedcl.scenario.streams.ClassIncremental`; published with the ``task``'s columns only.
    """

    num_tasks: int = 20
    classes_per_task: int = 2
    entropy_decrease: float | None = None
    fresh: bool = False
    train_masking: Masking = "task"
    online: bool = False

    def make_tasks(self) -> Sequence[Task]:
        """Return tasks of classes drawn at random; ValueError if a task needs more classes than there are."""
        count = self.num_classes
        if self.classes_per_task > count:
            raise ValueError(f"scenario.classes_per_task={self.classes_per_task}: must be in [1, {count}]")
        rng = numpy_generator(self.seed, "scole")
        rank = rng.permutation(count)
        p_C = (1.0 - rank * min(_FACTOR, 1.0 / count)) ** (self.entropy_decrease or 0.0)
        drawn = [
            np.sort(rng.choice(count, self.classes_per_task, replace=False, p=p_C / p_C.sum())).tolist()
            for _ in range(self.num_tasks)
        ]
        if not self.fresh:
            return [Task(k, tuple(classes), tuple(classes)) for k, classes in enumerate(drawn)]
        times_TC = homes(drawn, count)
        stops_TC = np.cumsum(times_TC, axis=0) / np.maximum(times_TC.sum(axis=0), 1.0)
        return portioned(np.concatenate([np.zeros((1, count)), stops_TC[:-1]]), stops_TC)
