"""SCoLe: whether plain SGD's models get better over a long sequence of tasks that come back.

    OMP_NUM_THREADS=1 python -m benchmarks.scole.run

Writes results.json and the tables of README.md beside this file; see there for the setting and the reading.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.every_learner import Numbers, Row
from benchmarks.rows import Bench, Column, Table, main
from fedcl.results.run import load

PLACES = (10, 30, 60)  # tasks after which the knowledge is measured
AROUND = 10  # over so many tasks up to that one: a single one depends on which two classes came last
ROWS = (
    Row("SGD, the task's columns", ()),
    Row("SGD, columns seen", ("scenario.train_masking=seen",)),
    Row("SGD, momentum 0.9", ("client.optimizer.momentum=0.9", "client.optimizer.lr=0.01")),
    Row("SGD, five classes a task", ("scenario.classes_per_task=5",)),
    Row("ER, 100 samples, columns seen", ("scenario.train_masking=seen", "learner=er", "learner.er.budget={budget}")),
    Row("joint", ("scenario=joint", "scenario.num_tasks=1", "rounds_per_task=12")),
)


def knowledge(folder: Path) -> Numbers:
    """Return the accuracy over all tasks of the stream after some of them: the mean over the last ``AROUND``."""
    matrix = load(folder).accuracy_matrix().to_numpy(dtype=float)
    if len(matrix) == 1:  # joint: one task
        return {f"known/{PLACES[-1]}": float(matrix.mean())}
    return {f"known/{place}": float(matrix[place - AROUND : place].mean()) for place in PLACES}


def rows(budget: int) -> tuple[Row, ...]:
    """Return the rows with a memory of ``budget`` samples at each client."""
    return tuple(Row(row.name, tuple(text.format(budget=budget) for text in row.overrides)) for row in ROWS)


COLUMNS = tuple(Column(f"after {place} tasks", f"known/{place}") for place in reversed(PLACES))
BENCH = Bench(
    "scole",
    Path(__file__).resolve().parent,
    (
        Table("central", "One client", (), rows(100), COLUMNS),
        Table(
            "iid",
            "Five clients, distributed evenly",
            ("num_clients=5", "client.batch_size=13"),
            rows(20)[:2] + rows(20)[-1:],
            COLUMNS,
        ),
    ),
    measure=knowledge,
)

if __name__ == "__main__":
    main(BENCH, __doc__)
