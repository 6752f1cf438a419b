"""Every learner on the built-in digits, class-incremental: at one client, and at five under FedAvg and under FOT.

    OMP_NUM_THREADS=1 python -m benchmarks.learners_digits.run

Writes results.json and the tables of README.md beside this file. Exit status 1 if one of MARKS is missed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import mean

from benchmarks.every_learner import Bench, Part, Results, Row, main

CENTRAL = ("num_clients=1", "rounds_per_task=1", "client.epochs=20")
FEDERATED = ("fedavg",)
MAS = ("learner.mas.weight=0.01",)  # 0.1 diverges at one client
BENCH = Bench(
    "learners_digits",
    Path(__file__).resolve().parent,
    (
        Part("central", "One client", (*CENTRAL, "strategy/projection=none"), traffic=False),
        Part("fedavg", "Five clients, FedAvg", ("strategy/projection=none",)),
        Part("fot", "Five clients, FOT", ("strategy/projection=fot",)),
    ),
    budget={"central": 200, "fedavg": 40, "fot": 40},
    extra=(
        Row("er + refresh", ("learner=[er,refresh]",)),
        Row("mas summed over clients", ("learner=mas", "learner.mas.aggregate=true", *MAS), FEDERATED),
        Row("si summed over clients", ("learner=si", "learner.si.aggregate=true"), FEDERATED),
        Row("LiNeS at the server", ("learner=finetune", "strategy/projection=lines"), FEDERATED),
        Row("TARGET", ("learner=finetune", "strategy/projection=target"), FEDERATED),
    ),
    tuned={
        "mas": MAS,
        "view_batch": ("learner.view_batch.shift=1",),  # of 8 pixels; the default is for larger images
    },
)
MARKS = {"er": (0.90, 1.0), "finetune": (0.0, 0.25), "ewc": (0.0, 0.25), "lwf": (0.0, 0.25)}  # accuracy, one client


def marks(results: Results) -> list[str]:
    """Return in words which marks are met and which are missed."""
    lines = []
    for name, (least, most) in MARKS.items():
        runs = results.get("central", {}).get(name, {}).get("runs", {}).values()
        if runs:
            accuracy = mean(one["accuracy"] for one in runs)
            met = "met" if least <= accuracy <= most else "MISSED"
            lines.append(f"{met}: one client, {name}: {accuracy:.3f} in [{least}, {most}]")
    return lines


if __name__ == "__main__":
    lines = marks(main(BENCH, __doc__))
    print("\n".join(lines))
    sys.exit(any(line.startswith("MISSED") for line in lines))
