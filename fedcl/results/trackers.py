"""Experiment trackers: what a run writes into its metrics table, told to others as it goes on.

A tracker is an addition. The run's own tables are complete without it, and one that fails costs itself, never the run.
"""

from __future__ import annotations

import importlib.util
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

from fedcl.config.value_rules import ConfigError
from fedcl.results.recorder import Recorder

Record = Mapping[str, Any]


class Tracker(Protocol):
    """One of them; its constructor takes settings and touches nothing.

    ``needs`` are the packages it cannot do without, which the extra ``tracking`` installs.
    """

    needs: tuple[str, ...]

    def start(self, run_dir: Path, cfg: Mapping[str, Any], first_round: int) -> None:
        """Begin, or go on with the run that was begun in this folder; ``first_round`` is the next to be played."""
        ...

    def log(self, server_round: int, scalars: Mapping[str, float]) -> None:
        """Take the numbers of a round, by name."""
        ...

    def finish(self, summary: Mapping[str, Any], status: str) -> None:
        """End; ``summary`` is empty and ``status`` not ``done`` for a run that was stopped or failed."""
        ...


class Trackers:
    """All trackers of a run, fed with the rows of its metrics table and asked to log them when a round is over.

    ``when`` tells the round and virtual time of the moment, for the event that one failed.
    """

    def __init__(
        self, trackers: Mapping[str, Tracker], recorder: Recorder, when: Callable[[], Mapping[str, Any]]
    ) -> None:
        self._trackers, self._recorder, self._when = dict(trackers), recorder, when
        self._rows: list[Record] = []
        if trackers:
            recorder.followers.append(self._rows.append)

    def start(self, run_dir: Path, cfg: Mapping[str, Any], first_round: int) -> None:
        """Begin or go on."""
        self._each(lambda tracker: tracker.start(run_dir, cfg, first_round))

    def round_over(self, server_round: int) -> None:
        """Hand on what was recorded of the round; what was measured before the first stays in the run's own table."""
        if not self._trackers:
            return
        numbers = scalars([row for row in self._rows if row["round"] == server_round])
        self._rows.clear()
        self._each(lambda tracker: tracker.log(server_round, numbers))

    def finish(self, summary: Mapping[str, Any], status: str) -> None:
        """End."""
        self._each(lambda tracker: tracker.finish(summary, status), noted=False)  # the tables may be closed by now
        self._trackers.clear()

    def _each(self, call: Callable[[Tracker], None], *, noted: bool = True) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                call(tracker)
            except Exception as error:  # the run is worth more than any view of it
                del self._trackers[name]
                said = f"{type(error).__name__}: {error}"
                if noted:
                    self._recorder.event("tracker_failed", **self._when(), tracker=name, error=said)
                print(f"fedcl: trackers={name} failed and is left out from here on: {said}", file=sys.stderr)


def scalars(rows: Sequence[Record]) -> dict[str, float]:
    """Return the numbers of some rows by name: ``test/accuracy_task_0`` by task, ``train/loss`` the mean over clients.

    ``test/accuracy`` is the mean over the tasks up to the present stage.
    """
    found: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row["value"] is None or row["phase"] == "iteration":
            continue
        name = f"{row['phase']}/{row['name']}"
        if row["phase"] == "test" and row["task"] >= 0:
            found[f"{name}_task_{row['task']}"].append(row["value"])
            name = name if row["task"] <= row["after"] else ""
        if name:
            found[name].append(row["value"])
    if rows:
        found["virtual_time"].append(rows[-1]["virtual_time"])
    return {name: fmean(values) for name, values in found.items()}


def check(trackers: Mapping[str, Tracker]) -> None:
    """Refuse trackers whose packages are not installed, before a run begins.

    Raises
    ------
    ConfigError
        Naming the first.
    """
    for name, tracker in trackers.items():
        missing = [package for package in tracker.needs if importlib.util.find_spec(package) is None]
        if missing:
            raise ConfigError(f"trackers={name}: needs the package '{missing[0]}'; pip install 'fedcl[tracking]'")
