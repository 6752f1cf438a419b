"""DER and DER++: dark experience replay.

Buzzega et al., "Dark Experience for General Continual Learning: a Strong, Simple Baseline", NeurIPS 2020. Memory keeps,
with each sample, the logits z the model gave when it was stored. DER (eq. 6): ``L + alpha E ||z - h(x)||^2`` over
samples (x, z) from memory; DER++ (eq. 7) adds ``beta E CE(y, h(x))`` over a second, independent draw. The squared norm
is taken as the mean over columns, as the authors' code does.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from clients.learners.replay import Replay
from fedcl.client.loop import masked_cross_entropy
from fedcl.client.policies import Policy
from fedcl.contracts.learner import Batch, Context
from fedcl.models.networks import Output

# B = incoming batch, R = replayed samples, C = logit columns, T = tasks


class DER(Replay):
    """Replay samples with the logits they had.

    Parameters
    ----------
    budget, replay_size, policy
        Those of :class:`~clients.learners.replay.Replay`; a budget of 0 turns the method off.
    alpha, beta
        Weights of the distance of logits, and of the cross-entropy on replayed labels (0: DER, above 0: DER++).
    refresh
        Whether the stored logits of a task's samples are computed again with the global model that the task ended with,
        and are replayed only from then on; otherwise they stay those of the first epoch, when the model knew little.

    The stream that fills the buffer counts each sample once: in the first epoch of the client's first local round of a
    task.
    """

    def __init__(
        self,
        *,
        budget: int | str = 200,
        alpha: float = 0.5,
        beta: float = 0.0,
        replay_size: int | None = None,
        refresh: bool = True,
        policy: Policy = "reservoir",
    ) -> None:
        if policy == "herding" and not refresh:
            raise ValueError("policy=herding: needs refresh=true: it chooses after the stream's logits are lost")
        self.key = "learner.derpp" if beta else "learner.der"  # type: ignore[misc]
        super().__init__(budget=budget, replay_size=replay_size, policy=policy)
        self.alpha = alpha
        self.beta = beta
        self.refresh = refresh
        self._known_TC: Tensor | None = None

    def before_round(self, ctx: Context) -> None:
        """Determine which logits of each task's samples are to be held."""
        super().before_round(ctx)
        self._known_TC = known_columns(ctx)
        if self.refresh:
            self._known_TC[ctx.task.id] = False

    def loss(self, ctx: Context, batch: Batch, out: Output) -> Tensor | None:
        """Return the replay terms, and offer the incoming samples with their logits to the buffer."""
        total = self._replay(ctx) if len(self._buffer) else None
        if ctx.is_new_task and ctx.epoch == 0:
            self._buffer.offer(ctx, batch, out.logits.detach())
        return total

    def _replay(self, ctx: Context) -> Tensor | None:
        terms = []
        if self.alpha:
            past = self._buffer.draw(ctx, self.replay_size)
            assert self._known_TC is not None
            assert past.logits is not None
            distance = logit_distance(ctx.model(past.x).logits, past.logits, self._known_TC[past.task])
            terms.append(self.alpha * distance)
        if self.beta:
            past = self._buffer.draw(ctx, self.replay_size)
            terms.append(self.beta * masked_cross_entropy(ctx.model(past.x), self.replayed(ctx, past)))
        return sum(terms[1:], terms[0]) if terms else None

    @torch.no_grad()
    def after_task(self, ctx: Context) -> None:
        """Store the logits that the global model at the task's end gives to the task's samples."""
        if self.refresh:
            ctx.model.eval()
            self._buffer.rewrite_logits(ctx.task.id, lambda x: ctx.model(x).logits, ctx.data.restore)
        self._buffer.finalize(ctx, logits=True)


def known_columns(ctx: Context) -> Tensor:
    """Return which logits of a sample of each task id, up to the largest seen, are to be held: bool (T, C).

    With one head all are, as in the paper: those of classes yet to come keep these from taking over old samples. With
    a head for each task, only those of heads that had been trained when the sample was stored.
    """
    known_TC = torch.zeros(max(ctx.task_columns) + 1, ctx.num_columns, dtype=torch.bool, device=ctx.device)
    if all(tensor.task is None for tensor in ctx.model.spec):
        return ~known_TC
    for task, columns in ctx.task_columns.items():
        known_TC[task:, list(columns)] = True
    return known_TC


def logit_distance(logits_RC: Tensor, stored_RC: Tensor, known_RC: Tensor) -> Tensor:
    """Return the squared difference of logits, the mean over samples and their known columns; 0 without one."""
    squared_RC = F.mse_loss(logits_RC, stored_RC, reduction="none")
    return (squared_RC * known_RC).sum() / known_RC.sum().clamp_min(1)
