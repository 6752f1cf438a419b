"""Streams in which classes come back."""

# T = tasks, C = classes
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedcl.base.randomness import numpy_generator
from fedcl.scenario.base import Masking, SingleHead, require_tasks
from fedcl.scenario.shares import homes, portioned
from fedcl.scenario.task import Task

_FACTOR = 0.05  # by which the probability of each next rare class falls


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
    masking, online
        As for :class:`~fedcl.scenario.streams.ClassIncremental`; published with the ``task``'s columns only.

    Raises
    ------
    ValueError
        A parameter is outside its range.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        input_shape: Sequence[int],
        seed: int,
        num_tasks: int = 20,
        classes_per_task: int = 2,
        entropy_decrease: float | None = None,
        fresh: bool = False,
        masking: Masking = "task",
        online: bool = False,
    ) -> None:
        require_tasks(num_tasks)
        if not 1 <= classes_per_task <= num_classes:
            raise ValueError(f"scenario.classes_per_task={classes_per_task}: must be in [1, {num_classes}]")
        if entropy_decrease is not None and not entropy_decrease > 0:
            raise ValueError(f"scenario.entropy_decrease={entropy_decrease}: must be null or > 0")
        rng = numpy_generator(seed, "scole")
        rank = rng.permutation(num_classes)
        p_C = (1.0 - rank * min(_FACTOR, 1.0 / num_classes)) ** (entropy_decrease or 0.0)
        drawn = [
            np.sort(rng.choice(num_classes, classes_per_task, replace=False, p=p_C / p_C.sum()))
            for _ in range(num_tasks)
        ]
        if fresh:
            times_TC = homes([classes.tolist() for classes in drawn], num_classes)
            stops_TC = np.cumsum(times_TC, axis=0) / np.maximum(times_TC.sum(axis=0), 1.0)
            starts_TC = np.concatenate([np.zeros((1, num_classes)), stops_TC[:-1]])
            tasks = portioned(starts_TC, stops_TC)
        else:
            tasks = [Task(k, tuple(c.tolist()), tuple(c.tolist())) for k, c in enumerate(drawn)]
        super().__init__(tasks, (num_classes,), masking=masking, online=online)
