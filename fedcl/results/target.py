"""Stopping a run once it is good enough."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fedcl.results import reading

REACHED = "target_reached"
"""The kind of the event that a run notes when it has reached its target."""


class TargetReached(Exception):
    """A run is to stop here: it is as accurate as was asked for."""


class TargetAccuracy:
    """Watches the global model's test accuracy for ``target`` in (0, 1]; None is never reached.

    It counts in the stream's last stage only, when all ``num_tasks`` tasks have been met: the mean over fewer would be
    reached in the first rounds of almost every stream, and say nothing of the tasks to come. It is the mean over
    ``tested``, the tasks with test samples: all of them if not given.
    """

    def __init__(self, target: float | None, num_tasks: int, tested: Collection[int] | None = None) -> None:
        self.target, self._num_tasks = target, num_tasks
        self._tasks = set(range(num_tasks) if tested is None else tested)
        self._round, self._tested = -1, dict[int, float]()

    def follow(self, record: Mapping[str, Any]) -> None:
        """Take note of a row of the metrics table."""
        tested = record["phase"] == "test" and record["name"] == "accuracy" and not record["client"]
        if self.target is None or not tested or record["after"] != self._num_tasks - 1 or record["value"] is None:
            return
        if record["round"] != self._round:
            self._round, self._tested = record["round"], {}
        self._tested[record["task"]] = record["value"]

    def reached(self, server_round: int) -> float | None:
        """Return the mean accuracy over all tasks after this round if it was tested and is high enough, else None."""
        if self.target is None or self._round != server_round or not self._tasks or self._tested.keys() != self._tasks:
            return None
        mean = math.fsum(self._tested.values()) / len(self._tasks)
        return mean if mean >= self.target else None


def was_reached(run_dir: Path) -> bool:
    """Whether a run has noted that it reached its target."""
    return any(event["kind"] == REACHED for event in reading.events(run_dir))
