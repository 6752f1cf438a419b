"""Accuracy of a client's model, also within local training: the stability gap shows between two rounds."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from torch import Tensor

from fedcl.client.local_data import PartitionedData
from fedcl.client.loop import owner
from fedcl.contracts.learner import Context, Phase, Plugin, TaskData
from fedcl.evaluation.predictions import masked, score
from fedcl.scenario.task import Task

_KEY = re.compile(r"accuracy@(\d+)@(\d+)")
MAX_SAMPLES = 1000  # of each task, as De Lange et al. (ICLR 2023) test on, but the same ones each time


def iteration(metric: str) -> tuple[int, int] | None:
    """Return (task, step) of a metric that a `LocalEvaluation` reported; None for any other."""
    match = _KEY.fullmatch(metric)
    return (int(match[1]), int(match[2])) if match else None


def accuracy(ctx: Context, plugins: Sequence[Plugin], data: TaskData, mask: Tensor | None) -> float:
    """Return the share of samples whose highest column, of those that ``mask`` (C,) allows, is their target."""
    predictor = owner(plugins, "predict")
    ctx.model.eval()

    def logits_of(x: Tensor) -> Tensor:
        return masked(ctx.model(x).logits if predictor is None else predictor.predict(ctx, x), mask)

    return int(score(logits_of, data.x, data.y)[0].sum()) / len(data)


class LocalEvaluation(Plugin):
    """Evaluate the client's model every few steps, on its own test samples of every task it has seen.

    Step 0 is the received model, the last step the model sent back. Training is not affected: nothing is drawn, and no
    weight or statistic changes.

    Parameters
    ----------
    every
        Optimizer steps between two evaluations.
    tasks
        The seen tasks, as they are tested.
    data
        Holds the client's test samples.
    plugins
        The learner, of which one plugin may predict.
    """

    phase = Phase.BOOKKEEPING

    def __init__(self, *, every: int, tasks: Sequence[Task], data: PartitionedData, plugins: Sequence[Plugin]) -> None:
        self.every = every
        self.tasks, self.data = tasks, data
        self.metrics: dict[str, float] = {}
        self._plugins = plugins

    def before_round(self, ctx: Context) -> None:
        """Evaluate the received model."""
        self._test(ctx)

    def after_step(self, ctx: Context) -> None:
        """Evaluate after every ``every`` steps."""
        if ctx.step % self.every == 0:
            self._test(ctx)

    def after_round(self, ctx: Context) -> dict[str, Tensor]:
        """Evaluate the model that is sent back."""
        self._test(ctx)
        return {}

    def _test(self, ctx: Context) -> None:
        training = ctx.model.module.training
        for task in self.tasks:
            test = self.data.test(ctx.client, task, ctx.device)
            if len(test):
                first = TaskData(test.x[:MAX_SAMPLES], test.y[:MAX_SAMPLES])
                mask = ctx.columns_mask(task.mask)
                self.metrics[f"accuracy@{task.id}@{ctx.step}"] = accuracy(ctx, self._plugins, first, mask)
        if training:
            ctx.model.train()


LocalEvaluationOf = Callable[[str, int, Sequence[Plugin]], LocalEvaluation]
