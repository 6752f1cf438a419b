"""LwF: learning without forgetting.

Li and Hoiem, "Learning without Forgetting", ECCV 2016: on the new task's samples, the old outputs are to stay what the
model said before the task began. The paper's loss (its eq. 2 and 3) is the cross-entropy between outputs raised to 1/T;
the divergence used here has the same gradient, and is zero where nothing has been forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from clients.learners.teacher import Teacher
from fedcl.contracts.learner import Batch, Context, State
from fedcl.models.networks import Output

# B = batch, C = logit columns, K = columns of one group


class LwF(Teacher):
    """Add ``weight`` times the distillation of the model that the client's last task ended with.

    Parameters
    ----------
    weight
        Weight of the term; 0 turns it off.
    temperature
        T, which both outputs are divided by.
    t_squared
        Multiply by T^2 (Hinton et al. 2015), so that the gradient's size does not depend on T; Avalanche does not.
    """

    def __init__(self, *, weight: float = 1.0, temperature: float = 2.0, t_squared: bool = True) -> None:
        super().__init__(weight=weight)
        self.temperature = temperature
        self.t_squared = t_squared
        self._groups: list[list[int]] = []

    def loss(self, ctx: Context, batch: Batch, out: Output) -> Tensor | None:
        if not self.weight or self._teacher_P is None:
            return None
        teacher = ctx.teacher(batch.x).logits
        scale = self.weight * (self.temperature**2 if self.t_squared else 1.0)
        return scale * distillation(out.logits, teacher, self._groups, self.temperature)

    def after_task(self, ctx: Context) -> None:
        """Keep the model that the task ended with, and the columns of the tasks so far."""
        super().after_task(ctx)
        self._groups = column_groups(ctx) if self.weight else []

    def state(self) -> State:
        state = super().state()
        return {**state, "groups": self._groups} if state else {}

    def load(self, state: State) -> None:
        super().load(state)
        self._groups = state.get("groups", [])


def column_groups(ctx: Context) -> list[list[int]]:
    """Return the columns seen so far in groups, each one softmax: one per task if tasks have heads, else one."""
    seen = list(ctx.task_columns.values())
    if any(tensor.task is not None for tensor in ctx.model.spec):
        return [sorted(columns) for columns in seen]
    return [sorted({column for columns in seen for column in columns})]


def distillation(student_BC: Tensor, teacher_BC: Tensor, groups: Sequence[Sequence[int]], temperature: float) -> Tensor:
    """Return the sum over ``groups`` of KL(softmax(teacher / T) || softmax(student / T)), the mean over the batch."""
    terms = []
    for columns in groups:
        student_BK = F.log_softmax(student_BC[:, columns] / temperature, dim=1)
        teacher_BK = F.log_softmax(teacher_BC[:, columns] / temperature, dim=1)
        terms.append(F.kl_div(student_BK, teacher_BK, reduction="batchmean", log_target=True))
    return sum(terms[1:], terms[0]) if terms else student_BC.new_zeros(())
