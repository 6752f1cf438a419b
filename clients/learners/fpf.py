"""FPF and k-FPF: fine-tune the few sensitive modules on a small balanced memory.

Zhao et al., "Does Continual Learning Equally Forget All Parameters?", ICML 2023 (arXiv 2304.04158). Modules differ in
how much a change of task moves them, ``s_m = 1/|theta_m| sum_i |theta'_i - theta_i|``; forgetting is mended by training
only those that move most. FPF does so after training with any other method; k-FPF trains without replay and does so k
times on the way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from clients.learners.replay import masks_by_task
from clients.strategies.local_sgd import descend
from fedcl.client.buffer import ReplayBuffer, Replayed
from fedcl.client.erasing import erase
from fedcl.client.scope import check_scope, in_scope
from fedcl.contracts.learner import Batch, Context, Phase, Plugin, State, TaskData
from fedcl.contracts.requests import ErasureOutcome, ForgetRequest
from fedcl.models.flat import FlatModel, Spec, TensorSpec

# P = length of the flat vector, M = samples in memory, B = batch, T = tasks, C = logit columns


class FPF(Plugin):
    """At the end of a local round, train only the sensitive modules, on a class-balanced memory.

    Parameters
    ----------
    budget
        Samples of the class-balanced memory, or bytes as in ``64KB``; 0 turns the method off.
    steps
        Steps of plain SGD of one fine-tuning; 0 turns the method off.
    lr
        Step size; null: ``client.optimizer.lr``.
    modules
        How many modules are trained: those with the largest mean change over the client's local rounds.
    scope
        Regular expression over tensor names that chooses them instead; null: measured.

    Raises
    ------
    ValueError
        If ``scope`` is no regular expression, or (in :meth:`check`) matches no tensor of the model.
    """

    phase = Phase.BOOKKEEPING
    key: ClassVar[str] = "learner.fpf"

    def __init__(
        self, *, budget: int | str = 200, steps: int = 20, lr: float | None = None, modules: int = 2,
        scope: str | None = None,
    ) -> None:  # fmt: skip
        check_scope(scope, f"{self.key}.scope")
        self.budget = budget
        self.steps = steps
        self.lr = lr
        self.modules = modules
        self.scope = scope
        self._buffer = ReplayBuffer(budget, "class_balanced")
        self._changes: dict[str, float] = {}
        self._origin_P: Tensor | None = None

    def check(self, model: FlatModel) -> None:
        in_scope(model, self.scope, f"{self.key}.scope")

    def setup(self, ctx: Context) -> None:
        """Keep the received weights, where the local round starts."""
        self._origin_P = ctx.received.clone()

    def before_task(self, ctx: Context) -> None:
        """Offer the new task's samples to memory, in random order."""
        if self.steps:
            data, draws = ctx.data, ctx.rng("fpf.memory")
            order = torch.randperm(len(data), generator=draws).to(ctx.device)
            raw = None if data.raw is None else data.raw[order]
            self._buffer.add(
                data.x[order], data.y[order], ctx.task.id, draws, raw=raw, transform=ctx.task.transform
            )  # fmt: skip

    def after_round(self, ctx: Context) -> dict[str, Tensor]:
        """Fine-tune, and add up how far the local round's training has moved each module."""
        changes = self._totals(ctx)
        self.finetune(ctx)
        self._changes = changes
        return {}

    def finetune(self, ctx: Context) -> None:
        """Train the sensitive modules on memory; this does not count as change."""
        if not self.steps or not len(self._buffer) or self._origin_P is None:
            return
        before_P = ctx.model.vector()
        held = self._buffer.sample(len(self._buffer), ctx.rng("fpf.order"), ctx.data.restore)
        parameters = self._sensitive(ctx)
        lr = ctx.lr if self.lr is None else self.lr
        descend(ctx, balanced_batches(ctx, held, self.steps), lr=lr, parameters=parameters)
        self._origin_P += ctx.model.flat - before_P

    def _totals(self, ctx: Context) -> dict[str, float]:
        assert self._origin_P is not None
        now = mean_changes(ctx.model.spec, ctx.model.flat - self._origin_P)
        return {module: self._changes.get(module, 0.0) + change for module, change in now.items()}

    def _sensitive(self, ctx: Context) -> list[nn.Parameter]:
        model = ctx.model
        pairs = list(zip(model.trainable, model.parameter_specs, strict=True))
        chosen_P = in_scope(model, self.scope, f"{self.key}.scope")
        if chosen_P is not None:
            return [p for p, spec in pairs if bool(chosen_P[spec.start])]
        totals = self._totals(ctx)
        trained = list(dict.fromkeys(module_of(spec) for _, spec in pairs))
        names = sorted(trained, key=lambda module: -totals[module])[: self.modules]
        return [p for p, spec in pairs if module_of(spec) in names]

    def forget(self, ctx: Context, request: ForgetRequest, removed: TaskData) -> ErasureOutcome:
        """Erase the forget set from memory, and reset the modules' changes."""
        erased = erase(self._buffer, self, request, removed)
        if not self._changes:
            return erased
        self._changes = {}
        if erased.outcome == "not applicable":
            return ErasureOutcome(erased.part, "reset", "the modules' changes mixed all samples: they start over")
        return replace(erased, why=f"{erased.why}; the modules' changes start over")

    def state(self) -> State:
        """Return memory, and the sum over local rounds of each module's mean change."""
        if not self.steps or not self._buffer.enabled:
            return {}
        return {"buffer": self._buffer.state(), "changes": self._changes}

    def load(self, state: State) -> None:
        self._buffer.load(state.get("buffer", {}))
        self._changes = dict(state.get("changes", {}))


