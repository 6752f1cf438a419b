"""Streams by class: the classical continual-learning scenarios as sequences of tasks.

The names follow van de Ven et al. (2022): task-incremental (which task is known at test), domain-incremental (same
classes, changing inputs; :mod:`fedcl.scenario.domains`), class-incremental (one growing set of classes). Every stream
takes the run's ``num_classes``, ``input_shape`` and ``seed`` beside its own hyper-parameters. Streams without clear
borders between tasks are in :mod:`fedcl.scenario.shares`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fedcl.base.randomness import numpy_generator
from fedcl.scenario.base import Grouped, Masked, Masking, SingleHead, Tasks
from fedcl.scenario.task import Task


@dataclass(kw_only=True, eq=False, repr=False)
class ClassIncremental(Grouped, SingleHead):
    """New classes with every task, one head; at test a prediction chooses among all classes seen so far.

    Parameters
    ----------
    num_tasks
        Number of tasks; must divide the number of classes unless ``increments`` is given.
    increments
        How many classes each task brings, 0 for an empty task; None for equally many.
    class_order
        None for 0, 1, 2, ...; ``shuffled`` by the run's seed; or the order itself.
    train_masking
        Columns that training may choose from: those of classes ``seen`` so far, of the ``task`` alone, of the classes
        in a step's ``batch``, or ``all``.
    classes_per_client
        How many of a task's classes each client learns, drawn for each client and task by the run's seed (GLFC, Dong
        et al., CVPR 2022, official code: 6 of 10); None for all. What a client has seen is then what it has learned,
        and samples of its other classes stay unused. Tests are on all classes.
    online
        Each sample is shown in one round only: every round has its part of the task.
    """

    classes_per_client: int | None = None

    def make_tasks(self) -> Sequence[Task]:
        """Return a task for each group of classes."""
        return [Task(k, group, group) for k, group in enumerate(self.groups())]

    def client_task(self, task_id: int, client: str, seen: Collection[int]) -> Task:
        """Return the task with the classes that ``client`` learns, masked to what it has itself."""
        if self.classes_per_client is None:
            return super().client_task(task_id, client, seen)
        task = self._part(task_id, client)
        if self.train_masking in ("seen", "batch"):
            parts = [self._part(other, client) for other in {*seen, task_id}]
            return replace(task, mask=tuple(sorted(column for part in parts for column in part.columns)))
        return replace(task, mask=self._mask(task, seen))

    def _part(self, task_id: int, client: str) -> Task:
        task = self.train_task(task_id)
        order = numpy_generator(self.seed, "classes", client, task_id).permutation(len(task.classes))
        chosen = tuple(task.classes[i] for i in sorted(order[: self.classes_per_client].tolist()))
        return replace(task, classes=chosen, columns=chosen)


@dataclass(kw_only=True, eq=False, repr=False)
class TaskIncremental(Grouped, Masked):
    """New classes with every task, and the task is known at test: a prediction chooses among the task's own columns.

    Parameters
    ----------
    num_tasks, increments, class_order, online
        As for :class:`ClassIncremental`.
    head
        ``per_task``: a head for each task that has classes; ``single``: one head of which each task uses its columns.
    train_masking
        Columns that training may choose from: those of the ``task``, of tasks ``seen`` so far, of the classes in a
        step's ``batch``, or ``all``.
    """

    head: Literal["single", "per_task"] = "per_task"
    train_masking: Masking = "task"

    def make_tasks(self) -> Sequence[Task]:
        """Return a task for each group of classes."""
        if self.head == "single":
            return [Task(k, group, group) for k, group in enumerate(self.groups())]
        tasks, self.heads = _own_heads(self.groups())
        return tasks

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


@dataclass(kw_only=True, eq=False, repr=False)
class Joint(Tasks):
    """One task with all classes: plain federated learning, and the upper bound of every class stream.

    With ``online`` each sample is shown in one round only.
    """

    num_tasks: int = 1
    online: bool = False

    def make_tasks(self) -> Sequence[Task]:
        """Return the one task."""
        labels = tuple(range(self.num_classes))
        return [Task(0, labels, labels)]
