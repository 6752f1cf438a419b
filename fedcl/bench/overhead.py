"""What fedcl's engine costs a client beyond its optimizer steps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedcl.base.randomness import torch_generator
from fedcl.bench.bare import step, weights_of
from fedcl.bench.federation import federation, own_seconds
from fedcl.bench.result import Result, Row
from fedcl.bench.turns import Side, take_turns
from fedcl.bench.workload import LR, SEED, Workload, known
from fedcl.simulation.cluster import local_ray

MARKS = {"inline": 150.0, "ray": 400.0}  # microseconds
REPETITIONS = 9
WORKERS = 2


class Loop:
    """Rounds as a bare loop over tensors: load, shuffle, steps, add up; nothing that a single network does not need."""

    def __init__(self, workload: Workload) -> None:
        data, parts = workload.dataset().train, workload.partition().train
        self.x = [torch.from_numpy(data.x[part]) for part in parts]
        self.y = [torch.from_numpy(data.y[part]) for part in parts]
        self.workload, self.net = workload, workload.network()
        self.weights = weights_of(self.net)
        self.model = [w.detach().clone() for w in self.weights]
        self.round = 0

    def run(self, rounds: int) -> None:
        """Run ``rounds`` more rounds of FedAvg."""
        for _ in range(rounds):
            total = [torch.zeros_like(w) for w in self.model]
            for client, x, y in zip(self.workload.clients, self.x, self.y, strict=True):
                with torch.no_grad():
                    torch._foreach_copy_(self.weights, self.model)
                self.train(self.net, x, y, client)
                with torch.no_grad():
                    torch._foreach_add_(total, self.weights, alpha=len(y) / sum(self.workload.sizes))
            self.model = total
            self.round += 1

    def train(self, net: nn.Module, x: Tensor, y: Tensor, client: str) -> None:
        """Take the client's steps."""
        for part_x, part_y in self.batches(x, y, client):
            step(self.weights, cross_entropy(net(part_x), part_y), LR)

    def batches(self, x: Tensor, y: Tensor, client: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the client's batches in the order in which fedcl shows them."""
        generator, size = torch_generator(SEED, client, self.round, "batches"), self.workload.batch_size
        for _ in range(self.workload.epochs):
            chosen = torch.randperm(len(y), generator=generator)
            yield from zip(torch.split(x[chosen], size), torch.split(y[chosen], size), strict=True)

    def flat(self) -> Tensor:
        """Return the global model (P,)."""
        return torch.cat([w.flatten() for w in self.model])


def overhead(model: str = "mlp", repetitions: int = REPETITIONS) -> Result:
    """Time clients' visits with all their steps, with twice as many, and a bare loop that takes the same steps.

    Returns
    -------
    Result
        One row a backend: microseconds of processor time a client, and of them those that do not grow with the steps,
        which are the overhead; a bare loop's time beside them, which stacked clients may stay below. ``ratio`` is the
        smaller of mark over overhead of the backends; at least one: reached.
    """
    workload = Workload(known(model))
    twice = replace(workload, epochs=2)
    # the clock of the process is finer than that of the tree, and all there is without workers
    clocks = {"inline": time.process_time, "ray": own_seconds}
    with ExitStack() as stack:
        stack.enter_context(local_ray(2 * WORKERS))
        sides = [Side("bare loop", Loop(workload).run, time.process_time)]
        for backend, clock in clocks.items():
            for work in (workload, twice):
                settings = [f"backend={backend}", *([f"backend.workers={WORKERS}"] if backend == "ray" else [])]
                federated = stack.enter_context(federation(work, *settings))
                sides.append(federated.side(f"{backend}, {work.epochs} epochs", clock))
        take_turns(sides, workload.rounds, repetitions)
    return _result(model, workload, sides)


def _result(model: str, workload: Workload, sides: list[Side]) -> Result:
    clients = len(workload.sizes) * workload.rounds
    micros = {side.name: [1e6 * turn.cpu / clients for turn in side.turns] for side in sides}
    bare = micros["bare loop"]
    rows: list[Row] = []
    figures = {}
    for backend, mark in MARKS.items():
        once, double = micros[f"{backend}, 1 epochs"], micros[f"{backend}, 2 epochs"]
        beyond = statistics.median(own - steps for own, steps in zip(once, bare, strict=True))
        constant = statistics.median(2 * a - b for a, b in zip(once, double, strict=True))
        figures[f"{backend}_us"], figures[f"{backend}_constant_us"] = beyond, constant
        rows.append(
            {
                "model": model,
                "backend": backend if backend == "inline" else f"{backend}, {WORKERS} workers",
                "us a client": f"{statistics.median(once):.0f}",
                "bare loop, us": f"{statistics.median(bare):.0f}",
                "beyond the bare loop, us": f"{beyond:.0f}",
                "not growing with steps, us": f"{constant:.0f}",
                "mark, us": f"<= {mark:.0f}",
                "reached": constant <= mark,
            }
        )
    worst = min(mark / max(figures[f"{backend}_constant_us"], 1e-9) for backend, mark in MARKS.items())
    return Result("overhead", worst, worst >= 1, rows, figures)
