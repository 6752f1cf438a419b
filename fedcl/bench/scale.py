"""Ten thousand clients in one round: what a further client costs in memory, and how long the round takes."""

from __future__ import annotations

import os
import re
import statistics
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from fedcl.bench.federation import Federation, federation
from fedcl.bench.processes import descendants, memory_kb
from fedcl.bench.result import Result, Row
from fedcl.bench.workload import Workload, known

COHORTS = (100, 1_000, 10_000)
KB_MARK, WORKERS, REPETITIONS = 1.0, 2, 2
LOOK_SECONDS = 0.25
SPARE = 0.5  # of the memory that is free, which a round may be expected to take


@dataclass
class Watch:
    """The most memory that this process and all it has started have had together, in kB."""

    highest: int = 0
    stop: threading.Event = field(default_factory=threading.Event)

    def look(self) -> None:
        """Look now."""
        self.highest = max(self.highest, memory_kb({os.getpid(), *descendants(os.getpid())}))

    def keep_looking(self) -> None:
        """Look again and again until told to stop."""
        while not self.stop.wait(LOOK_SECONDS):
            self.look()


@contextmanager
def watching() -> Iterator[Watch]:
    """Watch the memory meanwhile; a look before and one behind belong to it."""
    watch = Watch()
    watch.look()
    thread = threading.Thread(target=watch.keep_looking, daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        watch.stop.set()
        thread.join()
        watch.look()


def scale(model: str = "mlp", cohorts: tuple[int, ...] = COHORTS, repetitions: int = REPETITIONS) -> Result:
    """Run rounds of ever more clients out of the same ten thousand, on two workers.

    A client holds 200 samples and takes ten steps. As many visits as there are clients come before anything is
    measured, so that caches, which are bounded, and processes' own pools of memory do not count as growth. A cohort
    that would not fit into memory, to judge by the one before, is not run.

    Returns
    -------
    Result
        One row a cohort: seconds, clients a second, memory, and kB for each client beyond the cohort before. ``ratio``
        is the mark of 1 kB over the last row's kB (one for any that is below); passed if the last cohort was run and
        needs no more.
    """
    workload = Workload(known(model), (200,) * max(cohorts))
    seen: list[Cohort] = []
    notes = []
    with federation(workload, "backend=ray", f"backend.workers={WORKERS}") as run:
        _select(run, cohorts[-2])
        run.run(max(cohorts) // cohorts[-2])
        for clients in cohorts:
            needed = seen[-1].kb * (clients - seen[-1].clients) if seen else 0.0
            if needed > SPARE * _free_kb():
                notes.append(f"{clients} clients not run: they would need {needed / 1e6:.1f} GB more")
                break
            _select(run, clients)
            seen.append(_measured(run, clients, repetitions, seen[-1] if seen else None))
    last, complete = seen[-1], len(seen) == len(cohorts)
    figures = {f"seconds_{c.clients}": c.seconds for c in seen} | {f"kb_{c.clients}": c.kb for c in seen[1:]}
    ratio = min(KB_MARK / max(last.kb, 1e-9), 1.0) if complete else 0.0
    return Result("scale", ratio, ratio == 1.0, [c.row(model) for c in seen], figures, notes)


@dataclass(frozen=True)
class Cohort:
    """What rounds of so many clients took: median seconds, the highest memory, and kB for each client more."""

    clients: int
    seconds: float
    cpu: float
    highest: int
    kb: float
    more: int

    def row(self, model: str) -> Row:
        """Return the table's row."""
        return {
            "model": model,
            "clients in a round": self.clients,
            "seconds": f"{self.seconds:.2f}",
            "clients a second": f"{self.clients / self.seconds:.0f}",
            "clients a CPU second": f"{self.clients / self.cpu:.0f}",
            "highest memory, MB": f"{self.highest / 1000:.0f}",
            "kB a further client": f"{self.kb:.2f}" if self.more else "",
        }


def _measured(run: Federation, clients: int, repetitions: int, before: Cohort | None) -> Cohort:
    side = run.side("fedcl")
    with watching() as watch:
        turns = [side.turn(1) for _ in range(repetitions)]
    seconds, cpu = statistics.median(t.wall for t in turns), statistics.median(t.cpu for t in turns)
    more = clients - before.clients if before else 0
    kb = max(watch.highest - before.highest, 0) / more if before else 0.0
    return Cohort(clients, seconds, cpu, watch.highest, kb, more)


def _select(run: Federation, clients: int) -> None:
    rounds = run.server.rounds
    rounds.options = replace(rounds.options, clients_per_round=clients)


def _free_kb() -> int:
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return int(found[1]) if found else 0
