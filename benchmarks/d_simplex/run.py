"""d-Simplex: a classifier that is fixed beforehand against trained ones, under skewed labels and over tasks.

    FEDCL_DATA=<folder with mnist/> OMP_NUM_THREADS=1 python -m benchmarks.d_simplex.run

Writes results.json and the tables of README.md beside this file; see there for the setting and the reading.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from benchmarks.every_learner import Numbers, Row
from benchmarks.rows import Bench, Column, Table, main
from fedcl.assembly import make_model
from fedcl.contracts.strategy import GLOBAL
from fedcl.results.checkpoint import Checkpoints
from fedcl.results.run import load
from fedcl.runs.setup import Setup

HEADS = (
    Row("linear", ("model.head=linear",)),
    Row("cosine", ("model.head=cosine",)),
    Row("simplex", ("model.head=simplex",)),
)
STREAM = (
    "scenario=class_incremental", "data/partition=iid", "num_clients=5", "rounds_per_task=4", "checkpoint.every=4",
    "checkpoint.min_seconds=0", "checkpoint.keep=5",
)  # fmt: skip


def crossed(features: list[Tensor], y: Tensor) -> NDArray[np.float64]:
    """Return M (K, K), M[i, j]: how often model i's feature of a query is nearest to one of its class by model j.

    ``features`` has those of K models of the same N samples, (N, F) each: the first half is the gallery, the second the
    queries. Nearest by the cosine.
    """
    half = len(y) // 2
    unit = [functional.normalize(one, dim=1) for one in features]
    return np.array(
        [[float((y[:half][(q[half:] @ g[:half].T).argmax(1)] == y[half:]).float().mean()) for g in unit] for q in unit]
    )


def compatibility(folder: Path) -> Numbers:
    """Return how well later models' features find their class among earlier ones', from a checkpoint a task.

    ``cross`` is the mean of M[i, j] over i > j, ``own`` that of M[i, i]; ``compatible`` is the share of pairs i > j
    with M[i, j] >= M[j, j], which is what a gallery needs that is not computed again. Nothing for a run of one task.
    """
    cfg = load(folder).config
    states = [state["server"]["models"][GLOBAL] for state, _ in Checkpoints(folder).every()][::-1]
    if len(states) < 2:
        return {}
    setup = Setup.of(cfg)
    model = make_model(cfg, setup.dataset, setup.stream, torch.device("cpu"))
    half = setup.dataset.test
    x, features = torch.from_numpy(setup.dataset.normalise(half.x)), []
    for vector in states:
        model.load(vector)
        model.eval()
        with torch.no_grad():
            features.append(model(x).features)
    m = crossed(features, torch.from_numpy(half.y))
    below = np.tril_indices(len(m), -1)
    return {
        "cross": float(m[below].mean()),
        "own": float(np.diag(m).mean()),
        "compatible": float((m[below] >= np.diag(m)[below[1]]).mean()),
    }


ACCURACY = Column("accuracy", "accuracy/average")
COLUMNS = (
    ACCURACY,
    Column("forgetting", "forgetting/chaudhry"),
    Column("own features", "own"),
    Column("across models", "cross"),
    Column("compatible pairs", "compatible"),
)
ER = ("learner=er", "learner.er.budget=40")
BENCH = Bench(
    "d_simplex",
    Path(__file__).resolve().parent,
    (
        Table("skewed", "One task, two classes a client", (), HEADS, (ACCURACY,)),
        Table("finetune", "Five tasks of two classes, fine-tuning", STREAM, HEADS, COLUMNS),
        Table("er", "Five tasks of two classes, ER with 40 samples a client", (*STREAM, *ER), HEADS, COLUMNS),
    ),
    measure=compatibility,
)

if __name__ == "__main__":
    main(BENCH, __doc__)
