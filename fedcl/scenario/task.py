"""Tasks, and the schedule that says which client is in which task: the vocabulary every other room shares."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Task:
    """One task as a client sees it (what Avalanche calls an experience).

    It owns the samples whose class is in ``classes``, seen through ``transform``. ``columns`` are the logit columns
    of those classes, aligned with ``classes``. ``mask`` lists the columns a prediction may choose from (sorted);
    ``None`` means all. ``head`` is the index of the head that owns the columns.
    """

    id: int
    classes: tuple[int, ...]
    columns: tuple[int, ...]
    mask: tuple[int, ...] | None = None
    head: int = 0
    transform: dict[str, Any] | None = None

    def to_json(self) -> str:
        """Return the record as it travels in a message."""
        return json.dumps(asdict(self), separators=(",", ":"), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Task:
        """Read what :meth:`to_json` wrote."""
        raw = json.loads(text)
        mask = raw["mask"]
        return cls(
            id=int(raw["id"]),
            classes=tuple(raw["classes"]),
            columns=tuple(raw["columns"]),
            mask=None if mask is None else tuple(mask),
            head=int(raw["head"]),
            transform=raw["transform"],
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

    ``heads`` gives the number of logit columns of each head; a model's output is their concatenation.
    """

    num_tasks: int
    heads: tuple[int, ...]

    def train_task(self, task_id: int) -> Task:
        """Return the task as it is trained: ``mask`` follows the scenario's masking policy."""
        ...

    def test_task(self, task_id: int, *, after: int) -> Task:
        """Return task ``task_id`` as it is tested once task ``after`` has been reached."""
        ...


class Schedule(Protocol):
    """Which task a client is in at a round: a pure function, so that any process can ask it."""

    num_rounds: int

    def position(self, client: str, server_round: int) -> Position:
        """Return the position of ``client`` at the 0-based ``server_round``."""
        ...

    def boundary(self, server_round: int) -> int | None:
        """Return the id of the task that ends for all clients with ``server_round``, or None."""
        ...