class KFPF(FPF):
    """Train plainly, and fine-tune the sensitive modules ``times`` times, evenly over ``visits`` rounds of a task.

    The other parameters are those of :class:`FPF`. With ``visits`` the number of a task's rounds, and a client that is
    in all of them, there are ``times`` fine-tunings a task, the last at its end.
    """

    key = "learner.k_fpf"

    def __init__(
        self, *, times: int = 2, visits: int = 1, budget: int | str = 200, steps: int = 20, lr: float | None = None,
        modules: int = 2, scope: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(budget=budget, steps=steps, lr=lr, modules=modules, scope=scope)
        self.times = times
        self.visits = visits
        self._done = 0

    def before_task(self, ctx: Context) -> None:
        """Offer the new task's samples to memory, and count its steps."""
        super().before_task(ctx)
        self._done = 0

    def after_step(self, ctx: Context) -> None:
        """Fine-tune when the next of the ``times`` is due."""
        total = self.visits * ctx.epochs * -(-len(ctx.data) // ctx.batch_size)
        done = self._done + ctx.step
        if done * self.times // total > (done - 1) * self.times // total:
            self.finetune(ctx)

    def after_round(self, ctx: Context) -> dict[str, Tensor]:
        """Add up how far training has moved each module, and its steps."""
        self._changes = self._totals(ctx)
        self._done += ctx.step
        return {}

    def state(self) -> State:
        state = super().state()
        return {**state, "steps": self._done} if state else {}

    def load(self, state: State) -> None:
        super().load(state)
        self._done = state.get("steps", 0)


def module_of(spec: TensorSpec) -> str:
    """Return the module that a tensor belongs to; all heads of tasks are one."""
    return "heads" if spec.task is not None else spec.name.rpartition(".")[0]


def mean_changes(spec: Spec, change_P: Tensor) -> dict[str, float]:
    """Return the mean absolute change of each module, its buffers included."""
    sums: dict[str, tuple[float, int]] = {}
    for tensor in spec:
        total, size = sums.get(module_of(tensor), (0.0, 0))
        moved = float(change_P[tensor.start : tensor.stop].abs().sum())
        sums[module_of(tensor)] = total + moved, size + tensor.size
    return {module: total / max(size, 1) for module, (total, size) in sums.items()}


def balanced_batches(ctx: Context, held: Replayed, steps: int) -> Iterator[Batch]:
    """Yield ``steps`` batches drawn with replacement from memory, every class equally likely."""
    _, classes, counts = torch.unique(held.y.cpu(), return_inverse=True, return_counts=True)
    odds_M = 1.0 / counts[classes].double()
    mask_TC = masks_by_task(ctx)
    for _ in range(steps):
        drawn = torch.multinomial(odds_M, ctx.batch_size, replacement=True, generator=ctx.rng("fpf.draws"))
        drawn = drawn.to(held.y.device)
        mask = ctx.mask if mask_TC is None else mask_TC[held.task[drawn]]
        yield Batch(held.x[drawn], held.y[drawn], mask)
