"""The share of the hardware's speed that the local engines reach, everything of a round counted in."""

from __future__ import annotations

import copy
import statistics
import time
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedcl.bench.bare import step, weights_of
from fedcl.bench.federation import Federation, federation
from fedcl.bench.flower import distance
from fedcl.bench.overhead import Loop
from fedcl.bench.result import Result, Row
from fedcl.bench.turns import Side, take_turns
from fedcl.bench.workload import LR, Workload, known
from fedcl.config.compose import compose
from fedcl.config.value_rules import ConfigError

MARKS = {"mlp": 0.50, "lenet": 0.65}
BATCHES = (20, 128, 500, 2000)
CHOICES = ("loop", "fused", "stack", "auto")
CLIENTS, REPETITIONS = {"resnet8": 10}, {"resnet8": 3}  # where 50 clients, five times, take too long
TOLERANCE = 5e-4


class Limit:
    """As many samples as a round has, through one network in batches of ``size``: no client, no load, no fold."""

    def __init__(self, workload: Workload, size: int, *, channels_last: bool) -> None:
        data = workload.dataset().train
        self.net = workload.network()
        self.x, self.y = torch.from_numpy(data.x[:size]), torch.from_numpy(data.y[:size])
        if channels_last:
            self.net, self.x = _channels_last(self.net, self.x)
        self.weights = weights_of(self.net)
        self.samples = sum(workload.sizes) * workload.epochs
        self.kept = [w.detach().clone() for w in self.weights]

    def run(self, rounds: int) -> None:
        """Take the steps of ``rounds`` rounds."""
        for _ in range(max(1, round(rounds * self.samples / len(self.y)))):
            step(self.weights, cross_entropy(self.net(self.x), self.y), LR)
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.kept)  # the same samples for ever would end in zero gradients


def _channels_last(net: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    for weight in net.parameters():
        if weight.ndim == 4:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    return net, x.contiguous(memory_format=torch.channels_last)


class Copies(Loop):
    """Rounds as most code is written: a copy of the model and an optimizer for each client."""

    def train(self, net: nn.Module, x: Tensor, y: Tensor, client: str) -> None:
        """Train a copy, and leave its weights in ``net``."""
        own = copy.deepcopy(net)
        optimizer = torch.optim.SGD(own.parameters(), lr=LR)
        for part_x, part_y in self.batches(x, y, client):
            optimizer.zero_grad()
            torch.autograd.backward(cross_entropy(own(part_x), part_y))
            optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self.weights, weights_of(own))


def engine(model: str = "mlp", repetitions: int | None = None) -> Result:
    """Let every engine that the configuration knows run the same rounds, inline, in turn with loops and the limit.

    The limit is one network that trains on as many samples, at the best of several batch sizes and memory formats.

    Returns
    -------
    Result
        One row a way: clients a processor second, share of the limit, and how far the final model is from the bare
        loop's. ``ratio`` is the share that ``engine=auto`` reaches; passed if it reaches the model's mark, ``auto`` is
        never much slower than the best choice, and all models agree.
    """
    count = CLIENTS.get(known(model), 50)
    workload = Workload(model, (200,) * count)
    with ExitStack() as stack:
        limits = [Side(f"limit, batches of {size}{form}", limit.run, time.process_time)
                  for size, form, limit in _limits(workload)]  # fmt: skip
        bare = Loop(workload)
        loops = [
            Side("deep copies", Copies(workload).run, time.process_time),
            Side("bare loop", bare.run, time.process_time),
        ]
        runs: dict[str, Federation] = {}
        for choice in CHOICES:
            run = _open(stack, workload, choice)
            if run is not None:
                runs[choice] = run
        own = [run.side(f"fedcl, engine={choice}", time.process_time) for choice, run in runs.items()]
        take_turns([*limits, *loops, *own], workload.rounds, repetitions or REPETITIONS.get(model, 5), warm_up=1)
        apart = {f"fedcl, engine={choice}": distance(run.weights(), bare.flat()) for choice, run in runs.items()}
    return _result(workload, limits, [*loops, *own], apart)


def _open(stack: ExitStack, workload: Workload, choice: str) -> Federation | None:
    """Return a run with ``engine=choice``, None where the configuration refuses it for this model."""
    try:
        compose([f"engine={choice}"])
        return stack.enter_context(federation(workload, "backend=inline", f"engine={choice}"))
    except ConfigError as error:
        if choice == "auto":
            raise
        print(f"engine={choice}: left out, {error}", flush=True)
        return None


def _limits(workload: Workload) -> list[tuple[int, str, Limit]]:
    images = len(workload.dataset().input_shape) == 3
    sizes = [size for size in BATCHES if size <= (500 if workload.model == "resnet8" else 2000)]
    found = [(size, "", Limit(workload, size, channels_last=False)) for size in sizes]
    if images:
        found += [(size, ", channels last", Limit(workload, size, channels_last=True)) for size in sizes[:2]]
    return found


def _result(workload: Workload, limits: list[Side], others: list[Side], apart: dict[str, float]) -> Result:
    clients = workload.rounds * len(workload.sizes)
    best = [min(side.turns[k].cpu for side in limits) for k in range(len(limits[0].turns))]

    def share(side: Side) -> float:
        return statistics.median(fast / turn.cpu for fast, turn in zip(best, side.turns, strict=True))

    rows: list[Row] = [
        {
            "model": workload.model,
            "way": side.name,
            "clients a CPU second": f"{clients / side.median('cpu'):.0f}",
            "share of the limit": f"{share(side):.2f}",
            "from the bare loop's model": f"{apart[side.name]:.0e}" if side.name in apart else "",
        }
        for side in [*limits, *others]
    ]
    figures = {side.name.rpartition("=")[2].replace(" ", "_"): share(side) for side in others}
    engines = [figures[name.rpartition("=")[2]] for name in apart]
    mark, auto = MARKS.get(workload.model, 0.0), figures["auto"]
    same = max(apart.values()) <= TOLERANCE
    notes = (
        f"mark: {mark:g} of the limit{'' if mark else ' (none for this model)'}; engine=auto reaches {auto:.2f}, "
        f"{auto / max(engines):.2f} of the best choice; models {'agree' if same else 'DIFFER'}",
    )
    return Result("engine", auto, auto >= mark and auto >= 0.9 * max(engines) and same, rows, figures, notes)
