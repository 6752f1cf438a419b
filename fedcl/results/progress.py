"""How far a run is: a bar on a terminal, a few plain lines elsewhere, nothing when quiet."""

from __future__ import annotations

import importlib.util
import sys
import time
from typing import Any, Self, TextIO


class Progress:
    """Shows a run's progress; a context manager.

    On a terminal with rich installed: one bar with the round, the task, the last text and the time left. Elsewhere: a
    line when a task begins, when a further tenth of the rounds is done, and at the end.

    Parameters
    ----------
    quiet
        Show nothing at all, not even ``print``.
    stream
        Where to write; standard error by default, so that standard output stays free for results.
    """

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self.quiet = quiet
        self.stream = sys.stderr if stream is None else stream
        self._bar: Any = None  # rich.progress.Progress; Any because rich is optional and imported late
        self._row: Any = None
        self._tenth = -1
        self._task: int | None = None
        self._started = time.monotonic()
        self._first_round: int | None = None

    def __enter__(self) -> Self:
        """Start the bar where there is one."""
        self._started = time.monotonic()
        if not self.quiet and self.stream.isatty() and importlib.util.find_spec("rich") is not None:
            self._bar = _rich_bar(self.stream)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the bar on the screen as it stands."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def update(self, server_round: int, total_rounds: int, task: int, text: str = "") -> None:
        """Tell that a round is done.

        Parameters
        ----------
        server_round
            Rounds done so far, 1-based: ``total_rounds`` when the run is complete, 0 before the first.
        total_rounds
            Rounds of the whole run.
        task
            0-based task of that round; -1 for none.
        text
            A few words beside the bar, such as the last accuracy.
        """
        if self.quiet:
            return
        if self._first_round is None:
            self._first_round = server_round - 1 if server_round else 0
        if self._bar is not None:
            self._show(server_round, total_rounds, task, text)
        elif self._is_due(server_round, total_rounds, task):
            self._write(self._line(server_round, total_rounds, task, text))

    def print(self, line: str) -> None:
        """Write a line above the bar, or just write it."""
        if self.quiet:
            return
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            self._write(line)

    def _show(self, server_round: int, total_rounds: int, task: int, text: str) -> None:
        label = f"task {task}" if task >= 0 else ""
        if self._row is None:
            # a resumed run counts its speed from where it started again
            self._row = self._bar.add_task("", total=total_rounds, label=label, text=text)
            self._bar.update(self._row, completed=self._first_round)
        self._bar.update(self._row, completed=server_round, total=total_rounds, label=label, text=text)

    def _is_due(self, server_round: int, total_rounds: int, task: int) -> bool:
        tenth = 10 * server_round // max(total_rounds, 1)
        due = tenth > self._tenth or task != self._task
        self._tenth, self._task = max(tenth, self._tenth), task
        return due

    def _line(self, server_round: int, total_rounds: int, task: int, text: str) -> str:
        parts = [f"round {server_round}/{total_rounds}"]
        if task >= 0:
            parts.append(f"task {task}")
        if text:
            parts.append(text)
        elapsed, done = time.monotonic() - self._started, server_round - (self._first_round or 0)
        if done > 0 and server_round < total_rounds:
            parts.append(f"{_clock(elapsed / done * (total_rounds - server_round))} left")
        else:
            parts.append(f"{_clock(elapsed)} elapsed")
        return "  ".join(parts)

    def _write(self, line: str) -> None:
        self.stream.write(line + "\n")
        self.stream.flush()


def _rich_bar(stream: TextIO) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    return RichProgress(
        TextColumn("round"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[label]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}", markup=False),
        console=Console(file=stream),
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
