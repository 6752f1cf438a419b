"""Every learner on twenty classes of CIFAR-100, task-incremental, five clients, under FedAvg and under FOT.

    FEDCL_DATA=<folder with cifar100_subset.npz> OMP_NUM_THREADS=1 python -m benchmarks.learners_cifar100.run

Writes results.json and the tables of README.md beside this file.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.every_learner import Bench, Part, Row, main
from fedcl.config.compose import compose
from fedcl.data.assembly import resolve

FEDERATED = ("fedavg",)
MAS = ("learner.mas.weight=0.01",)  # as on the digits
FILE = Path("runs") / "learners_cifar100" / "twenty_classes.npz"


def twenty_classes(file: Path) -> None:
    """Write the alphabetically first class of each superclass, all its samples, as an archive of its own."""
    data = compose(["experiment=learners_cifar100"])["data"]
    with np.load(resolve(data["root"]), allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    chosen = sorted(min(names) for names in data["source"]["superclasses"].values())
    label_of = {list(arrays["classes"]).index(name): k for k, name in enumerate(chosen)}
    arrays["classes"] = np.array(chosen)
    for half in ("train", "test"):
        taken = np.isin(arrays[f"y_{half}"], list(label_of))
        arrays[f"x_{half}"] = arrays[f"x_{half}"][taken]
        arrays[f"y_{half}"] = np.array([label_of[int(y)] for y in arrays[f"y_{half}"][taken]])
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(file, **{name: arrays[name] for name in ("x_train", "y_train", "x_test", "y_test", "classes")})


DATA = (f"data.root={FILE.resolve()}", "data.source.superclasses=null")
BENCH = Bench(
    "learners_cifar100",
    Path(__file__).resolve().parent,
    (
        Part("fedavg", "FedAvg", (*DATA, "strategy/projection=none")),
        Part("fot", "FOT", (*DATA, "strategy/projection=fot")),
    ),
    budget={"fedavg": 40, "fot": 40},
    extra=(
        Row("er + refresh", ("learner=[er,refresh]",)),
        Row("mas summed over clients", ("learner=mas", "learner.mas.aggregate=true", *MAS), FEDERATED),
        Row("si summed over clients", ("learner=si", "learner.si.aggregate=true"), FEDERATED),
        Row("LiNeS at the server", ("learner=finetune", "strategy/projection=lines"), FEDERATED),
        Row("TARGET", ("learner=finetune", "strategy/projection=target"), FEDERATED),
    ),
    tuned={"mas": MAS},
)


if __name__ == "__main__":
    twenty_classes(FILE)
    main(BENCH, __doc__)
