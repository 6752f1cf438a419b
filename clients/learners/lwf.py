"""LwF: learning without forgetting.

Li and Hoiem, "Learning without Forgetting", ECCV 2016: on the new task's samples, the old outputs are to stay what the
model said before the task began. The paper's loss (its eq. 2 and 3) is the cross-entropy between outputs raised to 1/T;
the divergence used here has the same gradient, and is zero where nothing has been forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from fedcl.contracts.learner import Batch, Context, Phase, Plugin, State
from fedcl.models.networks import Output

# B = batch, C = logit columns, K = columns of one group


class LwF(Plugin):
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

    phase = Phase.REGULARISER
    stackable = True

    def __init__(self, *, weight: float = 1.0, temperature: float = 2.0, t_squared: bool = True) -> None:
        self.weight = weight
        self.temperature = temperature
        self.t_squared = t_squared
        self._teacher: Tensor | None = None
        self._groups: list[list[int]] = []

    def before_round(self, ctx: Context) -> None:
        """Hand the old model to the context."""
        if self._active:
            assert self._teacher is not None
            ctx.set_teacher(self._teacher)

    def loss(self, ctx: Context, batch: Batch, out: Output) -> Tensor | None:
        """Return the distillation loss over the old columns; nothing before a task has ended."""
        if not self._active:
            return None
        teacher = ctx.teacher(batch.x).logits
        scale = self.weight * (self.temperature**2 if self.t_squared else 1.0)
        return scale * distillation(out.logits, teacher, self._groups, self.temperature)

    def after_task(self, ctx: Context) -> None:
        """Keep the model the task ended with, and which of its columns have meaning."""
        self._teacher = ctx.model.vector()
        self._groups = column_groups(ctx)

    @property
    def _active(self) -> bool:
        return self.weight > 0 and self._teacher is not None

    def state(self) -> State:
        """Return the old model (P,) and its columns."""
        return {} if self._teacher is None else {"teacher": self._teacher, "groups": self._groups}

    def load(self, state: State) -> None:
        """Restore them."""
        self._teacher = state.get("teacher")
        self._groups = state.get("groups", [])


def column_groups(ctx: Context) -> list[list[int]]:
    """Return the columns met so far, each group one softmax: a group a task with heads of their own, else one group."""
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
