"""What streams are made of: a finished list of tasks, and the policy that says which columns a prediction has."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from fedcl.scenario.task import Task

ClassOrder = Literal["shuffled"] | Sequence[int] | None
Masking = Literal["task", "seen", "all"]


def ordered_classes(class_order: ClassOrder, num_classes: int, seed: int) -> list[int]:
    """Return the classes in the order that ``scenario.class_order`` asks for.

    Raises
    ------
    ValueError
        It is neither null, ``shuffled`` nor an order.
    """
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


def require_tasks(num_tasks: int) -> None:
    """Raise ValueError for fewer than one task."""
    if num_tasks < 1:
        raise ValueError(f"scenario.num_tasks={num_tasks}: must be >= 1")


def require_share(name: str, value: float, *, least: float = 0.0, most: float = 1.0) -> None:
    """Raise ValueError unless ``scenario.<name>`` lies in [least, most]."""
    if not least <= value <= most:
        raise ValueError(f"scenario.{name}={value}: must be in [{least:g}, {most:g}]")


def class_groups(
    num_tasks: int, increments: Sequence[int] | None, class_order: ClassOrder, num_classes: int, seed: int
) -> list[tuple[int, ...]]:
    """Return the new classes of each task: equally many, or as many as ``increments`` says, perhaps none.

    Raises
    ------
    ValueError
        The classes cannot be shared out like that.
    """
    require_tasks(num_tasks)
    order = ordered_classes(class_order, num_classes, seed)
    if increments is None:
        if num_classes % num_tasks:
            raise ValueError(
                f"scenario.num_tasks={num_tasks}: must divide the {num_classes} classes, unless scenario.increments "
                f"says how many each task brings"
            )
        sizes = [num_classes // num_tasks] * num_tasks
    else:
        sizes = list(increments)
        if len(sizes) != num_tasks:
            raise ValueError(f"scenario.increments={sizes}: must have {num_tasks} entries, as scenario.num_tasks says")
        if any(size < 0 for size in sizes) or sum(sizes) != num_classes:
            raise ValueError(f"scenario.increments={sizes}: must be >= 0 each and add up to the {num_classes} classes")
    ends = np.cumsum(sizes)
    return [tuple(order[end - size : end]) for size, end in zip(sizes, ends.tolist(), strict=True)]


class Tasks:
    """A finished list of tasks, trained and tested as listed; the base of all streams."""

    def __init__(self, tasks: Sequence[Task], heads: tuple[int, ...], *, online: bool = False) -> None:
        self._tasks = tuple(tasks)
        self.num_tasks = len(self._tasks)
        self.heads = heads
        self.online = online

    def train_task(self, task_id: int) -> Task:
        """Return the task as it is trained; IndexError if there is no such task."""
        return self._tasks[self._existing(task_id)]

    def client_task(self, task_id: int, client: str, seen: Collection[int]) -> Task:
        """Return the task as ``client`` trains it, which has met the tasks ``seen``; IndexError if there is none."""
        return self.train_task(task_id)

    def test_task(self, task_id: int, *, after: int | Collection[int]) -> Task:
        """Return the task as it is tested once task ``after``, or all tasks ``after``, have been reached.

        Its test samples are all those of its classes, whatever portion is trained on. IndexError if there is no such
        task.
        """
        self._reached(after)
        return replace(self.train_task(task_id), portions=None)

    def _reached(self, after: int | Collection[int]) -> tuple[int, ...]:
        """Return the ids of the tasks reached."""
        ids = range(self._existing(after) + 1) if isinstance(after, int) else after
        return tuple(self._existing(task_id) for task_id in ids)

    def _existing(self, task_id: int) -> int:
        if not 0 <= task_id < self.num_tasks:
            raise IndexError(f"task {task_id} is outside [0, {self.num_tasks})")
        return task_id


class Masked(Tasks):
    """Tasks of some classes each, trained with the columns that ``masking`` leaves: ``task``, ``seen`` or ``all``.

    What a client has seen is what it has itself met. ValueError for another ``masking``.
    """

    def __init__(
        self, tasks: Sequence[Task], heads: tuple[int, ...], *, masking: Masking, online: bool = False
    ) -> None:
        if masking not in ("task", "seen", "all"):
            raise ValueError(f"scenario.masking={masking}: must be task, seen or all")
        super().__init__(tasks, heads, online=online)
        self._masking = masking
        self._tasks = tuple(replace(task, mask=self._mask(task, range(task.id + 1))) for task in self._tasks)

    def client_task(self, task_id: int, client: str, seen: Collection[int]) -> Task:
        """Return the task; masked to what has been seen, that is what the client itself has."""
        task = self.train_task(task_id)
        return replace(task, mask=self._mask(task, {*seen, task_id}))

    def _mask(self, task: Task, seen: Collection[int]) -> tuple[int, ...] | None:
        if self._masking == "all":
            return None
        return tuple(sorted(task.columns)) if self._masking == "task" else self._columns(seen)

    def _columns(self, task_ids: Collection[int]) -> tuple[int, ...]:
        """Return all columns of some tasks, ascending."""
        return tuple(sorted({column for task_id in task_ids for column in self._tasks[task_id].columns}))


class SingleHead(Masked):
    """Tasks that share one head, and of which none is named at test: a class's column is its label."""

    def test_task(self, task_id: int, *, after: int | Collection[int]) -> Task:
        """Return task ``task_id`` with the columns seen up to ``after``, or in the tasks ``after``.

        A task that lies ahead is tested with the columns up to itself: without its own, its accuracy would be 0 by
        construction and forward transfer would say nothing.
        """
        task = super().test_task(task_id, after=after)
        reached = self._reached(after)
        ahead = range(task_id + 1) if isinstance(after, int) else (task_id,)
        return replace(task, mask=self._columns({*reached, *ahead}))
