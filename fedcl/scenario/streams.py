"""Streams: the classical continual-learning scenarios as sequences of tasks.

The names follow van de Ven et al. (2022): task-incremental (which task is known at test), domain-incremental (same
classes, changing inputs), class-incremental (one growing set of classes). Every stream takes the run's ``num_classes``,
``input_shape`` and ``seed`` beside its own hyper-parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from fedcl.scenario.task import Task

ClassOrder = Literal["shuffled"] | Sequence[int] | None
Masking = Literal["task", "seen", "all"]


def _order(class_order: ClassOrder, num_classes: int, seed: int) -> list[int]:
    if class_order is None:
        return list(range(num_classes))
    if class_order == "shuffled":
        return [int(label) for label in np.random.default_rng(seed).permutation(num_classes)]
    if isinstance(class_order, str) or sorted(class_order) != list(range(num_classes)):
        shown = class_order if isinstance(class_order, str) else list(class_order)
        raise ValueError(
            f"scenario.class_order={shown}: must be null, shuffled, or a list with each of 0..{num_classes - 1} once"
        )
    return list(class_order)


def _require_tasks(num_tasks: int) -> None:
    if num_tasks < 1:
        raise ValueError(f"scenario.num_tasks={num_tasks}: must be >= 1")


class _Tasks:
    """A finished list of tasks, trained and tested as listed; the base of all streams."""

    def __init__(self, tasks: Sequence[Task], heads: tuple[int, ...]) -> None:
        self._tasks = tuple(tasks)
        self.num_tasks = len(self._tasks)
        self.heads = heads

    def train_task(self, task_id: int) -> Task:
        """Return the task as it is trained; IndexError if there is no such task."""
        return self._tasks[self._existing(task_id)]

    def test_task(self, task_id: int, *, after: int) -> Task:
        """Return the task as it is tested once task ``after`` has been reached; IndexError if there is no such task."""
        self._existing(after)
        return self.train_task(task_id)

    def _existing(self, task_id: int) -> int:
        if not 0 <= task_id < self.num_tasks:
            raise IndexError(f"task {task_id} is outside [0, {self.num_tasks})")
        return task_id


class _ClassGroups(_Tasks):
    """The classes in equal groups, one a task, with columns in one head or in a head for each task."""

    def __init__(
        self, *, num_tasks: int, class_order: ClassOrder, per_task: bool, masking: str, num_classes: int, seed: int
    ) -> None:
        _require_tasks(num_tasks)
        if num_classes % num_tasks:
            raise ValueError(f"scenario.num_tasks={num_tasks}: must divide the {num_classes} classes")
        if masking not in ("task", "seen", "all"):
            raise ValueError(f"scenario.masking={masking}: must be task, seen or all")
        order, size = _order(class_order, num_classes, seed), num_classes // num_tasks
        groups = [tuple(order[k * size : (k + 1) * size]) for k in range(num_tasks)]
        own = [tuple(range(k * size, (k + 1) * size)) for k in range(num_tasks)] if per_task else groups
        self._seen = [tuple(sorted(column for group in own[: k + 1] for column in group)) for k in range(num_tasks)]
        masks: dict[str, Sequence[tuple[int, ...] | None]] = {
            "task": [tuple(sorted(group)) for group in own],
            "seen": self._seen,
            "all": [None] * num_tasks,
        }
        tasks = [
            Task(k, groups[k], own[k], mask=masks[masking][k], head=k if per_task else 0) for k in range(num_tasks)
        ]
        super().__init__(tasks, (size,) * num_tasks if per_task else (num_classes,))


class ClassIncremental(_ClassGroups):
    """New classes with every task, one head; at test a prediction chooses among all classes seen so far.

    Parameters
    ----------
    num_tasks
        Number of tasks; must divide the number of classes.
    class_order
        None for 0, 1, 2, ...; ``shuffled`` by the run's seed; or the order itself.
    masking
        Columns that training may choose from: those of classes ``seen`` so far, of the ``task`` alone, or ``all``.

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
        class_order: ClassOrder = None,
        masking: Masking = "seen",
    ) -> None:
        super().__init__(
            num_tasks=num_tasks,
            class_order=class_order,
            per_task=False,
            masking=masking,
            num_classes=num_classes,
            seed=seed,
        )

    def test_task(self, task_id: int, *, after: int) -> Task:
        """Return task ``task_id`` with the columns seen up to ``after``.

        A task that lies ahead is tested with the columns up to itself: without its own, its accuracy would be 0 by
        construction and forward transfer would say nothing.
        """
        task = super().test_task(task_id, after=after)
        return Task(task.id, task.classes, task.columns, mask=self._seen[max(task_id, after)], head=task.head)


