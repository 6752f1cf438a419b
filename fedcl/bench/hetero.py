"""How much of two workers' time is useful where clients differ in size, and how much where they do not."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fedcl.base.randomness import numpy_generator
from fedcl.bench.federation import federation
from fedcl.bench.processes import descendants
from fedcl.bench.result import Result, Row
from fedcl.bench.workload import Workload, known
from fedcl.simulation.cluster import local_ray

CLIENTS, MEDIAN, SIGMAS = 50, 200, (0.0, 0.5, 1.0, 1.5)
LARGEST = 4_000  # samples
WORKERS, REPETITIONS, ROUNDS = 2, 7, 4
USEFUL_MARK, EFFICIENCY_MARK = 0.9, 0.9


@dataclass
class RunSide:
    """Rounds of one population on so many workers: by round, seconds on the wall and of each worker's processor."""

    sigma: float
    workers: int
    steps: int
    rounds: Callable[[int], None]
    pids: tuple[int, ...]
    walls: list[float] = field(default_factory=list)
    busy: list[tuple[float, ...]] = field(default_factory=list)

    def run(self) -> None:
        """Run a few rounds, each measured by itself."""
        for _ in range(ROUNDS):
            before, started = self._clocks(), time.perf_counter()
            self.rounds(1)
            self.walls.append(time.perf_counter() - started)
            self.busy.append(tuple(b - a for a, b in zip(before, self._clocks(), strict=True)))

    def forget(self) -> None:
        """Drop what was measured so far."""
        self.walls.clear()
        self.busy.clear()

    def _clocks(self) -> list[float]:
        # of each process's first thread, where a worker's clients train, to the nanosecond
        return [int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9 for pid in self.pids]

    @property
    def balance(self) -> float:
        """Share of the workers' time that is work, had they nothing but each other to wait for: mean over longest."""
        return statistics.median(sum(busy) / (len(busy) * max(busy)) for busy in self.busy)

    @property
    def rate(self) -> float:
        """Steps a second on the wall."""
        return self.steps / statistics.median(self.walls)


def sizes(sigma: float, clients: int = CLIENTS) -> tuple[int, ...]:
    """Return how many samples each client holds: log-normal about `MEDIAN`, between 1 and `LARGEST`."""
    drawn = MEDIAN * np.exp(sigma * numpy_generator("bench", "sizes").standard_normal(clients))
    return tuple(int(size) for size in np.clip(drawn.round(), 1, LARGEST))


def hetero(model: str = "mlp", repetitions: int = REPETITIONS) -> Result:
    """Run rounds of equal and of log-normally unequal clients on one worker and on two, in turn.

    Returns
    -------
    Result
        One row a population. *Useful* is the mean over the longest worker's processor time in a round; *efficiency* the
        steps a second over those of one worker (equal clients) times the workers, which counts only on idle cores.
        ``ratio`` is the useful share at sigma 1; passed if it reaches its mark.
    """
    known(model)
    with ExitStack() as stack:
        stack.enter_context(local_ray(1 + WORKERS * len(SIGMAS)))
        sides = [_open(stack, model, 0.0, 1), *(_open(stack, model, sigma, WORKERS) for sigma in SIGMAS)]
        for side in sides:
            side.run()
            side.forget()
        for _ in range(repetitions):
            for side in sides:
                side.run()
    alone = sides[0]
    rows: list[Row] = [
        {
            "model": model,
            "clients": CLIENTS,
            "sigma of sizes": side.sigma,
            "workers": side.workers,
            "largest over all": f"{_largest(side.sigma):.3f}",
            "steps a second": f"{side.rate:.0f}",
            "useful": f"{side.balance:.3f}",
            "efficiency": f"{side.rate / (side.workers * alone.rate):.2f}",
        }
        for side in sides
    ]
    useful = {side.sigma: side.balance for side in sides[1:]}
    figures = {f"useful_{sigma:g}": share for sigma, share in useful.items()}
    figures["efficiency"] = sides[1].rate / (WORKERS * alone.rate)
    return Result("hetero", useful[1.0], useful[1.0] >= USEFUL_MARK, rows, figures)


def _largest(sigma: float) -> float:
    drawn = sizes(sigma)
    return max(drawn) / sum(drawn)


def _open(stack: ExitStack, model: str, sigma: float, workers: int) -> RunSide:
    before = _workers()
    workload = Workload(model, sizes(sigma))
    run = stack.enter_context(federation(workload, "backend=ray", f"backend.workers={workers}"))
    pids = tuple(sorted(_workers() - before))
    if len(pids) != workers:
        raise RuntimeError(f"{len(pids)} new processes of Ray's call themselves workers, {workers} were started")
    return RunSide(sigma, workers, workload.steps, run.run, pids)


def _workers() -> set[int]:
    """Return the processes started here that are workers of a grid: Ray names them after their class."""
    return {pid for pid in descendants(os.getpid()) if "ray::Worker" in _title(pid)}


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""  # it has ended
