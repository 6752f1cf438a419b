"""ER-ACE: replay with an asymmetric cross-entropy.

Caccia et al., "New Insights on Reducing Abrupt Representation Change in Online Continual Learning", ICLR 2022, eq.
4: ``L_ce(X_in; C_in) + L_ce(X_replay; C_seen)``. Incoming samples choose only among the classes C_in of their batch, so
that they do not push old classes away; replayed samples choose among all classes seen.
"""

from __future__ import annotations

from torch import Tensor

from clients.learners.er import ER
from fedcl.client.loop import masked_cross_entropy
from fedcl.contracts.learner import Batch, Context
from fedcl.models.masks import columns_of
from fedcl.models.networks import Output

# B = incoming batch, R = replayed samples, C = logit columns


class ERACE(ER):
    """Replay as :class:`~clients.learners.er.ER` does, with the loss above.

    During a client's first task there is no old class to protect: incoming samples choose as without replay.
    With a budget of 0 the loss is plain cross-entropy.
    """

    key = "learner.er_ace"

    def objective(self, ctx: Context, batch: Batch, out: Output) -> Tensor:
        new, past = halves(batch, out, self._incoming)
        if self._buffer.enabled and len(ctx.task_columns) > 1:
            new = (Batch(new[0].x, new[0].y, columns_of(new[0].y, ctx.num_columns)), new[1])
        return joint_cross_entropy(new, past)


def halves(batch: Batch, out: Output, incoming: int) -> tuple[tuple[Batch, Output], tuple[Batch, Output]]:
    """Return the first ``incoming`` samples and the rest, each with its outputs."""

    def part(rows: slice) -> tuple[Batch, Output]:
        mask = batch.mask if batch.mask is None or batch.mask.ndim == 1 else batch.mask[rows]
        return Batch(batch.x[rows], batch.y[rows], mask), Output(out.logits[rows], out.features[rows])

    return part(slice(None, incoming)), part(slice(incoming, None))


def joint_cross_entropy(new: tuple[Batch, Output], past: tuple[Batch, Output]) -> Tensor:
    """Return the cross-entropy of both, the mean over the samples of both; ``past`` may be empty."""
    loss, incoming, replayed = masked_cross_entropy(new[1], new[0]), len(new[0].y), len(past[0].y)
    if not replayed:
        return loss
    total = incoming * loss + replayed * masked_cross_entropy(past[1], past[0])
    return total / (incoming + replayed)
