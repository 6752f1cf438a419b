"""What LwF and feature distillation share: the model that the last task ended with is kept as a teacher."""

# P = length of the flat vector
from __future__ import annotations

from torch import Tensor

from fedcl.contracts.learner import Context, Phase, Plugin, State


class Teacher(Plugin):
    """Keep the global model that the client's last task ended with; with ``weight`` 0 nothing is kept."""

    phase = Phase.REGULARISER

    def __init__(self, *, weight: float) -> None:
        self.weight = weight
        self._teacher_P: Tensor | None = None

    def before_round(self, ctx: Context) -> None:
        if self._teacher_P is not None:
            ctx.set_teacher(self._teacher_P)

    def after_task(self, ctx: Context) -> None:
        if self.weight:
            self._teacher_P = ctx.model.vector()

    def state(self) -> State:
        return {} if self._teacher_P is None else {"teacher": self._teacher_P}

    def load(self, state: State) -> None:
        self._teacher_P = state.get("teacher")
