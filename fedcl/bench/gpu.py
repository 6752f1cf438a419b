"""What a GPU makes of the local engines: one after the other, stacked, and how many workers share it best."""

from __future__ import annotations

import os
from contextlib import ExitStack

import torch

from fedcl.bench.federation import Federation, federation
from fedcl.bench.processes import tree_seconds
from fedcl.bench.result import Result, Row
from fedcl.bench.turns import Side, ratio, take_turns
from fedcl.bench.workload import Workload, known
from fedcl.simulation.cluster import local_ray

ENGINES, SHARERS = ("loop", "stack", "auto"), (2, 4)
REPETITIONS = 5


def gpu(model: str = "mlp", repetitions: int = REPETITIONS) -> Result:
    """Run the same rounds on one CUDA device with every engine, inline, and with several workers sharing the device.

    Returns
    -------
    Result
        One row a way, times on the wall; ``ratio`` is how many times faster ``engine=auto`` is than one client after
        the other. Skipped where there is no CUDA device.
    """
    known(model)
    if not torch.cuda.is_available():
        return Result.skipped("gpu", "no GPU")
    workload = Workload(model)
    with ExitStack() as stack:
        sides = []
        for engine in ENGINES:
            run = stack.enter_context(federation(workload, "backend=inline", "device=cuda", f"engine={engine}"))
            sides.append(_side(run, f"inline, engine={engine}"))
        stack.enter_context(local_ray(sum(SHARERS), gpus=1))
        for count in SHARERS:
            share = f"backend.gpus_per_worker={1 / len(SHARERS) / count}"
            settings = ("backend=ray", f"backend.workers={count}", share, "device=cuda", "engine=auto")
            run = stack.enter_context(federation(workload, *settings))
            sides.append(_side(run, f"{count} workers, engine=auto"))
        take_turns(sides, workload.rounds, repetitions)
    clients = workload.rounds * len(workload.sizes)
    rows: list[Row] = [
        {
            "model": model,
            "device": torch.cuda.get_device_name(),
            "way": side.name,
            "clients a second": f"{clients / side.median('wall'):.0f}",
            "clients a CPU second": f"{clients / side.median('cpu'):.0f}",
            "times": f"{ratio(sides[0], side, 'wall'):.2f}",
        }
        for side in sides
    ]
    figures = {side.name: ratio(sides[0], side, "wall") for side in sides[1:]}
    auto = figures["inline, engine=auto"]
    return Result("gpu", auto, auto >= 1.0, rows, figures)


def _side(run: Federation, name: str) -> Side:
    me = os.getpid()

    def run_rounds(rounds: int) -> None:
        run.run(rounds)
        torch.cuda.synchronize()

    return Side(name, run_rounds, lambda: tree_seconds(me))
