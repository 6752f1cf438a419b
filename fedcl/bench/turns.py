"""Sides that take turns on one machine, and how their times compare."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["wall", "cpu"]


@dataclass(frozen=True)
class Turn:
    """What one turn took: seconds on the wall and of all its processes' processors."""

    wall: float
    cpu: float

    def of(self, what: Kind) -> float:
        """Return one of the two."""
        return self.wall if what == "wall" else self.cpu


@dataclass
class Side:
    """One who can run rounds: ``run(n)`` runs ``n`` more, ``cpu()`` says what its processes have used so far."""

    name: str
    run: Callable[[int], object]
    cpu: Callable[[], float]
    turns: list[Turn] = field(default_factory=list)

    def turn(self, rounds: int) -> Turn:
        """Run and measure."""
        gc.collect()
        cpu, wall = self.cpu(), time.perf_counter()
        self.run(rounds)
        wall = time.perf_counter() - wall
        return Turn(wall, self.cpu() - cpu)

    def median(self, what: Kind) -> float:
        """Return the median of ``wall`` or ``cpu`` over the turns."""
        return statistics.median(turn.of(what) for turn in self.turns)


def take_turns(sides: Sequence[Side], rounds: int, repetitions: int, *, warm_up: int = 2) -> None:
    """Let every side run ``rounds`` rounds in each repetition, after ``warm_up`` rounds that do not count.

    Every second repetition goes through them backwards, so that none always follows the same one.
    """
    for side in sides:
        side.run(warm_up)
    for repetition in range(repetitions):
        for side in sides if repetition % 2 == 0 else reversed(sides):
            side.turns.append(side.turn(rounds))


def ratio(reference: Side, own: Side, what: Kind) -> float:
    """Return the median over repetitions of the reference's seconds over one's own; above one: faster."""
    pairs = zip(reference.turns, own.turns, strict=True)
    return statistics.median(theirs.of(what) / mine.of(what) for theirs, mine in pairs)


def load() -> float:
    """Return the machine's load average over the last minute."""
    return os.getloadavg()[0]
