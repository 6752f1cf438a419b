"""What learners with a memory share: a replay buffer, and the columns that a replayed sample may predict."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from fedcl.client.buffer import ReplayBuffer, Replayed
from fedcl.client.erasing import erase
from fedcl.client.policies import Policy
from fedcl.contracts.learner import Batch, Context, Phase, Plugin, State, TaskData
from fedcl.contracts.requests import ErasureOutcome, ForgetRequest

# C = logit columns, T = tasks


class Replay(Plugin):
    """Keep samples of the client's tasks in a buffer.

    ``budget`` and ``policy`` are those of :class:`~fedcl.client.buffer.ReplayBuffer`; with a budget of 0 nothing is
    kept. ``replay_size`` is the number of samples of one draw (null: as many as ``client.batch_size``).
    """

    phase = Phase.DATA
    key: ClassVar[str]  # of the configuration

    def __init__(
        self, *, budget: int | str = 200, replay_size: int | None = None, policy: Policy = "reservoir"
    ) -> None:
        self.budget = budget
        self.replay_size = replay_size
        self.policy = policy
        self._buffer = ReplayBuffer(budget, policy, at=self.key)
        self._mask_TC: Tensor | None = None

    def before_round(self, ctx: Context) -> None:
        self._mask_TC = masks_by_task(ctx)

    def replayed(self, ctx: Context, past: Replayed) -> Batch:
        """Return samples of the buffer as a batch in which each may predict the columns of its task."""
        return Batch(past.x, past.y, ctx.mask if self._mask_TC is None else self._mask_TC[past.task], fresh=0)

    def forget(self, ctx: Context, request: ForgetRequest, removed: TaskData) -> ErasureOutcome:
        return erase(self._buffer, self, request, removed)

    def state(self) -> State:
        return self._buffer.state()

    def load(self, state: State) -> None:
        self._buffer.load(state)


def masks_by_task(ctx: Context) -> Tensor | None:
    """Return the columns allowed to samples of each task seen so far, bool (T, C), or None if one mask serves all.

    A task whose columns the current mask allows (one growing head, masked to the columns seen) shares that mask; a task
    that it excludes (one with columns of its own) may choose among its own columns alone.
    """
    if ctx.task.mask is None or ctx.mask is None:
        return None
    allowed = set(ctx.task.mask)
    own = {task: columns for task, columns in ctx.task_columns.items() if not allowed.issuperset(columns)}
    if not own:
        return None
    mask_TC = ctx.mask.repeat(max(ctx.task_columns) + 1, 1)
    for task, columns in own.items():
        mask_TC[task] = False
        mask_TC[task, list(columns)] = True
    return mask_TC
