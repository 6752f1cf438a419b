"""Tasks, and the schedule that says which client is in which task: the vocabulary every other room shares."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Task:
    """One task as a client sees it (what Avalanche calls an experience).

    It owns the samples whose class is in ``classes``, seen through ``transform``. ``columns`` are the logit columns
    of those classes, aligned with ``classes``. ``mask`` lists the columns a prediction may choose from (sorted);
    ``None`` means all. ``head`` is the index of the head that owns the columns. ``portions`` says which part of each
    class belongs to the task, aligned with ``classes``: (start, stop) in [0, 1] of the samples that a client holds of
    the class; ``None`` means all of them. ``without_classes`` and ``without_samples`` (positions in the train half) are
    what clients must treat as if they did not hold it: what has been asked to be forgotten. With ``by_batch`` the
    cross-entropy of a training step is over the columns of the classes in its batch alone, those that ``mask`` leaves.
    """

    id: int
    classes: tuple[int, ...]
    columns: tuple[int, ...]
    mask: tuple[int, ...] | None = None
    head: int = 0
    transform: dict[str, Any] | None = None
    portions: tuple[tuple[float, float], ...] | None = None
    without_classes: tuple[int, ...] = ()
    without_samples: tuple[int, ...] = ()
    by_batch: bool = False
    _json: str | None = field(default=None, init=False, repr=False, compare=False)

    def part(self, index: int, of: int) -> Task:
        """Return the ``index``-th of ``of`` equal parts of the task: what an online stream shows in one round."""

        def bound(start: float, stop: float, at: int) -> float:
            # the whole's own ends, bit for bit: parts must meet each other and the next task's without a gap
            return stop if at == of else start + (stop - start) * at / of

        whole = self.portions or ((0.0, 1.0),) * len(self.classes)
        return replace(self, portions=tuple((bound(a, b, index), bound(a, b, index + 1)) for a, b in whole))

    def to_json(self) -> str:
        """Return the record as it travels in a message."""
        if self._json is None:  # once a task: every message and every dispatch asks
            known = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
            if not self.by_batch:
                del known["by_batch"]  # most tasks: no bytes for it
            object.__setattr__(self, "_json", json.dumps(known, separators=(",", ":"), sort_keys=True))
        assert self._json is not None
        return self._json

    @classmethod
    def from_json(cls, text: str) -> Task:
        """Read what :meth:`to_json` wrote."""
        raw = json.loads(text)
        mask, portions = raw["mask"], raw.get("portions")
        return cls(
            id=int(raw["id"]),
            classes=tuple(raw["classes"]),
            columns=tuple(raw["columns"]),
            mask=None if mask is None else tuple(mask),
            head=int(raw["head"]),
            transform=raw["transform"],
            portions=None if portions is None else tuple((float(a), float(b)) for a, b in portions),
            without_classes=tuple(raw.get("without_classes", ())),
            without_samples=tuple(raw.get("without_samples", ())),
            by_batch=raw.get("by_batch", False),
        )


@dataclass(frozen=True, slots=True)
class Position:
    """Where in its stream a client is: the task, and the 0-based round within the task out of ``num_rounds``."""

    task_id: int
    round_in_task: int
    num_rounds: int

    @property
    def is_last(self) -> bool:
        """Whether this round is the last one of its task."""
        return self.round_in_task == self.num_rounds - 1


class Stream(Protocol):
    """A sequence of tasks: what is learned, in which order, and through which heads.

    ``heads`` gives the number of logit columns of each head; a model's output is their concatenation. ``online`` says
    that each round shows a new part of its task, and no sample twice.
    """

    num_tasks: int
    heads: tuple[int, ...]
    online: bool

    def train_task(self, task_id: int) -> Task:
        """Return the task as it is trained: ``mask`` follows the scenario's masking policy."""
        ...

    def client_task(self, task_id: int, client: str, seen: Collection[int]) -> Task:
        """Return the task as ``client`` trains it, which has seen the tasks ``seen``, this one included."""
        ...

    def test_task(self, task_id: int, *, after: int | Collection[int]) -> Task:
        """Return the task as it is tested: ``after`` is the last task that has been reached, or all that have been."""
        ...


@dataclass(frozen=True, slots=True)
class Stage:
    """How far a run is: ``index`` counts, from 0, the rows of the accuracy matrix; ``ends`` says one is due now."""

    index: int
    ends: bool


class Schedule(Protocol):
    """Which task a client is in at a round: a pure function, so that any process can ask it.

    ``uniform`` says that all clients are always in the same task.
    """

    num_rounds: int
    uniform: bool

    def position(self, client: str, server_round: int) -> Position | None:
        """Return the position of ``client`` at the 0-based ``server_round``; None where it takes no part."""
        ...

    def seen(self, client: str, server_round: int) -> tuple[int, ...]:
        """Return the ids of the tasks ``client`` has been in up to ``server_round``, that round's included."""
        ...

    def stage(self, server_round: int) -> Stage:
        """Return how far the run is at ``server_round``; there are as many stages as tasks."""
        ...