class TaskIncremental(_ClassGroups):
    """New classes with every task, and the task is known at test: a prediction chooses among the task's own columns.

    Parameters
    ----------
    num_tasks, class_order
        As for :class:`ClassIncremental`.
    head
        ``per_task``: a head for each task, of equal size; ``single``: one head of which each task uses its columns.
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
        class_order: ClassOrder = None,
        head: Literal["single", "per_task"] = "per_task",
        masking: Masking = "task",
    ) -> None:
        if head not in ("single", "per_task"):
            raise ValueError(f"scenario.head={head}: must be single or per_task")
        super().__init__(
            num_tasks=num_tasks,
            class_order=class_order,
            per_task=head == "per_task",
            masking=masking,
            num_classes=num_classes,
            seed=seed,
        )

    def test_task(self, task_id: int, *, after: int) -> Task:
        """Return task ``task_id`` with its own columns, whether or not it has been reached."""
        task = super().test_task(task_id, after=after)
        return Task(task.id, task.classes, task.columns, mask=tuple(sorted(task.columns)), head=task.head)


def _domains(transforms: Sequence[dict[str, Any] | None], num_classes: int) -> list[Task]:
    labels = tuple(range(num_classes))
    return [Task(k, labels, labels, transform=transform) for k, transform in enumerate(transforms)]


class DomainPermuted(_Tasks):
    """All classes in every task, seen through a permutation of the input positions (permuted MNIST).

    The first task is not permuted; the others' permutations are drawn from the run's seed. ValueError for fewer than
    one task.
    """

    def __init__(self, *, num_classes: int, input_shape: Sequence[int], seed: int, num_tasks: int = 5) -> None:
        _require_tasks(num_tasks)
        drawn = [int(np.random.SeedSequence((seed, k)).generate_state(1)[0]) for k in range(1, num_tasks)]
        transforms: list[dict[str, Any] | None] = [None, *({"name": "permute", "seed": value} for value in drawn)]
        super().__init__(_domains(transforms, num_classes), (num_classes,))


class DomainRotated(_Tasks):
    """All classes in every task, rotated by degrees spaced evenly from 0 to ``max_degrees`` (rotated MNIST).

    Raises
    ------
    ValueError
        Samples are no images, ``max_degrees`` is outside (0, 360), or there is less than one task.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        input_shape: Sequence[int],
        seed: int,
        num_tasks: int = 5,
        max_degrees: float = 180.0,
    ) -> None:
        _require_tasks(num_tasks)
        if not 0.0 < max_degrees < 360.0:
            raise ValueError(f"scenario.max_degrees={max_degrees}: must be in (0, 360)")
        if len(input_shape) != 3:
            raise ValueError(f"scenario=domain_rotated: needs images (C, H, W), the samples have {tuple(input_shape)}")
        degrees = [max_degrees * k / (num_tasks - 1) for k in range(1, num_tasks)]
        transforms: list[dict[str, Any] | None] = [None, *({"name": "rotate", "degrees": value} for value in degrees)]
        super().__init__(_domains(transforms, num_classes), (num_classes,))


class Joint(_Tasks):
    """One task with all classes: plain federated learning, and the upper bound of every class stream.

    ValueError unless ``num_tasks`` is 1.
    """

    def __init__(self, *, num_classes: int, input_shape: Sequence[int], seed: int, num_tasks: int = 1) -> None:
        if num_tasks != 1:
            raise ValueError(f"scenario.num_tasks={num_tasks}: must be 1, scenario=joint has a single task")
        super().__init__(_domains([None], num_classes), (num_classes,))
