"""What streams are made of: a list of tasks, and the policy that says which columns a prediction has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from fedcl.scenario.task import Task

ClassOrder = Literal["shuffled"] | Sequence[int] | None
Masking = Literal["task", "seen", "all", "batch"]


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


@dataclass(kw_only=True, eq=False, repr=False)
class Tasks(ABC):
    """A stream that lists its tasks once and trains and tests them as listed; the base of all streams.

    The run sets ``num_classes``, ``input_shape`` and ``seed``; the other fields are the stream's hyper-parameters. A
    subclass defines :meth:`make_tasks`. There is one head for all classes unless it sets ``heads``.
    """

    num_classes: int
    input_shape: Sequence[int]
    seed: int
    num_tasks: int = 5
    online: bool = field(default=False, init=False)
    heads: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.heads = (self.num_classes,)
        self._tasks = tuple(self.make_tasks())

    @abstractmethod
    def make_tasks(self) -> Sequence[Task]:
        """Return the tasks in their order; ValueError if the hyper-parameters do not fit the data."""

    def train_task(self, task_id: int) -> Task:
        """Return the task as it is trained; IndexError if there is no such task."""
        return self._tasks[self._existing(task_id)]

    def client_task(self, task_id: int, client: str, seen: Collection[int]) -> Task:
        """Return the task as ``client`` trains it, which has seen the tasks ``seen``; IndexError if there is none."""
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


@dataclass(kw_only=True, eq=False, repr=False)
class Masked(Tasks):
    """Tasks of some classes each, trained with the columns that ``train_masking`` leaves.

    These are those of the ``task``, of the tasks that the client itself has ``seen``, ``all``, or in each step those of
    the classes in its ``batch``. Then ``mask`` lists the columns seen.
    """

    train_masking: Masking = "seen"

    def __post_init__(self) -> None:
        super().__post_init__()
        by_batch = self.train_masking == "batch"
        self._tasks = tuple(
            replace(task, mask=self._mask(task, range(task.id + 1)), by_batch=by_batch) for task in self._tasks
        )

    def client_task(self, task_id: int, client: str, seen: Collection[int]) -> Task:
        """Return the task; masked to what has been seen, that is what the client itself has."""
        task = self.train_task(task_id)
        return replace(task, mask=self._mask(task, {*seen, task_id}))

    def _mask(self, task: Task, seen: Collection[int]) -> tuple[int, ...] | None:
        if self.train_masking == "all":
            return None
        return tuple(sorted(task.columns)) if self.train_masking == "task" else self._columns(seen)

    def _columns(self, task_ids: Collection[int]) -> tuple[int, ...]:
        """Return all columns of some tasks, ascending."""
        return tuple(sorted({column for task_id in task_ids for column in self._tasks[task_id].columns}))


@dataclass(kw_only=True, eq=False, repr=False)
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


@dataclass(kw_only=True, eq=False, repr=False)
class Grouped(Tasks):
    """Tasks that share out the classes among them: equally, or as many to each task as ``increments`` says."""

    increments: Sequence[int] | None = None
    class_order: ClassOrder = None
    online: bool = False

    def groups(self) -> list[tuple[int, ...]]:
        """Return the new classes of each task, perhaps none; ValueError if they cannot be shared out like that."""
        order = ordered_classes(self.class_order, self.num_classes, self.seed)
        if self.increments is None:
            if self.num_classes % self.num_tasks:
                raise ValueError(
                    f"scenario.num_tasks={self.num_tasks}: must divide the {self.num_classes} classes, unless "
                    "scenario.increments says how many each task brings"
                )
            sizes = [self.num_classes // self.num_tasks] * self.num_tasks
        else:
            sizes = list(self.increments)
            if len(sizes) != self.num_tasks:
                raise ValueError(
                    f"scenario.increments={sizes}: must have {self.num_tasks} entries, as scenario.num_tasks says"
                )
            if sum(sizes) != self.num_classes:
                raise ValueError(f"scenario.increments={sizes}: must add up to the {self.num_classes} classes")
        ends = np.cumsum(sizes)
        return [tuple(order[end - size : end]) for size, end in zip(sizes, ends.tolist(), strict=True)]
