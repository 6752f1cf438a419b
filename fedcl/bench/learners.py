"""What a learner's step costs, beside a bare loop over tensors that does the same mathematics."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from fedcl.assembly import learner_factories, load_dataset
from fedcl.base.tree import clone
from fedcl.bench import bare
from fedcl.bench.result import Cell, Result
from fedcl.client.local_data import PartitionedData
from fedcl.client.loop import fit, ordered
from fedcl.config.compose import compose
from fedcl.contracts.learner import Context, LocalTraining, Plugin, State
from fedcl.data.dataset import ArrayDataset, Dataset, Partition
from fedcl.models.flat import FlatModel
from fedcl.models.networks import MLP, build_model
from fedcl.scenario.task import Task

# The size at which Avalanche's loop was timed: digits, an MLP 64-100-10, ten samples a step.
HIDDEN, BATCH, EPOCHS, LR = 100, 10, 2, 0.05
TASKS = [Task(k, classes, classes) for k, classes in enumerate([(0, 1, 2, 3, 4), (5, 6, 7, 8, 9)])]
REPETITIONS, WARM_UP = 15, 1
BOUND, TOLERANCE = 1.15, 1e-5

LEARNERS: Mapping[str, tuple[list[str], bare.Loop]] = {
    "naive": (["learner=finetune"], bare.naive),
    "ewc": (["learner=ewc"], bare.ewc),
    "si": (["learner=si"], bare.si),
    "mas": (["learner=mas"], bare.mas),
    "lwf": (["learner=lwf"], bare.lwf),
    "er": (["learner=er"], bare.er),
    "derpp": (["learner=derpp"], bare.derpp),
}


@dataclass
class Bench:
    """One learner at the start of its second task, as often as it is asked for."""

    model: FlatModel
    data: PartitionedData
    build: Callable[[], list[Plugin]]
    training: LocalTraining = field(default_factory=lambda: LocalTraining(EPOCHS, BATCH, LR))
    start: Tensor | None = None
    states: list[State] = field(default_factory=list)

    def learn_first_task(self) -> None:
        """Train task 0, so that every term of the learner is at work in task 1."""
        plugins, ctx = self.visit(0)
        fit(ctx, plugins, self.training)
        for plugin in plugins:
            plugin.after_task(ctx)
        self.start, self.states = self.model.vector(), [plugin.state() for plugin in plugins]

    def visit(self, task: int) -> tuple[list[Plugin], Context]:
        """Return plugins and context of a visit, ready for its first step."""
        plugins = self.build()
        if self.start is not None:
            self.model.load(self.start)
        ctx = Context(
            model=self.model, task=TASKS[task], data=self.data.train("0", TASKS[task], self.model.device),
            received=self.model.vector(), epochs=EPOCHS, batch_size=BATCH, lr=LR, seed=0, client="0", local_round=task,
            is_new_task=True, task_columns={t.id: t.columns for t in TASKS[: task + 1]}, num_columns=10,
        )  # fmt: skip
        for plugin, state in zip(plugins, self.states or [{}] * len(plugins), strict=True):
            plugin.load(clone(state))
            plugin.setup(ctx)
        for plugin in plugins:
            plugin.before_task(ctx)
            plugin.before_round(ctx)
        return plugins, ctx

    def ours(self) -> tuple[float, Tensor]:
        """Return the CPU seconds a step of the learner's loop takes, and the weights it ends with."""
        plugins, ctx = self.visit(1)
        started = time.process_time()
        fit(ctx, plugins, self.training)
        return (time.process_time() - started) / ctx.step, self.model.vector()

    def theirs(self, loop: bare.Loop) -> tuple[float, Tensor]:
        """Return the same of a bare loop."""
        assert self.start is not None
        _, ctx = self.visit(1)
        net = nn.Sequential(nn.Linear(64, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10))
        with torch.no_grad():
            for weight, parameter in zip(net.parameters(), self.model.trainable, strict=True):
                weight.copy_(parameter)
        work = bare.Work(
            ctx.data.x.flatten(1), ctx.data.y, EPOCHS, BATCH, LR, clone(self.states[0] if self.states else {}),
            [spec.start for spec in self.model.parameter_specs], ctx.rng("batches"), ctx.rng("replay"),
            ctx.rng("reservoir"),
        )  # fmt: skip
        started = time.process_time()
        steps = loop(net, work)
        return (time.process_time() - started) / steps, torch.cat([w.detach().flatten() for w in net.parameters()])


def learners() -> Result:
    """Time each learner's loop against a bare one, in turn, on one thread.

    Returns
    -------
    Result
        One row a learner: medians of CPU time a step, their ratio, and how far the two loops' weights are apart after
        all steps. ``ratio`` is the largest; passed if it is at most ``BOUND`` and the weights agree to ``TOLERANCE``.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        measured = {name: measure(overrides, loop) for name, (overrides, loop) in LEARNERS.items()}
    finally:
        torch.set_num_threads(threads)
    worst = max(ratio for _, ratio, _ in measured.values())
    apart = max(distance for _, _, distance in measured.values())
    return Result("learners", worst, worst <= BOUND and apart <= TOLERANCE, [row for row, _, _ in measured.values()])


def measure(
    overrides: list[str], loop: bare.Loop, repetitions: int = REPETITIONS
) -> tuple[dict[str, Cell], float, float]:
    """Return a learner's row, the ratio, and the largest difference of a weight."""
    bench = prepared(overrides)
    ours, theirs, apart = [], [], 0.0
    for repetition in range(repetitions + WARM_UP):
        gc.collect()
        mine, other = bench.ours(), bench.theirs(loop)
        apart = max(apart, float((mine[1][: len(other[1])] - other[1]).abs().max()))
        if repetition >= WARM_UP:
            ours.append(mine[0])
            theirs.append(other[0])
    ratio = statistics.median(ours) / statistics.median(theirs)
    row: dict[str, Cell] = {
        "learner": overrides[0].removeprefix("learner="),
        "fedcl, us a step": 1e6 * statistics.median(ours),
        "bare, us a step": 1e6 * statistics.median(theirs),
        "ratio": f"{ratio:.2f}",
        "largest difference of a weight": f"{apart:.1e}",
    }
    return row, ratio, apart


def prepared(overrides: list[str]) -> Bench:
    """Return the bench of the learner that ``overrides`` choose."""
    cfg = compose([*overrides, "strategy/projection=none", "strategy/collaboration=fedavg", "compare_with=null"])
    digits = load_dataset(cfg)
    everything = Partition((np.arange(len(digits.train)),), (np.arange(len(digits.test)),))
    module = build_model(lambda: MLP(input_shape=digits.input_shape, heads=(10,), hidden=(HIDDEN,)), seed=0)
    factories = learner_factories(cfg)
    bench = Bench(
        FlatModel(module),
        PartitionedData(as_bytes(digits), everything, ("0",)),
        lambda: ordered([build() for build in factories.values()]),
    )
    bench.learn_first_task()
    return bench


def as_bytes(dataset: Dataset) -> Dataset:
    """Return the digits, whose values are whole numbers to 16, as images are stored, so that replay restores them."""
    train = ArrayDataset(dataset.train.x.astype(np.uint8), dataset.train.y)
    return replace(dataset, train=train)
