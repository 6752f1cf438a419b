"""Streams by class: the classical continual-learning scenarios as sequences of tasks.

The names follow van de Ven et al. (2022): task-incremental (which task is known at test), domain-incremental (same
classes, changing inputs; :mod:`fedcl.scenario.domains`), class-incremental (one growing set of classes). Every stream
takes the run's ``num_classes``, ``input_shape`` and ``seed`` beside its own hyper-parameters. Streams without clear
borders between tasks are in :mod:`fedcl.scenario.shares`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Literal

from fedcl.base.randomness import numpy_generator
from fedcl.scenario.base import ClassOrder, Masked, Masking, SingleHead, Tasks, class_groups
from fedcl.scenario.domains import DomainPermuted, DomainRotated
from fedcl.scenario.task import Task

__all__ = ["ClassIncremental", "DomainPermuted", "DomainRotated", "Joint", "TaskIncremental"]


class ClassIncremental(SingleHead):
    """New classes with every task, one head; at test a prediction chooses among all classes seen so far.

    Parameters
    ----------
    num_tasks
        Number of tasks; must divide the number of classes unless ``increments`` is given.
    increments
        How many classes each task brings, 0 for an empty task; None for equally many.
    class_order
        None for 0, 1, 2, ...; ``shuffled`` by the run's seed; or the order itself.
    masking
        Columns that training may choose from: those of classes ``seen`` so far, of the ``task`` alone, or ``all``.
    classes_per_client
        How many of a task's classes each client learns, drawn for each client and task by the run's seed (GLFC, Dong
        et al., CVPR 2022, official code: 6 of 10); None for all. What a client has seen is then what it has learned,
        and samples of its other classes stay unused. Tests are on all classes.
    online
        Each sample is shown in one round only: every round has its part of the task.

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
        num_tasks: int = 5,
        increments: Sequence[int] | None = None,
        class_order: ClassOrder = None,
        masking: Masking = "seen",
        classes_per_client: int | None = None,
        online: bool = False,
    ) -> None:
        groups = class_groups(num_tasks, increments, class_order, num_classes, seed)
        if classes_per_client is not None and classes_per_client < 1:
            raise ValueError(f"scenario.classes_per_client={classes_per_client}: must be null or >= 1")
        self._seed, self._share = seed, classes_per_client
        tasks = [Task(k, group, group) for k, group in enumerate(groups)]
        super().__init__(tasks, (num_classes,), masking=masking, online=online)

    def client_task(self, task_id: int, client: str, seen: Collection[int]) -> Task:
        """Return the task with the classes that ``client`` learns, masked to what it has itself."""
        if self._share is None:
            return super().client_task(task_id, client, seen)
        task = self._part(task_id, client)
        if self._masking == "seen":
            parts = [self._part(other, client) for other in {*seen, task_id}]
            return replace(task, mask=tuple(sorted(column for part in parts for column in part.columns)))
        return replace(task, mask=self._mask(task, seen))

    def _part(self, task_id: int, client: str) -> Task:
        task = self.train_task(task_id)
        order = numpy_generator(self._seed, "classes", client, task_id).permutation(len(task.classes))
        chosen = tuple(task.classes[i] for i in sorted(order[: self._share].tolist()))
        return replace(task, classes=chosen, columns=chosen)


class TaskIncremental(Masked):
    """New classes with every task, and the task is known at test: a prediction chooses among the task's own columns.

    Parameters
    ----------
    num_tasks, increments, class_order, online
        As for :class:`ClassIncremental`.
    head
        ``per_task``: a head for each task that has classes; ``single``: one head of which each task uses its columns.
    masking
        Columns that training may choose from: those of the ``task``, of tasks ``seen`` so far, or ``all``.

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
        num_tasks: int = 5,
        increments: Sequence[int] | None = None,
        class_order: ClassOrder = None,
        head: Literal["single", "per_task"] = "per_task",
        masking: Masking = "task",
        online: bool = False,
    ) -> None:
        if head not in ("single", "per_task"):
            raise ValueError(f"scenario.head={head}: must be single or per_task")
        groups = class_groups(num_tasks, increments, class_order, num_classes, seed)
        if head == "per_task":
            tasks, heads = _own_heads(groups)
        else:
            tasks, heads = [Task(k, group, group) for k, group in enumerate(groups)], (num_classes,)
        super().__init__(tasks, heads, masking=masking, online=online)

    def test_task(self, task_id: int, *, after: int | Collection[int]) -> Task:
        """Return task ``task_id`` with its own columns, whether or not it has been reached."""
        task = super().test_task(task_id, after=after)
        return replace(task, mask=tuple(sorted(task.columns)))


def _own_heads(groups: Sequence[tuple[int, ...]]) -> tuple[list[Task], tuple[int, ...]]:
    """Return a task for each group, with columns in a head of its own, and the heads' sizes; no head is empty."""
    tasks: list[Task] = []
    heads: list[int] = []
    for k, group in enumerate(groups):
        start = sum(heads)
        heads += [len(group)] if group else []
        # an empty task has no columns, so that it does not matter which head it names
        tasks.append(Task(k, group, tuple(range(start, start + len(group))), head=max(len(heads) - 1, 0)))
    return tasks, tuple(heads)


class Joint(Tasks):
    """One task with all classes: plain federated learning, and the upper bound of every class stream.

    With ``online`` each sample is shown in one round only. ValueError unless ``num_tasks`` is 1.
    """

    def __init__(
        self, *, num_classes: int, input_shape: Sequence[int], seed: int, num_tasks: int = 1, online: bool = False
    ) -> None:
        if num_tasks != 1:
            raise ValueError(f"scenario.num_tasks={num_tasks}: must be 1, scenario=joint has a single task")
        labels = tuple(range(num_classes))
        super().__init__([Task(0, labels, labels)], (num_classes,), online=online)
