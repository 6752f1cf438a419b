"""Bad teacher: imitate a model that knows nothing on F, and the model as it was on R."""

# N = samples, C = logit columns, P = length of the flat vector
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clients.unlearners.averaging import Together
from clients.unlearners.steps import BATCH, allowed, change_of, gradients, optimizer, settings
from fedcl.contracts.unlearner import Local, Samples, UnlearnContext, UnlearnView
from fedcl.evaluation.predictions import masked
from fedcl.models.flat import FlatModel


class BadTeacher(Together):
    """Minimise KL(l p_bad + (1 - l) p_full || p), where l says whether a sample is to be forgotten.

    Chundawat et al., "Can Bad Teaching Induce Forgetting?", AAAI 2023, as in the code that goes with SSD. The bad
    teacher holds the weights the run began with, the full teacher those of the target before the edit.

    Parameters
    ----------
    rounds, epochs, lr, batch_size, optimizer
        As of :class:`~clients.unlearners.averaging.Together`.
    retain_share
        Share of a client's retained samples that take part, drawn once, in [0, 1].
    temperature
        Of all three softmaxes, above 0.
    everyone
        Whether clients that hold nothing of F imitate the full teacher in the same rounds.
    """

    def __init__(
        self,
        *,
        rounds: int = 1,
        epochs: int = 3,
        lr: float | None = 0.001,
        batch_size: int | None = None,
        optimizer: str = "adam",
        retain_share: float = 0.3,
        temperature: float = 1.0,
        everyone: bool = True,
    ) -> None:
        super().__init__(
            rounds=rounds, epochs=epochs, lr=lr, batch_size=batch_size, optimizer=optimizer, everyone=everyone
        )
        self.retain_share, self.temperature = retain_share, temperature

    def local(self, ctx: UnlearnContext, step: str) -> Local:
        retain = _share(ctx, self.retain_share)
        parts = [part for part in (ctx.forget, retain) if len(part)]
        if not parts or not (self.everyone or len(ctx.forget)):
            return Local(0, {})
        samples = Samples.join(parts)
        allowed_NC = allowed(samples, ctx.num_columns)
        taught_NC = self._taught(ctx, samples, allowed_NC)
        training = settings(ctx, epochs=self.epochs, lr=self.lr, batch_size=self.batch_size)
        move = optimizer(self.optimizer, ctx.model, training)
        batches = ctx.rng(f"batches {ctx.args.get('round', 0)}")
        steps = 0
        ctx.model.train()
        for _ in range(training.epochs):
            for rows in samples.drawn(training.batch_size, batches):
                log_p = log_probabilities(ctx.model, samples.x[rows], allowed_NC[rows], self.temperature)
                move(gradients(ctx.model, divergence(taught_NC[rows], log_p)))
                steps += 1
        return change_of(ctx, len(samples), steps=steps)

    def enclosed(self, original: Tensor, view: UnlearnView, number: int) -> dict[str, Tensor]:
        """Send the bad teacher, and the full one where it is not the model that is sent anyway."""
        return {"bad": view.initial} | ({"full": original} if number else {})

    def _taught(self, ctx: UnlearnContext, samples: Samples, allowed_NC: Tensor) -> Tensor:
        """Return what each sample's teacher says, probabilities (N, C): first those to forget, then the others."""
        teacher, few = ctx.other_model(), len(ctx.forget)
        teacher.eval()
        taught = []
        for weights, rows in (
            (ctx.tensors["bad"], slice(0, few)),
            (ctx.tensors.get("full", ctx.received), slice(few, len(samples))),
        ):
            teacher.load(weights)
            x, columns = torch.split(samples.x[rows], BATCH), torch.split(allowed_NC[rows], BATCH)
            with torch.no_grad():
                pairs = zip(x, columns, strict=True)
                taught += [log_probabilities(teacher, *pair, self.temperature).exp() for pair in pairs if len(pair[0])]
        return torch.cat(taught)


def log_probabilities(model: FlatModel, x: Tensor, allowed_NC: Tensor, temperature: float) -> Tensor:
    """Return log-probabilities (N, C) over the allowed columns, -inf elsewhere."""
    return F.log_softmax(masked(model(x).logits / temperature, allowed_NC), dim=1)


def divergence(taught_NC: Tensor, log_p_NC: Tensor) -> Tensor:
    """Return the mean over samples of KL(taught || p); columns that the teacher gives nothing count nothing."""
    said = taught_NC > 0
    log_p = torch.where(said, log_p_NC, torch.zeros_like(log_p_NC))
    log_taught = torch.where(said, taught_NC, torch.ones_like(taught_NC)).log()
    return (taught_NC * (log_taught - log_p)).sum(1).mean()


def _share(ctx: UnlearnContext, share: float) -> Samples:
    """Return ``share`` of the retained samples, rounded, drawn the same in every round."""
    count = round(share * len(ctx.retain))
    rows = torch.randperm(len(ctx.retain), generator=ctx.rng("retained"))[:count]
    return ctx.retain.at(rows.to(ctx.retain.y.device))
