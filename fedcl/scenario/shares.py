"""Streams without clear borders: which share of each class's samples is shown in which task.

A matrix W with a row a task and a column a class says it all. Each client cuts its own samples of class c into adjacent
portions of W[t, c], so that no sample is shown in two tasks and none is left out, at any client. One head serves all
tasks, and at test no task is named. A task's test samples are all those of its classes.
"""

# T = tasks, C = classes, G = groups of classes
from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fedcl.base.randomness import numpy_generator
from fedcl.scenario.base import ClassOrder, Grouped, Masking, SingleHead, ordered_classes
from fedcl.scenario.task import Task

Floats = NDArray[np.float64]
_NOTHING = 1e-9  # a share below is the noise of an addition


@dataclass(kw_only=True, eq=False, repr=False)
class Shares(SingleHead):
    """A stream from a matrix of shares (T, C), which a subclass gives: those of a class add up to 1 over the tasks."""

    online: bool = False

    @abstractmethod
    def shares(self) -> Floats:
        """Return the share of each class in each task, (T, C)."""

    def make_tasks(self) -> Sequence[Task]:
        """Return a task for each row; ValueError if an entry is negative or a column does not add up to 1."""
        return portioned(*cumulated(self.shares()))


def cumulated(shares_TC: Floats) -> tuple[Floats, Floats]:
    """Return where each task's portion of each class starts and stops, (T, C) each: within [0, 1], without gaps.

    Raises
    ------
    ValueError
        A share is negative, or those of a class do not add up to 1.
    """
    shares_TC = np.where(shares_TC < _NOTHING, np.minimum(shares_TC, 0.0), shares_TC)
    sums_C = shares_TC.sum(axis=0)
    if (shares_TC < 0).any() or not np.allclose(sums_C, 1.0, atol=1e-6):
        raise ValueError(f"shares of the classes add up to {sums_C.tolist()}: must be >= 0 and add up to 1")
    stops_TC = np.cumsum(shares_TC, axis=0)
    stops_TC /= stops_TC[-1]  # the last one is 1 exactly
    return np.concatenate([np.zeros((1, shares_TC.shape[1])), stops_TC[:-1]]), stops_TC


def portioned(starts_TC: Floats, stops_TC: Floats) -> list[Task]:
    """Return tasks that own, of each class, the samples from where they start to where they stop, if any."""
    tasks = []
    for task_id, (starts, stops) in enumerate(zip(starts_TC.tolist(), stops_TC.tolist(), strict=True)):
        owned = {label: (a, b) for label, (a, b) in enumerate(zip(starts, stops, strict=True)) if b > a}
        tasks.append(Task(task_id, tuple(owned), tuple(owned), portions=tuple(owned.values())))
    return tasks


def homes(groups: Sequence[Sequence[int]], num_classes: int) -> Floats:
    """Return the shares (T, C) of disjoint tasks: 1 where a class belongs to the task's group."""
    shares_TC = np.zeros((len(groups), num_classes))
    for task_id, group in enumerate(groups):
        shares_TC[task_id, list(group)] = 1.0
    return shares_TC


@dataclass(kw_only=True, eq=False, repr=False)
class Overlapping(Grouped, Shares):
    """Class-incremental, but each class spills the share ``overlap`` of its samples into the next task.

    The last task's classes have no next task to spill into. ``num_tasks``, ``increments``, ``class_order``,
    ``train_masking`` and ``online`` as for :class:`~fedcl.scenario.streams.ClassIncremental`.
    """

    overlap: float = 0.2

    def shares(self) -> Floats:
        """Return the shares: each task keeps most of its classes' samples and gives the rest to the next."""
        own_TC = homes(self.groups(), self.num_classes)
        shares_TC = own_TC.copy()
        shares_TC[:-1] -= self.overlap * own_TC[:-1]
        shares_TC[1:] += self.overlap * own_TC[:-1]
        return shares_TC


