"""L2: a uniform pull towards the weights at the end of the last task.

Smith et al., "A Closer Look at Rehearsal-Free Continual Learning", CVPR Workshops 2023 (arXiv 2203.17269), section on
parameter regularisation: ``L(theta) + lambda sum_i (theta_i - theta*_i)^2`` over the parameters in scope, theta* the
model after the last task. Rows of a head that no finished task has used are not held.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from clients.learners.quadratic import Quadratic, parameters
from fedcl.client.scope import in_scope
from fedcl.contracts.learner import Context, State

# P = parameter elements
_HEAD = re.compile(r"^heads?\.")


class L2(Quadratic):
    r"""Hold the weights whose tensor's name matches ``scope`` where the last task left them.

    Parameters
    ----------
    weight
        lambda; 0 turns the term off.
    scope
        Regular expression searched for in the tensors' names, null for all; ``^(?!head)`` is all but the heads.

    Raises
    ------
    ValueError
        If ``scope`` is not a regular expression, or (in :meth:`check`) matches no tensor of the model.
    """

    key = "learner.l2"

    def __init__(self, *, weight: float = 0.1, scope: str | None = None) -> None:
        super().__init__(weight=weight, scope=scope)
        self._columns: list[int] = []

    def setup(self, ctx: Context) -> None:
        """Hold the elements in scope, all with the importance 1."""
        if self.weight:
            self._importance_AP = self.importance(ctx)[None]

    def importance(self, ctx: Context) -> Tensor:
        return held_elements(ctx, self.scope, self._columns)

    def after_task(self, ctx: Context) -> None:
        if self.weight:
            self._anchor_AP = parameters(ctx).clone()[None]
            self._columns = sorted({column for columns in ctx.task_columns.values() for column in columns})

    def state(self) -> State:
        """Return the anchor (1, P) and the head columns that it holds."""
        return {} if self._anchor_AP is None else {"anchor": self._anchor_AP, "columns": self._columns}

    def load(self, state: State) -> None:
        super().load(state)
        self._columns = state.get("columns", [])


def held_elements(ctx: Context, scope: str | None, columns: list[int]) -> Tensor:
    """Return 1 for the parameters in ``scope``, 0 for others and for head rows of no column in ``columns``: (P,).

    Raises
    ------
    ValueError
        If no tensor's name matches.
    """
    model = ctx.model
    held = torch.ones(model.num_parameters, device=ctx.device)
    seen = torch.zeros(ctx.num_columns, device=ctx.device)
    seen[columns] = 1.0
    start, rows = 0, seen[:0]
    for spec in (spec for spec in model.parameter_specs if _HEAD.match(spec.name)):
        if spec.name.endswith(".weight"):  # the first of a head's tensors, a row for each column
            rows = seen[start : start + spec.shape[0]]
            start += len(rows)
        if spec.shape[:1] == rows.shape:  # a learned scale has no rows
            held[spec.start : spec.stop] = rows.repeat_interleave(spec.size // len(rows))
    chosen = in_scope(model, scope, "learner.l2.scope")
    return held if chosen is None else held * chosen
