"""Accuracy while a client trains: the stability gap shows between two rounds, not at their ends."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedcl.client.local_data import LocalData
from fedcl.client.loop import owner
from fedcl.contracts.learner import Context, Phase, Plugin, TaskData
from fedcl.evaluation.predictions import correct
from fedcl.scenario.task import Task

_KEY = re.compile(r"accuracy@(\d+)@(\d+)")
MAX_SAMPLES = 1000  # of each task, as De Lange et al. (ICLR 2023) test on, but the same ones each time


def iteration(metric: str) -> tuple[int, int] | None:
    """Return (task, step) of a metric that a `LocalEvaluation` reported; None for any other."""
    match = _KEY.fullmatch(metric)
    return (int(match[1]), int(match[2])) if match else None


class LocalEvaluation(Plugin):
    """Test the client's model on its own test samples of every task it has met, each ``every`` steps.

    Step 0 is the received model, the last one what is sent back. Training is what it would be without: nothing is
    drawn, and no weight or statistic is touched.

    Parameters
    ----------
    every
        Optimizer steps between two tests.
    tasks
        The tasks met, as they are tested.
    data
        Where the client's test samples are.
    plugins
        The learner, one of which may predict.
    """

    phase = Phase.BOOKKEEPING

    def __init__(self, *, every: int, tasks: Sequence[Task], data: LocalData, plugins: Sequence[Plugin]) -> None:
        self.every = every
        self.tasks, self.data = tasks, data
        self.metrics: dict[str, float] = {}
        self._predictor = owner(plugins, "predict")

    def before_round(self, ctx: Context) -> None:
        """Test what was received."""
        self._test(ctx)

    def after_step(self, ctx: Context) -> None:
        """Test where one is due."""
        if ctx.step % self.every == 0:
            self._test(ctx)

    def after_round(self, ctx: Context) -> dict[str, Tensor]:
        """Test what is sent back."""
        self._test(ctx)
        return {}

    def _test(self, ctx: Context) -> None:
        training = ctx.model.module.training
        ctx.model.eval()
        for task in self.tasks:
            held = self.data.test(ctx.client, task, ctx.device)
            if len(held):
                self.metrics[f"accuracy@{task.id}@{ctx.step}"] = self._accuracy(ctx, task, held)
        ctx.model.module.train(training)

    @torch.no_grad()
    def _accuracy(self, ctx: Context, task: Task, held: TaskData) -> float:
        x, y = held.x[:MAX_SAMPLES], held.y[:MAX_SAMPLES]
        logits = ctx.model(x).logits if self._predictor is None else self._predictor.predict(ctx, x)
        mask = ctx.columns_mask(task.mask)
        if mask is not None:
            logits = logits.masked_fill(~mask, float("-inf"))
        return float(correct(logits, y).double().mean())


LocalEvaluationOf = Callable[[str, int, Sequence[Plugin]], LocalEvaluation]
