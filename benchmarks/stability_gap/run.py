"""The stability gap at a client and in a federation: how far accuracy falls at a task's border, and comes back.

    OMP_NUM_THREADS=1 python -m benchmarks.stability_gap.run

Writes results.json and the tables of README.md beside this file; see there for the setting and the reading.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.every_learner import Numbers, Row
from benchmarks.rows import Bench, Column, Table, main
from fedcl.results.curves import client_curves, round_curve
from fedcl.results.run import load


def rows(budget: int) -> tuple[Row, ...]:
    """Return the rows with a memory of ``budget`` samples at each client."""
    replay = [Row(name, (f"learner={name}", f"learner.{name}.budget={budget}")) for name in ("er", "er_ace", "derpp")]
    everything = Row("er, everything kept", ("learner=er", "learner.er.budget=2000", "learner.er.replay_size=40"))
    return (*replay, everything, Row("finetune", ("learner=finetune",)))


COLUMNS = (
    Column("gap, rounds", "gap/round"),
    Column("gap, steps", "gap/iteration"),
    Column("last accuracy", "accuracy/average"),
    Column("min-ACC, rounds", "stability/round/min_accuracy"),
    Column("min-ACC, steps", "stability/iteration/min_accuracy"),
    Column("WC-ACC, steps", "stability/iteration/worst_case_accuracy"),
    Column("lost by averaging", "stability/aggregation_drop"),
)


def gap(curve_NT: NDArray[np.float64], learned_T: list[int]) -> float:
    """Return how far below both ends of a task earlier tasks' accuracy falls within it, mean over tasks and borders.

    For the task that ends at row ``b`` and the one before it, which ends at ``a``: min(curve[a], curve[b]) minus the
    lowest value in between. What is lost for good is no part of it; 0 where no curve dips, NaN where an earlier task
    was not measured, which leaves out a client that has no test images of one.
    """
    order = [int(task) for task in np.argsort(learned_T) if learned_T[task] >= 0]
    dips = []
    for place, present in enumerate(order[1:], start=1):
        start, stop = learned_T[order[place - 1]], learned_T[present]
        for task in order[:place]:
            part = curve_NT[start : stop + 1, task]
            dips.append(np.nan if np.isnan(part).all() else min(part[0], part[-1]) - np.nanmin(part))
    return float(np.mean(dips))


def gaps(folder: Path) -> Numbers:
    """Return the gap of the global model by round, and the mean over clients of those of their curves by step."""
    run = load(folder)
    rounds = round_curve(run)
    assert rounds is not None
    clients = [gap(*curve) for curve in client_curves(run).values()]
    return {"gap/round": gap(*rounds), "gap/iteration": float(np.nanmean(clients))}


BENCH = Bench(
    "stability_gap",
    Path(__file__).resolve().parent,
    (
        Table("central", "One client", ("num_clients=1", "rounds_per_task=3"), rows(200), COLUMNS),
        Table("iid", "Five clients, distributed evenly", (), rows(40)[:2] + rows(40)[-2:], COLUMNS),
        Table("skewed", "Five clients, Dir(0.5)", ("data/partition=dirichlet",), rows(40)[:1] + rows(40)[-1:], COLUMNS),
    ),
    measure=gaps,
)

if __name__ == "__main__":
    main(BENCH, __doc__)
