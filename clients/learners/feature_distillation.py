"""Feature distillation: on new samples, the old model's features are to stay what they were.

Smith et al., "A Closer Look at Rehearsal-Free Continual Learning", CVPR Workshops 2023 (arXiv 2203.17269): to the loss
is added ``lambda ||f_old(x) - f(x)||^2`` on the penultimate features, the mean over the batch; f_old is the model that
the last task ended with. Jung et al., "Less-Forgetful Learning for Domain Expansion", 2016, has the same term.
"""

from __future__ import annotations

from torch import Tensor

from clients.learners.teacher import Teacher
from fedcl.contracts.learner import Batch, Context
from fedcl.models.networks import Output

# B = batch, F = features


class FeatureDistillation(Teacher):
    """Add ``weight`` times the squared distance of the features (B, F) from those of the last task's model.

    With ``weight`` 0 there is no term, and nothing is kept.
    """

    def __init__(self, *, weight: float = 0.1) -> None:
        super().__init__(weight=weight)

    def loss(self, ctx: Context, batch: Batch, out: Output) -> Tensor | None:
        if self._teacher_P is None:
            return None
        return self.weight * feature_distance(out.features, ctx.teacher(batch.x).features)


def feature_distance(student_BF: Tensor, teacher_BF: Tensor) -> Tensor:
    """Return the squared Euclidean distance of two batches of features, the mean over the batch."""
    return (student_BF - teacher_BF).flatten(1).square().sum(1).mean()