@dataclass(kw_only=True, eq=False, repr=False)
class SiBlurry(Shares):
    """Si-Blurry: some classes belong to one task, samples of the others also come up in all tasks.

    Moon et al., "Online Class Incremental Learning on Stochastic Blurry Task Boundary", ICCV 2023. The classes, in an
    order drawn by the run's seed, are parted into disjoint and blurry ones, and both kinds among the tasks. Of each
    blurry class the share ``blurry`` goes into a pool that is spread over all tasks. As published, ``stochastic``
    draws the points at which classes and pool are split: a task then has any number of classes, perhaps none. Unlike
    the official code, this keeps the classes that do not divide by the number of tasks, and splits the pool alike for
    every class instead of sample by sample.

    Parameters
    ----------
    num_tasks
        Number of tasks.
    disjoint
        Share of classes that are disjoint, n in the paper, in [0, 1].
    blurry
        Share of a blurry class's samples that are spread over all tasks, m in the paper, in [0, 1].
    stochastic
        Whether the splits are drawn; otherwise they are equal.
    train_masking, online
        As for :class:`~fedcl.scenario.streams.ClassIncremental`; published for ``online`` learning.
    """

    disjoint: float = 0.5
    blurry: float = 0.1
    stochastic: bool = True
    online: bool = True

    def shares(self) -> Floats:
        """Return the shares of disjoint and of blurry classes."""
        rng = numpy_generator(self.seed, "si_blurry")
        order = rng.permutation(self.num_classes).tolist()
        num_disjoint, num_tasks = int(self.num_classes * self.disjoint), self.num_tasks
        shares_TC = np.zeros((num_tasks, self.num_classes))
        for classes, kept in ((order[:num_disjoint], 1.0), (order[num_disjoint:], 1.0 - self.blurry)):
            groups = _split(classes, num_tasks, rng if self.stochastic else None)
            shares_TC += kept * homes(groups, self.num_classes)
        pooled_T = rng.dirichlet(np.ones(num_tasks)) if self.stochastic else np.full(num_tasks, 1.0 / num_tasks)
        shares_TC[:, order[num_disjoint:]] += self.blurry * pooled_T[:, None]
        return shares_TC


def _split(classes: Sequence[int], parts: int, rng: np.random.Generator | None) -> list[Sequence[int]]:
    """Cut ``classes`` at points that are drawn, or into parts as equal as can be."""
    if rng is None:
        return [part.tolist() for part in np.array_split(np.asarray(classes, np.int64), parts)]
    cuts = [0, *sorted(rng.integers(0, len(classes) + 1, parts - 1).tolist()), len(classes)]
    return [classes[start:stop] for start, stop in pairwise(cuts)]


@dataclass(kw_only=True, eq=False, repr=False)
class LinearDecay(Shares):
    """Groups of classes that fade into each other: around each border one falls and the next one rises linearly.

    As the task-free streams of FOO-VB (Zeno et al., Neural Computation 2021) and Avalanche. Time is cut into
    ``num_tasks`` windows of equal length, which need not be the groups: with more windows than groups the ramps are
    seen in finer steps, and no window border means anything.

    Parameters
    ----------
    num_tasks
        Number of windows.
    groups
        Number of groups of classes, as equal as can be; None for one a window.
    ramp
        Length of the ramp around a border, in lengths of a group, in [0, 1]: 1 leaves no plateau between two ramps.
    class_order, train_masking, online
        As for :class:`~fedcl.scenario.streams.ClassIncremental`.
    """

    groups: int | None = None
    ramp: float = 0.5
    class_order: ClassOrder = None
    online: bool = True

    def shares(self) -> Floats:
        """Return the shares; ValueError if there are more groups than classes."""
        count = self.num_tasks if self.groups is None else self.groups
        if count > self.num_classes:
            raise ValueError(
                f"scenario.groups={self.groups}: must give 1 to {self.num_classes} groups, as there are classes"
            )
        order = np.asarray(ordered_classes(self.class_order, self.num_classes, self.seed))
        time = np.linspace(0.0, count, self.num_tasks + 1)
        shares_TC = np.zeros((self.num_tasks, self.num_classes))
        for group, classes in enumerate(np.array_split(order, count)):
            risen = time if group == 0 else _risen(time, group, self.ramp)
            fallen = np.zeros_like(time) if group == count - 1 else _risen(time, group + 1, self.ramp)
            shares_TC[:, classes] = np.diff(risen - fallen)[:, None]
        return shares_TC


def _risen(time: Floats, border: float, ramp: float) -> Floats:
    """Return the integral, up to each ``time``, of what rises linearly from 0 to 1 around ``border``."""
    into = np.clip(time - border + ramp / 2, 0.0, ramp)
    quadratic = into**2 / (2 * ramp) if ramp else into
    return np.asarray(quadratic + np.maximum(time - border - ramp / 2, 0.0))


@dataclass(kw_only=True, eq=False, repr=False)
class LabelShift(Shares):
    """All classes all the time, in proportions that change: each task draws its class prior from Dir(alpha 1_C).

    A class's samples go to the tasks in proportion to its priors there, so that all are used; the smaller ``alpha``,
    the more a few classes prevail in each task. ``online`` as for :class:`~fedcl.scenario.streams.ClassIncremental`.
    """

    alpha: float = 0.5
    train_masking: Masking = field(default="all", init=False)

    def shares(self) -> Floats:
        """Return the shares that follow from each task's prior."""
        rng = numpy_generator(self.seed, "label_shift")
        # the floor keeps a class that no prior favours from being divided by zero
        priors_TC = rng.dirichlet(np.full(self.num_classes, self.alpha), self.num_tasks) + 1e-12
        return np.asarray(priors_TC / priors_TC.sum(axis=0))
