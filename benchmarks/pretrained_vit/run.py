"""A small ViT trained on Fashion-MNIST meets MNIST by tasks: L2 by scope, nearest means by rule, and what is cheap.

    FEDCL_DATA=<folder with mnist/ and fashion_mnist/> OMP_NUM_THREADS=1 python -m benchmarks.pretrained_vit.run

Writes results.json and the tables of README.md beside this file; see there for the setting and the reading.
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.every_learner import Row
from benchmarks.rows import Bench, Column, Table, main, run_row
from fedcl.runs.export import export

PRETRAINING = (
    "experiment=pretrained_vit", "data=fashion_mnist", "data.source.train_limit=4000", "data/partition=iid",
    "scenario=joint", "scenario.num_tasks=1", "num_clients=1", "rounds_per_task=3", "checkpoint.every=3",
)  # fmt: skip
NMC = ("learner=nmc", "learner.nmc.train=none")
JANSON = (*NMC, "learner.nmc.distance=unit_euclidean", "model.head=unit")
JOINT = ("scenario=joint", "scenario.num_tasks=1", "rounds_per_task=10")


def pretrained(seed: int, work: Path) -> tuple[str, ...]:
    """Train the ViT on Fashion-MNIST unless that has been done, and return the setting that starts from it."""
    file = work / f"fashion-{seed}.safetensors"
    if not file.is_file():
        folder = work / f"fashion-{seed}"
        run_row([*PRETRAINING, f"seed={seed}"], folder)
        export(folder, out=file)
    return (f"model.pretrained={json.dumps(str(file))}",)


def l2(weight: float, scope: str) -> Row:
    """Return a row of L2; ``scope`` as in the configuration, null for all."""
    name = {"null": "all tensors", "attn": "attention"}[scope]
    value = scope if scope == "null" else json.dumps(scope)
    return Row(f"l2 {weight:g}, {name}", ("learner=l2", f"learner.l2.weight={weight}", f"learner.l2.scope={value}"))


LEARNERS = (
    Row("finetune", ("learner=finetune",)),
    *(l2(1.0, scope) for scope in ("null", "attn")),
    Row("er, 40 samples a client", ("learner=er", "learner.er.budget=40")),
    Row("joint", JOINT),
)
CLOSED = (
    Row("nmc, cosine", NMC),
    Row("nmc, euclidean", (*NMC, "learner.nmc.distance=euclidean")),
    Row("nmc, Janson", JANSON),
    Row("ranpac", ("learner=ranpac", "learner.ranpac.train=none")),
)
COLUMNS = (
    Column("accuracy", "accuracy/average"),
    Column("forgetting", "forgetting/chaudhry"),
    Column("just learned", "accuracy/learning"),
)
BENCH = Bench(
    "pretrained_vit",
    Path(__file__).resolve().parent,
    (
        Table("task", "A head for each task, trained", ("scenario=task_incremental",), LEARNERS[:-1], COLUMNS),
        Table("class", "One head", (), (*LEARNERS[:1], *CLOSED, *LEARNERS[-1:]), COLUMNS),
    ),
    prepare=pretrained,
)

if __name__ == "__main__":
    main(BENCH, __doc__)
