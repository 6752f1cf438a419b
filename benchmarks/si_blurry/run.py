"""Si-Blurry: classes that come once beside classes that keep coming, one pass over the data, tested all the time.

    FEDCL_DATA=<folder with mnist/> OMP_NUM_THREADS=1 python -m benchmarks.si_blurry.run

Writes results.json and the tables of README.md beside this file; see there for the setting and the reading.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.every_learner import Row
from benchmarks.rows import Bench, Column, Table, main

ROWS = (
    Row("finetune", ("learner=finetune",)),
    Row("er", ("learner=er", "learner.er.budget=40")),
    Row("er_ace", ("learner=er_ace", "learner.er_ace.budget=40")),
    Row("derpp", ("learner=derpp", "learner.derpp.budget=40")),
    Row("ranpac, no training", ("learner=ranpac", "learner.ranpac.train=none")),
)
COLUMNS = (
    Column("A_AUC", "accuracy/anytime"),
    Column("A_avg", "accuracy/average_incremental"),
    Column("A_last", "accuracy/average"),
    Column("F_last", "forgetting/chaudhry"),
)
JOINT = Row("joint, one pass", ("scenario=joint", "scenario.num_tasks=1", "scenario.online=true", "rounds_per_task=25"))
BENCH = Bench(
    "si_blurry",
    Path(__file__).resolve().parent,
    (Table("published", "n = 50, m = 10, split at random", (), (*ROWS, JOINT), COLUMNS),),
)

if __name__ == "__main__":
    main(BENCH, __doc__)
